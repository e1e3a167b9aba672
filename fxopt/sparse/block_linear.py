"""A linear layer whose weight is block-sparse, as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import UsageError
from fxopt.kernels.block_linear import block_linear, block_view, from_dense, to_dense, transposed_index
from fxopt.sparse.block_select import Select, count, dense_weight, kept_blocks
from fxopt.sparse.sparsified_linear import SparsifiedLinear

Grid = tuple[int, int]


class BlockSparseLinear(SparsifiedLinear):
    """
    y = x @ weightᵀ + bias, where only some blocks of weight (out, in) are there: (…, in) -> (…, out).

    A drop-in for `torch.nn.Linear`. Its parameters are `data` (nnz, bo, bi), the kept blocks, and `bias` (out,); its
    buffers `crow` (rows + 1) and `col` (nnz), int32, say where the blocks are, row by row. A last row or column of
    blocks that the features do not fill is padded with zeros, which stay zero in training. `load_state_dict` also takes
    the state of a dense layer, of which it keeps the blocks that it has.

    `density` (0, 1] is the share of blocks, placed at random by torch's generator; the weights are drawn as
    `torch.nn.Linear` draws them for the inputs that an output has. float32, bfloat16, float16 and float64.
    """

    TENSORS = ("data", "crow", "col", "index")
    OPERATOR = torch.ops.fxopt.block_linear.default

    crow: Tensor
    col: Tensor
    index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        density: float = 0.5,
        block_shape: Sequence[int] = (32, 32),
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        block = checked_block(block_shape)
        rows, columns = grid(out_features, in_features, block)
        mask = torch.zeros(rows * columns, dtype=torch.bool)
        mask[torch.randperm(rows * columns)[: count(density, rows * columns)]] = True
        super().__init__()
        self._shape(in_features, out_features, block)
        self.data = nn.Parameter(torch.empty(int(mask.sum()), *block, device=device, dtype=dtype))
        made = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", made)
        self._place(mask.view(rows, columns), self.data.device)
        self.reset_parameters()

    def _shape(self, in_features: int, out_features: int, block: Grid) -> None:
        self.in_features, self.out_features, self.block_shape = in_features, out_features, block

    def _place(self, mask: Tensor, device: Any) -> None:
        mask = mask.to(device="cpu")
        crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int32)
        crow[1:] = mask.sum(1).cumsum(0)
        col = mask.nonzero()[:, 1].int()
        self.register_buffer("crow", crow.to(device))
        self.register_buffer("col", col.to(device))
        self.register_buffer("index", transposed_index(crow, col, mask.shape[1]).to(device), persistent=False)

    @classmethod
    def of(cls, weight: Tensor, bias: nn.Parameter | None, mask: Tensor, block: Grid) -> BlockSparseLinear:
        """The layer that has the blocks of `weight` (out, in) where `mask` (rows, columns) is true, and this bias."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._shape(weight.shape[1], weight.shape[0], block)
        mask = mask.to(weight.device)
        row, col = mask.nonzero(as_tuple=True)
        blocks = from_dense(weight.detach(), row, col, block)
        layer.data = nn.Parameter(blocks.clone(), requires_grad=weight.requires_grad)
        layer.register_parameter("bias", bias)
        layer._place(mask, weight.device)
        return layer

    @classmethod
    def from_dense(
        cls,
        linear: nn.Module,
        density: float | Tensor | None = None,
        mask: Any = None,
        select: Select = "magnitude",
        block_shape: Sequence[int] = (32, 32),
        inputs: Tensor | None = None,
        rescale: bool = False,
    ) -> BlockSparseLinear:
        """
        A block-sparse layer made of `linear` (`torch.nn.Linear`, or transformers' `Conv1D`), whose bias it shares.

        What is kept: the share `density` of the blocks, chosen by `select` (see `fxopt.sparse.kept_blocks`), or what
        `mask` says (blocks, or elements of which whole blocks are kept). `inputs` (…, in): typical inputs, which
        "activation" and `rescale` go by; `rescale` scales each output to make up for what is left out.
        """
        if density is not None and not isinstance(density, float | int):
            density, mask = None, density
        block = checked_block(block_shape)
        weight, bias = dense_weight(linear)
        kept = kept_blocks(weight, block, density, select if mask is None else mask, inputs)
        layer = cls.of(weight, bias, kept, block)
        if rescale:
            layer.rescale(weight, inputs)
        return layer.train(linear.training)

    @torch.no_grad()
    def scale(self, factor: Tensor) -> None:
        """Multiply each output by its `factor` (out,)."""
        padded = nn.functional.pad(factor, (0, self._grid[0] * self.block_shape[0] - self.out_features), value=1.0)
        rows = self.index[: self.data.shape[0]].long()
        self.data.mul_(padded.view(-1, self.block_shape[0])[rows].unsqueeze(2))

    @property
    def _grid(self) -> Grid:
        return grid(self.out_features, self.in_features, self.block_shape)

    @property
    def density(self) -> float:
        """The share of blocks that are kept."""
        return self.data.shape[0] / math.prod(self._grid)

    @property
    def mask(self) -> Tensor:
        """Which blocks are kept, (rows, columns) bool."""
        found = torch.zeros(self._grid, dtype=torch.bool, device=self.col.device)
        found[self.index[: self.data.shape[0]].long(), self.col.long()] = True
        return found

    def dense(self, data: Tensor | None = None) -> Tensor:
        """`data`, or else the layer's own blocks, as a matrix (out, in)."""
        data = self.data if data is None else data
        whole = to_dense(data, self.index[: data.shape[0]], self.col, self._grid)
        return whole[: self.out_features, : self.in_features]

    def operands(self, x: Any, bias: Any, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of `block_linear`."""
        data, *where = tensors
        return x, data, bias, *where, self.out_features

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, as `torch.nn.Linear` does, for the number of inputs that an output has on average."""
        bound = 1 / math.sqrt(max(1.0, self.in_features * self.density))
        self.data.uniform_(-bound, bound)
        self._clear_padding()
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    @torch.no_grad()
    def _clear_padding(self) -> None:
        (rows, columns), (bo, bi) = self._grid, self.block_shape
        over, beyond = rows * bo - self.out_features, columns * bi - self.in_features
        if over:
            self.data[self.index[: self.data.shape[0]] == rows - 1, bo - over :] = 0
        if beyond:
            self.data[self.col == columns - 1, :, bi - beyond :] = 0

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)."""
        y: Tensor = torch.ops.fxopt.block_linear(
            x, self.data, self.bias, self.crow, self.col, self.index, self.out_features
        )
        return y

    def extra_repr(self) -> str:
        """What `repr` says beside the name."""
        bo, bi = self.block_shape
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, density={self.density:.3g}, block_shape=({bo}, {bi})"

    @torch.no_grad()
    def reindex(self) -> None:
        """Derive the transposed index anew, in place, after `crow` and `col` were written to."""
        self.index.copy_(transposed_index(self.crow, self.col, self._grid[1]))

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        dense = state_dict.get(f"{prefix}weight")
        if dense is not None and f"{prefix}data" not in state_dict:
            if tuple(dense.shape) != (self.out_features, self.in_features):
                wanted = (self.out_features, self.in_features)
                errors.append(f"{prefix}weight is {tuple(dense.shape)}, expected {wanted}, or blocks as {prefix}data")
                return
            del state_dict[f"{prefix}weight"]
            row = self.index[: self.data.shape[0]].to(dense.device)
            state_dict[f"{prefix}data"] = from_dense(dense, row, self.col.to(dense.device), self.block_shape)
            state_dict[f"{prefix}crow"], state_dict[f"{prefix}col"] = self.crow, self.col
        crow, col = state_dict.get(f"{prefix}crow", self.crow), state_dict.get(f"{prefix}col", self.col)
        if problem := self._misplaced(crow, col):
            errors.append(f"{prefix}crow and {prefix}col {problem}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if not errors and not self.crow.is_meta:
            index = transposed_index(self.crow, self.col, self._grid[1])
            self.index = index if self.index.is_meta else self.index.copy_(index)

    def _misplaced(self, crow: Tensor, col: Tensor) -> str | None:
        """Why these are no places of as many blocks as the layer has; None if they are."""
        rows, columns = self._grid
        if crow.is_meta or col.is_meta:
            return None
        if crow.shape != (rows + 1,) or col.shape != (self.data.shape[0],):
            return (
                f"place {col.numel()} blocks in {crow.numel() - 1} rows, expected {self.data.shape[0]} in {rows}; "
                "make the layer with the density and block shape of what is loaded"
            )
        ends, at = crow.cpu().long(), col.cpu().long()
        if ends[0] != 0 or ends[-1] != at.numel() or bool((ends.diff() < 0).any()):
            return "do not count the blocks row by row"
        row = torch.repeat_interleave(torch.arange(rows), ends.diff())
        flat = row * columns + at
        inside = bool(((at >= 0) & (at < columns)).all())
        return None if inside and bool((flat.diff() > 0).all()) else "do not name each block once, in order"


def grid(out_features: int, in_features: int, block: Grid) -> Grid:
    """The rows and columns of blocks of a weight (out, in)."""
    return -(-out_features // block[0]), -(-in_features // block[1])


def checked_block(block_shape: Sequence[int]) -> Grid:
    """`block_shape` as (bo, bi); `UsageError` if it is none."""
    shape = tuple(block_shape) if isinstance(block_shape, Sequence) else (block_shape,)
    if len(shape) != 2 or not all(isinstance(n, int) and 1 <= n <= 65536 for n in shape):
        raise UsageError(f"block_shape={block_shape!r} was given, expected two numbers (out, in), such as (32, 32)")
    return shape


__all__ = ["BlockSparseLinear", "block_linear", "block_view", "checked_block", "grid"]
