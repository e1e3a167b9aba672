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

# Products for each image. Below, the plain convolution is the faster one: packed takes 0.9 to 2.6 of its time at 2**21
# with one thread, and 0.7 to 0.97 at 2**23 and up; alone, with the layout changed and changed back, 0.9 to 2.0.
SMALLEST_CONVOLUTION = 2**22
_FURTHEST = 64  # nodes in which a convolution's neighbours are looked for

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
_CONVOLUTIONS = frozenset({ops.conv2d, ops.conv_relu, ops.packed_conv2d})
_TAKES_ANY = frozenset({ops.contiguous, ops.size})


@dataclass(frozen=True)
class PackWeights(Rewrite):
    """
    act(linear(x, W, b))         ->  packed_linear(x, W, b, act)
    act(conv2d(x, W, b) + other) ->  packed_conv2d(x, W, b, other, act)

    Within rounding: oneDNN sums in another order than MKL, and the tile unit of a CPU with AMX in one that loses less.

    For inference on the CPU, and the last pass of a pipeline: whatever reads linears must have gone before. The graph
    keeps its parameters; see `fxopt.kernels.packed`. A packed linear chooses at each call by the number of rows; a
    small weight, which gains by tiles alone, is packed where the input may have rows enough. Convolutions next to
    others are packed and compute channels last; their results go back to torch's layout where something else reads
    them.

    `measure=False` decides by size; `measure=True` times each size of linear here, now, with torch's present threads.
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
        wanted, writer = roots(self.pattern), _shared_write(graph_module)
        for node in reversed(list(graph_module.graph.nodes)):  # users first: an activation takes its product along
            call = None if node._erased else reading.read(graph_module, node)
            if call is None or call.op not in wanted:
                continue
            found = self._at(graph_module, node)
            if isinstance(found, Site) and not (writer and "stride" in found.match.bindings):
                found.replace(self.rewrite(found, **found.match.bindings))
        _restore_layouts(graph_module)

    def concerns(self, gm: GraphModule, node: Node, op: reading.Op) -> bool:
        """The linears and convolutions; what follows one is not packed for its own sake."""
        return op in roots(_PRODUCT)

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The linears and convolutions that stay as they are, each with the reason."""
        for inner in graphs(gm).values():
            writer = _shared_write(inner)
            for node in inner.graph.nodes:
                op, doubt = reading.operation(inner, node)
                if op is None or not self.concerns(inner, node, op):
                    continue
                if doubt is not None:
                    yield Miss(node, doubt)
                elif miss := self._miss(inner, op, node, writer):
                    yield miss

    def _miss(self, gm: GraphModule, op: reading.Op, node: Node, writer: Node | None) -> Miss | None:
        terms = [t for t in zip(_PRODUCT.terms, _PRODUCT.binds, strict=True) if op in roots(t[0])]
        found = match(gm, AnyOf(*terms), node)
        if isinstance(found, Miss):
            return found
        reason = self.check(Site(gm, found), **found.bindings)
        if reason is None and writer is not None and op in _CONVOLUTIONS:
            reason = f"{writer} writes in place to images that others read"
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
        if self._rows(at, weight, bound) is None:
            return f"{at.path(bound['weight'])} has {weight.numel()} elements; packing gains nothing"
        return None

    def _rows(self, at: Site, weight: Value, bound: dict[str, Any]) -> tuple[int, int] | None:
        """The rows for which to pack; (0, 0) for what the operator knows to be best; None for never."""
        features, inputs = reversed(weight.shape) if bound["transposed"] else weight.shape
        if self.measure:
            return measured_rows(features, inputs, bound.get("activation", "none"), torch.get_num_threads())
        pays = any(packed.rows(features, inputs, threads) for threads in (1, 2))
        pays = pays or packed.tiles_pay(weight.numel(), _most_rows(at.value(bound["x"])))
        return (0, 0) if pays else None

    def rewrite(self, at: Site, **bound: Any) -> Node:
        x, weight, bias = bound["x"], bound["weight"], bound["bias"]
        activation = bound.get("activation", "none")
        if "stride" in bound:
            window = [list(bound[k]) for k in ("stride", "padding", "dilation")]
            return at.emit(ops.packed_conv2d, x, weight, bias, bound.get("other"), *window, bound["groups"], activation)
        tensor = at.tensor(weight)
        assert tensor is not None
        between = self._rows(at, tensor, bound)
        assert between is not None
        y = at.emit(ops.packed_linear, x, weight, bias, activation, bound["transposed"], *between)
        return at.emit(ops.view, y, bound["shape"]) if bound.get("shape") is not None else y


