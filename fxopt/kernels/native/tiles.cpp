// Linear layers and convolutions on packed weights, by the tile unit. Both are the same product: a convolution reads, for
// each of its taps (the places of its kernel), its pixels moved by an offset.
//
// The input is split once, by blocks of 32 channels, for a chunk of the result's rows. Padding is split with it, as
// zeros, and a stride takes it apart into its phases: so what a tap reads for 16 neighbouring results is 16 neighbouring
// rows in memory, which is what one tile takes. Results in the columns of the padding are computed, and not kept.
#include "tiles.h"

#if FXOPT_TILES
#include <unistd.h>

namespace fxopt {
namespace tiles {

constexpr int64_t RANGE = 2 * AT_ONCE; // blocks of channels that are split, and multiplied, together

// The sizes of a product, in the order in which Python gives them; strides are those of the input, in elements.
struct Sizes {
    int64_t batch, height, width, channels, by_image, by_row, by_pixel;
    int64_t out_height, out_width, features, taps_y, taps_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
    int64_t relu;
};

} // namespace tiles
} // namespace fxopt

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,amx-tile,amx-bf16")
#endif
namespace fxopt {
namespace tiles {

// Where a chunk's pixels lie: `phases` planes of rows × columns, one after the other.
struct Plane {
    const Sizes &z;
    int64_t rows, columns, phases, room; // room: rows of 32 channels for one part of one block of channels
    int32_t *tap_offset;                 // (taps) the row at which a tap begins
    int32_t *phase;                      // (phases) the used ones, as y * stride_x + x

    Plane(const Sizes &sizes, int64_t most_rows, int32_t *offsets, int32_t *used)
        : z(sizes), rows(most_rows + (z.taps_y - 1) * z.dilation_y / z.stride_y),
          columns(z.out_width + (z.taps_x - 1) * z.dilation_x / z.stride_x), phases(0), tap_offset(offsets), phase(used) {
        for (int64_t y = 0; y < z.taps_y; y++)
            for (int64_t x = 0; x < z.taps_x; x++) {
                const int64_t ty = y * z.dilation_y, tx = x * z.dilation_x;
                const int32_t here = (int32_t)(ty % z.stride_y * z.stride_x + tx % z.stride_x);
                int64_t at = 0;
                while (at < phases && phase[at] != here)
                    at++;
                if (at == phases)
                    phase[phases++] = here;
                tap_offset[y * z.taps_x + x] =
                    (int32_t)(at * rows * columns + ty / z.stride_y * columns + tx / z.stride_x);
            }
        room = phases * rows * columns + SIDE; // the last block of results reads beyond
    }

    // Splits rows of one phase, of the block of channels at `c`. `out` is where that block begins.
    int split(const float *image, int64_t first_row, int64_t at, int64_t row, int64_t end, int64_t c, bf16 *out) const {
        const int64_t dy = phase[at] / z.stride_x - z.pad_y, dx = phase[at] % z.stride_x - z.pad_x;
        const int64_t before = dx >= 0 ? 0 : (-dx + z.stride_x - 1) / z.stride_x; // columns left of the image
        const int64_t after = z.width <= dx ? 0 : (z.width - 1 - dx) / z.stride_x + 1;
        const int64_t stop = after < columns ? after : columns;
        const int64_t by_column = z.stride_x * z.by_pixel;
        int refused = 0;
        out += (at * rows + row) * columns * SIDE;
        for (; row < end; row++, out += columns * SIDE) {
            const int64_t y = (first_row + row) * z.stride_y + dy;
            const bool inside = y >= 0 && y < z.height && before < stop;
            const int64_t from = inside ? before : columns, to = inside ? stop : columns;
            const float *pixel = image + y * z.by_row + (from * z.stride_x + dx) * z.by_pixel + c;
            fill(out, 0, from);
            refused |= split_rows(pixel, by_column, z.channels - c, to - from, out + from * SIDE, room * SIDE);
            fill(out, to, columns);
        }
        return refused;
    }

    void fill(bf16 *out, int64_t from, int64_t to) const {
        for (int64_t p = 0; p < PARTS; p++)
            for (int64_t i = from; i < to; i++)
                _mm512_store_si512(out + p * room * SIDE + i * SIDE, _mm512_setzero_si512());
    }
};

struct Product {
    const Sizes &z;
    const bf16 *weight;
    const float *bias, *other;
    float *y;

