"""Parameters and buffers as operands of a rewrite: whether their content may be computed with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxopt import ops


def path_of(x: Any) -> str:
    """The path of the parameter or buffer that ``x``, a ``get_attr`` node or an attribute, stands for."""
    return x.path if isinstance(x, ops.Attr) else str(x.target)


def unfit(gm: GraphModule, x: Any) -> str | None:
    """
    Why new parameters cannot be computed from the parameter or buffer ``x``; None if they can.

    It has to hold values (no meta or fake tensor), to be dense, of a plain tensor type, and must not be written to by
    the graph itself.
    """
    path, tensor = path_of(x), ops.constant(gm, x)
    if tensor is None:
        return f"{path} is no tensor"
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return f"{path} is a {type(tensor).__name__}, expected a plain tensor"
    if tensor.is_meta:
        return f"{path} is on the meta device, without values; load the weights first"
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return f"{path} has layout {tensor.layout}{', quantized' * tensor.is_quantized}, expected dense"
    writer = _writer(gm, path)
    return None if writer is None else f"{writer} writes to {path} in place"


def _writer(gm: GraphModule, path: str) -> Node | None:
    """The first node found that writes to what stands at ``path``, or to a view of it."""
    waiting: list[Node] = list(gm.graph.find_nodes(op="get_attr", target=path))
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if node in ops.writes(gm, user):
                return user
            if ops.shares(gm, user) is node:
                waiting.append(user)
    return None
