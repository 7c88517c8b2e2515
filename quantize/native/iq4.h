// IQ4_NL and IQ4_XS: a weight is a scale times one of sixteen values that are not evenly spaced.
#ifndef PESTLE_IQ4_H
#define PESTLE_IQ4_H

#include "blocks.h"

#define BYTES_IQ4_NL 18
#define BYTES_IQ4_XS 136
#define TRIES 7
#define LEAST_VALUE (-127)

// The nearest value, and its number, for a number in steps of a half: all the middles between two values are such
// steps, and what lies in the middle goes up.
#define NEAREST_VALUES(v) \
    [0 ... 24] = v(0, -127), [25 ... 68] = v(1, -104), [69 ... 107] = v(2, -83), [108 ... 141] = v(3, -65), \
    [142 ... 171] = v(4, -49), [172 ... 198] = v(5, -35), [199 ... 223] = v(6, -22), [224 ... 246] = v(7, -10), \
    [247 ... 269] = v(8, 1), [270 ... 293] = v(9, 13), [294 ... 318] = v(10, 25), [319 ... 346] = v(11, 38), \
    [347 ... 377] = v(12, 53), [378 ... 413] = v(13, 69), [414 ... 457] = v(14, 89), [458 ... 511] = v(15, 113)
#define VALUE(number, value) value
#define NUMBER(number, value) number
static const float values_iq4[512] = {NEAREST_VALUES(VALUE)}, numbers_iq4[512] = {NEAREST_VALUES(NUMBER)};

INLINE floats nearest_in(const float table[512], floats a) { return look_up(table, within(a, -128, 127.5f)); }

typedef struct {
    float scale[BLOCKS];
    unsigned sound[UNITS];
} FoundIq4;

INLINE void sum_candidate_iq4(
    const floats x[BLOCK][UNITS], const floats w[BLOCK][UNITS], const floats factor[UNITS], floats sum_qx[UNITS],
    floats sum_q2[UNITS]
) {
    for (int u = 0; u < UNITS; ++u) sum_qx[u] = sum_q2[u] = splat(0);
    for (int i = 0; i < BLOCK; ++i)
        for (int u = 0; u < UNITS; ++u) {
            const floats value = nearest_in(values_iq4, factor[u] * x[i][u]), weighed = w[i][u] * value;
            sum_qx[u] = plus_product(sum_qx[u], weighed, x[i][u]);
            sum_q2[u] = plus_product(sum_q2[u], weighed, value);
        }
}

INLINE void find_extremes(const floats x[BLOCK][UNITS], floats extreme[UNITS], floats size[UNITS]) {
    for (int u = 0; u < UNITS; ++u) extreme[u] = size[u] = splat(0);
    for (int i = 0; i < BLOCK; ++i)
        for (int u = 0; u < UNITS; ++u) {
            const floats larger_one = less(size[u], absolute(x[i][u]));
            size[u] = choose(larger_one, absolute(x[i][u]), size[u]);
            extreme[u] = choose(larger_one, x[i][u], extreme[u]);
        }
}

INLINE void search_iq4(const floats x[BLOCK][UNITS], const floats w[BLOCK][UNITS], FoundIq4 *found) {
    floats extreme[UNITS], size[UNITS], factor[UNITS], scale[UNITS], best[UNITS], sum_qx[UNITS], sum_q2[UNITS];
    floats sum_w[UNITS];
    const floats zero = splat(0);
    find_extremes(x, extreme, size);
    for (int u = 0; u < UNITS; ++u) {
        factor[u] = splat(1) / ((zero - extreme[u]) / splat(LEAST_VALUE));
        sum_w[u] = zero;
        for (int i = 0; i < BLOCK; ++i) sum_w[u] += absolute(w[i][u]) + absolute(x[i][u]); // NaN stays in a sum
    }
    sum_candidate_iq4(x, w, factor, sum_qx, sum_q2);
    for (int u = 0; u < UNITS; ++u) {
        scale[u] = both(sum_qx[u] / sum_q2[u], less(zero, sum_q2[u]));
        best[u] = scale[u] * sum_qx[u];
    }
    for (int step = -TRIES; step <= TRIES; ++step) {
        for (int u = 0; u < UNITS; ++u) factor[u] = splat((float)(step + LEAST_VALUE)) / extreme[u];
        sum_candidate_iq4(x, w, factor, sum_qx, sum_q2);
        for (int u = 0; u < UNITS; ++u) {
            const floats better = both(less(zero, sum_q2[u]), less(best[u] * sum_q2[u], sum_qx[u] * sum_qx[u]));
            const floats ratio = sum_qx[u] / sum_q2[u];
            scale[u] = choose(better, ratio, scale[u]);
            best[u] = choose(better, ratio * sum_qx[u], best[u]);
        }
    }
    for (int u = 0; u < UNITS; ++u) {
        const floats empty = less(size[u], splat(TINY_GROUP));
        scale[u] = without(scale[u], empty);
        store(found->scale + u * LANES, scale[u]);
        found->sound[u] = mask_bits(both(less(sum_w[u], splat(TAME_SUM)), less(absolute(scale[u]), splat(TAME_SUM))));
    }
}

