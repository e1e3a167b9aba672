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
