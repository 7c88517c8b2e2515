// The kernels for the instruction set that this file is compiled for; ENCODE is the name of the result.
#include "kernels.h"
#include "q45.h"
#include "q6.h"

enum { TYPE_Q4_K = 12, TYPE_Q5_K = 13, TYPE_Q6_K = 14 };

static const float *importance_of(const Work *work, int64_t superblock) {
    return work->importance ? work->importance + superblock % work->row_superblocks * SUPERBLOCK : 0;
}

static void ask_reference(const Work *work, int64_t superblock, int bytes) {
    work->reference(work->type, work->x + superblock * SUPERBLOCK, work->out + superblock * bytes, 0, 1, SUPERBLOCK,
                    importance_of(work, superblock));
}

INLINE int64_t encode45(const Work *work, const Kind45 *kind, bool weighted) {
    int64_t asked = 0;
    for (int64_t first = 0; first < work->superblocks; first += GROUP) {
        Group45 group;
        for (int s = 0; s < GROUP; ++s) { // a group that is not full has its last superblock twice
            const int64_t at = first + s < work->superblocks ? first + s : work->superblocks - 1;
            group.x[s] = work->x + at * SUPERBLOCK;
            group.importance[s] = importance_of(work, at);
            group.out[s] = work->out + at * kind->bytes;
        }
        const unsigned hard = encode_group45(kind, &group, weighted);
        for (int s = 0; s < GROUP && first + s < work->superblocks; ++s)
            if (hard >> s & 1) ask_reference(work, first + s, kind->bytes), ++asked;
    }
    return asked;
}

static __attribute__((noinline)) int64_t encode4(const Work *work) { return encode45(work, &Q4_K, false); }
static __attribute__((noinline)) int64_t encode5(const Work *work) { return encode45(work, &Q5_K, false); }
static __attribute__((noinline)) int64_t encode4_weighted(const Work *work) { return encode45(work, &Q4_K, true); }
static __attribute__((noinline)) int64_t encode5_weighted(const Work *work) { return encode45(work, &Q5_K, true); }

static __attribute__((noinline)) int64_t encode6(const Work *work) {
    int64_t asked = 0;
    for (int64_t at = 0; at < work->superblocks; ++at) {
        const float *x = work->x + at * SUPERBLOCK, *importance = importance_of(work, at);
        uint8_t *out = work->out + at * BYTES6;
        const bool done = importance ? encode_superblock6(x, importance, out) : encode_superblock6(x, 0, out);
        if (!done) ask_reference(work, at, BYTES6), ++asked;
    }
    return asked;
}

int64_t ENCODE(const Work *work) {
    switch (work->type) {
    case TYPE_Q4_K: return work->importance ? encode4_weighted(work) : encode4(work);
    case TYPE_Q5_K: return work->importance ? encode5_weighted(work) : encode5(work);
    case TYPE_Q6_K: return encode6(work);
    default: return -1;
    }
}
