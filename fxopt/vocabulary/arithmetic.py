"""Arithmetic."""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from fxopt.ops import op, spell
from fxopt.vocabulary import declaring as say

aten = torch.ops.aten


def _with_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> say.Said | None:
    """torch.min(x, y) of two tensors, not of a tensor and a dimension."""
    other = args[1] if len(args) > 1 else kwargs.get("other")
    return (args, kwargs) if isinstance(other, Node) else None


@op(
    operator.add,
    torch.add,
    "add",
    aten.add.Tensor,
    aten.add.Scalar,
    inplace=(operator.iadd, "add_", aten.add_.Tensor, aten.add_.Scalar),
    commutative=True,
)
def add(input, other, *, alpha=1): ...


@op(
    operator.sub,
    torch.sub,
    torch.subtract,
    "sub",
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.subtract.Tensor,
    aten.subtract.Scalar,
    spell(aten.rsub.Scalar, "other input alpha"),
    spell(aten.rsub.Tensor, "other input alpha"),
    inplace=(operator.isub, "sub_", aten.sub_.Tensor, aten.sub_.Scalar),
)
def sub(input, other, *, alpha=1): ...


@op(
    operator.mul,
    torch.mul,
    torch.multiply,
    "mul",
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.multiply.Tensor,
    aten.multiply.Scalar,
    inplace=(operator.imul, "mul_", aten.mul_.Tensor, aten.mul_.Scalar),
    commutative=True,
)
def mul(input, other): ...


@op(
    operator.truediv,
    torch.div,
    torch.divide,
    spell(torch.true_divide, "input other"),
    "div",
    "divide",
    spell("true_divide", "input other"),
    aten.div.Tensor,
    aten.div.Scalar,
    aten.div.Tensor_mode,
    aten.div.Scalar_mode,
    aten.true_divide.Tensor,
    aten.true_divide.Scalar,
    aten.divide.Tensor,
    aten.divide.Scalar,
    aten.divide.Tensor_mode,
    aten.divide.Scalar_mode,
    inplace=(operator.itruediv, "div_", aten.div_.Tensor, aten.div_.Scalar, aten.div_.Tensor_mode),
)
def div(input, other, *, rounding_mode=None): ...


@op(
    operator.floordiv,
    torch.floor_divide,
    "floor_divide",
    aten.floor_divide.default,
    aten.floor_divide.Scalar,
    inplace=(operator.ifloordiv, "floor_divide_"),
)
def floor_divide(input, other): ...


@op(
    operator.mod,
    torch.remainder,
    "remainder",
    aten.remainder.Tensor,
    aten.remainder.Scalar,
    aten.remainder.Scalar_Tensor,
    inplace=(operator.imod, "remainder_"),
)
def remainder(input, other): ...


@op(
    operator.pow,
    torch.pow,
    "pow",
    aten.pow.Tensor_Scalar,
    aten.pow.Scalar,
    aten.pow.Tensor_Tensor,
    spell(torch.square, "input", exponent=2),
    spell("square", "input", exponent=2),
    spell(aten.square.default, "input", exponent=2),
    inplace=(operator.ipow, "pow_", aten.pow_.Scalar, aten.pow_.Tensor),
)
def pow(input, exponent): ...


@op(
    operator.neg,
    torch.neg,
    torch.negative,
    "neg",
    "negative",
    aten.neg.default,
    aten.negative.default,
    inplace=("neg_", aten.neg_.default),
)
def neg(input): ...


@op(
    operator.abs,
    torch.abs,
    torch.absolute,
    "abs",
    "absolute",
    aten.abs.default,
    aten.absolute.default,
    inplace=("abs_", aten.abs_.default),
)
def abs(input): ...


@op(torch.sqrt, "sqrt", aten.sqrt.default, inplace=("sqrt_", aten.sqrt_.default))
def sqrt(input): ...


@op(torch.rsqrt, "rsqrt", aten.rsqrt.default, inplace=("rsqrt_", aten.rsqrt_.default))
def rsqrt(input): ...


@op(torch.reciprocal, "reciprocal", aten.reciprocal.default, inplace=("reciprocal_", aten.reciprocal_.default))
def reciprocal(input): ...


@op(torch.exp, "exp", aten.exp.default, inplace=(torch.exp_, "exp_", aten.exp_.default))
def exp(input): ...


@op(torch.log, "log", aten.log.default, inplace=("log_", aten.log_.default))
def log(input): ...


@op(torch.cos, "cos", aten.cos.default, inplace=("cos_", aten.cos_.default))
def cos(input): ...


@op(torch.sin, "sin", aten.sin.default, inplace=("sin_", aten.sin_.default))
def sin(input): ...


@op(torch.erf, "erf", aten.erf.default, inplace=("erf_", aten.erf_.default))
def erf(input): ...


@op(torch.floor, "floor", aten.floor.default, inplace=("floor_", aten.floor_.default))
def floor(input): ...


@op(torch.ceil, "ceil", aten.ceil.default, inplace=("ceil_", aten.ceil_.default))
def ceil(input): ...


@op(
    torch.clamp,
    torch.clip,
    "clamp",
    "clip",
    aten.clamp.default,
    aten.clamp.Tensor,
    aten.clip.default,
    aten.clip.Tensor,
    spell(torch.clamp_min, "input min"),
    spell("clamp_min", "input min"),
    spell(aten.clamp_min.default, "input min"),
    spell(torch.clamp_max, "input max"),
    spell("clamp_max", "input max"),
    spell(aten.clamp_max.default, "input max"),
    inplace=("clamp_", aten.clamp_.default),
)
def clamp(input, min=None, max=None): ...


@op(
    torch.minimum,
    spell(torch.min, arrange=_with_tensor),
    "minimum",
    spell("min", arrange=_with_tensor),
    aten.minimum.default,
    aten.min.other,
    commutative=True,
)
def minimum(input, other): ...


@op(
    torch.maximum,
    spell(torch.max, arrange=_with_tensor),
    "maximum",
    spell("max", arrange=_with_tensor),
    aten.maximum.default,
    aten.max.other,
    commutative=True,
)
def maximum(input, other): ...
