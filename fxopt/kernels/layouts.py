"""
Copies of a weight in other layouts, kept beside it for the next call.

A cache that is never stale in silence: an entry belongs to one tensor object, and holds while its version counter, its
address and a sample of its values stay the same. A copy is made at the second call in the same state, so weights that
change at every call (training, `functional_call`) have none, and input sizes that do not come back cost nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MAX_LAYOUTS = 4
"""Packed copies kept of one weight: a convolution's best layout depends on its input's size. Others run plain."""

_CALLS_TO_PACK, _CALLS_TO_REPLACE = 2, 8
"""Calls with one input size until a weight is packed for it; and until that copy takes the place of the oldest one."""

_SAMPLE = 16
"""Elements compared at each call, to notice writes through `.data`, which leave the version counter alone."""

# What is asked at every call is kept short: a product of a small layer takes no longer than ten questions.


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed weight, and what a call must bring to use it."""

    weight: Tensor
    dtype: torch.dtype
    bias: tuple[int, ...]
    other: tuple[int, ...]

    def takes(self, x: Tensor, bias: Tensor | None, other: Tensor | None = None) -> bool:
        """Whether oneDNN computes with these; what it would refuse or read beyond is left to the plain operators."""
        if self.weight.numel() == 0 or x.dtype is not self.dtype or not x.is_cpu or not torch._C._get_mkldnn_enabled():
            return False
        if bias is not None and (bias.dtype is not self.dtype or bias.shape != self.bias or not bias.is_cpu):
            return False
        return other is None or (other.shape == self.other and self.adds(other))

    def adds(self, other: Tensor) -> bool:
        """Whether ``other``, of the result's shape, can be added on the way."""
        return other.dtype is self.dtype and other.is_cpu


@dataclass(slots=True)
class _Entry:
    """The packed copies of one weight, and the state of the weight for which they hold."""

    weight: weakref.ref[Tensor]
    version: int
    address: int
    view: Tensor  # some elements of the weight, shared
    sample: Tensor  # the same elements, as they were
    layouts: dict[Any, Packed] = field(default_factory=dict)  # oldest first
    asked: dict[Any, int] = field(default_factory=dict)  # calls without a packed copy

    def holds(self, weight: Tensor) -> bool:
        """Whether this entry is that of `weight`, as it is now."""
        return (
            self.weight() is weight
            and self.version == weight._version
            and self.address == weight.data_ptr()
            and torch.equal(self.view, self.sample)
        )


_cache: dict[int, _Entry] = {}


def find(weight: Tensor, key: Any) -> Packed | None:
    """The packed copy of `weight` under `key`, if there is one and it holds."""
    entry = _cache.get(id(weight))
    return None if entry is None or not entry.holds(weight) else entry.layouts.get(key)


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


def pack_on_repetition(weight: Tensor, key: Any, pack: Callable[[], Packed]) -> None:
    """Count a call that found no packed copy of `weight` under `key`; make one when such calls come back."""
    if not weight.is_contiguous() or weight.is_inference():  # a copy could not be told to be stale
        return
    entry = _cache.get(id(weight))
    if entry is None or not entry.holds(weight):
        entry = _enter(weight)
    full = len(entry.layouts) >= MAX_LAYOUTS
    calls = entry.asked.pop(key, 0) + 1
    if calls < (_CALLS_TO_REPLACE if full else _CALLS_TO_PACK):
        if len(entry.asked) >= 16 * MAX_LAYOUTS:  # sizes without end
            entry.asked.clear()
        entry.asked[key] = calls
        return
    if full:
        entry.layouts.pop(next(iter(entry.layouts)))
    entry.layouts[key] = pack()


def release(weight: Tensor | None = None) -> None:
    """Forget the packed copies of `weight`, or of every weight; they are made again when next needed."""
    if weight is None:
        _cache.clear()
    else:
        _cache.pop(id(weight), None)


def packed_bytes(weight: Tensor | None = None) -> int:
    """The memory in bytes that the packed copies of `weight`, or of every weight, hold now, oneDNN's padding aside."""
    entries = list(_cache.values()) if weight is None else [e for e in [_cache.get(id(weight))] if e is not None]
    held = [packed.weight for entry in entries for packed in entry.layouts.values()]
    return sum(w.numel() * w.element_size() for w in held)
