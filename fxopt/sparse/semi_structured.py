"""A linear layer whose weight is 2:4 sparse, as a module, and which weights it keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import UsageError
from fxopt.kernels import semi_structured as kernels
from fxopt.sparse.block_select import Select, dense_weight, is_fan_in_fan_out, moments
from fxopt.sparse.pruning import n_m_mask
from fxopt.sparse.sparsified_linear import SparsifiedLinear

SELECTS = ("magnitude", "activation", "existing")


class SemiStructuredLinear(SparsifiedLinear):
    """
    y = x @ weightᵀ + bias, weight (out, in) with two of each four consecutive inputs: (…, in) -> (…, out).

    A drop-in for `torch.nn.Linear` in inference, on GPUs with sparse tensor cores: those of compute capability 8.x, in
    float16 and bfloat16. Everywhere else it computes the same, as slowly as the dense layer and slower. It can be
    trained too, where its weights are; their gradient costs that of a dense layer.

    Its parameters are `values` (out, in / 2) and `bias` (out,); its buffer `metadata` (out, in / 16), int16, says where
    the values stand, as in `torch.sparse.SparseSemiStructuredTensorCUTLASS`. `UsageError` unless out is a multiple of
    32 and in of 64. float32, bfloat16, float16 and float64.
    """

    TENSORS = ("values", "metadata")
    OPERATOR = torch.ops.fxopt.semi_structured_linear.default

    metadata: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(max(1, in_features // 2))  # of the inputs that an output has, as torch.nn.Linear draws
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype).uniform_(-bound, bound)
        made = torch.empty(out_features, device=device, dtype=dtype).uniform_(-bound, bound) if bias else None
        self._hold(nn.Parameter(weight), None if made is None else nn.Parameter(made), kept_pairs(weight))

    def _hold(self, weight: Tensor, bias: nn.Parameter | None, mask: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        values, metadata = kernels.compress(weight.detach(), mask.to(weight.device))
        self.values = nn.Parameter(values, requires_grad=weight.requires_grad)
        self.register_parameter("bias", bias)
        self.register_buffer("metadata", metadata)

    @classmethod
    def of(cls, weight: Tensor, bias: nn.Parameter | None, mask: Tensor) -> SemiStructuredLinear:
        """The layer that has `weight` (out, in) where `mask`, of its shape, is true: two of each four; this bias."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._hold(weight, bias, mask)
        return layer

    @classmethod
    def from_dense(
        cls, linear: nn.Module, select: Select = "magnitude", inputs: Tensor | None = None, rescale: bool = False
    ) -> SemiStructuredLinear:
        """
        A 2:4 sparse layer made of `linear` (`torch.nn.Linear`, or transformers' `Conv1D`), whose bias it shares.

        What is kept: see `fxopt.sparse.kept_pairs`. `inputs` (…, in): typical inputs, which "activation" and `rescale`
        go by; `rescale` scales each output to make up for what is left out.
        """
        weight, bias = dense_weight(linear)
        layer = cls.of(weight, bias, kept_pairs(weight, select, inputs))
        layer.fan_in_fan_out = is_fan_in_fan_out(linear)
        if rescale:
            layer.rescale(weight, inputs)
        return layer.train(linear.training)

    def dense(self, values: Tensor | None = None) -> Tensor:
        """`values`, or else the layer's own, as a matrix (out, in)."""
        return kernels.to_dense(self.values if values is None else values, self.metadata)

    def taken(self, weight: Tensor) -> Tensor:
        """The values of a matrix (out, in) that the layer keeps."""
        return weight.gather(1, kernels.places(self.metadata))

    def operands(self, x: Any, bias: Any, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of `semi_structured_linear`."""
        values, metadata = tensors
        return x, values, bias, metadata

    @torch.no_grad()
    def scale(self, factor: Tensor) -> None:
        """Multiply each output by its `factor` (out,)."""
        self.values.mul_(factor.unsqueeze(1))

    def forward(self, input: Tensor) -> Tensor:
        """input (…, in) -> (…, out)."""
        y: Tensor = torch.ops.fxopt.semi_structured_linear.default(input, self.values, self.bias, self.metadata)
        return y

    def extra_repr(self) -> str:
        """What `repr` says beside the name."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def kept_pairs(weight: Tensor, select: Select = "magnitude", inputs: Tensor | None = None) -> Tensor:
    """
    Two of every four consecutive inputs of each output of `weight` (out, in), bool of its shape.

    - "magnitude": the two largest.
    - "activation": the two largest, each weighted by the norm of its input over `inputs` (…, in), as Wanda weighs
      single weights (Sun et al., 2023).
    - "existing": those that are not zero, of which there may be no more than two.

    Raises `UsageError`, also where out is no multiple of 32 or in none of 64.
    """
    if not isinstance(select, str) or select not in SELECTS:
        raise UsageError(f"select={select!r} was given, expected {', '.join(SELECTS)} for 2:4")
    if not kernels.fits(weight.shape):
        wanted = f"multiples of {kernels.ROWS} and {kernels.COLUMNS}"
        raise UsageError(f"a weight of shape {tuple(weight.shape)} was given, expected {wanted} for 2:4")
    score = weight.detach()
    if select == "activation":
        score = score.double() * moments(weight, inputs).sqrt()
    mask = n_m_mask(score, 2, 4)
    if select == "existing" and not has_pairs(weight):
        raise UsageError(
            'select="existing" found more than two of four weights that are not zero, which 2:4 cannot keep'
        )
    return mask


def has_pairs(weight: Tensor) -> bool:
    """Whether of every four consecutive inputs of each output of `weight` (out, in) at most two are not zero."""
    return kernels.fits(weight.shape) and bool((weight.detach().reshape(-1, 4) != 0).sum(1).le(2).all())
