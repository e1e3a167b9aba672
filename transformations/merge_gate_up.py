"""The two linear layers before a SwiGLU gate read the same input: one product does for both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.delta import Delta
from fxopt.pattern import AnyOf, Constant, OptionalConstant, Tensor
from fxopt.transformation import New, Rewrite, Site
from fxopt.transformations._constants import unfit

_GATE = ops.linear(Tensor("x"), Constant("gate"), OptionalConstant("gate_bias"))
_UP = ops.linear(Tensor("x"), Constant("up"), OptionalConstant("up_bias"))


@dataclass(frozen=True)
class MergeGateUp(Rewrite):
    """
    silu(linear(x, v, b)) * linear(x, w, c)  ->  swiglu_packed(linear(x, [v; w], [b; c]))

    Within rounding: a product with more columns may sum in another order.  Also of swiglu(gate, up).  Refuses weights
    that are read elsewhere too, which would then stand in memory twice, and weights of different shapes or types.
    """

    pattern: ClassVar[AnyOf] = AnyOf(ops.mul(ops.silu(_GATE), _UP), ops.swiglu(_GATE, _UP))

    def check(self, at: Site, x: Any, gate: Any, up: Any, gate_bias: Any, up_bias: Any) -> str | None:
        if (gate_bias is None) is not (up_bias is None):
            return "only one of the two linear layers has a bias"
        pairs = [(gate, up)] if gate_bias is None else [(gate, up), (gate_bias, up_bias)]
        for pair in pairs:
            if reason := next((r for v in pair if (r := unfit(at.gm, v) or _read_elsewhere(at, v))), None):
                return reason
            if reason := _unlike(at, *pair):
                return reason
        weight, bias = at.tensor(gate), at.tensor(gate_bias)
        if weight is None or weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            return f"{at.path(gate)} is no matrix, or its bias no vector of as many elements as it has rows"
        return None

    def rewrite(self, at: Site, x: Node, gate: Any, up: Any, gate_bias: Any, up_bias: Any) -> Node:
        bias = None if gate_bias is None else _joined(at, gate_bias, up_bias)
        return at.emit(ops.swiglu_packed, at.emit(ops.linear, x, _joined(at, gate, up), bias))

    def carry(self, gm: GraphModule, rewrite: Delta) -> Mapping[str, torch.Tensor] | None:
        """The two halves of each merged weight and bias."""
        tensors = rewrite.tensors()
        removed = {p: before for p, (before, after) in tensors.items() if before is not None and after is None}
        pairs = [(a, b) for a, b in permutations(removed, 2) if removed[a].shape == removed[b].shape]
        names = {_name(a, b): (a, b) for a, b in pairs}
        found: dict[str, torch.Tensor] = {}
        for path, (before, after) in tensors.items():
            if before is not None or after is None:
                continue
            now = mechanism.constant(gm, mechanism.Attr(path))
            if path not in names or now is None or now.shape != after.shape:
                return None
            for original, half in zip(names[path], now.detach().chunk(2), strict=True):
                found[original] = half.clone()
        return found


def _read_elsewhere(at: Site, x: Any) -> str | None:
    """Why the parameter ``x`` has to stay: another node, or another name, reads it too."""
    path, tensor = at.path(x), at.tensor(x)
    names = [n for n, t in _tensors(at.gm) if t is tensor and n != path]
    if names:
        return f"{path} is {names[0]} too"
    return None if at.free(path) == path else f"{path} is read elsewhere too"


def _tensors(gm: GraphModule) -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, torch.Tensor]] = list(gm.named_parameters(remove_duplicate=False))
    return found + list(gm.named_buffers(remove_duplicate=False))


def _unlike(at: Site, a: Any, b: Any) -> str | None:
    v, w = at.tensor(a), at.tensor(b)
    assert v is not None and w is not None
    if v is w:
        return f"{at.path(a)} is {at.path(b)} too"
    same = v.shape == w.shape and v.dtype == w.dtype and v.device == w.device
    if same and type(v) is type(w) and v.requires_grad == w.requires_grad:
        return None
    return f"{at.path(a)} and {at.path(b)} differ in shape, type, device or whether they are trained"


def _joined(at: Site, a: Any, b: Any) -> New:
    v, w = at.tensor(a), at.tensor(b)
    assert v is not None and w is not None
    both = torch.cat([v.detach(), w.detach()])
    if isinstance(v, nn.Parameter):
        both = nn.Parameter(both, requires_grad=v.requires_grad)
    return New(both, _name(at.path(a), at.path(b)))


def _name(a: str, b: str) -> str:
    """gate_proj.weight and up_proj.weight make gate_proj_up_proj.weight."""
    (owner, _, leaf), (other, _, other_leaf) = a.rpartition("."), b.rpartition(".")
    if not owner or owner == other:
        return f"{a}_{other_leaf}"
    return f"{owner}_{other.rpartition('.')[2]}.{leaf}"
