"""Patterns over the vocabulary: terms that a node matches, or a reason why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxopt import ops


@dataclass(frozen=True)
class Miss:
    """Why a node does not match."""

    node: Node
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


@dataclass
class Match:
    """
    Where a pattern matched: the nodes it covers, root first, and what its variables stand for.

    ``shared`` are nodes that it reads as part of the pattern, and that go with it only if nothing else uses them.
    """

    root: Node
    dialect: ops.Dialect = "function"
    nodes: list[Node] = field(default_factory=list)
    bindings: dict[str, Any] = field(default_factory=dict)
    shared: list[Node] = field(default_factory=list)

    def trial(self) -> Match:
        """A copy to go on with, which may fail."""
        return Match(self.root, self.dialect, list(self.nodes), dict(self.bindings), list(self.shared))

    def keep(self, trial: Match) -> None:
        """Go on where ``trial`` came to."""
        self.dialect, self.nodes, self.bindings, self.shared = trial.dialect, trial.nodes, trial.bindings, trial.shared


@dataclass(frozen=True)
class Var:
    """Matches one value and binds it."""

    name: str

    def accepts(self, value: Any) -> bool:
        return True


class Tensor(Var):
    """Matches a tensor: a node, or a parameter of a module."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, Node | ops.Attr)


class OptionalTensor(Tensor):
    """Matches a tensor or its absence."""

    def accepts(self, value: Any) -> bool:
        return value is None or super().accepts(value)


class Constant(Tensor):
    """Matches a parameter or buffer of the graph module."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, ops.Attr) or (isinstance(value, Node) and value.op == "get_attr")


class OptionalConstant(Constant):
    """Matches a parameter or buffer of the graph module, or its absence."""

    def accepts(self, value: Any) -> bool:
        return value is None or super().accepts(value)


class Number(Var):
    """Matches a Python number, but no boolean."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Apply:
    """An operation applied to patterns.  A parameter left out must have its default; ``...`` is any value."""

    op: ops.Op
    arguments: dict[str, Any]

    def __repr__(self) -> str:
        said = ", ".join(f"{v.name}" if isinstance(v, Var) else f"{k}={v!r}" for k, v in self.arguments.items())
        return f"{self.op.name}({said})"


@dataclass(frozen=True)
class AnyOf:
    """Matches what one of its terms matches, tried in order; ``binds`` of a term says which it was."""

    terms: tuple[Any, ...]
    binds: tuple[dict[str, Any], ...] = ()

    def __init__(self, *terms: Any) -> None:
        pairs = [t if isinstance(t, tuple) else (t, {}) for t in terms]  # (term, what it binds)
        object.__setattr__(self, "terms", tuple(t for t, _ in pairs))
        object.__setattr__(self, "binds", tuple(b for _, b in pairs))


@dataclass(frozen=True)
class Shared:
    """Matches what its term matches, although other nodes may use it too: then it is not removed with the match."""

    term: Any


Term = Apply | AnyOf


def roots(term: Any) -> frozenset[ops.Op]:
    """The operations that a node matching ``term`` can be."""
    if isinstance(term, AnyOf):
        return frozenset().union(*(roots(t) for t in term.terms))
    return frozenset({term.op})


def match(gm: GraphModule, pattern: Any, root: Node) -> Match | Miss:
    """Match ``pattern`` at ``root``; a `Miss` names the node that stands in the way, and why."""
    found = Match(root)
    miss = _match(gm, pattern, root, found) or _crossed_write(gm, found)
    return miss or found


def candidates(gm: GraphModule, pattern: Any) -> Iterator[Node]:
    """The nodes whose operation a match can have as its root."""
    wanted = roots(pattern)
    for node in gm.graph.nodes:
        call = ops.read(gm, node)
        if call is not None and call.op in wanted:
            yield node


def _match(gm: GraphModule, pattern: Any, value: Any, found: Match, shared: bool = False) -> Miss | None:
    if pattern is ...:
        return None
    if isinstance(pattern, Shared):
        return _match(gm, pattern.term, value, found, shared=True)
    if isinstance(pattern, Var):
        return _bind(pattern, value, found)
    if isinstance(pattern, Apply):
        return _match_call(gm, pattern, value, found, shared)
    if isinstance(pattern, AnyOf):
        return _match_any(gm, pattern, value, found, shared)
    if isinstance(pattern, list):
        pattern = tuple(pattern)
    if isinstance(pattern, tuple) and isinstance(value, tuple) and len(pattern) == len(value):
        return next((m for p, v in zip(pattern, value, strict=True) if (m := _match(gm, p, v, found))), None)
    return None if pattern == value else Miss(found.root, f"expected {pattern!r}, found {value!r}")


def _bind(var: Var, value: Any, found: Match) -> Miss | None:
    if not var.accepts(value):
        return Miss(found.root, f"{var.name} = {value!r} is not a {type(var).__name__}")
    if var.name in found.bindings and not _equal(found.bindings[var.name], value):
        return Miss(found.root, f"{var.name} is both {found.bindings[var.name]} and {value}")
    found.bindings[var.name] = value
    return None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Node) and isinstance(b, Node) and a.op == b.op == "get_attr":
        return a.target == b.target
    return bool(a == b)


