"""A call that leaves no trace: the same chance for each, and nothing that it writes stays on the module."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.samples import clone_tensors


def module_of(function: Callable[..., Any]) -> nn.Module | None:
    """
    The module whose tensors a call uses, where that can be known.

    What `fxopt.optimize` returns relies on its tensors being where they are: with copies in their place it would step
    back from its graphs to eager, so it counts as a plain function.
    """
    if isinstance(function, nn.Module):
        return None if "fxopt" in vars(function) else function
    if isinstance(function, functools.partial):
        return module_of(function.func)
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


@contextmanager
def quiet(seed: int, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Seed every source of chance on the CPU and on the devices of `tensors`; afterwards it is as it was."""
    devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
    if torch.cuda.is_available() and torch.cuda.is_initialized() and not devices:
        devices = [torch.cuda.current_device()]
    python, numpy = random.getstate(), sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(arrays)


def _slots(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """Every place that holds a tensor: path, the dictionary, its key, the tensor. Plain attributes included."""
    for prefix, owner in module.named_modules(remove_duplicate=True):
        for held in (owner._parameters, owner._buffers, owner.__dict__):
            for key, value in held.items():
                if isinstance(value, Tensor):
                    yield f"{prefix}.{key}" if prefix else key, held, key, value


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and tensors that are plain attributes, by path."""
    return {path: tensor for path, _, _, tensor in _slots(module)}


def is_plain(tensor: Tensor) -> bool:
    """Not packed, sparse or quantized: a call can write to it, and a copy is as good as itself."""
    return tensor.layout is torch.strided and not tensor.is_quantized


@contextmanager
def own_copies(
    module: nn.Module | None,
    dtype: torch.dtype | None = None,
    parameter: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Put copies of a module's buffers and plain tensors in their place, and yield the copies by path.

    A call may write to them (batch statistics, counters) or hang new tensors on the module (caches): afterwards every
    module holds exactly what it held. The copies come in `dtype`; `parameter` gives what stands in for a parameter.
    """
    if module is None:
        yield {}
        return
    held = [(d, dict(d)) for m in module.modules() for d in (m._parameters, m._buffers, m.__dict__)]
    slots = list(_slots(module))
    written = [tensor for *_, tensor in slots if not isinstance(tensor, nn.Parameter) and is_plain(tensor)]
    copies = clone_tensors(written, dtype)
    try:
        for _, owner, key, tensor in slots:
            if id(tensor) in copies:
                owner[key] = copies[id(tensor)]
            elif parameter is not None:
                owner[key] = parameter(tensor)
        _flatten_recurrent(module)
        yield {path: copies[id(tensor)] for path, _, _, tensor in slots if id(tensor) in copies}
    finally:
        for owner, before in held:
            _restore(owner, before)
        _flatten_recurrent(module)


def _restore(owner: dict[str, Any], before: Mapping[str, Any]) -> None:
    if list(owner) == list(before) and all(owner[key] is value for key, value in before.items()):
        return
    owner.clear()
    owner.update(before)


def _flatten_recurrent(module: nn.Module) -> None:
    """Recurrent layers keep a list of their weights beside the weights."""
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase):
            layer._flat_weights[:] = [getattr(layer, name, None) for name in layer._flat_weights_names]
