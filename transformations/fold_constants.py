"""What depends on nothing but constants need be computed only once, ahead of the call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxopt import ops
from fxopt.delta import MARKS, graphs
from fxopt.pattern import Miss
from fxopt.transformation import ReversibleTransformation, erase, exists, register
from fxopt.transformations._memory import Memory, called_graphs, nbytes, value


@dataclass(frozen=True)
class FoldConstants(ReversibleTransformation):
    """
    f(c), c constant  ->  the value of f(c), a buffer that is not saved

    Exact: the value is what the same operators compute on the same device.  Constant are buffers, parameters that are
    not trained, and what is made of numbers alone (``arange(5)``); with ``trained`` parameters with gradients too,
    which then no longer learn through here.

    A stored tensor has at most ``limit`` bytes; of a larger one, the largest constant parts within the limit are
    stored instead.  Leaves alone what has an effect or draws random numbers, depends on a size that varies, is written
    to in place, is returned (each call gives its caller a tensor of his own), or has no memory of its own to store
    (``expand``).
    """

    limit: int = 2**20
    trained: bool = False

    preserves_computation = True

    def transform(self, graph_module: GraphModule) -> None:
        plan = _Plan(graph_module, self.limit, self.trained)
        values = _evaluate(graph_module, plan)
        done: set[Node] = set()
        for node in reversed(plan.order):
            if node in values or (node.users and done.issuperset(node.users)):
                done.add(node)
        for node, held in values.items():
            _put(graph_module, node, held)
        erase(graph_module, [n for n in reversed(plan.order) if n in done])

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The nodes with constant inputs that are not folded."""
        for inner in graphs(gm).values():
            yield from _Plan(inner, self.limit, self.trained).misses


_INPUTS = "its inputs vary"


