"""Which blocks of a weight are kept."""

from __future__ import annotations

import re
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import UsageError
from fxopt.kernels.block_linear import block_view

Select = Any
"""A name (see `NAMES`; "random(7)" has a seed), or a mask: of blocks, of elements, or a sparse matrix of scipy."""

NAMES = ("magnitude", "activation", "balanced", "existing", "random")

Grid = tuple[int, int]


def kept_blocks(
    weight: Tensor, block: Grid, density: float | None, select: Select = "magnitude", inputs: Tensor | None = None
) -> Tensor:
    """
    The blocks (bo, bi) of `weight` (out, in) to keep, (rows, columns) bool.

    - "magnitude": the share `density` with the largest sums of squares.
    - "activation": the same, each weight weighted by the mean square of its input over `inputs` (…, in): what the block
      adds to the output, if inputs are independent (as Wanda weighs single weights, Sun et al., 2023).
    - "balanced": the largest, equally many in each row of blocks.
    - "random" or "random(seed)": any; the seed is 0 if not given.
    - "existing": all that are not zero; nothing is lost, and `density` is not asked for.
    - a mask (rows, columns) or (out, in), of which every block that has a true element is kept, or a matrix of scipy
      or a sparse tensor with the shape of `weight`, of which every block that stores an element is kept, be it zero.

    At least one block is kept. Raises `UsageError`.
    """
    if weight.is_meta:
        raise UsageError("the weight is on the meta device, and has no elements to choose by; load it first")
    blocks = block_view(weight.detach(), block)
    rows, columns = blocks.shape[:2]
    if not isinstance(select, str):
        return _from_mask(select, weight, block, (rows, columns)).to(weight.device)
    name, seed = _parsed(select)
    if name == "existing":
        return blocks.ne(0).any(3).any(2)
    if density is None:
        raise UsageError(f"select={select!r} needs a density, a number in (0, 1]")
    keep = count(density, rows * columns)
    if name == "random":
        order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
        return _chosen(order[:keep], rows, columns).to(weight.device)
    energy = block_energy(weight, block, moments(weight, inputs) if name == "activation" else None)
    if name == "balanced":
        best = energy.argsort(dim=1, descending=True, stable=True)[:, : count(density, columns)]
        return torch.zeros_like(energy, dtype=torch.bool).scatter_(1, best, True)
    return _chosen(energy.flatten().argsort(dim=0, descending=True, stable=True)[:keep], rows, columns)


def block_energy(weight: Tensor, block: Grid, moments: Tensor | None = None) -> Tensor:
    """The sum of squares of each block, (rows, columns) float64; inputs weighted by `moments` (in,)."""
    squares = weight.detach().double().square()
    if moments is not None:
        squares = squares * moments.double()
    return block_view(squares, block).sum((2, 3))


def count(density: float, blocks: int) -> int:
    """How many of `blocks` the share `density` is, at least one; `UsageError` outside of (0, 1]."""
    if isinstance(density, bool) or not isinstance(density, Real) or not 0 < density <= 1:
        raise UsageError(f"density={density!r} was given, expected a number in (0, 1]: the share of blocks to keep")
    return max(1, round(float(density) * blocks))


def dense_weight(linear: nn.Module) -> tuple[Tensor, nn.Parameter | None]:
    """The weight (out, in) and the bias of a linear layer, or `UsageError` if it is none."""
    weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
    if type(linear) is nn.Linear:
        assert isinstance(weight, Tensor)
        return weight, bias
    if is_fan_in_fan_out(linear) and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.t(), bias
    raise UsageError(
        f"a {type(linear).__name__} was given, expected torch.nn.Linear (a subclass may compute otherwise)"
    )


def is_fan_in_fan_out(linear: nn.Module) -> bool:
    """Whether the weight of a linear layer is (in, out): transformers' `Conv1D`, which need not be installed."""
    return type(linear).__name__ == "Conv1D"


def check_select(select: Select) -> None:
    """Refuse what is no way to select."""
    if isinstance(select, str):
        _parsed(select)


def _parsed(select: str) -> tuple[str, int]:
    found = re.fullmatch(r"(\w+)(?:\((\d+)\))?", select.strip())
    if found is None or found[1] not in NAMES or (found[2] and found[1] != "random"):
        raise UsageError(f"select={select!r} was given, expected {', '.join(NAMES)}, random(SEED) or a mask")
    return found[1], int(found[2] or 0)


def _chosen(flat: Tensor, rows: int, columns: int) -> Tensor:
    mask = torch.zeros(rows * columns, dtype=torch.bool, device=flat.device)
    mask[flat] = True
    return mask.view(rows, columns)


def moments(weight: Tensor, inputs: Tensor | None) -> Tensor:
    """The mean square of each of the inputs (…, in) of `weight` (out, in), float64; `UsageError` without such."""
    if inputs is None:
        raise UsageError(
            'select="activation" needs inputs of the layer; give calibration inputs, or select="magnitude"'
        )
    if inputs.shape[-1] != weight.shape[1]:
        raise UsageError(f"inputs have {inputs.shape[-1]} features, expected {weight.shape[1]}, as the layer has")
    return inputs.detach().to(weight.device).reshape(-1, weight.shape[1]).double().square().mean(0)


def _from_mask(select: Any, weight: Tensor, block: Grid, grid: Grid) -> Tensor:
    mask = dense_mask(select)
    if tuple(mask.shape) == grid and grid != tuple(weight.shape):
        return mask
    if mask.shape == weight.shape:
        return block_view(mask, block).any(3).any(2)
    raise UsageError(
        f"a mask of shape {tuple(mask.shape)} was given, expected {grid} (blocks) or {tuple(weight.shape)} (elements)"
    )


def dense_mask(mask: Any) -> Tensor:
    """A mask in any of its forms as a dense bool tensor, which shares no memory with numpy; `UsageError` if none."""
    if hasattr(mask, "tocoo"):  # scipy's sparse matrices, which need not be installed
        stored = mask.tocoo()
        return _at((torch.as_tensor(stored.row), torch.as_tensor(stored.col)), stored.shape)
    try:
        given: Tensor = mask if isinstance(mask, Tensor) else torch.as_tensor(mask).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        names = ", ".join((*NAMES, "random(SEED)"))
        given_type = type(mask).__name__
        raise UsageError(f"a {given_type} was given to select, expected {names} or a mask of numbers") from error
    if given.layout is torch.strided:
        return given.ne(0)
    return _at(given.detach().to_sparse_coo().coalesce().indices(), given.shape)


def _at(places: Any, shape: Any) -> Tensor:
    """True at every place that a sparse matrix stores, zeros too: what is stored was chosen."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool, device=places[0].device)
    mask[tuple(at.long() for at in places)] = True
    return mask
