// Q4_K and Q5_K superblocks: load, search, round the scales, round the weights, pack.
#ifndef PESTLE_Q45_H
#define PESTLE_Q45_H

#include "scales45.h"
#include "search45.h"

typedef struct {
    Candidates plain, weighted; // without and with an importance matrix
    int bytes;
    bool fifth_bit;
    bool cuts_weighted_scales;
} Kind45;

static const Kind45 Q4_K = {{15, -1.0f, 0.1f, 20}, {15, -0.9f, 0.05f, 36}, 144, false, false};
static const Kind45 Q5_K = {{31, -0.5f, 0.1f, 15}, {31, -0.9f, 0.05f, 36}, 176, true, true};

// How much a weight matters is its own size and that of its block.
INLINE void weigh_plainly(const floats x[BLOCK][UNITS], floats w[BLOCK][UNITS]) {
    floats squares[UNITS];
    sum_squares(x, squares);
    for (int u = 0; u < UNITS; ++u) {
        const floats average = root(squares[u] / splat(BLOCK));
        for (int i = 0; i < BLOCK; ++i) w[i][u] = average + absolute(x[i][u]);
    }
}

// Returns false where the vectors' rounding is not the reference's.
INLINE bool round_block(const float *x, float unit, float offset, float smallest, float largest, float top, uint8_t *to) {
    if (!(fabsf((smallest + offset) / unit) < NEAREST_LIMIT && fabsf((largest + offset) / unit) < NEAREST_LIMIT))
        return false;
    for (int i = 0; i < BLOCK; i += 16) {
        floats levels[16 / LANES];
        for (int k = 0; k < 16 / LANES; ++k)
            levels[k] = within(nearest((load(x + i + k * LANES) + splat(offset)) / splat(unit)), 0, top);
        store_bytes(to + i, levels);
    }
    return true;
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

// `first` is the superblock's first lane. Returns false if the reference has to do it.
INLINE bool finish_superblock(const Kind45 *kind, bool weighted, const float *x, const Found *found, int first, uint8_t *out) {
    const float *importance = found->importance + first;
    uint8_t scales[GROUPS], minima[GROUPS], levels[SUPERBLOCK];
    float negated[GROUPS], units[2];
    for (int j = 0; j < GROUPS; ++j) negated[j] = -found->minimum[first + j];
    units[0] = weighted ? fit_scales(found->scale + first, importance, scales) : round_scales(found->scale + first, scales);
    units[1] = weighted ? fit_scales(negated, importance, minima) : round_scales(negated, minima);
    if (weighted && kind->cuts_weighted_scales)
        for (int j = 0; j < GROUPS; ++j) scales[j] = at_most(scales[j], 63), minima[j] = at_most(minima[j], 63);
    for (int k = 0; k < 2; ++k) {
        if (!(fabsf(units[k]) < TAME_WEIGHT)) return false;
        put_half(out + 2 * k, half_of(units[k]));
    }
    pack_scales(out + 4, scales, minima);
    unpack_scales(out + 4, scales, minima);
    const float scale = float_of_half(half_of(units[0])), offset = float_of_half(half_of(units[1]));
    for (int j = 0; j < GROUPS; ++j) {
        const int lane = first + j;
        const float unit = scale * (float)scales[j], top = kind->plain.top;
        if (unit == 0) { // the levels of the search stay
            for (int i = 0; i < BLOCK; ++i) {
                const int level = nearest_wrapped(found->factor[lane] * (x[j * BLOCK + i] - found->base[lane]));
                levels[j * BLOCK + i] = (uint8_t)(level < 0 ? 0 : level > (int)top ? (int)top : level);
            }
        } else if (!round_block(x + j * BLOCK, unit, offset * (float)minima[j], found->smallest[lane],
                                found->largest[lane], top, levels + j * BLOCK))
            return false;
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
    if (weighted) weigh_by_importance(group, x, w);
    else weigh_plainly(x, w);
    search(x, w, weighted ? kind->weighted : kind->plain, &found);
    for (int s = 0; s < GROUP; ++s) {
        const bool done = all_sound(found.sound, s)
            && finish_superblock(kind, weighted, group->x[s], &found, s * GROUPS, group->out[s]);
        if (!done) hard |= 1u << s;
    }
    return hard;
}

#endif
