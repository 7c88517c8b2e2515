// The eight scales and minima of a Q4_K or Q5_K superblock, six bits each.
#ifndef PESTLE_SCALES45_H
#define PESTLE_SCALES45_H

#include "blocks.h"

#define TOP_SCALE 63

// Four pairs lie in whole bytes; the halves of the other four lie in four more bytes and in the top bits of the first.
INLINE void pack_scales(uint8_t packed[12], const uint8_t scales[GROUPS], const uint8_t minima[GROUPS]) {
    for (int j = 0; j < 4; ++j) {
        packed[j] = (uint8_t)(scales[j] | (scales[j + 4] >> 4) << 6);
        packed[j + 4] = (uint8_t)(minima[j] | (minima[j + 4] >> 4) << 6);
        packed[j + 8] = (uint8_t)((scales[j + 4] & 15) | (minima[j + 4] & 15) << 4);
    }
}

// What a reader makes of the bytes; not always what went in, for llama.cpp packs scales of more than six bits too.
INLINE void unpack_scales(const uint8_t packed[12], uint8_t scales[GROUPS], uint8_t minima[GROUPS]) {
    for (int j = 0; j < 4; ++j) {
        scales[j] = packed[j] & 63;
        minima[j] = packed[j + 4] & 63;
        scales[j + 4] = (uint8_t)((packed[j + 8] & 15) | (packed[j] >> 6) << 4);
        minima[j + 4] = (uint8_t)(packed[j + 8] >> 4 | (packed[j + 4] >> 6) << 4);
    }
}

INLINE uint8_t at_most(uint8_t value, uint8_t most) { return value < most ? value : most; }

// By the largest one; negative values wrap around before they are cut. Returns the unit.
INLINE float round_scales(const float values[GROUPS], uint8_t rounded[GROUPS]) {
    float largest = 0;
    for (int j = 0; j < GROUPS; ++j)
        if (values[j] > largest) largest = values[j];
    const float factor = largest > 0 ? (float)TOP_SCALE / largest : 0;
    for (int j = 0; j < GROUPS; ++j) rounded[j] = at_most((uint8_t)nearest_wrapped(factor * values[j]), TOP_SCALE);
    return largest / (float)TOP_SCALE;
}

INLINE float trial_loss(const float values[GROUPS], const float weights[GROUPS], float factor) {
    const float unit = 1 / factor;
    float loss = 0;
    for (int j = 0; j < GROUPS; ++j) {
        const int level = nearest_wrapped(factor * values[j]);
        const float off = values[j] - unit * (float)(level < TOP_SCALE ? level : TOP_SCALE);
        loss += weights[j] * off * off;
    }
    return loss;
}

// The best of nine factors. The first trial's levels are bytes, and are not cut.
INLINE float find_factor(const float values[GROUPS], const float weights[GROUPS], float largest) {
    float best = (float)TOP_SCALE / largest, least_loss = 0;
    const float unit = 1 / best;
    for (int j = 0; j < GROUPS; ++j) {
        const float off = values[j] - unit * (float)(uint8_t)nearest_wrapped(best * values[j]);
        least_loss += weights[j] * off * off;
    }
    for (int step = -4; step <= 4; ++step) {
        if (step == 0) continue;
        const float factor = (0.1f * (float)step + (float)TOP_SCALE) / largest;
        const float loss = trial_loss(values, weights, factor);
        if (loss < least_loss) least_loss = loss, best = factor;
    }
    return best;
}

// Moves one level after the other to where the weighted fit is best without it; returns whether one has moved.
INLINE bool refine_scales(
    const float values[GROUPS], const float weights[GROUPS], uint8_t levels[GROUPS], float *sum_lx, float *sum_l2
) {
    bool moved = false;
    for (int j = 0; j < GROUPS; ++j) {
        const float weight = weights[j], old = (float)levels[j];
        float lx = *sum_lx - weight * values[j] * old, l2 = *sum_l2 - weight * old * old;
        if (!(lx > 0 && l2 > 0)) continue;
        int level = nearest_wrapped(values[j] * l2 / lx);
        if (level > TOP_SCALE) level = TOP_SCALE;
        if (level == levels[j]) continue;
        lx += weight * values[j] * (float)level;
        l2 += weight * (float)level * (float)level;
        if (lx * lx * *sum_l2 > *sum_lx * *sum_lx * l2) {
            levels[j] = (uint8_t)level, *sum_lx = lx, *sum_l2 = l2;
            moved = true;
        }
    }
    return moved;
}

// By weighted least squares, with `weights` that say how much each block matters. Returns the unit.
INLINE float fit_scales(const float values[GROUPS], const float weights[GROUPS], uint8_t levels[GROUPS]) {
    float largest = 0, sum_lx = 0, sum_l2 = 0;
    for (int j = 0; j < GROUPS; ++j)
        if (!(largest > values[j])) largest = values[j];
    memset(levels, 0, GROUPS);
    if (largest < TINY_GROUP) return 0;
    const float factor = find_factor(values, weights, largest);
    for (int j = 0; j < GROUPS; ++j) {
        int level = nearest_wrapped(factor * values[j]);
        if (level > TOP_SCALE) level = TOP_SCALE;
        levels[j] = (uint8_t)level;
        sum_lx += weights[j] * values[j] * (float)level; // the sums take the level before it becomes a byte
        sum_l2 += weights[j] * (float)level * (float)level;
    }
    for (int round = 0; round < 5 && refine_scales(values, weights, levels, &sum_lx, &sum_l2); ++round) {}
    return sum_l2 > 0 ? sum_lx / sum_l2 : 0;
}

#endif