    // Adds the sums of results p0 to p0 + 32 of the chunk, and features n0 to n0 + 32, to what is there.
    void keep(const float *sums, int64_t image, int64_t row, int64_t rows, int64_t columns, int64_t p0, int64_t n0,
              bool start, bool end) const {
        const __m512 zero = _mm512_setzero_ps();
        const __mmask16 low = first(z.features - n0), high = first(z.features - n0 - 16);
        int64_t r = p0 / columns, c = p0 % columns - 1;
        for (int64_t i = 0; i < SIDE; i++) {
            if (++c == columns)
                c = 0, r++;
            if (r >= rows)
                return;
            if (c >= z.out_width)
                continue;
            const int64_t at = ((image * z.out_height + row + r) * z.out_width + c) * z.features + n0;
            const float *const half = sums + i / 16 * 512 + i % 16 * 16;
            __m512 a = _mm512_load_ps(half), b = _mm512_load_ps(half + 256);
            if (!start) {
                a = _mm512_add_ps(a, _mm512_maskz_loadu_ps(low, y + at));
                b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(high, y + at + 16));
            }
            if (end && bias) {
                a = _mm512_add_ps(a, _mm512_maskz_loadu_ps(low, bias + n0));
                b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(high, bias + n0 + 16));
            }
            if (end && other) {
                a = _mm512_add_ps(a, _mm512_maskz_loadu_ps(low, other + at));
                b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(high, other + at + 16));
            }
            if (end && z.relu) { // NaN stays NaN, as in torch
                a = _mm512_max_ps(zero, a);
                b = _mm512_max_ps(zero, b);
            }
            _mm512_mask_storeu_ps(y + at, low, a);
            _mm512_mask_storeu_ps(y + at + 16, high, b);
        }
    }
};

// The rows of a chunk: its split input has to stay in a core's second cache, beside some of the weight.
static int64_t rows_of_chunk(const Sizes &z) {
    const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE), range = blocks(z.channels) < RANGE ? blocks(z.channels) : RANGE;
    const int64_t room = (cache > 0 ? cache : 1 << 20) * 5 / 8, pixel = range * STEP / SIDE * (int64_t)sizeof(bf16);
    const int64_t columns = (z.out_width + (z.taps_x - 1) * z.dilation_x / z.stride_x);
    const int64_t planes = (z.taps_y * z.taps_x > 1 ? z.stride_y * z.stride_x : 1);
    const int64_t rows = room / (pixel * columns * planes) - (z.taps_y - 1) * z.dilation_y / z.stride_y;
    const int64_t least = blocks(1) * SIDE / columns + 1;
    return rows < least ? least : rows > z.out_height ? z.out_height : rows;
}

