// A linear layer with an unstructured sparse weight, float32.
//
// The weight is held by rows (`start`, `column`) for the forward, and by columns (`start`, `row`) for the backward, with
// one array of values: `place[k]` is where the k-th value of the view by columns stands in the view by rows.
// Activations are rows, as torch gives them. Each thread transposes a tile of rows into a panel that stays in L2, takes
// the sparse product over it, and transposes the result back a few features at a time, while they are in L1. Nothing is
// limited then but by the one load of a panel's vector for each multiplication (backward: for two of them).
#include "unstructured.h"

#define FXOPT_SOURCE "unstructured_linear.inc"
#include "per_isa.h"

FXOPT_API int fxopt_sparse_linear(const float *x, const int32_t *start, const int32_t *column, const float *value,
                                  const float *bias, float *y, int64_t values, int64_t batch, int64_t inputs,
                                  int64_t outputs, int isa, int threads) {
    if (fxopt::disagree(start, outputs, values))
        return 1;
    threads = fxopt::worth(threads, batch * values);
    FXOPT_DISPATCH(isa, sparse_linear::forward({x, inputs, outputs, start, column, value, bias, y}, batch, threads));
    return 0;
}

FXOPT_API int fxopt_sparse_linear_backward(const float *x, const float *dy, const int32_t *start, const int32_t *row,
                                           const int32_t *place, const float *value, float *dx, float *dw, float *db,
                                           int64_t values, int64_t batch, int64_t inputs, int64_t outputs, int wanted,
                                           int isa, int threads) {
    if (fxopt::disagree(start, inputs, values))
        return 1;
    threads = fxopt::worth(threads, batch * values);
    FXOPT_DISPATCH(isa, sparse_linear::backward({x, dy, inputs, outputs, start, row, nullptr, dx}, value, place, dw, db, batch, wanted,
                                 threads));
    return 0;
}
