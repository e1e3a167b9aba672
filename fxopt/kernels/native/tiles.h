// float32 products on AMX's bfloat16 tiles, as accurate as float32's own.
//
// A float32 is the exact sum of three bfloat16: 24 bits of significand are three times 8. With x = x0 + x1 + x2 and
// w = w0 + w1 + w2, the product is that of all pairs of parts; the three pairs beyond x_p w_q with p + q = 2 are below
// float32's rounding and left out, so it takes six products in bfloat16, each exact, summed in float32. A tile unit does
// sixteen times the products of AVX-512 or more, which leaves more than twice its speed. (Henry, Tang and Heinecke,
// "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019.)
//
// Infinities, NaN and what rounds to infinity have no such sum; splitting reports them, and the caller computes in
// float32. Parts below 2^-126 count as zero, as the tile unit takes them.
#pragma once
#include "common.h"

// The tile unit has to be asked of the kernel of the operating system, which is written for Linux alone.
#if defined(__x86_64__) && defined(__linux__) &&                                                                       \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 12))
#define FXOPT_TILES 1
#else
#define FXOPT_TILES 0
#endif

#if FXOPT_TILES

namespace fxopt {
namespace tiles {

typedef uint16_t bf16;

constexpr int64_t PARTS = 3;
constexpr int64_t SIDE = 32;             // a block: 32 rows, or 32 columns, of 32 products each
constexpr int64_t HALF = 16 * SIDE;      // elements of one tile, half a block
constexpr int64_t BLOCK = SIDE * SIDE;   // elements of one part of a block
constexpr int64_t STEP = PARTS * BLOCK;  // elements of a block
constexpr int64_t AT_ONCE = 16;          // steps summed at once: sums of sums round less than one long sum
constexpr int64_t NEAR = 2;              // steps whose packed blocks stay in the first cache for all rows

} // namespace tiles
} // namespace fxopt
#endif

