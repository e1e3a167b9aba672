"""Root-mean-square normalisation written out, as in Llama and T5, is one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.pattern import AnyOf, Number, Shared, Tensor, Var
from fxopt.transformation import Rewrite, Site
from fxopt.transformations._fusion import foreign, no_tensor

_X, _WEIGHT = Tensor("x"), Tensor("weight")
_WIDE = Shared(ops.to(_X, dtype=torch.float32))


def _normed(x: Any, squared: Any) -> Any:
    mean = ops.mean(squared, dim=Var("dim"), keepdim=True)
    return ops.mul(x, ops.rsqrt(ops.add(mean, Number("eps"))))


def _terms() -> list[tuple[Any, dict[str, Any]]]:
    """The pattern with x widened before both uses, not at all, or before the square alone (T5); in that order."""
    found: list[tuple[Any, dict[str, Any]]] = []
    for outer, inner, widened in ((_WIDE, _WIDE, True), (_X, _X, False), (_X, _WIDE, True)):
        for square in (ops.pow(inner, 2), ops.mul(inner, inner)):
            normed, narrow = _normed(outer, square), {"dtype": Var("narrow")}
            found += [
                (ops.mul(_WEIGHT, ops.to(normed, **narrow)), {"widened": widened, "first": True}),
                (ops.mul(_WEIGHT, ops.type_as(normed, _X)), {"widened": widened, "first": True, "narrow": _X}),
                (ops.mul(_WEIGHT, normed), {"widened": widened, "first": True, "narrow": None}),
                (ops.to(ops.mul(normed, _WEIGHT), **narrow), {"widened": widened, "first": False}),
                (ops.type_as(ops.mul(normed, _WEIGHT), _X), {"widened": widened, "first": False, "narrow": _X}),
            ]
    return found


@dataclass(frozen=True)
class FuseRMSNorm(Rewrite):
    """
    w * to(x' * rsqrt(mean(x' ** 2, -1) + eps), x.dtype)  ->  rms_norm(x, w, eps)
    to(x' * rsqrt(mean(x' ** 2, -1) + eps) * w, x.dtype)  ->  rms_norm(x, w, eps, cast_before_weight=False)

    Exact, with x' = to(x, float32).  The casts may be absent where x is of float32 (or, all of them, of float64).  Half
    a normalisation's memory, and up to a fifth of its time.  Refuses half precision that is not widened and narrowed
    again, another dimension than the last, and x whose type is not known.
    """

    pattern: ClassVar[AnyOf] = AnyOf(*_terms())

    def check(
        self, at: Site, x: Any, weight: Any, dim: Any, widened: bool, first: bool, narrow: Any, **_: Any
    ) -> str | None:
        value = at.value(x)
        if value is None:
            return f"the type of {x} is not known; call fxopt.propagate(gm, inputs)"
        if dim not in ((-1,), (value.dim() - 1,)):
            return f"the mean is taken over {dim}, expected the last dimension, -1"
        half = value.dtype in (torch.float16, torch.bfloat16)
        if not half and value.dtype is not (torch.float32 if widened else value.dtype):
            return f"{x} is of {value.dtype} and cast to torch.float32, which rounds it"
        if not value.is_floating_point() or (half and not widened):
            return f"{x} is of {value.dtype} and not widened to torch.float32"
        back = value.dtype if narrow is _X else _dtype(at, narrow, x, value)
        if back is not value.dtype and (back is not None or half):
            return f"{x} is of {value.dtype}, and the result is cast to {back}"
        return no_tensor(at, weight, at.root) or foreign(at, weight, x) or _promoted(at, value, weight, first)

    def rewrite(self, at: Site, x: Node, weight: Any, eps: float, first: bool, narrow: Any, **_: Any) -> Node:
        if isinstance(narrow, Node):
            at.match.shared.append(narrow)  # x.dtype, which may have no other use
        return at.emit(ops.fused_rms_norm, x, weight, float(eps), first)


def _promoted(at: Site, value: torch.Tensor, weight: Any, first: bool) -> str | None:
    """Why the weight's type leads to another type than the fused operator's, as it does in place."""
    scale, result = at.value(weight), at.value(at.root)
    assert scale is not None and result is not None
    wide = value.dtype if first else torch.promote_types(value.dtype, torch.float32)
    dtype = torch.result_type(torch.empty(1, dtype=wide, device="meta"), scale)
    if dtype is not wide and not first:
        return f"the weight is of {scale.dtype}, expected no wider type than {wide}"
    return None if not first or result.dtype is dtype else f"{at.root} is of {result.dtype}, expected {dtype}"


def _dtype(at: Site, said: Any, x: Any, value: torch.Tensor) -> Any:
    """The type that ``said`` is: itself, or x.dtype as a graph may read it; None where there is none."""
    call = mechanism.read(at.gm, said) if isinstance(said, Node) else None
    if call is not None and call.op is ops.attribute and call.arguments == {"input": x, "name": "dtype"}:
        return value.dtype
    return said
