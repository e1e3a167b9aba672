"""
Linear layers whose weight is 2:4 sparse: of every four consecutive inputs of an output, at most two have a weight.

A weight (out, in), out a multiple of 32 and in of 64, is `values` (out, in / 2), two of each four, and `metadata`
(out, in / 16) int16: where each eight of them stand, two bits a value, in the order in which CUTLASS reads them. That
is the form of torch's `SparseSemiStructuredTensorCUTLASS` for 16 bits; here it is that of every floating dtype, so that
a cast of the values is a cast of the weight.

Float16 and bfloat16 on a GPU of compute capability 8.x (Ampere, Ada), the only ones that torch's CUTLASS kernels run
on, are multiplied by its sparse tensor cores. Everything else is multiplied as a dense weight: correct, not faster.
Float32 too, of which these kernels know only 1:2, in TF32: another pattern, and less exact.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.registration import differentiable

ROWS, COLUMNS = 32, 64
"""The features of a weight (out, in) are multiples of these."""

_TOKENS, _ALIGNED = 8, 16  # what the kernels read and write at once, in rows of the input and in bytes


def fits(shape: Sequence[int]) -> bool:
    """Whether a weight of this shape (out, in) has this form."""
    return shape[0] % ROWS == 0 and shape[1] % COLUMNS == 0 and 0 not in shape


def accelerated(weight: Tensor) -> bool:
    """Whether sparse tensor cores multiply with a 2:4 sparse `weight` (out, in) of this device, dtype and shape."""
    return weight.is_cuda and weight.dtype in _HALF and fits(weight.shape) and _has_kernels(weight.device)


_HALF = (torch.float16, torch.bfloat16)


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    built = torch.version.hip is None and sys.platform != "win32"
    return built and torch.cuda.get_device_capability(device)[0] == 8


def compress(weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """`values` and `metadata` of `weight` (out, in), of which `kept`, of its shape, has two true in each four."""
    out, inputs = weight.shape
    pairs = kept.reshape(out, -1, 4).byte().sort(dim=2, descending=True, stable=True).indices[..., :2]
    values = weight.reshape(out, -1, 4).gather(2, pairs).view(out, -1)
    codes = (pairs.reshape(out, inputs // 16, 8) << _shifts(pairs.device)).sum(2)
    # CUTLASS interleaves the four eights of 32 rows, and every two columns (reorder_meta in its host_reorder.h)
    tiles = codes.to(torch.int16).view(out // 32, 2, 2, 8, inputs // 32, 2)
    return values, tiles.permute(4, 0, 3, 1, 5, 2).reshape(out, inputs // 16)


def places(metadata: Tensor) -> Tensor:
    """The column in the weight of each of the values, (out, in / 2) int64."""
    out, columns = metadata.shape
    tiles = metadata.reshape(columns // 2, out // 32, 8, 2, 2, 2)
    codes = tiles.permute(1, 3, 5, 2, 0, 4).reshape(out, columns, 1)
    within = ((codes >> _shifts(metadata.device)) & 3).view(out, -1)
    return within + torch.arange(within.shape[1], device=metadata.device) // 2 * 4


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(0, 16, 2, device=device)


def to_dense(values: Tensor, metadata: Tensor) -> Tensor:
    """The weight (out, in) with its zeros; differentiable."""
    out, half = values.shape
    return values.new_zeros(out, 2 * half).scatter(1, places(metadata), values)


def _check(x: Tensor, values: Tensor, bias: Tensor | None, metadata: Tensor) -> None:
    """Refuse what does not go together: the kernels would read beyond."""
    if values.dim() != 2 or not fits((values.shape[0], 2 * values.shape[1])):
        wanted = f"(a multiple of {ROWS}, a multiple of {COLUMNS // 2})"
        raise ValueError(f"the values are {tuple(values.shape)}, expected {wanted}")
    out, inputs = values.shape[0], 2 * values.shape[1]
    if metadata.dtype != torch.int16 or metadata.shape != (out, inputs // 16):
        raise ValueError(
            f"metadata is {tuple(metadata.shape)} of {metadata.dtype}, expected {(out, inputs // 16)} of torch.int16"
        )
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(f"the input is {tuple(x.shape)}, expected {inputs} features, as the weight has")
    if x.dtype != values.dtype or (bias is not None and bias.dtype != values.dtype):
        raise ValueError(f"the input is {x.dtype}, the values are {values.dtype}; give the same type")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"the bias is {tuple(bias.shape)}, expected ({out},)")


def _semi_structured_linear(x: Tensor, values: Tensor, bias: Tensor | None, metadata: Tensor) -> Tensor:
    """x @ weightᵀ + bias: (…, in) -> (…, out)."""
    _check(x, values, bias, metadata)
    rows = x.reshape(-1, x.shape[-1])
    if values.is_cuda and values.dtype in _HALF and rows.shape[0] and _has_kernels(values.device):
        y = _product(rows, values, bias, metadata)
    else:
        y = F.linear(rows, to_dense(values, metadata), bias)
    return y.view(*x.shape[:-1], values.shape[0])


def _reference(x: Tensor, values: Tensor, bias: Tensor | None, metadata: Tensor) -> Tensor:
    """The same in plain torch."""
    _check(x, values, bias, metadata)
    return F.linear(x, to_dense(values, metadata), bias)


def _fake(x: Tensor, values: Tensor, bias: Tensor | None, metadata: Tensor) -> Tensor:
    _check(x, values, bias, metadata)
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _product(x: Tensor, values: Tensor, bias: Tensor | None, metadata: Tensor) -> Tensor:
    tokens = x.shape[0]
    if tokens % _TOKENS:  # no padding would be a copy all the same
        x = F.pad(x, (0, 0, 0, -tokens % _TOKENS))
    x = x.contiguous()
    if x.data_ptr() % _ALIGNED:
        x = x.clone()
    values, metadata = values.contiguous(), metadata.contiguous()
    if bias is None:
        y = torch._sparse_semi_structured_mm(values, metadata, x.t())
    else:
        y = torch._sparse_semi_structured_addmm(bias, values, metadata, x.t())
    return y[:, :tokens].t().contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, metadata = inputs
    ctx.save_for_backward(x, values, metadata)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    """The gradients of the dense product, of the weight where there are values; differentiable again."""
    x, values, metadata = ctx.saved_tensors
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    rows = g.reshape(-1, g.shape[-1])
    dx = g @ to_dense(values, metadata) if need_x else None
    dvalues = (rows.t() @ x.reshape(-1, x.shape[-1])).gather(1, places(metadata)) if need_values else None
    return dx, dvalues, rows.sum(0) if need_bias else None, None


semi_structured_linear = differentiable(
    "semi_structured_linear", _semi_structured_linear, _fake, _keep, _backward, _reference
)
