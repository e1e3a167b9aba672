"""A linear layer and the activation behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.registration import register

# Between these rows, BLAS is slow: it reads the weight once per row or two, oneDNN once for all. Above, MKL wins unless
# the weight is packed ahead. On AVX2 (benchmarks/kernels.py, 256² to 50257×768, 1 to 24 rows) up to 16 rows;
# with AVX-512 oneDNN takes 1.0 to 2.3 of MKL's time up to 4 rows, and at 8 rows 1.24 for 1024² but 0.78 for 768×3072.
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
LEAST_ROWS, FEW_ROWS = 8 if _AVX512 else 1, 16
LARGE_WEIGHT = 2**21 if _AVX512 else 2**18

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """
    gelu(x @ weightᵀ + bias): x (…, in), weight (out, in), bias (out,) -> (…, out), all of one floating dtype.

    `approximate` is "none" (erf) or "tanh". On the CPU with float32, few rows and a large weight (one-token decoding),
    the product is oneDNN's; elsewhere it runs the two operators, the second in place.
    """
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(x @ weightᵀ + bias): x (…, in), weight (out, in), bias (out,) -> (…, out), all of one floating dtype."""
    return F.relu(F.linear(x, weight, bias))


def linear_gelu_kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """`linear_gelu`, the activation in place on the fresh product."""
    y: Tensor = torch.ops.aten.gelu_.default(_product(x, weight, bias), approximate=approximate)
    return y


def linear_relu_kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    `linear_relu`, the activation in place on the fresh product.

    Not oneDNN's relu post-op: it turns NaN into 0.
    """
    return torch.relu_(_product(x, weight, bias))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _suits_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y


def _suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Cheapest questions first; wrong arguments are left to `F.linear`, whose errors name them."""
    size = weight.numel()
    if size < LARGE_WEIGHT or weight.dim() != 2 or x.device.type != "cpu" or not _HAS_ONEDNN:
        return False
    inputs = weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != inputs or not LEAST_ROWS * inputs <= x.numel() <= FEW_ROWS * inputs:
        return False
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != weight.shape[:1] or bias.device != x.device):
        return False
    same = x.dtype == weight.dtype == torch.float32 and weight.device == x.device
    return same and weight.is_contiguous() and bool(torch.backends.mkldnn.enabled)


register(linear_gelu, linear_gelu_kernel)
register(linear_relu, linear_relu_kernel)
