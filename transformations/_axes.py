"""Which axes of which tensors are one: a union-find over the axes of a graph's values.

Every axis is a list of atoms, from major to minor.  An atom may come apart into factors (a view that splits heads from
channels) or segments (a split of fused projections); atoms that an operation makes equal are one.  What is left are
classes of axes that can only be cut together: heads, key/value groups, hidden and convolution channels, the residual
width.  An operation without a rule blocks the axes of what it reads and writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxopt import ops
from fxopt.transformations._memory import value

Size = Any  # a number, or an expression of symbols
Dim = list["Atom"]
Dims = list[Dim]
AxisKind = Literal["heads", "head_dim", "channels", "features", "width", "experts"]


class Atom:
    """A part of an axis; in a union-find by `up`."""

    __slots__ = ("kids", "kind", "size", "tags", "up", "why")

    def __init__(self, size: Size, why: str = "") -> None:
        self.size = size
        self.up: Atom | None = None
        self.kind: Literal["product", "segments"] | None = None
        self.kids: list[Atom] = []
        self.why = why  # why it is not to be cut; "" if it may be
        self.tags: set[str] = set()


def find(a: Atom) -> Atom:
    """The representative of an atom."""
    while a.up is not None:
        a = a.up
    return a


def leaves(a: Atom) -> list[Atom]:
    """The atoms that an atom came apart into."""
    a = find(a)
    return [a] if a.kind is None else [leaf for kid in a.kids for leaf in leaves(kid)]


def block(atoms: Iterable[Atom], why: str) -> None:
    """Forbid to cut ``atoms``."""
    for atom in atoms:
        for leaf in leaves(atom):
            leaf.why = leaf.why or why


def tag(dim: Dim, name: str) -> None:
    """Note on the parts of an axis what they are."""
    for atom in dim:
        for leaf in leaves(atom):
            leaf.tags.add(name)


def size_of(dim: Dim) -> Size:
    """The size of an axis."""
    return math.prod((find(a).size for a in dim), start=1)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes, numbers or expressions of symbols, are equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.expand(a - b) == 0)


def expression(size: Any) -> Size:
    """A size as a number or an expression of symbols."""
    found = size.node.expr if isinstance(size, torch.SymInt) else size
    if isinstance(found, sympy.Basic):
        return int(found) if found.is_number else found
    return int(found)


def fresh(size: Any, why: str = "") -> Dim:
    """A new axis."""
    return [Atom(expression(size), why)]


def _refine(a: Atom, kind: Literal["product", "segments"], sizes: Sequence[Size]) -> list[Atom]:
    a = find(a)
    assert a.kind is None
    a.kind, a.kids = kind, [Atom(s, a.why) for s in sizes]
    for kid in a.kids:
        kid.tags |= a.tags
    return a.kids


def factors(dim: Dim) -> list[Atom]:
    """The factors of an axis, major to minor; one made of segments stays whole."""
    found: list[Atom] = []
    for atom in dim:
        atom = find(atom)
        found += factors(atom.kids) if atom.kind == "product" else [atom]
    return found


def _is_one(a: Atom) -> bool:
    return same(a.size, 1)


def _union(a: Atom, b: Atom) -> None:
    a, b = find(a), find(b)
    if a is b:
        return
    if not same(a.size, b.size):
        block((a, b), "sizes that differ are made equal")
    elif a.kind is None:
        for leaf in leaves(b):
            leaf.why = leaf.why or a.why
            leaf.tags |= a.tags
        a.up = b
    elif b.kind is None:
        _union(b, a)
    elif a.kind == b.kind and len(a.kids) == len(b.kids) and all(map(_alike, a.kids, b.kids)):
        for x, y in zip(list(a.kids), list(b.kids), strict=True):
            _union(x, y)
        a.up = b
    elif a.kind == b.kind == "product":
        unify([*a.kids], [*b.kids])
        a.up = b
    else:
        block((a, b), "it is split in two ways")


def _alike(a: Atom, b: Atom) -> bool:
    return same(find(a).size, find(b).size)


def unify(one: Dim, other: Dim) -> None:
    """Make two axes one."""
    a_left = [x for x in factors(one) if not _is_one(x)]
    b_left = [x for x in factors(other) if not _is_one(x)]
    while a_left and b_left:
        a, b = find(a_left.pop()), find(b_left.pop())
        if a.kind == "product" or b.kind == "product":
            a_left += factors([a])
            b_left += factors([b])
        elif same(a.size, b.size):
            _union(a, b)
        elif (rest := _quotient(a, b)) is not None:
            major, minor = _refine(a, "product", [rest, b.size])
            _union(minor, b)
            a_left.append(major)
        elif (rest := _quotient(b, a)) is not None:
            major, minor = _refine(b, "product", [rest, a.size])
            _union(minor, a)
            b_left.append(major)
        else:
            block((a, b), "its factors do not match")
    block((*a_left, *b_left), "its factors do not match")


def _quotient(a: Atom, b: Atom) -> int | None:
    """How often the size of ``b`` goes into that of ``a``, which can come apart."""
    if a.kind is not None or not (isinstance(a.size, int) and isinstance(b.size, int)):
        return None
    return a.size // b.size if a.size % b.size == 0 else None


def regroup(dims: Dims, shape: Sequence[Size]) -> Dims | None:
    """The axes of a view: the same factors in other groups; None (and the axes blocked) where they do not fit."""
    left = [x for d in dims for x in factors(d) if not _is_one(x)]
    found: Dims = []
    for size in reversed(shape):
        group = _take(left, size)
        if group is None:
            block((a for d in dims for a in d), "a view whose factors do not match")
            return None
        found.insert(0, group or [Atom(1)])
    return found


def _take(left: list[Atom], size: Size) -> Dim | None:
    """Take factors off the end of ``left`` whose product is ``size``."""
    group: Dim = []
    taken: Size = 1
    while not same(taken, size):
        if not left:
            return None
        atom = find(left.pop())
        if atom.kind == "product":
            left += atom.kids
            continue
        whole = taken * atom.size
        numbers = isinstance(size, int) and isinstance(whole, int)
        if isinstance(size, int) and isinstance(taken, int) and isinstance(atom.size, int):
            missing = size // taken
            if atom.size > missing and atom.size % missing == 0 and atom.kind is None:
                major, atom = _refine(atom, "product", [atom.size // missing, missing])
                left.append(major)
                whole = taken * missing
        if numbers and isinstance(whole, int) and isinstance(size, int) and size % whole:
            return None
        group.insert(0, atom)
        taken = whole
    return group


@dataclass(frozen=True)
class AxisClass:
    """
    Axes that can only be cut together.

    ``size`` units; a unit is one index of each of the ``members``, or several where an axis has other factors too.
    """

    id: str  # the parameter and axis where it is first seen: ``layer.weight:0``
    kind: AxisKind
    size: int
    members: tuple[tuple[str, int], ...]  # (path of the parameter, axis)
    attention: bool  # its units are heads or key/value groups
    unit_elements: int  # parameters that one unit has
    leaf: Atom = field(repr=False, compare=False)
    least: int = 1  # units that have to stay: of experts, as many as a token is sent to


_MARKS: tuple[tuple[str, AxisKind], ...] = (
    ("hidden", "features"),
    ("norm", "width"),
    ("head_dim", "head_dim"),
    ("heads", "heads"),
    ("experts", "experts"),
)


class Axes:
    """The axes of every value and parameter of one graph."""

    def __init__(self, gm: GraphModule) -> None:
        from fxopt.transformations._axis_rules import apply

        self.gm = gm
        self.of: dict[Node, Any] = {}  # a value's dims; a list of them for a sequence of tensors; None for no tensor
        self.parameters: dict[int, tuple[str, Dims, Tensor]] = {}  # by identity, so that tied ones are one
        self.unknown: dict[str, str] = {}  # node -> what has no rule
        self.attentions: list[tuple[Node, Dim]] = []  # with the axis of its key/value heads
        self.numbers: dict[Node, Dim] = {}  # values that are numbers of the units of an axis
        self.least: list[tuple[Dim, int]] = []  # how many units of an axis have to stay
        self.calls = {n: ops.read(gm, n) for n in gm.graph.nodes}
        weighted: set[Node] = set()
        for node in gm.graph.nodes:
            if self._carries(node, weighted):
                weighted.add(node)
            self.of[node] = apply(self, node, node in weighted)

    def _carries(self, node: Node, weighted: set[Node]) -> bool:
        """Whether the value of ``node`` depends on a parameter or a float input."""
        if node.op == "get_attr":
            return isinstance(ops.constant(self.gm, node), nn.Parameter)
        if node.op == "call_module":
            return True
        if any(n in weighted for n in node.all_input_nodes):
            return True
        held = value(node)
        return node.op == "placeholder" and isinstance(held, Tensor) and held.is_floating_point()

    def parameter(self, x: Any) -> Dims | None:
        """The axes of a parameter or buffer behind an operand; those of a computed one are its value's."""
        if isinstance(x, Node) and x.op != "get_attr":
            found = self.of.get(x)
            return found if isinstance(found, list) else None
        held = ops.constant(self.gm, x)
        if held is None:
            return None
        path = x.path if isinstance(x, ops.Attr) else str(x.target)
        if id(held) not in self.parameters:
            self.parameters[id(held)] = path, [fresh(n) for n in held.shape], held
        return self.parameters[id(held)][1]

    def classes(self) -> list[AxisClass]:
        """The classes of axes that may be cut, in the order of the graph."""
        members: dict[int, tuple[Atom, list[tuple[str, int]], int]] = {}
        for path, dims, tensor in self.parameters.values():
            for axis, dim in enumerate(dims):
                for leaf in {id(x): x for a in dim for x in leaves(a)}.values():
                    if same(leaf.size, 1) or not isinstance(leaf.size, int):
                        continue
                    _, found, elements = members.get(id(leaf), (leaf, [], 0))
                    found.append((path, axis))
                    share = self._count(dim, leaf) * tensor.numel() // tensor.shape[axis] if tensor.numel() else 0
                    members[id(leaf)] = leaf, found, elements + share * isinstance(tensor, nn.Parameter)
        good = [m for m in members.values() if not m[0].why and len(m[1]) > 1]
        return [self._class(*m) for m in good if not self._twice(m[0])]

    def _class(self, leaf: Atom, members: list[tuple[str, int]], elements: int) -> AxisClass:
        path, axis = members[0]
        dims = next(dims for name, dims, _ in self.parameters.values() if name == path)
        beside = [x for a in dims[axis] for x in leaves(a) if not _is_one(x)]
        number = list(dict.fromkeys(map(id, beside))).index(id(leaf))
        name = f"{path}:{axis}" if len(set(map(id, beside))) == 1 else f"{path}:{axis}.{number}"
        convolved = any(t.dim() > 2 for p, _, t in self.parameters.values() if (p, 0) in members or (p, 1) in members)
        attention = "heads" in leaf.tags
        kind: AxisKind = "channels" if convolved else "features"
        for mark, named in _MARKS:
            kind = named if mark in leaf.tags else kind
        assert isinstance(leaf.size, int)
        least = max((n for d, n in self.least if any(x is leaf for a in d for x in leaves(a))), default=1)
        return AxisClass(name, kind, leaf.size, tuple(members), attention, elements, leaf, least)

    def _count(self, dim: Dim, leaf: Atom) -> int:
        """How many indices of an axis one unit of ``leaf`` is."""
        index = index_map(dim, leaf)
        return int((index == 0).sum()) if index is not None else 0

    def _twice(self, leaf: Atom) -> bool:
        """Whether some axis has ``leaf`` twice as a factor, where a unit is no set of indices."""
        dims = [d for _, dims, _ in self.parameters.values() for d in dims]
        dims += [d for found in self.of.values() for d in _flat_dims(found)]
        return any(index_map(d, leaf) is None for d in dims if any(leaf is x for a in d for x in leaves(a)))


def _flat_dims(found: Any) -> Iterator[Dim]:
    for d in found or ():
        if d and isinstance(d[0], list):
            yield from _flat_dims(d)
        elif d and isinstance(d[0], Atom) and isinstance(size_of(d), int):
            yield d


def index_map(dim: Dim, leaf: Atom) -> Tensor | None:
    """For every index of an axis, the unit of ``leaf`` that it belongs to, or -1; None where it is in it twice."""
    found = torch.full((1,), -1)
    for atom in dim:
        part = _index_map(find(atom), leaf)
        if part is None:
            return None
        left, right = found[:, None].expand(-1, len(part)), part[None].expand(len(found), -1)
        if bool(((left >= 0) & (right >= 0)).any()):
            return None
        found = torch.maximum(left, right).reshape(-1)
    return found


def _index_map(atom: Atom, leaf: Atom) -> Tensor | None:
    if atom is leaf:
        return torch.arange(int(atom.size))
    if atom.kind is None:
        return torch.full((int(atom.size),), -1)
    if atom.kind == "product":
        return index_map(atom.kids, leaf)
    parts = [index_map([kid], leaf) for kid in atom.kids]
    known = [p for p in parts if p is not None]
    return torch.cat(known) if len(known) == len(parts) else None
