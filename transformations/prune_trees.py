"""What a model does not need is taken out of it, one pruning tree after another."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch.fx import GraphModule

from fxopt.delta import graphs
from fxopt.errors import TransformationError, UsageError
from fxopt.pattern import Miss
from fxopt.transformation import ReversibleTransformation
from fxopt.transformations._flow import Flow
from fxopt.transformations._memory import effect
from fxopt.transformations._removal import Ends, check_unequal, cut_groups, find, remove
from fxopt.transformations._stand_ins import Fit, Matching, StandIn, Unequal, stand_in
from fxopt.transformations._trees import Kind, PruningTree, Trees, trees
from fxopt.transformations.make_out_of_place import MakeOutOfPlace

__all__ = ["Fit", "Kind", "Matching", "PruneTrees", "PruningTree", "Trees", "trees"]


@dataclass(frozen=True)
class PruneTrees(ReversibleTransformation):
    """
    x + f(x)  ->  x

    Not exact: removes the trees given (`fxopt.pruning.trees` finds them; trees or their names), with their parameters.
    A region becomes the identity; an operand of a sum, product or concatenation is dropped (the consumer's columns with
    it); an attention loses key/value groups.  A tree with a `Fit` becomes that linear layer, one with a `Matching` the
    channels that it reads.  A layer of unequal dimensions is, by ``unequal``: multiplied into the linear layer after it
    (``fold``, exact), replaced by two thin ones (``low_rank``, of ``rank`` times the rank at which nothing is saved),
    or by channels of its input, matched by weight (``match``; what has no match is cut out of all that has it, where
    that can be done) or by position and zeros (``pad``); ``auto`` is the first of these that can be done.
    Trees inside others that went are gone too.  Writes in place are made out of place first.
    """

    root_only = True  # one call does all the graphs inside

    trees: tuple[str | PruningTree, ...] = ()
    fits: tuple[Any, ...] = ()
    unequal: Unequal = "auto"
    rank: float = 0.5

    def __post_init__(self) -> None:
        given = (self.trees,) if isinstance(self.trees, str | PruningTree) else tuple(self.trees)
        wrong = [t for t in given if not isinstance(t, str | PruningTree)]
        if wrong:
            raise UsageError(f"PruneTrees was given {wrong[0]!r}, expected pruning trees or their names")
        object.__setattr__(self, "trees", tuple(str(t) for t in given))
        object.__setattr__(self, "fits", tuple(map(_plain, self.fits)))
        check_unequal(self.unequal)
        if not 0 < self.rank <= 1:
            raise UsageError(f"rank={self.rank} is no share; give a number above 0, at most 1")

    @property
    def signature(self) -> str:
        """The call, with a hash in place of the numbers of each fitted layer."""
        said = []
        for field in fields(self):
            held = getattr(self, field.name)
            if field.name == "fits" and held:
                digests = [(f[0], hashlib.sha256(str(f[-1]).encode()).hexdigest()[:12]) for f in held]
                said.append(f"fits={tuple(digests)!r}")
            else:
                said.append(f"{field.name}={held!r}")
        return f"PruneTrees({', '.join(said)})"

    def __repr__(self) -> str:
        return self.signature

    def transform(self, graph_module: GraphModule) -> None:
        inner = graphs(graph_module)
        fits = {f.tree: f for f in map(stand_in, self.fits)}
        if strange := fits.keys() - set(map(str, self.trees)):
            raise TransformationError(f"there is a fit for {min(strange)}, which is not among the trees to remove")
        for path, gm in inner.items():
            mine = [t for t in map(str, self.trees) if _graph_of(t, inner) == path]
            if mine:
                _remove_all(gm, path, mine, fits, self.unequal, self.rank)

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The trees of a layer or region that are named but not there."""
        inner = graphs(gm)
        for name in map(str, self.trees):
            path = _graph_of(name, inner)
            ends = find(inner[path], _own_name(name, path))
            if isinstance(ends, str):
                yield Miss(next(iter(inner[path].graph.nodes)), ends)


def _remove_all(
    gm: GraphModule, path: str, names: list[str], fits: dict[str, StandIn], unequal: Unequal, rank: float
) -> None:
    if any(f is not None and f.kind == "write" for f in (effect(gm, n) for n in gm.graph.nodes)):
        MakeOutOfPlace().transform(gm)
    flow = Flow(gm)
    there = {name: find(gm, _own_name(name, path), flow) for name in names}
    for found in there.values():  # all of them have to be there before any goes
        if isinstance(found, str):
            raise TransformationError(f"{found}; print fxopt.pruning.trees(gm) to see what is there")
    known = {name: ends for name, ends in there.items() if isinstance(ends, Ends)}
    parts = {name: ends.part for name, ends in known.items()}
    sizes = {name: _extent(flow, ends) for name, ends in known.items()}
    groups: dict[str, list[int]] = {}
    for ends in known.values():
        if ends.what == "heads":
            groups.setdefault(ends.exit.name, []).append(ends.index)
    cut_groups(gm, groups)
    for name in sorted((n for n in known if "#" not in n), key=lambda n: -sizes[n]):  # outer ones first
        own = _own_name(name, path)
        if not _gone(gm, own):
            remove(gm, own, parts[name], fits.get(name), unequal, rank)


def _extent(flow: Flow, ends: Ends) -> int:
    """How many operations go with a tree."""
    keep = [n for n in ends.exit.all_input_nodes if n.name != ends.part] if ends.keep is None else [ends.keep]
    return len(flow.dying(ends.exit, keep)) if ends.exit in flow.at else 0


def _plain(given: Any) -> tuple[Any, ...]:
    """A stand-in as plain values, or as it was saved."""
    if isinstance(given, Fit | Matching):
        return given.plain()
    return tuple(tuple(x) if isinstance(x, list) else x for x in given)


def _gone(gm: GraphModule, name: str) -> bool:
    """Whether the tree went with another one."""
    there = {n.name for n in gm.graph.nodes}
    return not all(n in there for n in re.split(r"\.\.|:", name)[: 1 + (".." in name)])


def _graph_of(name: str, inner: dict[str, GraphModule]) -> str:
    path = name.rpartition("/")[0]
    if path not in inner:
        raise TransformationError(f"{name}: there is no graph at {path}; expected one of {', '.join(map(repr, inner))}")
    return path


def _own_name(name: str, path: str) -> str:
    return name.removeprefix(f"{path}/") if path else name
