"""Writing a node anew with other arguments or parameters, whichever dialect it is in."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxopt import ops
from fxopt.shapes import infer
from fxopt.transformation import exists, register, set_submodule, sweep
from fxopt.transformations._constants import path_of
from fxopt.transformations._memory import value


def restate(gm: GraphModule, node: Node, changes: Mapping[str, Any]) -> None:
    """
    Give ``node`` other arguments of its operation: plain values, or new tensors for its parameters.

    A parameter that others read too is left to them, and the new one stands beside it.
    """
    call = ops.read(gm, node)
    assert call is not None
    tensors = {n: v for n, v in changes.items() if isinstance(v, torch.Tensor)}
    plain = {n: v for n, v in changes.items() if n not in tensors}
    if call.dialect == "module":
        _restate_module(gm, node, call, tensors, plain)
        return
    arguments = {**call.arguments, **plain}
    for name, tensor in tensors.items():
        arguments[name] = _reader(gm, node, call.arguments[name], tensor)
    respell(gm, node, call, arguments)


def respell(gm: GraphModule, node: Node, call: ops.Call, arguments: Mapping[str, Any]) -> None:
    """Write ``arguments`` into ``node``, which keeps its name and place."""
    with gm.graph.inserting_before(node):
        new = call.op.emit(gm.graph, call.dialect, **arguments)
    node.op, node.target, node.args, node.kwargs = new.op, new.target, new.args, new.kwargs
    gm.graph.erase_node(new)


def _reader(gm: GraphModule, node: Node, old: Any, tensor: torch.Tensor) -> Node:
    """A ``get_attr`` node of ``tensor`` for ``node`` alone, in place of ``old``."""
    path, held = path_of(old), ops.constant(gm, old)
    others = [n for n in gm.graph.find_nodes(op="get_attr") if ops.constant(gm, n) is held and set(n.users) - {node}]
    place = path if not others else _beside(gm, path)
    register(gm, place, as_parameter(tensor, held))
    if not others and isinstance(old, Node):
        refresh(gm, [old])
        return old
    with gm.graph.inserting_before(node):
        new = gm.graph.get_attr(place)
    refresh(gm, [new])
    return new


def as_parameter(tensor: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """``tensor`` in the role of ``like``: a parameter that is trained if that one is, or a buffer."""
    tensor = tensor.detach().contiguous()
    return nn.Parameter(tensor, like.requires_grad) if isinstance(like, nn.Parameter) else tensor


def _beside(gm: GraphModule, path: str) -> str:
    return next(p for i in range(1, 1_000_000) if not exists(gm, p := f"{path}_{i}"))


def _restate_module(
    gm: GraphModule, node: Node, call: ops.Call, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]
) -> None:
    path = str(node.target)
    calls = [n for n in gm.graph.find_nodes(op="call_module") if n.target == path]
    held: Any = gm.get_submodule(path)
    module = with_tensors(held, {n: as_parameter(t, getattr(held, n)) for n, t in tensors.items()}, plain)
    place = path if len(calls) == 1 else _beside(gm, path)
    set_submodule(gm, place, module)
    node.target = place


def with_tensors(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, Any] | None = None
) -> nn.Module:
    """A copy of a layer with other parameters or buffers, and the sizes that it tells put right."""
    new: Any = copy.copy(module)
    new._parameters, new._buffers = dict(module._parameters), dict(module._buffers)
    for name, tensor in tensors.items():
        (new._parameters if name in new._parameters else new._buffers)[name] = tensor
    for name, said in (attributes or {}).items():
        setattr(new, name, said)
    _tell_sizes(new)
    return new  # type: ignore[no-any-return]


def _tell_sizes(module: Any) -> None:
    weight = module._parameters.get("weight")
    if weight is None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.num_features = len(module.running_mean)
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups > 1:  # depthwise: a group for every channel
            module.groups = weight.shape[0]
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = len(weight)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape


def refresh(gm: GraphModule, nodes: Iterable[Node]) -> None:
    """Work out anew what the graph says about the values of ``nodes``, which are in graph order."""
    for node in nodes:
        if node.op == "get_attr":
            held, mode = ops.constant(gm, node), _mode(gm)
            if held is not None and mode is not None:
                node.meta["val"] = mode.from_tensor(held, static_shapes=True)
        elif node.op == "call_module":
            _infer_module(gm, node)
        elif (new := infer(gm, node)) is not None:
            node.meta["val"] = new
        elif "val" in node.meta:
            del node.meta["val"]


def _infer_module(gm: GraphModule, node: Node) -> None:
    from fxopt.transformations._inference import inferred

    call = ops.read(gm, node)
    new = inferred(gm, node) if call is not None else None
    if new is not None:
        node.meta["val"] = new
    else:
        node.meta.pop("val", None)


def _mode(gm: GraphModule) -> Any:
    for node in gm.graph.nodes:
        held = value(node)
        if (mode := getattr(held, "fake_mode", None)) is not None:
            return mode
    return None


def _held(gm: GraphModule, path: str) -> list[torch.Tensor]:
    """The tensors of a module, or the one tensor, at ``path``."""
    module = ops.submodule(gm, path)
    if module is not None:
        return [*module.parameters(), *module.buffers()]
    held = ops.constant(gm, ops.Attr(path))
    return [] if held is None else [held]


def bury(gm: GraphModule, node: Node) -> None:
    """Erase ``node``, which nobody uses, and all that nobody uses without it, with the parameters that it read."""
    from fxopt.transformations._flow import is_check, removable

    waiting, paths = [node], set()
    while waiting:
        node = waiting.pop()
        if node._erased:
            continue
        checks = [u for u in node.users if is_check(gm, u)]
        if len(checks) < len(node.users) or not removable(gm, node):
            continue
        for check in checks:
            gm.graph.erase_node(check)
        if node.op in ("get_attr", "call_module"):
            paths.add(str(node.target))
        waiting += node.all_input_nodes
        gm.graph.erase_node(node)
    unread = [n for n in gm.graph.find_nodes(op="get_attr") if not n.users]
    tensors = {id(t) for p in paths for t in _held(gm, p)}
    for other in unread:  # the same tensor by another name
        if id(ops.constant(gm, other)) in tensors:
            paths.add(str(other.target))
            gm.graph.erase_node(other)
    sweep(gm, paths)
