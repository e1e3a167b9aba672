"""A product is cheaper than a quotient."""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxopt import vocabulary as ops
from fxopt.pattern import AnyOf, Constant, Number, Tensor
from fxopt.transformation import New, Rewrite, Site


@dataclass(frozen=True)
class ChangeTrueDivToMulByInverse(Rewrite):
    """
    x / c  ->  x * (1 / c)

    Exact when ``c`` is a power of two, within one rounding of x's type otherwise.
    """

    pattern = AnyOf(ops.div(Tensor("x"), Number("c")), ops.div(Tensor("x"), Constant("c")))

    def check(self, at: Site, x: Node, c: Any) -> str | None:
        if isinstance(c, int | float):
            return _uninvertible(float(c))
        tensor = at.tensor(c)
        if tensor is None or not tensor.is_floating_point() or tensor.requires_grad:
            return f"{at.path(c)} is trained or no floating-point tensor"
        inverse = 1 / tensor
        finite = torch.isfinite(tensor) & torch.isfinite(inverse) & (inverse.abs() >= torch.finfo(tensor.dtype).tiny)
        return None if bool(finite.all()) else f"{at.path(c)} holds a divisor without an exact-range inverse"

    def rewrite(self, at: Site, x: Node, c: Any) -> Node:
        if isinstance(c, int | float):
            return at.emit(ops.mul, x, 1 / c)
        tensor = at.tensor(c)
        assert tensor is not None
        return at.emit(ops.mul, x, New(1 / tensor, f"{at.path(c)}_inverse"))


def _uninvertible(c: float) -> str | None:
    if c == 0 or not math.isfinite(c) or not math.isfinite(1 / c):
        return f"{c} has no finite inverse"
    # 1 / c would be rounded more coarsely than the quotient
    return f"the inverse of {c} is subnormal" if abs(1 / c) < sys.float_info.min else None
