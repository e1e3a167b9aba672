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

// The tile unit has to be asked for at the operating system, which is written for Linux alone.
#if defined(FXOPT_TILES)
#elif defined(__x86_64__) && defined(__linux__) &&                                                                       \
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

static inline int64_t blocks(int64_t n) { return (n + SIDE - 1) / SIDE; }

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

// Transposes 16 × 16 elements of 32 bits.
static FXOPT_INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Packs the n × k block at `w`, whose element (n, k) is w[n * ldn + k], as the tile unit takes its right side: for each
// part two tiles of 16 columns n, in rows of pairs of k. Beyond n and k there are zeros.
static inline int pack_rows(const float *w, int64_t n, int64_t k, int64_t ldn, bf16 *out) {
    int refused = 0;
    alignas(64) bf16 rows[PARTS][16][SIDE];
    for (int64_t half = 0; half < 2; half++) {
        const int64_t count = n - half * 16 < 0 ? 0 : n - half * 16 < 16 ? n - half * 16 : 16;
        memset(rows, 0, sizeof(rows));
        refused |= split_rows(w + half * 16 * ldn, ldn, k, count, rows[0][0], 16 * SIDE);
        for (int64_t p = 0; p < PARTS; p++) {
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = _mm512_load_si512(rows[p][i]);
            transpose(r);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(out + p * BLOCK + half * HALF + i * SIDE, r[i]);
        }
    }
    return refused;
}

// As `pack_rows`, of the transpose: element (n, k) is w[k * ldk + n].
static inline int pack_columns(const float *w, int64_t n, int64_t k, int64_t ldk, bf16 *out) {
    int refused = 0;
    alignas(64) bf16 rows[PARTS][2][SIDE];
    alignas(64) static const uint16_t low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first_half = _mm512_load_si512(low);
    const __m512i second_half = _mm512_add_epi16(first_half, _mm512_set1_epi16(16));
    for (int64_t pair = 0; pair < 16; pair++) {
        const int64_t left = k - 2 * pair < 0 ? 0 : k - 2 * pair < 2 ? k - 2 * pair : 2;
        if (left < 2)
            memset(rows, 0, sizeof(rows));
        refused |= split_rows(w + 2 * pair * ldk, ldk, n, left, rows[0][0], 2 * SIDE);
        for (int64_t p = 0; p < PARTS; p++) {
            const __m512i a = _mm512_load_si512(rows[p][0]), b = _mm512_load_si512(rows[p][1]);
            bf16 *const to = out + p * BLOCK + pair * SIDE;
            _mm512_store_si512(to, _mm512_permutex2var_epi16(a, first_half, b));
            _mm512_store_si512(to + HALF, _mm512_permutex2var_epi16(a, second_half, b));
        }
    }
    return refused;
}

// As `pack_rows`, of any strides: element (n, k) is w[n * ldn + k * ldk].
static inline int pack_block(const float *w, int64_t n, int64_t k, int64_t ldn, int64_t ldk, bf16 *out) {
    if (ldk == 1)
        return pack_rows(w, n, k, ldn, out);
    if (ldn == 1)
        return pack_columns(w, n, k, ldk, out);
    alignas(64) float copy[SIDE][SIDE];
    for (int64_t i = 0; i < SIDE; i++)
        for (int64_t j = 0; j < SIDE; j++)
            copy[i][j] = i < n && j < k ? w[i * ldn + j * ldk] : 0.0f;
    return pack_rows(copy[0], SIDE, SIDE, SIDE, out);
}

// Splits the transpose of n × k elements, element (n, k) at w[k * ldk + n], as the tile unit takes its left side: for
// each part 32 rows n of 32 k.
static inline int split_columns(const float *w, int64_t n, int64_t k, int64_t ldk, bf16 *out) {
    alignas(64) float turned[SIDE][SIDE];
    for (int64_t i = 0; i < 2; i++)
        for (int64_t j = 0; j < 2; j++) {
            __m512i r[16];
            for (int64_t row = 0; row < 16; row++)
                r[row] = j * 16 + row < k ? _mm512_maskz_loadu_epi32(first(n - i * 16), w + (j * 16 + row) * ldk + i * 16)
                                          : _mm512_setzero_si512();
            transpose(r);
            for (int64_t row = 0; row < 16; row++)
                _mm512_store_si512(turned[i * 16 + row] + j * 16, r[row]);
        }
    return split_rows(turned[0], SIDE, SIDE, SIDE, out, BLOCK);
}

