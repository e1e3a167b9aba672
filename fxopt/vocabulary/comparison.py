"""Comparison, logic and choice."""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

import operator

import torch

from fxopt.ops import op, spell

aten = torch.ops.aten


@op(operator.eq, torch.eq, "eq", aten.eq.Scalar, aten.eq.Tensor, commutative=True)
def eq(input, other): ...


@op(
    operator.ne,
    torch.ne,
    torch.not_equal,
    "ne",
    aten.ne.Scalar,
    aten.ne.Tensor,
    aten.not_equal.Scalar,
    aten.not_equal.Tensor,
    commutative=True,
)
def ne(input, other): ...


@op(operator.lt, torch.lt, torch.less, "lt", aten.lt.Scalar, aten.lt.Tensor, aten.less.Scalar, aten.less.Tensor)
def lt(input, other): ...


@op(
    operator.le,
    torch.le,
    torch.less_equal,
    "le",
    aten.le.Scalar,
    aten.le.Tensor,
    aten.less_equal.Scalar,
    aten.less_equal.Tensor,
)
def le(input, other): ...


@op(
    operator.gt, torch.gt, torch.greater, "gt", aten.gt.Scalar, aten.gt.Tensor, aten.greater.Scalar, aten.greater.Tensor
)
def gt(input, other): ...


@op(
    operator.ge,
    torch.ge,
    torch.greater_equal,
    "ge",
    aten.ge.Scalar,
    aten.ge.Tensor,
    aten.greater_equal.Scalar,
    aten.greater_equal.Tensor,
)
def ge(input, other): ...


@op(
    operator.and_,
    torch.bitwise_and,
    "bitwise_and",
    aten.bitwise_and.Tensor,
    aten.bitwise_and.Scalar,
    aten.__and__.Tensor,
    aten.__and__.Scalar,
    inplace=(operator.iand, "bitwise_and_"),
    commutative=True,
)
def bitwise_and(input, other): ...


@op(
    operator.or_,
    torch.bitwise_or,
    "bitwise_or",
    aten.bitwise_or.Tensor,
    aten.bitwise_or.Scalar,
    aten.__or__.Tensor,
    aten.__or__.Scalar,
    inplace=(operator.ior, "bitwise_or_"),
    commutative=True,
)
def bitwise_or(input, other): ...


@op(
    operator.xor,
    torch.bitwise_xor,
    "bitwise_xor",
    aten.bitwise_xor.Tensor,
    aten.bitwise_xor.Scalar,
    inplace=(operator.ixor, "bitwise_xor_"),
    commutative=True,
)
def bitwise_xor(input, other): ...


@op(operator.invert, torch.bitwise_not, "bitwise_not", aten.bitwise_not.default, inplace=("bitwise_not_",))
def bitwise_not(input): ...


@op(torch.logical_and, "logical_and", aten.logical_and.default, commutative=True)
def logical_and(input, other): ...


@op(torch.logical_or, "logical_or", aten.logical_or.default, commutative=True)
def logical_or(input, other): ...


@op(torch.logical_not, "logical_not", aten.logical_not.default)
def logical_not(input): ...


@op(torch.isnan, "isnan", aten.isnan.default)
def isnan(input): ...


@op(torch.isinf, "isinf", aten.isinf.default)
def isinf(input): ...


@op(torch.isfinite, "isfinite", aten.isfinite.default)
def isfinite(input): ...


@op(
    torch.where,
    spell("where", "input condition other"),
    aten.where.Scalar,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.where.self,
)
def where(condition, input, other): ...


@op(
    torch.masked_fill,
    "masked_fill",
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    inplace=("masked_fill_", aten.masked_fill_.Scalar, aten.masked_fill_.Tensor),
)
def masked_fill(input, mask, value): ...


@op(torch.tril, "tril", aten.tril.default)
def tril(input, diagonal=0): ...


@op(torch.triu, "triu", aten.triu.default)
def triu(input, diagonal=0): ...
