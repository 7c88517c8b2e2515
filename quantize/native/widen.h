// Weights of 16 bits become floats, exactly.
#ifndef PESTLE_WIDEN_H
#define PESTLE_WIDEN_H

#include "scalar.h"

#define STRIP 4096 // weights that are widened at once: they stay in the nearest cache

enum { SOURCE_F32 = 0, SOURCE_F16 = 1, SOURCE_BF16 = 30 }; // ggml's numbers

// A half's exponent is 112 less than that of a float, which a multiplication puts right for subnormal ones, too. What
// is not a number becomes a quiet one, as in ggml. Without branches, so that compilers make vectors of it.
INLINE float widened_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = (uint32_t)(half & 0x7FFF) << 13;
    const uint32_t special = 0u - (magnitude >> 23 >= 31), quiet = (uint32_t)(magnitude > 0x0F800000) << 22;
    return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f) | (special & (0x7F800000 | quiet)));
}

// `first` and `count` count weights.
INLINE void widen(int source, const uint16_t *from, int64_t first, int64_t count, float *to) {
    from += first;
    if (source == SOURCE_BF16)
        for (int64_t i = 0; i < count; ++i) to[i] = float_of((uint32_t)from[i] << 16);
    else
        for (int64_t i = 0; i < count; ++i) to[i] = widened_half(from[i]);
}

#endif
