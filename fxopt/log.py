"""The commits of a graph module, where they are kept, and how they follow copies and pickles of it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxopt.delta import Delta, diff, keep_name, plain_meta
from fxopt.errors import TransformationError
from fxopt.forward import quicken
from fxopt.snapshot import Record, Slot, Snapshot, by_name, by_node, fresh, graphs, snapshot
from fxopt.split import Part, joined, split, whole
from fxopt.watch import name_alike

_KEY = "fxopt.history"
_WORK = "fxopt.work"


class Recordable(Protocol):
    """What the history needs to know of a transformation."""

    replayable: bool

    @property
    def signature(self) -> str: ...

    def transform(self, graph_module: GraphModule) -> Any: ...

    def carry(self, gm: GraphModule, rewrite: Delta) -> Mapping[str, torch.Tensor] | None: ...


def label(transformation: Recordable) -> str:
    """The signature with only the options that differ from their defaults."""
    if not dataclasses.is_dataclass(transformation):
        return transformation.signature.removesuffix("()")
    options = ((f, getattr(transformation, f.name)) for f in dataclasses.fields(transformation))
    said = [f"{f.name}={value!r}" for f, value in options if value != f.default]
    return type(transformation).__name__ + (f"({', '.join(said)})" if said else "")


@dataclass(frozen=True)
class Commit:
    """
    One transformation and what it changed.

    ``undone``: the ids of the rewrites taken back one by one.  ``foreign``: what was edited outside of fxopt between
    the commit before and this one.
    """

    transformation: Recordable
    delta: Delta
    undone: frozenset[str] = frozenset()
    foreign: tuple[Delta, ...] = ()

    @property
    def signature(self) -> str:
        return self.transformation.signature

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        return split(self.delta)

    def active(self) -> Delta:
        """What of the delta stands."""
        if not self.undone:
            return self.delta
        return whole(joined([p.delta for p in self.parts if p.id not in self.undone], self.delta), self.delta)

    def deltas(self) -> tuple[Delta, ...]:
        """All the deltas that are kept."""
        return (*self.foreign, self.delta)

    def __deepcopy__(self, memo: dict[int, Any]) -> Commit:
        """The transformation is a value, and shared."""
        return dataclasses.replace(
            self, delta=copy.deepcopy(self.delta, memo), foreign=copy.deepcopy(self.foreign, memo)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        transformation = self.transformation
        try:
            pickle.dumps(transformation)
        except (pickle.PicklingError, AttributeError, TypeError):  # of a class in a function or a notebook, say
            transformation = Unpickled(self.signature)
        return Commit, (transformation, self.delta, self.undone, self.foreign)


@dataclass(frozen=True)
class Unpickled:
    """Stands for a transformation that could not be pickled: its commit can be undone, but not made again."""

    signature: str
    replayable = False

    def transform(self, graph_module: GraphModule) -> Any:
        """Refuse: what it did is not known any more."""
        raise TransformationError(f"{self.signature} could not be pickled and cannot be made again; apply it yourself")

    def carry(self, gm: GraphModule, rewrite: Delta) -> Mapping[str, torch.Tensor] | None:
        """No edit can be carried back."""
        return None


@dataclass(frozen=True)
class Work:
    """What was edited since the last commit: before ``last`` was taken, and since."""

    pending: tuple[Delta, ...] = ()
    last: Snapshot | None = None

    def deltas(self) -> tuple[Delta, ...]:
        """All the deltas that are kept."""
        return self.pending

    def __deepcopy__(self, memo: dict[int, Any]) -> Work:
        return Work(copy.deepcopy(self.pending, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Work, (self.pending,)


def commits(gm: GraphModule) -> tuple[Commit, ...]:
    """The commits of ``gm``, oldest first."""
    found: tuple[Commit, ...] = gm.meta.get(_KEY, ())
    return found


def foreign(gm: GraphModule, now: Snapshot) -> tuple[Delta, ...]:
    """What was edited outside of fxopt since the last commit."""
    work = gm.meta.get(_WORK, Work())
    if work.last is None:
        return tuple(work.pending)
    since = diff(work.last, now)
    return (*work.pending, since) if since or since.used else tuple(work.pending)


def store(gm: GraphModule, found: tuple[Commit, ...], last: Snapshot, pending: tuple[Delta, ...] = ()) -> None:
    """Keep ``found`` as the history of ``gm``, which is as ``last`` says, ``pending`` in it since the last commit."""
    gm.meta[_KEY] = found
    gm.meta[_WORK] = Work(pending, last)


def repoint(gm: GraphModule, old: torch.Tensor, new: torch.Tensor) -> None:
    """
    Let the history of ``gm`` say of ``new``, with which an edit was carried back, what it says of ``old``.

    An earlier commit that made ``old`` has made ``new`` then, edited since: undoing it is asked the same question.
    """

    def seen(slot: Slot | None) -> Slot | None:
        return slot.of_copy(new, True) if slot is not None and slot.value is old else slot

    def moved(delta: Delta) -> Delta:
        pairs = {p: (seen(a), seen(b)) for p, (a, b) in delta.slots.items()}
        if all(pair[i] is delta.slots[p][i] for p, pair in pairs.items() for i in (0, 1)):
            return delta
        return dataclasses.replace(delta, slots=pairs)

    def told(commit: Commit) -> Commit:
        delta, foreign = moved(commit.delta), tuple(map(moved, commit.foreign))
        same = all(map(operator.is_, (delta, *foreign), (commit.delta, *commit.foreign)))
        return commit if same else dataclasses.replace(commit, delta=delta, foreign=foreign)

    gm.meta[_KEY] = tuple(map(told, commits(gm)))


def kept(gm: GraphModule) -> tuple[tuple[Commit, ...], Work]:
    """The history and the state of work, to be put back by `put_back`."""
    return commits(gm), gm.meta.get(_WORK, Work())


def put_back(gm: GraphModule, known: tuple[tuple[Commit, ...], Work]) -> None:
    """Put back what `kept` gave."""
    for key, value in zip((_KEY, _WORK), known, strict=True):
        if value == () or value == Work():
            gm.meta.pop(key, None)
        else:
            gm.meta[key] = value


# --- copies and pickles --------------------------------------------------------------------------------------------


_MADE_ANEW = frozenset(("_graph", "_code", "_lineno_map", "_prologue_start"))


def install(gm: GraphModule) -> None:
    """
    Let copies and pickles of ``gm`` be exact, and its calls direct (`fxopt.forward`).

    GraphModule's own ``__deepcopy__`` forgets parameters that no node reads, which buffers persist, and the names that
    were handed out; its pickling traces the generated code again, under other names.  Every graph module has a class
    of its own (torch installs ``forward`` there), so this concerns no other.
    """
    for inner in graphs(gm).values():
        kind = type(inner)
        if kind.__qualname__.endswith("GraphModuleImpl") and "__deepcopy__" not in vars(kind):
            kind.__deepcopy__ = _deepcopy  # type: ignore[method-assign, assignment]
            kind.__reduce__ = _reduce  # type: ignore[method-assign, assignment]
            kind.recompile = _recompile  # type: ignore[method-assign, assignment]
            quicken(inner)


def _recompile(gm: GraphModule) -> Any:
    code = super(type(gm), gm).recompile()  # type: ignore[misc]
    quicken(gm)
    return code


def _deepcopy(gm: GraphModule, memo: dict[int, Any]) -> GraphModule:
    twin: GraphModule = super(type(gm), gm).__deepcopy__(memo)  # type: ignore[misc]
    for name, value in gm.__dict__.items():
        if name not in _MADE_ANEW:
            twin.__dict__[name] = copy.deepcopy(value, memo)
    _own_metas(twin)
    name_alike(gm, twin)
    keep_name(gm, twin)
    if commits(gm) or _WORK in gm.meta:
        pending = copy.deepcopy(foreign(gm, snapshot(gm)), memo)
        store(twin, commits(twin), snapshot(twin), pending)
    install(twin)
    return twin


def _own_metas(twin: GraphModule) -> None:
    """Give the nodes of a copy lists and dictionaries of their own in ``meta``, where torch's copy shares them."""
    own: dict[int, tuple[Any, Any]] = {}  # one that stands at several nodes is one in the copy too
    for node in twin.graph.nodes:
        for key, held in node.meta.items():
            if (copied := own.setdefault(id(held), (held, fresh(held)))[1]) is not held:
                node.meta[key] = copied


