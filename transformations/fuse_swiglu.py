"""The gate of a SwiGLU feed-forward network is one operator."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxopt import vocabulary as ops
from fxopt.pattern import Apply, Tensor
from fxopt.transformation import Rewrite, Site
from fxopt.transformations._fusion import foreign, no_tensor


@dataclass(frozen=True)
class FuseSwiGLU(Rewrite):
    """
    silu(gate) * up  ->  swiglu(gate, up)

    Exact.  Saves the activation's memory.  Refuses ``up`` that is not known to be a tensor, and a product in place that
    has another type than the same product would have elsewhere.  Source: N. Shazeer, GLU Variants Improve Transformer,
    2020 (arXiv:2002.05202).
    """

    pattern: ClassVar[Apply] = ops.mul(ops.silu(Tensor("gate")), Tensor("up"))

    def check(self, at: Site, gate: Any, up: Any) -> str | None:
        if reason := no_tensor(at, gate, up, at.root) or foreign(at, gate, up):
            return reason
        values = [at.value(x) for x in (gate, up, at.root)]
        a, b, product = (v for v in values if v is not None)
        dtype = torch.result_type(a, b)
        return None if product.dtype == dtype else f"{at.root} is of {product.dtype}, and silu(gate) * up of {dtype}"

    def rewrite(self, at: Site, gate: Node, up: Node) -> Node:
        return at.emit(ops.swiglu, gate, up)
