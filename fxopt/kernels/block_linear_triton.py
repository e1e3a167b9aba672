"""
The products of `fxopt.kernels.block_linear` on CUDA, in Triton.

One kernel for the product with the weight and with its transpose, which differ in strides and in the index alone (no
copy of the weight is made), and one for the gradient of the blocks. Sums are float32, in a fixed order, without
atomics: a call gives the same each time. Blocks must have sides that are powers of two from 16 to 128; others run in
torch.
"""

# Kernels are compiled by Triton, which has no types of Python's.
# mypy: disable-error-code="no-untyped-def, attr-defined"

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform
    triton = None

AVAILABLE = triton is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"

_SIDES = (16, 32, 64, 128)
_FUSED = {"enable_fp_fusion": True}  # said, for the default of Triton changes


def takes(outer: int, inner: int, dtype: torch.dtype) -> bool:
    """Whether the kernels are for blocks of this shape: exact float32 has no tensor cores, and large ones spill."""
    exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    sides = outer in _SIDES and inner in _SIDES and dtype in (torch.float32, torch.bfloat16, torch.float16)
    return AVAILABLE and sides and not (exact and outer * inner > 64 * 64)


if AVAILABLE:

    @triton.jit  # type: ignore[untyped-decorator]
    def product_kernel(
        X, W, CROW, COL, PLACE, BIAS, Y, T, IN, OUT, stride_xt, stride_yt, stride_wj, stride_wk, stride_wn, BUCKET,
        K: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, KT: tl.constexpr,
        HAS_PLACE: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """y[BT tokens, N outputs of one row of blocks]; K is the inner side of a block, taken KT at a time."""
        r = tl.program_id(0)
        rt = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
        rn, rk = tl.arange(0, N), tl.arange(0, KT)
        inside = rt[:, None] < T
        sums = tl.zeros((BT, N), dtype=tl.float32)
        for j in range(tl.load(CROW + r), tl.load(CROW + r + 1)):
            c = tl.load(COL + j)
            p = j
            if HAS_PLACE:
                p = tl.load(PLACE + j)
            w_block = W + p.to(tl.int64) * stride_wj
            for k in tl.static_range(0, K, KT):
                at = c * K + k + rk
                x = tl.load(X + rt[:, None] * stride_xt + at[None, :], mask=inside & (at[None, :] < IN), other=0.0)
                w = tl.load(w_block + (k + rk)[:, None] * stride_wk + rn[None, :] * stride_wn)
                if UPCAST:
                    x = x.to(tl.float32)
                    w = w.to(tl.float32)
                sums = tl.dot(x, w, sums, input_precision=PRECISION)
        to = r * N + rn
        if HAS_BIAS:
            sums += tl.load(BIAS + to, mask=to < OUT, other=0.0)[None, :].to(tl.float32)
        y = Y + rt[:, None] * stride_yt + to[None, :]
        tl.store(y, sums.to(Y.dtype.element_ty), mask=inside & (to[None, :] < OUT))

    @triton.jit  # type: ignore[untyped-decorator]
    def gradient_kernel(
        G, X, ROW, COL, D, T, OUT, IN, NNZ, stride_gt, stride_xt, SPLIT_TOKENS, BUCKET,
        N: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """d[part, block] (N, K), the sum over the part's tokens."""
        j = tl.program_id(0)
        part = tl.program_id(1)
        rn = tl.load(ROW + j) * N + tl.arange(0, N)
        rk = tl.load(COL + j) * K + tl.arange(0, K)
        sums = tl.zeros((N, K), dtype=tl.float32)
        begin = part * SPLIT_TOKENS
        end = tl.minimum(begin + SPLIT_TOKENS, T)
        for t in range(begin, end, BT):
            rt = (t + tl.arange(0, BT)).to(tl.int64)
            inside = rt < end
            g = tl.load(
                G + rt[None, :] * stride_gt + rn[:, None], mask=inside[None, :] & (rn[:, None] < OUT), other=0.0
            )
            x = tl.load(X + rt[:, None] * stride_xt + rk[None, :], mask=inside[:, None] & (rk[None, :] < IN), other=0.0)
            if UPCAST:
                g = g.to(tl.float32)
                x = x.to(tl.float32)
            sums = tl.dot(g, x, sums, input_precision=PRECISION)
        d = D + (part.to(tl.int64) * NNZ + j) * (N * K)
        tl.store(d + tl.arange(0, N)[:, None] * K + tl.arange(0, K)[None, :], sums.to(D.dtype.element_ty))

    if not INTERPRETED:
        product_tuned = triton.autotune(
            [
                triton.Config({"BT": bt, "KT": kt}, num_warps=warps, num_stages=stages)  # the stages matter most
                for bt, kt, warps in ((64, 16, 4), (64, 32, 4), (128, 32, 4), (128, 64, 8), (128, 64, 4), (256, 64, 8))
                for stages in (2, 3, 4)
            ],
            key=["BUCKET", "IN", "OUT", "K", "N"],
            prune_configs_by={"early_config_prune": lambda configs, named, **more: fitting(configs, {**named, **more})},
        )(product_kernel)
        gradient_tuned = triton.autotune(
            [
                triton.Config({"BT": bt}, num_warps=warps, num_stages=stages)
                for bt, warps in ((32, 4), (64, 4), (64, 8), (128, 8))
                for stages in (2, 3, 4)
            ],
            key=["BUCKET", "IN", "OUT", "K", "N"],
        )(gradient_kernel)


def fitting(configurations: list[Any], named: dict[str, Any]) -> list[Any]:
    """The configurations whose step along the inner side divides a block's."""
    return [c for c in configurations if named["K"] % c.kwargs["KT"] == 0]


def product(x: Tensor, blocks: Any, bias: Tensor | None, features: int) -> Tensor:
    """x (tokens, in) times the blocks, by rows -> (tokens, features); see `fxopt.kernels.block_linear`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = x.new_empty(x.shape[0], features)
    data = blocks.data.contiguous()
    place = blocks.col if blocks.place is None else blocks.place
    strides = data.stride() if blocks.transposed else (data.stride(0), data.stride(2), data.stride(1))
    sizes = (x.shape[0], x.shape[1], features, x.stride(0), y.stride(0), *strides, _bucket(x.shape[0]))
    constants = {"K": blocks.inner, "N": blocks.outer, "HAS_PLACE": blocks.place is not None}
    constants |= {"HAS_BIAS": bias is not None, **_common(x)}
    tensors = (x, data, blocks.crow, blocks.col, place, y if bias is None else bias, y)
    if INTERPRETED:
        constants |= {"BT": 32, "KT": min(32, blocks.inner)}
        product_kernel[(blocks.rows, triton.cdiv(x.shape[0], 32))](*tensors, *sizes, **constants)
    else:
        product_tuned[lambda c: (blocks.rows, triton.cdiv(x.shape[0], c["BT"]))](
            *tensors, *sizes, **constants, **_FUSED
        )
    return y


def gradient(g: Tensor, x: Tensor, blocks: Any) -> Tensor:
    """The blocks (nnz, bo, bi) of gᵀ @ x, g (tokens, out) and x (tokens, in)."""
    g, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (g, x))
    nnz, tokens = blocks.data.shape[0], x.shape[0]
    parts = split(nnz, tokens, _processors(x.device))
    size = triton.cdiv(triton.cdiv(tokens, parts), 128) * 128
    parts = triton.cdiv(tokens, size)
    kept = x.dtype if parts == 1 else torch.float32
    d = torch.empty(parts, *blocks.data.shape, dtype=kept, device=x.device)
    sizes = (tokens, g.shape[1], x.shape[1], nnz, g.stride(0), x.stride(0), size, _bucket(tokens))
    constants = {"N": blocks.outer, "K": blocks.inner, **_common(x)}
    tensors = (g, x, blocks.row, blocks.col, d)
    if INTERPRETED:
        gradient_kernel[(nnz, parts)](*tensors, *sizes, **constants, BT=32)
    else:
        gradient_tuned[(nnz, parts)](*tensors, *sizes, **constants, **_FUSED)
    return d[0] if parts == 1 else d.sum(0).to(x.dtype)


def split(blocks: int, tokens: int, processors: int) -> int:
    """Into how many parts the tokens are cut, where there are too few blocks to keep every multiprocessor busy."""
    return int(max(1, min(-(-2 * processors // max(1, blocks)), tokens // 512)))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _bucket(tokens: int) -> int:
    """Numbers of tokens that share one choice of a configuration."""
    return 1 << (tokens - 1).bit_length()


def _common(x: Tensor) -> dict[str, Any]:
    """Float32 as torch multiplies it; the interpreter cannot multiply bfloat16."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {"PRECISION": "tf32" if tf32 else "ieee", "UPCAST": INTERPRETED and x.dtype == torch.bfloat16}
