"""The same operations in an order that needs less memory at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxopt import ops
from fxopt.delta import graphs
from fxopt.history import history
from fxopt.pattern import Miss
from fxopt.transformation import ReversibleTransformation
from fxopt.transformations._memory import Memory, nbytes, storage, value
from fxopt.transformations._schedule import Effort, Problem, cuts, schedule


@dataclass(frozen=True)
class Peak:
    """
    The most bytes that a graph's values have in use at once, in the order before and after.

    Parameters, buffers and the graph's inputs, which are there all the time, are not counted; neither is what an
    operator allocates and frees inside itself.  ``optimal``: no order that keeps effects in their places has less.
    """

    before: int
    after: int
    optimal: bool


@dataclass(frozen=True)
class ReorderNodes(ReversibleTransformation):
    """
    a; b  ->  b; a, where b does not read a

    Exact.  Of the orders in which every node follows its inputs, takes one with a low peak of memory in use, values
    being freed after their last use, views with what they are views of: the best for graphs that the search can
    exhaust, a good one for others.  Leaves the order alone where it finds none that is better.  Nothing moves across a
    side effect: a write in place, a random number, an assertion.  Varying sizes count by their hints.

    ``effort``: steps of the search, about a microsecond each.
    """

    effort: int = 200_000

    preserves_computation = True

    def transform(self, graph_module: GraphModule) -> None:
        lifetimes = _Lifetimes(graph_module)
        if lifetimes.unknown or not lifetimes.tasks:
            return
        order, _ = lifetimes.improved(self.effort)
        if order != list(range(len(order))):
            _arrange(graph_module.graph, lifetimes.nodes(order))

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The nodes whose size is not known; a graph that has one is left as it is."""
        for inner in graphs(gm).values():
            for node in _Lifetimes(inner).unknown:
                yield Miss(node, f"the size of {node} is not known; call fxopt.propagate(gm, inputs)")

    def report(self, gm: GraphModule) -> dict[str, Peak]:
        """
        The peaks of ``gm`` and the graph modules inside it, by path, for those whose sizes are all known.

        Of a graph that this transformation has reordered, the peak before is that of the order it found; of any
        other, the peak after is that of the order it would choose.
        """
        former = next((e.delta.orders for e in reversed(history(gm)) if e.signature == self.signature), {})
        found = {}
        for path, inner in graphs(gm).items():
            lifetimes = _Lifetimes(inner)
            if lifetimes.unknown:
                continue
            order, optimal = lifetimes.improved(self.effort)
            now, after = lifetimes.peak(), lifetimes.peak(order)
            before, _ = former.get(path, ((), ()))
            earlier = lifetimes.places([key.rpartition("::")[2] for key in before])
            if earlier is not None:
                found[path] = Peak(lifetimes.peak(earlier), now, optimal and after == now)
            else:
                found[path] = Peak(now, after, optimal)
        return found


def curve(gm: GraphModule) -> tuple[list[tuple[str, int]], str]:
    """
    The bytes that the values of ``gm`` have in use while each node runs, in graph order, by node name; see `Peak`.

    Empty, with the reason, where the size of some value is not known.
    """
    lifetimes = _Lifetimes(gm)
    if lifetimes.unknown:
        return [], f"the size of {lifetimes.unknown[0]} is not known; call fxopt.propagate(gm, inputs)"
    _, during = lifetimes.problem.trace(range(len(lifetimes.tasks)))
    return [(task.name, used) for task, used in zip(lifetimes.tasks, during, strict=True)], ""


