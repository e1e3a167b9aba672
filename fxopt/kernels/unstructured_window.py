"""The sizes of a convolution with a sparse weight, and the same convolution by torch's dense one."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.errors import UsageError
from fxopt.kernels.unstructured_pattern import rows_of


class Window(NamedTuple):
    """A convolution's sizes: all that its kernels need to know besides the batch."""

    channels: int
    outputs: int
    size: tuple[int, int]
    out: tuple[int, int]
    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]  # top, bottom, left, right
    dilation: Sequence[int]

    @classmethod
    def of(
        cls,
        x: Tensor,
        row_start: Tensor,
        column_start: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Window:
        check_options(kernel, stride, padding, dilation, groups)
        columns, phases = column_start.shape[0] - 1, stride[0] * stride[1]
        channels = columns // phases
        if channels * phases != columns:
            given = f"a pattern of {columns} columns and a stride of {tuple(stride)}"
            raise UsageError(f"sparse_conv2d was given {given}; expected as many for each phase: make the layer anew")
        if x.dim() not in (3, 4) or x.shape[-3] != channels:
            expected = f"(batch, {channels}, height, width) or ({channels}, height, width)"
            raise UsageError(f"sparse_conv2d was given an input of shape {tuple(x.shape)}; expected {expected}")
        height, width = x.shape[-2:]
        spans = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
        padded = (height + padding[0] + padding[1], width + padding[2] + padding[3])
        if padded[0] < spans[0] or padded[1] < spans[1]:
            raise UsageError(
                f"a kernel of {spans[0]}×{spans[1]} does not fit a padded input of {padded[0]}×{padded[1]}"
            )
        out = tuple((padded[i] - spans[i]) // stride[i] + 1 for i in (0, 1))
        outputs = row_start.shape[0] - 1
        if channels % groups != 0 or outputs % groups != 0:
            raise UsageError(
                f"{channels} input and {outputs} output channels were given; expected {groups} groups of them"
            )
        return cls(channels, outputs, (height, width), (out[0], out[1]), kernel, stride, padding, dilation)

    def result(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the convolution of `x`."""
        return (*x.shape[:-3], self.outputs, *self.out)

    def fits(self) -> bool:
        """Whether there are channels, and the kernels' int32 offsets reach over a padded image, both ways."""
        sides = [
            max(self.size[i] + sum(self.padding[2 * i : 2 * i + 2]), self.out[i] * self.stride[i])
            + self.dilation[i] * self.kernel[i]
            + 2 * self.stride[i]
            for i in (0, 1)
        ]
        return self.channels > 0 and math.prod(sides) * max(self.channels, self.outputs) < 2**31

    def shape(self, batch: int) -> Any:
        """`Shape` of unstructured_conv.cpp."""
        top, _, left, _ = self.padding
        numbers = (batch, self.channels, *self.size, self.outputs, *self.out, *self.kernel, *self.stride, top, left)
        return (ctypes.c_int64 * 15)(*numbers, *self.dilation)

    def pad(self, images: Tensor) -> Tensor:
        top, bottom, left, right = self.padding
        return F.pad(images, (left, right, top, bottom))

    def places(self, row_start: Tensor, column: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Rows and columns of the values in the weight as torch has it, (outputs, channels / groups · taps)."""
        rows, taps = rows_of(row_start), self.kernel[0] * self.kernel[1]
        first = rows // (self.outputs // groups) * (self.channels // groups)
        return rows, column.long() - first * taps

    def weight(self, values: Tensor, row_start: Tensor, column: Tensor, groups: int) -> Tensor:
        """The weight as torch has it; differentiable in `values`."""
        inner = (self.channels // groups, *self.kernel)
        zeros = values.new_zeros(self.outputs, math.prod(inner))
        dense = zeros.index_put(self.places(row_start, column, groups), values)
        return dense.view(self.outputs, *inner)

    def backward(
        self,
        g: Tensor,
        x: Tensor,
        images: Tensor,
        values: Tensor,
        row_start: Tensor,
        column: Tensor,
        groups: int,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`sparse_conv2d_backward` by torch's dense convolution."""
        weight = self.weight(values, row_start, column, groups)
        dx, dw, db = gradients_like(x, values, self.outputs, wanted)
        padded, whole = self.pad(images), [wanted[0], wanted[1], False]
        options = (list(self.stride), [0, 0], list(self.dilation), False, [0, 0], groups)
        by_input, by_weight, _ = torch.ops.aten.convolution_backward(g, padded, weight, None, *options, whole)
        if wanted[0]:
            top, _, left, _ = self.padding
            inner = by_input[..., top : top + self.size[0], left : left + self.size[1]]
            dx = inner.contiguous().view(x.shape)
        if wanted[1]:
            dw = by_weight.reshape(self.outputs, -1)[self.places(row_start, column, groups)]
        return dx, dw, g.sum((0, 2, 3)) if wanted[2] else db


def check_options(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> None:
    """`UsageError` for options that no convolution has: what is negative would have the kernels write out of bounds."""
    pairs = len(kernel) == len(stride) == len(dilation) == 2 and len(padding) in (2, 4)
    if not pairs or min(padding) < 0 or min(*kernel, *stride, *dilation, groups) < 1:
        given = f"kernel {tuple(kernel)}, stride {tuple(stride)}, padding {tuple(padding)}, dilation {tuple(dilation)}"
        expected = "expected two of each, a padding of 0 or more, and 1 or more for all others"
        raise UsageError(f"a convolution with {given}, groups {groups} was asked for; {expected}")


def gradients_like(x: Tensor, values: Tensor, outputs: int, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients by x, values and bias (outputs,); empty where not `wanted`."""
    dx = x.new_empty(*x.shape) if wanted[0] else x.new_empty(0)
    dw = values.new_empty(values.shape[0] if wanted[1] else 0)
    return dx, dw, values.new_empty(outputs if wanted[2] else 0)
