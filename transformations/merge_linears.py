"""Linear layers that read one input are one linear layer."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.delta import Delta, graphs
from fxopt.ops import Attr, Call
from fxopt.pattern import Constant, Match, Miss
from fxopt.snapshot import Record, Ref, graph_of, node_key, path_in
from fxopt.transformation import New, ReversibleTransformation, Site, erase, sweep
from fxopt.transformations._constants import path_of, unfit
from fxopt.transformations._inference import relaid
from fxopt.transformations._memory import Memory, storage, value


@dataclass(frozen=True)
class MergeLinears(ReversibleTransformation):
    """
    linear(x, v, a), linear(x, w, b), ...  ->  split(linear(x, [v; w; ...], [a; b; ...]))

    Within rounding: a product with more columns may sum in another order.  Any number of layers, with or without bias
    (the missing ones become zeros), also as ``addmm`` and ``mm``, whose weights are (in, out).  Modules become a module
    named after all of them.  Refuses weights that are read elsewhere too (the merged weight is a copy), weights of
    different types or of which only some are trained, results that are written to in place or that a later ``view``
    needs in one piece of memory, and layers with a write to ``x`` between them.
    """

    preserves_computation = True

    def transform(self, graph_module: GraphModule) -> None:
        memory = _Reads(graph_module)
        for group in memory.groups():
            if isinstance(group, _Group):
                _merge(graph_module, group)

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The layers that share their input with another but are not merged, each with the reason."""
        for inner in graphs(gm).values():
            yield from (g for g in _Reads(inner).groups() if isinstance(g, Miss))

    def carry(self, gm: GraphModule, rewrite: Delta) -> Mapping[str, torch.Tensor] | None:
        """The slices of each merged weight and bias; None where a bias that a layer never had was trained."""
        found: dict[str, torch.Tensor] = {}
        for key, (before, after) in rewrite.nodes.items():
            if before is None or after is None:
                continue
            split = _created(rewrite, key, after.args[0] if after.args else None)
            merged = None if split is None else _created(rewrite, key, split.args[0])
            if split is None or merged is None:
                continue
            index, sizes = after.args[1], split.args[1]
            start, old, new = sum(sizes[:index]), _tensors(gm, rewrite, key, before), _tensors(gm, rewrite, key, merged)
            for dimensions, (_, whole) in new.items():
                path, former = old.get(dimensions, ("", None))
                axis = 0 if former is None else next(d for d in (0, 1) if former.shape[d] != whole.shape[d])
                part = whole.detach().narrow(axis, start, sizes[index]).clone()
                if former is None and bool(part.any()):
                    return None
                if former is not None:
                    found[path] = part
        return found


def _created(rewrite: Delta, key: str, ref: Any) -> Record | None:
    """The node behind ``ref`` as recorded, if the rewrite made it."""
    if not isinstance(ref, Ref):
        return None
    before, after = rewrite.nodes.get(node_key(graph_of(key), ref.name), (None, None))
    return after if before is None else None


def _tensors(gm: GraphModule, rewrite: Delta, key: str, record: Record) -> dict[int, tuple[str, torch.Tensor]]:
    """The weight (2) and the bias (1) of a recorded layer, as they are now or else as they were before."""
    graph, paths = graph_of(key), []
    if record.op == "call_module":
        paths = [path_in(graph, f"{record.target}.{name}") for name in ("weight", "bias")]
    for name in record.refs():
        before, after = rewrite.nodes.get(node_key(graph, name), (None, None))
        read = after or before
        if read is not None and read.op == "get_attr":
            paths.append(path_in(graph, str(read.target)))
    found = {}
    for path in paths:
        former, _ = rewrite.tensors().get(path, (None, None))
        tensor = former if former is not None else mechanism.constant(gm, Attr(path))
        if tensor is not None:
            found[tensor.dim()] = (path, tensor)
    return found


@dataclass(frozen=True)
class _Linear:
    """A layer: ``x @ weight.T + bias``, or for ``addmm`` and ``mm`` ``x @ weight + bias``."""

    node: Node
    x: Node
    weight: Any
    bias: Any | None
    transposed: bool  # the weight is (in, out)
    dialect: mechanism.Dialect