@dataclass(frozen=True)
class _Plain:
    """A graph as plain values."""

    nodes: tuple[tuple[str, Record, dict[str, Any]], ...]
    users: tuple[tuple[str, ...], ...]
    used: frozenset[str]
    counts: dict[str, int]
    codegen: Any

    @staticmethod
    def of(graph: Graph) -> _Plain:
        names = {n: n.name for n in graph.nodes}
        nodes = []
        for n in graph.nodes:
            record = Record(n.op, n.target, by_name(n._args, names), by_name(n._kwargs, names), n.type)
            nodes.append((n.name, record, plain_meta(n.meta)))
        space = graph._graph_namespace
        users = tuple(tuple(names[u] for u in n.users) for n in graph.nodes)
        return _Plain(tuple(nodes), users, frozenset(space._used_names), dict(space._base_count), graph._codegen)

    def graph(self) -> Graph:
        graph = Graph()
        nodes: dict[str, Node] = {}
        space = graph._graph_namespace
        for name, record, meta in self.nodes:
            node = graph.create_node(
                record.op, record.target, by_node(record.args, nodes), by_node(record.kwargs, nodes)
            )
            node.type, node.name = record.type, name
            node.meta.update(meta)
            nodes[name] = node
            space._obj_to_name[node] = name
        space._used_names, space._base_count = set(self.used), dict(self.counts)
        for node, users in zip(nodes.values(), self.users, strict=True):
            node.users.clear()
            node.users.update({nodes[u]: None for u in users})
        graph._codegen = self.codegen
        return graph


def _reduce(gm: GraphModule) -> tuple[Any, ...]:
    body = {k: v for k, v in gm.__dict__.items() if k not in _MADE_ANEW}
    if commits(gm) or _WORK in gm.meta:
        body["meta"] = gm.meta | {_WORK: Work(foreign(gm, snapshot(gm)))}
    kind = next(c for c in type(gm).__mro__ if not c.__qualname__.endswith("GraphModuleImpl"))
    return _rebuild, (kind, body, _Plain.of(gm.graph))


def _rebuild(kind: type[GraphModule], body: dict[str, Any], plain: _Plain) -> GraphModule:
    gm: GraphModule = kind.__new__(kind)
    GraphModule.__init__(gm, nn.Module(), Graph())
    gm.__dict__.update(body)
    gm.graph = plain.graph()
    if _WORK in gm.meta:
        store(gm, commits(gm), snapshot(gm), gm.meta[_WORK].pending)
    install(gm)
    return gm
