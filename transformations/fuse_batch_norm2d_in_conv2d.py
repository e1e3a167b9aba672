"""A batch normalisation beside a 2-d convolution is part of its weight and bias."""

from dataclasses import dataclass
from typing import ClassVar

from fxopt import vocabulary as ops
from fxopt.pattern import AnyOf
from fxopt.transformations._fold_batch_norm import BatchNormRewrite, after, before


@dataclass(frozen=True)
class FuseBatchNorm2dInConv2d(BatchNormRewrite):
    """
    batch_norm(conv2d(x, w, b), mean, var, gamma, beta)  ->  conv2d(x, w * s, (b - mean) * s + beta)
    conv2d(batch_norm(x, mean, var, gamma, beta), w, b)  ->  conv2d(x, w * s, b + w @ (beta - mean * s))

    Within rounding, with s = gamma / sqrt(var + eps) computed in float64.  Refuses a normalisation in training mode or
    without running statistics, one before a convolution that pads, input that is not (N, C, H, W), and a weight or
    bias that would not be finite.  Modules and weights that are read elsewhere too stay as they are there.
    """

    pattern: ClassVar[AnyOf] = AnyOf(*after(ops.conv2d), *before(ops.conv2d))
