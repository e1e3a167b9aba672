"""Fused operators, which torch.ops.fxopt has."""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fxopt.kernels  # noqa: F401  (registers torch.ops.fxopt)
from fxopt.kernels.unstructured_conv import SparseConv2d, pads
from fxopt.kernels.unstructured_linear import SparseLinear
from fxopt.kernels.unstructured_pattern import Pattern
from fxopt.ops import op, spell

fused = torch.ops.fxopt


@op(fused.add_layer_norm.default)
def add_layer_norm(x, residual, normalized_shape, weight=None, bias=None, eps=1e-05): ...


@op(fused.add_layer_norm_sum.default)
def add_layer_norm_sum(x, residual, normalized_shape, weight=None, bias=None, eps=1e-05): ...


@op(fused.rms_norm.default)
def fused_rms_norm(x, weight=None, eps=1e-06, cast_before_weight=True): ...


@op(fused.swiglu.default)
def swiglu(gate, up): ...


@op(fused.swiglu_packed.default)
def swiglu_packed(gate_up): ...


@op(fused.linear_relu.default)
def linear_relu(x, weight, bias=None): ...


@op(fused.linear_gelu.default)
def linear_gelu(x, weight, bias=None, approximate="none"): ...


@op(fused.conv_relu.default)
def conv_relu(x, weight, bias, stride, padding, dilation, groups): ...


@op(fused.layer_norm_linear_layer_norm.default)
def layer_norm_linear_layer_norm(
    x,
    normalized_shape1,
    norm_weight1,
    norm_bias1,
    eps1,
    weight,
    bias,
    normalized_shape2,
    norm_weight2,
    norm_bias2,
    eps2,
): ...


@op(fused.block_linear.default)
def block_linear(x, data, bias, crow, col, index, features, transposed=False): ...


@op(fused.semi_structured_linear.default)
def semi_structured_linear(x, values, bias, metadata): ...


@op(fused.packed_linear.default)
def packed_linear(x, weight, bias=None, activation="none", transposed=False, min_rows=0, max_rows=0): ...


@op(fused.packed_conv2d.default)
def packed_conv2d(x, weight, bias, other, stride, padding, dilation, groups, activation): ...


def _build_sparse_linear(values, bias, row_start, column, column_start, row, place) -> nn.Module:
    return SparseLinear.from_pattern(values, bias, Pattern(row_start, column, column_start, row, place)).eval()


@op(SparseLinear, fused.sparse_linear.default, build=_build_sparse_linear)
def sparse_linear(x, values, bias, row_start, column, column_start, row, place): ...


def _sparse_conv2d_attributes(module: Any) -> dict[str, Any] | str:
    if module.padding_mode != "zeros":
        return f"pads with padding_mode={module.padding_mode!r}"
    tensors = {"values": module.values, "bias": module.bias, **module.pattern._asdict()}
    window = {n: getattr(module, n) for n in ("kernel_size", "stride", "dilation", "groups")}
    return {**tensors, **window, "padding": pads(module.padding, module.kernel_size, module.dilation)}


def _build_sparse_conv2d(values, bias, row_start, column, column_start, row, place, **window) -> nn.Module:
    return SparseConv2d.from_pattern(
        values, bias, Pattern(row_start, column, column_start, row, place), **window
    ).eval()


@op(
    spell(SparseConv2d, attributes=_sparse_conv2d_attributes),
    fused.sparse_conv2d.default,
    build=_build_sparse_conv2d,
)
def sparse_conv2d(
    x, values, bias, row_start, column, column_start, row, place, kernel_size, stride, padding, dilation, groups
): ...