@dataclass(frozen=True)
class _Group:
    """Layers that can be merged, in graph order."""

    layers: tuple[_Linear, ...]
    sizes: tuple[int, ...]  # out features
    whole: Any  # the fake value of the merged layer, None if unknown
    parts: tuple[Any, ...]  # its parts, one for each layer
    relaid: dict[Node, Any]  # the values that lie otherwise in memory afterwards


def _layer(gm: GraphModule, node: Node) -> tuple[Node, _Linear | str] | None:
    """The input of ``node`` and the layer that it is, or why it cannot be merged; None if it is no layer."""
    call, kinds = mechanism.read(gm, node), (ops.linear, ops.addmm, ops.mm)
    if call is None or call.op not in kinds:
        doubt, x = mechanism.unread(gm, node), next(iter(node.all_input_nodes), None)
        return (x, doubt[1]) if doubt is not None and doubt[0] in kinds and x is not None else None
    x, weight, bias = _operands(call)
    constant = Constant("").accepts
    if not isinstance(x, Node):
        return None
    if not constant(weight) or not (bias is None or constant(bias)):
        return x, f"the weight or bias of {node} is computed, expected a parameter or buffer"
    if call.op is ops.addmm and (call.arguments["beta"] != 1 or call.arguments["alpha"] != 1):
        return x, f"{node} is scaled by beta={call.arguments['beta']} and alpha={call.arguments['alpha']}"
    return x, _Linear(node, x, weight, bias, call.op is not ops.linear, call.dialect)


def _operands(call: Call) -> tuple[Any, Any, Any]:
    a = call.arguments
    if call.op is ops.linear:
        return a["input"], a["weight"], a["bias"]
    return (a["mat1"], a["mat2"], a["input"]) if call.op is ops.addmm else (a["input"], a["mat2"], None)


