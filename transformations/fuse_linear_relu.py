"""A linear layer and the ReLU behind it are one operator."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from fxopt import vocabulary as ops
from fxopt.pattern import Apply, OptionalTensor, Tensor
from fxopt.transformation import Rewrite, Site
from fxopt.transformations._fusion import foreign, too_small


@dataclass(frozen=True)
class FuseLinearReLU(Rewrite):
    """
    relu(linear(x, w, b))  ->  linear_relu(x, w, b)

    Exact above 16 rows; within rounding below, where oneDNN may sum in another order.  Saves the activation's memory,
    and a third of the time at few rows on the CPU.  Refuses a linear layer that something else reads too.

    `min_elements`: leave smaller weights alone, where the dispatch of the operator costs more than it saves.
    """

    min_elements: int = 0

    pattern: ClassVar[Apply] = ops.relu(ops.linear(Tensor("x"), Tensor("weight"), OptionalTensor("bias")))

    def check(self, at: Site, weight: Any, bias: Any, **_: Any) -> str | None:
        return foreign(at, weight, bias) or too_small(at, weight, self.min_elements)

    def rewrite(self, at: Site, x: Node, weight: Any, bias: Any) -> Node:
        return at.emit(ops.linear_relu, x, weight, bias)