class _Lifetimes:
    """A graph as a problem of scheduling: its operations are the tasks, their storages the blocks."""

    def __init__(self, gm: GraphModule) -> None:
        self._graph = gm.graph
        memory = Memory(gm)
        self._effects, self._certain = memory.effects, memory.certain
        self.tasks: list[Node] = []
        self.unknown: list[Node] = []
        self._blocks: dict[Node, frozenset[int]] = {}  # what each value keeps in memory
        self._by_storage: dict[int, int | None] = {}  # None: there all the time
        self._sizes: list[int] = []
        kept: frozenset[int] = frozenset()
        made: list[tuple[int, ...]] = []
        for node in gm.graph.nodes:
            if node.op == "output":
                kept = self._read(node)
            elif node.op in ("placeholder", "get_attr"):
                self._blocks[node] = frozenset()
                constants = (*tree_leaves(value(node)), ops.constant(gm, node))
                self._by_storage |= {storage(t): None for t in constants if isinstance(t, torch.Tensor)}
            else:
                self.tasks.append(node)
                known = len(self._sizes)
                self._blocks[node] = self._held(node)
                made.append(tuple(range(known, len(self._sizes))))
        self._number = {node: i for i, node in enumerate(self.tasks)}
        before = [frozenset(self._number[n] for n in t.all_input_nodes if n in self._number) for t in self.tasks]
        reads = [tuple(sorted(self._read(t))) for t in self.tasks]
        self.problem = Problem(before, made, reads, self._sizes, kept, frozenset())

    def peak(self, order: Sequence[int] | None = None) -> int:
        return self.problem.peak(order if order is not None else range(len(self.tasks)))

    def improved(self, effort: int) -> tuple[list[int], bool]:
        """An order of the tasks with a lower peak, or the one that is there; and whether none can be better."""
        given = list(range(len(self.tasks)))
        pieces = self._pieces()
        order, optimal = schedule(self.problem, pieces, Effort(effort))
        if self.peak(order) >= self.peak(given):
            return given, optimal
        late = self._views_late(order, pieces)
        return (late if self.peak(late) <= self.peak(order) else order), optimal

    def places(self, names: Sequence[str]) -> list[int] | None:
        """The tasks in the order of ``names``, if those are the names of this graph's nodes."""
        number = {n.name: i for n, i in self._number.items()}
        order = [number[name] for name in names if name in number]
        return order if names and len(order) == len(number) else None

    def nodes(self, order: Sequence[int]) -> list[Node]:
        """All nodes, with the tasks in ``order``, and each parameter's node where it is or before its first reader."""
        found: dict[Node, None] = {}
        tasks = iter(order)
        for node in self._graph.nodes:
            chosen = self.tasks[next(tasks)] if node in self._number else node
            found |= {n: None for n in chosen.all_input_nodes if n.op == "get_attr"}
            found[chosen] = None
        return list(found)

    def _read(self, node: Node) -> frozenset[int]:
        return frozenset().union(*(self._blocks.get(n, frozenset()) for n in node.all_input_nodes))

    def _held(self, node: Node) -> frozenset[int]:
        val = value(node)
        if val is None and "val" not in node.meta and node.users:
            self.unknown.append(node)
        source = self._certain[node]
        inherited = self._blocks[source] if source is not None else frozenset()
        held: set[int] = set()
        for leaf in tree_leaves(val):
            if not isinstance(leaf, torch.Tensor):
                continue
            if source is not None or storage(leaf) in self._by_storage:
                block = self._by_storage.get(storage(leaf), -1)
                held |= inherited if block == -1 else {block} if block is not None else set()
                continue
            self._by_storage[storage(leaf)] = len(self._sizes)
            held.add(len(self._sizes))
            self._sizes.append(nbytes(leaf) or 0)
        return frozenset(held)

    def _pieces(self) -> list[tuple[int, int]]:
        """The stretches between effects, cut where all orders agree."""
        found: list[tuple[int, int]] = []
        low = 0
        for high in [*(i for i, t in enumerate(self.tasks) if t in self._effects), len(self.tasks)]:
            found += self._cut(low, high)
            low = high + 1
        return [(low, high) for low, high in found if high - low > 1]

    def _cut(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Views and numbers take no part in this: they cost nothing wherever they are."""
        costly = [i for i in range(low, high) if self.problem.made[i]]
        number = {task: i for i, task in enumerate(costly)}
        through: dict[int, frozenset[int]] = {}
        for i in range(low, high):
            steps = (
                frozenset({number[p]}) if p in number else through.get(p, frozenset()) for p in self.problem.before[i]
            )
            through[i] = frozenset().union(*steps)
        for cut in cuts([through[i] for i in costly]):
            yield low, costly[cut] + 1
            low = costly[cut] + 1
        yield low, high

    def _views_late(self, order: Sequence[int], pieces: Sequence[tuple[int, int]]) -> list[int]:
        """``order``, with each moved view right before its first reader: easier to read, and no more memory."""
        found = list(order)
        for low, high in pieces:
            if found[low:high] != list(range(low, high)):
                found[low:high] = self._late(order[low:high])
        return found

    def _late(self, order: Sequence[int]) -> list[int]:
        rank = {task: i for i, task in enumerate(order)}
        waiting: set[int] = set()
        found: list[int] = []
        for task in order:
            node = self.tasks[task]
            if not self.problem.made[task] and self._read(node) <= self._blocks[node]:
                waiting.add(task)
                continue
            needed, search = set[int](), [task]
            while search:
                new = (self.problem.before[search.pop()] & waiting) - needed
                needed |= new
                search += new
            found += [*sorted(needed, key=rank.__getitem__), task]
            waiting -= needed
        return [*found, *sorted(waiting, key=rank.__getitem__)]


def _arrange(graph: Graph, order: Sequence[Node]) -> None:
    cursor = graph._root._next
    for node in order:
        if node is cursor:
            cursor = cursor._next
        else:
            cursor.prepend(node)
