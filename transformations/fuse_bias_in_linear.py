"""A constant added to a linear layer's output is its bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.delta import Delta
from fxopt.pattern import AnyOf, Constant, Number, OptionalTensor, Tensor
from fxopt.transformation import New, Rewrite, Site
from fxopt.transformations._constants import unfit

_LINEAR = ops.linear(Tensor("x"), Tensor("w"), OptionalTensor("bias"))


@dataclass(frozen=True)
class FuseBiasInLinear(Rewrite):
    """
    linear(x, w) + b  ->  linear(x, w, b)
    linear(x, w, a) + b  ->  linear(x, w, a + b)
    linear(x, w, a) - b  ->  linear(x, w, a - b)

    Within rounding.  ``b`` is a number, or a parameter or buffer that is the same in all rows: of shape (out,),
    (1, ..., 1, out), or with one element.  A ``b`` of shape (out,) stays the same tensor.  Refuses what would change
    the result's shape or type.  (Optimum's pass of this name makes the bias a column of the weight, and appends a one
    to every input.)
    """

    pattern = AnyOf(
        (ops.add(_LINEAR, Constant("b")), {"sign": 1}),
        (ops.add(_LINEAR, Number("b")), {"sign": 1}),
        (ops.sub(_LINEAR, Constant("b")), {"sign": -1}),
        (ops.sub(_LINEAR, Number("b")), {"sign": -1}),
    )

    def check(self, at: Site, x: Node, w: Any, bias: Any, b: Any, sign: int) -> str | None:
        linear, weight = at.match.nodes[1], at.value(w)
        if weight is None:
            return f"the shape and dtype of {w} are not known; call fxopt.propagate(gm, inputs)"
        y = at.value(linear)
        if not weight.is_floating_point() or (y is not None and y.dtype != weight.dtype):
            return f"{linear} and its weight are not of one floating-point type"
        for part in (b, bias):
            if isinstance(part, Node | mechanism.Attr) and (reason := self._unfit(at, part)):
                return reason
        if isinstance(b, int | float):
            return self._not_finite(at, weight, bias, b, sign)
        tensor = _tensor(at, b)
        dimensions = None if y is None else y.dim()
        if tensor.numel() != 1 and tensor.numel() != weight.shape[0]:
            return f"{at.path(b)} has shape {tuple(tensor.shape)}, expected ({weight.shape[0]},) or one element"
        if tensor.dim() > 1 and tensor.shape[-1] != tensor.numel():
            return f"{at.path(b)} has shape {tuple(tensor.shape)}, and differs between rows"
        if weight.shape[0] == 1 and tensor.numel() > 1:
            return f"{at.path(b)} has shape {tuple(tensor.shape)}, and widens the one feature of {linear}"
        if tensor.dim() > 1 and dimensions is None:
            return f"the number of dimensions of {linear} is not known; call fxopt.propagate(gm, inputs)"
        if dimensions is not None and tensor.dim() > dimensions:
            return f"{at.path(b)} has more dimensions than {linear}"
        promoted = torch.result_type(torch.empty(1, dtype=weight.dtype), tensor)
        if promoted != weight.dtype:
            return f"{at.path(b)} is of {tensor.dtype}, and the sum of {promoted}"
        return self._not_finite(at, weight, bias, b, sign)

    def _unfit(self, at: Site, part: Any) -> str | None:
        constant = Constant("").accepts(part)
        return unfit(at.gm, part) if constant else f"the bias {part} is computed, expected a parameter or buffer"

    def _not_finite(self, at: Site, weight: torch.Tensor, bias: Any, b: Any, sign: int) -> str | None:
        finite = bool(_sum(at, weight, bias, b, sign).isfinite().all())
        return None if finite else f"the sum of the biases would not be finite in {weight.dtype}"

    def rewrite(self, at: Site, x: Node, w: Any, bias: Any, b: Any, sign: int) -> Node:
        weight = at.value(w)
        assert weight is not None
        if isinstance(w, mechanism.Attr):  # a module takes a module's place
            at = replace(at, match=replace(at.match, dialect="module"))
            b = mechanism.Attr(at.path(b)) if isinstance(b, Node) else b
        if bias is None and sign == 1 and _is_a_bias(at, b, weight):
            return at.emit(ops.linear, x, w, b)
        olds = [_tensor(at, v) for v in (bias, b) if isinstance(v, Node | mechanism.Attr)]
        value = _sum(at, weight, bias, b, sign)
        if any(isinstance(t, nn.Parameter) for t in olds) or not olds:
            value = nn.Parameter(value, requires_grad=any(t.requires_grad for t in olds))
        return at.emit(ops.linear, x, w, New(value, _path(at, w, bias)))

    def carry(self, gm: GraphModule, rewrite: Delta) -> Mapping[str, torch.Tensor] | None:
        """A bias that moved as it was takes its training along; from a sum of two, none can be told."""
        befores = [before for before, _ in rewrite.tensors().values()]
        made = [after for _, after in rewrite.tensors().values() if after is not None]
        return {} if all(any(m is old for old in befores) for m in made) else None


def _tensor(at: Site, x: Any) -> torch.Tensor:
    found = at.tensor(x)
    assert found is not None
    return found


def _is_a_bias(at: Site, b: Any, weight: torch.Tensor) -> bool:
    """Whether ``b`` may stand as the bias just as it is."""
    tensor = at.tensor(b)
    return tensor is not None and tensor.shape == weight.shape[:1] and tensor.dtype == weight.dtype


def _sum(at: Site, weight: torch.Tensor, bias: Any, b: Any, sign: int) -> torch.Tensor:
    """The one bias, of shape (out,), added up in float64."""
    total = torch.zeros(
        weight.shape[:1], dtype=torch.float64, device=(weight if bias is None else _tensor(at, bias)).device
    )
    if bias is not None:
        total += _tensor(at, bias).detach()
    total += sign * (b if isinstance(b, int | float) else _tensor(at, b).detach().double().reshape(-1).to(total.device))
    return total.to(weight.dtype)


def _path(at: Site, w: Any, bias: Any) -> str:
    if bias is not None:
        return at.path(bias)
    owner = at.path(w).rpartition(".")[0] if isinstance(w, mechanism.Attr) or w.op == "get_attr" else ""
    return f"{owner}.bias".lstrip(".")
