"""
Linear layers whose weight is block-sparse: only some of its blocks are kept, the others are zero.

A weight (out, in) is cut into blocks (bo, bi), the last row and column of blocks padded with zeros. The kept blocks are
`data` (nnz, bo, bi), in compressed rows: those of row r are `data[crow[r]:crow[r + 1]]`, and `col` (nnz) has their
columns, in rising order. `index` is what follows from the two for the way back (`transposed_index`). Indices are int32.

Two operators, closed under differentiation: `block_linear`, the product with the weight or with its transpose, and
`block_gradient`, the gradient with regard to the blocks. On the CPU they run the native library, on CUDA Triton, and
without either plain torch, row of blocks by row of blocks. The native products sum each output in one fixed order: the
same to the bit for any number of tokens and threads. Half precision is summed in float32; bfloat16 is multiplied as it
is where the CPU can (AVX-512 with bfloat16), and made float32 first elsewhere.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import native
from fxopt.kernels.registration import differentiable

LANES = 16
"""The native kernels take blocks whose sides are multiples of this; others run in torch."""

_POINTER, _INT64, _INT = native.POINTER, native.INT64, native.INT
_product = native.function("fxopt_block_product", [_POINTER] * 7 + [_INT64] * 5 + [_INT] * 3)
_gradient = native.function("fxopt_block_gradient", [_POINTER] * 5 + [_INT64] * 6 + [_INT] * 2)
_product_bfloat16 = native.function("fxopt_block_product_bfloat16", [_POINTER] * 7 + [_INT64] * 5 + [_INT] * 3, True)
_gradient_bfloat16 = native.function("fxopt_block_gradient_bfloat16", [_POINTER] * 5 + [_INT64] * 6 + [_INT] * 2, True)

# The same for float32 tensors as a layer mostly gives them; else None.
_direct, _direct_gradient = native.direct("block_linear"), native.direct("block_gradient")


def transposed_index(crow: Tensor, col: Tensor, columns: int) -> Tensor:
    """
    The index of the transpose, int32: `row` (nnz), then by columns the rows (nnz) and places in `data` (nnz) of the
    blocks, then where each column begins (columns + 1).
    """
    counts = crow.diff().long()
    row = torch.repeat_interleave(torch.arange(counts.numel(), device=crow.device), counts)
    place = torch.argsort(col.long() * max(1, counts.numel()) + row)
    begin = torch.zeros(columns + 1, dtype=torch.int64, device=crow.device)
    begin[1:] = torch.bincount(col.long(), minlength=columns).cumsum(0)
    return torch.cat([row, row[place], place, begin]).int()


def is_native(data: Tensor) -> bool:
    """Whether products with these blocks run in the native library."""
    sides = data.shape[1] % LANES == 0 and data.shape[2] % LANES == 0
    return _product is not None and data.is_cpu and sides and data.dtype in _COMPUTED_IN


_COMPUTED_IN = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float16: torch.float32}


class _Blocks:
    """
    The arguments of an operator, read as a row-wise matrix of blocks: the weight, or its transpose.

    It slices `index` only where somebody asks: a small layer is done in some 100 µs.
    """

    def __init__(self, data: Tensor, crow: Tensor, col: Tensor, index: Tensor, transposed: bool) -> None:
        if data.dim() != 3:
            raise ValueError(f"the blocks are {tuple(data.shape)}, expected three dimensions: (number, out, in)")
        nnz, bo, bi = data.shape
        rows = crow.numel() - 1
        columns = index.numel() - 3 * nnz - 1
        self.data, self.transposed, self.grid, self.nnz = data, transposed, (rows, columns), nnz
        self.weight_crow, self.weight_col, self.index = crow, col, index
        self.rows, self.columns = (columns, rows) if transposed else (rows, columns)
        self.outer, self.inner = (bi, bo) if transposed else (bo, bi)

    @property
    def row(self) -> Tensor:
        return self.index[: self.nnz]

    @property
    def crow(self) -> Tensor:
        return self.index[3 * self.nnz :] if self.transposed else self.weight_crow

    @property
    def col(self) -> Tensor:
        return self.index[self.nnz : 2 * self.nnz] if self.transposed else self.weight_col

    @property
    def place(self) -> Tensor | None:
        return self.index[2 * self.nnz : 3 * self.nnz] if self.transposed else None


def _check(x: Tensor, features: int, blocks: _Blocks, bias: Tensor | None = None) -> None:
    """
    Refuse what does not go together: the kernels get addresses, and would read beyond, or numbers that are none. What
    the indices say is not looked at; that is for who makes them.
    """
    _check_indices(blocks)
    device = blocks.data.device
    if x.device != device or (bias is not None and bias.device != device):
        where = f"on {x.device}{'' if bias is None else f', the bias on {bias.device}'}"
        raise ValueError(f"the input is {where}, the blocks are on {device}; put them on one device")
    if x.dim() == 0:
        raise ValueError("the input has no dimension, expected (…, in)")
    least, most = (blocks.columns - 1) * blocks.inner, blocks.columns * blocks.inner
    if not least < x.shape[-1] <= most:
        raise ValueError(f"the input has {x.shape[-1]} features, expected {least + 1} to {most}, as the weight has")
    if not (blocks.rows - 1) * blocks.outer < features <= blocks.rows * blocks.outer:
        raise ValueError(f"{features} features were asked for, but the weight has {blocks.rows} × {blocks.outer}")
    if bias is not None and bias.shape != (features,):
        raise ValueError(f"the bias is {tuple(bias.shape)}, expected ({features},)")


def _check_indices(blocks: _Blocks) -> None:
    device = blocks.data.device
    for name in ("weight_crow", "weight_col", "index"):
        held = getattr(blocks, name)
        if held.dtype is not torch.int32 or held.dim() != 1 or not held.is_contiguous() or held.device != device:
            form = f"{held.dim()}-d {held.dtype} on {held.device}{'' if held.is_contiguous() else ', not contiguous'}"
            wanted = f"1-d contiguous torch.int32 on {device}"
            raise ValueError(f"{name.removeprefix('weight_')} is {form}, expected {wanted}, as the blocks are")
    if blocks.weight_col.numel() != blocks.nnz or blocks.rows < 0 or blocks.columns < 0:
        sizes = f"crow has {blocks.rows + 1} numbers, col {blocks.weight_col.numel()}, index {blocks.index.numel()}"
        wanted = f"rows + 1, {blocks.nnz} and {3 * blocks.nnz} + columns + 1"
        raise ValueError(f"{sizes}, expected {wanted} for {blocks.nnz} blocks")


# --- the products ----------------------------------------------------------------------------------------------------


def _block_linear(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    crow: Tensor,
    col: Tensor,
    index: Tensor,
    features: int,
    transposed: bool = False,
) -> Tensor:
    """x @ weightᵀ + bias, or x @ weight if ``transposed``: (…, in) -> (…, features)."""
    if _direct is not None:
        ready = _direct(*native.call_context(), x, data, bias, crow, col, index, features, transposed)
        if ready is not None:
            return ready  # type: ignore[no-any-return]
    if x.dtype != data.dtype or (bias is not None and bias.dtype != data.dtype):
        of_bias = "" if bias is None else f", the bias is {bias.dtype}"
        raise ValueError(f"the input is {x.dtype}, the blocks are {data.dtype}{of_bias}; give the same type")
    blocks = _Blocks(data, crow, col, index, transposed)
    _check(x, features, blocks, bias)
    if x.numel() == 0 or features == 0 or data.shape[0] == 0:
        y = x.new_zeros(*x.shape[:-1], features)
        return y if bias is None else y + bias
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if is_native(data) and x.is_cpu:
        y = _native_product(rows, blocks, bias, features)
    elif x.is_cuda and (kernels := _triton(blocks)) is not None:
        y = kernels.product(rows, blocks, bias, features)
    else:
        y = _torch_product(rows, blocks, bias, features)
    return y if rows is x else y.view(*x.shape[:-1], features)


def _reference(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    crow: Tensor,
    col: Tensor,
    index: Tensor,
    features: int,
    transposed: bool = False,
) -> Tensor:
    """The same in plain torch, on the dense weight."""
    blocks = _Blocks(data, crow, col, index, transposed)
    _check(x, features, blocks, bias)
    weight = to_dense(data, blocks.row, col, blocks.grid)
    y = F.linear(F.pad(x, (0, blocks.columns * blocks.inner - x.shape[-1])), weight.t() if transposed else weight)
    return y[..., :features] if bias is None else y[..., :features] + bias


def _padded(x: Tensor, size: int) -> Tensor:
    return x.contiguous() if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def in_bfloat16(data: Tensor) -> bool:
    """
    Whether products with these blocks are made of bfloat16 as it is, by AVX-512's instruction for pairs of them. Other
    half precision is made float32 first.
    """
    pairs = data.shape[1] % (2 * LANES) == 0 and data.shape[2] % (2 * LANES) == 0
    return data.dtype is torch.bfloat16 and pairs and native.multiplies_bfloat16()


def _native_product(x: Tensor, blocks: _Blocks, bias: Tensor | None, features: int) -> Tensor:
    kept, width = x.dtype, blocks.rows * blocks.outer
    x, data = _padded(x, blocks.columns * blocks.inner), blocks.data.contiguous()
    b = None if bias is None else _padded(bias, width).float()
    run = _product
    if in_bfloat16(data):
        run = _product_bfloat16
    else:
        x, data = x.float(), data.float()
    y = torch.empty(x.shape[0], width, dtype=torch.float32)
    tensors = map(native.address, (x, data, blocks.crow, blocks.col, blocks.place, b, y))
    sizes = (x.shape[0], blocks.rows, blocks.columns, blocks.outer, blocks.inner)
    run(*tensors, *sizes, int(not blocks.transposed), *native.call_context())
    return y if width == features and kept is torch.float32 else y[:, :features].contiguous().to(kept)


def _torch_product(x: Tensor, blocks: _Blocks, bias: Tensor | None, features: int) -> Tensor:
    """Row by row: gather the columns that the row's blocks read, and multiply once. Off the CPU, by way of dense."""
    x = _padded(x, blocks.columns * blocks.inner)
    if x.is_cpu:
        y = x.new_zeros(x.shape[0], blocks.rows * blocks.outer)
        parts, ends = x.view(-1, blocks.columns, blocks.inner), blocks.crow.tolist()
        for r, (begin, end) in enumerate(itertools.pairwise(ends)):
            if begin < end:
                read = parts.index_select(1, blocks.col[begin:end]).view(x.shape[0], -1)
                here = y[:, r * blocks.outer : (r + 1) * blocks.outer]
                torch.mm(read, _stack(blocks, begin, end), out=here)
    else:
        weight = to_dense(blocks.data, blocks.row, blocks.weight_col, blocks.grid)
        y = x @ (weight if blocks.transposed else weight.t())
    y = y[:, :features].contiguous()
    return y if bias is None else y.add_(bias)