static int product(const float *x, const Product &p, int threads) {
    const Sizes &z = p.z;
    const int64_t taps = z.taps_y * z.taps_x, all_channels = blocks(z.channels), columns = blocks(z.features);
    const int64_t chunk = rows_of_chunk(z), range = all_channels < RANGE ? all_channels : RANGE;
    const Scratch offsets((taps * (2 * range + 1) + z.stride_y * z.stride_x) * sizeof(int32_t));
    int32_t *const offset = offsets.as<int32_t>(), *const in_order = offset + taps * range, *const tap = in_order + taps * range;
    for (int64_t s = 0; s < taps * range; s++)
        in_order[s] = (int32_t)s;
    const Plane plane(z, chunk, tap, tap + taps);
    const int64_t group = SIDE / plane.columns + 1;
    thread_local Kept room;
    bf16 *const split = room.at_least<bf16>(range * PARTS * plane.room * SIDE);
    int refused = 0;
#pragma omp parallel num_threads(threads) reduction(| : refused)
    {
        const Unit unit;
        thread_local Kept memory;
        float *const sums = memory.at_least<float>(2 * blocks(chunk * plane.columns) * BLOCK), *const total = sums + blocks(chunk * plane.columns) * BLOCK;
        int64_t me = 0, team = 1;
#if defined(_OPENMP)
        me = omp_get_thread_num(), team = omp_get_num_threads();
#endif
        for (int64_t image = 0; image < z.batch; image++)
            for (int64_t row = 0; row < z.out_height; row += chunk) {
                const int64_t rows = z.out_height - row < chunk ? z.out_height - row : chunk;
                const int64_t split_rows = rows + plane.rows - chunk;
                const int64_t pixels = (rows - 1) * plane.columns + z.out_width, parts = blocks(pixels);
                for (int64_t c0 = 0; c0 < all_channels; c0 += RANGE) {
                    const int64_t count = all_channels - c0 < RANGE ? all_channels - c0 : RANGE, steps = taps * count;
#pragma omp for schedule(static) collapse(3)
                    for (int64_t c = 0; c < count; c++)
                        for (int64_t at = 0; at < plane.phases; at++)
                            for (int64_t r = 0; r < split_rows; r += group)
                                refused |= plane.split(x + image * z.by_image, row, at, r,
                                                       r + group < split_rows ? r + group : split_rows, (c0 + c) * SIDE,
                                                       split + c * PARTS * plane.room * SIDE);
#pragma omp single
                    for (int64_t t = 0; t < taps; t++)
                        for (int64_t c = 0; c < count; c++)
                            offset[t * count + c] = (int32_t)(tap[t] + c * PARTS * plane.room);
                    const int64_t all = columns * parts;
                    for (int64_t t = all * me / team, end = all * (me + 1) / team; t < end;) {
                        const int64_t n = t / parts, i0 = t % parts, i1 = i0 + end - t < parts ? i0 + end - t : parts;
                        const bf16 *const b = p.weight + (c0 * columns + n * count) * taps * STEP;
                        multiply_rows(split, offset, plane.room * SIDE, b, in_order, steps, i0, i1, pixels, sums, total);
                        for (int64_t i = i0; i < i1; i++)
                            p.keep(total + (i - i0) * BLOCK, image, row, rows, plane.columns, i * SIDE, n * SIDE,
                                   c0 == 0, c0 + count == all_channels);
                        t += i1 - i0;
                    }
#pragma omp barrier
                }
            }
    }
    return refused;
}

} // namespace tiles
} // namespace fxopt
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// Packs a weight (n, taps, k), of any strides, to (ranges of ≤ 32, ⌈n/32⌉, taps, blocks of 32 in the range, STEP).
// Sets `refused` if an element is no sum of three bf16.
FXOPT_API void fxopt_tiles_pack(const float *w, uint16_t *out, int *refused, int64_t n, int64_t taps, int64_t k,
                                int64_t by_n, int64_t by_tap, int64_t by_k, int threads) {
#if FXOPT_TILES
    using namespace fxopt::tiles;
    const int64_t rows = blocks(n), columns = blocks(k);
    int found = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : found)
    for (int64_t j = 0; j < rows; j++)
        for (int64_t c = 0; c < columns; c++) {
            const int64_t begin = c / RANGE * RANGE, count = columns - begin < RANGE ? columns - begin : RANGE;
            for (int64_t t = 0; t < taps; t++)
                found |= pack_block(w + j * SIDE * by_n + t * by_tap + c * SIDE * by_k, n - j * SIDE, k - c * SIDE, by_n,
                                    by_k, out + ((begin * rows + j * count) * taps + t * count + c - begin) * STEP);
        }
    *refused = found;
#else
    (void)w, (void)out, (void)n, (void)taps, (void)k, (void)by_n, (void)by_tap, (void)by_k, (void)threads;
    *refused = 1;
#endif
}

// y (batch, out_height, out_width, features) = act(conv2d(x, weight) + bias + other), all channels last. Sets `refused`
// where x has an element that is no sum of three bf16; y is of no use then.
FXOPT_API void fxopt_tiles_product(const float *x, const uint16_t *weight, const float *bias, const float *other, float *y,
                                   int *refused, const int64_t *sizes, int threads) {
#if FXOPT_TILES
    using namespace fxopt::tiles;
    const Sizes &z = *reinterpret_cast<const Sizes *>(sizes);
    *refused = product(x, Product{z, weight, bias, other, y}, threads);
#else
    (void)x, (void)weight, (void)bias, (void)other, (void)y, (void)sizes, (void)threads;
    *refused = 1;
#endif
}
