"""The scale of attention can stand in the weights of the query projection."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxopt import ops as reading
from fxopt import vocabulary as ops
from fxopt.delta import Delta, graphs
from fxopt.ops import VOCABULARY, Call
from fxopt.pattern import Match, Miss, value
from fxopt.transformation import New, ReversibleTransformation, Site, erase
from fxopt.transformations._constants import path_of, unfit

_PRODUCTS = (ops.matmul, ops.bmm)
_PROJECTIONS = {ops.linear: ("weight", "bias"), ops.addmm: ("mat2", "input")}
# What gives the multiple of its result for the multiple of its first argument.
_PROPORTIONAL = frozenset(
    {ops.view, ops.reshape, ops.flatten, ops.unflatten, ops.squeeze, ops.unsqueeze, ops.expand, ops.contiguous}
    | {ops.transpose, ops.permute, ops.t, ops.select, ops.slice, ops.narrow, ops.getitem, ops.chunk, ops.split}
    | {ops.clone, ops.neg}
)
_AFTER_SCORES = frozenset((ops.add, ops.masked_fill, ops.where, ops.to, ops.type_as))
_FAR = 64  # nodes between a projection and its scale


@dataclass(frozen=True)
class FoldAttentionScale(ReversibleTransformation):
    """
    linear(x, w, b) * s                  ->  linear(x, w * s, b * s)
    softmax(linear(x, w, b) @ k * s)     ->  softmax(linear(x, w * s, b * s) @ k)
    scaled_dot_product_attention(linear(x, w, b), k, v, scale=s)
                                         ->  scaled_dot_product_attention(linear(x, w * s, b * s), k, v, scale=1.0)

    Within rounding, exact where s is a power of two: the products are made in float64 and rounded once.

    Between the projection and the scale, reshapes, slices and rotary embeddings may stand: whatever is proportional to
    the projection, and read by nothing else.  Refuses a normalised query, a projection or weight that something else
    reads too, and weights that the scale would take out of their type's range.  The third form saves nothing by itself,
    so it is only rewritten with ``fused``.
    """

    fused: bool = False

    preserves_computation = True

    def transform(self, graph_module: GraphModule) -> None:
        for node in list(graph_module.graph.nodes):
            if not node._erased and isinstance(found := self._find(graph_module, node), _Scaled):
                found.fold()

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The scales of attention that stay, each with the reason."""
        for inner in graphs(gm).values():
            for node in inner.graph.nodes:
                if isinstance(found := self._find(inner, node), str):
                    yield Miss(node, found)

    def carry(self, gm: GraphModule, rewrite: Delta) -> Mapping[str, torch.Tensor] | None:
        """The weights and biases divided by the scale, which a product or quotient that went still says."""
        scales = [s for before, after in rewrite.nodes.values() if after is None and (s := _recorded(before))]
        if len(scales) != 1:
            return None
        found = {}
        for path, (before, after) in rewrite.tensors().items():
            now = reading.constant(gm, reading.Attr(path))
            if before is None or after is None or now is None or now.shape != before.shape:
                return None
            found[path] = (now.detach().double() / scales[0]).to(before.dtype)
        return found

    def _find(self, gm: GraphModule, node: Node) -> _Scaled | str | None:
        call = reading.read(gm, node)
        if call is None:
            return None
        if call.op is ops.scaled_dot_product_attention:
            return self._of_fused(gm, node, call)
        scale, scaled = _number(call), call.arguments[call.op.parameters[0]] if call.op.parameters else None
        if scale is None or not isinstance(scaled, Node):
            return None
        product = reading.read(gm, scaled)
        if product is not None and product.op in _PRODUCTS:
            if not _leads_to_softmax(gm, node):
                return None
            query, consumer = product.arguments["input"], scaled
        elif _leads_to_attention(gm, node):
            query, consumer = scaled, node
        else:
            return None
        if call.inplace:
            return f"{node} writes to {scaled} in place"
        others = [u for u in consumer.users if u is not node] if consumer is not node else []
        return f"{others[0]} reads {consumer} too" if others else _region(gm, query, node, consumer, scale)

    def _of_fused(self, gm: GraphModule, node: Node, call: Call) -> _Scaled | str | None:
        scale, query = call.arguments["scale"], call.arguments["query"]
        if scale is None:
            known = value(gm, query)
            width = None if known is None else known.shape[-1]
            if not isinstance(width, int) or width == 0:
                return f"the width of {query} is not known; call fxopt.propagate(gm, inputs)"
            scale = 1 / math.sqrt(width)
        if not isinstance(scale, int | float) or scale == 1:
            return None
        if not self.fused:
            return "the fused operator scales for nothing; FoldAttentionScale(fused=True) folds it all the same"
        return _region(gm, query, node, node, float(scale))


