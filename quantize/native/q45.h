// Q4_K and Q5_K superblocks: load, search, round the scales, round the weights, pack.
#ifndef PESTLE_Q45_H
#define PESTLE_Q45_H

#include "affine.h"
#include "scales.h"

typedef struct {
    Candidates plain, weighted; // without and with an importance matrix
    int bytes;
    bool fifth_bit;
    bool cuts_weighted_scales;
} Kind45;

static const Kind45 Q4_K = {{15, -1.0f, 0.1f, 20, true}, {15, -0.9f, 0.05f, 36, true}, 144, false, false};
static const Kind45 Q5_K = {{31, -0.5f, 0.1f, 15, true}, {31, -0.9f, 0.05f, 36, true}, 176, true, true};

// How much a weight matters is its own size and that of its block.
INLINE void weigh_plainly(const floats x[BLOCK][UNITS], floats w[BLOCK][UNITS]) {
    floats squares[UNITS];
    sum_squares(x, squares);
    for (int u = 0; u < UNITS; ++u) {
        const floats average = root(squares[u] / splat(BLOCK));
        for (int i = 0; i < BLOCK; ++i) w[i][u] = average + absolute(x[i][u]);
    }
}

INLINE void pack_levels(const uint8_t levels[SUPERBLOCK], bool fifth_bit, uint8_t *to) {
    uint8_t *nibbles = fifth_bit ? to + BLOCK : to;
    if (fifth_bit) {
        for (int i = 0; i < BLOCK; ++i) {
            unsigned high = 0;
            for (int j = 0; j < GROUPS; ++j) high |= (unsigned)(levels[j * BLOCK + i] >> 4) << j;
            to[i] = (uint8_t)high;
        }
    }
    for (int j = 0; j < GROUPS; j += 2)
        for (int i = 0; i < BLOCK; ++i)
            nibbles[j / 2 * BLOCK + i] = (uint8_t)((levels[j * BLOCK + i] & 15) | levels[(j + 1) * BLOCK + i] << 4);
}

// Rounds the scales and minima of the superblock that begins with lane `first`. Returns their units.
INLINE void round_both(
    const Kind45 *kind, bool weighted, const Found *found, int first, uint8_t packed[12], float units[2]
) {
    uint8_t scales[GROUPS], minima[GROUPS];
    float negated[GROUPS];
    for (int j = 0; j < GROUPS; ++j) negated[j] = -found->minimum[first + j];
    if (weighted) {
        const Fit of_scales = {GROUPS, 63, found->scale + first, found->importance + first};
        const Fit of_minima = {GROUPS, 63, negated, found->importance + first};
        units[0] = fit_levels(&of_scales, scales);
        units[1] = fit_levels(&of_minima, minima);
        if (kind->cuts_weighted_scales)
            for (int j = 0; j < GROUPS; ++j) scales[j] = at_most(scales[j], 63), minima[j] = at_most(minima[j], 63);
    } else {
        units[0] = round_scales(found->scale + first, scales);
        units[1] = round_scales(negated, minima);
    }
    pack_scales(packed, scales, minima);
}

// `first` is the superblock's first lane. Returns false if the reference has to do it.
INLINE bool finish_superblock(
    const Kind45 *kind, bool weighted, const float *x, const Found *found, int first, uint8_t *out
) {
    const int top = (int)kind->plain.top;
    uint8_t scales[GROUPS], minima[GROUPS], levels[SUPERBLOCK];
    float units[2];
    round_both(kind, weighted, found, first, out + 4, units);
    if (!are_tame(units)) return false;
    put_half(out, half_of(units[0]));
    put_half(out + 2, half_of(units[1]));
    unpack_scales(out + 4, scales, minima);
    const float scale = float_of_half(half_of(units[0])), offset = float_of_half(half_of(units[1]));
    for (int j = 0; j < GROUPS; ++j) {
        const float unit = scale * (float)scales[j];
        const float *block = x + j * BLOCK;
        uint8_t *to = levels + j * BLOCK;
        if (unit == 0) keep_levels(BLOCK, block, found, first + j, top, to);
        else if (!round_affine(BLOCK, block, unit, offset * (float)minima[j], found, first + j, top, to)) return false;
    }
    pack_levels(levels, kind->fifth_bit, out + 16);
    return true;
}

// Returns a bit for each superblock of the group that the reference has to do.
INLINE unsigned encode_group45(const Kind45 *kind, const Group *group, bool weighted) {
    floats x[BLOCK][UNITS], w[BLOCK][UNITS];
    unsigned hard = 0;
    Found found;
    load_group(group->x, x);
    if (weighted) weigh_by_importance(group, x, FUSES_SQUARES, w);
    else weigh_plainly(x, w);
    search_affine(BLOCK, x, w, weighted ? kind->weighted : kind->plain, &found);
    for (int s = 0; s < GROUP; ++s) {
        const bool done = all_sound(found.sound, s)
            && finish_superblock(kind, weighted, group->x[s], &found, s * GROUPS, group->out[s]);
        if (!done) hard |= 1u << s;
    }
    return hard;
}

#endif
