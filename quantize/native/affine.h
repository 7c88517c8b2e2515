// The search for scale and minimum of Q2_K, Q4_K and Q5_K: each lane has one block of 16 or 32 weights.
#ifndef PESTLE_AFFINE_H
#define PESTLE_AFFINE_H

#include "blocks.h"

// A candidate's factor is (first + delta * step + top) / (largest - minimum), for step = 0 to steps.
typedef struct {
    float top, first, delta;
    int steps;
    bool squared; // what is off counts by its square
} Candidates;

// A block is about scale * level + minimum. The winner's levels were nearest(factor * (weight - base)).
typedef struct {
    float smallest[BLOCKS], largest[BLOCKS]; // of the weights
    float scale[BLOCKS], minimum[BLOCKS], factor[BLOCKS], base[BLOCKS], importance[BLOCKS];
    unsigned sound[UNITS]; // a bit a lane: nothing happened that vectors do otherwise than the reference
} Found;

typedef struct {
    floats smallest, largest, sum_w, sum_x;       // of the block
    floats minimum, scale, error, factor, base;   // the best so far
    floats flat, sound;                           // masks
} Lane;

INLINE void take_extent(int length, const floats x[][UNITS], const floats w[][UNITS], Lane lane[UNITS]) {
    floats low[UNITS], high[UNITS], sum_w[UNITS], sum_x[UNITS];
    for (int u = 0; u < UNITS; ++u) {
        low[u] = high[u] = x[0][u];
        sum_w[u] = w[0][u];
        sum_x[u] = w[0][u] * x[0][u];
    }
    for (int i = 1; i < length; ++i)
        for (int u = 0; u < UNITS; ++u) {
            low[u] = smaller(x[i][u], low[u]);
            high[u] = larger(x[i][u], high[u]);
            sum_w[u] += w[i][u];
            sum_x[u] = plus_product(sum_x[u], w[i][u], x[i][u]);
        }
    for (int u = 0; u < UNITS; ++u) {
        lane[u].smallest = low[u], lane[u].largest = high[u], lane[u].sum_w = sum_w[u], lane[u].sum_x = sum_x[u];
        lane[u].minimum = lane[u].base = smaller(splat(0), low[u]);
        lane[u].flat = equal(high[u], lane[u].minimum);
        lane[u].sound = less(absolute(sum_w[u]), splat(TAME_SUM)); // NaN and infinity stay in a sum
    }
}

// Rounding is monotonous, so that what the extremes become tells of all weights between them.
INLINE void check_rounding(Lane *lane, floats factor) {
    const floats low = factor * (lane->smallest - lane->minimum), high = factor * (lane->largest - lane->minimum);
    lane->sound = both(lane->sound, less(absolute(low), splat(NEAREST_LIMIT)));
    lane->sound = both(lane->sound, less(absolute(high), splat(NEAREST_LIMIT)));
}

INLINE void start_with_extent(
    int length, const floats x[][UNITS], const floats w[][UNITS], Lane lane[UNITS], Candidates candidates
) {
    const float top = candidates.top;
    floats error[UNITS];
    for (int u = 0; u < UNITS; ++u) {
        lane[u].factor = splat(top) / (lane[u].largest - lane[u].minimum);
        lane[u].scale = splat(1) / lane[u].factor;
        check_rounding(&lane[u], lane[u].factor);
        error[u] = splat(0);
    }
    for (int i = 0; i < length; ++i)
        for (int u = 0; u < UNITS; ++u) {
            const floats level = within(nearest(lane[u].factor * (x[i][u] - lane[u].minimum)), 0, top);
            const floats off = plus_product(lane[u].minimum, lane[u].scale, level) - x[i][u];
            const floats loss = candidates.squared ? square(off) : absolute(off);
            error[u] = plus_product_if(FUSES_FIRST_ERRORS, error[u], w[i][u], loss);
        }
    for (int u = 0; u < UNITS; ++u) lane[u].error = error[u];
}

// By weighted least squares, for levels with these sums; `exists` is a mask.
INLINE void fit(
    const Lane *lane, floats sum_l, floats sum_l2, floats sum_xl, floats *scale, floats *minimum, floats *exists
) {
    const floats zero = splat(0), determinant = plus_product(-(sum_l * sum_l), lane->sum_w, sum_l2);
    *exists = less(zero, determinant);
    *scale = plus_product(-(lane->sum_x * sum_l), lane->sum_w, sum_xl) / determinant;
    *minimum = plus_product(-(sum_l * sum_xl), sum_l2, lane->sum_x) / determinant;
    const floats above = less(zero, *minimum);
    if (mask_bits(above)) *scale = choose(above, sum_xl / sum_l2, *scale);
    *minimum = smaller(zero, *minimum);
}

