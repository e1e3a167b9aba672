"""GELU's tanh form written out, as in GPT-2, is one operator of torch."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from fxopt import vocabulary as ops
from fxopt.pattern import AnyOf, Number, Tensor
from fxopt.transformation import Rewrite, Site

_X, _C = Tensor("x"), Number("c")
_K = 0.044715
_CUBE = AnyOf(ops.pow(_X, 3), ops.mul(ops.mul(_X, _X), _X))
_ANGLES = (
    ops.mul(ops.add(_X, ops.mul(_CUBE, _K)), _C),  # c (x + k x³), GPT-2
    ops.mul(ops.mul(_X, _C), ops.add(ops.mul(ops.mul(_X, _K), _X), 1)),  # c x (1 + k x x), "gelu_fast"
    ops.mul(ops.mul(_X, _C), ops.add(ops.mul(ops.mul(_X, _X), _K), 1)),
)
_FACTORS = tuple(ops.add(ops.tanh(angle), 1) for angle in _ANGLES)


@dataclass(frozen=True)
class FuseTanhGELU(Rewrite):
    """
    0.5 * x * (1 + tanh(c * (x + 0.044715 * x ** 3)))  ->  gelu(x, approximate="tanh")

    Within rounding, with c = sqrt(2 / pi) to at least 8 digits.  Also as "gelu_fast" writes it.  In half precision the
    result is closer to the truth than what was written, which rounds after each step.  Source: D. Hendrycks and
    K. Gimpel, Gaussian Error Linear Units, 2016 (arXiv:1606.08415).
    """

    pattern: ClassVar[AnyOf] = AnyOf(
        *(ops.mul(ops.mul(_X, 0.5), factor) for factor in _FACTORS),
        *(ops.mul(ops.mul(factor, 0.5), _X) for factor in _FACTORS),
        *(ops.mul(ops.mul(_X, factor), 0.5) for factor in _FACTORS),
    )

    def check(self, at: Site, x: Any, c: float) -> str | None:
        if not math.isclose(c, math.sqrt(2 / math.pi), rel_tol=1e-8):
            return f"expected sqrt(2 / pi) = {math.sqrt(2 / math.pi)}, found {c}"
        value = at.value(x)
        if value is None:
            return f"whether {x} is a floating-point tensor is not known; call fxopt.propagate(gm, inputs)"
        return None if value.is_floating_point() else f"{x} is of {value.dtype}, expected a floating-point type"

    def rewrite(self, at: Site, x: Node, c: float) -> Node:
        return at.emit(ops.gelu, x, approximate="tanh")
