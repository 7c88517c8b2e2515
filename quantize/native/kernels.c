// The kernels for the instruction set that this file is compiled for; ENCODE is the name of the result.
#include "kernels.h"
#include "iq4.h"
#include "plain.h"
#include "q2.h"
#include "q3.h"
#include "q45.h"
#include "q6.h"
#include "widen.h"

enum { // ggml's numbers
    TYPE_Q4_0 = 2, TYPE_Q8_0 = 8,
    TYPE_Q2_K = 10, TYPE_Q3_K = 11, TYPE_Q4_K = 12, TYPE_Q5_K = 13, TYPE_Q6_K = 14, TYPE_IQ4_NL = 20, TYPE_IQ4_XS = 23
};

#define KERNEL static __attribute__((noinline)) int64_t

// `block` counts blocks of `weights` weights, from the first row on.
static const float *importance_of(const Work *work, int64_t block, int weights) {
    return work->importance ? work->importance + block % (work->row_weights / weights) * weights : 0;
}

static void ask_reference(const Work *work, int64_t block, int weights, int bytes) {
    work->reference(work->type, work->x + block * weights, work->out + block * bytes, 0, 1, weights,
                    importance_of(work, block, weights));
}

// Encodes superblocks of one kind in groups; a group that is not full has its last superblock twice.
#define FOR_EACH_GROUP(work, bytes, encode_group) \
    const int64_t superblocks = work->rows * (work->row_weights / SUPERBLOCK); \
    int64_t asked = 0; \
    for (int64_t first = 0; first < superblocks; first += GROUP) { \
        const Group group = group_at(work, first, superblocks, bytes); \
        const unsigned hard = encode_group; \
        for (int s = 0; s < GROUP && first + s < superblocks; ++s) \
            if (hard >> s & 1) ask_reference(work, first + s, SUPERBLOCK, bytes), asked += SUPERBLOCK; \
    } \
    return asked

INLINE Group group_at(const Work *work, int64_t first, int64_t superblocks, int bytes) {
    Group group;
    for (int s = 0; s < GROUP; ++s) {
        const int64_t at = first + s < superblocks ? first + s : superblocks - 1;
        group.x[s] = work->x + at * SUPERBLOCK;
        group.importance[s] = importance_of(work, at, SUPERBLOCK);
        group.out[s] = work->out + at * bytes;
    }
    return group;
}

INLINE int64_t encode45(const Work *work, const Kind45 *kind, bool weighted) {
    FOR_EACH_GROUP(work, kind->bytes, encode_group45(kind, &group, weighted));
}

KERNEL encode4(const Work *work) { return encode45(work, &Q4_K, false); }
KERNEL encode5(const Work *work) { return encode45(work, &Q5_K, false); }
KERNEL encode4_weighted(const Work *work) { return encode45(work, &Q4_K, true); }
KERNEL encode5_weighted(const Work *work) { return encode45(work, &Q5_K, true); }
KERNEL encode_iq4_xs(const Work *work) {
    FOR_EACH_GROUP(work, BYTES_IQ4_XS, encode_group_iq4_xs(&group, work->importance));
}

// Encodes superblocks one by one; `encode` is compiled for either case.
#define FOR_EACH_SUPERBLOCK(work, bytes, encode) \
    const int64_t superblocks = work->rows * (work->row_weights / SUPERBLOCK); \
    int64_t asked = 0; \
    for (int64_t at = 0; at < superblocks; ++at) { \
        const float *x = work->x + at * SUPERBLOCK, *importance = importance_of(work, at, SUPERBLOCK); \
        uint8_t *out = work->out + at * bytes; \
        const bool done = importance ? encode(x, importance, out) : encode(x, 0, out); \
        if (!done) ask_reference(work, at, SUPERBLOCK, bytes), asked += SUPERBLOCK; \
    } \
    return asked

KERNEL encode2(const Work *work) { FOR_EACH_SUPERBLOCK(work, BYTES_Q2_K, encode_superblock2); }
KERNEL encode3(const Work *work) { FOR_EACH_SUPERBLOCK(work, BYTES_Q3_K, encode_superblock3); }
KERNEL encode6(const Work *work) { FOR_EACH_SUPERBLOCK(work, BYTES_Q6_K, encode_superblock6); }

