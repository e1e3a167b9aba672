"""Where a graph's activations flow: single-entry single-exit regions, and what dies when a value is no longer used."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxopt import ops
from fxopt import vocabulary as words
from fxopt.transformations._memory import effect, fixed, value

TRANSFORMS = frozenset(
    {words.linear, words.addmm, words.mm, words.matmul, words.bmm, words.baddbmm}
    | {words.conv1d, words.conv2d, words.conv3d, words.conv_transpose1d, words.conv_transpose2d, words.conv_transpose3d}
)
NORMS = frozenset({words.batch_norm, words.layer_norm, words.rms_norm, words.group_norm, words.fused_rms_norm})
_SIZES = frozenset({words.size, words.numel, words.attribute})

Signature = tuple[Any, ...]  # shape (symbols by their expressions) and dtype
Point = Node | tuple[Node, Node]  # a value, or one use of a value that has several


@dataclass(frozen=True)
class Region:
    """The operations between the value ``entry`` and ``exit``; no other activation enters, none but ``exit`` leaves."""

    entry: Node
    exit: Node
    nodes: tuple[Node, ...]  # in graph order; the last is ``exit``

    @property
    def first(self) -> Node:
        """The first operation that reads the entry."""
        return next(n for n in self.nodes if self.entry in n.all_input_nodes)


class Flow:
    """
    The activations of one graph: values that depend on the content of an input and on parameters (or float inputs).

    What depends on sizes alone (positions, masks made of them) is none, so that a mask that all layers share makes no
    second entry.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.at = {n: i for i, n in enumerate(gm.graph.nodes)}
        self.calls = {n: ops.read(gm, n) for n in gm.graph.nodes}
        self.weights: dict[Node, frozenset[int]] = {}  # the parameters that a node reads itself, by identity
        self.tensors: dict[int, torch.Tensor] = {}
        self.readers: dict[int, set[Node]] = {}
        self._removable: dict[Node, bool] = {}
        self._checks = {n for n, call in self.calls.items() if call is not None and _checks(n, call)}
        reaching = self._activations()
        self.preds: dict[Node, list[Node]] = {}
        self.nodes = list(self._live(reaching))
        live = set(self.nodes)
        self.preds = {n: [p for p in n.all_input_nodes if p in live] for n in self.nodes}
        self.succs: dict[Node, list[Node]] = {n: [] for n in self.nodes}
        for n in self.nodes:
            for p in self.preds[n]:
                self.succs[p].append(n)

    def op(self, node: Node) -> ops.Op | None:
        """The operation of the vocabulary that ``node`` computes."""
        call = self.calls.get(node)
        return None if call is None else call.op

    def is_transform(self, node: Node) -> bool:
        """Whether ``node`` is a linear layer or a convolution: a product with a parameter."""
        return self.op(node) in TRANSFORMS and bool(self.weights.get(node))

    def _activations(self) -> list[Node]:
        from_input: set[Node] = set()
        from_weight: set[Node] = set()
        through: dict[Node, frozenset[int]] = {}  # parameters behind a node that is no activation
        found = []
        for node in self.gm.graph.nodes:
            mine = self._own_parameters(node)
            if node.op == "placeholder":
                held = value(node)
                from_input.add(node)
                if isinstance(held, torch.Tensor) and held.is_floating_point():
                    from_weight.add(node)
                continue
            inputs = node.all_input_nodes
            for n in inputs:
                mine |= through.get(n, frozenset())
            if any(n in from_input for n in inputs) and not self._is_size(node):
                from_input.add(node)
            if mine or any(n in from_weight for n in inputs):
                from_weight.add(node)
            if node in from_input and node in from_weight and node.op != "output":
                found.append(node)
                self.weights[node] = mine
            else:
                through[node] = mine
            for key in mine:
                self.readers.setdefault(key, set()).add(node)
        floats = [n for n in self.gm.graph.find_nodes(op="placeholder") if n in from_weight]
        return [*floats, *found]

    def _own_parameters(self, node: Node) -> frozenset[int]:
        if node.op == "get_attr":
            held = ops.constant(self.gm, node)
            tensors = [held] if isinstance(held, nn.Parameter) else []
        elif node.op == "call_module":
            module = ops.submodule(self.gm, str(node.target))
            tensors = list(module.parameters()) if module is not None else []
        else:
            return frozenset()
        self.tensors.update((id(t), t) for t in tensors)
        return frozenset(map(id, tensors))

    def _is_size(self, node: Node) -> bool:
        held = value(node)
        if held is not None:
            return isinstance(held, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)
        return self.op(node) in _SIZES or getattr(node.target, "__name__", "").startswith("sym_")

    def _live(self, reaching: list[Node]) -> list[Node]:
        """Those of the activations that the output depends on, through other activations alone."""
        known, found = set(reaching), set()
        waiting = [n for o in self.gm.graph.find_nodes(op="output") for n in o.all_input_nodes if n in known]
        self.returned = frozenset(waiting)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [n for n in node.all_input_nodes if n in known]
        return [n for n in reaching if n in found]

    # --- regions --------------------------------------------------------------------------------------------------

    def chains(self) -> Iterator[list[Point]]:
        """
        The values in maximal lists of which every two, one before the other, bound a single-entry single-exit region.

        Each use of a value that has several is a point of its own (its edge is split), so a region may begin on one
        branch of a fork.  By dominators and post-dominators (Cooper, Harvey and Kennedy, 2001); after Johnson, Pearson
        and Pingali, The program structure tree, 1994.
        """
        graph: Any = nx.DiGraph()
        source, sink = "source", "sink"
        graph.add_node(source)
        for node in self.nodes:
            if not self.preds[node]:
                graph.add_edge(source, node)
            after: list[Any] = [*self.succs[node], *([sink] if node in self.returned else [])]
            for user in after:
                if len(after) == 1:
                    graph.add_edge(node, user)
                else:
                    graph.add_edge(node, (node, user))
                    graph.add_edge((node, user), user)
        if sink not in graph:
            return
        above = nx.immediate_dominators(graph, source)
        below = nx.immediate_dominators(graph.reverse(copy=False), sink)
        following = {n: v for n, v in below.items() if n not in (source, sink) and v != sink and above.get(v) == n}
        heads = set(following.values())
        for start in [n for n in graph if n in following and n not in heads]:
            chain = [start]
            while chain[-1] in following:
                chain.append(following[chain[-1]])
            yield chain

    def region(self, entry: Node, exit: Node) -> Region | None:
        """The region between two values; None if another activation enters or leaves it."""
        inside: set[Node] = set()
        waiting = [exit]
        while waiting:
            node = waiting.pop()
            if node in inside or node is entry:
                continue
            inside.add(node)
            before = self.preds.get(node, [])
            if not before or (self.at[node] <= self.at[entry]):
                return None
            waiting += before
        leaves = any(
            n in self.returned or any(u in self.preds and u not in inside for u in n.users) for n in inside - {exit}
        )
        if leaves or not any(entry in n.all_input_nodes for n in inside):
            return None
        return Region(entry, exit, tuple(sorted(inside, key=self.at.__getitem__)))

    def between(self, entry: Node, exit: Node) -> tuple[Node, ...]:
        """The operations on the ways from ``entry`` to ``exit``, which is one of them, where this is a region."""
        inside: set[Node] = set()
        waiting = [exit]
        while waiting:
            node = waiting.pop()
            if node not in inside and node is not entry:
                inside.add(node)
                waiting += self.preds[node]
        return tuple(sorted(inside, key=self.at.__getitem__))

    # --- death ----------------------------------------------------------------------------------------------------

    def removable(self, node: Node) -> bool:
        """
        Whether ``node`` does nothing but compute its value (torch calls attention and dropout impure; they are not).

        A check of a tensor's metadata goes with the tensor.
        """
        if node not in self._removable:
            self._removable[node] = removable(self.gm, node)
        return self._removable[node]

    def dying(self, exit: Node, keep: Iterable[Node]) -> list[Node]:
        """The nodes that nobody needs any more once the users of ``exit`` read ``keep`` instead; in graph order."""
        kept = set(keep)
        dead: set[Node] = set()
        waiting = [(-self.at[exit], exit)]
        seen = {exit}
        while waiting:
            _, node = heapq.heappop(waiting)
            alive = node is not exit and any(u not in dead and u not in self._checks for u in node.users)
            if alive or node in kept or not self.removable(node):
                continue
            dead |= {node, *(u for u in node.users if u in self._checks)}
            for source in node.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    heapq.heappush(waiting, (-self.at[source], source))
        return sorted(dead, key=self.at.__getitem__)

    def freed(self, dead: Iterable[Node]) -> list[torch.Tensor]:
        """The parameters that only ``dead`` nodes read."""
        gone = set(dead)
        mine = {key for n in gone for key in self.weights.get(n, ())}
        return [t for key, t in self.tensors.items() if key in mine and self._only(key, gone)]  # in graph order

    def _only(self, key: int, gone: set[Node]) -> bool:
        """Whether nothing else reads a parameter: a ``get_attr`` that nobody uses goes too, other dead code stays."""
        readers = self.readers[key]
        return all(n in gone or (n.op == "get_attr" and all(u in gone for u in n.users)) for n in readers)


def removable(gm: GraphModule, node: Node) -> bool:
    """Whether ``node`` can go when nobody uses it: it computes its value, or checks the metadata of one."""
    if node.op in ("placeholder", "output"):
        return False
    return effect(gm, node) is None or is_check(gm, node)


def is_check(gm: GraphModule, node: Node) -> bool:
    """Whether ``node`` is one of torch.export's checks of a tensor's dtype and device, that nothing depends on."""
    if node.users or node.op != "call_function":
        return False
    call = ops.read(gm, node)
    return call is not None and _checks(node, call)


def _checks(node: Node, call: ops.Call) -> bool:
    return call.op is words.assert_tensor_metadata and not node.users


def signature(node: Node) -> Signature | None:
    """Shape and dtype of a tensor; None where they are not known, or the value is no tensor."""
    held = value(node)
    if not isinstance(held, torch.Tensor):
        return None
    return (*map(_size, held.shape), held.dtype)


def _size(size: Any) -> Any:
    known = fixed(size)
    return str(size) if known is None else known
