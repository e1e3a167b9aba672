"""
Linear layers and convolutions on weights that oneDNN has laid out once, ahead of the call.

BLAS and oneDNN copy a weight into a blocked layout before they multiply, at every call. With few rows (a short
sequence, a small batch) that copy is a good part of the time, and it can be kept. `packed_linear` and `packed_conv2d`
keep it; a convolution on a packed weight also computes channels last, which oneDNN does best.

These operators take the *plain* weight, and hold its packed copy in a cache beside the model, not in it. So the graph
module keeps its own parameters and nothing else: `state_dict`, `deepcopy`, `save_pretrained` and `.to()` meet no opaque
tensor (torch can neither copy, save, cast nor compare one), and undoing the pass puts back nothing. The cache is never
stale in silence: an entry belongs to one tensor object, and holds while its version counter, its address and a sample
of its values stay the same. A weight is packed at its second call in the same state, so weights that change at every
call (training, `functional_call`) are never packed, and input sizes that do not come back cost nothing.

Whatever packing does not serve runs the plain operators: gradients, other devices and dtypes, autocast, and numbers of
rows for which MKL, which packs at every call, is the faster one (see `rows`). Both ways are within rounding of each
other.

Memory: one more copy of each packed weight (up to `MAX_LAYOUTS` of a convolution's), freed with the weight or by
`release`. The layouts and the products are oneDNN's, as in Inductor's freezing.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.registration import register

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")

MAX_LAYOUTS = 4
"""Packed copies kept of one weight: a convolution's best layout depends on its input's size. Others run plain."""

_CALLS_TO_PACK, _CALLS_TO_REPLACE = 2, 8
"""Calls with one input size until a weight is packed for it; and until that copy takes the place of the oldest one."""

_SAMPLE = 64
"""Elements compared at each call, to notice writes through `.data`, which leave the version counter alone."""


# --- the cache -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Entry:
    """The packed copies of one weight, and the state of the weight for which they hold."""

    weight: weakref.ref[Tensor]
    version: int
    address: int
    view: Tensor  # some elements of the weight, shared
    sample: Tensor  # the same elements, as they were
    layouts: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # oldest first
    asked: dict[tuple[int, ...], int] = field(default_factory=dict)  # calls without a packed copy

    def holds(self, weight: Tensor) -> bool:
        """Whether this entry is that of `weight`, as it is now."""
        return (
            self.weight() is weight
            and self.version == weight._version
            and self.address == weight.data_ptr()
            and torch.equal(self.view, self.sample)
        )


_cache: dict[int, _Entry] = {}


def _enter(weight: Tensor) -> _Entry:
    key = id(weight)

    def forget(dead: weakref.ref[Tensor]) -> None:
        entry = _cache.get(key)
        if entry is not None and entry.weight is dead:
            del _cache[key]

    flat = weight.detach().view(-1)
    view = flat[:: max(1, flat.numel() // _SAMPLE)]
    entry = _Entry(weakref.ref(weight, forget), weight._version, weight.data_ptr(), view, view.clone())
    _cache[key] = entry
    return entry


def _lookup(weight: Tensor, key: tuple[int, ...], pack: Callable[[], Tensor]) -> Tensor | None:
    """The packed copy of `weight` under `key`, made when asked for again; None where the plain operator should run."""
    entry = _cache.get(id(weight))
    if entry is None or not entry.holds(weight):
        entry = _enter(weight)
    packed = entry.layouts.get(key)
    return _pack_on_repetition(entry, key, pack) if packed is None else packed


def _pack_on_repetition(entry: _Entry, key: tuple[int, ...], pack: Callable[[], Tensor]) -> Tensor | None:
    full = len(entry.layouts) >= MAX_LAYOUTS
    calls = entry.asked.pop(key, 0) + 1
    if calls < (_CALLS_TO_REPLACE if full else _CALLS_TO_PACK):
        if len(entry.asked) >= 16 * MAX_LAYOUTS:  # sizes without end
            entry.asked.clear()
        entry.asked[key] = calls
        return None
    if full:
        entry.layouts.pop(next(iter(entry.layouts)))
    packed = entry.layouts[key] = pack()
    return packed


def release(weight: Tensor | None = None) -> None:
    """Forget the packed copies of `weight`, or of every weight; they are made again when next needed."""
    if weight is None:
        _cache.clear()
    else:
        _cache.pop(id(weight), None)


def packed_bytes(weight: Tensor | None = None) -> int:
    """The memory in bytes that the packed copies of `weight`, or of every weight, hold now, oneDNN's padding aside."""
    entries = list(_cache.values()) if weight is None else [e for e in [_cache.get(id(weight))] if e is not None]
    return sum(p.numel() * p.element_size() for e in entries for p in e.layouts.values())


