"""
Linear layers and convolutions on weights that are laid out once, ahead of the call: for oneDNN, or for the tile unit.

BLAS and oneDNN copy a weight into a blocked layout before they multiply, at every call. With few rows (a short
sequence, a small batch) that copy is a good part of the time, and it can be kept. `packed_linear` and `packed_conv2d`
keep it; a convolution on a packed weight also computes channels last, which oneDNN does best. On a CPU with AMX they
compute, where that is the fastest, by tiles (`fxopt.kernels.tiles`): no less accurate, and in less time.

These operators take the *plain* weight, and hold its packed copy in a cache beside the model, not in it
(`fxopt.kernels.layouts`). So the graph module keeps its own parameters and nothing else: `state_dict`, `deepcopy`,
`save_pretrained` and `.to()` meet no opaque tensor (torch can neither copy, save, cast nor compare one), and undoing
the pass puts back nothing. The cache is never stale in silence, and a weight is packed at its second call in the same
state.

Whatever packing does not serve runs the plain operators: gradients, other devices and dtypes, autocast, and numbers of
rows for which MKL, which packs at every call, is the faster one (see `rows`). All ways are within rounding of each
other.

Memory: one more copy of each packed weight (up to `layouts.MAX_LAYOUTS` of a convolution's; one for tiles has half as
much again), freed with the weight or by `layouts.release`. oneDNN's layouts and products are used as in Inductor's
freezing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import native, tiles
from fxopt.kernels.layouts import Packed, find, pack_on_repetition
from fxopt.kernels.registration import register

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")


@functools.cache
def available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of torch packs weights of `dtype`, and this CPU computes with them at full speed."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _pack_on_repetition(weight: Tensor, key: object, pack: Callable[[], Packed]) -> None:
    if weight.is_cpu and available(weight.dtype) and torch._C._get_mkldnn_enabled():
        pack_on_repetition(weight, key, pack)


# --- where it pays ---------------------------------------------------------------------------------------------------

ALL_ROWS = 2**31 - 1

# (least number of elements, least rows, most rows), the largest first. Measured on AVX2 (Zen 3) against MKL, as ratios
# of the times. One thread: 2304×768 0.75 at 4 rows and 1.06 at 64, 2048×2048 0.69 at 4 and 1.03 at 128, 30522×768 0.98
# at 1 and 0.77 at 160. Two threads: 2304×768 0.8 at 1 and 0.85 at 128, 3072×768 0.7 at 1, 0.8 at 128 and 1.1 at 512,
# 50257×768 0.3 at 8 and 0.8 at 512. Smaller weights gain too little over the dispatch that they pay at any number of
# rows: 768×768 0.94 at 128 rows and 1.25 at 1.
_ONE_THREAD = ((2**23, 2, 1024), (2**22, 2, 64), (3 * 2**19, 2, 16))
_MORE_THREADS = ((2**23, 1, 1024), (2**21, 1, 160), (3 * 2**19, 1, 128))
_LEAST_ROWS = 4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1


@functools.cache
def rows(features: int, inputs: int, threads: int) -> tuple[int, int] | None:
    """The least and the most rows for which a weight of this size is worth packing, with `threads` threads."""
    size = features * inputs
    table = _ONE_THREAD if threads == 1 else _MORE_THREADS
    return next(((max(least, _LEAST_ROWS), most) for elements, least, most in table if size >= elements), None)


# Measured on Sapphire Rapids with 2 threads against MKL and packed oneDNN, with weights that the caches do not hold.
# 768×3072: 0.53 at 128 rows, where oneDNN takes 0.88; 0.87 and 0.82 at 32 rows; 256×256: 0.83 and 1.07 at 128.
# Convolutions by the number of products for each element that is split: 0.48 for 256→256 by 3×3 at 14² (oneDNN 0.71),
# 0.83 for 128→512 by 1×1 at 28² (0.92), 1.15 for 64→256 by 1×1 at 56² (0.81), 0.91 for 128→128 by 3×3 at stride 2.
_TILES_ROWS, _TILES_SIZE, _TILES_REUSE, _TILES_CHANNELS = 48, 2**16, 512, 32


def tiles_pay(size: int, rows: int) -> bool:
    """Whether the tile unit is the fastest for a linear weight of `size` elements and an input of `rows` rows."""
    return rows >= _TILES_ROWS and size >= _TILES_SIZE and tiles.available()


def _pays(size: int, weight: Tensor, inputs: int, min_rows: int, max_rows: int) -> bool:
    """Whether packing pays for an input of `size` elements."""
    if max_rows == 0:
        between = rows(weight.shape[0], weight.shape[1], torch.get_num_threads())
        if between is None:
            return False
        min_rows, max_rows = between
    return min_rows * inputs <= size <= max_rows * inputs and size > 0


# --- the operators ---------------------------------------------------------------------------------------------------


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    transposed: bool = False,
    min_rows: int = 0,
    max_rows: int = 0,
) -> Tensor:
    """
    activation(x @ weightᵀ + bias), on a packed weight where x has `min_rows` to `max_rows` rows.

    With `max_rows` 0, the rows between which packing pays follow from the weight's size and torch's threads (`rows`).

    x (…, in), weight (out, in), or (in, out) if `transposed`; bias (out,) -> (…, out), all of one floating dtype.
    `activation` is one of `ACTIVATIONS`; "gelu" is that with erf.
    """
    return _activate(F.linear(x, weight.t() if transposed else weight, bias), activation)


def packed_linear_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    transposed: bool = False,
    min_rows: int = 0,
    max_rows: int = 0,
) -> Tensor:
    """`packed_linear`, with the tile unit or oneDNN on the CPU; the activation is in place on the fresh product."""
    y = _linear_by_tiles(x, weight, bias, activation, transposed, min_rows, max_rows)
    if y is not None:
        return y
    packed = _packed_linear(x, weight, transposed, min_rows, max_rows)
    if packed is None or not packed.takes(x, bias):
        return _activate_(F.linear(x, weight.t() if transposed else weight, bias), activation)
    if activation == "gelu_tanh":
        return _run_linear(x, packed.weight, bias, "gelu", [], "tanh")  # type: ignore[no-any-return]
    return _activate_(_run_linear(x, packed.weight, bias, "none", [], ""), activation)


def _packed_linear(x: Tensor, weight: Tensor, transposed: bool, min_rows: int, max_rows: int) -> Packed | None:
    if weight.dim() != 2 or x.dim() < 2 or x.shape[-1] != (inputs := weight.shape[0 if transposed else 1]):
        return None
    if not _pays(x.numel(), weight, inputs, min_rows, max_rows):
        return None
    packed = find(weight, transposed)
    if packed is None:
        _pack_on_repetition(weight, transposed, lambda: _pack_linear(weight, transposed))
    return packed


def _linear_by_tiles(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    transposed: bool,
    min_rows: int,
    max_rows: int,
) -> Tensor | None:
    """The result of the tile unit, where it pays; None where it does not, or cannot."""
    if weight.dim() != 2 or x.dim() < 2 or x.shape[-1] != (inputs := weight.shape[0 if transposed else 1]):
        return None
    if x.dtype is not torch.float32 or inputs == 0 or not tiles_pay(weight.numel(), x.numel() // inputs):
        return None
    if max_rows and not min_rows * inputs <= x.numel() <= max_rows * inputs:  # measured: it does not pay
        return None
    packed = find(weight, key := ("tiles", transposed))
    if packed is None:
        _pack_on_repetition(weight, key, lambda: _pack_tiles(weight.t() if transposed else weight))
        return None
    if not packed.takes(x, bias):
        return None
    y = tiles.linear(x, packed.weight, bias, packed.bias[0], activation == "relu")
    return y if y is None or activation == "relu" else _activate_(y, activation)


def _pack_tiles(weight: Tensor) -> Packed:
    packed = tiles.pack(weight)
    # an empty one for what cannot be split: it takes nothing, and is not asked for again
    return Packed(weight.new_empty(0) if packed is None else packed, weight.dtype, (weight.shape[0],), ())


def _pack_linear(weight: Tensor, transposed: bool) -> Packed:
    dense = weight.detach().t().contiguous() if transposed else weight.detach()
    packed = torch.ops.mkldnn._reorder_linear_weight(dense, None)
    return Packed(packed, weight.dtype, (dense.shape[0],), ())


def packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    """
    activation(conv2d(x, weight, bias) + other), channels last, on a packed weight where x has come in this size before.

    x (batch, in, height, width), weight (out, in / groups, *kernel), bias (out,), other as the result; all of one
    floating dtype, in any layout. `stride`, `padding` (zeros) and `dilation` have two numbers.
    """
    y = F.conv2d(x, weight, bias, list(stride), list(padding), list(dilation), groups)
    y = y if other is None else y + other
    return _activate(y, activation).contiguous(memory_format=torch.channels_last)


def packed_conv2d_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    """`packed_conv2d`, with the tile unit or oneDNN on the CPU; the activation is in place on the fresh sum."""
    by_tiles = _conv2d_by_tiles(x, weight, bias, other, stride, padding, dilation, groups, activation)
    if by_tiles is not None:
        return by_tiles
    if weight.shape[2:] == _ONE_BY_ONE and groups == 1 and [*stride, *padding] == _PLAIN and x.dim() == 4:
        return _product_of_pixels(x, weight, bias, other, activation)
    key = (x.shape, groups, *stride, *padding, *dilation)
    packed = find(weight, key)
    if packed is None or not packed.takes(x, bias, other):
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        if packed is None and x.dim() == 4 and x.dtype == weight.dtype and y.numel() > 0:
            size, at = y.shape, (list(padding), list(stride), list(dilation), groups)
            _pack_on_repetition(weight, key, lambda: _pack_convolution(x, weight, size, *at))
        y = y if other is None else y + other
        return _activate_(y, activation).contiguous(memory_format=torch.channels_last)
    if other is None:
        y = _run_conv(x, packed.weight, bias, padding, stride, dilation, groups, "none", [], "")
    else:
        y = _run_conv_add(x, other, packed.weight, bias, padding, stride, dilation, groups, "add", 1.0, None, [], "")
    return _activate_(y, activation)


def _conv2d_by_tiles(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor | None:
    """The result of the tile unit, where it pays; None where it does not, or cannot."""
    if groups != 1 or not tiles.available() or x.dtype is not torch.float32 or not _reused(weight, stride, dilation):
        return None
    packed = find(weight, "tiles")
    if packed is None:
        if x.dim() == 4 and x.numel() > 0:
            _pack_on_repetition(weight, "tiles", lambda: _pack_tiles(weight))
        return None
    if not packed.takes(x, bias) or x.dim() != 4 or x.shape[1] != weight.shape[1] or x.numel() == 0:
        return None
    size = tiles.output_size(x.shape, weight.shape, stride, padding, dilation)
    added = other if other is None or (other.shape == size and packed.adds(other)) else None
    relu = activation == "relu" and added is other
    y = tiles.conv2d(x, packed.weight, bias, added, weight.shape, stride, padding, dilation, relu)
    if y is None or relu:
        return y
    if added is None and other is not None:
        y = y + other
    return _activate_(y, activation).contiguous(memory_format=torch.channels_last)


def _reused(weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether each element of the input goes into so many products that it pays to split it."""
    features, channels, *kernel = weight.shape
    phases = 1
    for k, s, d in zip(kernel, stride, dilation, strict=True):
        phases *= len({i * d % s for i in range(k)})
    return channels >= _TILES_CHANNELS and features * kernel[0] * kernel[1] >= _TILES_REUSE * phases


