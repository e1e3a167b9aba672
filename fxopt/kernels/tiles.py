"""
float32 products on a CPU's tile unit (AMX), as accurate as float32's own.

A float32 is the exact sum of three bfloat16, so a product of float32 matrices is the sum of six products of bfloat16
matrices, with all that is left out below float32's rounding. The tile unit computes those six in less time than AVX-512
takes for the one. The weight is split and laid out ahead (`pack`), the input at each call. Against float64 the error is
below that of MKL, as sums of sums are taken; a result is the same to the bit for any number of threads.

Infinities, NaN, and what rounds to infinity in bfloat16 (beyond 3.38e38) cannot be split. `pack` and `conv2d` return
None then, and the caller computes in float32. Parts below 2**-126 count as zero.

Source: Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
Computations", 2019 (arXiv:1904.06376).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.kernels import native

_SIDE, _PARTS = 32, 3  # SIDE and PARTS of tiles.h

_P, _I, _C = native.POINTER, native.INT64, native.INT
_pack = native.function("fxopt_tiles_pack", [_P] * 3 + [_I] * 6 + [_C])
_product = native.function("fxopt_tiles_product", [_P] * 7 + [_C])
_Sizes = ctypes.c_int64 * 19


@functools.cache
def available() -> bool:
    """Whether this CPU has the unit and the native library may use it; FXOPT_ISA=avx512 turns it off."""
    return _product is not None and native.isa() == "amx"


def pack(weight: Tensor) -> Tensor | None:
    """
    A weight (out, in, *kernel) of float32, split and laid out for `linear` and `conv2d`: one bfloat16 vector.

    It has 3 elements for each of the weight's, whose channels are padded to multiples of 32. None where an element
    cannot be split, where the weight is of another type, and where the unit is not available.
    """
    if not available() or weight.dtype is not torch.float32:
        return None
    features, channels = weight.shape[:2]
    flat = weight.detach().reshape(features, channels, -1)
    taps, blocks = flat.shape[2], -(-features // _SIDE) * -(-channels // _SIDE)
    out = torch.empty(blocks * taps * _SIDE * _SIDE * _PARTS, dtype=torch.bfloat16)
    refused = ctypes.c_int()
    at = (native.address(flat), native.address(out), ctypes.addressof(refused))
    by_feature, by_channel, by_tap = flat.stride()
    _pack(*at, features, taps, channels, by_feature, by_tap, by_channel, torch.get_num_threads())
    return None if refused.value else out


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, features: int, relu: bool = False) -> Tensor | None:
    """
    x @ weightᵀ + bias, and relu of it if wanted: x (…, in) -> (…, features), all float32; bias (features,).

    None where x has an element that cannot be split.
    """
    channels = x.shape[-1]
    rows = x if x.is_contiguous() else x.contiguous()
    y = torch.empty(*x.shape[:-1], features)
    count = x.numel() // channels
    sizes = _Sizes(1, count, 1, channels, 0, channels, 0, count, 1, features, 1, 1, 1, 1, 0, 0, 1, 1, relu)
    return _run(rows, packed, bias, None, y, sizes)


def output_size(
    x: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """The shape (batch, out, height, width) of a convolution's result."""
    window = zip(x[2:], padding, dilation, weight[2:], stride, strict=True)
    return (x[0], weight[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in window))


def conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool = False,
) -> Tensor | None:
    """
    conv2d(x, weight, bias) + other, and relu of it if wanted, channels last.

    x (batch, in, height, width), other as the result, all float32; `weight` is the shape (out, in, *kernel) of what was
    packed; no groups. None where x has an element that cannot be split.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    features, _, *kernel = weight
    out = output_size(x.shape, weight, stride, padding, dilation)
    y = torch.empty(out, memory_format=torch.channels_last)
    image = (batch, height, width, channels, height * width * channels, width * channels, channels)
    sizes = _Sizes(*image, *out[2:], features, *kernel, *stride, *padding, *dilation, relu)
    if other is not None:
        other = other.contiguous(memory_format=torch.channels_last)
    return _run(x, packed, bias, other, y, sizes)


def _run(
    x: Tensor, packed: Tensor, bias: Tensor | None, other: Tensor | None, y: Tensor, sizes: ctypes.Array[ctypes.c_int64]
) -> Tensor | None:
    bias = None if bias is None else bias.contiguous()
    refused = ctypes.c_int()
    tensors = [None if t is None else t.data_ptr() for t in (x, packed, bias, other, y)]
    _product(*tensors, ctypes.addressof(refused), sizes, torch.get_num_threads())
    return None if refused.value else y
