"""A product is cheaper than a quotient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.delta import Delta
from fxopt.pattern import AnyOf, Constant, Number, Tensor
from fxopt.transformation import New, Rewrite, Site
from fxopt.transformations._constants import unfit

# Products of matrices are tensors of at least one dimension and keep the type of their inputs: their quotient by a
# number that has an inverse in every floating-point type can be rewritten although nothing is known of their value.
_PRODUCTS = frozenset({ops.linear, ops.addmm, ops.matmul, ops.mm, ops.bmm, ops.baddbmm})


@dataclass(frozen=True)
class ChangeTrueDivToMulByInverse(Rewrite):
    """
    x / c  ->  x * (1 / c)

    Exact when ``c`` is a power of two, within 3 rounding errors of the result's type otherwise.  ``c`` is a number, a
    parameter or a buffer; ``c`` and ``1 / c`` have to be normal numbers of that type (no zero, subnormal, infinity or
    NaN), and ``x`` has to be a floating-point tensor: a number divided exactly may be a size.
    """

    pattern = AnyOf(ops.div(Tensor("x"), Number("c")), ops.div(Tensor("x"), Constant("c")))

    def check(self, at: Site, x: Node, c: Any) -> str | None:
        value = at.value(x)
        if value is None and not _is_product(at, x):
            return f"whether {x} is a floating-point tensor is not known; call fxopt.propagate(gm, inputs)"
        if value is not None and not value.is_floating_point():
            return f"{x} is of {value.dtype}, which a quotient promotes; expected a floating-point type"
        if isinstance(c, int | float):
            return _uninvertible(c, torch.float16 if value is None else value.dtype)
        return self._check_tensor(at, x, value, c)

    def _check_tensor(self, at: Site, x: Node, value: torch.Tensor | None, c: Any) -> str | None:
        if value is None:
            return f"the type of {x} / {at.path(c)} is not known; call fxopt.propagate(gm, inputs)"
        if reason := unfit(at.gm, c):
            return reason
        divisor = at.tensor(c)
        assert divisor is not None
        if divisor.is_complex():
            return f"{at.path(c)} is complex"
        of = torch.result_type(value, divisor)
        bad = _abnormal(divisor.double(), of)
        return f"{at.path(c)} holds {bad}, which has no normal inverse in {of}" if bad is not None else None

    def rewrite(self, at: Site, x: Node, c: Any) -> Node:
        if isinstance(c, int | float):
            return at.emit(ops.mul, x, 1 / c)
        divisor, value = at.tensor(c), at.value(x)
        assert divisor is not None and value is not None
        dtype = torch.promote_types(torch.result_type(value, divisor), divisor.dtype)  # keeps the result's type
        inverse = (1 / divisor.detach().double()).to(dtype)
        if isinstance(divisor, nn.Parameter):
            inverse = nn.Parameter(inverse, requires_grad=divisor.requires_grad)
        return at.emit(ops.mul, x, New(inverse, f"{at.path(c)}_inverse", _persistent(at, c)))

    def carry(self, gm: Any, rewrite: Delta) -> Mapping[str, torch.Tensor] | None:
        """The divisors: the inverses of the inverses."""
        tensors = rewrite.tensors()
        found = {}
        for path, (before, after) in tensors.items():
            name, _, _ = path.rpartition("_inverse")
            old = tensors.get(name, (None, None))[0]
            if before is not None or after is None:
                continue
            now = mechanism.constant(gm, mechanism.Attr(path))
            if old is None or now is None or now.shape != old.shape or not old.is_floating_point():
                return None
            found[name] = (1 / now.detach().double()).to(old.dtype)
        return found


def _is_product(at: Site, x: Any) -> bool:
    call = mechanism.read(at.gm, x) if isinstance(x, Node) else None
    return call is not None and call.op in _PRODUCTS


def _uninvertible(c: float, dtype: torch.dtype) -> str | None:
    if isinstance(c, int) and abs(c) > 2**53:
        return f"{c} is no exact float"
    bad = _abnormal(torch.tensor(float(c), dtype=torch.float64), dtype)
    return f"{c} has no normal inverse in {dtype}" if bad is not None else None


def _abnormal(divisors: torch.Tensor, dtype: torch.dtype) -> float | None:
    """
    The first of the float64 ``divisors`` that is not normal in ``dtype``, or whose inverse is not; None if all are.

    A subnormal number has fewer digits, and some processors flush it to zero; zero, infinity and NaN have no inverse.
    """
    low, high = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    size, inverse = divisors.abs(), (1 / divisors).abs()
    fine = (size >= low) & (size <= high) & (inverse >= low) & (inverse <= high)
    return None if bool(fine.all()) else float(divisors[~fine].reshape(-1)[0])


def _persistent(at: Site, c: Any) -> bool:
    owner, _, name = at.path(c).rpartition(".")
    module = mechanism.submodule(at.gm, owner)
    return module is None or name not in module._non_persistent_buffers_set
