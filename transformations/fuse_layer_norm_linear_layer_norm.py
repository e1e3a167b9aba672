"""A linear layer between two layer normalisations is one operator with them."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from fxopt import vocabulary as ops
from fxopt.pattern import Apply, Number, OptionalTensor, Tensor, Var
from fxopt.transformation import Rewrite, Site
from fxopt.transformations._fusion import foreign


def _norm(x: Any, n: int) -> Apply:
    affine = OptionalTensor(f"norm_weight{n}"), OptionalTensor(f"norm_bias{n}")
    return ops.layer_norm(x, Var(f"normalized_shape{n}"), *affine, eps=Number(f"eps{n}"))


@dataclass(frozen=True)
class FuseLayerNormLinearLayerNorm(Rewrite):
    """
    layer_norm(linear(layer_norm(x, s, g, h), w, b), t, i, j)
      ->  layer_norm_linear_layer_norm(x, s, g, h, w, b, t, i, j)

    Exact.  One node, of which a compiler or a later pass can make one kernel; on the CPU it gains nothing by itself,
    save the dispatch at one row.  Refuses layers whose result something else reads too.
    """

    pattern: ClassVar[Apply] = _norm(
        ops.linear(_norm(Tensor("x"), 1), Tensor("weight"), OptionalTensor("bias")),
        2,
    )

    def check(self, at: Site, **operands: Any) -> str | None:
        return foreign(at, *(v for k, v in operands.items() if "eps" not in k and "shape" not in k))

    def rewrite(self, at: Site, **operands: Any) -> Node:
        return at.emit(ops.layer_norm_linear_layer_norm, **operands)