#if FXOPT_TILES
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,amx-tile,amx-bf16")
#endif
namespace fxopt {
namespace tiles {

// Eight tiles of 16 rows of 64 bytes; per thread, released before the thread goes on.
class Unit {
  public:
    Unit() {
        struct __attribute__((packed)) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; i++) {
            config.bytes[i] = 64;
            config.rows[i] = 16;
        }
        _tile_loadconfig(&config);
    }
    ~Unit() { _tile_release(); }
    Unit(const Unit &) = delete;
    Unit &operator=(const Unit &) = delete;
};

static FXOPT_INLINE __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

static FXOPT_INLINE __m512 widen(__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Splits 32 floats into three vectors of 32 bf16. Not zero if one of them has no such sum.
static FXOPT_INLINE int split(__m512 a, __m512 b, __m512i parts[PARTS]) {
    int refused = 0;
    for (int p = 0; p < PARTS; p++) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        const __m512 low = widen(_mm512_castsi512_si256(both)), high = widen(_mm512_extracti64x4_epi64(both, 1));
        if (p == 0) {
            const __m512 infinity = _mm512_set1_ps(__builtin_inff());
            refused = _mm512_cmp_ps_mask(_mm512_abs_ps(low), infinity, _CMP_NLT_UQ) |
                      _mm512_cmp_ps_mask(_mm512_abs_ps(high), infinity, _CMP_NLT_UQ);
        }
        parts[p] = both;
        a = _mm512_sub_ps(a, low);
        b = _mm512_sub_ps(b, high);
    }
    return refused;
}

// Splits up to 32 floats, the others zero, into `out`, `out + stride` and `out + 2 * stride`.
static FXOPT_INLINE int split_row(const float *x, int64_t count, bf16 *out, int64_t stride) {
    __m512i parts[PARTS];
    const int refused = split(_mm512_maskz_loadu_ps(first(count), x),
                              _mm512_maskz_loadu_ps(first(count - 16), x + (count > 16 ? 16 : 0)), parts);
    for (int p = 0; p < PARTS; p++)
        _mm512_store_si512(out + p * stride, parts[p]);
    return refused;
}

// As `split_row`, for `rows` rows; `by_row` is the stride of x.
static inline int split_rows(const float *x, int64_t by_row, int64_t count, int64_t rows, bf16 *out, int64_t stride) {
    int refused = 0;
    if (count >= SIDE)
        for (int64_t i = 0; i < rows; i++)
            refused |= split_row(x + i * by_row, SIDE, out + i * SIDE, stride);
    else
        for (int64_t i = 0; i < rows; i++)
            refused |= split_row(x + i * by_row, count, out + i * SIDE, stride);
    return refused;
}

// Packs the 32 × 32 block at `w`, whose element (n, k) is w[n * ldn + k * ldk], as the tile unit takes its right side:
// for each part two tiles of 16 columns n, in rows of pairs of k.
static inline int pack_block(const float *w, int64_t n, int64_t k, int64_t ldn, int64_t ldk, bf16 *out) {
    int refused = 0;
    alignas(64) float row[SIDE];
    alignas(64) uint32_t pairs[PARTS][16];
    for (int64_t j = 0; j < SIDE; j++) {
        for (int64_t i = 0; i < SIDE; i++)
            row[i] = j < n && i < k ? w[j * ldn + i * ldk] : 0.0f;
        refused |= split_row(row, SIDE, (bf16 *)pairs, SIDE);
        for (int64_t p = 0; p < PARTS; p++) {
            uint32_t *const column = (uint32_t *)(out + p * BLOCK + j / 16 * HALF) + j % 16;
            for (int64_t i = 0; i < 16; i++)
                column[i * 16] = pairs[p][i];
        }
    }
    return refused;
}

// Adds to sums (32, 32), or makes them if `start`, the products of `steps` pairs of blocks: a row block at a + offset[s],
// whose parts are `stride` apart, and the packed block at b + s * STEP. HALVES 1 is for the first 16 rows alone.
// Meanwhile `lines` cache lines a step are brought near from `ahead` on.
template <int HALVES>
static FXOPT_INLINE void multiply(const bf16 *a, const int32_t *offset, int64_t stride, const bf16 *b, int64_t steps,
                                  bool start, float *sums, const char *ahead, int64_t lines) {
    if (start) {
        _tile_zero(0);
        _tile_zero(1);
        if (HALVES == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        if (HALVES == 2) {
            _tile_loadd(2, sums + 512, 64);
            _tile_loadd(3, sums + 768, 64);
        }
    }
    for (int64_t s = 0; s < steps; s++, b += STEP) {
        const bf16 *const rows = a + (int64_t)offset[s] * SIDE;
        for (const char *const end = ahead + lines * 64; ahead < end; ahead += 64)
            _mm_prefetch(ahead, _MM_HINT_T1);
#define FXOPT_ROWS(p)                                                                                                  \
    _tile_loadd(4, rows + (p) * stride, 64);                                                                           \
    if (HALVES == 2)                                                                                                   \
        _tile_loadd(5, rows + (p) * stride + HALF, 64);
#define FXOPT_COLUMNS(p)                                                                                               \
    _tile_loadd(6, b + (p) * BLOCK, 64);                                                                               \
    _tile_loadd(7, b + (p) * BLOCK + HALF, 64);
#define FXOPT_PRODUCTS                                                                                                 \
    _tile_dpbf16ps(0, 4, 6);                                                                                           \
    _tile_dpbf16ps(1, 4, 7);                                                                                           \
    if (HALVES == 2) {                                                                                                 \
        _tile_dpbf16ps(2, 5, 6);                                                                                       \
        _tile_dpbf16ps(3, 5, 7);                                                                                       \
    }
        FXOPT_ROWS(2) FXOPT_COLUMNS(0) FXOPT_PRODUCTS
        FXOPT_ROWS(1) FXOPT_PRODUCTS
        FXOPT_COLUMNS(1) FXOPT_PRODUCTS
        FXOPT_ROWS(0) FXOPT_PRODUCTS
        FXOPT_COLUMNS(2) FXOPT_PRODUCTS
        FXOPT_COLUMNS(0) FXOPT_PRODUCTS
#undef FXOPT_ROWS
#undef FXOPT_COLUMNS
#undef FXOPT_PRODUCTS
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (HALVES == 2) {
        _tile_stored(2, sums + 512, 64);
        _tile_stored(3, sums + 768, 64);
    }
}

} // namespace tiles
} // namespace fxopt
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
