"""Plain models, no graph: linear layers by name made block-sparse in place, and taken back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fxopt.errors import Conflict, UsageError
from fxopt.sparse.block_optimizer import following
from fxopt.sparse.block_plan import (
    CALIBRATION_ROWS,
    Plan,
    Planner,
    Spec,
    hook_of,
    left,
    matching,
    rows_of,
    specified,
)
from fxopt.sparse.block_report import LayerReport, SparsifyReport
from fxopt.sparse.block_select import dense_weight, is_fan_in_fan_out
from fxopt.sparse.sparsified_linear import SparsifiedLinear

Mode = Literal["zeros", "merge"]


@dataclass(frozen=True)
class _Layer:
    """A linear layer of a model, under all its paths, with the others that have its weight."""

    paths: tuple[str, ...]
    module: nn.Module


@dataclass(frozen=True)
class _Patched:
    """A layer as it was, and what took its place."""

    paths: tuple[str, ...]
    original: nn.Module
    layer: SparsifiedLinear
    factor: Tensor | None  # by which it was rescaled
    places: tuple[Tensor, ...]  # a copy of what says where its weights stand
    trained: bool  # whether its weights required gradients

    @property
    def weight(self) -> nn.Parameter:
        """The original weight, as its module holds it."""
        weight = self.original.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def edited(self) -> bool:
        """Whether the layer holds anything but what it was made with, converted to another type or device at most."""
        now = self.layer.tensors[1:]
        if any(t.is_meta or not torch.equal(t, was.to(t.device)) for t, was in zip(now, self.places, strict=True)):
            return True
        return not self.layer.made_of(dense_weight(self.original)[0], self.factor)

    @property
    def requires_grad(self) -> bool:
        """Of the weight: what the layer was set to since it was made, or else what it was."""
        now = self.layer.tensors[0].requires_grad
        return self.weight.requires_grad if now == self.trained else now


class BlockSparseModelPatcher:
    """
    Makes the linear layers of a model block-sparse by name, in place.

        patcher = BlockSparseModelPatcher()
        patcher.add_pattern(r"encoder\\.layer\\.[0-9]+\\.intermediate\\.dense", {"density": 0.5})
        print(patcher.patch_model(model))

    `guard`: "auto" leaves a layer dense that would be no faster at `tokens` rows; "off" forces. The patcher holds the
    original layers, to give them back in `restore`; they are freed with it.
    """

    def __init__(self, guard: str = "auto", tokens: Sequence[int] = (128,)) -> None:
        self._planner = Planner(guard, tuple(tokens))
        self._patterns: list[tuple[Any, Spec]] = []
        self._patched: WeakKeyDictionary[nn.Module, list[_Patched]] = WeakKeyDictionary()

    def add_pattern(self, pattern: Any, spec: Any) -> BlockSparseModelPatcher:
        """
        Say how the layers whose whole path matches `pattern` are made block-sparse; the first that matches counts.

        `pattern`: a regular expression, or a predicate of the path and the weight (out, in). `spec`: a density in
        (0, 1], a mapping with density, block ("2:4" for two of every four weights), select and rescale, or a `Spec`.
        Returns the patcher.
        """
        self._patterns += specified(((pattern, spec),))
        return self

    def get_patchable_layers(self, model: nn.Module) -> list[str]:
        """The paths of the linear layers of `model`, to write patterns for."""
        return [path for layer in _linear_layers(model) for path in layer.paths]

    def patch_model(self, model: nn.Module, inputs: Any = None, optimizer: Optimizer | None = None) -> SparsifyReport:
        """
        Replace what the patterns name in `model`, all of it or nothing, and return the table: by `BlockSparseLinear`,
        or by `SemiStructuredLinear` where 2:4 was asked for, or `guard` finds it faster and no sparser than asked for.

        `inputs`: example inputs of the model (a tensor, a tuple, a mapping, or a list of these), to calibrate by and to
        tell the error of each layer. `optimizer` goes along with the parameters. `UsageError` for a pattern that
        matches no linear layer.
        """
        with torch.inference_mode(False), ExitStack() as rollback:  # what is made there could never be trained
            planned = list(self._planned(model, inputs))
            with following(optimizer, model):
                kept = [(group, plan) for group, plan in planned if isinstance(plan, Plan) and plan.kept]
                done = [one for group, plan in kept for one in _put(model, group, plan, rollback)]
            rollback.pop_all()
        self._patched.setdefault(model, []).extend(done)
        return SparsifyReport(tuple(plan.report if isinstance(plan, Plan) else plan for _, plan in planned))

    def restore(self, model: nn.Module, mode: Mode | None = None, optimizer: Optimizer | None = None) -> None:
        """
        Give `model` its dense layers back: the original ones, with the original parameters.

        Where blocks were trained since, or written to in any way, `mode` says what the weight is: "zeros", the function
        of now, or "merge", the trained blocks among the original rest; without it `Conflict` is raised, and nothing
        changed. Where the model was moved or converted (`model.to(torch.bfloat16)`), so is the original; it requires
        gradients as the layer does, if that was set since. `UsageError` for a model that this patcher did not patch.
        """
        if mode not in (None, "zeros", "merge"):
            raise UsageError(f"mode={mode!r} was given, expected 'zeros' or 'merge'")
        if model not in self._patched:
            self._check_unknown(model)
        patched = self._patched.get(model, [])
        for one in patched:
            for path in one.paths:
                if _at(model, path) is not one.layer:
                    raise Conflict(f"{path} was replaced since it was made block-sparse; put it back first")
        with torch.inference_mode(False), ExitStack() as rollback:
            edited = [one for one in patched if one.edited]
            if edited and mode is None:
                names = ", ".join(one.paths[0] for one in edited[:3]) + ", …" * (len(edited) > 3)
                raise Conflict(
                    f"{names} changed since; say mode='zeros' (the function of now, dense) or mode='merge' "
                    "(the changed blocks among the original weights)"
                )
            with following(optimizer, model):
                _restore(model, patched, {id(one): mode for one in edited if mode is not None}, rollback)
            rollback.pop_all()
        self._patched.pop(model, None)

    @staticmethod
    def _check_unknown(model: nn.Module) -> None:
        """`UsageError` where layers are there that another patcher put, or that came with a copy."""
        found = next((p for p, m in model.named_modules() if isinstance(m, SparsifiedLinear)), None)
        if found is not None:
            raise UsageError(
                f"this patcher did not patch this {type(model).__name__}, which has a sparse layer at "
                f"{found or 'its root'}; restore the very model that was patched, by the patcher that patched it"
            )

    def _planned(self, model: nn.Module, inputs: Any) -> Iterator[tuple[list[_Layer], Plan | LayerReport]]:
        """Every layer that a pattern names, with those that are tied to it."""
        if not self._patterns:
            raise UsageError("no pattern was given; call add_pattern(pattern, {'density': 0.5}) first")
        layers = _linear_layers(model)
        groups: dict[int, list[_Layer]] = {}
        for layer in layers:
            groups.setdefault(id(layer.module.weight), []).append(layer)
        chosen: list[tuple[list[_Layer], Spec]] = []
        used = set()
        for group in groups.values():
            paths = [p for layer in group for p in layer.paths]
            index = matching(self._patterns, paths, dense_weight(group[0].module)[0])
            used.add(index)
            if index is not None:
                chosen.append((group, self._patterns[index][1]))
        self._check(model, used, [p for layer in layers for p in layer.paths])
        calibration = {} if inputs is None else _captured(model, [g[0].module for g, _ in chosen], inputs)
        for group, spec in chosen:
            module, path = group[0].module, group[0].paths[0]
            weight, bias = dense_weight(module)
            if reason := _refused(model, group):
                yield group, left(path, weight, spec, reason)
                continue
            yield group, self._planner.plan(path, weight, bias, spec, calibration.get(id(module)))

    def _check(self, model: nn.Module, used: set[int | None], paths: list[str]) -> None:
        for i, (pattern, _) in enumerate(self._patterns):
            if i in used:
                continue
            if isinstance(pattern, str):
                taken = any(re.fullmatch(pattern, p) for p in paths)
                others = [(n, m) for n, m in model.named_modules() if re.fullmatch(pattern, n)]
                if taken:
                    raise UsageError(
                        f"the pattern {pattern!r} matches only what an earlier pattern takes; leave it out"
                    )
                if others:
                    name, kind = others[0][0], type(others[0][1]).__name__
                    raise UsageError(f"the pattern {pattern!r} matches {name}, a {kind}, expected torch.nn.Linear")
            shown = ", ".join(paths[:3]) + ", …" * (len(paths) > 3) or "none"
            raise UsageError(
                f"the pattern {pattern!r} matches no linear layer; it has to match a whole path, such as {shown}"
            )


def _linear_layers(model: nn.Module) -> list[_Layer]:
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        try:
            dense_weight(module)
        except UsageError:
            continue
        found.setdefault(id(module), (module, []))[1].append(path)
    return [_Layer(tuple(paths), module) for module, paths in found.values()]


def _refused(model: nn.Module, group: Sequence[_Layer]) -> str:
    """Why layers with one weight stay as they are, or nothing."""
    weight, mine = group[0].module.weight, {id(layer.module) for layer in group}
    for path, module in model.named_modules():
        if id(module) not in mine and any(p is weight for p in module._parameters.values()):
            return f"its weight is that of {path} too, a {type(module).__name__}, which needs it dense"
    for layer in group:
        if not all(layer.paths):
            return "it is the model itself; put it into a module"
        if hook := hook_of(layer.module, layer.module.weight):  # type: ignore[arg-type]
            return f"it has {hook}, which would be lost; remove that first"
    return ""


def _put(model: nn.Module, group: Sequence[_Layer], plan: Plan, rollback: ExitStack) -> list[_Patched]:
    """Put the planned layer in place of each module of the group; they share its blocks."""
    places = tuple(t.clone() for t in plan.layer.tensors[1:])
    trained = plan.layer.tensors[0].requires_grad
    done = []
    for layer in group:
        new = plan.layer
        if layer is not group[0]:
            _, bias = dense_weight(layer.module)
            new = plan.layer.tied(bias)
        new.training = layer.module.training
        new.fan_in_fan_out = is_fan_in_fan_out(layer.module)
        for path in layer.paths:
            _set(model, path, new, rollback)
        done.append(_Patched(layer.paths, layer.module, new, plan.factor, places, trained))
    return done


def _restore(model: nn.Module, patched: Sequence[_Patched], edited: Mapping[int, Mode], rollback: ExitStack) -> None:
    """Put the originals back; of those in `edited`, by id, with another weight."""
    weights: dict[int, nn.Parameter] = {}  # by the former one, which several may have
    for one in patched:
        original, former = one.original, one.weight
        was = (former.data, former.requires_grad, original.bias, original.training)
        rollback.callback(_put_back, original, former, *was)
        if id(former) not in weights:
            if id(one) in edited:
                value = edited_weight(dense_weight(original)[0], one.layer, edited[id(one)])
                value = value.t().contiguous() if dense_weight(original)[0] is not former else value
                weights[id(former)] = nn.Parameter(value, requires_grad=one.requires_grad)
            else:
                flag = one.requires_grad
                weights[id(former)] = _converted(former, one.layer.tensors[0])
                _require_gradients(weights[id(former)], flag)
        original.weight = weights[id(former)]
        original.bias = one.layer.bias  # type: ignore[assignment]
        original.training = one.layer.training
        for path in one.paths:
            _set(model, path, original, rollback)


def _put_back(
    original: nn.Module, weight: nn.Parameter, data: Tensor, requires_grad: bool, bias: Any, training: bool
) -> None:
    weight.data = data
    _require_gradients(weight, requires_grad)
    original.weight, original.bias, original.training = weight, bias, training


def _require_gradients(weight: nn.Parameter, wanted: bool) -> None:
    if weight.requires_grad != wanted:  # else it need not be asked, which a tensor of inference mode must not be
        weight.requires_grad_(wanted)


def _converted(weight: nn.Parameter, like: Tensor) -> nn.Parameter:
    """`weight` in the type and on the device of `like`: the same object, its gradient too, as `Module.to` does it."""
    made: nn.Parameter = nn.ParameterList([weight]).to(like)[0]
    return made


@torch.no_grad()
def edited_weight(original: Tensor, layer: SparsifiedLinear, mode: Mode) -> Tensor:
    """The weight (out, in) after what is kept was trained: zero elsewhere ("zeros"), or as it was ("merge")."""
    now = layer.dense().detach()
    if mode == "zeros":
        return now.contiguous().clone()
    return torch.where(layer.kept, now, original.detach().to(now))


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _set(model: nn.Module, path: str, module: nn.Module, rollback: ExitStack) -> None:
    owner, _, name = path.rpartition(".")
    children = model.get_submodule(owner)._modules
    rollback.callback(children.__setitem__, name, children[name])
    children[name] = module


@contextmanager
def _hooked(modules: Sequence[nn.Module], held: dict[int, list[Tensor]]) -> Iterator[None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        (x,) = (*arguments, *keywords.values())  # whatever it is called
        held.setdefault(id(module), []).append(rows_of(x))

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _captured(model: nn.Module, modules: Sequence[nn.Module], inputs: Any) -> dict[int, Tensor]:
    """The inputs that each module gets, by id: at most `CALIBRATION_ROWS` rows."""
    held: dict[int, list[Tensor]] = {}
    with evaluating(model), _hooked(modules, held):
        for one in inputs if isinstance(inputs, list) else [inputs]:
            call(model, one)
    return {key: rows_of(torch.cat(parts), CALIBRATION_ROWS) for key, parts in held.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let the body run `model` in eval mode, without gradients; its modes and buffers and torch's chance stay."""
    modes = [(m, m.training) for m in model.modules()]
    tables = [(m._buffers, dict(m._buffers)) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    buffers = {id(b): b for _, held in tables for b in held.values() if b is not None and not is_lazy(b)}
    gpus = {t.device for t in (*model.parameters(), *buffers.values()) if t.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(list(gpus)):
        copies = {key: b.clone() for key, b in buffers.items()}  # written to in the place of the buffers
        try:
            for module, _ in modes:
                module.training = False  # eval() may do more, which nothing would undo
            for table, held in tables:
                table.update({name: copies.get(id(b), b) for name, b in held.items()})
            yield
        finally:
            for table, held in tables:
                table.clear()
                table.update(held)
            for module, training in modes:
                module.training = training


def call(function: Any, inputs: Any) -> Any:
    """Call with a tensor, a tuple of arguments, or a mapping of keywords."""
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, tuple) else function(inputs)
