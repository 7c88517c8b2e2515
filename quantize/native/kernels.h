// The kernels of one instruction set each, and what they have in common.
#ifndef PESTLE_KERNELS_H
#define PESTLE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

// ggml_quantize_chunk: type, weights, out, first weight, rows, weights a row, importance or null.
typedef size_t (*Reference)(int, const float *, void *, int64_t, int64_t, int64_t, const float *);

typedef struct {
    int type;             // ggml's number
    const float *x;       // rows x row_weights
    uint8_t *out;
    int64_t rows, row_weights;
    const float *importance; // row_weights, or null
    Reference reference;     // does the blocks that vectors cannot do exactly
} Work;

// Encodes `work`, whose weights are `from` in the type `source` (see widen.h) and take `row_bytes` a row in the output.
// Returns how many weights the reference has done, or -1 for a type that is not among those here.
typedef int64_t Encode(const Work *work, int source, const void *from, int64_t row_bytes);

Encode encode_sse2, encode_avx2;
Encode encode_neon, encode_neon_fused_14, encode_neon_fused_16, encode_neon_fused_19;

#endif
