"""A batch normalisation beside a linear layer is part of its weight and bias."""

from dataclasses import dataclass
from typing import ClassVar

from fxopt import vocabulary as ops
from fxopt.pattern import AnyOf
from fxopt.transformations._fold_batch_norm import BatchNormRewrite, after, before


@dataclass(frozen=True)
class FuseBatchNorm1dInLinear(BatchNormRewrite):
    """
    batch_norm(linear(x, w, b), mean, var, gamma, beta)  ->  linear(x, w * s, (b - mean) * s + beta)
    linear(batch_norm(x, mean, var, gamma, beta), w, b)  ->  linear(x, w * s, b + w @ (beta - mean * s))

    Within rounding, with s = gamma / sqrt(var + eps) computed in float64.  Refuses a normalisation in training mode or
    without running statistics, input that is not known to be (N, C): of (N, C, L), a normalisation takes C for the
    channels and a linear layer L.  Modules and weights that are read elsewhere too stay as they are there.
    """

    pattern: ClassVar[AnyOf] = AnyOf(*after(ops.linear), *before(ops.linear))
