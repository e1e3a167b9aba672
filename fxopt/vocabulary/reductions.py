"""Reductions."""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

from typing import Any

import torch

from fxopt.ops import op, spell

aten = torch.ops.aten


def _dims(arguments: dict[str, Any]) -> None:
    """dim=-1 and dim=(-1,) are one thing."""
    if isinstance(arguments["dim"], int):
        arguments["dim"] = (arguments["dim"],)


@op(
    torch.sum,
    "sum",
    spell(aten.sum.default, "input dtype"),
    aten.sum.dim_IntList,
    normalize=_dims,
)
def sum(input, dim=None, keepdim=False, *, dtype=None): ...


@op(
    torch.mean,
    "mean",
    spell(aten.mean.default, "input dtype"),
    aten.mean.dim,
    normalize=_dims,
)
def mean(input, dim=None, keepdim=False, *, dtype=None): ...


@op(torch.amax, "amax", aten.amax.default, normalize=_dims)
def amax(input, dim=(), keepdim=False): ...


@op(torch.amin, "amin", aten.amin.default, normalize=_dims)
def amin(input, dim=(), keepdim=False): ...


@op(
    torch.any,
    "any",
    spell(aten.any.default, "input"),
    aten.any.dims,
    aten.any.dim,
    normalize=_dims,
)
def any(input, dim=None, keepdim=False): ...


@op(
    torch.all,
    "all",
    spell(aten.all.default, "input"),
    aten.all.dims,
    aten.all.dim,
    normalize=_dims,
)
def all(input, dim=None, keepdim=False): ...


@op(torch.argmax, "argmax", aten.argmax.default)
def argmax(input, dim=None, keepdim=False): ...


@op(torch.argmin, "argmin", aten.argmin.default)
def argmin(input, dim=None, keepdim=False): ...


@op(torch.cumsum, "cumsum", aten.cumsum.default)
def cumsum(input, dim, *, dtype=None): ...


@op(torch.topk, "topk", aten.topk.default)
def topk(input, k, dim=-1, largest=True, sorted=True): ...


@op(
    spell(torch.sort, "input dim descending"),
    spell("sort", "input dim descending"),
    spell(aten.sort.default, "input dim descending"),
    spell(aten.sort.stable, "input stable dim descending", translate={"stable": (None, False)}),
)
def sort(input, dim=-1, descending=False, *, stable=False): ...


@op(torch.histc, "histc", aten.histc.default)
def histc(input, bins=100, min=0, max=0): ...
