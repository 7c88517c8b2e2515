// Q8_0 and Q4_0: one scale for 32 weights, from the largest of them; nothing is searched.
#ifndef PESTLE_PLAIN_H
#define PESTLE_PLAIN_H

#include "lanes.h"
#include "scalar.h"

#define PLAIN 32 // weights a block
#define VECTORS (PLAIN / LANES)
#define BYTES_Q8_0 34
#define BYTES_Q4_0 18

// Returns the largest size; infinity if a number is not an ordinary one.
INLINE float load_plain(const float *from, floats x[VECTORS]) {
    floats size = splat(0), tame = equal(size, size);
    for (int v = 0; v < VECTORS; ++v) {
        x[v] = load(from + v * LANES);
        size = larger(absolute(x[v]), size);
        tame = both(tame, less(absolute(x[v]), splat(TAME_WEIGHT)));
    }
    return mask_bits(tame) == ALL_LANES ? largest_lane(size) : INFINITY;
}

// To the nearest whole number, halves away from zero.
INLINE floats round_away(floats a) {
    const floats whole = truncated(a), sign = both(a, splat(-0.0f));
    return whole + without(either(splat(1), sign), less(absolute(a - whole), splat(0.5f)));
}

// Returns false if the reference has to do it.
INLINE bool encode_q8_0(const float *from, uint8_t *out) {
    floats x[VECTORS];
    const float unit = load_plain(from, x) / 127, factor = unit == 0 ? 0 : 1 / unit;
    if (!(unit < TAME_WEIGHT && factor < INFINITY)) return false;
    put_half(out, half_of(unit));
    for (int v = 0; v < VECTORS; ++v) x[v] = round_away(x[v] * splat(factor));
    store_signed_bytes(out + 2, x);
    store_signed_bytes(out + 18, x + VECTORS / 2);
    return true;
}

// The first weight of this size.
INLINE float first_of_size(const floats x[VECTORS], const float *from, float size) {
    unsigned places = 0;
    for (int v = 0; v < VECTORS; ++v) places |= mask_bits(equal(absolute(x[v]), splat(size))) << v * LANES;
    return from[__builtin_ctz(places)];
}

INLINE bool encode_q4_0(const float *from, uint8_t *out) {
    floats x[VECTORS];
    uint8_t levels[PLAIN];
    const float size = load_plain(from, x);
    if (!(size < TAME_WEIGHT)) return false;
    const float unit = size == 0 ? -0.0f : first_of_size(x, from, size) / -8, factor = unit == 0 ? 0 : 1 / unit;
    if (!(fabsf(factor) < INFINITY)) return false;
    put_half(out, half_of(unit));
    for (int v = 0; v < VECTORS; ++v) x[v] = smaller(truncated(x[v] * splat(factor) + splat(8.5f)), splat(15));
    store_bytes(levels, x);
    store_bytes(levels + 16, x + VECTORS / 2);
    for (int i = 0; i < PLAIN / 2; ++i) out[2 + i] = (uint8_t)(levels[i] | levels[i + PLAIN / 2] << 4);
    return true;
}

#endif
