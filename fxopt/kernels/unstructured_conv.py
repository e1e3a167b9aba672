"""A 2-d convolution with an unstructured sparse weight."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.errors import UsageError
from fxopt.kernels.unstructured import convolve
from fxopt.kernels.unstructured_pattern import Pattern, by_row, conv2d_pattern, rows_of
from fxopt.kernels.unstructured_weight import SparseWeight, check_initialized, check_tensors, mask_of
from fxopt.kernels.unstructured_window import check_options

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class SparseConv2d(SparseWeight):
    """
    conv2d over the weight's non-zeros: x (batch, in_channels, height, width), or without a batch; float32 or float64.

    Every option of `torch.nn.Conv2d`: stride, padding ("same" and "valid" too), padding_mode, dilation, groups,
    rectangular kernels. Make one with `from_dense`, or from a weight (out_channels, in_channels / groups, height,
    width) with zeros in it, a bias (out_channels,) or None, and the options of a `torch.nn.Conv2d`. The result is
    contiguous, also of a channels-last input.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
    ) -> None:
        super().__init__()
        check_tensors("SparseConv2d", weight, bias, ("out", "in / groups", "height", "width"))
        outputs, inner, *kernel = weight.shape
        try:
            like = nn.Conv2d(
                inner * groups,
                outputs,
                (kernel[0], kernel[1]),
                stride,
                padding,
                dilation,
                groups,
                bias is not None,
                padding_mode,
                device="meta",
            )
        except ValueError as error:
            raise UsageError(f"SparseConv2d was given options that torch.nn.Conv2d refuses: {error}") from error
        padded = (0, 0) if isinstance(like.padding, str) else like.padding
        check_options(like.kernel_size, like.stride, padded, like.dilation, groups)
        like.weight.requires_grad_(weight.requires_grad or not isinstance(weight, nn.Parameter))
        self.in_channels, self.out_channels, self.groups = inner * groups, outputs, groups
        self.kernel_size: Any = like.kernel_size
        self.stride: Any = like.stride
        self.dilation: Any = like.dilation
        self.padding: Any = like.padding  # "same", "valid", two numbers or four
        self.padding_mode: PaddingMode = like.padding_mode
        dense = weight.detach()
        mask = mask_of(dense)
        row_start, column = by_row(mask.reshape(outputs, -1))
        taps = kernel[0] * kernel[1]
        column = column + (rows_of(row_start) // (outputs // groups) * inner * taps).to(torch.int32)
        self._set(dense[mask], self.pattern_of(row_start, column), bias, like)

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, vectorizing_over_on: bool | None = None) -> SparseConv2d:
        """
        The same layer over the non-zeros of its weight, trained or frozen as it is, in the same mode.

        `vectorizing_over_on` chooses between SparseProp's two kernels, whose vectors run along a row of the result or
        across the batch. Here there is one: its vectors run over the pixels of all rows joined, which fills them for
        narrow and for wide images and for a batch of one. So True, False and None, "whichever is faster", do the same.
        """
        if vectorizing_over_on is not None and not isinstance(vectorizing_over_on, bool):
            raise UsageError(f"vectorizing_over_on={vectorizing_over_on!r} was given; expected True, False or None")
        if not isinstance(conv, nn.Conv2d):
            raise UsageError(f"SparseConv2d.from_dense was given a {type(conv).__name__}; expected a torch.nn.Conv2d")
        check_initialized(conv)
        options = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
        return cls(conv.weight, conv.bias, *options).train(conv.training)  # type: ignore[arg-type]

    @classmethod
    def from_pattern(
        cls,
        values: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> SparseConv2d:
        """The layer on these very tensors, nothing copied; `padding` is (top, bottom, left, right)."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.out_channels = pattern.row_start.numel() - 1
        new.in_channels = (pattern.column_start.numel() - 1) // (stride[0] * stride[1])
        new.kernel_size, new.stride, new.dilation, new.groups = kernel_size, stride, dilation, groups
        new.padding, new.padding_mode = _as_torch(padding, kernel_size, dilation), "zeros"
        new._hold(values, bias, pattern)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """x (batch, in_channels, height, width) -> (batch, out_channels, height', width'), or both without a batch."""
        top, bottom, left, right = pads(self.padding, self.kernel_size, self.dilation)
        if self.padding_mode != "zeros":
            input = F.pad(input, (left, right, top, bottom), self.padding_mode)
            top = bottom = left = right = 0
        padding, kernel = (top, bottom, left, right), self.kernel_size
        y: Tensor = convolve(input, *self._tensors(), kernel, self.stride, padding, self.dilation, self.groups)
        return y

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out_channels, in_channels / groups, height, width)"""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def pattern_of(self, row_start: Tensor, column: Tensor) -> Pattern:
        """The whole pattern, from its view by rows."""
        return conv2d_pattern(row_start, column, self.in_channels, self.kernel_size, self.stride, self.dilation)

    def _places(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the values in the weight as a matrix (out_channels, in_channels / groups · taps)."""
        rows = rows_of(self.row_start)
        inner = torch.Size(self.weight_shape[1:]).numel()
        return rows, self.column.long() - rows // (self.out_channels // self.groups) * inner

    def dense_weight(self) -> Tensor:
        """The weight with its zeros, of `weight_shape`."""
        flat = self.values.new_zeros(self.out_channels, torch.Size(self.weight_shape[1:]).numel())
        return flat.index_put(self._places(), self.values).view(self.weight_shape)

    def mask(self) -> Tensor:
        """Where the values stand: boolean, of `weight_shape`."""
        flat = torch.Size(self.weight_shape[1:]).numel()
        mask = torch.zeros(self.out_channels, flat, dtype=torch.bool, device=self.column.device)
        mask[self._places()] = True
        return mask.view(self.weight_shape)

    def to_dense(self) -> nn.Conv2d:
        """The same layer as a torch.nn.Conv2d."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device="meta",
        )
        conv.weight = nn.Parameter(self.dense_weight().detach(), requires_grad=self.values.requires_grad)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, options and sparsity."""
        said = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != default:
                said += f", {name}={getattr(self, name)!r}"
        return f"{said}, bias={self.bias is not None}, sparsity={self.sparsity:.1%}"


def pads(
    padding: str | tuple[int, ...], kernel_size: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a convolution's padding; "same" with an odd total pads one more at the end."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
    assert not isinstance(padding, str)
    if len(padding) == 4:
        return padding[0], padding[1], padding[2], padding[3]
    return padding[0], padding[0], padding[1], padding[1]


def _as_torch(
    padding: tuple[int, int, int, int], kernel_size: tuple[int, ...], dilation: tuple[int, ...]
) -> str | tuple[int, ...]:
    """As torch.nn.Conv2d says it, where it can: two numbers, or "same"; else the four numbers."""
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return top, left
    return "same" if padding == pads("same", kernel_size, dilation) else padding
