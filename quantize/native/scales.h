// The scales and minima of a superblock, rounded to a few bits each.
#ifndef PESTLE_SCALES_H
#define PESTLE_SCALES_H

#include "blocks.h"

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
    const float factor = largest > 0 ? 63 / largest : 0;
    for (int j = 0; j < GROUPS; ++j) rounded[j] = at_most((uint8_t)nearest_wrapped(factor * values[j]), 63);
    return largest / 63;
}

// Values, how much each matters, and what a level is at most: what is fitted by weighted least squares.
typedef struct {
    int count, top;
    const float *values, *weights;
} Fit;

INLINE int cut_level(const Fit *fit, float level) {
    const int rounded = nearest_wrapped(level);
    return rounded < fit->top ? rounded : fit->top;
}

INLINE float trial_loss(const Fit *fit, float factor) {
    const float unit = 1 / factor;
    float loss = 0;
    for (int j = 0; j < fit->count; ++j) {
        const float level = (float)cut_level(fit, factor * fit->values[j]);
        const float off = minus_product(fit->values[j], unit, level);
        loss = plus_product_if(FUSES_FITS, loss, fit->weights[j] * off, off);
    }
    return loss;
}

// The best of nine factors. The first trial's levels are bytes, and are not cut.
INLINE float find_factor(const Fit *fit, float largest) {
    float best = (float)fit->top / largest, least_loss = 0;
    const float unit = 1 / best;
    for (int j = 0; j < fit->count; ++j) {
        const float level = (float)(uint8_t)nearest_wrapped(best * fit->values[j]);
        const float off = minus_product(fit->values[j], unit, level);
        least_loss = plus_product_if(FUSES_FITS, least_loss, fit->weights[j] * off, off);
    }
    for (int step = -4; step <= 4; ++step) {
        if (step == 0) continue;
        const float factor = plus_product((float)fit->top, 0.1f, (float)step) / largest;
        const float loss = trial_loss(fit, factor);
        if (loss < least_loss) least_loss = loss, best = factor;
    }
    return best;
}

// Moves one level after the other to where the fit is best without it; returns whether one has moved.
INLINE bool refine_levels(const Fit *fit, uint8_t *levels, float *sum_lx, float *sum_l2) {
    bool moved = false;
    for (int j = 0; j < fit->count; ++j) {
        const float weight = fit->weights[j], value = fit->values[j], old = (float)levels[j];
        float lx = minus_product(*sum_lx, weight * value, old), l2 = minus_product(*sum_l2, weight * old, old);
        if (!(lx > 0 && l2 > 0)) continue;
        const int level = cut_level(fit, value * l2 / lx);
        if (level == levels[j]) continue;
        lx = plus_product(lx, weight * value, (float)level);
        l2 = plus_product(l2, weight * (float)level, (float)level);
        if (lx * lx * *sum_l2 > *sum_lx * *sum_lx * l2) {
            levels[j] = (uint8_t)level, *sum_lx = lx, *sum_l2 = l2;
            moved = true;
        }
    }
    return moved;
}

// Returns the unit.
INLINE float fit_levels(const Fit *fit, uint8_t *levels) {
    float largest = 0, sum_lx = 0, sum_l2 = 0;
    for (int j = 0; j < fit->count; ++j)
        if (!(largest > fit->values[j])) largest = fit->values[j];
    memset(levels, 0, (size_t)fit->count);
    if (largest < TINY_GROUP) return 0;
    const float factor = find_factor(fit, largest);
    for (int j = 0; j < fit->count; ++j) {
        const int level = cut_level(fit, factor * fit->values[j]);
        const float weight = fit->weights[j], whole = (float)level; // before it becomes a byte
        levels[j] = (uint8_t)level;
        sum_lx = plus_product_if(FUSES_FITS, sum_lx, weight * fit->values[j], whole);
        sum_l2 = plus_product_if(FUSES_FITS, sum_l2, weight * whole, whole);
    }
    for (int round = 0; round < 5 && refine_levels(fit, levels, &sum_lx, &sum_l2); ++round) {}
    return sum_l2 > 0 ? sum_lx / sum_l2 : 0;
}

INLINE bool are_tame(const float units[2]) { return fabsf(units[0]) < TAME_WEIGHT && fabsf(units[1]) < TAME_WEIGHT; }

#endif
