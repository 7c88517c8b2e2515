// NEON of arm64: four lanes. FUSED is for a reference whose compiler has fused products with sums.
#ifndef PESTLE_LANES_NEON_H
#define PESTLE_LANES_NEON_H

#include <arm_neon.h>
#include <stdint.h>

#define LANES 4
#define UNITS 4 // there are 32 registers
typedef float32x4_t floats;

static inline uint32x4_t bits_in(floats a) { return vreinterpretq_u32_f32(a); }
static inline floats from_bits(uint32x4_t bits) { return vreinterpretq_f32_u32(bits); }

static inline floats splat(float value) { return vdupq_n_f32(value); }
static inline floats load(const float *from) { return vld1q_f32(from); }
static inline void store(float *to, floats values) { vst1q_f32(to, values); }
static inline floats root(floats a) { return vsqrtq_f32(a); }
// Of NaN, and of zeros with different signs, these may choose the other one: nothing that is written depends on that.
static inline floats smaller(floats a, floats b) { return vminq_f32(a, b); }
static inline floats larger(floats a, floats b) { return vmaxq_f32(a, b); }
static inline floats less(floats a, floats b) { return from_bits(vcltq_f32(a, b)); }
static inline floats equal(floats a, floats b) { return from_bits(vceqq_f32(a, b)); }
static inline floats both(floats a, floats b) { return from_bits(vandq_u32(bits_in(a), bits_in(b))); }
static inline floats either(floats a, floats b) { return from_bits(vorrq_u32(bits_in(a), bits_in(b))); }
static inline floats without(floats a, floats b) { return from_bits(vbicq_u32(bits_in(a), bits_in(b))); }
static inline floats choose(floats mask, floats yes, floats no) { return vbslq_f32(bits_in(mask), yes, no); }
static inline unsigned mask_bits(floats mask) {
    static const uint32_t places[LANES] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(bits_in(mask), vld1q_u32(places)));
}
#ifdef FUSED
static inline floats plus_product_lanes(floats sum, floats a, floats b) { return vfmaq_f32(sum, a, b); }
static inline floats minus_product_lanes(floats sum, floats a, floats b) { return vfmsq_f32(sum, a, b); }
#endif

static inline void load_transposed(floats columns[LANES], const float *rows, int stride) {
    floats row[LANES];
    for (int k = 0; k < LANES; ++k) row[k] = load(rows + k * stride);
    for (int k = 0; k < LANES; k += 2) {
        const float32x4x2_t pair = vzipq_f32(row[k / 2], row[k / 2 + 2]); // rows 0 and 2, then 1 and 3
        row[k / 2] = pair.val[0], row[k / 2 + 2] = pair.val[1];
    }
    for (int k = 0; k < LANES; k += 2) {
        const float32x4x2_t pair = vzipq_f32(row[k], row[k + 1]);
        columns[k] = pair.val[0], columns[k + 1] = pair.val[1];
    }
}

static inline floats look_up(const float table[512], floats a) {
    int32_t entry[LANES];
    vst1q_s32(entry, vcvtmq_s32_f32(vaddq_f32(a, a)));
    const float found[LANES] = {table[256 + entry[0]], table[256 + entry[1]], table[256 + entry[2]],
                                table[256 + entry[3]]};
    return load(found);
}

static inline floats truncated(floats a) { return vcvtq_f32_s32(vcvtq_s32_f32(a)); }

static inline float largest_lane(floats a) { return vmaxvq_f32(a); }

static inline int16x8_t words_of(floats first, floats second) {
    return vcombine_s16(vqmovn_s32(vcvtq_s32_f32(first)), vqmovn_s32(vcvtq_s32_f32(second)));
}

static inline void store_bytes(uint8_t *to, const floats values[16 / LANES]) {
    vst1_u8(to, vqmovun_s16(words_of(values[0], values[1])));
    vst1_u8(to + 8, vqmovun_s16(words_of(values[2], values[3])));
}

static inline void store_signed_bytes(uint8_t *to, const floats values[16 / LANES]) {
    vst1_s8((int8_t *)to, vqmovn_s16(words_of(values[0], values[1])));
    vst1_s8((int8_t *)to + 8, vqmovn_s16(words_of(values[2], values[3])));
}

#endif
