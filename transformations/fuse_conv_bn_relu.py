"""A convolution, the batch normalisation behind it and a ReLU are one operator."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from fxopt import vocabulary as ops
from fxopt.pattern import AnyOf
from fxopt.transformation import Site
from fxopt.transformations._fold_batch_norm import CONVOLUTIONS, BatchNormRewrite, after


@dataclass(frozen=True)
class FuseConvBNReLU(BatchNormRewrite):
    """
    relu(batch_norm(conv(x, w, b), mean, var, gamma, beta))  ->  conv_relu(x, w * s, (b - mean) * s + beta)

    Within rounding, with s = gamma / sqrt(var + eps) computed in float64, for convolutions over 1, 2 and 3 dimensions.
    It is FoldBatchNorm and FuseConvReLU in one, and refuses what they refuse: a normalisation in training mode or
    without running statistics, padding="same", values that something else reads too.
    """

    pattern: ClassVar[AnyOf] = AnyOf(*((ops.relu(term), binds) for term, binds in after(*CONVOLUTIONS)))

    def check(self, at: Site, x: Node, **bindings: Any) -> str | None:
        for name in ("stride", "padding", "dilation"):
            if not isinstance(value := bindings[name], tuple) or not all(isinstance(v, int) for v in value):
                return f"{name} is {value!r}, expected numbers"
        return super().check(at, x, **bindings)

    def rewrite(self, at: Site, x: Node, **bindings: Any) -> Node:
        window = (bindings[name] for name in ("stride", "padding", "dilation", "groups"))
        return at.emit(ops.conv_relu, x, *self.parameters(at, **bindings), *window)
