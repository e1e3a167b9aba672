// What block-sparse products are given, for all ways to compute them.
#pragma once
#include "common.h"

#include <algorithm>

namespace fxopt {

// y[tokens, rows * outer] = bias + x · blocks, where block j of row r stands at column col[j] of x, for j in
// [crow[r], crow[r + 1]), and is blocks[place[j]], or blocks[j] without `place`.
struct BlockProduct {
    const float *x, *blocks;
    const int32_t *crow, *col, *place;
    const float *bias;
    float *y;
    int64_t tokens, ldx, ldy, rows;
    int64_t outer, inner; // of a block: the outputs, and what is summed over
    bool transposed;      // a block is [outer, inner] and not [inner, outer]

    static constexpr int64_t PIECE = 16;     // columns of x that are packed together: a cache line
    static constexpr int64_t IN_PLACE = 192; // tokens up to which packing x costs more than it saves

    // Blocks of a row that are multiplied in one go: their panel has to stay in the L2 cache beside the tokens. A panel
    // that few tokens read is made for them alone, and read at once from L1.
    int64_t at_once() const { return std::max<int64_t>(1, (tokens <= 32 ? 128 : 4096) / inner); }
    // Tokens whose inputs, 1 MB, stay in the L2 cache while every row of blocks passes.
    int64_t tokens_at_once(int64_t multiple) const {
        return std::max<int64_t>(262144 / ldx, 16 * multiple) / multiple * multiple;
    }
    int64_t multiply_adds() const { return tokens * crow[rows] * outer * inner; }
};

// dw[block] = the sum over tokens of g[token, row[block]]ᵀ · x[token, col[block]], each [outer, inner].
struct BlockGradient {
    const float *x, *g;
    const int32_t *row, *col;
    float *dw;
    int64_t tokens, blocks, rows, columns, outer, inner;

    static constexpr int64_t IN_PLACE = 192; // tokens up to which splitting x and g into columns costs more than it saves
    int64_t at_once() const { return std::min<int64_t>(tokens, 256); }
};

// Computes by the tile unit. False where it is not there or not able to; what was written is of no use then.
bool gradient_by_tiles(const BlockGradient &p, int isa, int threads);

} // namespace fxopt

// y[tokens][rows * outer], as `BlockProduct` says.
FXOPT_API void fxopt_block_product(const float *x, const float *blocks, const int32_t *crow, const int32_t *col,
                                   const int32_t *place, const float *bias, float *y, int64_t tokens, int64_t rows,
                                   int64_t columns, int64_t outer, int64_t inner, int transposed, int isa, int threads);

// dw[blocks][outer][inner], as `BlockGradient` says.
FXOPT_API void fxopt_block_gradient(const float *x, const float *g, const int32_t *row, const int32_t *col, float *dw,
                                    int64_t tokens, int64_t blocks, int64_t rows, int64_t columns, int64_t outer,
                                    int64_t inner, int isa, int threads);