@functools.cache
def available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of torch packs weights of `dtype`, and this CPU computes with them at full speed."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _packable(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Cheapest questions first; wrong arguments are left to the plain operator, whose errors name them."""
    dtype = weight.dtype
    if x.dtype != dtype or x.device.type != "cpu" or weight.device.type != "cpu" or x.numel() == 0:
        return False
    if any(other is not None and (other.dtype != dtype or other.device.type != "cpu") for other in others):
        return False
    if not available(dtype) or not bool(torch.backends.mkldnn.enabled):
        return False
    return weight.is_contiguous() and not weight.is_inference()


# --- where it pays ---------------------------------------------------------------------------------------------------

ALL_ROWS = 2**31 - 1

# (least number of elements, least rows, most rows), the largest first. Measured on AVX2 (Zen 3) against MKL, as ratios
# of the times: with one thread, 2304x768 0.75 at 4 rows and 1.06 at 64, 2048x2048 0.69 at 4 and 1.03 at 128,
# 30522x768 0.98 at 1 and 0.77 at 160, 768x768 1.1 and more anywhere; with two threads, 768x768 0.6 to 0.9 up to 64
# rows, 0.94 at 128 and 1.1 from 512 on, 3072x768 0.7 at 1 and 0.8 at 128, 50257x768 0.3 at 8 and 0.8 at 512.
_ONE_THREAD = ((2**23, 2, 1024), (2**22, 2, 64), (3 * 2**19, 2, 16))
_MORE_THREADS = ((2**23, 1, 1024), (2**21, 1, 160), (2**19, 2, 128))


@functools.cache
def rows(features: int, inputs: int, threads: int) -> tuple[int, int] | None:
    """The least and the most rows for which a weight of this size is worth packing, with `threads` threads."""
    size = features * inputs
    table = _ONE_THREAD if threads == 1 else _MORE_THREADS
    return next(((least, most) for elements, least, most in table if size >= elements), None)


def _pays(x: Tensor, weight: Tensor, min_rows: int, max_rows: int) -> bool:
    inputs = x.shape[-1]
    if max_rows > 0:
        return min_rows * inputs <= x.numel() <= max_rows * inputs
    between = rows(weight.shape[0], weight.shape[1], torch.get_num_threads())
    return between is not None and between[0] * inputs <= x.numel() <= between[1] * inputs


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
    """`packed_linear`, with oneDNN on the CPU; the activation is in place on the fresh product."""
    packed = None
    if _linear_fits(x, weight, bias, transposed) and _pays(x, weight, min_rows, max_rows):
        packed = _lookup(weight, (int(transposed),), lambda: _pack_linear(weight, transposed))
    if packed is None:
        return _activate_(F.linear(x, weight.t() if transposed else weight, bias), activation)
    run = torch.ops.mkldnn._linear_pointwise.default
    if activation == "gelu_tanh":
        return run(x, packed, bias, "gelu", [], "tanh")  # type: ignore[no-any-return]
    return _activate_(run(x, packed, bias, "none", [], ""), activation)


def _linear_fits(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> bool:
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[0 if transposed else 1]:
        return False
    if bias is not None and bias.shape != weight.shape[1 if transposed else 0 :][:1]:
        return False
    return _packable(x, weight, bias)


def _pack_linear(weight: Tensor, transposed: bool) -> Tensor:
    dense = weight.detach()
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(dense.t().contiguous() if transposed else dense, None)
    return packed


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
    """`packed_conv2d`, with oneDNN on the CPU; the activation is in place on the fresh sum."""
    at = (list(padding), list(stride), list(dilation), groups)
    packed = None
    if x.dim() == weight.dim() == 4 and _packable(x, weight, bias, other):
        key = (*x.shape, *at[0], *at[1], *at[2], groups)
        packed = _lookup(weight, key, lambda: _pack_convolution(x, weight, *at))
    if packed is None:
        y = F.conv2d(x, weight, bias, at[1], at[0], at[2], groups)
        y = y if other is None else y + other
        return _activate_(y, activation).contiguous(memory_format=torch.channels_last)
    run = torch.ops.mkldnn._convolution_pointwise
    if other is None:
        y = run.default(x, packed, bias, *at, "none", [], "")
    else:
        y = run.binary(x, other, packed, bias, *at, "add", 1.0, None, [], "")
    return _activate_(y, activation)


def _pack_convolution(
    x: Tensor, weight: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    dense = weight.detach().contiguous(memory_format=torch.channels_last)
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        dense, padding, stride, dilation, groups, list(x.shape)
    )
    return packed


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


register(packed_linear, packed_linear_kernel)
register(packed_conv2d, packed_conv2d_kernel)
