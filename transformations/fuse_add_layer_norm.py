"""A residual sum and the layer normalisation of it are one operator."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.pattern import Apply, Number, OptionalTensor, Shared, Tensor, Var
from fxopt.transformation import Rewrite, Site
from fxopt.transformations._fusion import foreign, no_tensor


@dataclass(frozen=True)
class FuseAddLayerNorm(Rewrite):
    """
    layer_norm(x + r, shape, w, b, eps)         ->  add_layer_norm(x, r, shape, w, b, eps)
    y = x + r; layer_norm(y, shape, w, b, eps)  ->  n, y = add_layer_norm_sum(x, r, shape, w, b, eps)

    Exact.  One node, of which a compiler or a later pass can make one kernel; on the CPU it gains nothing by itself.
    Refuses a sum that is read before the normalisation, or of what is not known to be two tensors.
    """

    pattern: ClassVar[Apply] = ops.layer_norm(
        Shared(ops.add(Tensor("x"), Tensor("residual"))),
        Var("shape"),
        OptionalTensor("weight"),
        OptionalTensor("bias"),
        eps=Number("eps"),
    )

    def check(self, at: Site, x: Any, residual: Any, weight: Any, bias: Any, **_: Any) -> str | None:
        earlier = next((user for user in _sum(at).users if user < at.root), None)
        if earlier is not None:
            return f"{earlier} reads the sum {_sum(at)} before it is normalised"
        return no_tensor(at, x, residual) or foreign(at, x, residual, weight, bias)

    def rewrite(self, at: Site, x: Node, residual: Node, shape: Any, weight: Any, bias: Any, eps: float) -> Node:
        total = _sum(at)
        if len(total.users) == 1:
            return at.emit(ops.add_layer_norm, x, residual, shape, weight, bias, eps)
        both = at.emit(ops.add_layer_norm_sum, x, residual, shape, weight, bias, eps)
        normed, again = at.emit(ops.getitem, both, 0), at.emit(ops.getitem, both, 1)
        if "val" in total.meta:
            again.meta["val"] = total.meta["val"]
        total.replace_all_uses_with(again, lambda user: user is not at.root)
        return normed


def _sum(at: Site) -> Node:
    call = mechanism.read(at.gm, at.root)
    assert call is not None
    node: Node = call.arguments["input"]
    return node
