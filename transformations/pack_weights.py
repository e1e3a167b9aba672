"""A weight that does not change need not be laid out for the processor at every call."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor as Value
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt import ops as reading
from fxopt import vocabulary as ops
from fxopt.delta import MARKS, graphs
from fxopt.kernels import packed
from fxopt.pattern import AnyOf, Constant, Miss, OptionalConstant, Tensor, Var, match, roots
from fxopt.transformation import Rewrite, Site

# Below these sizes the dispatch of the packed operator costs more than packing gains; benchmarks/inference.py measures.
SMALLEST_WEIGHT = 2**19
SMALLEST_FOR_ONE_ROW = 2**20
SMALLEST_CONVOLUTION = 2**20  # products for each image
# From about 200 rows on, MKL, which packs at every call, is the faster one; never for the head of a language model.
MOST_ROWS = 160
HEAD = 16_384
ALL_ROWS = 2**31 - 1

_MEASURED_ROWS = (1, 2, 8, 32, 64, 128, 192, 256, 512, 1024)
_GAIN = 0.97  # measured ratios above this are called no gain

_WEIGHT, _BIAS, _X = Constant("weight"), OptionalConstant("bias"), Tensor("x")
_LINEAR_TERMS = (
    (ops.linear(_X, _WEIGHT, _BIAS), {"transposed": False}),
    (ops.addmm(Constant("bias"), _X, _WEIGHT), {"transposed": True}),
)
_LINEAR = AnyOf(*_LINEAR_TERMS)
_AT = {name: Var(name) for name in ("stride", "padding", "dilation", "groups")}
_CONVOLUTION = ops.conv2d(_X, _WEIGHT, _BIAS, **_AT)
_SUM = ops.add(_CONVOLUTION, Tensor("other"))


def _activated(term: Any) -> tuple[Any, ...]:
    return (
        (ops.relu(term), {"activation": "relu"}),
        (ops.gelu(term), {"activation": "gelu"}),
        (ops.gelu(term, approximate="tanh"), {"activation": "gelu_tanh"}),
    )


_FUSED = (
    (ops.linear_relu(_X, _WEIGHT, _BIAS), {"transposed": False, "activation": "relu"}),
    (ops.linear_gelu(_X, _WEIGHT, _BIAS), {"transposed": False, "activation": "gelu"}),
    (ops.linear_gelu(_X, _WEIGHT, _BIAS, approximate="tanh"), {"transposed": False, "activation": "gelu_tanh"}),
    (ops.conv_relu(_X, _WEIGHT, _BIAS, **_AT), {"activation": "relu"}),
)
_PRODUCT = AnyOf(*_LINEAR_TERMS, _CONVOLUTION, *_FUSED)

# What keeps the layout of its input, as far as it keeps any, and computes the same on any
_FOLLOWS = frozenset(
    {
        *(ops.relu, ops.relu6, ops.gelu, ops.silu, ops.tanh, ops.sigmoid, ops.hardswish, ops.hardsigmoid, ops.hardtanh),
        *(ops.leaky_relu, ops.elu, ops.clamp, ops.add, ops.sub, ops.mul, ops.div, ops.neg, ops.dropout, ops.batch_norm),
        *(ops.max_pool2d, ops.avg_pool2d, ops.adaptive_avg_pool2d, ops.mean, ops.cat),
    }
)
_TAKES_ANY = frozenset({ops.conv2d, ops.conv_relu, ops.packed_conv2d, ops.contiguous, ops.size})


@dataclass(frozen=True)
class PackWeights(Rewrite):
    """
    act(linear(x, W, b))         ->  packed_linear(x, W, b, act)
    act(conv2d(x, W, b) + other) ->  packed_conv2d(x, W, b, other, act)

    Within rounding: oneDNN sums in another order than MKL.

    For inference on the CPU, and the last pass of a pipeline: whatever reads linears must have gone before. The graph
    keeps its parameters; see `fxopt.kernels.packed`. Each linear carries the numbers of rows between which packing
    pays, so that no input size, seen or not, is slower; convolutions compute channels last, and their results go back
    to torch's layout where something else reads them.

    `measure=False` decides by size, the same on every machine; `measure=True` times each size of linear here, now.
    """

    measure: bool = False

    pattern = AnyOf(
        *_activated(_LINEAR),
        *_activated(ops.view(_LINEAR, Var("shape"))),
        *_activated(_SUM),
        *_activated(_CONVOLUTION),
        _SUM,
        _PRODUCT,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "replayable", not self.measure)

    def transform(self, graph_module: GraphModule) -> None:
        wanted = roots(self.pattern)
        for node in reversed(list(graph_module.graph.nodes)):  # users first: an activation takes its product along
            call = None if node._erased else reading.read(graph_module, node)
            if call is None or call.op not in wanted:
                continue
            found = self._at(graph_module, node)
            if isinstance(found, Site):
                found.replace(self.rewrite(found, **found.match.bindings))
        _restore_layouts(graph_module)

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The linears and convolutions that stay as they are, each with the reason."""
        products = roots(_PRODUCT)
        for inner in graphs(gm).values():
            for node in inner.graph.nodes:
                call, doubt = reading.read(inner, node), reading.unread(inner, node)
                if call is not None and call.op in products and (reason := self._reason(inner, call.op, node)):
                    yield reason
                elif doubt is not None and doubt[0] in products:
                    yield Miss(node, doubt[1])

    def _reason(self, gm: GraphModule, op: reading.Op, node: Node) -> Miss | None:
        terms = [t for t in zip(_PRODUCT.terms, _PRODUCT.binds, strict=True) if op in roots(t[0])]
        found = match(gm, AnyOf(*terms), node)
        if isinstance(found, Miss):
            return found
        reason = self.check(Site(gm, found), **found.bindings)
        return None if reason is None else Miss(node, reason)

    def check(self, at: Site, **bound: Any) -> str | None:
        weight = at.tensor(bound["weight"])
        if weight is None or weight.device.type != "cpu" or not packed.available(weight.dtype):
            return f"{at.path(bound['weight'])} is no float32 tensor on a CPU with oneDNN"
        if not weight.is_contiguous() or weight.is_inference():
            return f"{at.path(bound['weight'])} is not contiguous, or was made in inference mode"
        if "stride" in bound:
            return _refuse_convolution(at, weight, bound)
        return self._refuse_linear(at, weight, bound)

    def _refuse_linear(self, at: Site, weight: Value, bound: dict[str, Any]) -> str | None:
        bias = None if bound["bias"] is None else at.tensor(bound["bias"])
        if weight.dim() != 2 or (bias is not None and bias.dim() != 1):
            return f"{at.path(bound['weight'])} is no matrix, or its bias no vector"
        if self._rows(weight, bound) is None:
            return f"{at.path(bound['weight'])} has {weight.numel()} elements; packing gains nothing"
        return None

    def _rows(self, weight: Value, bound: dict[str, Any]) -> tuple[int, int] | None:
        transposed = bound["transposed"]
        features, inputs = reversed(weight.shape) if transposed else weight.shape
        if self.measure:
            return measured_rows(features, inputs, bound.get("activation", "none"), torch.get_num_threads())
        return rows(features, inputs)

    def rewrite(self, at: Site, **bound: Any) -> Node:
        x, weight, bias = bound["x"], bound["weight"], bound["bias"]
        activation = bound.get("activation", "none")
        if "stride" in bound:
            window = [list(bound[k]) for k in ("stride", "padding", "dilation")]
            return at.emit(ops.packed_conv2d, x, weight, bias, bound.get("other"), *window, bound["groups"], activation)
        tensor = at.tensor(weight)
        assert tensor is not None
        between = self._rows(tensor, bound)
        assert between is not None
        y = at.emit(ops.packed_linear, x, weight, bias, activation, bound["transposed"], *between)
        return at.emit(ops.view, y, bound["shape"]) if bound.get("shape") is not None else y


