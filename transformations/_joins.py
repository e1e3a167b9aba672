"""Concatenations whose operands can be dropped: the consumer's columns go with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxopt import ops
from fxopt import vocabulary as words
from fxopt.transformations._memory import fixed, value

_POINTWISE = frozenset({words.relu, words.gelu, words.silu, words.tanh, words.sigmoid, words.dropout, words.clone})
_POINTWISE |= {words.contiguous, words.identity, words.leaky_relu, words.elu, words.hardswish, words.relu6}


@dataclass(frozen=True)
class Join:
    """
    A concatenation along the axis that its consumers mix, with what lies between.

    ``consumers`` are linear layers and convolutions; ``norms`` batch norms on the way, whose channels go too.
    """

    node: Node
    parts: tuple[Node, ...]
    sizes: tuple[int, ...]
    consumers: tuple[Node, ...]
    norms: tuple[Node, ...]


def join(gm: GraphModule, node: Node) -> Join | str:
    """The concatenation at ``node``, or why none of its operands can be dropped."""
    call = ops.read(gm, node)
    assert call is not None
    assert call.op is words.cat
    parts = call.arguments["tensors"]
    held = [value(p) for p in parts]
    if not all(isinstance(p, Node) and isinstance(h, torch.Tensor) for p, h in zip(parts, held, strict=True)):
        return f"the shapes at {node} are not known"
    axis = call.arguments["dim"] % held[0].dim()
    sizes = tuple(s for h in held if (s := fixed(h.shape[axis])) is not None)
    if len(sizes) < len(held):
        return f"{node} joins along an axis of unknown size"
    consumers: list[Node] = []
    norms: list[Node] = []
    reason = _follow(gm, node, axis - held[0].dim(), held[0].dim(), consumers, norms)
    return Join(node, tuple(parts), sizes, tuple(consumers), tuple(norms)) if reason is None else reason


def _follow(gm: GraphModule, node: Node, axis: int, dims: int, consumers: list[Node], norms: list[Node]) -> str | None:
    """Collect what mixes ``axis``, counted from the end, of the value of ``node``; or say who else reads it."""
    for user in node.users:
        call = ops.read(gm, user)
        if call is None or call.inplace or user.op == "output":
            return f"{user} reads {node}"
        if call.op is words.assert_tensor_metadata:
            continue
        if call.op in _POINTWISE or (call.op is words.batch_norm and axis == 1 - dims):
            norms += [user] if call.op is words.batch_norm else []
            reason = _follow(gm, user, axis, dims, consumers, norms)
            if reason is not None:
                return reason
        elif _mixes(gm, call, node) == axis:
            consumers.append(user)
        else:
            return f"{user} reads {node}"
    return None


def _mixes(gm: GraphModule, call: ops.Call, x: Node) -> int | None:
    """The axis of ``x``, counted from the end, that a layer with its own weight mixes."""
    a: dict[str, Any] = call.arguments
    if call.op is words.linear and a["input"] is x and ops.constant(gm, a["weight"]) is not None:
        return -1
    if call.op is words.addmm and a["mat1"] is x and ops.constant(gm, a["mat2"]) is not None:
        return -1
    if call.op is words.mm and a["input"] is x and ops.constant(gm, a["mat2"]) is not None:
        return -1
    convolutions = {words.conv1d: -2, words.conv2d: -3, words.conv3d: -4}
    if call.op in convolutions and a["input"] is x and a["groups"] == 1:
        return convolutions[call.op] if ops.constant(gm, a["weight"]) is not None else None
    return None
