"""New tensors."""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxopt.ops import op, spell
from fxopt.vocabulary import declaring as say

aten = torch.ops.aten


def _sized(arguments: dict[str, Any]) -> None:
    say.device(arguments)
    if isinstance(arguments["size"], int):
        arguments["size"] = (arguments["size"],)


def _always(arguments: Mapping[str, Any]) -> bool:
    return True


# What a factory function may be told without meaning anything.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "layout": (None, torch.strided),
    "pin_memory": (None, False),
    "requires_grad": (False,),
}


_PLAIN_LIKE = {**_PLAIN, "memory_format": (None, torch.preserve_format)}


def _arange(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> say.Said | None:
    """arange(end), arange(start, end), arange(start, end, step); by keyword."""
    names = ["end"] if len(args) == 1 else ["start", "end", "step"]
    if len(args) > len(names):
        return None
    return (), {**dict(zip(names, args, strict=False)), **kwargs}


_FACTORY = "size dtype _ device _"
_LIKE = "input dtype _ device _ _"


@op(
    spell(torch.arange, "start end step dtype device", arrange=_arange, must=_PLAIN),
    spell(aten.arange.default, "end dtype _ device _", must=_PLAIN),
    spell(aten.arange.start, "start end dtype _ device _", must=_PLAIN),
    spell(aten.arange.start_step, "start end step dtype _ device _", must=_PLAIN),
    normalize=say.device,
)
def arange(end, start=0, step=1, *, dtype=None, device=None): ...


@op(
    spell(torch.zeros, variadic="size", must=_PLAIN), spell(aten.zeros.default, _FACTORY, must=_PLAIN), normalize=_sized
)
def zeros(size, *, dtype=None, device=None): ...


@op(spell(torch.ones, variadic="size", must=_PLAIN), spell(aten.ones.default, _FACTORY, must=_PLAIN), normalize=_sized)
def ones(size, *, dtype=None, device=None): ...


@op(
    spell(torch.empty, variadic="size", must=_PLAIN_LIKE | {"memory_format": (None, torch.contiguous_format)}),
    spell(aten.empty.memory_format, f"{_FACTORY} _", must={**_PLAIN, "memory_format": (None, torch.contiguous_format)}),
    normalize=_sized,
)
def empty(size, *, dtype=None, device=None): ...


@op(
    spell(torch.full, must=_PLAIN),
    spell(aten.full.default, "size fill_value dtype _ device _", must=_PLAIN),
    normalize=_sized,
)
def full(size, fill_value, *, dtype=None, device=None): ...


@op(
    spell(torch.zeros_like, must=_PLAIN_LIKE),
    spell(aten.zeros_like.default, _LIKE, must=_PLAIN_LIKE),
    normalize=say.device,
)
def zeros_like(input, *, dtype=None, device=None): ...


@op(
    spell(torch.ones_like, must=_PLAIN_LIKE),
    spell(aten.ones_like.default, _LIKE, must=_PLAIN_LIKE),
    normalize=say.device,
)
def ones_like(input, *, dtype=None, device=None): ...


@op(
    spell(torch.empty_like, must=_PLAIN_LIKE),
    spell(aten.empty_like.default, _LIKE, must=_PLAIN_LIKE),
    normalize=say.device,
)
def empty_like(input, *, dtype=None, device=None): ...


@op(
    spell(torch.full_like, must=_PLAIN_LIKE),
    spell(aten.full_like.default, "input fill_value dtype _ device _ _", must=_PLAIN_LIKE),
    normalize=say.device,
)
def full_like(input, fill_value, *, dtype=None, device=None): ...


@op(
    spell("new_zeros", must=_PLAIN),
    spell(aten.new_zeros.default, f"input {_FACTORY}", must=_PLAIN),
    normalize=_sized,
)
def new_zeros(input, size, *, dtype=None, device=None): ...


@op(
    spell("new_ones", must=_PLAIN),
    spell(aten.new_ones.default, f"input {_FACTORY}", must=_PLAIN),
    normalize=_sized,
)
def new_ones(input, size, *, dtype=None, device=None): ...


@op(
    spell("new_full", must=_PLAIN, variadic=""),
    spell(aten.new_full.default, "input size fill_value dtype _ device _", must=_PLAIN),
    normalize=_sized,
)
def new_full(input, size, fill_value, *, dtype=None, device=None): ...


@op(
    spell(torch.rand, variadic="size", must=_PLAIN),
    spell(aten.rand.default, _FACTORY, must=_PLAIN),
    random=_always,
    normalize=_sized,
)
def rand(size, *, dtype=None, device=None): ...


@op(
    spell(torch.randn, variadic="size", must=_PLAIN),
    spell(aten.randn.default, _FACTORY, must=_PLAIN),
    random=_always,
    normalize=_sized,
)
def randn(size, *, dtype=None, device=None): ...


@op(
    spell(torch.rand_like, must=_PLAIN_LIKE),
    spell(aten.rand_like.default, _LIKE, must=_PLAIN_LIKE),
    random=_always,
    normalize=say.device,
)
def rand_like(input, *, dtype=None, device=None): ...


@op(
    spell(torch.randn_like, must=_PLAIN_LIKE),
    spell(aten.randn_like.default, _LIKE, must=_PLAIN_LIKE),
    random=_always,
    normalize=say.device,
)
def randn_like(input, *, dtype=None, device=None): ...