INLINE void keep_better(Lane *lane, floats error, floats exists, floats scale, floats minimum, floats factor) {
    const floats better = both(exists, less(error, lane->error));
    lane->error = choose(better, error, lane->error);
    lane->scale = choose(better, scale, lane->scale);
    lane->factor = choose(better, factor, lane->factor);
    lane->base = choose(better, lane->minimum, lane->base);
    lane->minimum = choose(better, minimum, lane->minimum);
}

// `ratio` is the candidate's factor times the extent. The minimum of a winner is the base of the next candidate.
INLINE void try_candidate(
    int length, const floats x[][UNITS], const floats w[][UNITS], Lane lane[UNITS], float ratio, Candidates candidates
) {
    const float top = candidates.top;
    floats level[BLOCK][UNITS], factor[UNITS], base[UNITS], sum_l[UNITS], sum_l2[UNITS], sum_xl[UNITS];
    floats scale[UNITS], minimum[UNITS], exists[UNITS], error[UNITS];
    for (int u = 0; u < UNITS; ++u) {
        base[u] = lane[u].minimum;
        factor[u] = splat(ratio) / (lane[u].largest - base[u]);
        check_rounding(&lane[u], factor[u]);
        sum_l[u] = sum_l2[u] = sum_xl[u] = splat(0);
    }
    for (int i = 0; i < length; ++i)
        for (int u = 0; u < UNITS; ++u) {
            level[i][u] = within(nearest(factor[u] * (x[i][u] - base[u])), 0, top);
            const floats weighed = w[i][u] * level[i][u];
            sum_l[u] += weighed; // these three are never fused
            sum_l2[u] += weighed * level[i][u];
            sum_xl[u] += weighed * x[i][u];
        }
    for (int u = 0; u < UNITS; ++u) {
        fit(&lane[u], sum_l[u], sum_l2[u], sum_xl[u], &scale[u], &minimum[u], &exists[u]);
        error[u] = splat(0);
    }
    for (int i = 0; i < length; ++i)
        for (int u = 0; u < UNITS; ++u) {
            const floats off = plus_product(minimum[u], scale[u], level[i][u]) - x[i][u];
            error[u] = plus_product(error[u], w[i][u], candidates.squared ? square(off) : absolute(off));
        }
    for (int u = 0; u < UNITS; ++u) keep_better(&lane[u], error[u], exists[u], scale[u], minimum[u], factor[u]);
}

INLINE void search_affine(
    int length, const floats x[][UNITS], const floats w[][UNITS], Candidates candidates, Found *found
) {
    Lane lane[UNITS];
    take_extent(length, x, w, lane);
    start_with_extent(length, x, w, lane, candidates);
    for (int step = 0; step <= candidates.steps; ++step) {
        const float ratio = plus_product(candidates.first, candidates.delta, (float)step) + candidates.top;
        try_candidate(length, x, w, lane, ratio, candidates);
    }
    for (int u = 0; u < UNITS; ++u) {
        const floats flat = lane[u].flat; // its levels are all 0, and so is its scale
        store(found->smallest + u * LANES, lane[u].smallest);
        store(found->largest + u * LANES, lane[u].largest);
        store(found->scale + u * LANES, without(lane[u].scale, flat));
        store(found->minimum + u * LANES, lane[u].minimum);
        store(found->factor + u * LANES, without(lane[u].factor, flat));
        store(found->base + u * LANES, lane[u].base);
        store(found->importance + u * LANES, lane[u].sum_w);
        found->sound[u] = mask_bits(either(lane[u].sound, flat));
    }
}

// The levels of the winner, for a block whose scale became 0. `lane` is the block's.
INLINE void keep_levels(int length, const float *x, const Found *found, int lane, int top, uint8_t *to) {
    for (int i = 0; i < length; ++i) {
        const int level = nearest_wrapped(found->factor[lane] * (x[i] - found->base[lane]));
        to[i] = (uint8_t)(level < 0 ? 0 : level > top ? top : level);
    }
}

// Rounds to a scale and a minimum that have been rounded. Returns false where vectors do not round as the reference.
INLINE bool round_affine(
    int length, const float *x, float unit, float offset, const Found *found, int lane, int top, uint8_t *to
) {
    const float least = (found->smallest[lane] + offset) / unit, most = (found->largest[lane] + offset) / unit;
    if (!(fabsf(least) < NEAREST_LIMIT && fabsf(most) < NEAREST_LIMIT)) return false;
    for (int i = 0; i < length; i += 16) {
        floats levels[16 / LANES];
        for (int k = 0; k < 16 / LANES; ++k)
            levels[k] = within(nearest((load(x + i + k * LANES) + splat(offset)) / splat(unit)), 0, (float)top);
        store_bytes(to + i, levels);
    }
    return true;
}

#endif
