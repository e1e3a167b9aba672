"""Dropout does nothing outside of training."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from fxopt import vocabulary as ops
from fxopt.pattern import AnyOf, Tensor
from fxopt.transformation import Rewrite, Site

_KINDS = (ops.dropout, ops.feature_dropout, ops.alpha_dropout, ops.feature_alpha_dropout)


@dataclass(frozen=True)
class EliminateDropout(Rewrite):
    """
    dropout(x, training=False)  ->  x

    Exact, in place too; also for dropout of whole features and for alpha dropout, and in training with p = 0.
    """

    pattern: ClassVar[AnyOf] = AnyOf(
        *(kind(Tensor("x"), p=..., training=False) for kind in _KINDS),
        *(kind(Tensor("x"), p=0.0, training=True) for kind in _KINDS),
    )

    def rewrite(self, at: Site, x: Node) -> Node:
        return x
