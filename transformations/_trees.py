"""Pruning trees: every unit of a graph that can be taken out of it, found from the graph alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from rich.table import Table
from rich.text import Text
from torch.fx import GraphModule, Node

from fxopt import ops
from fxopt import vocabulary as words
from fxopt.delta import graphs, share
from fxopt.errors import UsageError
from fxopt.text import to_html, to_text
from fxopt.transformations._flow import NORMS, Flow, Point, Region, signature
from fxopt.transformations._memory import Memory, effect, fixed, value
from fxopt.transformations._tree_picture import bar, picture
from fxopt.transformations.make_out_of_place import MakeOutOfPlace

Kind = Literal["branch", "operand", "block", "norm", "run", "layer", "cat", "heads"]
_DROPPED = {words.add: "add", words.mul: "mul"}


@dataclass(frozen=True)
class PruningTree:
    """
    A unit that can be removed: a parameter subtree, and the operations that go with it.

    ``id`` names it in every copy of the graph: ``first..exit`` a region that becomes the identity, ``exit:i`` the
    operand ``i`` of a sum, product or concatenation that is dropped, ``layer`` a linear layer or convolution of unequal
    dimensions, ``attention#g`` a key/value group with its heads; behind ``path/`` where it is in an inner graph.
    """

    id: str
    kind: Kind
    module: str  # the module of the model's source that its operations come from
    root: str | None  # the first linear layer or convolution in it, by its weight's path
    entry: str  # the value that its users read afterwards
    exit: str
    operations: tuple[str, ...]  # the nodes that go, in graph order
    parameters: tuple[str, ...]  # the parameters that go, by path
    elements: int  # of these parameters
    features: tuple[Any, Any] | None = None  # of a layer with unequal dimensions: in, out
    span: tuple[int, int] = (0, 0)  # positions of its first and last operation
    graph: str = ""  # path of the graph module that it is in

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True)
class Trees(Sequence[PruningTree]):
    """The pruning trees of a graph module, in graph order; prints as a table, and draws itself (`picture`)."""

    found: tuple[PruningTree, ...]
    nodes: int  # of the graph
    name: str = "pruning trees"
    scores: dict[str, float] = field(default_factory=dict)

    @overload
    def __getitem__(self, index: int | str) -> PruningTree: ...

    @overload
    def __getitem__(self, index: slice) -> Trees: ...

    def __getitem__(self, index: int | str | slice) -> PruningTree | Trees:
        if isinstance(index, slice):
            return Trees(self.found[index], self.nodes, self.name, self.scores)
        if isinstance(index, str):
            known = {t.id: t for t in self.found}
            if index not in known:
                raise UsageError(f"no pruning tree is called {index!r}; print fxopt.pruning.trees(gm) to see them")
            return known[index]
        return self.found[index]

    def __len__(self) -> int:
        return len(self.found)

    def of_kind(self, *kinds: Kind) -> Trees:
        """Only the trees of these kinds."""
        return Trees(tuple(t for t in self.found if t.kind in kinds), self.nodes, self.name, self.scores)

    def without(self, keywords: Iterable[str]) -> Trees:
        """Only the trees in whose id, module and parameters none of ``keywords`` appears (whole words between dots)."""
        patterns = [re.compile(rf"(?:^|[._/]){re.escape(k)}(?:$|[._/:#])") for k in keywords]
        texts = {t.id: " ".join((t.module, *t.parameters, t.id)).split() for t in self.found}
        kept = (t for t in self.found if not any(p.search(w) for p in patterns for w in texts[t.id]))
        return Trees(tuple(kept), self.nodes, self.name, self.scores)

    def picture(self) -> str:
        """The trees as bars over the graph's operations, inner ones below outer ones: an SVG."""
        return picture(self.found, self.nodes, self.scores)

    def __repr__(self) -> str:
        return to_text(self)

    def __rich__(self) -> Table:
        title = Text(f"{self.name}: {len(self)} in {self.nodes} nodes")
        table = Table(title=title, title_justify="left")
        for name in ("tree", "kind", "module", "ops", "parameters", "where"):
            table.add_column(name, justify="right" if name in ("ops", "parameters") else "left", overflow="fold")
        for t in self.found:
            sizes = "" if t.features is None else f" {t.features[0]}->{t.features[1]}"
            row = (t.id, t.kind + sizes, t.module, str(len(t.operations)), f"{t.elements:,}", bar(t.span, self.nodes))
            table.add_row(*map(Text, row))
        return table

    def _repr_html_(self) -> str:
        return self.picture() + to_html(self)