class _Reads:
    """Who reads what in a graph, and the groups of layers that follows from it."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._memory = Memory(gm)
        effects = self._memory.effects.items()
        # an unknown function may change the mode that all after it is computed in; a module does not
        self._barriers = [self._memory.position[n] for n, e in effects if e.kind == "unknown" and n.op != "call_module"]
        self._readers: dict[int, set[Node]] = {}  # storage of a parameter -> the nodes that compute with it
        for node in gm.graph.nodes:
            held = mechanism.constant(gm, node)
            if held is not None:
                self._readers.setdefault(storage(held), set()).update(node.users)
            module = mechanism.submodule(gm, str(node.target)) if node.op == "call_module" else None
            for tensor in () if module is None else module.parameters():
                self._readers.setdefault(storage(tensor), set()).add(node)

    def groups(self) -> Iterator[_Group | Miss]:
        """The layers that can be merged, and those that share an input with another and cannot."""
        found: dict[Node, list[tuple[Node, _Linear | str]]] = {}
        for node in self._gm.graph.nodes:
            if (layer := _layer(self._gm, node)) is not None:
                found.setdefault(layer[0], []).append((node, layer[1]))
        for together in found.values():
            if len(together) > 1:
                yield from self._grouped(together)

    def _grouped(self, together: list[tuple[Node, _Linear | str]]) -> Iterator[_Group | Miss]:
        alike: dict[tuple[Any, ...], list[_Linear]] = {}
        for node, layer in together:
            reason = layer if isinstance(layer, str) else self._unfit(layer)
            if reason is not None:
                yield Miss(node, reason)
            elif isinstance(layer, _Linear):
                alike.setdefault(tuple(self._kind(layer).values()), []).append(layer)
        for members in alike.values():
            if len(members) > 1:
                yield from self._group(members)
            else:
                yield Miss(members[0].node, self._alone(members[0], [m[0] for m in alike.values() if m is not members]))

    def _unfit(self, layer: _Linear) -> str | None:
        """Why ``layer`` can be merged with no other."""
        node, weight = layer.node, mechanism.constant(self._gm, layer.weight)
        for part in (layer.weight, layer.bias):
            if part is not None and (reason := unfit(self._gm, part) or self._shared(node, part)):
                return reason
        assert weight is not None
        bias = mechanism.constant(self._gm, layer.bias)
        features = weight.shape[1 if layer.transposed else 0] if weight.dim() == 2 else None
        if features is None or (bias is not None and (bias.shape != (features,) or bias.dtype != weight.dtype)):
            return f"{path_of(layer.weight)} is no matrix, or the bias of {node} no vector of its type and size"
        if self._memory.last_write(node) > self._memory.position[node]:
            return f"{node} may be written to in place after it was computed; MakeOutOfPlace may help"
        return None

    def _unreadable(self, layer: _Linear) -> str | None:
        """Why the result of ``layer`` may not be a part of a larger tensor."""
        features = _size(self._gm, layer)
        whole = _fake_rows(value(layer.node), 2 * features)
        part = None if whole is None else whole[..., :features]
        result = relaid(self._gm, {layer.node: part}, self._memory.position)
        return result if isinstance(result, str) else None

    def _shared(self, node: Node, x: Any) -> str | None:
        tensor = mechanism.constant(self._gm, x)
        others = set() if tensor is None else self._readers.get(storage(tensor), set()) - {node}
        return f"{path_of(x)} is read by {min(others)} too, and the merged one would be a copy" if others else None

    def _kind(self, layer: _Linear) -> dict[str, Any]:
        """What has to be equal for two layers to be one."""
        weight, bias = (mechanism.constant(self._gm, v) for v in (layer.weight, layer.bias))
        assert weight is not None
        here = self._memory.position[layer.node]
        written = self._memory.written.get(self._memory.root(layer.x), ())
        return {
            "the orientation of their weights": layer.transposed,
            "type": weight.dtype,
            "device": weight.device,
            "size": weight.shape[0 if layer.transposed else 1],
            "whether they are parameters": isinstance(weight, nn.Parameter),
            "whether they are trained": (weight.requires_grad, (weight if bias is None else bias).requires_grad),
            "what their input is, which is written to between them": sum(w < here for w in written),
            "the mode they run in": sum(b < here for b in self._barriers),
        }

    def _alone(self, layer: _Linear, others: list[_Linear]) -> str:
        """Why ``layer`` was left alone, although others read the same input."""
        mine = self._kind(layer)
        for other in others:
            theirs = self._kind(other)
            differing = ", ".join(aspect for aspect, held in mine.items() if theirs[aspect] != held)
            return f"{layer.node} and {other.node} read one input, but differ in {differing}"
        return f"every other layer that reads {layer.x} stays"

    def _group(self, layers: list[_Linear]) -> Iterator[_Group | Miss]:
        sizes = tuple(_size(self._gm, layer) for layer in layers)
        whole = _fake_rows(value(layers[0].node), sum(sizes))
        parts = (None,) * len(sizes) if whole is None else tuple(whole.split(sizes, -1))
        changed = dict(zip((layer.node for layer in layers), parts, strict=True))
        result = relaid(self._gm, changed, self._memory.position)
        if not isinstance(result, str):
            yield _Group(tuple(layers), sizes, whole, parts, result)
            return
        reasons = [self._unreadable(layer) for layer in layers]
        left = [layer for layer, reason in zip(layers, reasons, strict=True) if reason is None]
        if len(left) == len(layers):  # they can only not all be parts of one
            yield Miss(layers[0].node, result)
            return
        for layer, reason in zip(layers, reasons, strict=True):
            if reason is not None:
                yield Miss(layer.node, reason)
        if len(left) > 1:
            yield from self._group(left)
        elif left:
            yield Miss(left[0].node, f"every other layer that reads {left[0].x} stays")


def _size(gm: GraphModule, layer: _Linear) -> int:
    """The out features of ``layer``."""
    weight = mechanism.constant(gm, layer.weight)
    assert weight is not None
    return int(weight.shape[1 if layer.transposed else 0])


def _fake_rows(held: Any, features: int) -> Any:
    """A fake value like ``held``, a layer's, but with another number of features; None if it is not known."""
    return held.new_empty((*held.shape[:-1], features)) if isinstance(held, FakeTensor) else None


