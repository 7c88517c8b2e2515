// Q6_K superblocks: sixteen blocks, each with a scale of 8 bits and no minimum.
#ifndef PESTLE_Q6_H
#define PESTLE_Q6_H

#include "symmetric.h"

#define BYTES_Q6_K 210

INLINE void pack_levels6(const uint8_t levels[SUPERBLOCK], uint8_t *out) {
    uint8_t *low = out, *high = out + SUPERBLOCK / 2;
    for (int half = 0; half < SUPERBLOCK; half += 128, low += 64, high += 32)
        for (int i = 0; i < 32; ++i) {
            const uint8_t a = levels[half + i], b = levels[half + i + 32], c = levels[half + i + 64],
                          d = levels[half + i + 96];
            low[i] = (uint8_t)((a & 15) | c << 4);
            low[i + 32] = (uint8_t)((b & 15) | d << 4);
            high[i] = (uint8_t)(a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6);
        }
}

// `importance` may be null: a weight matters by its square then. Returns false if the reference has to do it.
INLINE bool encode_superblock6(const float *x, const float *importance, uint8_t *out) {
    Weights16 weights;
    Found16 found;
    floats extreme[UNITS16];
    uint8_t levels[SUPERBLOCK], *scales = out + 192;
    load_blocks16(x, weights.x);
    if (importance) load_blocks16(importance, weights.w);
    else weigh_by_square(&weights);
    if (!find_extremes16(&weights, extreme, found.largest)) return false;
    search_symmetric(&weights, extreme, 32, &found);
    const float largest_scale = largest_by_size(found.scale, GROUPS16);
    if (fabsf(largest_scale) < TINY_GROUP) {
        memset(out, 0, BYTES_Q6_K);
        return true;
    }
    const float factor = -128.0f / largest_scale;
    const uint16_t half = half_of(1 / factor);
    put_half(out + 208, half);
    for (int j = 0; j < GROUPS16; ++j) {
        const int rounded = nearest_wrapped(factor * found.scale[j]);
        const int8_t scale = (int8_t)(rounded < 127 ? rounded : 127);
        const float unit = float_of_half(half) * (float)scale;
        const float *block = x + j * BLOCK16;
        scales[j] = (uint8_t)scale;
        if (unit == 0) keep_symmetric(block, found.factor[j], 32, levels + j * BLOCK16);
        else if (!round_symmetric(block, unit, found.largest[j], 32, levels + j * BLOCK16)) return false;
    }
    pack_levels6(levels, out);
    return true;
}

#endif
