"""Dtypes, devices and memory."""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fxopt.ops import op, spell
from fxopt.vocabulary import declaring as say

aten = torch.ops.aten


def _to(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> say.Said | None:
    """x.to(dtype), x.to(device), x.to(device, dtype), each with what may follow it; by keyword."""
    names = ["device", "dtype", "non_blocking", "copy"]
    if len(args) > 1 and (isinstance(args[1], torch.dtype) or _asks(args[1], "dtype")):
        names.remove("device")
    elif len(args) > 1 and not (isinstance(args[1], torch.device | str | int) or _asks(args[1], "device")):
        return None
    if "other" in kwargs or len(args) > len(names) + 1:
        return None
    return args[:1], {**dict(zip(names, args[1:], strict=False)), **kwargs}


def _typed(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> say.Said | None:
    """x.type(torch.int32), not x.type()."""
    dtype = args[1] if len(args) == 2 else kwargs.get("dtype")
    return (args[:1], {"dtype": dtype}) if isinstance(dtype, torch.dtype) and len(args) + len(kwargs) == 2 else None


def _moved(arguments: dict[str, Any]) -> None:
    say.device(arguments)
    _preserving(arguments)


def _preserving(arguments: dict[str, Any]) -> None:
    if arguments["memory_format"] is torch.preserve_format:
        arguments["memory_format"] = None


def _to_other(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> say.Said | None:
    """x.to(y)."""
    other = args[1] if len(args) > 1 else kwargs.get("other")
    asked = _asks(other, "dtype") or _asks(other, "device")
    return (args, kwargs) if isinstance(other, Node) and not asked else None


def _asks(value: Any, name: str) -> bool:
    """Whether ``value`` is y.dtype or y.device of another tensor."""
    return isinstance(value, Node) and value.target is getattr and value.args[1:] == (name,)


_TO_MUST = {"layout": (None, torch.strided), "pin_memory": (None, False)}


@op(
    spell("to", "input dtype device non_blocking copy memory_format", arrange=_to),
    spell(aten.to.dtype, "input dtype non_blocking copy memory_format"),
    spell(aten.to.device, "input device dtype non_blocking copy memory_format"),
    spell(aten.to.dtype_layout, "input dtype _ device _ non_blocking copy memory_format", must=_TO_MUST),
    spell("type", "input dtype", arrange=_typed),
    spell("float", "input", dtype=torch.float32),
    spell("double", "input", dtype=torch.float64),
    spell("half", "input", dtype=torch.float16),
    spell("bfloat16", "input", dtype=torch.bfloat16),
    spell("int", "input", dtype=torch.int32),
    spell("long", "input", dtype=torch.int64),
    spell("bool", "input", dtype=torch.bool),
    view=True,
    normalize=_moved,
)
def to(input, *, dtype=None, device=None, non_blocking=False, copy=False, memory_format=None): ...


@op(spell("to", "input other non_blocking copy memory_format", arrange=_to_other), aten.to.other, view=True)
def to_other(input, other, non_blocking=False, copy=False, *, memory_format=None): ...


@op("type_as", aten.type_as.default, view=True)
def type_as(input, other): ...


@op(
    spell("contiguous"),
    spell(aten.contiguous.default, translate={"memory_format": (0, torch.contiguous_format)}),
    view=True,
)
def contiguous(input, *, memory_format=torch.contiguous_format): ...


@op(torch.clone, "clone", aten.clone.default, normalize=_preserving)
def clone(input, *, memory_format=None): ...


@op(torch.detach, "detach", aten.detach.default, inplace=(torch.detach_, "detach_", aten.detach_.default), view=True)
def detach(input): ...


@op(aten.lift_fresh_copy.default)
def lift_fresh_copy(input): ...


@op(nn.Identity, aten.alias.default, view=True)
def identity(input): ...


@op("copy_", inplace=(aten.copy_.default,))
def copy(input, src, non_blocking=False): ...


@op(aten.fill.Scalar, aten.fill.Tensor, inplace=("fill_", aten.fill_.Scalar, aten.fill_.Tensor))
def fill(input, value): ...


@op(spell(aten._assert_tensor_metadata.default, "input size stride dtype device layout"), effect=True)
def assert_tensor_metadata(input, size=None, stride=None, dtype=None, *, device=None, layout=None): ...
