"""What returns its input unchanged need not be called."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt import ops
from fxopt import vocabulary as v
from fxopt.delta import graphs
from fxopt.ops import Call, Op
from fxopt.pattern import Match, Miss, value
from fxopt.transformation import ReversibleTransformation, Site, erase


@dataclass(frozen=True)
class EliminateNoOps(ReversibleTransformation):
    """
    x - 0, x * 1, x / 1, x ** 1, -(-x), x.to(x.dtype), x[:], x.transpose(a, b).transpose(a, b), …  ->  x
    x.view(a).view(b)  ->  x.view(b)

    Exact, for the shapes and dtypes that the graph was captured or propagated with.

    x + 0 makes 0.0 of -0.0: for floating-point tensors it stays unless ``signed_zeros`` is False.  What changes the
    dtype, the shape, the strides or the device stays (integers * 1.0); so does a copy that is written to, or that
    keeps an output from sharing memory with an input, a parameter or another output; and a detach that may stop a
    gradient.  ``asserts``: also remove the checks of dtypes and devices that `torch.export` puts before every cast.
    """

    asserts: bool = False
    signed_zeros: bool = True

    preserves_computation = True

    def transform(self, graph_module: GraphModule) -> None:
        memory = _Memory(graph_module)
        for node in list(graph_module.graph.nodes):
            if node._erased:
                continue
            call = ops.read(graph_module, node)
            if call is None:
                continue
            if call.op is v.assert_tensor_metadata:
                if self.asserts:
                    graph_module.graph.erase_node(node)
                continue
            if call.op in _VIEWS and isinstance(folded := _view_of_view(graph_module, node, call), Node):
                _replace(graph_module, node, folded)
            elif isinstance(same := self._same_as(graph_module, node, call, memory), Node):
                memory.merge(node, same)
                _replace(graph_module, node, same)

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """What would be a no-op, but for one thing."""
        for inner in graphs(gm).values():
            memory = _Memory(inner)
            for node in inner.graph.nodes:
                call = ops.read(inner, node)
                if call is None:
                    continue
                if call.op is v.assert_tensor_metadata:
                    if not self.asserts:
                        yield Miss(node, "checks a dtype or device; EliminateNoOps(asserts=True) removes it")
                elif isinstance(reason := self._same_as(inner, node, call, memory), str):
                    yield Miss(node, reason)

    def _same_as(self, gm: GraphModule, node: Node, call: Call, memory: "_Memory") -> Node | str | None:
        """The node whose value ``node`` has too; why it cannot stand for it; None where it has another value."""
        rule = _RULES.get(call.op)
        found = rule.source(gm, node, call) if rule is not None else None
        if rule is None or found is None or isinstance(found, str):
            return found
        if not isinstance(found, Node):
            return None
        if call.op is v.add and self.signed_zeros and (doubt := _signed_zero(gm, found, call)):
            return doubt
        if call.inplace and call.op is not v.detach:
            return f"{node} writes to {found} in place"
        if rule.compares and (differs := _differs(gm, node, found)) is not None:
            return differs or None
        fresh = rule.fresh or call.arguments.get("copy") is True
        return memory.hazard(node, found, fresh) or found


def _replace(gm: GraphModule, node: Node, by: Node) -> None:
    inputs = [n for n in node.all_input_nodes if n is not by]
    node.replace_all_uses_with(by)
    # What only led here goes too; anything else that nothing uses is left to EliminateDeadNodes.
    erase(gm, [node, *(n for n in inputs if (c := ops.read(gm, n)) is not None and c.op in _INVERSES | _VIEWS)])


# --- what a no-op is ------------------------------------------------------------------------------------------------

Source = Callable[[GraphModule, Node, Call], Any]  # the node with the same value; a reason why not; None: another value


@dataclass(frozen=True)
class _Rule:
    source: Source
    fresh: bool = False  # the result has memory of its own
    compares: bool = True  # the same only if shape, strides, dtype and device are


def _input(gm: GraphModule, node: Node, call: Call) -> Any:
    return call.arguments[call.op.parameters[0]]


def _neutral(number: float) -> Source:
    def source(gm: GraphModule, node: Node, call: Call) -> Any:
        first, second = call.op.parameters[:2]
        other = call.arguments[second]
        plain = isinstance(other, int | float) and not isinstance(other, bool) and other == number
        if not plain or any(call.arguments[n] != call.op.defaults[n] for n in call.op.parameters[2:]):
            return None
        return call.arguments[first]

    return source


def _subtracted(gm: GraphModule, node: Node, call: Call) -> Any:
    other = call.arguments["other"]
    if isinstance(other, float) and math.copysign(1.0, other) < 0:
        return None  # x - -0.0 is x + 0.0
    return _neutral(0)(gm, node, call)


def _signed_zero(gm: GraphModule, x: Node, call: Call) -> str | None:
    other, known = call.arguments["other"], value(gm, x)
    negative = isinstance(other, float) and math.copysign(1.0, other) < 0
    if negative or (known is not None and not known.is_floating_point() and not known.is_complex()):
        return None
    return f"{x} + 0 makes 0.0 of -0.0; EliminateNoOps(signed_zeros=False) removes it"


def _twice(gm: GraphModule, node: Node, call: Call) -> Any:
    """The x of op(op(x))."""
    inner = _inner(gm, call)
    return inner.arguments["input"] if inner is not None and inner.op is call.op else None


def _transposed(gm: GraphModule, node: Node, call: Call) -> Any:
    rank = _rank(gm, call.arguments["input"])
    order = _order(call, rank)
    if order is None:
        return None
    if order == tuple(range(len(order))):
        return call.arguments["input"]
    inner = _inner(gm, call)
    before = _order(inner, rank) if inner is not None else None
    if inner is None or before is None or tuple(before[i] for i in order) != tuple(range(len(order))):
        return None
    return inner.arguments["input"]


def _order(call: Call, rank: int | None) -> tuple[int, ...] | None:
    """The dimensions of the input in the order of the output."""
    if call.op is v.permute and all(isinstance(d, int) for d in call.arguments["dims"]):
        dims = call.arguments["dims"]
        return tuple(d % len(dims) for d in dims)
    if call.op is v.t and rank is not None:
        return tuple(reversed(range(rank)))
    if call.op is not v.transpose or not rank:
        return None
    order = list(range(rank))
    a, b = (call.arguments[n] % rank for n in ("dim0", "dim1"))
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def _squeezed(gm: GraphModule, node: Node, call: Call) -> Any:
    """The x of squeeze(unsqueeze(x, d), d); squeeze of what has no such dimension."""
    inner = _inner(gm, call)
    if inner is not None and inner.op is v.unsqueeze and call.arguments["dim"] == inner.arguments["dim"]:
        return inner.arguments["input"]
    return call.arguments["input"]


def _indexed(gm: GraphModule, node: Node, call: Call) -> Any:
    index = call.arguments["index"]
    steps = index if isinstance(index, tuple) else (index,)
    whole = all(i is Ellipsis or (isinstance(i, slice) and i.step in (None, 1)) for i in steps)
    return call.arguments["input"] if whole else None


def _only_one(gm: GraphModule, node: Node, call: Call) -> Any:
    tensors = call.arguments["tensors"]
    return tensors[0] if isinstance(tensors, tuple) and len(tensors) == 1 else None


def _unpadded(gm: GraphModule, node: Node, call: Call) -> Any:
    pad = call.arguments["pad"]
    return call.arguments["input"] if isinstance(pad, tuple) and all(type(p) is int and p == 0 for p in pad) else None


def _detached(gm: GraphModule, node: Node, call: Call) -> Any:
    x = call.arguments["input"]
    return x if _no_gradient(gm, x) else f"{node} may stop a gradient"


_RULES: dict[Op, _Rule] = {
    v.identity: _Rule(_input, compares=False),
    v.add: _Rule(_neutral(0), fresh=True),
    v.sub: _Rule(_subtracted, fresh=True),
    v.mul: _Rule(_neutral(1), fresh=True),
    v.div: _Rule(_neutral(1), fresh=True),
    v.pow: _Rule(_neutral(1), fresh=True),
    v.neg: _Rule(_twice, fresh=True),
    v.bitwise_not: _Rule(_twice, fresh=True),
    v.logical_not: _Rule(_twice, fresh=True),
    v.transpose: _Rule(_transposed),
    v.permute: _Rule(_transposed),
    v.t: _Rule(_transposed),
    v.squeeze: _Rule(_squeezed),
    v.getitem: _Rule(_indexed),
    v.cat: _Rule(_only_one, fresh=True),
    v.pad: _Rule(_unpadded, fresh=True),
    v.detach: _Rule(_detached, compares=False),
    v.clone: _Rule(_input, fresh=True),
    v.lift_fresh_copy: _Rule(_input, fresh=True),
    v.repeat: _Rule(_input, fresh=True),
    **{op: _Rule(_input) for op in (v.view, v.reshape, v.flatten, v.unflatten, v.expand, v.expand_as, v.slice)},
    **{op: _Rule(_input) for op in (v.narrow, v.contiguous, v.to, v.to_other, v.type_as)},
}
_INVERSES = {v.neg, v.bitwise_not, v.logical_not, v.transpose, v.permute, v.t, v.unsqueeze}
_VIEWS = {v.view, v.reshape}


def _inner(gm: GraphModule, call: Call) -> Call | None:
    """What computes the first argument."""
    x = call.arguments[call.op.parameters[0]]
    inner = ops.read(gm, x) if isinstance(x, Node) else None
    return None if inner is None or inner.inplace else inner


def _rank(gm: GraphModule, x: Any) -> int | None:
    known = value(gm, x)
    return None if known is None else known.dim()


def _differs(gm: GraphModule, node: Node, x: Node) -> str | None:
    """ "" where ``node`` has another shape, dtype, device or strides than ``x``; None where all are the same."""
    before, after = value(gm, x), value(gm, node)
    if before is None or after is None:
        unknown = x if before is None else node
        return f"the shape and dtype of {unknown} are not known; call fxopt.propagate(gm, inputs)"
    if before.dtype != after.dtype or before.device != after.device or before.layout != after.layout:
        return ""
    sizes = zip((*before.shape, *before.stride()), (*after.shape, *after.stride()), strict=False)
    same = before.dim() == after.dim() and all(statically_known_true(a == b) for a, b in sizes)
    return None if same else ""


def _no_gradient(gm: GraphModule, x: Any) -> bool:
    """Whether no gradient can flow into ``x``: integers, and what is computed from frozen constants alone."""
    waiting: list[Any] = [x]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        known = value(gm, node)
        if known is not None and not known.is_floating_point() and not known.is_complex():
            continue
        constant = ops.constant(gm, node)
        if constant is not None and not constant.requires_grad:
            continue
        if node.op not in ("call_function", "call_method") or ops.read(gm, node) is None or len(seen) > 100:
            return False
        waiting += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return True


def _view_of_view(gm: GraphModule, node: Node, call: Call) -> Node | None:
    """x.view(a).view(b) as x.view(b): neither copies, so both put the same elements in the same order."""
    inner = _inner(gm, call)
    if inner is None or inner.op is not v.view or call.inplace:
        return None
    size = call.arguments["size" if call.op is v.view else "shape"]
    at = Site(gm, Match(node, call.dialect))
    return at.emit(call.op, inner.arguments["input"], size)


# --- who shares memory with whom --------------------------------------------------------------------------------------


@dataclass
class _Memory:
    """Where each value's memory comes from, which memory is written to in place, and which is returned."""

    gm: GraphModule
    root: dict[Node, Node] = field(default_factory=dict)
    written: set[Node] = field(default_factory=set)
    returned: dict[Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.gm.graph.nodes:
            source = ops.shares(self.gm, node)
            self.root[node] = self.root[source] if isinstance(source, Node) else node
        for node in self.gm.graph.nodes:
            if written := ops.writes(self.gm, node):
                call = ops.read(self.gm, node)
                if call is None or call.op is not v.detach:  # detach_ leaves the values alone
                    self.written |= {self.root[n] for n in written}
        for node in self.gm.graph.output_node().all_input_nodes:
            self.returned[self.root[node]] = self.returned.get(self.root[node], 0) + 1

    def of(self, node: Node) -> Node:
        """Where the memory of ``node`` comes from; nodes made since share with their first input."""
        if node not in self.root:
            source = ops.shares(self.gm, node)
            return self.of(source) if isinstance(source, Node) else node
        root = self.root[node]
        while self.root[root] is not root:
            root = self.root[root]
        return root

    def hazard(self, node: Node, x: Node, fresh: bool) -> str | None:
        """Why ``x`` cannot stand for ``node``, whose memory is its own if ``fresh``."""
        if not fresh:
            return None
        mine, its = self.of(node), self.of(x)
        inputs = [self.of(n) for n in node.all_input_nodes]
        if not self.written.isdisjoint({mine, its, *inputs}):
            return f"{node} or {x} is written to in place"
        if not self.returned.get(mine):
            return None
        if its.op in ("placeholder", "get_attr"):
            return f"without {node} the output would share memory with {its}"
        return f"without {node} two outputs would share memory" if self.returned.get(its) else None

    def merge(self, node: Node, x: Node) -> None:
        """``x`` stands for ``node`` from now on."""
        mine, its = self.of(node), self.of(x)
        if mine is not its:
            self.returned[its] = self.returned.get(its, 0) + self.returned.pop(mine, 0)
            self.root[mine] = its
