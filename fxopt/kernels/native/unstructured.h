// What the kernels of unstructured sparsity share and what does not depend on the instruction set.
#pragma once

#include "common.h"
#include <unistd.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace fxopt {

// What a backward is to compute; the bits of its `wanted`.
enum Wanted : int { INPUT = 1, VALUES = 2, BIAS = 4 };

// Whether `rows` rows that begin at `start` hold `values` values: 0 or, where reading on would be beyond an array, 1.
inline int disagree(const int32_t *start, int64_t rows, int64_t values) {
    return start[0] == 0 && start[rows] == values ? 0 : 1;
}

// As many of `threads` as the work is worth: few products are done by one before the others are awake.
inline int worth(int threads, int64_t products) { return products > 100000 ? threads : 1; }

// The sizes of a convolution, as the C functions are given them.
struct Shape {
    int64_t batch, channels, height, width, outputs, out_height, out_width;
    int64_t rows, columns, down, right, top, left, row_step, column_step; // kernel, stride, padding, dilation
};

// Sums over the batch are made in this many parts, each in the order of the batch, and then joined in order. The number
// depends on the sizes alone, so that the result is the same for any number of threads.
constexpr int64_t PARTS = 8;

FXOPT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FXOPT_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
FXOPT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The bytes of L2 that a panel may fill: three quarters, the rest is for what streams past it.
inline int64_t l2_share() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
    static const int64_t size = 0;
#endif
    return (size > 0 ? size : 524288) / 4 * 3;
}

} // namespace fxopt

// y[batch][outputs] = x[batch][inputs] wᵀ + bias; bias may be null. 1, and nothing done, if `start` is not of `values`.
FXOPT_API int fxopt_sparse_linear(const float *x, const int32_t *start, const int32_t *column, const float *value,
                                  const float *bias, float *y, int64_t values, int64_t batch, int64_t inputs,
                                  int64_t outputs, int isa, int threads);

// dx[batch][inputs], dw[values in the order of `value`], db[outputs], those of them that `wanted` names. Returns likewise.
FXOPT_API int fxopt_sparse_linear_backward(const float *x, const float *dy, const int32_t *start, const int32_t *row,
                                           const int32_t *place, const float *value, float *dx, float *dw, float *db,
                                           int64_t values, int64_t batch, int64_t inputs, int64_t outputs, int wanted,
                                           int isa, int threads);

// y[batch][outputs][out_height][out_width]; `column` is input channel · taps + tap, of the whole input for any groups. 1,
// and nothing done, if `start` is not of `values`.
FXOPT_API int fxopt_sparse_conv2d(const float *x, const int32_t *start, const int32_t *column, const float *value,
                                  const float *bias, float *y, const int64_t *shape, int64_t values, int isa,
                                  int threads);

// dx like x, dw in the order of `value`, db[outputs], those of them that `wanted` names. Returns likewise.
FXOPT_API int fxopt_sparse_conv2d_backward(const float *x, const float *dy, const int32_t *start, const int32_t *row,
                                           const int32_t *place, const float *value, float *dx, float *dw, float *db,
                                           const int64_t *shape, int64_t values, int wanted, int isa, int threads);
