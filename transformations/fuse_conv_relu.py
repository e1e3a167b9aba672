"""A convolution and the ReLU behind it are one operator."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.pattern import AnyOf, Apply, OptionalTensor, Tensor, Var
from fxopt.transformation import Rewrite, Site
from fxopt.transformations._fusion import foreign


def _activated(convolution: mechanism.Op) -> Apply:
    window = {name: Var(name) for name in ("stride", "padding", "dilation", "groups")}
    return ops.relu(convolution(Tensor("x"), Tensor("weight"), OptionalTensor("bias"), **window))


@dataclass(frozen=True)
class FuseConvReLU(Rewrite):
    """
    relu(conv(x, w, b, window))  ->  conv_relu(x, w, b, window)

    Exact, for convolutions over 1, 2 and 3 dimensions.  Saves the activation's memory.  Refuses padding="same", and a
    convolution that something else reads too.
    """

    pattern: ClassVar[AnyOf] = AnyOf(*map(_activated, (ops.conv1d, ops.conv2d, ops.conv3d)))

    def check(self, at: Site, weight: Any, bias: Any, **window: Any) -> str | None:
        for name in ("stride", "padding", "dilation"):
            value = window[name]
            if not isinstance(value, tuple) or not all(isinstance(v, int) for v in value):
                return f"{name} is {value!r}, expected numbers"
        return foreign(at, weight, bias)

    def rewrite(self, at: Site, x: Node, **rest: Any) -> Node:
        return at.emit(ops.conv_relu, x, **rest)
