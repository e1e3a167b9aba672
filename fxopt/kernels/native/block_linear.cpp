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
    int64_t at_once() const { return std::max<int64_t>(1, KC / inner); }
    // Tokens whose inputs stay in the L2 cache while every row of blocks passes.
    int64_t tokens_at_once(int64_t multiple) const {
        const int64_t fit = std::max<int64_t>(XT / ldx, 16 * multiple) / multiple * multiple;
        return fit;
    }
    static int64_t KC, XT;
};
int64_t BlockProduct::KC = 4096, BlockProduct::XT = 262144;

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

FXOPT_API void fxopt_tune(int64_t kc, int64_t xt) { fxopt::BlockProduct::KC = kc; fxopt::BlockProduct::XT = xt; }

FXOPT_API void fxopt_block_product(const float *x, const float *blocks, const int32_t *crow, const int32_t *col,
                                   const int32_t *place, const float *bias, float *y, int64_t tokens, int64_t rows,
                                   int64_t columns, int64_t outer, int64_t inner, int transposed, int isa, int threads) {
    const fxopt::BlockProduct p = {x,      blocks,          crow,         col,  place, bias,  y,
                                   tokens, columns * inner, rows * outer, rows, outer, inner, transposed != 0};
    FXOPT_DISPATCH(isa, block_product(p, threads));
}

// Floats of scratch memory that `fxopt_block_gradient` needs.
FXOPT_API void fxopt_block_gradient(const float *x, const float *g, const int32_t *row, const int32_t *col, float *dw,
                                    float *scratch, int64_t tokens, int64_t blocks, int64_t rows, int64_t columns,
                                    int64_t outer, int64_t inner, int isa, int threads) {
    const fxopt::BlockGradient p = {x, g, row, col, dw, scratch, tokens, blocks, rows, columns, outer, inner};
    FXOPT_DISPATCH(isa, block_gradient(p, threads));
}
