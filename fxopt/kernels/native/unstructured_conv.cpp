// A 2-d convolution with an unstructured sparse weight, float32, NCHW.
//
// Each image is padded once and split into the phases of the stride. A non-zero of the weight is then a constant offset:
// the output's pixels, a row after the other with the padding between them, are the sum of shifted copies of the planes,
// each times one number. So the product runs over vectors of consecutive pixels, whatever the kernel, with no im2col and
// no transposition; what falls into the padding between the rows is computed and dropped. The backward is the same over
// dy, with the non-zeros by input channel and phase (`start` has phases · channels + 1 entries, `row` is
// output channel · taps + tap, `place` where the value stands in the order of the forward).
#include "unstructured.h"

#define FXOPT_SOURCE "unstructured_conv.inc"
#include "per_isa.h"

static int worth(int threads, const fxopt::Shape &s, int64_t values) {
    return fxopt::worth(threads, s.batch * s.out_height * s.out_width * values);
}

FXOPT_API int fxopt_sparse_conv2d(const float *x, const int32_t *start, const int32_t *column, const float *value,
                                  const float *bias, float *y, const int64_t *shape, int64_t values, int isa,
                                  int threads) {
    const fxopt::Shape &s = *reinterpret_cast<const fxopt::Shape *>(shape);
    if (fxopt::disagree(start, s.outputs, values))
        return 1;
    FXOPT_DISPATCH(isa, sparse_conv::forward(s, x, start, column, value, bias, y, worth(threads, s, values)));
    return 0;
}

FXOPT_API int fxopt_sparse_conv2d_backward(const float *x, const float *dy, const int32_t *start, const int32_t *row,
                                           const int32_t *place, const float *value, float *dx, float *dw, float *db,
                                           const int64_t *shape, int64_t values, int wanted, int isa, int threads) {
    const fxopt::Shape &s = *reinterpret_cast<const fxopt::Shape *>(shape);
    if (fxopt::disagree(start, s.down * s.right * s.channels, values))
        return 1;
    FXOPT_DISPATCH(isa, sparse_conv::backward(s, {x, dy, dx, start, nullptr, nullptr, nullptr, {}, wanted}, row, place, value, dw, db,
                                 worth(threads, s, values)));
    return 0;
}