_ONE_BY_ONE, _PLAIN = (1, 1), [1, 1, 0, 0]


def _product_of_pixels(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, activation: str) -> Tensor:
    """
    A convolution by single pixels, which is a linear layer over the channels: as fast, and one packed copy serves all
    sizes. ``other`` is added in place afterwards.
    """
    packed = find(weight, "1x1")
    if packed is None or not packed.takes(x, bias) or x.shape[1] != weight.shape[1] or x.numel() == 0:
        y = F.conv2d(x, weight, bias)
        if packed is None and x.dtype == weight.dtype and y.numel() > 0:
            _pack_on_repetition(weight, "1x1", lambda: _pack_linear(weight.flatten(1), False))
    else:
        y = _run_linear(x.permute(0, 2, 3, 1), packed.weight, bias, "none", [], "").permute(0, 3, 1, 2)
    if other is None:
        y = _activate_(y, activation)
    elif activation == "relu" and _alike(y, other):
        _add_relu(native.address(y), native.address(other), y.numel(), *native.call_context())
    else:
        y = y.add_(other) if other.shape == y.shape and other.dtype is y.dtype else y + other
        y = _activate_(y, activation)
    return y.contiguous(memory_format=torch.channels_last)


_add_relu = native.function("fxopt_add_relu", [native.POINTER, native.POINTER, native.INT64, native.INT, native.INT])


