"""The way back for a whole model: each sparse layer as the dense one that computes the same."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import nn

from fxopt.errors import UsageError
from fxopt.kernels.unstructured_weight import SparseWeight
from fxopt.sparse.sparsified_linear import SparsifiedLinear


def to_dense(model: nn.Module, inplace: bool = False) -> nn.Module:
    """
    `model` with a `torch.nn.Linear` or `Conv2d` for every `SparseLinear`, `SparseConv2d`, `BlockSparseLinear` and
    `SemiStructuredLinear`: what `save_pretrained` and other tools take, and the model's own class loads.

    A copy, unless `inplace`; a layer alone is returned as its dense one either way. Layers and weights that are shared
    stay shared, biases are the same parameters, weights are new ones: make the optimizer afterwards. In a graph, the
    calls of these modules change, and no operators: those `reverse` takes back. A layer that was made of transformers'
    `Conv1D` becomes a `torch.nn.Linear`, whose weight is the transposed one: GPT-2's class does not take it.

    Raises `UsageError` for what is no module, and for sparse layers with hooks, which the dense ones would not have;
    then nothing was changed.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"a {type(model).__name__} was given; expected a torch.nn.Module")
    for name, layer in _sparse_layers(model):
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or "forward" in vars(layer):
            raise UsageError(f"{name or 'the layer'} has hooks, or a forward of its own; remove them first")
    result = model if inplace else copy.deepcopy(model)
    made: dict[int, nn.Module] = {}
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    for name, layer in _sparse_layers(result):
        if id(layer) not in made:
            made[id(layer)] = _dense(layer, weights)
        if not name:
            return made[id(layer)]
        owner, _, last = name.rpartition(".")
        parent = result.get_submodule(owner)
        setattr(parent, last, made[id(layer)])
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = _fast_path(parent.activation)
    return result


def _sparse_layers(model: nn.Module) -> list[tuple[str, SparseWeight | SparsifiedLinear]]:
    """By each name that they have."""
    modules = model.named_modules(remove_duplicate=False)
    return [(name, layer) for name, layer in modules if isinstance(layer, SparseWeight | SparsifiedLinear)]


def _dense(layer: SparseWeight | SparsifiedLinear, weights: dict[tuple[int, ...], nn.Parameter]) -> nn.Module:
    held = (layer.values, *layer.pattern) if isinstance(layer, SparseWeight) else layer.tensors
    dense: nn.Module = layer.to_dense()
    weight = dense.weight
    assert isinstance(weight, nn.Parameter)
    dense.register_parameter("weight", weights.setdefault(tuple(map(id, held)), weight))
    dense.register_parameter("bias", layer.bias)
    return dense


def _fast_path(activation: object) -> int:
    """torch's number for an activation of its encoder layer that has a fast path; swapping had turned it off."""
    if activation is F.relu or isinstance(activation, nn.ReLU):
        return 1
    return 2 if activation is F.gelu or isinstance(activation, nn.GELU) else 0


__all__ = ["to_dense"]
