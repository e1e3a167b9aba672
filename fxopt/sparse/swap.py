"""A model's sparse layers made fast: each one measured, swapped where it gains, and told about."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import UsageError
from fxopt.kernels.unstructured_conv import SparseConv2d, pads
from fxopt.kernels.unstructured_linear import SparseLinear
from fxopt.kernels.unstructured_weight import check_initialized
from fxopt.sparse.dense_layers import COMPUTED, Memory, holders, hooks, is_conv1d
from fxopt.sparse.measure import Layer, SwapReport, compare, judge, random_aside
from fxopt.sparse.pruning import check_share


def sparsify_conv2d_auto(conv: nn.Conv2d, input_shape: Sequence[int], verbose: bool = False) -> SparseConv2d:
    """
    `conv` with a sparse weight, in the form that is fastest on inputs of `input_shape` (batch, channels, height,
    width).

    SparseProp measures two kernels here and returns the faster. Here one kernel serves both cases (see
    `SparseConv2d.from_dense`), so it is returned; `verbose` prints how it compares with the dense layer.
    """
    _check_shape(input_shape, conv)
    sparse = SparseConv2d.from_dense(conv)
    if verbose:
        timing = compare(conv, sparse, input_shape)
        print(f"{sparse}: forward {timing.forward:.2f} ×, backward {timing.backward:.2f} × as fast as dense")
    return sparse


def sparsify_if_faster(
    layer: nn.Module, input_shape: Sequence[int], min_sparsity: float = 0.8, verbose: bool = False
) -> nn.Module:
    """`layer`, a Linear or Conv2d, with a sparse weight if it is sparse enough and faster so; else `layer` itself."""
    if type(layer) not in (nn.Linear, nn.Conv2d):
        raise UsageError(f"a {type(layer).__name__} was given; expected a torch.nn.Linear or torch.nn.Conv2d")
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    check_share("min_sparsity", min_sparsity)
    _check_shape(input_shape, layer)
    told, sparse = judge("layer", layer, input_shape, min_sparsity)
    if verbose:
        print(told)
    return layer if sparse is None else sparse


def swap_modules_with_sparse(
    model: nn.Module,
    input_shape: Sequence[int] | Tensor | tuple[Any, ...] | Mapping[str, Any],
    min_sparsity: float = 0.8,
    inplace: bool = False,
    skip_modules: Collection[str] = (),
    verbose: bool = False,
) -> nn.Module:
    """
    `model` with every Linear and Conv2d sparse that has `min_sparsity` zeros and is faster so, forward and backward.

    `input_shape` is the shape of a batch, with which random numbers are made, or the inputs themselves: a tensor, a
    tuple of positional ones, a mapping of keywords. They tell what each layer sees. The model is copied unless
    `inplace`; `skip_modules` are names that stay dense. The parameters are new ones: make the optimizer afterwards.
    `swap` returns the report too, which `verbose` prints.
    """
    swapped, report = swap(model, input_shape, min_sparsity, inplace, skip_modules)
    if verbose:
        print(report)
    return swapped


def swap(
    model: nn.Module,
    inputs: Sequence[int] | Tensor | tuple[Any, ...] | Mapping[str, Any],
    min_sparsity: float = 0.5,
    inplace: bool = False,
    skip_modules: Collection[str] = (),
    measure: bool = True,
) -> tuple[nn.Module, SwapReport]:
    """
    `swap_modules_with_sparse`, with a report on every layer: sparsity, measured ratios, decision and why.

    Tries from half of zeros on, where a training step can begin to gain. `measure=False` swaps all that is sparse
    enough. Zeros of a layer that stays dense are trained like any weight: to keep them, attach a ``Pruner(model,
    "existing")`` to the optimizer.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"a {type(model).__name__} was given; expected a torch.nn.Module")
    check_share("min_sparsity", min_sparsity)
    names = dict(model.named_modules(remove_duplicate=False))
    if unknown := sorted(set(skip_modules) - names.keys()):
        raise UsageError(f"skip_modules has {unknown[0]!r}, which the model has not; see model.named_modules()")
    for module in names.values():
        check_initialized(module)
    skipped = {id(names[name]) for name in skip_modules}  # under whatever other name it is found
    with random_aside():
        seen = _seen(model, inputs) if measure else {}
    held = holders(model)
    layers: list[Layer] = []
    made: dict[int, nn.Module] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) and not is_conv1d(layer):
            continue
        reason = "named in skip_modules" if id(layer) in skipped else _unfit(name, layer, held)
        if reason is not None:
            kind = type(layer).__name__
            layers.append(Layer(name, kind, tuple(getattr(layer.weight, "shape", ())), None, None, False, reason))
            continue
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        shape, gradient = seen.get(id(layer), (None, True))
        told, sparse = judge(name, layer, shape, min_sparsity, input_gradient=gradient, measured=measure)
        layers.append(told)
        if sparse is not None:
            made[id(layer)] = sparse
    places = [(name, made[id(layer)]) for name, layer in names.items() if id(layer) in made]
    result = model if inplace else _copied(model)
    for name, new in places:
        if not name:
            return new, SwapReport(tuple(layers))
        owner, _, last = name.rpartition(".")
        parent = result.get_submodule(owner)
        setattr(parent, last, new)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # else eval mode computes with the dense weights, by another way
    return result, SwapReport(tuple(layers))


