// Q2_K superblocks: sixteen blocks, each with a scale and a minimum of 4 bits.
#ifndef PESTLE_Q2_H
#define PESTLE_Q2_H

#include "affine.h"
#include "scales.h"
#include "symmetric.h"

#define BYTES_Q2_K 84
#define PARTS2 (GROUPS16 / BLOCKS) // as many searches a superblock

static const Candidates Q2_K_PLAIN = {3, -0.5f, 0.1f, 15, false}, Q2_K_WEIGHTED = {3, -0.9f, 0.05f, 36, true};

// Four levels a byte: those of the same place in four blocks of 32.
INLINE void pack_pairs_of_bits(const uint8_t levels[SUPERBLOCK], uint8_t *out) {
    for (int half = 0; half < SUPERBLOCK; half += 128, out += 32)
        for (int i = 0; i < 32; ++i) {
            const uint8_t *level = levels + half + i;
            out[i] = (uint8_t)(level[0] | level[32] << 2 | level[64] << 4 | level[96] << 6);
        }
}

// Adds to the bytes of the scales; negative values wrap around, into the other half of the byte too. Returns the unit.
INLINE float round_scales2(const float values[GROUPS16], int shift, uint8_t packed[GROUPS16]) {
    float largest = 0;
    for (int j = 0; j < GROUPS16; ++j)
        if (values[j] > largest) largest = values[j];
    if (!(largest > 0)) return 0;
    const float factor = 15 / largest;
    for (int j = 0; j < GROUPS16; ++j)
        packed[j] = (uint8_t)(packed[j] | (unsigned)nearest_wrapped(factor * values[j]) << shift);
    return largest / 15;
}

INLINE void round_both2(
    bool weighted, const float scales[GROUPS16], const float minima[GROUPS16], const float importance[GROUPS16],
    uint8_t packed[GROUPS16], float units[2]
) {
    memset(packed, 0, GROUPS16);
    if (!weighted) {
        units[0] = round_scales2(scales, 0, packed);
        units[1] = round_scales2(minima, 4, packed);
        return;
    }
    uint8_t levels[2][GROUPS16];
    const Fit of_scales = {GROUPS16, 15, scales, importance}, of_minima = {GROUPS16, 15, minima, importance};
    units[0] = fit_levels(&of_scales, levels[0]);
    units[1] = fit_levels(&of_minima, levels[1]);
    for (int j = 0; j < GROUPS16; ++j) packed[j] = (uint8_t)(levels[0][j] | levels[1][j] << 4);
}

// `importance` may be null. Returns whether all numbers are ordinary ones.
INLINE bool search2(const float *x, const float *importance, Found found[PARTS2]) {
    Weights16 all;
    load_blocks16(x, all.x);
    if (importance) weigh_columns16(importance, sum_of_squares(x) / SUPERBLOCK, &all);
    else
        for (int i = 0; i < BLOCK16; ++i)
            for (int u = 0; u < UNITS16; ++u) all.w[i][u] = absolute(all.x[i][u]);
    for (int p = 0; p < PARTS2; ++p) {
        floats part[BLOCK16][UNITS], w[BLOCK16][UNITS];
        for (int i = 0; i < BLOCK16; ++i)
            for (int u = 0; u < UNITS; ++u) part[i][u] = all.x[i][p * UNITS + u], w[i][u] = all.w[i][p * UNITS + u];
        search_affine(BLOCK16, part, w, importance ? Q2_K_WEIGHTED : Q2_K_PLAIN, &found[p]);
        for (int u = 0; u < UNITS; ++u)
            if (found[p].sound[u] != ALL_LANES) return false;
    }
    return true;
}

// `importance` may be null. Returns false if the reference has to do it.
INLINE bool encode_superblock2(const float *x, const float *importance, uint8_t *out) {
    Found found[PARTS2];
    uint8_t levels[SUPERBLOCK];
    float scales[GROUPS16], minima[GROUPS16], weights[GROUPS16], units[2];
    if (!search2(x, importance, found)) return false;
    for (int j = 0; j < GROUPS16; ++j) {
        const Found *part = &found[j / BLOCKS];
        scales[j] = part->scale[j % BLOCKS];
        minima[j] = -part->minimum[j % BLOCKS];
        weights[j] = part->importance[j % BLOCKS];
    }
    round_both2(importance, scales, minima, weights, out, units);
    if (!are_tame(units)) return false;
    put_half(out + 80, half_of(units[0]));
    put_half(out + 82, half_of(units[1]));
    const float scale = float_of_half(half_of(units[0])), offset = float_of_half(half_of(units[1]));
    for (int j = 0; j < GROUPS16; ++j) {
        const float unit = scale * (float)(out[j] & 15), down = offset * (float)(out[j] >> 4);
        const float *block = x + j * BLOCK16;
        const Found *part = &found[j / BLOCKS];
        uint8_t *to = levels + j * BLOCK16;
        if (unit == 0) keep_levels(BLOCK16, block, part, j % BLOCKS, 3, to);
        else if (!round_affine(BLOCK16, block, unit, down, part, j % BLOCKS, 3, to)) return false;
    }
    pack_pairs_of_bits(levels, out + 16);
    return true;
}

#endif
