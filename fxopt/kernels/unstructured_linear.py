"""A linear layer with an unstructured sparse weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxopt.errors import UsageError
from fxopt.kernels.unstructured import multiply
from fxopt.kernels.unstructured_pattern import Pattern, by_row, linear_pattern, rows_of
from fxopt.kernels.unstructured_weight import SparseWeight, check_initialized, check_tensors, mask_of


class SparseLinear(SparseWeight):
    """
    x @ weightᵀ + bias over the weight's non-zeros: x (…, in_features) -> (…, out_features), float32 or float64.

    `weight` (out_features, in_features) is a dense one with zeros in it, `bias` (out_features,) or None; both are
    copied.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        check_tensors("SparseLinear", weight, bias, ("out", "in"))
        self.out_features, self.in_features = weight.shape
        dense = weight.detach()
        mask = mask_of(dense)
        like = nn.Linear(1, 1, device="meta")  # which draws no random numbers
        like.weight.requires_grad_(weight.requires_grad or not isinstance(weight, nn.Parameter))
        self._set(dense[mask], linear_pattern(*by_row(mask), self.in_features), bias, like)

    @classmethod
    def from_dense(cls, linear: nn.Linear) -> SparseLinear:
        """The same layer over the non-zeros of its weight, trained or frozen as it is, in the same mode."""
        if not isinstance(linear, nn.Linear):
            raise UsageError(f"SparseLinear.from_dense was given a {type(linear).__name__}; expected a torch.nn.Linear")
        check_initialized(linear)
        return cls(linear.weight, linear.bias).train(linear.training)

    @classmethod
    def from_pattern(cls, values: Tensor, bias: Tensor | None, pattern: Pattern) -> SparseLinear:
        """The layer on these very tensors, nothing copied: values (values,), bias (out_features,) or None."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.out_features, new.in_features = pattern.row_start.numel() - 1, pattern.column_start.numel() - 1
        new._hold(values, bias, pattern)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """x (…, in_features) -> (…, out_features)."""
        y: Tensor = multiply(input, *self._tensors())
        return y

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out_features, in_features)"""
        return self.out_features, self.in_features

    def pattern_of(self, row_start: Tensor, column: Tensor) -> Pattern:
        """The whole pattern, from its view by rows."""
        return linear_pattern(row_start, column, self.in_features)

    def _places(self) -> tuple[Tensor, Tensor]:
        return rows_of(self.row_start), self.column.long()

    def dense_weight(self) -> Tensor:
        """The weight with its zeros (out_features, in_features)."""
        return self.values.new_zeros(self.weight_shape).index_put(self._places(), self.values)

    def mask(self) -> Tensor:
        """Where the values stand: boolean (out_features, in_features)."""
        mask = torch.zeros(self.weight_shape, dtype=torch.bool, device=self.column.device)
        mask[self._places()] = True
        return mask

    def to_dense(self) -> nn.Linear:
        """The same layer as a torch.nn.Linear."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dense_weight().detach(), requires_grad=self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Sizes and sparsity."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, sparsity={self.sparsity:.1%}"
