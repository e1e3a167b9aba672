"""Operands of fused operators, which do not know every kind of tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxopt import ops
from fxopt.transformation import Site

PLAIN = (torch.Tensor, nn.Parameter)


def foreign(at: Site, *operands: Any) -> str | None:
    """The first of ``operands`` that is a parameter or buffer of a tensor subclass, as a reason; None if none is."""
    for operand in operands:
        tensor = at.tensor(operand)
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_mkldnn or tensor.is_quantized):
            return f"{at.path(operand)} is a {type(tensor).__name__} of layout {tensor.layout}, expected a plain tensor"
    return None


def no_tensor(at: Site, *operands: Any) -> str | None:
    """The first of ``operands`` that is not known to be a tensor, as a reason: it may be a size; None if all are."""
    for operand in operands:
        if at.value(operand) is None:
            name = operand.path if isinstance(operand, ops.Attr) else operand
            return f"whether {name} is a tensor is not known; call fxopt.propagate(gm, inputs)"
    return None


def too_small(at: Site, weight: Any, least: int) -> str | None:
    """Why a weight of fewer than ``least`` elements is left alone; None for a larger one, and for one not known."""
    tensor = at.value(weight)
    if tensor is None or tensor.numel() >= least:
        return None
    return f"{at.root} multiplies with {tensor.numel()} elements, fewer than min_elements={least}: fusing costs time"
