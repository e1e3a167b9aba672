"""What is computed twice need be computed only once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxopt.delta import graphs
from fxopt.pattern import Miss
from fxopt.transformation import ReversibleTransformation, erase
from fxopt.transformations._memory import Memory


@dataclass(frozen=True)
class EliminateCommonSubexpressions(ReversibleTransformation):
    """
    a = f(x), b = f(x)  ->  a = f(x), b = a

    Exact.  Value numbering in graph order: two nodes are equal when operation, target and arguments are, with equal
    nodes as arguments, and no write in place in between to what they read (J. Cocke and J. T. Schwartz, Programming
    Languages and Their Compilers, 1970).  Leaves random numbers alone, uninitialised memory, what is written to in
    place later, and values whose union would make two outputs of the graph share memory that did not.
    """

    preserves_computation = True

    def transform(self, graph_module: GraphModule) -> None:
        found = [(node, earlier) for node, earlier, reason in _repeated(graph_module) if reason is None]
        for node, earlier in found:
            node.replace_all_uses_with(earlier)
        erase(graph_module, [node for node, _ in found])

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The nodes that repeat an earlier one but are kept, each with the reason."""
        for inner in graphs(gm).values():
            for node, earlier, reason in _repeated(inner):
                if reason is not None:
                    yield Miss(node, f"{node} repeats {earlier}, but {reason}")


def _repeated(gm: GraphModule) -> Iterator[tuple[Node, Node, str | None]]:
    """The nodes that compute what an earlier one did, that one, and why they cannot be one; None if they can."""
    memory = Memory(gm)
    numbering = _Numbering(gm, memory)
    for node in gm.graph.nodes:
        found = memory.effects.get(node)
        if found is not None and found.kind == "unknown":
            numbering.forget()  # it may change autograd's mode, or anything else that a value depends on
        if found is not None and found.kind in ("write", "assertion", "unknown"):
            continue
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        earlier = numbering.number(node)
        if earlier is None:
            continue
        reason = "both draw random numbers" if found is not None else _obstacle(memory, node, earlier)
        if reason is None:
            numbering.same[node] = earlier
            memory.join(earlier, node)
        yield node, earlier, reason


def _obstacle(memory: Memory, node: Node, earlier: Node) -> str | None:
    for n in (earlier, node):
        if memory.last_write(n) > memory.position[earlier]:
            return f"{n} is written to in place"
    if memory.reads_written(node):
        return f"{node.target} holds a tensor that is written to in place"
    if node in memory.returned and earlier in memory.returned:
        return "both are outputs of the graph, or share memory with one"
    if getattr(node.target, "__name__", str(node.target)).removeprefix("new_").startswith("empty"):
        return "both are uninitialised memory"
    return None


class _Numbering:
    """The first node of each value."""

    def __init__(self, gm: GraphModule, memory: Memory) -> None:
        self._gm, self._memory = gm, memory
        self._first: dict[Any, Node] = {}
        self.same: dict[Node, Node] = {}  # a node -> the equal one that stands for it

    def number(self, node: Node) -> Node | None:
        """The node that computed the value of ``node`` first; None if it is the first itself."""
        now = self._memory.position[node]
        arguments = self._key((node.args, node.kwargs), now)
        key = (node.op, node.target, arguments)
        first = self._first.setdefault(key, node)
        return None if first is node else first

    def forget(self) -> None:
        self._first.clear()

    def _key(self, value: Any, now: int) -> Any:
        """A hashable stand-in for an argument, equal only for arguments that mean the same."""
        if isinstance(value, Node):
            node = self.same.get(value, value)
            version = sum(w < now for w in self._memory.written.get(self._memory.root(node), ()))
            return ("get_attr", str(node.target), version) if node.op == "get_attr" else (node, version)
        if isinstance(value, tuple | list):
            return (tuple, *(self._key(v, now) for v in value))  # fx itself takes lists and tuples for one another
        if isinstance(value, dict):
            return (dict, *((k, self._key(v, now)) for k, v in sorted(value.items(), key=lambda item: str(item[0]))))
        if isinstance(value, slice):
            return (slice, *(self._key(v, now) for v in (value.start, value.stop, value.step)))
        if isinstance(value, float | complex):
            return (type(value), repr(value))  # 0.0 is not -0.0, and not 0
        if isinstance(value, torch.Tensor):
            return (torch.Tensor, id(value))
        try:
            hash(value)
        except TypeError:
            return (type(value), id(value))
        return (type(value), value)