def _merge(gm: GraphModule, group: _Group) -> None:
    layers = group.layers
    dialects = {layer.dialect for layer in layers}
    dialect = dialects.pop() if len(dialects) == 1 else "function"
    at = Site(gm, Match(layers[0].node, dialect, [layer.node for layer in layers]))
    weight, bias = _concatenated(gm, layers, group.sizes)
    weight_path, bias_path = _names([path_of(layer.weight) for layer in layers])
    new_weight = New(weight, weight_path)
    x, new_bias = layers[0].x, None if bias is None else New(bias, bias_path)
    if not layers[0].transposed:
        merged = at.emit(ops.linear, x, new_weight, new_bias)
    elif new_bias is None:
        merged = at.emit(ops.mm, x, new_weight)
    else:
        merged = at.emit(ops.addmm, new_bias, x, new_weight)
    _set_value(merged, group.whole)
    split = at.emit(ops.split, merged, group.sizes, -1)
    _set_value(split, group.parts if group.whole is not None else None)
    for node in (merged, split):
        _set_stack(node, layers)
    for i, layer in enumerate(layers):
        old = layer.node
        modules = {str(old.target)} if old.op == "call_module" else set()
        old.op, old.target, old.args, old.kwargs = "call_function", operator.getitem, (split, i), {}
        erase(gm, [n for n in (layer.weight, layer.bias) if isinstance(n, Node) and not n.users])
        sweep(gm, modules)
    for node, held in group.relaid.items():
        _set_value(node, held)


def _set_value(node: Node, held: Any) -> None:
    if held is not None:
        node.meta["val"] = held


def _set_stack(node: Node, layers: Sequence[_Linear]) -> None:
    """Of the modules that a layer comes from, those that all of them come from."""
    stacks = [layer.node.meta.get("nn_module_stack") or {} for layer in layers]
    if stacks[0]:
        node.meta["nn_module_stack"] = {k: v for k, v in stacks[0].items() if all(s.get(k) == v for s in stacks)}


def _concatenated(
    gm: GraphModule, layers: Sequence[_Linear], sizes: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The merged weight and bias, in the role that the first ones have."""
    weights = [mechanism.constant(gm, layer.weight) for layer in layers]
    biases = [mechanism.constant(gm, layer.bias) for layer in layers]
    first = weights[0]
    assert first is not None
    with torch.no_grad():
        weight = torch.cat([w for w in weights if w is not None], 1 if layers[0].transposed else 0)
        filled = [first.new_zeros(n) if b is None else b for b, n in zip(biases, sizes, strict=True)]
        bias = torch.cat(filled)
    trained = first.requires_grad
    bias_trained = next((b.requires_grad for b in biases if b is not None), False)
    if isinstance(first, nn.Parameter):
        weight, bias = nn.Parameter(weight, trained), nn.Parameter(bias, bias_trained)
    return weight, None if all(b is None for b in biases) else bias


def _names(paths: Sequence[str]) -> tuple[str, str]:
    """
    The paths of the merged weight and bias: the common owner, and all names joined.

    >>> _names(["h.0.attn.query.weight", "h.0.attn.key.weight"])
    ('h.0.attn.query_key.weight', 'h.0.attn.query_key.bias')
    """
    layered = all(p.endswith(".weight") for p in paths)
    bases = [(p.removesuffix(".weight") if layered else p).split(".") for p in paths]
    owners = zip(*(b[:-1] for b in bases), strict=False)
    shared = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, owners)]
    names = ["_".join(b[len(shared) :]) for b in bases]
    joined = "_".join(names) if len(names) <= 8 else f"{names[0]}_to_{names[-1]}"
    path = ".".join([*shared, joined])
    return (f"{path}.weight", f"{path}.bias") if layered else (path, f"{path}_bias")
