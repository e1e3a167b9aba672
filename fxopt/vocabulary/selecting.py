"""Selecting and joining."""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

import operator
from typing import Any

import torch

from fxopt.ops import op, spell
from fxopt.vocabulary import declaring as say

aten = torch.ops.aten


def _slice_bounds(arguments: dict[str, Any]) -> None:
    """From the beginning is from 0; to the largest integer, as export says, is to the end."""
    if arguments["start"] is None:
        arguments["start"] = 0
    if isinstance(arguments["end"], int) and arguments["end"] >= 2**63 - 1:
        arguments["end"] = None


@op(operator.getitem, view=True)
def getitem(input, index): ...


@op(torch.select, "select", aten.select.int, view=True)
def select(input, dim, index): ...


@op(aten.slice.Tensor, view=True, normalize=_slice_bounds)
def slice(input, dim=0, start=0, end=None, step=1): ...


@op(torch.narrow, "narrow", aten.narrow.default, view=True)
def narrow(input, dim, start, length): ...


@op(aten.index.Tensor)
def index(input, indices): ...


@op(torch.index_select, "index_select", aten.index_select.default)
def index_select(input, dim, index): ...


@op(
    torch.index_put,
    "index_put",
    aten.index_put.default,
    inplace=("index_put_", aten.index_put_.default),
)
def index_put(input, indices, values, accumulate=False): ...


@op(torch.index_add, "index_add", aten.index_add.default, inplace=("index_add_", aten.index_add_.default))
def index_add(input, dim, index, source, *, alpha=1): ...


@op(torch.gather, "gather", aten.gather.default)
def gather(input, dim, index, *, sparse_grad=False): ...


@op(
    torch.scatter_add,
    "scatter_add",
    aten.scatter_add.default,
    inplace=("scatter_add_", aten.scatter_add_.default),
)
def scatter_add(input, dim, index, src): ...


@op(torch.cat, torch.concat, torch.concatenate, aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(tensors, dim=0): ...


@op(torch.stack, aten.stack.default)
def stack(tensors, dim=0): ...


@op(
    spell(torch.split, "input split_size dim"),
    "split",
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    view=True,
)
def split(input, split_size, dim=0): ...


@op(torch.chunk, "chunk", aten.chunk.default, view=True)
def chunk(input, chunks, dim=0): ...


@op(torch.unbind, "unbind", aten.unbind.int, view=True)
def unbind(input, dim=0): ...


@op(torch.flip, "flip", aten.flip.default)
def flip(input, dims): ...


@op(torch.roll, spell("roll", variadic=""), aten.roll.default, normalize=say.pairs("shifts", "dims", n=1))
def roll(input, shifts, dims=()): ...
