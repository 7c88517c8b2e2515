// One vector of floats, LANES of them, for the instruction set that this file is compiled for. Each operation is one
// IEEE operation a lane: what a lane computes is what scalar code computes that does the same steps.
#ifndef PESTLE_LANES_H
#define PESTLE_LANES_H

#include <stdint.h>

#if defined(__AVX2__)

#include <immintrin.h>
#define LANES 8
typedef __m256 floats;

static inline floats splat(float value) { return _mm256_set1_ps(value); }
static inline floats load(const float *from) { return _mm256_loadu_ps(from); }
static inline void store(float *to, floats values) { _mm256_storeu_ps(to, values); }
static inline floats root(floats a) { return _mm256_sqrt_ps(a); }
static inline floats smaller(floats a, floats b) { return _mm256_min_ps(a, b); } // a < b ? a : b, also for NaN
static inline floats larger(floats a, floats b) { return _mm256_max_ps(a, b); }  // a > b ? a : b
static inline floats less(floats a, floats b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline floats equal(floats a, floats b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline floats both(floats a, floats b) { return _mm256_and_ps(a, b); }
static inline floats either(floats a, floats b) { return _mm256_or_ps(a, b); }
static inline floats without(floats a, floats b) { return _mm256_andnot_ps(b, a); } // the bits of a that b lacks
static inline floats choose(floats mask, floats yes, floats no) { return _mm256_blendv_ps(no, yes, mask); }
static inline unsigned mask_bits(floats mask) { return (unsigned)_mm256_movemask_ps(mask); }

// Eight times eight: vector k of the result holds item k of each row.
static inline void load_transposed(floats columns[LANES], const float *rows, int stride) {
    floats a[8], b[8];
    for (int k = 0; k < 4; ++k) {
        const floats low = load(rows + 2 * k * stride), high = load(rows + (2 * k + 1) * stride);
        a[2 * k] = _mm256_unpacklo_ps(low, high);
        a[2 * k + 1] = _mm256_unpackhi_ps(low, high);
    }
    for (int k = 0; k < 8; k += 4) {
        b[k] = _mm256_shuffle_ps(a[k], a[k + 2], 0x44);
        b[k + 1] = _mm256_shuffle_ps(a[k], a[k + 2], 0xEE);
        b[k + 2] = _mm256_shuffle_ps(a[k + 1], a[k + 3], 0x44);
        b[k + 3] = _mm256_shuffle_ps(a[k + 1], a[k + 3], 0xEE);
    }
    for (int k = 0; k < 4; ++k) {
        columns[k] = _mm256_permute2f128_ps(b[k], b[k + 4], 0x20);
        columns[k + 4] = _mm256_permute2f128_ps(b[k], b[k + 4], 0x31);
    }
}

// The entries of a table for numbers in steps of a half: entry 256 + floor(2 * a), for a from -128 to below 128.
static inline floats look_up(const float table[512], floats a) {
    const __m256i entry = _mm256_cvttps_epi32(_mm256_floor_ps(a + a));
    return _mm256_i32gather_ps(table + 256, entry, 4);
}

static inline floats truncated(floats a) { return _mm256_cvtepi32_ps(_mm256_cvttps_epi32(a)); } // for |a| < 2^31

static inline float largest_lane(floats a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

static inline __m256i words_of(const floats values[16 / LANES]) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(values[0]), _mm256_cvtps_epi32(values[1]));
    return _mm256_permute4x64_epi64(words, 0xD8);
}

// Sixteen whole numbers from 0 to 255 become bytes.
static inline void store_bytes(uint8_t *to, const floats values[16 / LANES]) {
    const __m256i words = words_of(values);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)to, bytes);
}

// Sixteen whole numbers from -128 to 127 become bytes.
static inline void store_signed_bytes(uint8_t *to, const floats values[16 / LANES]) {
    const __m256i words = words_of(values);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)to, bytes);
}

#elif defined(__SSE2__)

#include <emmintrin.h>
#define LANES 4
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

#else
#error "no lanes for this processor: ggml does the work"
#endif

#define ALL_LANES ((1u << LANES) - 1)

static inline floats square(floats a) { return a * a; }

static inline floats absolute(floats a) { return without(a, splat(-0.0f)); }

// To the nearest whole number, ties to even; true for |a| < 2^22 only.
static inline floats nearest(floats a) { return (a + splat(12582912.0f)) - splat(12582912.0f); }

static inline floats within(floats a, float least, float most) { return smaller(larger(a, splat(least)), splat(most)); }

#endif