def rows(features: int, inputs: int) -> tuple[int, int] | None:
    """The least and the most rows for which a weight of this size is worth packing, by size alone; None: never."""
    size = features * inputs
    if size < SMALLEST_WEIGHT:
        return None
    return 1 if size >= SMALLEST_FOR_ONE_ROW else 2, ALL_ROWS if features >= HEAD else MOST_ROWS


@functools.cache
def measured_rows(features: int, inputs: int, activation: str, threads: int) -> tuple[int, int] | None:
    """
    `rows`, by timing both ways here with `threads` threads.

    Interleaved rounds on random weights at ten numbers of rows; the widest run of them in which packing gains at
    least 3 %. Decided once for each size in a process.
    """
    gains = [r for r, ratio in measured_ratios(features, inputs, activation, threads).items() if ratio < _GAIN]
    runs: list[list[int]] = []
    for r in gains:
        i = _MEASURED_ROWS.index(r)
        if runs and _MEASURED_ROWS.index(runs[-1][-1]) == i - 1:
            runs[-1].append(r)
        else:
            runs.append([r])
    if not runs:
        return None
    best = max(runs, key=len)
    return best[0], ALL_ROWS if best[-1] == _MEASURED_ROWS[-1] else best[-1]


@functools.cache
def measured_ratios(features: int, inputs: int, activation: str, threads: int) -> dict[int, float]:
    """Time of `packed_linear` over that of linear and activation, by number of rows, here with `threads` threads."""
    weight, bias = torch.randn(features, inputs), torch.randn(features)
    return {
        r: _ratio(torch.randn(r, inputs), weight, bias, activation)
        for r in _MEASURED_ROWS
        if r * features * inputs < 2**34  # under a second for each call
    }