def _stack(blocks: _Blocks, begin: int, end: int) -> Tensor:
    """The blocks of one row over each other, as (count * inner, outer)."""
    if blocks.place is not None:
        return blocks.data.index_select(0, blocks.place[begin:end]).view(-1, blocks.outer)
    return blocks.data[begin:end].transpose(1, 2).reshape(-1, blocks.outer)


def to_dense(data: Tensor, row: Tensor, col: Tensor, grid: tuple[int, int]) -> Tensor:
    """The whole weight, with zeros where there is no block, padding included; differentiable."""
    rows, columns = grid
    bo, bi = data.shape[1:]
    whole = data.new_zeros(rows * columns, bo, bi)
    whole = whole.index_put((row.long() * columns + col.long(),), data)
    return whole.view(rows, columns, bo, bi).transpose(1, 2).reshape(rows * bo, columns * bi)


def from_dense(weight: Tensor, row: Tensor, col: Tensor, block: tuple[int, int]) -> Tensor:
    """The blocks (nnz, bo, bi) of ``weight`` (out, in) at the places (row, col); beyond its edges they are zero."""
    return block_view(weight, block)[row.long(), col.long()]


def block_view(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """``weight`` (out, in) as (rows, columns, bo, bi), padded with zeros; without padding it is a view."""
    bo, bi = block
    padded = F.pad(weight, (0, -weight.shape[1] % bi, 0, -weight.shape[0] % bo))
    return padded.view(padded.shape[0] // bo, bo, padded.shape[1] // bi, bi).transpose(1, 2)


# --- the gradient of the blocks --------------------------------------------------------------------------------------


def _block_gradient(g: Tensor, x: Tensor, data: Tensor, crow: Tensor, col: Tensor, index: Tensor) -> Tensor:
    """The blocks of gᵀ @ x where `data` has blocks: g (…, out), x (…, in) -> a tensor as `data`."""
    if _direct_gradient is not None:
        ready = _direct_gradient(*native.call_context(), g, x, data, crow, col, index)
        if ready is not None:
            return ready  # type: ignore[no-any-return]
    if g.dtype != x.dtype or g.device != x.device or g.shape[:-1] != x.shape[:-1]:
        both = (f"{tuple(t.shape)} of {t.dtype} on {t.device}" for t in (g, x))
        raise ValueError(f"{' and '.join(both)} are not of the same tokens")
    blocks = _Blocks(data, crow, col, index, False)
    _check(x, g.shape[-1], blocks)
    if g.numel() == 0 or data.shape[0] == 0:
        return g.new_zeros(data.shape)
    g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    if is_native(data) and x.is_cpu and x.dtype in _COMPUTED_IN:
        return _native_gradient(g, x, blocks)
    if x.is_cuda and (kernels := _triton(blocks)) is not None:
        out: Tensor = kernels.gradient(g, x, blocks)
        return out
    return _torch_gradient(g, x, blocks)


def _native_gradient(g: Tensor, x: Tensor, blocks: _Blocks) -> Tensor:
    kept, run = x.dtype, _gradient
    g, x = _padded(g, blocks.rows * blocks.outer), _padded(x, blocks.columns * blocks.inner)
    if x.dtype is blocks.data.dtype and in_bfloat16(blocks.data):
        run = _gradient_bfloat16
    else:
        g, x = g.float(), x.float()
    out = torch.empty(blocks.data.shape, dtype=torch.float32)
    tensors = map(native.address, (x, g, blocks.row, blocks.col, out))
    sizes = (x.shape[0], out.shape[0], blocks.rows, blocks.columns, blocks.outer, blocks.inner)
    run(*tensors, *sizes, *native.call_context())
    return out.to(kept)


def _torch_gradient(g: Tensor, x: Tensor, blocks: _Blocks) -> Tensor:
    g, x = _padded(g, blocks.rows * blocks.outer), _padded(x, blocks.columns * blocks.inner)
    if not x.is_cpu:
        return block_view(g.t() @ x, (blocks.outer, blocks.inner))[blocks.row.long(), blocks.col.long()]
    out = torch.empty(blocks.data.shape, dtype=x.dtype)
    parts, ends = x.view(-1, blocks.columns, blocks.inner), blocks.crow.tolist()
    for r, (begin, end) in enumerate(itertools.pairwise(ends)):
        if begin < end:
            read = parts.index_select(1, blocks.col[begin:end]).view(x.shape[0], -1)
            product = g[:, r * blocks.outer : (r + 1) * blocks.outer].t() @ read
            out[begin:end] = product.view(blocks.outer, -1, blocks.inner).transpose(0, 1)
    return out


def _triton(blocks: _Blocks) -> Any:
    """The module of Triton kernels, imported when first needed; None where it is not installed or not for these."""
    from fxopt.kernels import block_linear_triton

    known = block_linear_triton.takes(blocks.outer, blocks.inner, blocks.data.dtype)
    return block_linear_triton if known else None


# --- the operators ---------------------------------------------------------------------------------------------------


def _fake_linear(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    crow: Tensor,
    col: Tensor,
    index: Tensor,
    features: int,
    transposed: bool = False,
) -> Tensor:
    _check(x, features, _Blocks(data, crow, col, index, transposed), bias)
    return x.new_empty((*x.shape[:-1], features))


def _fake_gradient(g: Tensor, x: Tensor, data: Tensor, crow: Tensor, col: Tensor, index: Tensor) -> Tensor:
    _check(x, g.shape[-1], _Blocks(data, crow, col, index, False))
    return g.new_empty(data.shape)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, data, _, *where = inputs
    ctx.save_for_backward(x, data, *where[:3])
    ctx.transposed = len(where) > 4 and where[4]


def _linear_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, data, *where = ctx.saved_tensors
    need_x, need_data, need_bias = ctx.needs_input_grad[:3]
    dx = ddata = db = None
    if need_x:
        dx = block_linear(g, data, None, *where, x.shape[-1], not ctx.transposed)
    if need_data:
        ddata = block_gradient(*((x, g) if ctx.transposed else (g, x)), data, *where)
    if need_bias:
        db = g.sum_to_size(g.shape[-1:])
    return dx, ddata, db, None, None, None, None, None


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    g, x, _, *where = inputs
    ctx.save_for_backward(g, x, *where)


def _gradient_backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
    g, x, *where = ctx.saved_tensors
    need_g, need_x = ctx.needs_input_grad[:2]
    dg = block_linear(x, d, None, *where, g.shape[-1], False) if need_g else None
    dx = block_linear(g, d, None, *where, x.shape[-1], True) if need_x else None
    return dg, dx, None, None, None, None


block_linear = differentiable(
    "block_linear", _block_linear, _fake_linear, _keep_linear, _linear_backward, _reference, _direct
)
block_gradient = differentiable(
    "block_gradient", _block_gradient, _fake_gradient, _keep_gradient, _gradient_backward, None, _direct_gradient
)
