// Blocks of 32 weights, one a lane, and how much each weight matters.
#ifndef PESTLE_BLOCKS_H
#define PESTLE_BLOCKS_H

#include "sums.h"

#define BLOCK 32
#define BLOCKS (UNITS * LANES)
#define GROUPS 8                // blocks a superblock
#define GROUP (BLOCKS / GROUPS) // superblocks that are searched together

// Superblocks that are searched together; `importance` is not used without an importance matrix.
typedef struct {
    const float *x[GROUP], *importance[GROUP];
    uint8_t *out[GROUP];
} Group;

// `starts` says where the blocks of each vector begin, one after the other.
INLINE void load_blocks(const float *const starts[UNITS], floats to[BLOCK][UNITS]) {
    for (int u = 0; u < UNITS; ++u)
        for (int i = 0; i < BLOCK; i += LANES) {
            floats columns[LANES];
            load_transposed(columns, starts[u] + i, BLOCK);
            for (int k = 0; k < LANES; ++k) to[i + k][u] = columns[k];
        }
}

INLINE void load_group(const float *const superblocks[GROUP], floats to[BLOCK][UNITS]) {
    const float *starts[UNITS];
    for (int u = 0; u < UNITS; ++u) starts[u] = superblocks[u * LANES / GROUPS] + u * LANES % GROUPS * BLOCK;
    load_blocks(starts, to);
}

INLINE void sum_squares(const floats x[BLOCK][UNITS], floats squares[UNITS]) {
    for (int u = 0; u < UNITS; ++u) squares[u] = splat(0);
    for (int i = 0; i < BLOCK; ++i)
        for (int u = 0; u < UNITS; ++u) squares[u] = plus_product(squares[u], x[i][u], x[i][u]);
}

// Each weight matters as much as its column, the more the larger it is and what is around it.
INLINE void weigh_columns(const floats x[BLOCK][UNITS], const floats sigma2[UNITS], floats w[BLOCK][UNITS]) {
    for (int i = 0; i < BLOCK; ++i)
        for (int u = 0; u < UNITS; ++u) w[i][u] = w[i][u] * root(plus_product(sigma2[u], x[i][u], x[i][u]));
}

// `fuses`: whether the sum of the squares is fused.
INLINE void weigh_by_importance(
    const Group *group, const floats x[BLOCK][UNITS], bool fuses, floats w[BLOCK][UNITS]
) {
    float squares[GROUP] = {0};
    floats sigma2[UNITS];
    for (int i = 0; i < SUPERBLOCK; ++i) // in this order, which is the reference's: one sum for each superblock
        for (int s = 0; s < GROUP; ++s) squares[s] = plus_product_if(fuses, squares[s], group->x[s][i], group->x[s][i]);
    for (int u = 0; u < UNITS; ++u) sigma2[u] = splat(2 * squares[u * LANES / GROUPS] / SUPERBLOCK);
    load_group(group->importance, w);
    weigh_columns(x, sigma2, w);
}

INLINE bool all_sound(const unsigned sound[UNITS], int superblock) {
    bool all = true;
    for (int u = superblock * GROUPS / LANES; u < (superblock + 1) * GROUPS / LANES; ++u)
        all = all && sound[u] == ALL_LANES;
    return all;
}

#endif
