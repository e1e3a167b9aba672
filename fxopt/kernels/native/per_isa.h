// Compiles one source for every instruction set.
//
//     #include "common.h"
//     #define FXOPT_SOURCE "my_kernel.inc"
//     #include "per_isa.h"
//
// puts what `my_kernel.inc` defines into the namespaces `fxopt::portable`, `fxopt::avx2` and `fxopt::avx512`. In it
// FXOPT_LANES is the number of floats in a vector (4, 8, 16), FXOPT_REGISTERS the number of vector registers, and `vf`,
// `vi` are vectors of that many float and int32 (GCC's vector extensions: + - * / compile to the instruction set's own).
// The target is set by attribute, not by a flag for the whole file: so no inline function of a standard header is ever
// compiled for a CPU that may not be there.
//
// With FXOPT_BFLOAT16 defined as 1 the source is compiled once more, into `fxopt::bfloat16`, for AVX-512 with its product
// of pairs of bfloat16; there FXOPT_PAIRS is 1, elsewhere it is 0.

#if (defined(__x86_64__)) && (defined(__GNUC__) || defined(__clang__))
#define FXOPT_X86 1
#else
#define FXOPT_X86 0
#endif

#define FXOPT_VECTORS                                                                                                  \
    typedef float vf __attribute__((vector_size(FXOPT_LANES * 4)));                                                    \
    typedef float vf_u __attribute__((vector_size(FXOPT_LANES * 4), aligned(4), may_alias));                           \
    typedef int32_t vi __attribute__((vector_size(FXOPT_LANES * 4)));

#ifndef FXOPT_BFLOAT16
#define FXOPT_BFLOAT16 0
#endif
#if FXOPT_X86 && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 12))
#define FXOPT_HAS_BFLOAT16 FXOPT_BFLOAT16
#else
#define FXOPT_HAS_BFLOAT16 0
#endif
#define FXOPT_PAIRS 0

namespace fxopt {

#define FXOPT_LANES 4
#if defined(__aarch64__)
#define FXOPT_REGISTERS 32
#else
#define FXOPT_REGISTERS 16
#endif
namespace portable {
FXOPT_VECTORS
#include FXOPT_SOURCE
} // namespace portable
#undef FXOPT_LANES
#undef FXOPT_REGISTERS

#if FXOPT_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define FXOPT_LANES 8
#define FXOPT_REGISTERS 16
namespace avx2 {
FXOPT_VECTORS
#include FXOPT_SOURCE
} // namespace avx2
#undef FXOPT_LANES
#undef FXOPT_REGISTERS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw")
#endif
#define FXOPT_LANES 16
#define FXOPT_REGISTERS 32
namespace avx512 {
FXOPT_VECTORS
#include FXOPT_SOURCE
} // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if FXOPT_HAS_BFLOAT16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16")
#endif
#undef FXOPT_PAIRS
#define FXOPT_PAIRS 1
namespace bfloat16 {
FXOPT_VECTORS
#include FXOPT_SOURCE
} // namespace bfloat16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#undef FXOPT_LANES
#undef FXOPT_REGISTERS

#endif

} // namespace fxopt

// Calls FUNCTION of the namespace that `isa` names: FXOPT_DISPATCH(isa, product(x, y, n));
#if FXOPT_X86
#define FXOPT_DISPATCH(isa, CALL)                                                                                      \
    do {                                                                                                               \
        if ((isa) >= fxopt::AVX512)                                                                                    \
            fxopt::avx512::CALL;                                                                                       \
        else if ((isa) == fxopt::AVX2)                                                                                 \
            fxopt::avx2::CALL;                                                                                         \
        else                                                                                                           \
            fxopt::portable::CALL;                                                                                     \
    } while (0)
#else
#define FXOPT_DISPATCH(isa, CALL) fxopt::portable::CALL
#endif

#undef FXOPT_PAIRS
#undef FXOPT_SOURCE
