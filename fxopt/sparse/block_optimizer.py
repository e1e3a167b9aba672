"""An optimizer that stays attached while weights become blocks or 2:4, and those weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.optim import LBFGS, Muon, Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.errors import UsageError
from fxopt.history import atomic
from fxopt.kernels.block_linear import from_dense, to_dense
from fxopt.kernels.semi_structured import places
from fxopt.sparse.block_linear import BlockSparseLinear
from fxopt.sparse.semi_structured import SemiStructuredLinear
from fxopt.sparse.sparsified_linear import SparsifiedLinear


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
class _Weight:
    """The weight of a linear layer."""

    parameter: nn.Parameter
    form: _Form | None  # None: dense
    turned: bool = False  # dense and (in, out), as that of a `Conv1D`

    @property
    def shape(self) -> tuple[int, int]:
        """Of a dense weight, as (out, in)."""
        rows, columns = self.parameter.shape
        return (columns, rows) if self.turned else (rows, columns)


@dataclass(frozen=True)
class _Change:
    """A weight that took the place of another one."""

    old: _Weight
    new: _Weight

    @property
    def fits(self) -> bool:
        """Whether the one can have been made of the other."""
        if self.old.form is None and self.new.form is not None:
            return self.new.form.fits(*self.old.shape)
        return self.old.form is None or self.new.form is not None or self.old.form.fits(*self.new.shape)

    def carried(self, value: Tensor) -> Tensor | None:
        """`value`, which has one entry for each of the old weight, for the new; None where there is no telling how."""
        old, new = self.old, self.new
        if old.form is None and new.form is not None:
            return new.form.taken(value.t() if old.turned else value).clone()
        if old.form is not None and new.form is None:
            whole = old.form.placed(value, *new.shape)
            return (whole.t() if new.turned else whole).contiguous()
        alike = old.form is None and new.form is None and old.parameter.shape == new.parameter.shape
        return value if alike and old.turned == new.turned else None


@dataclass(frozen=True)
class _Dense:
    """The state that a weight had before it became blocks."""

    weight: nn.Parameter
    state: dict[str, Any]
    version: int  # of what it became, then


_before: Any = WeakIdKeyDictionary()  # data or values -> _Dense


@contextmanager
def following(optimizer: Optimizer | None, model: nn.Module) -> Iterator[None]:
    """
    Let `optimizer` go along with what the body does to the layers of `model`, a module or a graph module.

    A weight that becomes blocks is replaced in its parameter group by them, and its state by the blocks of it, one that
    becomes 2:4 by its values; what becomes a weight again, the other way round: its state is zero where there was
    nothing, or, where nothing was trained in between, the very state from before. What took the place of a weight is
    what the same node of the graph multiplies with, or the module at the same path, whatever the names of parameters.

    State is carried where it is tensors of the parameter's shape, and scalars such as a step count, which stay as they
    are. Other state (factored, as Adafactor's; the history of `torch.optim.LBFGS`) begins anew, with a warning. An
    accumulated `grad` goes along too, also with None for an optimizer.

    `UsageError` where a parameter of the optimizer went and one came of which nothing tells whether it took its place,
    and for blocks in `torch.optim.Muon`, which takes matrices alone. The model is then as before the body, as it is
    where the body raises.
    """
    with _all_or_nothing(model):
        before, had = _weights(model), dict(model.named_parameters())
        yield
        changes = list(_changes(before, _weights(model), {id(p) for p in had.values()}))
        states: list[tuple[_Change, dict[str, Any] | None]] = []
        if optimizer is not None:
            _check(optimizer, model, had, changes)
            states = _states(optimizer, changes)
        if anew := {id(change.old.parameter) for change, state in states if state is None}:
            names = ", ".join(name for name, p in had.items() if id(p) in anew)
            what = f"the state that {type(optimizer).__name__} had for {names}"
            warnings.warn(f"{what} cannot be carried over; it begins anew", stacklevel=3)  # before all, as it may raise
    there = {id(p) for p in model.parameters()}
    for change in changes:
        if id(change.old.parameter) not in there:
            _move_gradient(change)
    if optimizer is not None:
        _follow(optimizer, states, there)


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Where the body raises, put back what `model` is made of."""
    if isinstance(model, GraphModule):
        with atomic(model):
            yield
        return
    held = [(d, d.copy()) for m in model.modules() for d in (m._modules, m._parameters, m._buffers)]
    try:
        yield
    except BaseException:
        for now, former in held:
            now.clear()
            now.update(former)  # type: ignore[arg-type]
        raise


def _weights(model: nn.Module) -> dict[tuple[str, str], _Weight]:
    """The weight of every linear layer, by the path of its module and, in a graph, the name of its node."""
    found: dict[tuple[str, str], _Weight] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if isinstance(module, SparsifiedLinear):
            found[path, ""] = _sparse(module.tensors)
        elif isinstance(module, GraphModule):
            read = ((node.name, _read(module, node)) for node in module.graph.nodes)
            found |= {(path, name): w for name, w in read if w is not None}
        elif weight is not None and weight.dim() == 2:
            found[path, ""] = _Weight(weight, None, type(module).__name__ == "Conv1D")
    return found


def _read(gm: GraphModule, node: Node) -> _Weight | None:
    """The weight that a node of a graph multiplies with, where that is a parameter."""
    for kind in (BlockSparseLinear, SemiStructuredLinear):
        tensors = operands(gm, node, kind)
        if tensors is not None and isinstance(tensors[0], nn.Parameter):
            return _sparse(tensors)
    call = mechanism.read(gm, node)
    if call is None or call.op not in (ops.linear, ops.addmm):
        return None
    turned = call.op is ops.addmm
    weight = mechanism.constant(gm, call.arguments["mat2" if turned else "weight"])
    fits = isinstance(weight, nn.Parameter) and weight.dim() == 2
    return _Weight(weight, None, turned) if fits else None  # type: ignore[arg-type]


def operands(gm: GraphModule, node: Node, kind: type[SparsifiedLinear]) -> tuple[Tensor, ...] | None:
    """
    What the weight is made of with which ``node`` does what a layer of `kind` does, as its `TENSORS` name it.

    None where it does something else, or some of it is computed. The names of the attributes may be any.
    """
    if node.op != "call_function" or node.target not in (kind.OPERATOR, kind.OPERATOR.overloadpacket):
        return None
    names = [a.name for a in kind.OPERATOR._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    held = [mechanism.constant(gm, given.get(name)) for name in kind.TENSORS]
    return None if any(t is None for t in held) else tuple(held)  # type: ignore[arg-type]


def _sparse(tensors: Sequence[Tensor]) -> _Weight:
    kept, *where = tensors
    assert isinstance(kept, nn.Parameter)
    if len(where) == 1:
        return _Weight(kept, _Pairs(places(where[0])))
    crow, col, index = where
    nnz, bo, bi = kept.shape
    grid = (crow.numel() - 1, index.numel() - 3 * nnz - 1)
    return _Weight(kept, _Blocks(index[:nnz].clone(), col.clone(), grid, (bo, bi)))


def _changes(before: Mapping[Any, _Weight], after: Mapping[Any, _Weight], had: Set[int]) -> Iterator[_Change]:
    """What took the place of what, once for each two parameters."""
    seen = set()
    for at, old in before.items():
        if (new := after.get(at)) is None or id(new.parameter) in had:
            continue
        change, key = _Change(old, new), (id(old.parameter), id(new.parameter))
        if key not in seen and change.fits:
            seen.add(key)
            yield change


def _check(optimizer: Optimizer, model: nn.Module, had: Mapping[str, nn.Parameter], changes: Sequence[_Change]) -> None:
    """Refuse what the optimizer could not follow, or could not train."""
    known = _known(optimizer)
    left = {id(c.old.parameter) for c in changes} | {id(p) for p in model.parameters()}
    came = {id(c.new.parameter) for c in changes} | {id(p) for p in had.values()}
    lost = [name for name, p in had.items() if id(p) in known and id(p) not in left]
    new = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in came]
    if lost and new:
        raise UsageError(
            f"the optimizer cannot follow: {lost[0]} went and {new[0]} came, and nothing tells whether it took its "
            "place; give the optimizer the new parameters with add_param_group, outside of following"
        )
    if isinstance(optimizer, Muon) and any(
        isinstance(c.new.form, _Blocks) and id(c.old.parameter) in known for c in changes
    ):
        raise UsageError("torch.optim.Muon takes matrices alone, not blocks; give these layers another optimizer")


def _known(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


@torch.no_grad()
def _move_gradient(change: _Change) -> None:
    """Let the gradient that was accumulated for the old weight be that of the new one."""
    old, new = change.old.parameter, change.new.parameter
    grad = None if old.grad is None else change.carried(old.grad)
    if grad is not None:
        new.grad, old.grad = grad.to(new), None


@torch.no_grad()
def _states(optimizer: Optimizer, changes: Sequence[_Change]) -> list[tuple[_Change, dict[str, Any] | None]]:
    """The changes to parameters of `optimizer`, each with the new one's state, None where that begins anew."""
    known = _known(optimizer)
    mine = [c for c in changes if id(c.old.parameter) in known]
    if isinstance(optimizer, LBFGS):  # its state is that of all parameters, laid end to end
        return [(c, None if optimizer.state else {}) for c in mine]
    return [(c, _state(optimizer.state.get(c.old.parameter, {}), c)) for c in mine]


def _follow(optimizer: Optimizer, states: Sequence[tuple[_Change, dict[str, Any] | None]], there: Set[int]) -> None:
    """Put what is new in the place of what was, unless that is still `there`."""
    became: dict[int, list[nn.Parameter]] = {}
    for change, state in states:
        old, new = change.old.parameter, change.new.parameter
        became.setdefault(id(old), []).append(new)
        if change.old.form is None and change.new.form is not None:
            _before[new] = _Dense(old, dict(optimizer.state.get(old, {})), new._version)
        if state:
            optimizer.state[new] = state
    for change, _ in states:
        if id(change.old.parameter) not in there:
            optimizer.state.pop(change.old.parameter, None)
    for group in optimizer.param_groups:
        kept = ([p] * (id(p) in there or id(p) not in became) + became.get(id(p), []) for p in group["params"])
        group["params"][:] = dict.fromkeys(p for ps in kept for p in ps)  # in place, as optimizers hold the list too
    if isinstance(optimizer, LBFGS) and became:
        optimizer.state.clear()
        optimizer._numel_cache = None


def _state(state: Mapping[str, Any], change: _Change) -> dict[str, Any] | None:
    """The state of the new weight by that of the old one; None where some of it cannot be carried over."""
    old, new = change.old.parameter, change.new.parameter
    former = _before.get(old)
    if former is not None and former.weight is new and former.version == old._version:
        return dict(former.state)
    carried: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() == 0:
            carried[key] = value.clone()
        elif isinstance(value, Tensor):
            whole = change.carried(value) if value.shape == old.shape else None
            if whole is None:
                return None
            carried[key] = whole
        elif value is None or isinstance(value, bool | int | float | str):
            carried[key] = value
        else:
            return None
    return carried
