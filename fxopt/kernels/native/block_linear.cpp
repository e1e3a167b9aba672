// Block-sparse matrices, blocks in rows: the product with one or its transpose, and the gradient with regard to blocks.
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

    // Blocks of a row that are multiplied in one go: their panel has to stay in the L2 cache beside the tokens.
    int64_t at_once() const { return std::max<int64_t>(1, 4096 / inner); }
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
    float *dw, *scratch;
    int64_t tokens, blocks, rows, columns, outer, inner;

    static constexpr int64_t TOKENS = 256;
    int64_t at_once() const { return std::min(tokens, TOKENS); }
};

} // namespace fxopt

#define FXOPT_SOURCE "block_linear.inc"
#include "per_isa.h"

// As many of `threads` as the work is worth: a parallel region costs about as much as this many multiply-adds.
static int worth(int threads, int64_t multiply_adds) {
    return static_cast<int>(std::min<int64_t>(threads, 1 + multiply_adds / (1 << 20)));
}

FXOPT_API void fxopt_block_product(const float *x, const float *blocks, const int32_t *crow, const int32_t *col,
                                   const int32_t *place, const float *bias, float *y, int64_t tokens, int64_t rows,
                                   int64_t columns, int64_t outer, int64_t inner, int transposed, int isa, int threads) {
    const fxopt::BlockProduct p = {x,      blocks,          crow,         col,  place, bias,  y,
                                   tokens, columns * inner, rows * outer, rows, outer, inner, transposed != 0};
    threads = worth(threads, p.multiply_adds());
    FXOPT_DISPATCH(isa, block_product(p, threads));
}

// `scratch` holds the columns of min(tokens, BlockGradient::TOKENS) tokens of x and of g.
FXOPT_API void fxopt_block_gradient(const float *x, const float *g, const int32_t *row, const int32_t *col, float *dw,
                                    float *scratch, int64_t tokens, int64_t blocks, int64_t rows, int64_t columns,
                                    int64_t outer, int64_t inner, int isa, int threads) {
    const fxopt::BlockGradient p = {x, g, row, col, dw, scratch, tokens, blocks, rows, columns, outer, inner};
    threads = worth(threads, tokens * blocks * outer * inner);
    FXOPT_DISPATCH(isa, block_gradient(p, threads));
}
