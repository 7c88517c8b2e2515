// AVX2: eight lanes.
#ifndef PESTLE_LANES_AVX2_H
#define PESTLE_LANES_AVX2_H

#include <immintrin.h>
#include <stdint.h>

#define LANES 8
#define UNITS 2
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

#endif
