// SSE2: four lanes.
#ifndef PESTLE_LANES_SSE2_H
#define PESTLE_LANES_SSE2_H

#include <emmintrin.h>
#include <stdint.h>

#define LANES 4
#define UNITS 2
typedef __m128 floats;

static inline floats splat(float value) { return _mm_set1_ps(value); }
static inline floats load(const float *from) { return _mm_loadu_ps(from); }
static inline void store(float *to, floats values) { _mm_storeu_ps(to, values); }
static inline floats root(floats a) { return _mm_sqrt_ps(a); }
static inline floats smaller(floats a, floats b) { return _mm_min_ps(a, b); }
static inline floats larger(floats a, floats b) { return _mm_max_ps(a, b); }
static inline floats less(floats a, floats b) { return _mm_cmplt_ps(a, b); }
static inline floats equal(floats a, floats b) { return _mm_cmpeq_ps(a, b); }
static inline floats both(floats a, floats b) { return _mm_and_ps(a, b); }
static inline floats either(floats a, floats b) { return _mm_or_ps(a, b); }
static inline floats without(floats a, floats b) { return _mm_andnot_ps(b, a); }
static inline floats choose(floats mask, floats yes, floats no) {
    return _mm_or_ps(_mm_and_ps(mask, yes), _mm_andnot_ps(mask, no));
}
static inline unsigned mask_bits(floats mask) { return (unsigned)_mm_movemask_ps(mask); }

static inline void load_transposed(floats columns[LANES], const float *rows, int stride) {
    for (int k = 0; k < LANES; ++k) columns[k] = load(rows + k * stride);
    _MM_TRANSPOSE4_PS(columns[0], columns[1], columns[2], columns[3]);
}

static inline floats look_up(const float table[512], floats a) {
    const __m128i whole = _mm_cvttps_epi32(a + a); // towards zero: one less where that went up
    const floats went_up = less(a + a, _mm_cvtepi32_ps(whole));
    int entry[LANES];
    _mm_storeu_si128((__m128i *)entry, _mm_add_epi32(whole, _mm_castps_si128(went_up)));
    return _mm_setr_ps(table[256 + entry[0]], table[256 + entry[1]], table[256 + entry[2]], table[256 + entry[3]]);
}

static inline floats truncated(floats a) { return _mm_cvtepi32_ps(_mm_cvttps_epi32(a)); }

static inline float largest_lane(floats a) {
    const floats two = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

static inline __m128i words_of(floats first, floats second) {
    return _mm_packs_epi32(_mm_cvtps_epi32(first), _mm_cvtps_epi32(second));
}

static inline void store_bytes(uint8_t *to, const floats values[16 / LANES]) {
    const __m128i bytes = _mm_packus_epi16(words_of(values[0], values[1]), words_of(values[2], values[3]));
    _mm_storeu_si128((__m128i *)to, bytes);
}

static inline void store_signed_bytes(uint8_t *to, const floats values[16 / LANES]) {
    const __m128i bytes = _mm_packs_epi16(words_of(values[0], values[1]), words_of(values[2], values[3]));
    _mm_storeu_si128((__m128i *)to, bytes);
}

#endif
