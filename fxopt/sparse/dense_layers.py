"""The dense layers of a model, or of a graph, whose weights can become sparse, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.errors import UsageError
from fxopt.kernels.unstructured_weight import SparseWeight, check_initialized

COMPUTED = "its weight is computed (a parametrization, torch.nn.utils.prune); make it permanent first"
SPARSE_NODE = "it is sparse already, and in a graph its pattern stays"

_WEIGHTS = {ops.linear: "weight", ops.conv2d: "weight", ops.addmm: "mat2", ops.mm: "mat2"}
"""The operand of each operation that can be pruned."""

_TURNED = (ops.addmm, ops.mm)
"""Those whose weights are (in, out)."""


@dataclass(frozen=True)
class Dense:
    """A weight: the parameter `attribute` of `owner`, which is (in, out) where `turned`."""

    owner: nn.Module
    attribute: str
    turned: bool = False

    @property
    def weight(self) -> Tensor:
        """The parameter itself, as its layer has it (out, in, …)."""
        held = self.owner._parameters.get(self.attribute)
        if held is None:
            kind = type(self.owner).__name__
            raise UsageError(f"a {kind} has no parameter {self.attribute!r} any more; make the Pruner anew")
        return held.t() if self.turned else held


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' linear layer with a weight (in, out)."""
    return type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).dim() == 2


def prunable(model: nn.Module) -> tuple[dict[str, Dense | SparseWeight], dict[str, str]]:
    """The layers whose weights can be pruned in place, by name, and why others cannot."""
    layers: dict[str, Dense | SparseWeight] = {}
    left: dict[str, str] = {}
    others = Memory()
    for name, module in model.named_modules():
        check_initialized(module)
        if isinstance(module, SparseWeight):
            layers[name] = module
        elif isinstance(module, GraphModule):
            _read(name, module, layers, left, others)
        elif isinstance(module, nn.Linear | nn.Conv2d) or is_conv1d(module):
            layers[name] = Dense(module, "weight", is_conv1d(module))
        elif type(module) is not nn.Module:  # of which a captured graph makes holders that compute nothing
            for held in module._parameters.values():
                others.add(held, f"{name or 'the model'} ({type(module).__name__})")
    seen: set[int] = set()
    for name, layer in list(layers.items()):
        if isinstance(layer, SparseWeight):
            continue
        reason = _unprunable(layer, others)
        if reason is not None:
            left[name] = reason
        if reason is not None or id(layer.owner._parameters[layer.attribute]) in seen:  # tied: pruned once
            del layers[name]
        else:
            seen.add(id(layer.owner._parameters[layer.attribute]))
    return layers, left


def _unprunable(layer: Dense, others: Memory) -> str | None:
    held = layer.owner._parameters.get(layer.attribute)
    if held is None:
        return COMPUTED
    if held.is_meta:
        return "its weight is on the meta device, which holds no numbers; load it first"
    if not held.is_floating_point() or held.layout is not torch.strided:
        return f"its weight is {held.dtype}, {held.layout}; expected dense floating-point numbers"
    user = others.user(held)
    return None if user is None else f"its weight is used by {user} too"


def _read(
    name: str, gm: GraphModule, layers: dict[str, Dense | SparseWeight], left: dict[str, str], others: Memory
) -> None:
    """Add what the nodes of a graph compute with; modules that it calls are read as such."""
    taken: set[tuple[Node, Node]] = set()  # weights and the layers that read them
    for node in gm.graph.nodes:
        call = None if node.op == "call_module" else mechanism.read(gm, node)
        if call is not None and call.op in (ops.sparse_linear, ops.sparse_conv2d):
            left[_joined(name, str(node.name))] = SPARSE_NODE
        if call is None or call.op not in _WEIGHTS:
            continue
        read = call.arguments[_WEIGHTS[call.op]]
        if not isinstance(read, Node) or not isinstance(mechanism.constant(gm, read), nn.Parameter):
            continue
        taken.add((read, node))
        path = str(read.target)
        owner, _, attribute = path.rpartition(".")
        module = gm.get_submodule(owner)
        layer = owner if attribute == "weight" and owner else path
        layers.setdefault(_joined(name, layer), Dense(module, attribute, call.op in _TURNED))
    for read in gm.graph.find_nodes(op="get_attr"):
        for user in read.users:
            if (read, user) not in taken:
                others.add(mechanism.constant(gm, read), f"the node {user}")


def _joined(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


class Memory:
    """Who uses which memory: tensors are told apart by where they lie, not by which object they are."""

    def __init__(self) -> None:
        self._parts: dict[int, list[tuple[int, int, str]]] = {}

    def add(self, tensor: Tensor | None, user: str) -> None:
        """Note that `user` computes with `tensor`."""
        if tensor is not None:
            storage, start, end = _extent(tensor)
            self._parts.setdefault(storage, []).append((start, end, user))

    def user(self, tensor: Tensor, but: str | None = None) -> str | None:
        """Whoever uses a part of the memory of `tensor`, other than `but`."""
        storage, start, end = _extent(tensor)
        users = (u for first, last, u in self._parts.get(storage, ()) if first < end and start < last)
        return next((u for u in users if u != but), None)


def _extent(tensor: Tensor) -> tuple[int, int, int]:
    """The storage of `tensor`, and the bytes in it between which its elements lie."""
    if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return id(tensor), 0, 1
    reach = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    end = start + (reach + 1) * tensor.element_size() if tensor.numel() else start
    return int(tensor.untyped_storage()._cdata), start, end


def holders(model: nn.Module) -> Memory:
    """Which module of `model` holds which parameter."""
    found = Memory()
    for name, module in model.named_modules():
        for held in module._parameters.values():
            found.add(held, name)
    return found


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Where a module keeps its hooks."""


def hooks(layer: nn.Module) -> Iterator[str]:
    """The kinds of hooks that a layer and its parameters have, and that another layer in its place would not."""
    yield from (name for name in HOOKS if getattr(layer, name))
    for held in layer._parameters.values():
        if held is not None:
            yield from (n for n in ("_backward_hooks", "_post_accumulate_grad_hooks") if getattr(held, n, None))
