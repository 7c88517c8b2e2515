// What Python calls.
#include "kernels.h"
#include "widen.h"

#define EXPORTED __attribute__((visibility("default")))

typedef struct {
    const char *name;
    Encode *encode;
} Level;

#ifdef __aarch64__
static const Level levels[] = {
    {"neon", encode_neon}, {"neon fused 14", encode_neon_fused_14}, {"neon fused 16", encode_neon_fused_16},
    {"neon fused 19", encode_neon_fused_19},
};
static int count_levels(void) { return (int)(sizeof levels / sizeof *levels); }
#else
static const Level levels[] = {{"sse2", encode_sse2}, {"avx2", encode_avx2}};
static int count_levels(void) { return __builtin_cpu_supports("avx2") ? 2 : 1; }
#endif

// The name of a level; null if this machine has no such level. On x86 the last one is the fastest, and all give the
// same bytes; on arm64 they are for different builds of the reference.
EXPORTED const char *pestle_level(int level) { return level >= 0 && level < count_levels() ? levels[level].name : 0; }

// Quantizes rows of whole blocks. `source` is the type of `x`, one of widen.h; a row takes `row_bytes` in the output.
// Returns how many weights the reference has done, -1 for an unknown type.
EXPORTED int64_t pestle_encode(
    int level, int type, int source, const void *x, uint8_t *out, int64_t rows, int64_t row_weights, int64_t row_bytes,
    const float *importance, Reference reference
) {
    const Work work = {type, source == SOURCE_F32 ? x : 0, out, rows, row_weights, importance, reference};
    return levels[level].encode(&work, source, x, row_bytes);
}
