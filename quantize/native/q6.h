// Q6_K superblocks: each lane has one block of 16 weights, which has a scale of 8 bits and no minimum.
#ifndef PESTLE_Q6_H
#define PESTLE_Q6_H

#include "lanes.h"
#include "scalar.h"

#define BLOCK6 16
#define UNITS6 (16 / LANES) // the vectors of one superblock
#define BYTES6 210
#define STEPS6 9

typedef struct {
    floats x[BLOCK6][UNITS6], w[BLOCK6][UNITS6], wx[BLOCK6][UNITS6];
} Weights6;

typedef struct {
    float largest[16], scale[16], factor[16]; // factor is 0 where the block is taken for zero
} Found6;

// Returns whether all numbers are ordinary ones. `extreme` is the weight of the largest size.
INLINE bool load_superblock6(const float *x, const float *importance, Weights6 *to, floats extreme[UNITS6], Found6 *found) {
    unsigned tame = ALL_LANES;
    for (int u = 0; u < UNITS6; ++u) {
        floats columns[BLOCK6], weights[BLOCK6], size = splat(0), sum = splat(0);
        extreme[u] = splat(0);
        for (int i = 0; i < BLOCK6; i += LANES) {
            load_transposed(columns + i, x + u * LANES * BLOCK6 + i, BLOCK6);
            if (importance) load_transposed(weights + i, importance + u * LANES * BLOCK6 + i, BLOCK6);
        }
        for (int i = 0; i < BLOCK6; ++i) {
            const floats larger_one = less(size, absolute(columns[i]));
            size = choose(larger_one, absolute(columns[i]), size);
            extreme[u] = choose(larger_one, columns[i], extreme[u]);
            to->x[i][u] = columns[i];
            to->w[i][u] = columns[i] * columns[i];
            if (importance) to->w[i][u] = weights[i];
            to->wx[i][u] = to->w[i][u] * columns[i];
            sum += absolute(to->w[i][u]) + absolute(to->wx[i][u]); // NaN and infinity stay in it
        }
        store(found->largest + u * LANES, size);
        tame &= mask_bits(less(size, splat(TAME_WEIGHT))) & mask_bits(less(sum, splat(TAME_SUM)));
    }
    return tame == ALL_LANES;
}

INLINE void sum_candidate6(
    const Weights6 *weights, const floats factor[UNITS6], floats sum_lx[UNITS6], floats sum_l2[UNITS6]
) {
    for (int u = 0; u < UNITS6; ++u) sum_lx[u] = sum_l2[u] = splat(0);
    for (int i = 0; i < BLOCK6; ++i)
        for (int u = 0; u < UNITS6; ++u) {
            const floats level = within(nearest(factor[u] * weights->x[i][u]), -32, 31);
            sum_lx[u] += weights->wx[i][u] * level;
            sum_l2[u] += weights->w[i][u] * level * level;
        }
}

// The weights are at most as large as `extreme`, so that a level is never far outside of its range.
INLINE void search6(const Weights6 *weights, const floats extreme[UNITS6], Found6 *found) {
    floats factor[UNITS6], scale[UNITS6], best[UNITS6], kept[UNITS6], sum_lx[UNITS6], sum_l2[UNITS6];
    const floats zero = splat(0);
    for (int u = 0; u < UNITS6; ++u) factor[u] = kept[u] = splat(-32) / extreme[u];
    sum_candidate6(weights, factor, sum_lx, sum_l2);
    for (int u = 0; u < UNITS6; ++u) {
        scale[u] = without(sum_lx[u] / sum_l2[u], equal(sum_l2[u], zero));
        best[u] = scale[u] * sum_lx[u];
    }
    for (int step = -STEPS6; step <= STEPS6; ++step) {
        if (step == 0) continue;
        for (int u = 0; u < UNITS6; ++u) factor[u] = splat(-(32 + 0.1f * (float)step)) / extreme[u];
        sum_candidate6(weights, factor, sum_lx, sum_l2);
        for (int u = 0; u < UNITS6; ++u) {
            const floats better = both(less(zero, sum_l2[u]), less(best[u] * sum_l2[u], sum_lx[u] * sum_lx[u]));
            const floats ratio = sum_lx[u] / sum_l2[u];
            scale[u] = choose(better, ratio, scale[u]);
            best[u] = choose(better, ratio * sum_lx[u], best[u]);
            kept[u] = choose(better, factor[u], kept[u]);
        }
    }
    for (int u = 0; u < UNITS6; ++u) {
        const floats empty = less(load(found->largest + u * LANES), splat(TINY_GROUP));
        store(found->scale + u * LANES, without(scale[u], empty));
        store(found->factor + u * LANES, without(kept[u], empty));
    }
}

// The levels of a block whose scale became 0 are those of the search; one that was empty has 0, the others 32 added.
INLINE void keep_levels6(const float *x, float factor, uint8_t *to) {
    for (int i = 0; i < BLOCK6; ++i) {
        const int level = nearest_wrapped(factor * x[i]);
        to[i] = factor == 0 ? 0 : (uint8_t)(32 + (level < -32 ? -32 : level > 31 ? 31 : level));
    }
}

INLINE bool round_block6(const float *x, float unit, float largest, uint8_t *to) {
    if (!(fabsf(largest / unit) < NEAREST_LIMIT)) return false;
    floats levels[16 / LANES];
    for (int k = 0; k < 16 / LANES; ++k)
        levels[k] = within(nearest(load(x + k * LANES) / splat(unit)), -32, 31) + splat(32);
    store_bytes(to, levels);
    return true;
}

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

// `importance` may be null. Returns false if the reference has to do it.
INLINE bool encode_superblock6(const float *x, const float *importance, uint8_t *out) {
    Weights6 weights;
    Found6 found;
    floats extreme[UNITS6];
    uint8_t levels[SUPERBLOCK], *scales = out + 192;
    float scale_of_largest = 0, largest_scale = 0;
    if (!load_superblock6(x, importance, &weights, extreme, &found)) return false;
    search6(&weights, extreme, &found);
    for (int j = 0; j < 16; ++j)
        if (fabsf(found.scale[j]) > largest_scale) largest_scale = fabsf(found.scale[j]), scale_of_largest = found.scale[j];
    if (largest_scale < TINY_GROUP) {
        memset(out, 0, BYTES6);
        return true;
    }
    const float factor = -128.0f / scale_of_largest;
    const uint16_t half = half_of(1 / factor);
    put_half(out + 208, half);
    for (int j = 0; j < 16; ++j) {
        const int rounded = nearest_wrapped(factor * found.scale[j]);
        const int8_t scale = (int8_t)(rounded < 127 ? rounded : 127);
        const float unit = float_of_half(half) * (float)scale;
        scales[j] = (uint8_t)scale;
        if (unit == 0) keep_levels6(x + j * BLOCK6, found.factor[j], levels + j * BLOCK6);
        else if (!round_block6(x + j * BLOCK6, unit, found.largest[j], levels + j * BLOCK6)) return false;
    }
    pack_levels6(levels, out);
    return true;
}

#endif
