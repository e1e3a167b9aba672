// What this build and this CPU can do.
#include "common.h"

// The best instruction set of this CPU, among those that the library was compiled for.
FXOPT_API int fxopt_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    if (avx2 && avx512)
        return fxopt::AVX512;
    if (avx2)
        return fxopt::AVX2;
#endif
    return fxopt::PORTABLE;
}

// How many threads a parallel region gets when `threads` are asked for; 1 in a build without OpenMP.
FXOPT_API int fxopt_parallel_threads(int threads) {
    int got = 1;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        got = omp_get_num_threads();
    }
#else
    (void)threads;
#endif
    return got;
}