class _Plan:
    """Which nodes are constant, which of those are stored, and why others are not."""

    def __init__(self, gm: GraphModule, limit: int, trained: bool) -> None:
        self.gm, self.limit, self.trained = gm, limit, trained
        self.memory = Memory(gm)
        self.misses: list[Miss] = []
        self.varies: dict[Node, str] = {}  # why a node is no constant
        in_mode = False
        for node in gm.graph.nodes:
            effect = self.memory.effects.get(node)
            in_mode = in_mode or (effect is not None and effect.kind == "unknown" and node.op == "call_function")
            reason = "it comes after a function that may change how operators run" if in_mode else self._varies(node)
            if reason is not None:
                self.varies[node] = reason
                if self._computes(node) and reason != _INPUTS:
                    self.misses.append(Miss(node, reason))
        self.order = [n for n in gm.graph.nodes if n not in self.varies and self._computes(n)]
        self.stored = self._stored()

    def _computes(self, node: Node) -> bool:
        return node.op in ("call_function", "call_method", "call_module")

    def _varies(self, node: Node) -> str | None:
        """Why the value of ``node`` may differ between calls, or may not be touched; None if it is constant."""
        if node.op == "get_attr":
            return self._tensor_varies(node, ops.constant(self.gm, node))
        if not self._computes(node) or called_graphs(self.gm, node)[0]:
            return _INPUTS
        if varying := [n for n in node.all_input_nodes if n in self.varies]:
            fixed = all(n.op == "get_attr" for n in varying)
            return self.varies[varying[0]] if fixed else _INPUTS
        if (effect := self.memory.effects.get(node)) is not None:
            return effect.reason
        if self.memory.written.get(self.memory.root(node)):
            return f"{node} is written to in place"
        if node in self.memory.returned and self._is_tensor(node):
            return f"{node} is returned, and each call gives a tensor of its own"
        if node.op == "call_module":
            return self._module_varies(node)
        return None

    def _tensor_varies(self, node: Node, held: torch.Tensor | None) -> str | None:
        if held is None:
            return f"{node.target} is no tensor"
        if self.memory.written.get(self.memory.root(node)):
            return f"{node.target} is written to in place"
        return self._unfit(str(node.target), held)

    def _unfit(self, path: str, held: torch.Tensor) -> str | None:
        if isinstance(held, FakeTensor) or held.is_meta:
            return f"{path} has no values: it is on the meta device"
        if held.requires_grad and not self.trained:
            return f"{path} is trained"
        return None

    def _module_varies(self, node: Node) -> str | None:
        module = self.gm.get_submodule(str(node.target))
        if self.memory.reads_written(node):
            return f"{node.target} holds a tensor that is written to in place"
        held = (*module.named_parameters(), *module.named_buffers())
        return next((reason for name, t in held if (reason := self._unfit(f"{node.target}.{name}", t))), None)

    def _is_tensor(self, node: Node) -> bool:
        return not isinstance(value(node), bool | int | float)

    def _stored(self) -> list[Node]:
        """The constants whose value a node needs that is not constant, or too large to be stored itself."""
        stored: list[Node] = []
        kept = {*self.varies}
        for node in reversed(self.order):
            if not any(u in kept for u in node.users):
                continue
            reason = self._unstorable(node)
            if reason is None:
                stored.append(node)
            else:
                kept.add(node)
                self.misses.append(Miss(node, reason))
        return stored[::-1]

    def _unstorable(self, node: Node) -> str | None:
        val = value(node)
        if isinstance(val, int | float):
            return None
        if not isinstance(val, torch.Tensor):
            return f"the shape of {node} is not known; call fxopt.propagate(gm, inputs)"
        if any(not isinstance(s, int) for s in val.shape):
            return f"{node} has a size that varies: {tuple(val.shape)}"
        if val.layout is not torch.strided or val.device.type == "meta":
            return f"{node} is {val.layout} on {val.device}"
        if not _dense(val):
            return f"{node} has no memory of its own: it repeats or skips elements"
        size = nbytes(val)
        assert size is not None
        return None if size <= self.limit else f"{node} has {size} bytes, over the limit of {self.limit}"


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the elements lie next to each other in memory, each once, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def _evaluate(gm: GraphModule, plan: _Plan) -> dict[Node, Any]:
    """The values of the stored nodes, in graph order."""
    needed = set(plan.stored)
    for node in reversed(plan.order):
        if node in needed:
            needed.update(node.all_input_nodes)
    values: dict[Node, Any] = {}
    readers = {n: sum(u in needed for u in n.users) for n in needed}
    keep = set(plan.stored)
    with torch.no_grad():
        for node in gm.graph.nodes:
            if node not in needed:
                continue
            values[node] = _run(gm, node, values)
            for n in node.all_input_nodes:
                readers[n] -= 1
                if not readers[n] and n not in keep:
                    del values[n]
    return {n: values[n] for n in plan.stored}


def _run(gm: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    if node.op == "get_attr":
        return ops.constant(gm, node)
    args, kwargs = map_arg(node.args, values.__getitem__), map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return target(*args, **kwargs)


def _put(gm: GraphModule, node: Node, held: Any) -> None:
    """Let the users of ``node`` read ``held`` instead: a buffer, or a number as an argument."""
    if not isinstance(held, torch.Tensor):
        for user in list(node.users):
            user.args = map_arg(user.args, lambda n: held if n is node else n)
            user.kwargs = map_arg(user.kwargs, lambda n: held if n is node else n)
        return
    path = _free(gm, f"{node.name}_folded")
    register(gm, path, held.detach().clone(), persistent=False)  # it may be a view of a buffer that goes on living
    with gm.graph.inserting_before(node):
        new = gm.graph.get_attr(path)
    new.meta = {k: v for k, v in node.meta.items() if k not in ("from_node", MARKS)}
    node.replace_all_uses_with(new)


def _free(gm: GraphModule, name: str) -> str:
    return next(c for i in range(1_000_000) if not exists(gm, c := name if i == 0 else f"{name}_{i}"))
