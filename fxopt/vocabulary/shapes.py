"""Shapes."""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxopt.ops import op, spell
from fxopt.vocabulary import declaring as say

aten = torch.ops.aten


def _no_dtype(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> say.Said | None:
    """x.view(2, 3), not x.view(torch.int32)."""
    said = [*args[1:], *kwargs.values()]
    return None if builtins.any(isinstance(v, torch.dtype | str) for v in said) else (args, kwargs)


@op(spell("view", arrange=_no_dtype), aten.view.default, view=True)
def view(input, size): ...


@op(torch.reshape, "reshape", aten.reshape.default, aten._unsafe_view.default, view=True)
def reshape(input, shape): ...


@op(nn.Flatten, torch.flatten, "flatten", aten.flatten.using_ints, view=True)
def flatten(input, start_dim=0, end_dim=-1): ...


@op(
    spell(nn.Unflatten, attributes=lambda m: {"dim": m.dim, "sizes": m.unflattened_size}),
    torch.unflatten,
    "unflatten",
    aten.unflatten.int,
    view=True,
)
def unflatten(input, dim, sizes): ...


@op(torch.squeeze, "squeeze", spell(aten.squeeze.default, "input"), aten.squeeze.dims, aten.squeeze.dim, view=True)
def squeeze(input, dim=None): ...


@op(torch.unsqueeze, "unsqueeze", aten.unsqueeze.default, view=True)
def unsqueeze(input, dim): ...


@op(
    torch.transpose,
    torch.swapaxes,
    torch.swapdims,
    "transpose",
    "swapaxes",
    "swapdims",
    aten.transpose.int,
    aten.swapaxes.default,
    aten.swapdims.default,
    view=True,
)
def transpose(input, dim0, dim1): ...


@op(torch.t, "t", aten.t.default, view=True)
def t(input): ...


@op(torch.permute, "permute", aten.permute.default, view=True)
def permute(input, dims): ...


@op(
    torch.movedim,
    torch.moveaxis,
    "movedim",
    "moveaxis",
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
    view=True,
)
def movedim(input, source, destination): ...


@op(
    torch.broadcast_to,
    "expand",
    "broadcast_to",
    spell(aten.expand.default, "input size _"),
    aten.broadcast_to.default,
    view=True,
)
def expand(input, size): ...


@op("expand_as", aten.expand_as.default, view=True)
def expand_as(input, other): ...


@op("repeat", aten.repeat.default)
def repeat(input, repeats): ...


@op(
    torch.repeat_interleave,
    spell("repeat_interleave", variadic=""),
    aten.repeat_interleave.self_int,
    aten.repeat_interleave.self_Tensor,
)
def repeat_interleave(input, repeats, dim=None, *, output_size=None): ...


@op(spell("size", "input dim"), aten.sym_size.int)
def size(input, dim=None): ...


@op(torch.numel, "numel", "nelement", aten.sym_numel.default)
def numel(input): ...


@op(builtins.getattr, view=True)
def attribute(input, name): ...
