// Block-sparse matrices, blocks in rows: the product with one or its transpose, and the gradient with regard to blocks.
#include "block_linear.h"

#define FXOPT_BFLOAT16 1
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

FXOPT_API void fxopt_block_gradient(const float *x, const float *g, const int32_t *row, const int32_t *col, float *dw,
                                    int64_t tokens, int64_t blocks, int64_t rows, int64_t columns, int64_t outer,
                                    int64_t inner, int isa, int threads) {
    const fxopt::BlockGradient p = {x, g, row, col, dw, tokens, blocks, rows, columns, outer, inner};
    threads = worth(threads, tokens * blocks * outer * inner);
    if (!fxopt::gradient_by_tiles(p, isa, threads))
        FXOPT_DISPATCH(isa, block_gradient(p, threads));
}

// Whether this build and this CPU multiply pairs of bfloat16.
FXOPT_API int fxopt_multiplies_bfloat16() {
#if FXOPT_HAS_BFLOAT16
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") ? 1 : 0;
#else
    return 0;
#endif
}

#if FXOPT_HAS_BFLOAT16
// The same of bfloat16, x and blocks, with `outer` a multiple of 16 and `inner` of 32; bias and y are float32. Only
// where `fxopt_multiplies_bfloat16`.
FXOPT_API void fxopt_block_product_bfloat16(const float *x, const float *blocks, const int32_t *crow, const int32_t *col,
                                            const int32_t *place, const float *bias, float *y, int64_t tokens,
                                            int64_t rows, int64_t columns, int64_t outer, int64_t inner, int transposed,
                                            int isa, int threads) {
    const int64_t pairs = inner / 2;
    const fxopt::BlockProduct p = {x,      blocks,          crow,         col,  place, bias,  y,
                                   tokens, columns * pairs, rows * outer, rows, outer, pairs, transposed != 0};
    (void)isa;
    fxopt::bfloat16::block_product(p, worth(threads, p.multiply_adds()));
}

// The same of bfloat16, x and g; dw is float32.
FXOPT_API void fxopt_block_gradient_bfloat16(const float *x, const float *g, const int32_t *row, const int32_t *col,
                                             float *dw, int64_t tokens, int64_t blocks, int64_t rows, int64_t columns,
                                             int64_t outer, int64_t inner, int isa, int threads) {
    const fxopt::BlockGradient p = {x, g, row, col, dw, tokens, blocks, rows, columns, outer, inner};
    (void)isa;
    fxopt::bfloat16::block_gradient(p, worth(threads, tokens * blocks * outer * inner / 2));
}
#endif
