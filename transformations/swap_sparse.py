"""Layers whose weights are mostly zeros compute with the others alone, where that is faster."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakIdKeyDictionary

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.delta import Delta, graphs
from fxopt.errors import UsageError
from fxopt.kernels.unstructured_conv import SparseConv2d, pads
from fxopt.kernels.unstructured_pattern import rows_of
from fxopt.ops import Attr
from fxopt.pattern import candidates
from fxopt.shapes import propagate
from fxopt.snapshot import graph_of, node_key, path_in
from fxopt.sparse.measure import Layer, SwapReport, judge, sparse_copy
from fxopt.sparse.pruning import check_regex, check_share
from fxopt.transformation import New, Rewrite, Site, sweeping_once
from fxopt.transformations._constants import path_of
from fxopt.transformations._sparse_layers import LAYERS, Found, become, stem


@dataclass(frozen=True, eq=False)
class SwapSparse(Rewrite):
    """
    linear(x, w, b)  ->  sparse_linear(x, values of w, b)
    conv2d(x, w, b)  ->  sparse_conv2d(x, values of w, b)

    Within rounding: a sum over the non-zeros is made in another order.  Where x is infinite or NaN, a weight of zero
    gives NaN before and nothing after.  Also ``addmm`` and ``mm``, whose weights are (in, out).  For training too: the
    values are one parameter, and have gradients.

    A layer is swapped if `min_sparsity` of its weight are zeros, and if it is faster so, forward and backward, measured
    here and now at the sizes that the graph knows (or those of `inputs`); `backward=False` asks for inference alone,
    `measure=False` swaps all that are sparse enough.  `layers` is a regular expression that a layer's whole path
    matches.  `report(gm)` tells of every layer; `settled(gm)` writes down what was measured, so that a replay does the
    same.  Undone after training with ``reverse(gm, edited="carry")``, the trained values stand in the dense weight.
    """

    min_sparsity: float = 0.5
    inputs: tuple[Any, ...] | Mapping[str, Any] | None = None
    measure: bool = True
    backward: bool = True
    layers: str = ".*"

    pattern = LAYERS

    def __post_init__(self) -> None:
        check_regex("layers", self.layers)
        check_share("min_sparsity", self.min_sparsity)
        object.__setattr__(self, "replayable", not self.measure)

    def transform(self, graph_module: GraphModule) -> None:
        if self.inputs is not None:
            propagate(graph_module, self.inputs)
        _FOUND.setdefault(graph_module, {})[self.signature] = {}
        with sweeping_once(graph_module):
            for node in list(candidates(graph_module, self.pattern)):
                found = self._at(graph_module, node)
                if isinstance(found, Site):
                    become(found, self.rewrite(found, **found.match.bindings), self)

    def report(self, gm: GraphModule) -> SwapReport:
        """What the latest call on `gm` found out about each layer; `UsageError` if there was none."""
        if self.signature not in _FOUND.get(gm, {}):
            raise UsageError(f"{self.signature} was not applied to this graph module in this process; apply it first")
        inner = [_FOUND.get(g, {}).get(self.signature, {}) for g in graphs(gm).values()]
        return SwapReport(tuple(layer for layers in inner for layer in layers.values()))

    def settled(self, gm: GraphModule) -> SwapSparse:
        """This transformation with what it decides for `gm` written down: the same in every process, and replayable."""
        if self.inputs is not None:
            propagate(gm, self.inputs)
        for inner in graphs(gm).values():
            _FOUND.setdefault(inner, {})[self.signature] = {}
        for _ in self.misses(gm):
            pass
        names = "|".join(re.escape(layer.name) for layer in self.report(gm).swapped)
        return replace(self, inputs=None, measure=False, layers=names)

    def check(self, at: Site, **bound: Any) -> str | None:
        found = Found.of(at, **bound)
        refused = None if re.fullmatch(self.layers, found.name) else f"its name does not match {self.layers!r}"
        if (reason := refused or found.refusal()) is not None:
            held = at.tensor(found.weight)
            kind = "Conv2d" if found.op is ops.conv2d else "Linear"
            layer = Layer(found.name, kind, tuple(held.shape) if held is not None else (), None, None, False, reason)
        else:
            layer = self._judged(found)
        _FOUND.setdefault(at.gm, {}).setdefault(self.signature, {})[found.name] = layer
        return None if layer.swapped else f"{found.name}: {layer.reason}"

    def _judged(self, found: Found) -> Layer:
        """The decision on a weight in its present state, made once in a process."""
        held = found.at.tensor(found.weight)
        shape = found.input_shape()
        gradient = found.x.op != "placeholder"
        key = (held._version if held is not None else 0, shape, gradient, torch.get_num_threads(), self.signature)
        known = _JUDGED.setdefault(held, {})
        if key not in known:
            options = (self.min_sparsity, self.backward, gradient, self.measure)
            unknown = "its sizes are unknown; give inputs=… or call fxopt.propagate(gm, inputs) first"
            known[key] = judge(found.name, found.dense(), shape, *options, unknown=unknown)[0]
        decided: Layer = known[key]
        return decided

    def rewrite(self, at: Site, **bound: Any) -> Node:
        found = Found.of(at, **bound)
        held = at.tensor(found.weight)
        assert held is not None
        sparse = sparse_copy(found.dense())
        beside = stem(path_of(found.weight))
        trained = isinstance(held, nn.Parameter) and held.requires_grad
        values = nn.Parameter(sparse.values.detach(), requires_grad=trained)
        pattern = [
            New(t, f"{beside}{name}", persistent=name in ("row_start", "column"))
            for name, t in sparse.pattern._asdict().items()
        ]
        arguments = (found.x, New(values, f"{beside}values"), found.bias, *pattern)
        if not isinstance(sparse, SparseConv2d):
            return at.emit(ops.sparse_linear, *arguments)
        w = found.window
        padding = pads(w["padding"], sparse.kernel_size, w["dilation"])
        return at.emit(
            ops.sparse_conv2d, *arguments, sparse.kernel_size, w["stride"], padding, w["dilation"], w["groups"]
        )

    def carry(self, gm: GraphModule, rewrite: Delta) -> Mapping[str, Tensor] | None:
        """The dense weights with the trained values at their places, and zeros elsewhere."""
        tensors, transposed = rewrite.tensors(), _transposed(rewrite)
        carried: dict[str, Tensor] = {}
        for path, (before, after) in tensors.items():
            if before is None or after is not None or before.dim() not in (2, 4):
                continue
            made = [_made(gm, tensors, stem(path) + name) for name in ("values", "row_start", "column")]
            values, row_start, column = made
            if values is None or row_start is None or column is None:
                return None
            dense = before.new_zeros(before.shape[::-1] if path in transposed else before.shape)
            dense = _scatter(dense.contiguous(), values.detach(), row_start, column)
            carried[path] = dense.t().contiguous() if path in transposed else dense
        return carried


def _made(gm: GraphModule, tensors: Mapping[str, Any], wanted: str) -> Tensor | None:
    """The tensor that the rewrite made at `wanted`, or beside it where that was taken, as it is now."""
    for path, (before, after) in tensors.items():
        if before is None and after is not None and re.fullmatch(re.escape(wanted) + r"(_\d+)?", path):
            return mechanism.constant(gm, Attr(path))
    return None


def _scatter(dense: Tensor, values: Tensor, row_start: Tensor, column: Tensor) -> Tensor:
    """`values` at their places in `dense`; columns are counted over all groups of a convolution."""
    flat = dense.view(dense.shape[0], -1)
    flat[rows_of(row_start), column.long() % flat.shape[1]] = values
    return dense


def _transposed(rewrite: Delta) -> set[str]:
    """The paths of the weights that were (in, out): those of ``addmm`` and ``mm``."""
    found = set()
    for key, (before, _) in rewrite.nodes.items():
        if before is None or not any(
            op in (ops.addmm, ops.mm) for op, _ in mechanism.VOCABULARY.get(before.target, ())
        ):
            continue
        for name in before.refs():
            read, _ = rewrite.nodes.get(node_key(graph_of(key), name), (None, None))
            if read is not None and read.op == "get_attr":
                found.add(path_in(graph_of(key), str(read.target)))
    return found


# What was found out about the layers of a graph module, by signature and name; and about a weight, in a state of it.
_FOUND: WeakKeyDictionary[GraphModule, dict[str, dict[str, Layer]]] = WeakKeyDictionary()
_JUDGED = WeakIdKeyDictionary()