def _match_any(gm: GraphModule, pattern: AnyOf, value: Any, found: Match, shared: bool) -> Miss | None:
    deepest: tuple[tuple[int, bool], Miss, Match] | None = None
    for term, binds in zip(pattern.terms, pattern.binds, strict=True):
        trial = found.trial()
        miss = _match(gm, term, value, trial, shared)
        if miss is None:
            found.keep(trial)
            found.bindings |= binds
            return None
        depth = (len(trial.nodes), miss.node is not found.root)  # the term that came furthest says why
        if deepest is None or depth > deepest[0]:
            deepest = (depth, miss, trial)
    if deepest is None:
        return None
    found.nodes = deepest[2].nodes
    return deepest[1]


def _match_call(gm: GraphModule, pattern: Apply, node: Any, found: Match, shared: bool) -> Miss | None:
    call = ops.read(gm, node) if isinstance(node, Node) else None
    if call is None or call.op is not pattern.op:
        doubt = ops.unread(gm, node) if isinstance(node, Node) else None
        if doubt is not None and doubt[0] is pattern.op:
            return Miss(node, doubt[1])
        return Miss(found.root, f"{node} is not {pattern.op.name}")
    asserting = [] if node is found.root or shared else [u for u in node.users if _only_asserts(gm, u)]
    if node is not found.root and not shared and len(node.users) - len(asserting) > 1:
        return Miss(node, f"{node} has other users: {', '.join(map(str, node.users))}")
    if node is found.root:
        found.dialect = call.dialect
    if call.inplace and (miss := _refuse_inplace(gm, pattern, call, node)):
        return miss
    if shared:
        found.shared.append(node)
    else:
        found.nodes += [node, *asserting]
    orders = [call.arguments]
    if pattern.op.commutative:
        a, b = pattern.op.parameters[:2]
        orders.append({**call.arguments, a: call.arguments[b], b: call.arguments[a]})
    missed: Miss | None = None
    reached = found.nodes
    for arguments in orders:
        trial = found.trial()
        again = _match_arguments(gm, pattern, arguments, trial)
        if again is None:
            found.keep(trial)
            return None
        if missed is None or len(trial.nodes) > len(reached):
            missed, reached = again, trial.nodes
    found.nodes = reached  # how far it came, for `_match_any`
    return missed


def _only_asserts(gm: GraphModule, node: Node) -> bool:
    """Whether ``node`` is there to check the type of its input, as export puts one before every cast."""
    call = ops.read(gm, node) if not node.users else None
    return call is not None and call.op.effect


def _match_arguments(gm: GraphModule, pattern: Apply, arguments: dict[str, Any], found: Match) -> Miss | None:
    for name, default in pattern.op.defaults.items():
        if miss := _match(gm, pattern.arguments.get(name, default), arguments[name], found):
            return miss
    return None


def _refuse_inplace(gm: GraphModule, pattern: Apply, call: ops.Call, node: Node) -> Miss | None:
    """A write in place is as good as none when what it writes to is a fresh value that only this node reads."""
    first = call.op.parameters[0]
    target = call.arguments[first]
    operands = call.op.parameters[:2] if call.op.commutative else (first,)
    inside = any(isinstance(pattern.arguments.get(n), Apply | AnyOf) for n in operands)
    if inside and isinstance(target, Node) and _fresh(gm, target):
        return None
    return Miss(node, f"{node} writes to {target} in place")


def _fresh(gm: GraphModule, node: Node) -> bool:
    """Whether nothing but its one user can see the memory of ``node``, also where that was written to before."""
    while len(node.users) == 1:
        call = ops.read(gm, node)
        target = call.arguments[call.op.parameters[0]] if call is not None and call.inplace else None
        if not isinstance(target, Node):
            return ops.may_alias(gm, node) is node and node.op != "placeholder"
        node = target
    return False


def _crossed_write(gm: GraphModule, found: Match) -> Miss | None:
    """Between the first matched node and the root, nothing may write to what the match reads."""
    inner = {*found.nodes, *found.shared}
    if len(inner) == 1:
        return None
    read = {ops.may_alias(gm, n) for m in inner for n in m.all_input_nodes}
    first = min(inner)
    node = first.next
    while node is not found.root:
        if node not in inner:
            for written in ops.writes(gm, node):
                if ops.may_alias(gm, written) in read:
                    return Miss(node, f"{node} writes in place to {written}, which is read on both sides of it")
        node = node.next
    return None


def value(gm: GraphModule, x: Any) -> torch.Tensor | None:
    """A tensor that stands for ``x``: the constant itself, or a node's fake tensor; None where nothing is known."""
    known = ops.constant(gm, x)
    if known is not None:
        return known
    if not isinstance(x, Node):
        return None
    val = x.meta.get("val", x.meta.get("example_value"))
    return val if isinstance(val, torch.Tensor) else None
