// Sums with a product, wherever llama.cpp has both in one expression. Compilers may fuse them there, which rounds once
// instead of twice; Clang does so for arm64. FUSED kernels are for such a build; the others round twice.
#ifndef PESTLE_SUMS_H
#define PESTLE_SUMS_H

#include "lanes.h"
#include "scalar.h"

#ifdef FUSED

INLINE float plus_product_scalar(float sum, float a, float b) { return __builtin_fmaf(a, b, sum); }
INLINE float minus_product_scalar(float sum, float a, float b) { return __builtin_fmaf(-a, b, sum); }

#else

INLINE float plus_product_scalar(float sum, float a, float b) { return sum + a * b; }
INLINE float minus_product_scalar(float sum, float a, float b) { return sum - a * b; }
INLINE floats plus_product_lanes(floats sum, floats a, floats b) { return sum + a * b; }
INLINE floats minus_product_lanes(floats sum, floats a, floats b) { return sum - a * b; }

#endif

// Floats or vectors of them: sum + a * b, and sum - a * b.
#define plus_product(sum, a, b) _Generic((sum), float: plus_product_scalar, floats: plus_product_lanes)(sum, a, b)
#define minus_product(sum, a, b) _Generic((sum), float: minus_product_scalar, floats: minus_product_lanes)(sum, a, b)

#endif
