"""Gated activations of feed-forward networks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fxopt.errors import UsageError
from fxopt.kernels.registration import register


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """
    silu(gate) · up, two floating tensors that broadcast.

    N. Shazeer, GLU Variants Improve Transformer, 2020 (arXiv:2002.05202).
    """
    return F.silu(gate) * up


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, where gate_up (…, 2n) holds the gate in its first half and up in its second -> (…, n)."""
    gate, up = _halves(gate_up)
    return F.silu(gate) * up


def swiglu_kernel(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu`, multiplied in place on the fresh activation where nothing broadcasts or changes dtype."""
    activated = F.silu(gate)
    if activated.dtype == up.dtype and activated.shape == up.shape and activated.stride() == up.stride():
        return activated.mul_(up)
    return activated * up


def swiglu_packed_kernel(gate_up: Tensor) -> Tensor:
    """`swiglu_packed`, multiplied in place on the fresh activation."""
    gate, up = _halves(gate_up)
    return F.silu(gate).mul_(up)


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    if gate_up.shape[-1] % 2 != 0:
        raise UsageError(
            f"swiglu_packed was given a last dimension of {gate_up.shape[-1]}; it holds gate and up, so it must be even"
        )
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up


register(swiglu, swiglu_kernel)
register(swiglu_packed, swiglu_packed_kernel)
