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
from torch.optim import Optimizer

from fxopt.errors import Conflict, UsageError
from fxopt.sparse.block_optimizer import following
from fxopt.sparse.block_plan import CALIBRATION_ROWS, Plan, Planner, Spec, matching, pieces, rows_of, specified
from fxopt.sparse.block_report import DENSE, LayerReport, SparsifyReport
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
    versions: tuple[int, ...]


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
        planned = list(self._planned(model, inputs))
        with following(optimizer, model) if optimizer is not None else ExitStack():
            done = [_put(model, group, plan) for group, plan in planned if isinstance(plan, Plan) and plan.kept]
        self._patched.setdefault(model, []).extend(one for group in done for one in group)
        return SparsifyReport(tuple(plan.report if isinstance(plan, Plan) else plan for _, plan in planned))

    def restore(self, model: nn.Module, mode: Mode | None = None, optimizer: Optimizer | None = None) -> None:
        """
        Give `model` its dense layers back: the original ones, with the original parameters.

        Where blocks were trained since, `mode` says what the weight is: "zeros", the function of now, or "merge", the
        trained blocks among the original rest; without it `Conflict` is raised, and nothing changed.
        """
        if mode not in (None, "zeros", "merge"):
            raise UsageError(f"mode={mode!r} was given, expected 'zeros' or 'merge'")
        patched = self._patched.get(model, [])
        for one in patched:
            for path in one.paths:
                if _at(model, path) is not one.layer:
                    raise Conflict(f"{path} was replaced since it was made block-sparse; put it back first")
        trained = [one.paths[0] for one in patched if _versions(one.layer) != one.versions]
        if trained and mode is None:
            raise Conflict(
                f"{', '.join(trained[:3])}{', …' * (len(trained) > 3)} changed since; say mode='zeros' (the function "
                "of now, dense) or mode='merge' (the changed blocks among the original weights)"
            )
        with following(optimizer, model) if optimizer is not None else ExitStack():
            _restore(model, patched, mode)
        self._patched.pop(model, None)

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
                yield group, _left(path, weight, spec, reason)
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
        if hooks := [n for n in _HOOKS if getattr(layer.module, n)]:
            return f"it has {hooks[0].strip('_').replace('_', ' ')}, which would be lost; remove them first"
    return ""


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _left(path: str, weight: Tensor, spec: Spec, reason: str) -> LayerReport:
    size, shape = weight.numel() * weight.element_size(), (weight.shape[0], weight.shape[1])
    blocks = pieces(shape, spec.block)
    return LayerReport(path, shape, spec.block, blocks, blocks, 1.0, None, size, size, {}, DENSE, reason)


def _put(model: nn.Module, group: Sequence[_Layer], plan: Plan) -> list[_Patched]:
    """Put the planned layer in place of each module of the group; they share its blocks."""
    done = []
    for layer in group:
        new = plan.layer
        if layer is not group[0]:
            _, bias = dense_weight(layer.module)
            new = plan.layer.tied(bias)
        new.training = layer.module.training
        new.fan_in_fan_out = is_fan_in_fan_out(layer.module)
        for path in layer.paths:
            _set(model, path, new)
        done.append(_Patched(layer.paths, layer.module, new, _versions(new)))
    return done


def _restore(model: nn.Module, patched: Sequence[_Patched], mode: Mode | None) -> None:
    made: dict[int, nn.Parameter] = {}
    for one in patched:
        original = one.original
        if _versions(one.layer) != one.versions:
            former = original.weight
            assert isinstance(former, nn.Parameter)
            if id(former) not in made:
                value = edited_weight(dense_weight(original)[0], one.layer, mode or "zeros")
                value = value.t().contiguous() if dense_weight(original)[0] is not former else value
                made[id(former)] = nn.Parameter(value, requires_grad=former.requires_grad)
            original.weight = made[id(former)]
        original.training = one.layer.training
        for path in one.paths:
            _set(model, path, original)


@torch.no_grad()
def edited_weight(original: Tensor, layer: SparsifiedLinear, mode: Mode) -> Tensor:
    """The weight (out, in) after what is kept was trained: zero elsewhere ("zeros"), or as it was ("merge")."""
    now = layer.dense().detach()
    if mode == "zeros":
        return now.contiguous().clone()
    return torch.where(layer.kept, now, original.detach().to(now))


def _versions(layer: SparsifiedLinear) -> tuple[int, ...]:
    return (id(layer.tensors[0]), *(tensor._version for tensor in layer.tensors))


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    model.get_submodule(owner)._modules[name] = module


@contextmanager
def _hooked(modules: Sequence[nn.Module], held: dict[int, list[Tensor]]) -> Iterator[None]:
    def hook(module: nn.Module, arguments: Any) -> None:
        held.setdefault(id(module), []).append(rows_of(arguments[0]))

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _captured(model: nn.Module, modules: Sequence[nn.Module], inputs: Any) -> dict[int, Tensor]:
    """The inputs that each module gets, by id: at most `CALIBRATION_ROWS` rows."""
    held: dict[int, list[Tensor]] = {}
    was = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), _hooked(modules, held):
            for one in inputs if isinstance(inputs, list) else [inputs]:
                call(model, one)
    finally:
        for module, training in was:
            module.training = training
    return {key: rows_of(torch.cat(parts), CALIBRATION_ROWS) for key, parts in held.items()}


def call(function: Any, inputs: Any) -> Any:
    """Call with a tensor, a tuple of arguments, or a mapping of keywords."""
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, tuple) else function(inputs)
