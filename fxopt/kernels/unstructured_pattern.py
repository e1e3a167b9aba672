"""Where the values of an unstructured sparse weight stand: by rows for the forward, by columns for the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxopt.errors import UsageError


class Pattern(NamedTuple):
    """
    Where the values of a sparse weight stand, int32: by rows, and by columns.

    `row_start` (rows + 1,) and `column` (values,): the values of row r are those from row_start[r] to row_start[r + 1],
    in the columns told. `column_start` (columns + 1,), `row` and `place` (values,): the same by columns; `place` is
    where a value stands in the order by rows. Of a convolution, a row is an output channel. There a column, by rows, is
    input channel · taps + tap, the channel counted over all groups and the tap i · width + j; and by columns, the
    columns are the input channels once for each phase of the stride, and `row` is output channel · taps + tap.
    """

    row_start: Tensor
    column: Tensor
    column_start: Tensor
    row: Tensor
    place: Tensor


def linear_pattern(row_start: Tensor, column: Tensor, inputs: int) -> Pattern:
    """The pattern of a weight (outputs, inputs), from its view by rows."""
    rows = rows_of(row_start)
    return Pattern(row_start, column, *_by_column(column.long(), rows, inputs))


def conv2d_pattern(
    row_start: Tensor,
    column: Tensor,
    channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Pattern:
    """The pattern of a convolution over `channels` channels in all, from its view by rows."""
    taps = kernel_size[0] * kernel_size[1]
    channel, tap = column.long() // taps, column.long() % taps
    i, j = tap // kernel_size[1] * dilation[0], tap % kernel_size[1] * dilation[1]
    phase = i % stride[0] * stride[1] + j % stride[1]
    rows = rows_of(row_start) * taps + tap
    return Pattern(row_start, column, *_by_column(phase * channels + channel, rows, channels * stride[0] * stride[1]))


def by_row(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`row_start` and `column` of a boolean matrix (rows, columns)."""
    count = int(mask.sum())
    if count >= 2**31 or mask.shape[1] >= 2**31:
        raise UsageError(
            f"the weight has {count} values of shape {tuple(mask.shape)}; expected less than 2**31 of each"
        )
    column = mask.nonzero()[:, 1].to(torch.int32)
    return _starts(mask.sum(1)), column


def is_pattern(row_start: Tensor, column: Tensor, rows: int, columns: int, groups: int) -> bool:
    """
    Whether these are a view by rows of a weight (rows, columns), each row's columns increasing; integers of any size.

    Of a convolution's `groups`, each has its own columns: those of its rows, counted from those of the group before.
    """
    counts = row_start.long().diff()
    if row_start.shape != (rows + 1,) or column.dim() != 1 or bool((counts < 0).any()):
        return False
    if int(row_start[0]) != 0 or int(row_start[-1]) != column.numel():
        return False
    row = rows_of(row_start)
    inner = column.long() - row // max(1, rows // groups) * columns
    in_range = bool(((inner >= 0) & (inner < columns)).all())
    return in_range and bool(((row * columns + inner).diff() > 0).all())


def rows_of(row_start: Tensor) -> Tensor:
    """The row of each value, int64."""
    counts = row_start.long().diff()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)


def _by_column(column: Tensor, row: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    place = torch.argsort(column, stable=True)
    return _starts(torch.bincount(column, minlength=columns)), row[place].to(torch.int32), place.to(torch.int32)


def _starts(counts: Tensor) -> Tensor:
    start = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    start[1:] = counts.cumsum(0)
    return start


def dense(values: Tensor, row_start: Tensor, column: Tensor, columns: int) -> Tensor:
    """The weight as a matrix (rows, columns); differentiable in `values`."""
    zeros = values.new_zeros(row_start.numel() - 1, columns)
    return zeros.index_put((rows_of(row_start), column.long()), values)
