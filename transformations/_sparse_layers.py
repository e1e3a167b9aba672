"""The layers whose weights can be made sparse: linear ones, in all spellings, and 2-d convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.pattern import AnyOf, Constant, OptionalTensor, Var
from fxopt.pattern import Tensor as AnyTensor
from fxopt.transformation import Site, Transformation, erase, sweep
from fxopt.transformations._constants import path_of, unfit

_X, _W, _B = AnyTensor("x"), Constant("weight"), OptionalTensor("bias")
_WINDOW = {n: Var(n) for n in ("stride", "padding", "dilation", "groups")}

LAYERS = AnyOf(
    (ops.linear(_X, _W, _B), {"op": ops.linear}),
    (ops.addmm(_B, _X, _W), {"op": ops.addmm}),
    (ops.mm(_X, _W), {"op": ops.mm, "bias": None}),
    (ops.conv2d(_X, _W, _B, **_WINDOW), {"op": ops.conv2d}),
)


@dataclass(frozen=True)
class Found:
    """A layer as it stands in a graph."""

    at: Site
    op: mechanism.Op
    x: Node
    weight: Any
    bias: Any | None
    window: dict[str, Any]  # of a convolution

    @classmethod
    def of(cls, at: Site, op: mechanism.Op, x: Node, weight: Any, bias: Any, **window: Any) -> Found:
        """What a match of `LAYERS` bound."""
        return cls(at, op, x, weight, bias, window)

    @property
    def name(self) -> str:
        """The layer's path, or that of its weight where it has none."""
        owner, _, last = path_of(self.weight).rpartition(".")
        return owner if last == "weight" and owner else path_of(self.weight)

    @property
    def transposed(self) -> bool:
        """Whether the weight is (in, out)."""
        return self.op in (ops.addmm, ops.mm)

    def tensor(self) -> Tensor:
        """The weight as a layer has it: (out, in), or (out, in / groups, height, width)."""
        held = self.at.tensor(self.weight)
        assert held is not None
        return held.detach().t() if self.transposed else held.detach()

    def refusal(self) -> str | None:
        """Why new parameters cannot take the weight's place; None if they can."""
        path, dimensions = path_of(self.weight), 4 if self.op is ops.conv2d else 2
        if (reason := unfit(self.at.gm, self.weight)) is not None:
            return reason
        held = self.at.tensor(self.weight)
        assert held is not None
        if held.dim() != dimensions or not held.dtype.is_floating_point:
            return f"{path} has shape {tuple(held.shape)} and type {held.dtype}, expected {dimensions} of floats"
        reader = _reader(self.at, held)
        return None if reader is None else f"{reader} reads {path} too, and the sparse one would be a copy"

    def dense(self) -> nn.Linear | nn.Conv2d:
        """The layer as a module of torch, on the same memory."""
        weight, bias = self.tensor(), None if self.bias is None else self.at.tensor(self.bias)
        layer: nn.Linear | nn.Conv2d
        if self.op is ops.conv2d:
            w = self.window
            inputs, features, kernel = (
                weight.shape[1] * w["groups"],
                weight.shape[0],
                (weight.shape[2], weight.shape[3]),
            )
            options = (w["stride"], w["padding"], w["dilation"], w["groups"], bias is not None)
            layer = nn.Conv2d(inputs, features, kernel, *options, device="meta")
        else:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.weight = nn.Parameter(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach())
        return layer

    def input_shape(self) -> tuple[int, ...] | None:
        """The shape of x as far as it is known, dynamic dimensions as they were at the capture."""
        value = self.at.value(self.x)
        if value is None:
            return None
        shape = tuple(_hint(n) for n in value.shape)
        return None if any(n is None for n in shape) else tuple(n for n in shape if n is not None)


def become(at: Site, new: Node, transformation: Transformation) -> None:
    """
    Let the layer's node itself be what `new` says, which was emitted for it.

    Whoever reads the layer stays as it was, so what is changed before and behind it remains a rewrite of its own.
    """
    node = at.root
    read = [n for n in node.all_input_nodes if n.op == "get_attr"]
    modules = {str(node.target)} if node.op == "call_module" else set()
    node.op, node.target, node.args, node.kwargs = new.op, new.target, new.args, new.kwargs
    at.gm.graph.erase_node(new)
    erase(at.gm, read)
    sweep(at.gm, modules)
    transformation.mark_as_transformed(node)  # a module that took another's place at its path leaves the node as it was


def _hint(size: Any) -> int | None:
    if isinstance(size, int):
        return size
    if isinstance(size, torch.SymInt) and size.node.hint is not None:
        return int(size.node.hint)
    return None


def _reader(at: Site, weight: Tensor) -> Node | None:
    """Another node than the layer that computes with the memory of `weight`."""
    storage, mine = weight.untyped_storage()._cdata, set(at.match.nodes)
    for node in at.gm.graph.nodes:
        if node.op == "get_attr":
            held = mechanism.constant(at.gm, node)
            if held is not None and _storage(held) == storage:
                others: list[Node] = [u for u in node.users if u not in mine]
                if others:
                    return others[0]
        elif node.op == "call_module" and node not in mine:
            module = mechanism.submodule(at.gm, str(node.target))
            if module is not None and any(_storage(p) == storage for p in module.parameters()):
                found: Node = node
                return found
    return None


def _storage(tensor: Tensor) -> int | None:
    if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return None
    return int(tensor.untyped_storage()._cdata)


def stem(path: str) -> str:
    """What the parameters beside a weight are named after: "fc." of "fc.weight", "fc.in_proj_" of "fc.in_proj"."""
    owner, dot, last = path.rpartition(".")
    return f"{owner}{dot}" if last == "weight" else f"{path}_"
