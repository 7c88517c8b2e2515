// What Python calls.
#include "kernels.h"
#include "widen.h"

#define EXPORTED __attribute__((visibility("default")))
#define STRIP 4096 // weights that are widened at once: they stay in the nearest cache

typedef struct {
    const char *name;
    int64_t (*encode)(const Work *);
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

// Widens some weights of one row, or of whole rows, and encodes them.
static int64_t encode_strip(const Level *level, Work work, int source, const void *from, int64_t first) {
    float strip[STRIP];
    widen(source, from, first, work.rows * work.row_weights, strip);
    work.x = strip;
    return level->encode(&work);
}

// `row_bytes` is what a row takes in the output.
static int64_t encode_widened(const Level *level, const Work *all, int source, const void *from, int64_t row_bytes) {
    const int64_t at_once = all->row_weights <= STRIP ? STRIP / all->row_weights : 1;
    int64_t asked = 0;
    for (int64_t row = 0; row < all->rows; row += at_once)
        for (int64_t column = 0; column < all->row_weights; column += STRIP) {
            const int64_t left = all->row_weights - column;
            Work work = *all;
            work.rows = all->rows - row < at_once ? all->rows - row : at_once;
            work.row_weights = left < STRIP ? left : STRIP;
            work.out = all->out + row * row_bytes + column * row_bytes / all->row_weights;
            work.importance = all->importance ? all->importance + column : 0;
            const int64_t done = encode_strip(level, work, source, from, row * all->row_weights + column);
            if (done < 0) return done;
            asked += done;
        }
    return asked;
}

// Quantizes rows of whole blocks of a source type (see widen.h). Returns how many weights the reference has done, -1
// for an unknown type.
EXPORTED int64_t pestle_encode(
    int level, int type, int source, const void *x, uint8_t *out, int64_t rows, int64_t row_weights, int64_t row_bytes,
    const float *importance, Reference reference
) {
    const Work work = {type, x, out, rows, row_weights, importance, reference};
    if (source == SOURCE_F32) return levels[level].encode(&work);
    return encode_widened(&levels[level], &work, source, x, row_bytes);
}
