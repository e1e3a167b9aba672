"""An optimizer that stays attached while weights become blocks or 2:4, and those weights."""

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
from fxopt.kernels.semi_structured import places


@dataclass(frozen=True)
class _Blocks:
    """Where the blocks of one parameter are, as it was."""

    row: Tensor
    col: Tensor
    grid: tuple[int, int]
    block: tuple[int, int]

    def fits(self, rows: int, columns: int) -> bool:
        bo, bi = self.block
        return (-(-rows // bo), -(-columns // bi)) == self.grid

    def taken(self, whole: Tensor) -> Tensor:
        return from_dense(whole, self.row, self.col, self.block)

    def placed(self, data: Tensor, rows: int, columns: int) -> Tensor:
        return to_dense(data, self.row, self.col, self.grid)[:rows, :columns]


@dataclass(frozen=True)
class _Pairs:
    """Where the values of one 2:4 parameter are, as it was."""

    column: Tensor

    def fits(self, rows: int, columns: int) -> bool:
        return (rows, columns // 2) == self.column.shape

    def taken(self, whole: Tensor) -> Tensor:
        return whole.gather(1, self.column)

    def placed(self, values: Tensor, rows: int, columns: int) -> Tensor:
        return values.new_zeros(rows, columns).scatter(1, self.column, values)


_Form = _Blocks | _Pairs


@dataclass(frozen=True)
class _Dense:
    """The state that a weight had before it became blocks."""

    weight: nn.Parameter
    state: dict[str, Any]
    version: int  # of what it became, then


_before: Any = WeakIdKeyDictionary()  # data or values -> _Dense


@contextmanager
def following(optimizer: Optimizer, model: nn.Module) -> Iterator[None]:
    """
    Let `optimizer` go along with what the body does to the layers of `model`, a module or a graph module.

    A weight that becomes blocks is replaced in its parameter group by `data`, and its state by the blocks of it, one
    that becomes 2:4 by `values`; what becomes a weight again, the other way round: its state is zero where there was
    nothing, or, where nothing was trained in between, the very state from before. Scalars such as a step count stay as
    they are. Works for any optimizer whose state is tensors of the parameter's shape, and scalars.
    """
    before = _parameters(model)
    yield
    after = _parameters(model)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    moved: dict[int, nn.Parameter] = {}
    for base, (old, old_form) in before.items():
        new, new_form = after.get(base, (None, None))
        if new is None or new is old or id(old) not in known or id(old) in moved:
            continue
        moved[id(old)] = new
        state = optimizer.state.pop(old, {})
        if old_form is None and new_form is not None:
            _before[new] = _Dense(old, dict(state), new._version)
            optimizer.state[new] = {k: _taken(v, old, new, new_form) for k, v in state.items()}
        elif old_form is not None and new_form is None:
            former = _before.get(old)
            untouched = former is not None and former.weight is new and former.version == old._version
            placed = {k: _placed(v, old, new, old_form) for k, v in state.items()}
            optimizer.state[new] = former.state if untouched else placed
        else:
            optimizer.state[new] = state
    for group in optimizer.param_groups:
        group["params"] = [moved.get(id(p), p) for p in group["params"]]


def _parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, _Form | None]]:
    """The weight of every layer, by the layer's path: dense, as blocks, or as 2:4."""
    found: dict[str, tuple[nn.Parameter, _Form | None]] = {}
    for path, p in model.named_parameters(remove_duplicate=False):
        base, _, name = path.rpartition(".")
        if name == "weight" and p.dim() == 2:
            found[base] = (p, None)
        elif name == "data" and p.dim() == 3:
            owner = model.get_submodule(base)
            crow, col, index = (getattr(owner, n) for n in ("crow", "col", "index"))
            nnz, bo, bi = p.shape
            grid = (crow.numel() - 1, index.numel() - 3 * nnz - 1)
            found[base] = (p, _Blocks(index[:nnz].clone(), col.clone(), grid, (bo, bi)))
        elif name == "values" and p.dim() == 2:
            metadata = getattr(model.get_submodule(base), "metadata", None)
            if isinstance(metadata, Tensor):
                found[base] = (p, _Pairs(places(metadata)))
    return found


def _taken(value: Any, old: Tensor, new: Tensor, form: _Form) -> Any:
    """What of a state tensor of the weight belongs to what is kept of it."""
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value
    return form.taken(value.t() if _turned(old, new, form) else value).clone()


def _placed(value: Any, old: Tensor, new: Tensor, form: _Form) -> Any:
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value
    if _turned(new, old, form):
        return form.placed(value, new.shape[1], new.shape[0]).t().contiguous()
    return form.placed(value, new.shape[0], new.shape[1]).contiguous()


def _turned(weight: Tensor, kept: Tensor, form: _Form) -> bool:
    """Whether the weight is (in, out), as that of a `Conv1D`: of a square one, by what is kept of it."""
    rows, columns = weight.shape
    fits = [form.fits(rows, columns), form.fits(columns, rows)]
    if all(fits):
        with torch.no_grad():
            straight, turned = ((form.taken(w) - kept).norm() for w in (weight, weight.t()))
        return bool(turned < straight)
    return fits[1]
