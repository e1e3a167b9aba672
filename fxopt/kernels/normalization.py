"""Normalisation with what stands before and after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.registration import register

_HALVES = (torch.float16, torch.bfloat16)


def layer_norm_linear_layer_norm(
    x: Tensor,
    normalized_shape1: Sequence[int],
    norm_weight1: Tensor | None,
    norm_bias1: Tensor | None,
    eps1: float,
    weight: Tensor,
    bias: Tensor | None,
    normalized_shape2: Sequence[int],
    norm_weight2: Tensor | None,
    norm_bias2: Tensor | None,
    eps2: float,
) -> Tensor:
    """
    layer_norm(linear(layer_norm(x))): x (…, in), weight (out, in), bias (out,) -> (…, out), all of one floating dtype.

    `normalized_shape1` is the end of x's shape, `normalized_shape2` the end of the result's; the norms' weights and
    biases have those shapes.
    """
    y = F.linear(torch.layer_norm(x, normalized_shape1, norm_weight1, norm_bias1, eps1), weight, bias)
    return torch.layer_norm(y, normalized_shape2, norm_weight2, norm_bias2, eps2)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """
    layer_norm(x + residual), as after a sublayer of BERT: shapes broadcast, `normalized_shape` ends the sum's shape.
    """
    return torch.layer_norm(x + residual, normalized_shape, weight, bias, eps)


def add_layer_norm_sum(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """
    (layer_norm(x + residual), x + residual), as before a sublayer of GPT-2, where the sum goes on as the residual.
    """
    total = x + residual
    return torch.layer_norm(total, normalized_shape, weight, bias, eps), total


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, cast_before_weight: bool = True) -> Tensor:
    """
    x / sqrt(mean(x²) + eps) · weight over the last dimension: x (…, n) floating, weight (n,) or what broadcasts to x.

    Computed in float32, rounded to x's dtype, then multiplied by the weight, whose dtype may promote the result: the
    order of `LlamaRMSNorm` in transformers, bit for bit (float64 stays float64 here; there it is rounded). With
    `cast_before_weight=False` the weight is multiplied in float32 and the product rounded to x's dtype: the order of
    `torch.nn.RMSNorm`, and of `Gemma2RMSNorm` with 1 + weight.

    B. Zhang and R. Sennrich, Root Mean Square Layer Normalization, NeurIPS 2019.
    """
    wide = x.float() if x.dtype in _HALVES else x
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast_before_weight:
        return weight * normed.to(x.dtype)
    return (normed * weight).to(x.dtype)


def rms_norm_kernel(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, cast_before_weight: bool = True
) -> Tensor:
    """`rms_norm`, in place wherever the tensor is fresh: the same operations on the same values, two allocations."""
    wide = x.float() if x.dtype in _HALVES else x
    scale = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = wide * scale if wide is x else wide.mul_(scale)
    if weight is None:
        return normed.to(x.dtype)
    if cast_before_weight:
        normed = normed.to(x.dtype)
    if weight.dtype == normed.dtype and weight.shape == normed.shape[-1:]:
        normed = normed.mul_(weight)
    else:
        normed = normed * weight
    return normed if cast_before_weight else normed.to(x.dtype)


register(layer_norm_linear_layer_norm, layer_norm_linear_layer_norm)
register(add_layer_norm, add_layer_norm)
register(add_layer_norm_sum, add_layer_norm_sum)
register(rms_norm, rms_norm_kernel)