def _ratio(x: Value, weight: Value, bias: Value, activation: str) -> float:
    def plain() -> None:
        packed.packed_linear(x, weight, bias, activation)

    def fast() -> None:
        torch.ops.fxopt.packed_linear.default(x, weight, bias, activation, False, 1, ALL_ROWS)

    # without the engine's watch over what a transformation calls, which would be timed too
    with torch.no_grad(), torch._C.DisableTorchFunction():
        for _ in range(3):
            plain()
            fast()
        calls = max(1, int(0.002 / max(_seconds(plain, 1), 1e-6)))
        return statistics.median(_seconds(fast, calls) / _seconds(plain, calls) for _ in range(9))


def _seconds(run: Any, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


# --- convolutions and layouts ----------------------------------------------------------------------------------------


def _refuse_convolution(at: Site, weight: Value, bound: dict[str, Any]) -> str | None:
    y = at.value(at.root)
    if y is None or y.dim() != 4:
        return f"{at.root} has no known batch of images; propagate shapes first (fxopt.shapes)"
    if isinstance(bound["padding"], str):
        return f"{at.root} pads by name, {bound['padding']!r}"
    products = weight.numel() * _area(y)
    if products < SMALLEST_CONVOLUTION:
        return f"{at.root} computes {products} products for each image; packing gains nothing"
    if (other := bound.get("other")) is not None and not _same_shape(y, at.value(other)):
        return f"{other} is spread over the sum"
    writer = _write_behind(at.gm, at.root)
    return None if writer is None else f"{writer} writes in place to what {at.root} computes and others read"


def _area(y: Value) -> int:
    """Pixels of an image; those of a side that is not fixed count as 32."""
    sides = [n if isinstance(n, int) else 32 for n in y.shape[2:]]
    return sides[0] * sides[1]


def _same_shape(a: Value, b: Value | None) -> bool:
    if b is None or b.dim() != a.dim() or b.dtype != a.dtype:
        return False
    return all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))


def _write_behind(gm: GraphModule, root: Node) -> Node | None:
    """A node that writes to memory of ``root``'s layout region which another node reads; a copy would not see that."""
    waiting, seen = [(root, False)], {root}
    while waiting:
        node, shared = waiting.pop()
        shared = shared or len(node.users) > 1
        for user in node.users:
            if shared and node in reading.writes(gm, user):
                return user
            alias = reading.may_alias(gm, user) is not user
            call = reading.read(gm, user)
            if user not in seen and (alias or (call is not None and call.op in _FOLLOWS)):
                seen.add(user)
                waiting.append((user, shared and alias))
    return None


def _restore_layouts(gm: GraphModule) -> None:
    """Put what packed convolutions leave channels last back into torch's layout, where something else reads it."""
    last: set[Node] = set()
    restored: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        call = reading.read(gm, node)
        sources = [n for n in node.all_input_nodes if n in last]
        if call is not None and (call.op is ops.packed_conv2d or (sources and call.op in _FOLLOWS)):
            last.add(node)
        elif sources and not (call is not None and call.op in _TAKES_ANY) and not _is_number(node):
            for source in sources:
                node.replace_input_with(source, restored.get(source) or _restore(gm, source, restored))


def _is_number(node: Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt | torch.Size)


def _restore(gm: GraphModule, source: Node, restored: dict[Node, Node]) -> Node:
    call = reading.read(gm, source)
    assert call is not None
    with gm.graph.inserting_after(source):
        node = ops.contiguous.emit(gm.graph, call.dialect, source)
    node.meta = {k: v for k, v in source.meta.items() if k not in (MARKS, "from_node")}
    restored[source] = node
    return node
