"""An optimizer that stays attached while weights become blocks, and blocks weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from fxopt.kernels.block_linear import from_dense, to_dense


@dataclass(frozen=True)
class _Blocks:
    """Where the blocks of one parameter are, as it was."""

    row: Tensor
    col: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class _Dense:
    """The state that a weight had before it became blocks."""

    weight: nn.Parameter
    state: dict[str, Any]
    version: int  # of the blocks then


_before: Any = WeakIdKeyDictionary()  # data -> _Dense


@contextmanager
def following(optimizer: Optimizer, model: nn.Module) -> Iterator[None]:
    """
    Let `optimizer` go along with what the body does to the layers of `model`, a module or a graph module.

    A weight that becomes blocks is replaced in its parameter group by `data`, and its state by the blocks of it; blocks
    that become a weight, the other way round: their state is zero where there was no block, or, where nothing was
    trained in between, the very state from before. Scalars such as a step count stay as they are. Works for any
    optimizer whose state is tensors of the parameter's shape, and scalars.
    """
    before = _parameters(model)
    yield
    after = _parameters(model)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    moved: dict[int, nn.Parameter] = {}
    for base, (old, old_blocks) in before.items():
        new, new_blocks = after.get(base, (None, None))
        if new is None or new is old or id(old) not in known or id(old) in moved:
            continue
        moved[id(old)] = new
        state = optimizer.state.pop(old, {})
        if old_blocks is None and new_blocks is not None:
            _before[new] = _Dense(old, dict(state), new._version)
            optimizer.state[new] = {k: _taken(v, old, new, new_blocks) for k, v in state.items()}
        elif old_blocks is not None and new_blocks is None:
            former = _before.get(old)
            untouched = former is not None and former.weight is new and former.version == old._version
            placed = {k: _placed(v, old, new, old_blocks) for k, v in state.items()}
            optimizer.state[new] = former.state if untouched else placed
        else:
            optimizer.state[new] = state
    for group in optimizer.param_groups:
        group["params"] = [moved.get(id(p), p) for p in group["params"]]


def _parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, _Blocks | None]]:
    """The weight of every layer, by the layer's path: dense, or as blocks."""
    found: dict[str, tuple[nn.Parameter, _Blocks | None]] = {}
    for path, p in model.named_parameters(remove_duplicate=False):
        base, _, name = path.rpartition(".")
        if name == "weight" and p.dim() == 2:
            found[base] = (p, None)
        elif name == "data" and p.dim() == 3:
            owner = model.get_submodule(base)
            crow, col, index = (getattr(owner, n) for n in ("crow", "col", "index"))
            nnz = p.shape[0]
            grid = (crow.numel() - 1, index.numel() - 3 * nnz - 1)
            found[base] = (p, _Blocks(index[:nnz].clone(), col.clone(), grid))
    return found


def _taken(value: Any, old: Tensor, new: Tensor, blocks: _Blocks) -> Any:
    """What of a state tensor of the weight belongs to the blocks."""
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value
    turned = value.t() if _turned(old, new, blocks) else value
    return from_dense(turned, blocks.row, blocks.col, (new.shape[1], new.shape[2])).clone()


def _placed(value: Any, old: Tensor, new: Tensor, blocks: _Blocks) -> Any:
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value
    whole = to_dense(value, blocks.row, blocks.col, blocks.grid)
    turned = _turned(new, old, blocks)
    rows, columns = reversed(new.shape) if turned else new.shape
    whole = whole[:rows, :columns]
    return (whole.t() if turned else whole).contiguous()


def _turned(weight: Tensor, data: Tensor, blocks: _Blocks) -> bool:
    """Whether the weight is (in, out), as that of a `Conv1D`: of a square one, by what its blocks hold."""
    bo, bi = data.shape[1:]
    fits = [
        -(-a // bo) == blocks.grid[0] and -(-b // bi) == blocks.grid[1] for a, b in (weight.shape, weight.shape[::-1])
    ]
    if all(fits):
        with torch.no_grad():
            straight, turned = (
                (from_dense(w, blocks.row, blocks.col, (bo, bi)) - data).norm() for w in (weight, weight.t())
            )
        return bool(turned < straight)
    return fits[1]