@dataclass(frozen=True)
class _Scaled:
    """A projection, what stands between it and ``consumer``, in order, and the ``scale`` that ``node`` applies."""

    gm: GraphModule
    projection: Node
    between: tuple[Node, ...]
    consumer: Node
    node: Node
    scale: float

    def fold(self) -> None:
        query = self._again(self._project())
        call = reading.read(self.gm, self.node)
        assert call is not None
        if call.op is ops.scaled_dot_product_attention:
            at = Site(self.gm, Match(self.node, call.dialect, [self.node]))
            at.replace(at.emit(call.op, **{**call.arguments, "query": query[self._query(call)], "scale": 1.0}))
        elif self.consumer is self.node:
            self.node.replace_all_uses_with(query[self._query(call)])
            self.gm.graph.erase_node(self.node)
        else:
            for old in self.consumer.all_input_nodes:
                if old in query:
                    self.consumer.replace_input_with(old, query[old])
            self.node.replace_all_uses_with(self.consumer)
            self.gm.graph.erase_node(self.node)
        erase(self.gm, [*self.between, self.projection])

    def _query(self, call: Call) -> Node:
        name = "query" if call.op is ops.scaled_dot_product_attention else call.op.parameters[0]
        query: Node = call.arguments[name]
        return query

    def _project(self) -> Node:
        """The scaled projection, beside the old one."""
        call = reading.read(self.gm, self.projection)
        assert call is not None
        at = Site(self.gm, Match(self.projection, call.dialect, [self.projection]))
        arguments = dict(call.arguments)
        for name in _PROJECTIONS[call.op]:
            tensor = at.tensor(arguments[name])
            if tensor is None:
                continue
            scaled = (tensor.detach().double() * self.scale).to(tensor.dtype)
            made = nn.Parameter(scaled, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else scaled
            arguments[name] = New(made, at.path(arguments[name]))
        new = at.emit(call.op, **arguments)
        if "val" in self.projection.meta:
            new.meta["val"] = self.projection.meta["val"]
        return new

    def _again(self, projected: Node) -> dict[Node, Node]:
        """What stands between, once more: all that the fold changes then hangs together, and is undone together."""
        copies = {self.projection: projected}
        for node in self.between:
            with self.gm.graph.inserting_before(node):
                copies[node] = self.gm.graph.node_copy(node, lambda n: copies.get(n, n))
        return copies


# --- where a scale is one of attention --------------------------------------------------------------------------------


def _number(call: Call) -> float | None:
    """The number that ``call`` multiplies by."""
    other = call.arguments.get("other")
    if isinstance(other, bool) or not isinstance(other, int | float) or not math.isfinite(other) or other in (0, 1):
        return None
    if call.op is ops.mul:
        return float(other)
    return 1 / other if call.op is ops.div and call.arguments["rounding_mode"] is None else None


def _recorded(record: Any) -> float | None:
    """The number that a node multiplied by, as far as its record says."""
    words = VOCABULARY.get(record.target) if record is not None and record.op != "call_module" else None
    numbers = [a for a in record.args if isinstance(a, int | float)] if words else []
    if not words or len(numbers) != 1 or words[0][0] not in (ops.mul, ops.div):
        return None
    return float(numbers[0]) if words[0][0] is ops.mul else 1 / numbers[0]


def _leads_to_softmax(gm: GraphModule, node: Node) -> bool:
    """Whether ``node`` becomes the scores of a softmax, perhaps masked or cast."""
    waiting, seen = [node], {node}
    while waiting and len(seen) < _FAR:
        for user in waiting.pop().users:
            call = reading.read(gm, user)
            if call is not None and call.op is ops.softmax:
                return True
            if call is not None and call.op in _AFTER_SCORES and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False


def _leads_to_attention(gm: GraphModule, node: Node) -> bool:
    """Whether ``node`` becomes the query of attention, perhaps reshaped or rotated."""
    waiting, seen = [node], {node}
    while waiting and len(seen) < _FAR:
        source = waiting.pop()
        for user in source.users:
            call = reading.read(gm, user)
            if call is None or user in seen:
                continue
            if call.op is ops.scaled_dot_product_attention and call.arguments["query"] is source:
                return True
            if call.op in _PRODUCTS and call.arguments["input"] is source and _leads_to_softmax(gm, user):
                return True
            if call.op in _PROPORTIONAL or call.op in (ops.mul, ops.add, ops.cat):
                seen.add(user)
                waiting.append(user)
    return False


# --- what is proportional to a projection -----------------------------------------------------------------------------


def _region(gm: GraphModule, query: Any, node: Node, consumer: Node, scale: float) -> _Scaled | str:
    found: dict[Node, None] = {}
    projection = _projection(gm, query, found)
    if isinstance(projection, str):
        return projection
    between = sorted(found)
    inside = {*found, projection, consumer}
    for inner in (projection, *between):
        if others := [u for u in inner.users if u not in inside]:
            return f"{others[0]} reads {inner} too"
    return _unfit(gm, projection, scale) or _Scaled(gm, projection, tuple(between), consumer, node, scale)


def _projection(gm: GraphModule, x: Any, found: dict[Node, None]) -> Node | str:
    """The projection that ``x`` is proportional to; ``found``: the nodes on the way."""
    call = reading.read(gm, x) if isinstance(x, Node) else None
    if call is None:
        return f"{x} is no multiple of a projection"
    if call.op in _PROJECTIONS:
        return x  # type: ignore[no-any-return]
    if call.inplace:
        return f"{x} writes in place"
    if len(found) > _FAR:
        return f"{x} is more than {_FAR} nodes from a projection"
    sources = _sources(gm, call, found)
    if isinstance(sources, str):
        return sources
    reached = {_projection(gm, source, found) for source in sources}
    reasons = [r for r in reached if isinstance(r, str)]
    if reasons or len(reached) != 1:
        return reasons[0] if reasons else f"{x} is a sum of several projections"
    found[x] = None
    return reached.pop()


def _sources(gm: GraphModule, call: Call, found: dict[Node, None]) -> tuple[Any, ...] | str:
    """The arguments of which ``call`` gives the multiple for the multiple of all of them."""
    arguments = call.arguments
    first = arguments[call.op.parameters[0]] if call.op.parameters else None
    if call.op in _PROPORTIONAL:
        return (first,)
    if call.op in (ops.add, ops.sub):
        return (first, arguments["other"])
    if call.op in (ops.cat, ops.stack) and isinstance(first, tuple):
        return first
    if call.op is ops.div and arguments["rounding_mode"] is None:
        return (first,)
    if call.op is ops.mul:
        factors = [x for x in (first, arguments["other"]) if isinstance(x, Node)]
        proportional = [x for x in factors if not isinstance(_projection(gm, x, dict(found)), str)]
        return (proportional[0],) if len(proportional) == 1 else f"{first} * {arguments['other']} is no multiple"
    return f"{call.op.name} is not proportional to its input"


def _unfit(gm: GraphModule, projection: Node, scale: float) -> str | None:
    """Why the parameters of ``projection`` cannot be scaled."""
    call = reading.read(gm, projection)
    assert call is not None
    if call.op is ops.addmm and (call.arguments["beta"] != 1 or call.arguments["alpha"] != 1):
        return f"{projection} scales by itself"
    at = Site(gm, Match(projection, call.dialect, [projection]))
    for name in _PROJECTIONS[call.op]:
        x = call.arguments[name]
        if x is None:
            continue
        if at.tensor(x) is None:
            return f"the {name} of {projection} is no parameter of the graph module"
        if reason := unfit(gm, x) or _read_elsewhere(at, x) or _overflows(at, x, scale):
            return reason
    return None


def _read_elsewhere(at: Site, x: Any) -> str | None:
    path, tensor = path_of(x), at.tensor(x)
    tied = [n for n, t in at.gm.named_parameters(remove_duplicate=False) if t is tensor and n != path]
    if tied:
        return f"{path} is {tied[0]} too"
    return None if at.free(path) == path else f"{path} is read elsewhere too"


def _overflows(at: Site, x: Any, scale: float) -> str | None:
    tensor = at.tensor(x)
    assert tensor is not None
    if not tensor.is_floating_point():
        return f"{path_of(x)} is {tensor.dtype}, expected a floating-point type"
    largest = float(tensor.detach().double().abs().max()) if tensor.numel() else 0.0
    limit = torch.finfo(tensor.dtype).max
    return f"{path_of(x)} * {scale} leaves the range of {tensor.dtype}" if largest * abs(scale) > limit else None