def trees(gm: GraphModule, runs: bool = False) -> Trees:
    """
    Every removable unit of ``gm``, in all of its graphs, with no word about its architecture.

    Single-entry single-exit regions of equal shape and dtype that hold parameters; operands of a sum, product or
    concatenation; linear layers and convolutions of unequal dimensions; attention heads by key/value group.  With
    ``runs``, also every contiguous run of such regions.  A region inside a residual branch that would leave nothing but
    norms there is not one: the branch is.  ``gm`` is left as it is.

    Raises `UsageError` where no shapes are known (a plain ``symbolic_trace``): call ``fxopt.propagate(gm, inputs)``.
    """
    if not isinstance(gm, GraphModule):
        raise UsageError(
            f"trees was given a {type(gm).__name__}, expected a torch.fx.GraphModule; capture the model first"
        )
    found: list[PruningTree] = []
    for path, inner in graphs(gm).items():
        found += _Enumeration(path, out_of_place(inner), runs).trees()
    return Trees(tuple(found), len(gm.graph.nodes))


def out_of_place(gm: GraphModule) -> GraphModule:
    """``gm``, or where it writes in place a copy that does not (of the same names and tensors)."""
    if not any(f is not None and f.kind == "write" for f in (effect(gm, n) for n in gm.graph.nodes)):
        return gm
    copy = share(gm)
    MakeOutOfPlace().transform(copy)
    return copy


