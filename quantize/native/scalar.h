// What is done once a block or once a superblock: rounding, half floats, and the limits of the vector code.
#ifndef PESTLE_SCALAR_H
#define PESTLE_SCALAR_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define SUPERBLOCK 256
#define NEAREST_LIMIT 4194304.0f // 2^22: from here on llama.cpp's rounding wraps around, and adding a constant does not
#define TINY_GROUP 1e-15f        // llama.cpp takes a smaller group for zero
#define TAME_WEIGHT 1e9f         // beyond these (and for NaN) the reference does the superblock
#define TAME_SUM 1e30f

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// llama.cpp's rounding, for every float: the low bits of the sum, also where they have wrapped around.
INLINE int nearest_wrapped(float value) { return (int)(bits_of(value + 12582912.0f) & 0x7FFFFF) - 0x400000; }

// To the nearest half, ties to even. NaN and what is too large become infinity.
INLINE uint16_t half_of(float value) {
    const uint32_t sign = bits_of(value) >> 16 & 0x8000, magnitude = bits_of(value) & 0x7FFFFFFF;
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7C00);
    if (magnitude < 0x38800000) // a multiple of 2^-24, which is the last place of 0.5
        return (uint16_t)(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
    return (uint16_t)(sign | (magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}

INLINE float float_of_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7FFF;
    if (magnitude < 0x400) return float_of(bits_of((float)magnitude * 0x1p-24f) | sign);
    if (magnitude >= 0x7C00) return float_of(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    return float_of(sign | ((magnitude << 13) + 0x38000000));
}

// The value that is largest without its sign, the first of several; 0 if there is none.
INLINE float largest_by_size(const float *values, int count) {
    float largest = 0;
    for (int j = 0; j < count; ++j)
        if (fabsf(values[j]) > fabsf(largest)) largest = values[j];
    return largest;
}

INLINE void put_half(uint8_t *to, uint16_t half) { memcpy(to, &half, sizeof half); }

#endif
