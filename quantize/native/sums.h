// Sums with a product, wherever llama.cpp has both in one expression. Clang fuses them there for arm64, rounding once
// instead of twice; where it vectorizes a loop it takes them apart again, and which loops those are depends on its
// version. FUSED kernels do as that version does; the others round twice everywhere.
#ifndef PESTLE_SUMS_H
#define PESTLE_SUMS_H

#include "lanes.h"
#include "scalar.h"

#ifdef FUSED // 14, 16 or 19: the first version of Clang that fuses the same sums

#define FUSES_FIRST_ERRORS (FUSED < 16) // of make_qkx2_quants and make_qkx3_quants
#define FUSES_FITS (FUSED >= 16)        // make_qp_quants
#define FUSES_FIRST_SUMS (FUSED < 16)   // of make_qx_quants
#define FUSES_SQUARES (FUSED < 19)      // of a superblock

INLINE float plus_product_scalar(float sum, float a, float b) { return __builtin_fmaf(a, b, sum); }
INLINE float minus_product_scalar(float sum, float a, float b) { return __builtin_fmaf(-a, b, sum); }

#else

#define FUSES_FIRST_ERRORS false
#define FUSES_FITS false
#define FUSES_FIRST_SUMS false
#define FUSES_SQUARES false

INLINE float plus_product_scalar(float sum, float a, float b) { return sum + a * b; }
INLINE float minus_product_scalar(float sum, float a, float b) { return sum - a * b; }
INLINE floats plus_product_lanes(floats sum, floats a, floats b) { return sum + a * b; }
INLINE floats minus_product_lanes(floats sum, floats a, floats b) { return sum - a * b; }

#endif

// Floats or vectors of them: sum + a * b, and sum - a * b.
#define plus_product(sum, a, b) _Generic((sum), float: plus_product_scalar, floats: plus_product_lanes)(sum, a, b)
#define minus_product(sum, a, b) _Generic((sum), float: minus_product_scalar, floats: minus_product_lanes)(sum, a, b)

INLINE float plus_product_scalar_if(bool fuses, float sum, float a, float b) {
    return fuses ? plus_product_scalar(sum, a, b) : sum + a * b;
}

INLINE floats plus_product_lanes_if(bool fuses, floats sum, floats a, floats b) {
    if (fuses) return plus_product_lanes(sum, a, b);
    return sum + a * b;
}

#define plus_product_if(fuses, sum, a, b) \
    _Generic((sum), float: plus_product_scalar_if, floats: plus_product_lanes_if)(fuses, sum, a, b)

#endif
