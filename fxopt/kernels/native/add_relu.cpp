// The end of a residual block, in one pass over its memory and one parallel region.
#include "common.h"

#define FXOPT_SOURCE "add_relu.inc"
#include "per_isa.h"

FXOPT_API void fxopt_add_relu(float *y, const float *other, int64_t n, int isa, int threads) {
    FXOPT_DISPATCH(isa, add_relu(y, other, n, threads));
}
