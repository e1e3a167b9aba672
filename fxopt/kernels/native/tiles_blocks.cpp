// The gradient with regard to blocks, by the tile unit, for blocks whose sides are multiples of 32.
//
// The products with the blocks are left to AVX-512: they have to be the same to the bit for any number of tokens, and of
// few the tile unit computes slowly.
#include "block_linear.h"
#include "tiles.h"

#if FXOPT_TILES
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,amx-tile,amx-bf16")
#endif
namespace fxopt {
namespace tiles {

static int gradient(const BlockGradient &p, int threads) {
    const int64_t up = p.outer / SIDE, across = p.inner / SIDE, outputs = p.rows * up, inputs = p.columns * across;
    const int64_t at_once = AT_ONCE * SIDE < blocks(p.tokens) * SIDE ? AT_ONCE * SIDE : blocks(p.tokens) * SIDE;
    const int64_t most = at_once / SIDE;
    thread_local Kept for_g, for_x;
    bf16 *const gs = for_g.at_least<bf16>(outputs * most * STEP), *const xs = for_x.at_least<bf16>((inputs * most + 1) * STEP);
    int32_t a_offset[AT_ONCE], b_offset[AT_ONCE];
    for (int64_t s = 0; s < AT_ONCE; s++) {
        a_offset[s] = (int32_t)(s * PARTS * SIDE);
        b_offset[s] = (int32_t)s;
    }
    int refused = 0;
#pragma omp parallel num_threads(threads) reduction(| : refused)
    {
        const Unit unit;
        alignas(64) float sums[BLOCK], total[BLOCK];
        for (int64_t t = 0; t < p.tokens; t += at_once) {
            const int64_t tokens = p.tokens - t < at_once ? p.tokens - t : at_once, steps = blocks(tokens);
#pragma omp for schedule(static) collapse(2) nowait
            for (int64_t s = 0; s < steps; s++)
                for (int64_t n = 0; n < outputs; n++)
                    refused |= split_columns(p.g + (t + s * SIDE) * outputs * SIDE + n * SIDE, SIDE, tokens - s * SIDE,
                                             outputs * SIDE, gs + (n * most + s) * STEP);
#pragma omp for schedule(static) collapse(2)
            for (int64_t s = 0; s < steps; s++)
                for (int64_t n = 0; n < inputs; n++)
                    refused |= pack_columns(p.x + (t + s * SIDE) * inputs * SIDE + n * SIDE, SIDE, tokens - s * SIDE,
                                            inputs * SIDE, xs + (n * most + s) * STEP);
#pragma omp for schedule(static)
            for (int64_t j = 0; j < p.blocks; j++)
                for (int64_t u = 0; u < up; u++)
                    for (int64_t v = 0; v < across; v++) {
                        const bf16 *const g = gs + (p.row[j] * up + u) * most * STEP;
                        const bf16 *const x = xs + (p.col[j] * across + v) * most * STEP;
                        multiply_rows(g, a_offset, BLOCK, x, b_offset, steps, 0, 1, SIDE, sums, total);
                        float *const dw = p.dw + (j * p.outer + u * SIDE) * p.inner + v * SIDE;
                        for (int64_t i = 0; i < SIDE; i++) {
                            const float *const half = total + i / 16 * 512 + i % 16 * 16;
                            __m512 low = _mm512_load_ps(half), high = _mm512_load_ps(half + 256);
                            if (t > 0) {
                                low = _mm512_add_ps(low, _mm512_loadu_ps(dw + i * p.inner));
                                high = _mm512_add_ps(high, _mm512_loadu_ps(dw + i * p.inner + 16));
                            }
                            _mm512_storeu_ps(dw + i * p.inner, low);
                            _mm512_storeu_ps(dw + i * p.inner + 16, high);
                        }
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

namespace fxopt {

bool gradient_by_tiles(const BlockGradient &p, int isa, int threads) {
#if FXOPT_TILES
    return isa == AMX && p.outer % tiles::SIDE == 0 && p.inner % tiles::SIDE == 0 && tiles::gradient(p, threads) == 0;
#else
    return (void)p, (void)isa, (void)threads, false;
#endif
}

} // namespace fxopt
