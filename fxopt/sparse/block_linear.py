"""A linear layer whose weight is block-sparse, as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import UsageError
from fxopt.kernels.block_linear import block_linear, block_view, from_dense, to_dense, transposed_index
from fxopt.sparse.block_select import Select, count, dense_weight, is_fan_in_fan_out, kept_blocks
from fxopt.sparse.sparsified_linear import SparsifiedLinear

Grid = tuple[int, int]

_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


class BlockSparseLinear(SparsifiedLinear):
    """
    y = x @ weightᵀ + bias, where only some blocks of weight (out, in) are there: (…, in) -> (…, out).

    A drop-in for `torch.nn.Linear`. Its parameters are `data` (nnz, bo, bi), the kept blocks, and `bias` (out,); its
    buffers `crow` (rows + 1) and `col` (nnz), int32, say where the blocks are, row by row. A last row or column of
    blocks that the features do not fill is padded with zeros, which stay zero in training.

    `load_state_dict` takes all of the layer or nothing, and also the state of a dense layer, of which it keeps the
    blocks that it has; `weight` is (in, out) there if the layer was made of transformers' `Conv1D` (`fan_in_fan_out`).
    Where the blocks are is drawn on the meta device too, and outlives `to_empty`.

    `density` (0, 1] is the share of blocks, placed at random by torch's generator; the weights are drawn as
    `torch.nn.Linear` draws them for the inputs that an output has. float32, bfloat16, float16 and float64.
    """

    TENSORS = ("data", "crow", "col", "index")
    OPERATOR = torch.ops.fxopt.block_linear.default

    crow: Tensor
    col: Tensor
    index: Tensor
    _drawn: tuple[Tensor, Tensor, Tensor] | None = None  # crow, col and index while those are on the meta device

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
        mask = torch.zeros(rows * columns, dtype=torch.bool, device="cpu")
        mask[torch.randperm(rows * columns, device="cpu")[: count(density, rows * columns)]] = True
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
        crow, col = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int(), mask.nonzero()[:, 1].int()
        index = transposed_index(crow, col, mask.shape[1])
        self.register_buffer("crow", crow.to(device))
        self.register_buffer("col", col.to(device))
        self.register_buffer("index", index.to(device), persistent=False)
        if self.crow.is_meta:
            self._drawn = crow, col, index

    @property
    def _places(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """`crow`, `col` and `index` with what they say; None where nobody knows."""
        if self.crow.is_meta or self.col.is_meta:
            return self._drawn
        index = transposed_index(self.crow, self.col, self._grid[1]) if self.index.is_meta else self.index
        return self.crow, self.col, index

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Where the blocks are is no value: `to_empty` and a stay on the meta device leave it as it was."""
        known = self._places
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if known is not None and self.crow.is_meta:
            self._drawn = known
        elif known is not None:
            for name, was in zip(("crow", "col", "index"), known, strict=True):
                self._buffers[name] = was.to(getattr(self, name).device)
        return self

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
        if density is not None and not isinstance(density, Real):
            density, mask = None, density
        block = checked_block(block_shape)
        weight, bias = dense_weight(linear)
        kept = kept_blocks(weight, block, density, select if mask is None else mask, inputs)
        layer = cls.of(weight, bias, kept, block)
        layer.fan_in_fan_out = is_fan_in_fan_out(linear)
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
        return self.data.shape[0] / max(1, math.prod(self._grid))

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

    def taken(self, weight: Tensor) -> Tensor:
        """The blocks of a matrix (out, in) that the layer keeps."""
        return from_dense(weight, self.index[: self.data.shape[0]], self.col, self.block_shape)

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
            last = (self.index[: self.data.shape[0]] == rows - 1).view(-1, 1, 1)
            self.data[:, bo - over :].masked_fill_(last, 0)
        if beyond:
            self.data[:, :, bi - beyond :].masked_fill_((self.col == columns - 1).view(-1, 1, 1), 0)

    def forward(self, input: Tensor) -> Tensor:
        """input (…, in) -> (…, out)."""
        # The operator takes every width that ends in the last block; the proxies that fx traces with have none to check
        if isinstance(input, Tensor) and input.shape[-1:] != (self.in_features,):
            raise UsageError(f"the input is {tuple(input.shape)}, expected {self.in_features} features")
        own, held = self._parameters, self._buffers
        try:
            tensors = own["data"], own["bias"], held["crow"], held["col"], held["index"]
        except KeyError:  # parametrized, or a replica of DataParallel: as attributes, which Python looks up one by one
            tensors = self.data, self.bias, self.crow, self.col, self.index
        y: Tensor = block_linear(input, *tensors, self.out_features)
        return y

    def extra_repr(self) -> str:
        """What `repr` says beside the name."""
        bo, bi = self.block_shape
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        turned = ", fan_in_fan_out=True" if self.fan_in_fan_out else ""
        return f"{shape}, density={self.density:.3g}, block_shape=({bo}, {bi}){turned}"

    @torch.no_grad()
    def reindex(self) -> None:
        """Derive the transposed index anew, in place, after `crow` and `col` were written to."""
        index = transposed_index(self.crow, self.col, self._grid[1])
        self.index = self.index.copy_(index) if self.index.device == index.device else index

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
        # All or nothing: blocks at the places of another state are a weight that nobody had. So everything is looked at
        # first; `errors` has those of the whole model, and says nothing of this layer.
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        if problem := self._take_dense(state_dict, prefix) or self._unfit(state_dict, prefix, assign):
            errors.append(problem)
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if f"{prefix}crow" in state_dict and not self.crow.is_meta and not self.col.is_meta:
            if assign:  # a layer that shares the former index keeps its own places
                self.index = torch.empty_like(self.index, device=self.crow.device)
            self.reindex()

    def _take_dense(self, state_dict: Any, prefix: str) -> str | None:
        """Put the layer's blocks of a dense weight in its place; or why there are none."""
        dense = state_dict.get(f"{prefix}weight")
        if not isinstance(dense, Tensor) or f"{prefix}data" in state_dict:
            return None
        shape = (self.out_features, self.in_features)
        shape = shape[::-1] if self.fan_in_fan_out else shape
        if tuple(dense.shape) != shape:
            return f"{prefix}weight is {tuple(dense.shape)}, expected {shape}, or blocks as {prefix}data"
        if self._places is None:
            return f"{prefix}weight is dense, but the layer's own blocks were lost on the meta device; load blocks"
        del state_dict[f"{prefix}weight"]
        crow, col, index = (t.to(dense.device) for t in self._places)
        weight = dense.detach().t() if self.fan_in_fan_out else dense.detach()
        state_dict[f"{prefix}data"] = from_dense(weight, index[: col.numel()], col, self.block_shape)
        state_dict[f"{prefix}crow"], state_dict[f"{prefix}col"] = crow, col
        return None

    def _unfit(self, state_dict: Any, prefix: str, assign: bool) -> str | None:
        """Why the layer cannot have this state, or nothing; what it can have of `crow` and `col` is made int32."""
        present = [name for name in ("data", "crow", "col", "bias") if prefix + name in state_dict]
        if ("crow" in present or "col" in present) and not {"data", "crow", "col"} <= set(present):
            return f"{prefix}data, crow and col belong together, but there is only {', '.join(present)}"
        for name in present:
            own, given = getattr(self, name), state_dict[prefix + name]
            if own is None:  # a bias that nobody expects
                continue
            if not isinstance(given, Tensor):
                return f"{prefix}{name} is {type(given).__name__}, expected a tensor"
            if given.is_meta and not own.is_meta and not assign:
                return f"{prefix}{name} is on the meta device, and has nothing to copy"
            if name in ("data", "bias") and given.shape != own.shape:
                more = "; make the layer with the density and block shape of what is loaded" * (name == "data")
                return f"{prefix}{name} is {tuple(given.shape)}, expected {tuple(own.shape)}{more}"
            if name in ("crow", "col") and given.dtype not in _INTEGERS:
                return f"{prefix}{name} is {given.dtype}, expected torch.int32"
        crow, col = (state_dict.get(prefix + name, getattr(self, name)) for name in ("crow", "col"))
        if problem := self._misplaced(crow, col):
            return f"{prefix}crow and {prefix}col {problem}"
        for name in present:
            if name in ("crow", "col"):
                state_dict[prefix + name] = state_dict[prefix + name].int().contiguous()
        return None

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