// Rounds a block by the inverse of its unit, and packs it: the second half of the block in the high nibbles.
INLINE void round_block_iq4(const float *x, float inverse, uint8_t *nibbles) {
    uint8_t numbers[BLOCK];
    for (int i = 0; i < BLOCK; i += 16) {
        floats levels[16 / LANES];
        for (int k = 0; k < 16 / LANES; ++k)
            levels[k] = nearest_in(numbers_iq4, splat(inverse) * load(x + i + k * LANES));
        store_bytes(numbers + i, levels);
    }
    for (int i = 0; i < BLOCK / 2; ++i) nibbles[i] = (uint8_t)(numbers[i] | numbers[i + BLOCK / 2] << 4);
}

// Zero for zero. Of tiny numbers it may be infinite, which vectors multiply by zero otherwise than the reference.
INLINE float inverse_of(float value) { return value == 0 ? 0 : 1 / value; }

// Returns false if the reference has to do it.
INLINE bool finish_iq4_nl(const float *x, float scale, uint8_t *out) {
    const float inverse = inverse_of(scale);
    if (!(fabsf(inverse) < INFINITY)) return false;
    put_half(out, half_of(scale));
    round_block_iq4(x, inverse, out + 2);
    return true;
}

INLINE bool finish_iq4_xs(const float *x, const float scales[GROUPS], uint8_t *out) {
    uint16_t high = 0;
    const float unit = -largest_by_size(scales, GROUPS) / 32, factor = inverse_of(unit);
    memset(out + 4, 0, 4);
    for (int j = 0; j < GROUPS; ++j) {
        const int rounded = nearest_wrapped(factor * scales[j]);
        const int level = rounded < -32 ? -32 : rounded > 31 ? 31 : rounded;
        const float inverse = inverse_of(unit * (float)level);
        if (!(fabsf(inverse) < INFINITY)) return false;
        round_block_iq4(x + j * BLOCK, inverse, out + 8 + j * BLOCK / 2);
        out[4 + j / 2] |= (uint8_t)(((level + 32) & 15) << 4 * (j % 2));
        high |= (uint16_t)((level + 32) >> 4 << 2 * j);
    }
    put_half(out, half_of(unit));
    memcpy(out + 2, &high, sizeof high);
    return true;
}

// Returns a bit for each superblock of the group that the reference has to do.
INLINE unsigned encode_group_iq4_xs(const Group *group, bool weighted) {
    floats x[BLOCK][UNITS], w[BLOCK][UNITS];
    unsigned hard = 0;
    FoundIq4 found;
    load_group(group->x, x);
    if (weighted) weigh_by_importance(group, x, false, w);
    else
        for (int i = 0; i < BLOCK; ++i)
            for (int u = 0; u < UNITS; ++u) w[i][u] = x[i][u] * x[i][u];
    search_iq4(x, w, &found);
    for (int s = 0; s < GROUP; ++s) {
        const float *scales = found.scale + s * GROUPS;
        if (!all_sound(found.sound, s) || !finish_iq4_xs(group->x[s], scales, group->out[s])) hard |= 1u << s;
    }
    return hard;
}

// `x` and `importance` (or null) hold BLOCKS blocks. Returns a bit for each block that the reference has to do.
INLINE unsigned encode_group_iq4_nl(const float *x, const float *importance, uint8_t *const out[BLOCKS]) {
    floats weights[BLOCK][UNITS], w[BLOCK][UNITS], sigma2[UNITS];
    const float *starts[UNITS];
    unsigned hard = 0;
    FoundIq4 found;
    for (int u = 0; u < UNITS; ++u) starts[u] = x + u * LANES * BLOCK;
    load_blocks(starts, weights);
    if (importance) {
        for (int u = 0; u < UNITS; ++u) starts[u] = importance + u * LANES * BLOCK;
        load_blocks(starts, w);
        for (int u = 0; u < UNITS; ++u) {
            floats squares = splat(0); // never fused
            for (int i = 0; i < BLOCK; ++i) squares += square(weights[i][u]);
            sigma2[u] = squares * splat(2.0f / BLOCK);
        }
        weigh_columns(weights, sigma2, w);
    } else
        for (int i = 0; i < BLOCK; ++i)
            for (int u = 0; u < UNITS; ++u) w[i][u] = weights[i][u] * weights[i][u];
    search_iq4(weights, w, &found);
    for (int b = 0; b < BLOCKS; ++b) {
        const bool sound = found.sound[b / LANES] >> b % LANES & 1;
        if (!sound || !finish_iq4_nl(x + b * BLOCK, found.scale[b], out[b])) hard |= 1u << b;
    }
    return hard;
}

#endif