// Adds to sums (32, 32), or makes them if `start`, the products of `steps` pairs of blocks: a row block at row
// a_offset[s] of `a`, whose parts are `stride` apart, and packed block b_offset[s] of `b`. HALVES 1 is for the first 16 rows alone.
// Meanwhile `lines` cache lines a step are brought near from `ahead` on.
template <int HALVES>
static FXOPT_INLINE void multiply(const bf16 *a, const int32_t *a_offset, int64_t stride, const bf16 *b,
                                  const int32_t *b_offset, int64_t steps, bool start, float *sums, const char *ahead, int64_t lines) {
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
    for (int64_t s = 0; s < steps; s++) {
        const bf16 *const rows = a + (int64_t)a_offset[s] * SIDE, *const columns = b + (int64_t)b_offset[s] * STEP;
        for (const char *const end = ahead + lines * 64; ahead < end; ahead += 64)
            _mm_prefetch(ahead, _MM_HINT_T1);
#define FXOPT_ROWS(p)                                                                                                  \
    _tile_loadd(4, rows + (p) * stride, 64);                                                                           \
    if (HALVES == 2)                                                                                                   \
        _tile_loadd(5, rows + (p) * stride + HALF, 64);
#define FXOPT_COLUMNS(p)                                                                                               \
    _tile_loadd(6, columns + (p) * BLOCK, 64);                                                                               \
    _tile_loadd(7, columns + (p) * BLOCK + HALF, 64);
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

static FXOPT_INLINE void add(float *to, const float *sums) {
    for (int64_t i = 0; i < BLOCK; i += 16)
        _mm512_store_ps(to + i, _mm512_add_ps(_mm512_load_ps(to + i), _mm512_load_ps(sums + i)));
}

// All steps of the row blocks i0 to i1 of those over `rows` rows, into `total`. The packed blocks of a few steps stay near while the rows pass by;
// those that follow in memory, mostly the next ones, are brought meanwhile, as no prefetcher of a CPU goes beyond a page.
static inline void multiply_rows(const bf16 *a, const int32_t *a_offset, int64_t stride, const bf16 *b,
                                 const int32_t *b_offset, int64_t steps, int64_t i0, int64_t i1, int64_t rows, float *sums, float *total) {
    constexpr int64_t LINES = STEP * sizeof(bf16) / 64;
    const int64_t lines = (LINES + i1 - i0 - 1) / (i1 - i0);
    for (int64_t s = 0; s < steps; s += NEAR) {
        const int64_t count = steps - s < NEAR ? steps - s : NEAR;
        const bool start = s % AT_ONCE == 0, end = (s + NEAR) % AT_ONCE == 0 || s + NEAR >= steps;
        float *const to = s < AT_ONCE ? total : sums;
        const char *ahead = (const char *)(b + ((int64_t)b_offset[s + count - 1] + 1) * STEP);
        for (int64_t i = i0; i < i1; i++, ahead += lines * count * 64) {
            float *const at = to + (i - i0) * BLOCK;
            if (rows - i * SIDE > 16)
                multiply<2>(a + i * BLOCK, a_offset + s, stride, b, b_offset + s, count, start, at, ahead, lines);
            else
                multiply<1>(a + i * BLOCK, a_offset + s, stride, b, b_offset + s, count, start, at, ahead, lines);
            if (end && to != total)
                add(total + (i - i0) * BLOCK, at);
        }
    }
}

// Scratch memory that a thread keeps for its next call: fresh pages for a megabyte take as long as a small product.
class Kept {
  public:
    ~Kept() { std::free(data_); }
    template <typename T> T *at_least(size_t count) {
        if (count * sizeof(T) > bytes_) {
            std::free(data_);
            bytes_ = (count * sizeof(T) + 63) / 64 * 64;
            data_ = std::aligned_alloc(64, bytes_);
        }
        return static_cast<T *>(data_);
    }

  private:
    void *data_ = nullptr;
    size_t bytes_ = 0;
};

} // namespace tiles
} // namespace fxopt
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
