"""Dropout does nothing outside of training."""

from dataclasses import dataclass

from torch.fx import Node

from fxopt import vocabulary as ops
from fxopt.pattern import AnyOf, Tensor
from fxopt.transformation import Rewrite, Site


@dataclass(frozen=True)
class EliminateDropout(Rewrite):
    """
    dropout(x, training=False)  ->  x

    Exact.
    """

    pattern = AnyOf(
        ops.dropout(Tensor("x"), p=..., training=False),
        ops.dropout(Tensor("x"), p=0.0, training=True),
    )

    def rewrite(self, at: Site, x: Node) -> Node:
        return x
