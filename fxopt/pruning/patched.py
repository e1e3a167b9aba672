"""Running a graph with one tree out of it, without editing it: everything before the tree is computed once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from fxopt.delta import share
from fxopt.pruning.calibration import Batch
from fxopt.transformations.prune_trees import PruneTrees, PruningTree


class Prefix:
    """
    All values of one batch in the dense graph, from which any patched run starts.

    A tree that is replaced by a value of its own graph is a patch: only what depends on its exit is computed again.
    """

    def __init__(self, gm: GraphModule, batch: Batch) -> None:
        self.gm, self.batch = gm, batch
        self._interpreter = _Recorder(gm)
        with torch.no_grad():
            self.output = batch.call(self._interpreter.call)
        self.values: dict[Node, Any] = self._interpreter.values
        self._by_name = {n.name: n for n in gm.graph.nodes}

    def without(self, tree: PruningTree) -> Any:
        """What the graph gives without ``tree``, which has to be in the graph itself."""
        exit, entry = self._by_name[tree.exit], self._by_name[tree.entry]
        return self.patched({exit: self.values[entry]})

    def patched(self, values: Mapping[Node, Any]) -> Any:
        """What the graph gives if some nodes had other values."""
        stale = set(values)
        for node in self.gm.graph.nodes:
            if node not in stale and any(n in stale for n in node.all_input_nodes):
                stale.add(node)
        known = {n: v for n, v in self.values.items() if n not in stale} | dict(values)
        runner = Interpreter(self.gm, garbage_collect_values=True)
        output = None
        with torch.no_grad():
            runner.env = dict(known)
            for node in self.gm.graph.nodes:
                if node in stale and node not in values:
                    runner.env[node] = runner.run_node(node)
                    if node.op == "output":
                        output = runner.env[node]
        return _shaped(self.gm, output)


class _Recorder(Interpreter):
    """Keeps the value of every node; calls its graph as the graph module would be called."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}

    def call(self, *args: Any, **kwargs: Any) -> Any:
        flat = _flat_inputs(self.module, args, kwargs)
        return _shaped(self.module, self.run(*flat, enable_io_processing=False))

    def run_node(self, n: Node) -> Any:
        value = self.values[n] = super().run_node(n)
        return value


def _flat_inputs(gm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The values of the placeholders, as the graph's code generation would bind them."""
    codegen = gm.graph._codegen
    info = getattr(codegen, "pytree_info", None)
    names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
    if info is None:
        given = dict(zip(names, args, strict=False)) | kwargs
        nodes = gm.graph.find_nodes(op="placeholder")
        return [given.get(n, node.args[0] if node.args else None) for n, node in zip(names, nodes, strict=True)]
    said = dict(zip(info.orig_args, args, strict=False)) | kwargs
    return tree_leaves([said[n] for n in info.orig_args])


def _shaped(gm: Any, output: Any) -> Any:
    """The output as the graph module would give it."""
    return gm.graph.process_outputs(output)


def is_patch(tree: PruningTree) -> bool:
    """Whether leaving out ``tree`` is only reading another value of the same graph."""
    return tree.kind in ("branch", "operand", "block", "norm", "run") and not tree.graph


def edited(gm: GraphModule, tree: PruningTree) -> GraphModule:
    """A copy of ``gm``, of the same tensors, without ``tree``."""
    copy = share(gm)
    PruneTrees((tree,)).transform(copy)
    copy.recompile()
    return copy


class Values(Interpreter):
    """Runs a graph and keeps the values of some nodes; with gradients where these are asked for."""

    def __init__(self, gm: GraphModule, wanted: set[str], gradients: bool = False) -> None:
        super().__init__(gm, garbage_collect_values=not gradients)
        self.wanted, self.gradients = wanted, gradients
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted and isinstance(value, Tensor):
            if self.gradients and value.is_floating_point():
                if not value.requires_grad:
                    value = value.detach().requires_grad_()
                value.retain_grad()
            self.found[n.name] = value
        return value

    def run_batch(self, batch: Batch) -> Any:
        """The output for a batch."""
        args = () if isinstance(batch.inputs, Mapping) else batch.inputs
        kwargs = dict(batch.inputs) if isinstance(batch.inputs, Mapping) else {}
        return _shaped(self.module, self.run(*_flat_inputs(self.module, args, kwargs), enable_io_processing=False))
