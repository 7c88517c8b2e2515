// One vector of floats, LANES of them, for the instruction set that this file is compiled for. Each operation is one
// IEEE operation a lane: what a lane computes is what scalar code computes that does the same steps. UNITS vectors go
// side by side, so that one's sums need not wait for their own last addition.
#ifndef PESTLE_LANES_H
#define PESTLE_LANES_H

#if defined(__AVX2__)
#include "lanes_avx2.h"
#elif defined(__SSE2__)
#include "lanes_sse2.h"
#elif defined(__aarch64__)
#include "lanes_neon.h"
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