#define FOR_EACH_BLOCK(work, bytes, encode) \
    const int64_t blocks = work->rows * (work->row_weights / PLAIN); \
    int64_t asked = 0; \
    for (int64_t at = 0; at < blocks; ++at) \
        if (!encode(work->x + at * PLAIN, work->out + at * bytes)) { \
            ask_reference(work, at, PLAIN, bytes); \
            asked += PLAIN; \
        } \
    return asked

KERNEL encode4_plain(const Work *work) { FOR_EACH_BLOCK(work, BYTES_Q4_0, encode_q4_0); }
KERNEL encode8_plain(const Work *work) { FOR_EACH_BLOCK(work, BYTES_Q8_0, encode_q8_0); }

// Rows may end within a group: its blocks are copied, the last one again and again where there are no more.
KERNEL encode_iq4_nl(const Work *work) {
    const int64_t blocks = work->rows * (work->row_weights / BLOCK);
    int64_t asked = 0;
    for (int64_t first = 0; first < blocks; first += BLOCKS) {
        float x[BLOCKS * BLOCK], importance[BLOCKS * BLOCK];
        uint8_t *out[BLOCKS];
        for (int b = 0; b < BLOCKS; ++b) {
            const int64_t at = first + b < blocks ? first + b : blocks - 1;
            memcpy(x + b * BLOCK, work->x + at * BLOCK, BLOCK * sizeof *x);
            if (work->importance) memcpy(importance + b * BLOCK, importance_of(work, at, BLOCK), BLOCK * sizeof *x);
            out[b] = work->out + at * BYTES_IQ4_NL;
        }
        const unsigned hard = encode_group_iq4_nl(x, work->importance ? importance : 0, out);
        for (int b = 0; b < BLOCKS && first + b < blocks; ++b)
            if (hard >> b & 1) ask_reference(work, first + b, BLOCK, BYTES_IQ4_NL), asked += BLOCK;
    }
    return asked;
}

static int64_t encode_floats(const Work *work) {
    switch (work->type) {
    case TYPE_Q4_0: return work->importance ? -1 : encode4_plain(work);
    case TYPE_Q8_0: return encode8_plain(work); // importance changes nothing
    case TYPE_Q2_K: return encode2(work);
    case TYPE_Q3_K: return encode3(work);
    case TYPE_Q4_K: return work->importance ? encode4_weighted(work) : encode4(work);
    case TYPE_Q5_K: return work->importance ? encode5_weighted(work) : encode5(work);
    case TYPE_Q6_K: return encode6(work);
    case TYPE_IQ4_NL: return encode_iq4_nl(work);
    case TYPE_IQ4_XS: return encode_iq4_xs(work);
    default: return -1;
    }
}

// `work` is a row, a part of one, or some whole ones, of STRIP weights at most.
static int64_t encode_strip(Work work, int source, const void *from, int64_t first) {
    float strip[STRIP];
    widen(source, from, first, work.rows * work.row_weights, strip);
    work.x = strip;
    return encode_floats(&work);
}

int64_t ENCODE(const Work *work, int source, const void *from, int64_t row_bytes) {
    if (source == SOURCE_F32) return encode_floats(work);
    const int64_t width = work->row_weights, at_once = width <= STRIP ? STRIP / width : 1;
    int64_t asked = 0;
    for (int64_t row = 0; row < work->rows; row += at_once)
        for (int64_t column = 0; column < width; column += STRIP) {
            Work part = *work;
            part.rows = work->rows - row < at_once ? work->rows - row : at_once;
            part.row_weights = width - column < STRIP ? width - column : STRIP;
            part.out = work->out + row * row_bytes + column * row_bytes / width;
            part.importance = work->importance ? work->importance + column : 0;
            const int64_t left = encode_strip(part, source, from, row * width + column);
            if (left < 0) return left;
            asked += left;
        }
    return asked;
}
