// What Python calls.
#include "kernels.h"

#define EXPORTED __attribute__((visibility("default")))

// The best instruction set of this machine that there are kernels for: 0 SSE2, 1 AVX2.
EXPORTED int pestle_best_level(void) { return __builtin_cpu_supports("avx2") ? 1 : 0; }

// Quantizes rows of whole blocks. Returns how many weights the reference has done, -1 for an unknown type.
EXPORTED int64_t pestle_encode(
    int level, int type, const float *x, uint8_t *out, int64_t rows, int64_t row_weights, const float *importance,
    Reference reference
) {
    const Work work = {type, x, out, rows, row_weights, importance, reference};
    return level == 1 ? encode_avx2(&work) : encode_sse2(&work);
}
