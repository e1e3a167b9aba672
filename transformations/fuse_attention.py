"""Attention written out is attention; one operator computes it without storing the scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt import ops as reading
from fxopt import vocabulary as ops
from fxopt.pattern import AnyOf, Number, Shared, Tensor, Var
from fxopt.transformation import Rewrite, Site

_SCORES = ops.matmul(Tensor("q"), Tensor("kt"))
_SCALED = AnyOf(
    (ops.mul(_SCORES, Number("factor")), {"divided": False}),
    (ops.div(_SCORES, Number("factor")), {"divided": True}),
    (_SCORES, {"factor": 1.0, "divided": False}),
)
_MASKED = AnyOf(
    (ops.add(ops.add(_SCALED, Tensor("bias")), Tensor("mask")), {"hidden": None}),  # T5's bias for the distance
    (ops.add(_SCALED, Tensor("mask")), {"bias": None, "hidden": None}),
    (ops.masked_fill(_SCALED, Tensor("mask"), Number("hidden")), {"bias": None, "shown": False}),
    (ops.where(Tensor("mask"), _SCALED, Number("hidden")), {"bias": None, "shown": True}),
    (ops.where(Tensor("mask"), Number("hidden"), _SCALED), {"bias": None, "shown": False}),
    (_SCALED, {"bias": None, "mask": None, "hidden": None}),
)
_WIDENED = AnyOf(ops.to(_MASKED, dtype=torch.float32), _MASKED)
_SOFTMAX = ops.softmax(_WIDENED, Var("dim"), Var("dtype"))
# T5 reads the scores twice: for the softmax, and for their type
_TWICE = AnyOf(Shared(ops.to(Shared(_MASKED), dtype=torch.float32)), Shared(_MASKED))
_READ_TWICE = ops.softmax(_TWICE, Var("dim"), Var("dtype"))
_NARROWED = AnyOf(
    ops.to(_SOFTMAX, dtype=Var("narrow")),
    ops.type_as(_READ_TWICE, Tensor("like")),
    ops.to(_SOFTMAX),  # a cast to where it is already
    _SOFTMAX,
)
_DROPPED = AnyOf(ops.dropout(_NARROWED, p=..., training=False), ops.dropout(_NARROWED, p=0.0, training=True), _NARROWED)


@dataclass(frozen=True)
class FuseAttention(Rewrite):
    """
    softmax(q @ k.T * s + mask) @ v  ->  scaled_dot_product_attention(q, k, v, mask, scale=s)

    Within rounding: the fused operator sums in another order, and in half precision keeps the scores in float32. A row
    masked with -inf in whole is 0 afterwards, as torch defines scaled_dot_product_attention, where eager gives NaN.

    Also ``/ s``, no scale, no mask, a bias besides the mask, ``masked_fill`` and ``where`` with a large negative
    number, a softmax computed in float32, and dropout outside of training.  A ``masked_fill`` with -inf is refused:
    it is the usual way to such rows.
    """

    pattern = ops.matmul(_DROPPED, Tensor("v"))

    def check(self, at: Site, q: Node, kt: Node, v: Node, **bound: Any) -> str | None:
        """Shapes must be known: the fused operator broadcasts less than matmul does."""
        values = [at.value(x) for x in (q, kt, v)]
        if any(x is None for x in values):
            return "the shapes of its inputs are not known; call fxopt.propagate(gm, inputs)"
        query, key, value = (x for x in values if x is not None)
        rank = query.dim()
        if rank not in (3, 4) or key.dim() != rank or value.dim() != rank:
            return f"its inputs have {query.dim()}, {key.dim()} and {value.dim()} dimensions, expected 3 or 4 each"
        for other in (key, value):
            if not all(_same(a, b) for a, b in zip(query.shape[:-2], other.shape[:-2], strict=True)):
                return f"it broadcasts {tuple(query.shape)} over {tuple(other.shape)}"
        if len({query.dtype, key.dtype, value.dtype}) > 1 or not query.is_floating_point():
            return f"its inputs have the types {query.dtype}, {key.dtype} and {value.dtype}, expected one"
        if bound["dim"] not in (-1, rank - 1):
            return f"the softmax is over dimension {bound['dim']}, expected the last one"
        return _check_types(query, bound) or _check_mask(at, query, key, bound)

    def rewrite(self, at: Site, q: Node, kt: Node, v: Node, **bound: Any) -> Node:
        factor = float(bound["factor"])
        scale = 1 / factor if bound["divided"] else factor
        mask = bound["mask"]
        if bound["hidden"] is not None:
            hidden = float(bound["hidden"])
            mask = at.emit(ops.where, mask, 0.0, hidden) if bound["shown"] else at.emit(ops.where, mask, hidden, 0.0)
        if bound["bias"] is not None:
            mask = at.emit(ops.add, bound["bias"], mask)
        query = at.value(q)
        assert query is not None
        default = isinstance(query.shape[-1], int) and scale == 1 / math.sqrt(query.shape[-1])
        return at.emit(ops.scaled_dot_product_attention, q, _key(at, kt), v, mask, scale=None if default else scale)


def _key(at: Site, kt: Node) -> Node:
    """The keys themselves: what was transposed, or the transpose of what was not."""
    call = reading.read(at.gm, kt)
    if call is not None and call.op is ops.transpose:
        value = at.value(kt)
        rank = value.dim() if value is not None else 0
        dims = {call.arguments["dim0"] % rank, call.arguments["dim1"] % rank} if rank else set()
        if dims == {rank - 1, rank - 2}:
            source: Node = call.arguments["input"]
            return source
    return at.emit(ops.transpose, kt, -2, -1)


def _same(a: Any, b: Any) -> bool:
    return bool(statically_known_true(a == b))


def _check_types(query: torch.Tensor, bound: dict[str, Any]) -> str | None:
    dtype, narrow = bound["dtype"], bound.get("narrow")
    if dtype not in (None, torch.float32, query.dtype):
        return f"the softmax is computed in {dtype}, expected {query.dtype} or torch.float32"
    if narrow is not None and narrow is not query.dtype:
        return f"the softmax is cast to {narrow}, expected {query.dtype}"
    if dtype is torch.float32 and query.dtype is not torch.float32 and narrow is None and "like" not in bound:
        return f"the softmax stays in torch.float32 and the values are {query.dtype}"
    factor = float(bound["factor"])
    return f"the scores are scaled by {factor}" if factor == 0 or not math.isfinite(factor) else None


def _check_mask(at: Site, query: torch.Tensor, key: torch.Tensor, bound: dict[str, Any]) -> str | None:
    if bound["mask"] is None:
        return None
    mask, bias = at.value(bound["mask"]), at.value(bound["bias"])
    if mask is None or (bias is None and bound["bias"] is not None):
        return "the shape of its mask is not known; call fxopt.propagate(gm, inputs)"
    scores = (*query.shape[:-1], key.shape[-1])
    for added in (mask,) if bias is None else (bias, mask):
        if reason := _misfit(added, scores, query.dtype if bound["hidden"] is None else torch.bool):
            return reason
    hidden = bound["hidden"]
    if hidden is None:
        return None
    if query.dtype is not torch.float32:
        return f"it fills scores of {query.dtype}, expected torch.float32"
    if hidden == -math.inf:
        return "rows that -inf hides in full are NaN, and would be 0"
    # From here on, what is added absorbs the score: both hide the same, and hide a whole row evenly.
    return None if hidden <= -1e12 else f"it hides scores with {hidden}, which is not large enough to absorb them"


def _misfit(mask: torch.Tensor, scores: tuple[Any, ...], dtype: torch.dtype) -> str | None:
    if mask.dim() > len(scores) or mask.dim() < 2:
        return f"its mask has {mask.dim()} dimensions, expected 2 to {len(scores)}"
    for size, wanted in zip(reversed(mask.shape), reversed(scores), strict=False):
        if not (_same(size, wanted) or _same(size, 1)):
            return f"its mask of shape {tuple(mask.shape)} does not fit scores of shape {scores}"
    return None if mask.dtype is dtype else f"its mask is {mask.dtype}, expected {dtype}"