class _Enumeration:
    """The trees of one graph."""

    def __init__(self, path: str, gm: GraphModule, runs: bool) -> None:
        self.path, self.gm, self.runs = path, gm, runs
        self.flow = Flow(gm)
        shaped = [n for n in self.flow.nodes if value(n) is not None]
        if self.flow.nodes and not shaped:
            raise UsageError("the shapes of the graph's values are not known; call fxopt.propagate(gm, inputs) first")
        self.names = {id(t): n for n, t in reversed(list(gm.named_parameters(remove_duplicate=False)))}
        memory = Memory(gm)  # some writes in place cannot be made out of place
        self.overwritten = {n for n in self.flow.nodes if memory.last_write(n) > memory.position[n]}
        self.seen: dict[tuple[Node, Node], PruningTree] = {}  # by what reads what afterwards

    def trees(self) -> list[PruningTree]:
        from fxopt.transformations._heads import groups

        branches = [t for n in self.flow.nodes for t in self._operands(n)]
        sums = [t for t in branches if t.kind == "branch"]
        regions = [t for chain in self.flow.chains() for t in self._in_chain(chain)]
        regions = [t for t in regions if not any(self._is_all_of(t, b) for b in sums)]
        # beside the operand of a concatenation: without it there are fewer columns, with the identity other ones
        regions = _largest(regions, {frozenset(t.parameters) for t in branches if t.kind != "cat"})
        layers = [t for n in self.flow.nodes if (t := self._layer(n)) is not None]
        heads = [self._group(attention, group) for attention in groups(self.gm) for group in range(attention.groups)]
        return sorted((*branches, *regions, *layers, *heads), key=lambda t: (t.span, t.id))

    def _tree(
        self, name: str, kind: Kind, entry: Node, exit: Node, keep: Sequence[Node], **more: Any
    ) -> PruningTree | None:
        dead = self.flow.dying(exit, keep)
        gone = self.flow.freed(dead)
        read = (exit,) if kind == "layer" else (entry, exit)  # what stands in a layer's place reads where it did
        if not gone or (exit, entry) in self.seen or not self.overwritten.isdisjoint(read):
            return None
        made = PruningTree(
            f"{self.path}/{name}" if self.path else name,
            kind,
            _module([n for n in dead if self.flow.weights.get(n)] or dead),
            next((self._weight(n) for n in dead if self.flow.is_transform(n)), None),
            entry.name,
            exit.name,
            tuple(n.name for n in dead if n.op != "get_attr"),
            tuple(self.names[id(t)] for t in gone),
            sum(t.numel() for t in gone),
            span=(min(self.flow.at[n] for n in dead if n.op != "get_attr"), self.flow.at[exit]),
            graph=self.path,
            **more,
        )
        self.seen[exit, entry] = made
        return made

    def _weight(self, node: Node) -> str:
        largest = max((self.flow.tensors[k] for k in self.flow.weights[node]), key=torch.Tensor.numel)
        return self.names[id(largest)]

    # --- operands -------------------------------------------------------------------------------------------------

    def _operands(self, node: Node) -> Iterator[PruningTree]:
        op = self.flow.op(node)
        if op in _DROPPED:
            for dropped in range(2):
                kept = kept_operand(self.gm, node, dropped)
                if isinstance(kept, Node) and kept in self.flow.preds and signature(kept) == signature(node):
                    kind: Kind = "branch" if op is words.add else "operand"
                    made = self._tree(f"{node.name}:{dropped}", kind, kept, node, (kept,))
                    if made is not None:
                        yield made
        elif op is words.cat:
            yield from self._of_cat(node)

    def _of_cat(self, node: Node) -> Iterator[PruningTree]:
        from fxopt.transformations._joins import join

        joined = join(self.gm, node)
        if joined is None or isinstance(joined, str):
            return
        for i, part in enumerate(joined.parts):
            others = [p for p in joined.parts if p is not part]
            if part not in self.flow.preds or not any(p in self.flow.preds for p in others):
                continue
            self.seen.pop((node, node), None)
            made = self._tree(f"{node.name}:{i}", "cat", node, node, others)
            if made is not None:
                yield made

    # --- regions --------------------------------------------------------------------------------------------------

    def _in_chain(self, chain: list[Point]) -> Iterator[PruningTree]:
        kinds: dict[Any, list[Point]] = {}
        for point in chain:
            kinds.setdefault(signature(_source(point)), []).append(point)
        kinds.pop(None, None)
        for points in kinds.values():
            units = list(self._units(points))
            for i, unit in enumerate(units):
                if (made := self._of_region([unit])) is not None:
                    yield made
                for j in range(i + 2, len(units) + 1) if self.runs else ():
                    if units[j - 1].entry is not units[j - 2].exit:
                        break
                    if (made := self._of_region(units[i:j])) is not None:
                        yield made

    def _units(self, points: list[Point]) -> Iterator[Region]:
        """
        The smallest regions with parameters between points of one shape.

        What follows without parameters of its own (an activation function, dropout) goes with them, and so does a
        batch norm: its statistics are those of the layer before it.
        """
        unit: Region | None = None
        for before, exit in itertools.pairwise(points):
            assert isinstance(exit, Node)
            entry = _source(before)
            nodes = self.flow.between(entry, exit)
            weighted = any(self.flow.weights.get(n) for n in nodes)
            follows = len(nodes) == 1 and self.flow.op(exit) is words.batch_norm
            if unit is not None and unit.exit is entry and (not weighted or follows):
                unit = Region(unit.entry, exit, (*unit.nodes, *nodes))
            elif weighted:
                if unit is not None:
                    yield unit
                unit = Region(entry, exit, nodes)
        if unit is not None:
            yield unit

    def _of_region(self, units: list[Region]) -> PruningTree | None:
        nodes = tuple(n for unit in units for n in unit.nodes)
        whole = Region(units[0].entry, units[-1].exit, nodes)
        if not all(self.flow.removable(n) for n in nodes):
            return None
        weighted = [n for n in nodes if self.flow.weights.get(n)]
        norms = all(self.flow.op(n) in NORMS or not self.flow.is_transform(n) for n in weighted)
        kind: Kind = "run" if len(units) > 1 else "norm" if norms and not _has_matmul(self.flow, nodes) else "block"
        return self._tree(f"{whole.first.name}..{whole.exit.name}", kind, whole.entry, whole.exit, (whole.entry,))

    def _is_all_of(self, tree: PruningTree, branch: PruningTree) -> bool:
        """Whether without ``tree`` nothing but norms would be left of ``branch``."""
        inner, outer = set(tree.operations), set(branch.operations)
        if not inner < outer:
            return False
        by = {n.name: n for n in self.flow.nodes if n.name in outer}
        left = [by[n] for n in outer - inner if n in by]
        return not any(self.flow.is_transform(n) for n in left)

    # --- single layers and heads ------------------------------------------------------------------------------------

    def _layer(self, node: Node) -> PruningTree | None:
        if not self.flow.is_transform(node) or len(self.flow.preds[node]) != 1:
            return None
        entry = self.flow.preds[node][0]
        there, here = value(entry), value(node)
        axis = features_axis(self.flow.calls[node])
        if not isinstance(there, torch.Tensor) or not isinstance(here, torch.Tensor) or axis is None:
            return None
        sizes = fixed(there.shape[axis]), fixed(here.shape[axis])
        if signature(entry) == signature(node) or None in sizes:
            return None
        return self._tree(node.name, "layer", entry, node, (entry,), features=sizes)

    def _group(self, attention: Any, group: int) -> PruningTree:
        names = attention.parameters
        node = attention.node
        return PruningTree(
            f"{self.path}/{node.name}#{group}" if self.path else f"{node.name}#{group}",
            "heads",
            _module([node]),
            names[0] if names else None,
            node.name,
            node.name,
            (),
            tuple(names),
            attention.elements,
            span=(attention.start if attention.start >= 0 else self.flow.at[node], self.flow.at[node]),
            graph=self.path,
        )


