// Q3_K superblocks: sixteen blocks, each with a scale of 6 bits and no minimum.
#ifndef PESTLE_Q3_H
#define PESTLE_Q3_H

#include "q2.h"
#include "symmetric.h"

#define BYTES_Q3_K 110
#define ROUNDS3 5

typedef struct {
    float level[BLOCK16][GROUPS16]; // 0 to 7
} Refined;

INLINE floats cut3(floats level) { return within(level, -4, 3); }

// Moves one weight of each block to where the fit is best without it. Returns a mask of the lanes where it moved;
// `sound` loses those where vectors do not round as the reference.
INLINE floats refine_weight3(
    floats x, floats w, floats wx, floats *level, floats *sum_lx, floats *sum_l2, floats *sound
) {
    const floats zero = splat(0);
    floats lx = minus_product(*sum_lx, wx, *level), l2 = minus_product(*sum_l2, w * *level, *level);
    const floats positive = less(zero, lx), wanted = x * l2 / lx;
    *sound = without(*sound, without(positive, less(absolute(wanted), splat(NEAREST_LIMIT))));
    const floats moved = cut3(nearest(wanted));
    lx = plus_product(lx, wx, moved);
    l2 = plus_product(l2, w * moved, moved);
    const floats fits_better = less(*sum_lx * *sum_lx * l2, lx * lx * *sum_l2);
    const floats changes = without(both(both(positive, less(zero, l2)), fits_better), equal(moved, *level));
    *level = choose(changes, moved, *level);
    *sum_lx = choose(changes, lx, *sum_lx);
    *sum_l2 = choose(changes, l2, *sum_l2);
    return changes;
}

// Returns whether vectors did all of it as the reference does.
INLINE bool search3(const Weights16 *weights, const floats extreme[UNITS16], Found16 *found, Refined *refined) {
    floats level[BLOCK16][UNITS16], sum_lx[UNITS16], sum_l2[UNITS16], sound[UNITS16], empty[UNITS16];
    const floats zero = splat(0);
    unsigned all_sound = ALL_LANES, moved = ALL_LANES;
    for (int u = 0; u < UNITS16; ++u) {
        empty[u] = less(load(found->largest + u * LANES), splat(TINY_GROUP));
        sum_lx[u] = sum_l2[u] = zero;
        sound[u] = equal(zero, zero);
    }
    for (int i = 0; i < BLOCK16; ++i)
        for (int u = 0; u < UNITS16; ++u) {
            level[i][u] = cut3(nearest(splat(-4) / extreme[u] * weights->x[i][u]));
            sum_lx[u] = plus_product(sum_lx[u], weights->wx[i][u], level[i][u]);
            sum_l2[u] = plus_product(sum_l2[u], weights->w[i][u] * level[i][u], level[i][u]);
        }
    for (int round = 0; round < ROUNDS3 && moved; ++round) {
        moved = 0;
        for (int i = 0; i < BLOCK16; ++i)
            for (int u = 0; u < UNITS16; ++u)
                moved |= mask_bits(refine_weight3(weights->x[i][u], weights->w[i][u], weights->wx[i][u], &level[i][u],
                                                  &sum_lx[u], &sum_l2[u], &sound[u]));
    }
    for (int u = 0; u < UNITS16; ++u) {
        const floats scale = both(sum_lx[u] / sum_l2[u], less(zero, sum_l2[u]));
        store(found->scale + u * LANES, without(scale, empty[u]));
        for (int i = 0; i < BLOCK16; ++i)
            store(refined->level[i] + u * LANES, without(level[i][u] + splat(4), empty[u]));
        all_sound &= mask_bits(either(sound[u], empty[u]));
    }
    return all_sound == ALL_LANES;
}

// Levels are 0 to 63: four bits in one half of a byte, two in one of four places of another.
INLINE void pack_scales3(const uint8_t levels[GROUPS16], uint8_t packed[12]) {
    memset(packed, 0, 12);
    for (int j = 0; j < GROUPS16; ++j) {
        packed[j % 8] = (uint8_t)(packed[j % 8] | (levels[j] & 15) << 4 * (j / 8));
        packed[8 + j % 4] = (uint8_t)(packed[8 + j % 4] | (levels[j] >> 4) << 2 * (j / 4));
    }
}

// By the largest one. Returns the unit.
INLINE float round_scales3(const float scales[GROUPS16], uint8_t levels[GROUPS16]) {
    const float largest = largest_by_size(scales, GROUPS16);
    memset(levels, 0, GROUPS16);
    if (largest == 0) return 0;
    const float factor = -32.0f / largest;
    for (int j = 0; j < GROUPS16; ++j) {
        const int8_t rounded = (int8_t)nearest_wrapped(factor * scales[j]);
        levels[j] = (uint8_t)((rounded < -32 ? -32 : rounded > 31 ? 31 : rounded) + 32);
    }
    return 1 / factor;
}