def _most_rows(x: Value | None) -> int:
    """The rows that an input may have: those that the capture saw, any number where sequences have no fixed size."""
    if x is None:
        return 0
    rows = 1
    for n in x.shape[:-1]:
        seen = n if isinstance(n, int) else n.node.hint
        rows *= seen if isinstance(seen, int) else 0
    return rows if x.dim() < 3 or all(isinstance(n, int) for n in x.shape) else packed.ALL_ROWS


@functools.cache
def measured_rows(features: int, inputs: int, activation: str, threads: int) -> tuple[int, int] | None:
    """
    The rows for which packing a weight of this size pays, by timing both ways here with `threads` threads.

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
    return best[0], packed.ALL_ROWS if best[-1] == _MEASURED_ROWS[-1] else best[-1]


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
        torch.ops.fxopt.packed_linear.default(x, weight, bias, activation, False, 1, packed.ALL_ROWS)

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
    if not _has_neighbour(at.gm, at.root, bound["x"]):
        return f"{at.root} stands alone: to change the layout and back costs more than packing gains"
    if (other := bound.get("other")) is not None and not _same_shape(y, at.value(other)):
        return f"{other} is spread over the sum"
    return None


def _has_neighbour(gm: GraphModule, root: Node, x: Any) -> bool:
    """Whether the layout in which ``root`` computes is used before it or after it by another convolution."""
    before, after = [x] if isinstance(x, Node) else [], list(root.users)
    seen: set[Node] = set()
    while (before or after) and len(seen) < _FURTHEST:
        forward = not before
        node = (after if forward else before).pop()
        call = reading.read(gm, node)
        if node in seen or call is None:
            continue
        seen.add(node)
        if call.op in _CONVOLUTIONS:
            return True
        if call.op in _FOLLOWS and forward:
            after.extend(node.users)
        elif call.op in _FOLLOWS:
            before.extend(node.all_input_nodes)
    return False


def _area(y: Value) -> int:
    """Pixels of an image; those of a side that is not fixed count as 32."""
    sides = [n if isinstance(n, int) else 32 for n in y.shape[2:]]
    return sides[0] * sides[1]


def _same_shape(a: Value, b: Value | None) -> bool:
    if b is None or b.dim() != a.dim() or b.dtype != a.dtype:
        return False
    return all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))


def _shared_write(gm: GraphModule) -> Node | None:
    """
    A node that writes to an image's memory which another node reads.

    Where layouts are put back by a copy, the other one would not see the write.
    """
    nodes: list[Node] = list(gm.graph.nodes)
    for node in nodes:
        for written in reading.writes(gm, node):
            base = reading.may_alias(gm, written)
            val = base.meta.get("val")
            if base.op in ("get_attr", "placeholder") or (isinstance(val, Value) and val.dim() != 4):
                continue
            source = written
            while len(source.users) == 1 and source is not base:
                source = source.all_input_nodes[0]
            if len(source.users) > 1:
                return node
    return None


def _restore_layouts(gm: GraphModule) -> None:
    """Put what packed convolutions leave channels last back into torch's layout, where something else reads it."""
    last: set[Node] = set()
    restored: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        call = reading.read(gm, node)
        sources = [n for n in node.all_input_nodes if n in last]
        if call is not None and (call.op is ops.packed_conv2d or (sources and call.op in _FOLLOWS | _CONVOLUTIONS)):
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