def _largest(regions: list[PruningTree], operands: set[frozenset[str]]) -> list[PruningTree]:
    """Of the regions with the same parameters, the one with the most operations; none if an operand has them."""
    best: dict[frozenset[str], PruningTree] = {}
    for tree in regions:
        key = frozenset(tree.parameters)
        if key not in operands and (key not in best or len(tree.operations) > len(best[key].operations)):
            best[key] = tree
    return list(best.values())


def kept_operand(gm: GraphModule, node: Node, dropped: int) -> Any:
    """The operand of a sum or product beside number ``dropped``; None where it is scaled, or ``node`` is neither."""
    call = ops.read(gm, node)
    if call is None or call.op not in _DROPPED:
        return None
    operands = [call.arguments["input"], call.arguments["other"]]
    if call.op is words.add and call.arguments["alpha"] != 1:
        return operands[0] if dropped == 1 else None
    return operands[1 - dropped] if operands[0] is not operands[1] else None


def features_axis(call: ops.Call | None) -> int | None:
    """The axis of a linear layer's or convolution's input and output that its weight mixes."""
    if call is None:
        return None
    if call.op in (words.linear, words.addmm, words.mm):
        return -1
    return {words.conv1d: -2, words.conv2d: -3, words.conv3d: -4}.get(call.op)


def _has_matmul(flow: Flow, nodes: Iterable[Node]) -> bool:
    return any(flow.is_transform(n) for n in nodes)


def _source(point: Point) -> Node:
    return point[0] if isinstance(point, tuple) else point


def _module(nodes: Sequence[Node]) -> str:
    """The innermost module of the model's source that all ``nodes`` come from."""
    stacks = []
    for node in nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if node.op == "call_module":
            stacks.append(str(node.target).split("."))
        elif stack and node.op != "get_attr":
            stacks.append(_plain(list(stack.values())[-1][0]))
    if not stacks:
        return ""
    common = stacks[0]
    for stack in stacks[1:]:
        same = next((i for i, (a, b) in enumerate(zip(common, stack, strict=False)) if a != b), None)
        common = common[: min(len(common), len(stack)) if same is None else same]
    return ".".join(common)


def _plain(path: Any) -> list[str]:
    """
    A module path as torch.export writes it, as names.

    >>> _plain("L['self'].model.layers.0")
    ['model', 'layers', '0']
    """
    text = re.sub(r"^L\['self'\]\.?", "", str(path))
    text = re.sub(r"getattr\((.*), '(\w+)'\)", r"\1.\2", text)
    return [p for p in text.replace("slice(None, None, None)", "").split(".") if p]
