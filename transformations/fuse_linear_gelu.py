"""A linear layer and the GELU behind it are one operator."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from fxopt import vocabulary as ops
from fxopt.pattern import Apply, OptionalTensor, Tensor, Var
from fxopt.transformation import Rewrite, Site
from fxopt.transformations._fusion import foreign, too_small


@dataclass(frozen=True)
class FuseLinearGELU(Rewrite):
    """
    gelu(linear(x, w, b), approximate)  ->  linear_gelu(x, w, b, approximate)

    Exact above 16 rows; within rounding below, where oneDNN may sum in another order.  Saves the activation's memory,
    and a third of the time at few rows on the CPU.  Refuses a linear layer that something else reads too, and GPT-2's
    addmm, whose weight stands transposed.

    `min_elements`: leave smaller weights alone, where the dispatch of the operator costs more than it saves.
    """

    min_elements: int = 0

    pattern: ClassVar[Apply] = ops.gelu(
        ops.linear(Tensor("x"), Tensor("weight"), OptionalTensor("bias")), approximate=Var("approximate")
    )

    def check(self, at: Site, weight: Any, bias: Any, **_: Any) -> str | None:
        return foreign(at, weight, bias) or too_small(at, weight, self.min_elements)

    def rewrite(self, at: Site, x: Node, weight: Any, bias: Any, approximate: str) -> Node:
        return at.emit(ops.linear_gelu, x, weight, bias, approximate)
