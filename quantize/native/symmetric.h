// The search for the scale of Q3_K (with an importance matrix) and Q6_K: each lane has one block of 16 weights.
#ifndef PESTLE_SYMMETRIC_H
#define PESTLE_SYMMETRIC_H

#include "sums.h"

#define BLOCK16 16
#define GROUPS16 16              // blocks a superblock
#define UNITS16 (16 / LANES)     // the vectors of one superblock
#define TRIES16 9

typedef struct {
    floats x[BLOCK16][UNITS16], w[BLOCK16][UNITS16], wx[BLOCK16][UNITS16];
} Weights16;

typedef struct {
    float largest[GROUPS16], scale[GROUPS16], factor[GROUPS16]; // factor is 0 where the block is taken for zero
} Found16;

INLINE void load_blocks16(const float *from, floats to[BLOCK16][UNITS16]) {
    for (int u = 0; u < UNITS16; ++u)
        for (int i = 0; i < BLOCK16; i += LANES) {
            floats columns[LANES];
            load_transposed(columns, from + u * LANES * BLOCK16 + i, BLOCK16);
            for (int k = 0; k < LANES; ++k) to[i + k][u] = columns[k];
        }
}

INLINE void weigh_by_square(Weights16 *weights) {
    for (int i = 0; i < BLOCK16; ++i)
        for (int u = 0; u < UNITS16; ++u) weights->w[i][u] = weights->x[i][u] * weights->x[i][u];
}

// `sigma2` is that of the superblock.
INLINE void weigh_columns16(const float *importance, float sigma2, Weights16 *weights) {
    load_blocks16(importance, weights->w);
    for (int i = 0; i < BLOCK16; ++i)
        for (int u = 0; u < UNITS16; ++u) {
            const floats x = weights->x[i][u];
            weights->w[i][u] = weights->w[i][u] * root(plus_product(splat(sigma2), x, x));
        }
}

INLINE float sum_of_squares(const float *x) {
    float sum = 0;
    for (int i = 0; i < SUPERBLOCK; ++i) sum = plus_product_if(FUSES_SQUARES, sum, x[i], x[i]);
    return sum;
}

// Finds the weight of the largest size in each block. Returns whether all numbers are ordinary ones.
INLINE bool find_extremes16(Weights16 *weights, floats extreme[UNITS16], float largest[GROUPS16]) {
    unsigned tame = ALL_LANES;
    for (int u = 0; u < UNITS16; ++u) {
        floats size = splat(0), sum = splat(0);
        extreme[u] = splat(0);
        for (int i = 0; i < BLOCK16; ++i) {
            const floats x = weights->x[i][u], larger_one = less(size, absolute(x));
            size = choose(larger_one, absolute(x), size);
            extreme[u] = choose(larger_one, x, extreme[u]);
            weights->wx[i][u] = weights->w[i][u] * x;
            sum += absolute(weights->w[i][u]) + absolute(weights->wx[i][u]); // NaN and infinity stay in it
        }
        store(largest + u * LANES, size);
        tame &= mask_bits(less(size, splat(TAME_WEIGHT))) & mask_bits(less(sum, splat(TAME_SUM)));
    }
    return tame == ALL_LANES;
}

INLINE void sum_candidate16(
    const Weights16 *weights, const floats factor[UNITS16], int top, bool fuses, floats sum_lx[UNITS16],
    floats sum_l2[UNITS16]
) {
    for (int u = 0; u < UNITS16; ++u) sum_lx[u] = sum_l2[u] = splat(0);
    for (int i = 0; i < BLOCK16; ++i)
        for (int u = 0; u < UNITS16; ++u) {
            const floats level = within(nearest(factor[u] * weights->x[i][u]), (float)-top, (float)(top - 1));
            sum_lx[u] = plus_product_if(fuses, sum_lx[u], weights->wx[i][u], level);
            sum_l2[u] = plus_product_if(fuses, sum_l2[u], weights->w[i][u] * level, level);
        }
}

// The weights are at most as large as `extreme`, so that a level is never far outside of its range, -top to top - 1.
INLINE void search_symmetric(const Weights16 *weights, const floats extreme[UNITS16], int top, Found16 *found) {
    floats factor[UNITS16], scale[UNITS16], best[UNITS16], kept[UNITS16], sum_lx[UNITS16], sum_l2[UNITS16];
    const floats zero = splat(0);
    for (int u = 0; u < UNITS16; ++u) factor[u] = kept[u] = splat((float)-top) / extreme[u];
    sum_candidate16(weights, factor, top, FUSES_FIRST_SUMS, sum_lx, sum_l2);
    for (int u = 0; u < UNITS16; ++u) {
        scale[u] = without(sum_lx[u] / sum_l2[u], equal(sum_l2[u], zero));
        best[u] = scale[u] * sum_lx[u];
    }
    for (int step = -TRIES16; step <= TRIES16; ++step) {
        if (step == 0) continue;
        for (int u = 0; u < UNITS16; ++u) factor[u] = splat(-plus_product((float)top, 0.1f, (float)step)) / extreme[u];
        sum_candidate16(weights, factor, top, true, sum_lx, sum_l2);
        for (int u = 0; u < UNITS16; ++u) {
            const floats better = both(less(zero, sum_l2[u]), less(best[u] * sum_l2[u], square(sum_lx[u])));
            const floats ratio = sum_lx[u] / sum_l2[u];
            scale[u] = choose(better, ratio, scale[u]);
            best[u] = choose(better, ratio * sum_lx[u], best[u]);
            kept[u] = choose(better, factor[u], kept[u]);
        }
    }
    for (int u = 0; u < UNITS16; ++u) {
        const floats empty = less(load(found->largest + u * LANES), splat(TINY_GROUP));
        store(found->scale + u * LANES, without(scale[u], empty));
        store(found->factor + u * LANES, without(kept[u], empty));
    }
}

// The levels of a block whose scale became 0 are those of the search; one that was empty has 0, the others `top` added.
INLINE void keep_symmetric(const float *x, float factor, int top, uint8_t *to) {
    for (int i = 0; i < BLOCK16; ++i) {
        const int level = nearest_wrapped(factor * x[i]);
        to[i] = factor == 0 ? 0 : (uint8_t)(top + (level < -top ? -top : level > top - 1 ? top - 1 : level));
    }
}

// Returns false where vectors do not round as the reference.
INLINE bool round_symmetric(const float *x, float unit, float largest, int top, uint8_t *to) {
    if (!(fabsf(largest / unit) < NEAREST_LIMIT)) return false;
    floats levels[16 / LANES];
    for (int k = 0; k < 16 / LANES; ++k) {
        const floats level = nearest(load(x + k * LANES) / splat(unit));
        levels[k] = within(level, (float)-top, (float)(top - 1)) + splat((float)top);
    }
    store_bytes(to, levels);
    return true;
}

#endif