typedef struct {
    float lx, l2;
} Sums3;

INLINE int cut_scale3(float level) {
    const int rounded = nearest_wrapped(level);
    return rounded < -32 ? -32 : rounded > 31 ? 31 : rounded;
}

INLINE Sums3 sum_scales3(const float scales[GROUPS16], const float weights[GROUPS16], float factor, bool fuses) {
    Sums3 sums = {0, 0};
    for (int j = 0; j < GROUPS16; ++j) {
        const float level = (float)cut_scale3(factor * scales[j]);
        sums.lx = plus_product_if(fuses, sums.lx, weights[j] * scales[j], level);
        sums.l2 = plus_product_if(fuses, sums.l2, weights[j] * level, level);
    }
    return sums;
}

// The search of `symmetric.h` for one block, whose weights are the scales. Returns the unit.
INLINE float fit_scales3(const float scales[GROUPS16], const float weights[GROUPS16], uint8_t levels[GROUPS16]) {
    const float extreme = largest_by_size(scales, GROUPS16);
    memset(levels, 0, GROUPS16);
    if (fabsf(extreme) < TINY_GROUP) return 0;
    float kept = -32 / extreme;
    Sums3 sums = sum_scales3(scales, weights, kept, FUSES_FIRST_SUMS);
    float unit = sums.l2 != 0 ? sums.lx / sums.l2 : 0, best = unit * sums.lx;
    for (int step = -TRIES16; step <= TRIES16; ++step) {
        if (step == 0) continue;
        const float factor = -plus_product(32.0f, 0.1f, (float)step) / extreme;
        sums = sum_scales3(scales, weights, factor, true);
        if (!(sums.l2 > 0 && sums.lx * sums.lx > best * sums.l2)) continue;
        unit = sums.lx / sums.l2, best = unit * sums.lx, kept = factor;
    }
    for (int j = 0; j < GROUPS16; ++j) levels[j] = (uint8_t)(32 + cut_scale3(kept * scales[j]));
    return unit;
}

INLINE void pack_levels3(uint8_t levels[SUPERBLOCK], uint8_t *out) {
    for (int i = 0; i < 32; ++i) {
        unsigned high = 0;
        for (int j = 0; j < 8; ++j) high |= (unsigned)(levels[j * 32 + i] >> 2) << j;
        out[i] = (uint8_t)high;
    }
    for (int i = 0; i < SUPERBLOCK; ++i) levels[i] &= 3;
    pack_pairs_of_bits(levels, out + 32);
}

// Returns false if the reference has to do it. The scales' unit is found by their size, or by how much each matters.
INLINE bool search_both3(
    const float *x, const float *importance, Found16 *found, Refined *refined, uint8_t levels[GROUPS16], float *unit
) {
    Weights16 weights;
    floats extreme[UNITS16];
    load_blocks16(x, weights.x);
    if (importance) weigh_columns16(importance, 2 * sum_of_squares(x) / SUPERBLOCK, &weights);
    else weigh_by_square(&weights);
    if (!find_extremes16(&weights, extreme, found->largest)) return false;
    if (!importance) {
        if (!search3(&weights, extreme, found, refined)) return false;
        *unit = round_scales3(found->scale, levels);
        return true;
    }
    float sums[GROUPS16];
    search_symmetric(&weights, extreme, 4, found);
    for (int u = 0; u < UNITS16; ++u) {
        floats sum = splat(0);
        for (int i = 0; i < BLOCK16; ++i) sum += weights.w[i][u];
        store(sums + u * LANES, sum);
    }
    *unit = fit_scales3(found->scale, sums, levels);
    return true;
}

// `importance` may be null. Returns false if the reference has to do it.
INLINE bool encode_superblock3(const float *x, const float *importance, uint8_t *out) {
    Found16 found;
    Refined refined;
    uint8_t levels[SUPERBLOCK], scales[GROUPS16];
    float all;
    if (!search_both3(x, importance, &found, &refined, scales, &all) || !(fabsf(all) < TAME_WEIGHT)) return false;
    pack_scales3(scales, out + 96);
    put_half(out + 108, half_of(all));
    const float scale = float_of_half(half_of(all));
    for (int j = 0; j < GROUPS16; ++j) {
        const float unit = scale * (float)(scales[j] - 32);
        const float *block = x + j * BLOCK16;
        uint8_t *to = levels + j * BLOCK16;
        if (unit != 0) {
            if (!round_symmetric(block, unit, found.largest[j], 4, to)) return false;
        } else if (importance) keep_symmetric(block, found.factor[j], 4, to);
        else
            for (int i = 0; i < BLOCK16; ++i) to[i] = (uint8_t)refined.level[i][j];
    }
    pack_levels3(levels, out);
    return true;
}

#endif
