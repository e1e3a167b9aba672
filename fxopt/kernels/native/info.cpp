// What this build and this CPU can do.
#include "tiles.h"

#if FXOPT_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Whether the CPU has AMX with bfloat16, and the system lets this process use it.
static bool has_tiles() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1))
        return false; // AVX-512 with bfloat16
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1))
        return false; // AMX with bfloat16, and the tiles themselves
    constexpr long REQUEST = 0x1023, TILE_DATA = 18; // ARCH_REQ_XCOMP_PERM of the component XTILE_DATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#else
static bool has_tiles() { return false; }
#endif

// The best instruction set of this CPU, among those that the library was compiled for.
FXOPT_API int fxopt_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    if (avx2 && avx512)
        return has_tiles() ? fxopt::AMX : fxopt::AVX512;
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
