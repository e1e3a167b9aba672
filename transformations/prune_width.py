"""Heads, hidden units, channels and the residual width that a model does not need are cut out of its weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule

from fxopt.delta import graphs
from fxopt.errors import TransformationError, UsageError
from fxopt.pattern import Miss
from fxopt.transformation import ReversibleTransformation
from fxopt.transformations._axes import Axes, AxisClass, index_map
from fxopt.transformations._cut import cut
from fxopt.transformations._memory import effect
from fxopt.transformations._trees import out_of_place
from fxopt.transformations.make_out_of_place import MakeOutOfPlace

KINDS = ("heads", "head_dim", "features", "channels", "width", "experts")

__all__ = ["AxisClass", "PruneWidth", "axes", "choose", "magnitude"]


@dataclass(frozen=True)
class PruneWidth(ReversibleTransformation):
    """
    W2 f(W1 x)  ->  W2[:, kept] f(W1[kept] x)

    Not exact: cuts units out of axes that can only be cut together, which it finds by following every axis through
    every operation.  ``ratio`` of the units go, in each class (``scope="layer"``) or, of all parameters, where they
    count least (``"global"``), and the number kept is rounded up to a multiple of ``round_to``.  What goes is what has
    the least norm; or exactly ``drop``, (class, units) pairs, where that is given.  ``kinds``: heads (with key/value
    groups), head_dim, features, channels, width (the residual stream), experts (a token goes to the best of
    those that stay).  An operation without a rule blocks its axes.
    """

    ratio: float = 0.5
    kinds: tuple[str, ...] = ("heads", "features", "channels")
    scope: Literal["layer", "global"] = "layer"
    round_to: int = 1
    drop: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        given = self.drop.items() if isinstance(self.drop, Mapping) else self.drop
        object.__setattr__(self, "drop", tuple((str(n), tuple(int(i) for i in units)) for n, units in given))
        object.__setattr__(self, "kinds", (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds))
        if not 0 <= self.ratio < 1:
            raise UsageError(f"ratio={self.ratio} is no share of the units; give a number from 0 to below 1")
        if self.round_to < 1:
            raise UsageError(f"round_to={self.round_to} is no multiple to round to; give at least 1")
        if wrong := [k for k in self.kinds if k not in KINDS]:
            raise UsageError(f"kind {wrong[0]!r} is not known; give some of {', '.join(KINDS)}")
        if self.scope not in ("layer", "global"):
            raise UsageError(f"scope={self.scope!r} is not known; give 'layer' or 'global'")

    def transform(self, graph_module: GraphModule) -> None:
        if not self.drop and self.ratio == 0:
            return
        found_effects = (effect(graph_module, n) for n in graph_module.graph.nodes)
        if any(f is not None and f.kind == "write" for f in found_effects):
            MakeOutOfPlace().transform(graph_module)
        found = Axes(graph_module)
        classes = {c.id: c for c in found.classes()}
        if self.drop:
            going = _given(self.drop, classes)
        else:
            wanted = [c for c in classes.values() if c.kind in self.kinds]
            scores = {c.id: magnitude(found, c) for c in wanted}
            going = choose(wanted, scores, self.ratio, self.scope, self.round_to)
        if going:
            cut(graph_module, found, [(classes[n].leaf, units) for n, units in going.items()])

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The nodes whose operation has no rule, so that their axes stay."""
        for inner in graphs(gm).values():
            by = {n.name: n for n in inner.graph.nodes}
            for name, what in Axes(inner).unknown.items():
                if by[name].all_input_nodes and by[name].users:
                    yield Miss(by[name], f"{what} has no rule for axes, so none that it reads or writes is cut")


def axes(gm: GraphModule) -> list[AxisClass]:
    """
    The classes of axes of ``gm`` that can only be cut together, in graph order.

    Found from the graph alone; ``gm`` is left as it is.  `PruneWidth` cuts units out of them.
    """
    if not isinstance(gm, GraphModule):
        raise UsageError(
            f"axes was given a {type(gm).__name__}, expected a torch.fx.GraphModule; capture the model first"
        )
    return Axes(out_of_place(gm)).classes()


def _given(drop: Sequence[tuple[str, tuple[int, ...]]], classes: Mapping[str, AxisClass]) -> dict[str, tuple[int, ...]]:
    for name, units in drop:
        if name not in classes:
            close = difflib.get_close_matches(name, classes, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise TransformationError(f"no class of axes is called {name!r}; {hint}see fxopt.pruning.axes(gm)")
        size = classes[name].size
        least = classes[name].least
        if any(not 0 <= u < size for u in units) or size - len(set(units)) < least:
            raise TransformationError(f"{name} has {size} units, and {units} were to go; keep at least {least} of them")
    return dict(drop)


def magnitude(found: Axes, axis: AxisClass) -> torch.Tensor:
    """The norm of what each unit has in all parameters, over its mean: (units,) float64."""
    total = torch.zeros(axis.size, dtype=torch.float64)
    for path, dims, tensor in found.parameters.values():
        for number, dim in enumerate(dims):
            if (path, number) not in axis.members or not isinstance(tensor, nn.Parameter):
                continue
            index = index_map(dim, axis.leaf)
            assert index is not None
            others = [i for i in range(tensor.dim()) if i != number]
            squares = tensor.detach().double().square()
            squares = (squares.sum(others) if others else squares).cpu()
            total.index_add_(0, index[index >= 0], squares[index >= 0])
    norm = total.sqrt()
    return norm / norm.mean().clamp(min=1e-30)


def choose(
    classes: Sequence[AxisClass],
    scores: Mapping[str, torch.Tensor],
    ratio: float,
    scope: str = "layer",
    round_to: int = 1,
) -> dict[str, tuple[int, ...]]:
    """The units of each class that go: those with the lowest scores; of equal ones, the later."""
    if scope == "layer":
        count = {c.id: c.size - _rounded(c.size - int(c.size * ratio), round_to, c) for c in classes}
    else:
        count = _shared_out(classes, scores, ratio, round_to)
    going = {}
    for c in classes:
        order = sorted(range(c.size), key=lambda u, s=scores[c.id]: (float(s[u]), -u))  # type: ignore[misc]
        if count[c.id]:
            going[c.id] = tuple(sorted(order[: count[c.id]]))
    return going


def _rounded(kept: int, round_to: int, axis: AxisClass) -> int:
    return min(axis.size, -(-max(kept, axis.least) // round_to) * round_to)


def _shared_out(
    classes: Sequence[AxisClass], scores: Mapping[str, torch.Tensor], ratio: float, round_to: int
) -> dict[str, int]:
    """How many units go in each class if the least of all go until ``ratio`` of the parameters in units has gone."""
    units: list[tuple[float, str]] = sorted((float(s), c.id) for c in classes for s in scores[c.id])
    by: dict[str, Any] = {c.id: c for c in classes}
    left = ratio * sum(c.size * c.unit_elements for c in classes)
    count = dict.fromkeys(by, 0)
    for _, name in units:
        if left <= 0:
            break
        if count[name] < by[name].size - by[name].least:
            count[name] += 1
            left -= by[name].unit_elements
    return {n: by[n].size - _rounded(by[n].size - gone, round_to, by[n]) for n, gone in count.items()}