def _copied(model: nn.Module) -> nn.Module:
    """A copy; weights that a hook computes anew before each call (torch.nn.utils.prune) are copied as they stand."""
    computed = (t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf)
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})


def _unfit(name: str, layer: nn.Module, held: Memory) -> str | None:
    if is_conv1d(layer):
        return "a Conv1D has its weight the other way round; SwapSparse takes it, in the graph that fxopt.capture makes"
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return COMPUTED
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"a {type(layer).__name__}, a subclass, may compute something else"
    if any(hooks(layer)) or "forward" in vars(layer):
        return "it has hooks, or a forward of its own"
    for kind, parameter in layer._parameters.items():
        if parameter is not None and held.user(parameter, but=name) is not None:
            return f"its {kind} is used by another module too"
    return None


def _seen(model: nn.Module, inputs: Any) -> dict[int, tuple[tuple[int, ...], bool]]:
    """The largest input of each layer by shape, and whether a gradient flows back through it; by a run in eval mode."""
    seen: dict[int, tuple[tuple[int, ...], bool]] = {}

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if x is None:
            return
        shape, gradient = seen.get(id(layer), ((), False))
        larger = x.shape if x.numel() > torch.Size(shape).numel() or not shape else shape
        seen[id(layer)] = (tuple(larger), gradient or x.requires_grad)

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    args, kwargs = _arguments(model, inputs)
    modes = [(m, m.training) for m in model.modules()]
    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in layers]
    model.eval()  # statistics stay as they are
    try:
        with torch.enable_grad():
            model(*args, **kwargs)
    except Exception as error:  # whatever the model's own code raises on what it was not made for
        first = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")
        told = f"the model cannot be called with these inputs: {first}"
        raise UsageError(f"{told}; give a shape or inputs that fit") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return seen


def _arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if not isinstance(inputs, Sequence) or isinstance(inputs, str):
        given = repr(inputs) if inputs is None or isinstance(inputs, int | str) else f"a {type(inputs).__name__}"
        expected = "the shape of a batch, a tensor, a tuple of positional inputs or a mapping of keywords"
        raise UsageError(f"{given} was given as inputs; expected {expected}")
    shape = tuple(inputs)
    if shape and all(isinstance(n, int) for n in shape):
        if min(shape) < 1:
            raise UsageError(f"the shape {shape} was given as inputs; expected sizes of 1 or more")
        parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        return (torch.randn(shape, dtype=parameter.dtype, device=parameter.device),), {}
    return shape, {}


def _check_shape(shape: Sequence[int], layer: nn.Module) -> None:
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise UsageError(f"a {type(layer).__name__} was given; expected a torch.nn.Linear or torch.nn.Conv2d")
    check_initialized(layer)
    linear = isinstance(layer, nn.Linear)
    axis, wanted = (-1, layer.in_features) if isinstance(layer, nn.Linear) else (-3, layer.in_channels)
    form = f"(..., {wanted})" if linear else f"(batch, {wanted}, height, width)"
    if not isinstance(shape, Sequence) or not all(isinstance(n, int) for n in shape):
        kind = repr(shape) if isinstance(shape, int) else f"a {type(shape).__name__}"
        raise UsageError(f"{kind} was given as input_shape; expected sizes, {form}")
    given = tuple(shape)
    fits = bool(given) and (linear or len(given) in (3, 4)) and given[axis] == wanted and min(given) > 0
    if not fits:
        raise UsageError(f"input_shape {given} was given; this layer takes {form}")
    if isinstance(layer, nn.Conv2d):
        top, bottom, left, right = pads(layer.padding, layer.kernel_size, layer.dilation)
        least = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        if given[-2] + top + bottom < least[0] or given[-1] + left + right < least[1]:
            raise UsageError(f"input_shape {given} was given; a kernel of {least[0]} × {least[1]} does not fit into it")


__all__ = ["SparseLinear", "sparsify_conv2d_auto", "sparsify_if_faster", "swap", "swap_modules_with_sparse"]
