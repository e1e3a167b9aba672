"""One wide product is faster than several narrow ones on the same input."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from fxopt import ops as reading
from fxopt import vocabulary as ops
from fxopt.delta import Delta, Record, Ref, graph_of, graphs
from fxopt.pattern import Match, Miss
from fxopt.shapes import infer
from fxopt.transformation import New, ReversibleTransformation, Site, erase


@dataclass(frozen=True)
class MergeLinears(ReversibleTransformation):
    """
    linear(x, W1, b1), linear(x, W2, b2), …  ->  split(linear(x, [W1; W2; …], [b1; b2; …]))

    Within rounding: the wide product may sum in another order.

    Also ``addmm`` with constant matrices, as GPT-2 has it.  Layers without a bias get zeros where others have one.
    What is returned by the graph, or written to in place, stays as it is: the parts share memory.
    """

    preserves_computation = True

    def transform(self, graph_module: GraphModule) -> None:
        for group in _groups(graph_module):
            mergeable = [m for m in group if isinstance(m, _Layer)]
            if len(mergeable) > 1:
                _merge(graph_module, mergeable)

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        for inner in graphs(gm).values():
            for group in _groups(inner):
                layers = [m for m in group if isinstance(m, _Layer)]
                yield from (m for m in group if isinstance(m, Miss))
                if len(layers) == 1:
                    yield Miss(layers[0].node, f"no other such layer reads {layers[0].source}")

    def carry(self, gm: GraphModule, rewrite: Delta) -> Mapping[str, torch.Tensor] | None:
        """The slices of the merged parameters; None if a layer without a bias was given one by training."""
        made = [p for p, (before, after) in rewrite.tensors().items() if before is None and after is not None]
        tensors = {p: t for p in made if (t := reading.constant(gm, reading.Attr(p))) is not None}
        weight = next((t for t in tensors.values() if t.dim() == 2), None)
        bias = next((t for t in tensors.values() if t.dim() == 1), None)
        found: dict[str, torch.Tensor] = {}
        start = 0
        for weight_path, bias_path, transposed in _removed(gm, rewrite):
            old = rewrite.slots[weight_path][0] if weight_path in rewrite.slots else None
            was = old.value if old is not None else reading.constant(gm, reading.Attr(weight_path))
            if was is None or weight is None:
                return None
            end = start + was.shape[1 if transposed else 0]
            part = weight[:, start:end] if transposed else weight[start:end]
            found[weight_path] = part.detach().clone()
            if bias_path is not None and bias is not None:
                found[bias_path] = bias[start:end].detach().clone()
            elif bias is not None and bool(bias[start:end].any()):
                return None
            start = end
        return found


@dataclass(frozen=True)
class _Layer:
    node: Node
    source: Node
    dialect: reading.Dialect
    transposed: bool  # addmm holds its weight as [inputs, outputs]
    weight: Any
    bias: Any

    @property
    def axis(self) -> int:
        return 1 if self.transposed else 0


def _groups(gm: GraphModule) -> list[list[_Layer | Miss]]:
    """The layers that read one input and could be one, in graph order; each that could not with the reason."""
    found: dict[Any, list[_Layer | Miss]] = {}
    for node in gm.graph.nodes:
        layer = _layer(gm, node)
        if isinstance(layer, Miss):
            found[node] = [layer]
        elif layer is not None:
            weight = reading.constant(gm, layer.weight)
            assert weight is not None
            key = (layer.source, layer.transposed, weight.dtype, weight.device, weight.shape[1 - layer.axis])
            group = found.setdefault(key, [])
            first = next((m for m in group if isinstance(m, _Layer)), None)
            group.append(layer if first is None else _unless_written(gm, first, layer))
    return list(found.values())


def _layer(gm: GraphModule, node: Node) -> _Layer | Miss | None:
    call, doubt = reading.read(gm, node), reading.unread(gm, node)
    if doubt is not None and doubt[0] in (ops.linear, ops.addmm):
        return Miss(node, doubt[1])
    if call is None or call.op not in (ops.linear, ops.addmm):
        return None
    said = call.arguments
    if call.op is ops.addmm:
        source, weight, bias = said["mat1"], said["mat2"], said["input"]
        if (said["beta"], said["alpha"]) != (1, 1):
            return Miss(node, f"it scales by beta={said['beta']}, alpha={said['alpha']}")
    else:
        source, weight, bias = said["input"], said["weight"], said["bias"]
    layer = _Layer(node, source, call.dialect, call.op is ops.addmm, weight, bias)
    reason = _unfit(gm, layer)
    return layer if reason is None else Miss(node, reason)


def _unfit(gm: GraphModule, layer: _Layer) -> str | None:
    weight, bias = reading.constant(gm, layer.weight), reading.constant(gm, layer.bias)
    if not isinstance(layer.source, Node):
        return "its input is a parameter"
    if weight is None or weight.dim() != 2 or weight.is_meta or weight.layout is not torch.strided:
        return "its weight is computed or holds no plain values, not a parameter of two dimensions"
    if layer.bias is not None and (bias is None or bias.shape != (weight.shape[layer.axis],)):
        return "its bias is computed or of another shape than its output"
    if bias is not None and (bias.dtype, bias.device) != (weight.dtype, weight.device):
        return f"its bias is {bias.dtype}, its weight {weight.dtype}"
    return _shared(gm, layer.node, layer.node)


def _shared(gm: GraphModule, node: Node, seen: Node) -> str | None:
    """Why ``node`` may not share memory with others: the graph returns it, or writes to it in place."""
    for user in seen.users:
        if user.op == "output":
            return "the graph returns it, and it would share memory with the others"
        if any(reading.may_alias(gm, w) is node for w in reading.writes(gm, user)):
            return f"{user} writes to it in place"
        if reading.may_alias(gm, user) is node and (reason := _shared(gm, node, user)) is not None:
            return reason
    return None


def _unless_written(gm: GraphModule, first: _Layer, layer: _Layer) -> _Layer | Miss:
    """``layer``, unless the input is written to in place between it and the first layer of its group."""
    base = reading.may_alias(gm, layer.source)
    node = first.node.next
    while node is not layer.node:
        if any(reading.may_alias(gm, w) is base for w in reading.writes(gm, node)):
            return Miss(layer.node, f"{node} writes in place to {layer.source} between it and {first.node}")
        node = node.next
    return layer


def _merge(gm: GraphModule, layers: Sequence[_Layer]) -> None:
    first = layers[0]
    at = Site(gm, Match(first.node, first.dialect, [m.node for m in layers]))
    weights = [t for m in layers if (t := at.tensor(m.weight)) is not None]
    biases = [at.tensor(m.bias) for m in layers]
    sizes = tuple(int(w.shape[first.axis]) for w in weights)
    with torch.no_grad():
        weight = torch.cat(weights, dim=first.axis)
        bias = _joined_bias(biases, weights, first.axis)
    paths = [at.path(m.weight) for m in layers]
    weight_path = _joined_path(paths)
    new_weight = New(nn.Parameter(weight, any(w.requires_grad for w in weights)), weight_path)
    trained = any(b.requires_grad for b in biases if b is not None)
    new_bias = None if bias is None else New(nn.Parameter(bias, trained), _bias_path(weight_path))
    if first.transposed:
        product = at.emit(ops.addmm, new_bias, first.source, new_weight)
    else:
        product = at.emit(ops.linear, first.source, new_weight, new_bias)
    known = first.node.meta.get("val")
    if "val" not in product.meta and isinstance(known, FakeTensor):  # the product is a module
        with known.fake_mode:
            product.meta["val"] = known.new_empty((*known.shape[:-1], sum(sizes)))
    parts = at.emit(ops.split, product, sizes, -1)
    for index, layer in enumerate(layers):
        part = _part(gm, parts, index, layer)
        layer.node.replace_all_uses_with(part)
    erase(gm, [m.node for m in layers])


def _part(gm: GraphModule, parts: Node, index: int, layer: _Layer) -> Node:
    """What takes the place of ``layer``; a copy where somebody views it in a way that only dense memory allows."""
    with gm.graph.inserting_before(layer.node):
        part = gm.graph.call_function(operator.getitem, (parts, index))
        part.meta = {k: v for k, v in layer.node.meta.items() if k not in ("val", "tensor_meta")}
        value = infer(gm, part)
        if value is not None:
            part.meta["val"] = value
        if not any(_needs_dense(gm, user, layer.node, value) for user in layer.node.users):
            return part
        dense = ops.contiguous.emit(gm.graph, layer.dialect, part)
        dense.meta = dict(layer.node.meta)
        return dense


def _needs_dense(gm: GraphModule, user: Node, node: Node, value: Any) -> bool:
    call = reading.read(gm, user)
    if call is None or call.op is not ops.view or call.arguments["input"] is not node:
        return False
    if not isinstance(value, FakeTensor):
        return True
    size = call.arguments["size"]
    known = [s.meta.get("val") if isinstance(s, Node) else s for s in size] if isinstance(size, tuple) else None
    if known is None or any(s is None for s in known):
        return True
    try:
        with value.fake_mode:
            value.view(known)
    except (RuntimeError, ValueError, TypeError):  # such a view would need another layout
        return True
    return False


def _joined_bias(
    biases: Sequence[torch.Tensor | None], weights: Sequence[torch.Tensor], axis: int
) -> torch.Tensor | None:
    if all(b is None for b in biases):
        return None
    filled = [w.new_zeros(w.shape[axis]) if b is None else b for b, w in zip(biases, weights, strict=True)]
    return torch.cat(filled)


def _joined_path(paths: Sequence[str]) -> str:
    """``a.query.weight`` and ``a.key.weight`` become ``a.query_key.weight``."""
    owners = [p.rpartition(".")[0] for p in paths]
    leaf = paths[0].rpartition(".")[2]
    if len(set(owners)) == 1:  # the parameters themselves stand side by side
        names = [p.rpartition(".")[2] for p in paths]
        joined = "_".join(dict.fromkeys(names)) if len(set(names)) > 1 else f"{leaf}_merged"
        return f"{owners[0]}.{joined}".lstrip(".")
    split = [o.split(".") for o in owners]
    common = [names[0] for names in itertools.takewhile(lambda n: len(set(n)) == 1, zip(*split, strict=False))]
    names = list(dict.fromkeys("_".join(s[len(common) :]) for s in split))
    return ".".join([*common, "_".join(n for n in names if n), leaf])


def _bias_path(weight_path: str) -> str:
    owner, _, leaf = weight_path.rpartition(".")
    return f"{owner}.bias" if leaf == "weight" else f"{owner}.{leaf}_bias".lstrip(".")


def _removed(gm: GraphModule, rewrite: Delta) -> Iterator[tuple[str, str | None, bool]]:
    """The paths of weight and bias of each merged layer in order, and whether the weight is transposed."""
    position = {k: i for before, _ in rewrite.orders.values() for i, k in enumerate(before)}
    removed = [k for k, (_, after) in rewrite.nodes.items() if after is None]
    for key in sorted(removed, key=lambda k: position.get(k, 0)):
        record = rewrite.nodes[key][0]
        assert record is not None
        prefix = f"{graph_of(key)}." if graph_of(key) else ""
        if record.op == "call_module":
            path = prefix + str(record.target)
            has_bias = f"{path}.bias" in rewrite.slots and rewrite.slots[f"{path}.bias"][0].value is not None  # type: ignore[union-attr]
            yield f"{path}.weight", f"{path}.bias" if has_bias else None, False
        elif record.op == "call_function":
            yield from _removed_call(gm, rewrite, key, record)


def _removed_call(gm: GraphModule, rewrite: Delta, key: str, record: Record) -> Iterator[tuple[str, str | None, bool]]:
    for meaning, spelling in reading.VOCABULARY.get(record.target, ()):
        bound = spelling.bind(record.args, record.kwargs) if meaning in (ops.linear, ops.addmm) else None
        if bound is None:
            continue
        names = ("mat2", "input") if meaning is ops.addmm else ("weight", "bias")
        weight, bias = (_target(gm, rewrite, key, bound.get(n)) for n in names)
        if weight is not None:
            yield weight, bias, meaning is ops.addmm


def _target(gm: GraphModule, rewrite: Delta, key: str, ref: Any) -> str | None:
    """The path that the node behind ``ref`` reads, whether it went with the rewrite or stayed."""
    if not isinstance(ref, Ref):
        return None
    graph = graph_of(key)
    name = f"{graph}::{ref.name}" if graph else ref.name
    prefix = f"{graph}." if graph else ""
    record = rewrite.nodes.get(name, (None, None))[0]
    if record is not None:
        return prefix + str(record.target)
    inner = graphs(gm)[graph]
    return next((prefix + str(n.target) for n in inner.graph.nodes if n.name == ref.name), None)
