"""The dense weight of a layer that holds a part of it: computed where something reads its elements, and not before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fxopt.errors import UsageError


class ComputedWeight(Tensor):
    """
    A weight that knows its shape, dtype and device; every function of its elements computes it anew, differentiably.

    Models ask `layer.weight.dtype` in each call (transformers' T5, of the layer `wo`): that has to cost nothing. What
    would write to the weight raises `UsageError`, for the write would be lost.
    """

    compute: Callable[[], Tensor]
    detached: bool

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor], shape: tuple[int, int], like: Tensor) -> ComputedWeight:
        made: ComputedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made.compute, made.detached = compute, False
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.requires_grad_ and args[0].detached:  # a leaf of its own, of the same values
            return func(args[0].compute(), *args[1:], **kwargs)
        if _writes(func, args, kwargs):
            raise UsageError(f"{_name(func)} would write to a weight that is computed; assign layer.weight = … instead")
        if func in _DETACHED:  # still no tensor that could be written to in vain
            weight = args[0]
            apart = cls(lambda: weight.compute().detach(), tuple(weight.shape), weight)
            apart.detached = True
            return apart
        return func(*tree_map_only(cls, _compute, args), **tree_map_only(cls, _compute, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # below autograd, where it is too late for gradients
        raise UsageError(f"{func} was called on layer.weight without torch functions; call layer.dense() first")


def _compute(weight: ComputedWeight) -> Tensor:
    return weight.compute()


_KNOWN = {
    getattr(Tensor, name).__get__
    for name in ("dtype", "shape", "device", "layout", "ndim", "is_cuda", "is_cpu", "is_meta", "is_sparse", "itemsize")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.__len__}

_DETACHED = (Tensor.data.__get__, Tensor.detach)  # type: ignore[attr-defined]

_NO_WRITES = {"__invert__", "__index__", "__int__"}  # the others of this form are assignments, such as __iadd__


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _writes(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the function writes to a computed weight: in place, to an attribute, or as `out`."""
    name = _name(func)
    inside = name.startswith("__i") and name not in _NO_WRITES
    if inside or name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__")):
        target = args[0] if args else next(iter(kwargs.values()))
    else:
        target = kwargs.get("out")
    return any(isinstance(t, ComputedWeight) for t in (target if isinstance(target, tuple | list) else (target,)))