def _alike(y: Tensor, other: Tensor) -> bool:
    """Whether the native kernel can add ``other`` to the fresh ``y``: both dense, in one order of their elements."""
    if _add_relu is None or y.dtype is not torch.float32 or other.dtype is not torch.float32:
        return False
    if y.shape != other.shape or not (y.is_cpu and other.is_cpu):
        return False
    return all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, other))


def _pack_convolution(
    x: Tensor,
    weight: Tensor,
    size: tuple[int, ...],
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Packed:
    dense = weight.detach().contiguous(memory_format=torch.channels_last)
    packed = torch.ops.mkldnn._reorder_convolution_weight(dense, padding, stride, dilation, groups, list(x.shape))
    return Packed(packed, weight.dtype, (weight.shape[0],), size)


def _activate(y: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return y
    if activation == "relu":
        return F.relu(y)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    raise ValueError(f"activation={activation!r} was given; it is one of {', '.join(ACTIVATIONS)}")


def _activate_(y: Tensor, activation: str) -> Tensor:
    """
    `_activate`, in place on a fresh product.

    Not oneDNN's post-ops: its relu turns NaN into 0, and its erf is slower than ATen's (linear and gelu together take
    1.25 × as long at 128 rows of 768 → 3072). Its tanh is faster than ATen's, keeps NaN, and is used.
    """
    if activation == "none":
        return y
    if activation == "relu":
        return torch.relu_(y)
    if activation == "gelu":
        return torch.ops.aten.gelu_.default(y)  # type: ignore[no-any-return]
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_.default(y, approximate="tanh")  # type: ignore[no-any-return]
    raise ValueError(f"activation={activation!r} was given; it is one of {', '.join(ACTIVATIONS)}")


if available():
    _run_linear = torch.ops.mkldnn._linear_pointwise.default
    _run_conv = torch.ops.mkldnn._convolution_pointwise.default
    _run_conv_add = torch.ops.mkldnn._convolution_pointwise.binary

register(packed_linear, packed_linear_kernel)
register(packed_conv2d, packed_conv2d_kernel)
