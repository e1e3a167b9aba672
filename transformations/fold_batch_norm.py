"""A batch normalisation beside any linear map is part of its weight and bias."""

from dataclasses import dataclass
from typing import ClassVar

from fxopt import vocabulary as ops
from fxopt.pattern import AnyOf
from fxopt.transformations._fold_batch_norm import CONVOLUTIONS, TRANSPOSED, BatchNormRewrite, after, before


@dataclass(frozen=True)
class FoldBatchNorm(BatchNormRewrite):
    """
    batch_norm(f(x, w, b), mean, var, gamma, beta)  ->  f(x, w * s, (b - mean) * s + beta)
    f(batch_norm(x, mean, var, gamma, beta), w, b)  ->  f(x, w * s, b + w @ (beta - mean * s))

    Within rounding, with s = gamma / sqrt(var + eps) computed in float64; f is a linear layer, or a 1-d, 2-d or 3-d
    convolution; after one, also a transposed convolution.  The general rule, of which FuseBatchNorm2dInConv2d and
    FuseBatchNorm1dInLinear are the cases that optimum has; refuses what they refuse.
    """

    pattern: ClassVar[AnyOf] = AnyOf(
        *after(ops.linear, *CONVOLUTIONS, *TRANSPOSED),
        *before(ops.linear, *CONVOLUTIONS),
    )
