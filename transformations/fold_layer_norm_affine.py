"""A linear layer can scale and shift its input by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxopt import ops as reading
from fxopt import vocabulary as ops
from fxopt.delta import graphs
from fxopt.pattern import Match, Miss
from fxopt.transformation import New, ReversibleTransformation, Site


@dataclass(frozen=True)
class FoldLayerNormAffine(ReversibleTransformation):
    """
    linear(layer_norm(x, g, b), W, c)  ->  linear(layer_norm(x), W * g, W @ b + c)

    Within rounding: the products are made in float64 and rounded once.

    Every user of the layer_norm must be a linear layer with a constant weight.  In training, the gradients go to the
    folded weight; the layer_norm has none of its own any more.
    """

    preserves_computation = True

    def transform(self, graph_module: GraphModule) -> None:
        for node in list(graph_module.graph.nodes):
            found = _find(graph_module, node)
            if isinstance(found, _Site):
                found.fold()

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        for inner in graphs(gm).values():
            for node in inner.graph.nodes:
                if isinstance(found := _find(inner, node), Miss):
                    yield found


@dataclass(frozen=True)
class _Site:
    gm: GraphModule
    norm: Node
    call: reading.Call
    linears: tuple[tuple[Node, reading.Call], ...]

    def fold(self) -> None:
        arguments = self.call.arguments
        scale = reading.constant(self.gm, arguments["weight"])
        shift = reading.constant(self.gm, arguments["bias"])
        at = Site(self.gm, Match(self.norm, self.call.dialect, [self.norm]))
        plain = at.emit(ops.layer_norm, arguments["input"], arguments["normalized_shape"], eps=arguments["eps"])
        if "val" in self.norm.meta:
            plain.meta["val"] = self.norm.meta["val"]
        for node, call in self.linears:
            self._fold_into(node, call, plain, scale, shift)
        at.replace(plain)

    def _fold_into(
        self, node: Node, call: reading.Call, plain: Node, scale: torch.Tensor | None, shift: torch.Tensor | None
    ) -> None:
        at = Site(self.gm, Match(node, call.dialect, [node]))
        weight, bias = at.tensor(call.arguments["weight"]), at.tensor(call.arguments["bias"])
        assert weight is not None
        with torch.no_grad():
            wide = weight.double()
            folded = wide if scale is None else wide * scale.double()
            moved = None if shift is None else wide @ shift.double()
            if moved is not None and bias is not None:
                moved = moved + bias.double()
        path = at.path(call.arguments["weight"])
        parameter = nn.Parameter(folded.to(weight.dtype), requires_grad=weight.requires_grad)
        new_bias: Any = call.arguments["bias"]
        if moved is not None:
            bias_path = f"{path.rpartition('.')[0]}.bias".lstrip(".") if bias is None else at.path(new_bias)
            trained = weight.requires_grad if bias is None else bias.requires_grad
            new_bias = New(nn.Parameter(moved.to(weight.dtype), requires_grad=trained), bias_path)
        at.replace(at.emit(ops.linear, plain, New(parameter, path), new_bias))


def _find(gm: GraphModule, node: Node) -> _Site | Miss | None:
    call = reading.read(gm, node)
    if call is None or call.op is not ops.layer_norm:
        return None
    arguments = call.arguments
    if arguments["weight"] is None and arguments["bias"] is None:
        return None
    for name in ("weight", "bias"):
        tensor = reading.constant(gm, arguments[name])
        if arguments[name] is not None and (tensor is None or tensor.is_meta):
            return Miss(node, f"its {name} is computed or holds no values, not a parameter")
    if len(arguments["normalized_shape"]) != 1:
        return Miss(node, f"it normalises {len(arguments['normalized_shape'])} dimensions; a linear layer reads one")
    linears = []
    for user in node.users:
        reason, read = _linear(gm, node, user)
        if read is None:
            return Miss(node, reason)
        linears.append((user, read))
    return _Site(gm, node, call, tuple(linears)) if linears else Miss(node, "nothing reads it")


def _linear(gm: GraphModule, norm: Node, user: Node) -> tuple[str, reading.Call | None]:
    call = reading.read(gm, user)
    if call is None or call.op is not ops.linear or call.arguments["input"] is not norm:
        return f"{user} reads it too, which is no linear layer with it as the input", None
    weight, bias = (reading.constant(gm, call.arguments[n]) for n in ("weight", "bias"))
    if weight is None or weight.is_meta or weight.dim() != 2:
        return f"the weight of {user} is computed or holds no values, not a parameter", None
    if call.arguments["bias"] is not None and bias is None:
        return f"the bias of {user} is computed, not a parameter", None
    if norm in (call.arguments["weight"], call.arguments["bias"]):
        return f"{user} reads it twice", None
    affine = reading.read(gm, norm)
    assert affine is not None
    scale = reading.constant(gm, affine.arguments["weight"])
    if scale is not None and (scale.dtype, scale.device) != (weight.dtype, weight.device):
        return f"{user} computes in {weight.dtype} on {weight.device}, the layer_norm in {scale.dtype}", None
    return "", call
