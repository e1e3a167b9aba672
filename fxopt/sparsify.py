"""A model made sparse by name, from end to end: the table, how far its outputs move, and whether it is faster."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule

from fxopt import frontend
from fxopt.benchmark import benchmark
from fxopt.errors import UsageError
from fxopt.measurement import Comparison
from fxopt.sparse.block_patcher import call
from fxopt.sparse.block_report import SparsifyReport
from fxopt.sparse.measure import SwapReport
from fxopt.store import save
from fxopt.transformations import BlockSparsify, SparsifyWeights, SwapSparse


@dataclass(frozen=True)
class Sparsified:
    """What became of one graph of a model."""

    name: str
    gm: GraphModule  # its history can be undone
    layers: SparsifyReport | SwapReport
    error: float | None  # of the first floating output on the example inputs, relative to the dense one
    comparison: Comparison | None

    @property
    def summary(self) -> str:
        """One line: the whole model's speed and how far its output moved."""
        said = [] if self.error is None else [f"the output differs by {self.error:.1%} from the dense model's"]
        if self.comparison is not None:
            low, high = self.comparison.interval
            best = f"{1 / low:.2f}" if low > 0 else "∞"  # few rounds bound nothing
            speed = f"{1 / self.comparison.ratio:.2f} × as fast [{1 / high:.2f}, {best}]"
            said.insert(0, f"the model is {speed}, {self.comparison.conclusion}")
        return "; ".join(said)

    def __rich__(self) -> Table:
        return self.layers.__rich__()

    def to_json(self) -> dict[str, Any]:
        """All figures as plain values."""
        speed = None if self.comparison is None else self.comparison.to_json()
        return {"graph": self.name, **self.layers.to_json(), "error": self.error, "benchmark": speed}

    def save(self, directory: Path) -> None:
        """Write the graph with its history, for `fxopt.load`, `fxopt log` and `fxopt undo`."""
        save(self.gm, directory)


def patterns_of(names: Sequence[str], densities: Sequence[float], **options: Any) -> dict[str, dict[str, Any]]:
    """The patterns of a command line, with one density for all or one for each."""
    if not names:
        raise UsageError("no layer was named; give --pattern REGEX, once or more")
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UsageError(f"--pattern {twice} was given twice, and a layer goes by one pattern; leave one of them out")
    implied = options.get("select") == "existing" or options.get("block") == "2:4"
    if len(densities) not in (1, len(names)) and not (not densities and implied):
        raise UsageError(f"{len(densities)} densities were given for {len(names)} patterns; give one, or one for each")
    each = list(densities or [None]) * (1 if len(densities) == len(names) else len(names))  # type: ignore[list-item]
    return {name: {"density": density, **options} for name, density in zip(names, each, strict=True)}


def sparsify(
    model: nn.Module,
    given: Mapping[str, Any],
    patterns: Mapping[str, Any],
    guard: str = "auto",
    tokens: Sequence[int] = (128,),
    benchmarked: bool = True,
    rounds: int = 30,
    warmup: int = 3,
) -> list[Sparsified]:
    """Capture ``model``, make what ``patterns`` name block-sparse in each of its graphs, and compare with dense."""
    wanted = BlockSparsify(patterns, None, guard, tuple(tokens))
    found = []
    for name, (gm, inputs) in frontend.graphs(model, given, generation=False).items():
        dense, planned = copy.deepcopy(gm), BlockSparsify(wanted.patterns, inputs, guard, tuple(tokens))
        layers = planned.plan(gm)
        if layers.changed:
            planned.settled(gm)(gm)
        comparison = None
        if benchmarked and layers.changed:
            comparison = benchmark(dense, gm, inputs, rounds=rounds, warmup=warmup)
        found.append(Sparsified(name, gm, layers, _difference(dense, gm, inputs), comparison))
    return found


def sparsify_unstructured(
    model: nn.Module,
    given: Mapping[str, Any],
    sparsity: float,
    names: Sequence[str] = (),
    guard: str = "auto",
    benchmarked: bool = True,
    rounds: int = 30,
    warmup: int = 3,
) -> list[Sparsified]:
    """
    Capture ``model``, make that share of each weight zeros, those of least magnitude, and compute without them.

    ``names``: regular expressions, one of which a layer's whole path matches; all layers by default.  With ``guard``
    "auto" a layer stays dense that is not faster in inference, "off" forces; the zeros are there either way.
    """
    if guard not in ("auto", "off"):
        raise UsageError(f"guard={guard!r} was given; expected 'auto' or 'off'")
    for name in names:
        try:
            re.compile(name)
        except re.error as error:
            raise UsageError(f"--pattern {name} is no regular expression: {error}") from None
    layers = "|".join(f"(?:{name})" for name in names) or ".*"
    prune = SparsifyWeights(sparsity=sparsity, layers=layers)
    swap = SwapSparse(min(sparsity, 0.5), measure=guard == "auto", backward=False, layers=layers)
    found = []
    for name, (gm, inputs) in frontend.graphs(model, given, generation=False).items():
        dense = copy.deepcopy(gm)
        prune(gm)
        if not prune.report(gm).layers:
            raise UsageError(
                f"no linear layer or 2-d convolution matches {' or '.join(names) or 'anything'}; see --pattern"
            )
        settled = swap.settled(gm)
        report = swap.report(gm)
        if report.changed:
            settled(gm)
        comparison = benchmark(dense, gm, inputs, rounds=rounds, warmup=warmup) if benchmarked else None
        found.append(Sparsified(name, gm, report, _difference(dense, gm, inputs), comparison))
    return found


def _difference(dense: GraphModule, sparse: GraphModule, inputs: Any) -> float | None:
    """|sparse - dense| / |dense| of the first floating output."""
    with torch.no_grad():
        a, b = (_first(call(gm, inputs[0] if isinstance(inputs, list) else inputs)) for gm in (dense, sparse))
    if a is None or b is None:
        return None
    norm = float(a.double().norm())
    return float((a.double() - b.double()).norm()) / norm if norm else 0.0


def _first(value: Any) -> Tensor | None:
    leaves = torch.utils._pytree.tree_leaves(value)
    return next((t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()), None)
