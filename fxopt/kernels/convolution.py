"""A convolution and the ReLU behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.kernels.registration import register


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """
    relu(conv(x, weight) + bias) in 1, 2 or 3 dimensions.

    x (batch, in, *size), or (in, *size) without a batch; weight (out, in / groups, *kernel); bias (out,). `stride`,
    `padding` (zeros) and `dilation` have one number for each dimension.
    """
    return torch.relu(_convolution(x, weight, bias, stride, padding, dilation, groups))


def conv_relu_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """
    `conv_relu`, the activation in place: a feature map of megabytes is then neither allocated nor faulted in again.

    Not oneDNN's relu post-op: it turns NaN into 0.
    """
    return torch.relu_(_convolution(x, weight, bias, stride, padding, dilation, groups))


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    dimensions = weight.dim() - 2
    batched = x if x.dim() == weight.dim() else x.unsqueeze(0)
    y = torch.convolution(
        batched, weight, bias, list(stride), list(padding), list(dilation), False, [0] * dimensions, groups
    )
    return y if x.dim() == weight.dim() else y.squeeze(0)


register(conv_relu, conv_relu_kernel)
