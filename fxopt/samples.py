"""Input sets for a callable: in one normal form, cloned without losing what they share, and drawn anew.

A drawn set is one that the callable could be given in earnest: sizes within the ranges of the captured graph's
symbols, integers within the values seen, masks that keep at least one place of each row.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import sympy
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxopt.errors import UsageError

_SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.SymInt)
_FAR = -1e4  # a float at or below this, beside zeros, is the "off" of an additive mask
_GROWTH = 17  # a drawn size is at most this much above the given one: enough to leave every alignment, cheap to run


@dataclass(frozen=True)
class Part:
    """One place in a nested value: a container (`value` is its type and keys) or a leaf (a tensor, a scalar)."""

    path: str
    kind: Literal["container", "leaf"]
    value: Any


def flatten(value: Any, path: str) -> list[Part]:
    """Containers and leaves of a nested value, in order; objects that are no known container go by their attributes."""
    return list(_walk(value, path, set()))


def _walk(value: Any, path: str, above: set[int]) -> Iterator[Part]:
    if isinstance(value, (Tensor, *_SCALARS)):
        yield Part(path, "leaf", value)
        return
    if id(value) in above:  # a cycle: what it holds has been seen
        return
    children = _children(value, path)
    yield Part(path, "container", (_container(value), tuple(name for name, _ in children)))
    for name, child in children:
        yield from _walk(child, name, above | {id(value)})


def _container(value: Any) -> type:
    """The container's type; the immutable ones of torch.fx count as those of Python."""
    for plain in (list, dict):
        if type(value).__module__ == "torch.fx.immutable_collections" and isinstance(value, plain):
            return plain
    return type(value)


def _children(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f"{path}.{name}", getattr(value, name)) for name in value._fields]
    if isinstance(value, (list, tuple)):
        return [(f"{path}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return [(_keyed(value, path, key), item) for key, item in value.items()]
    if isinstance(value, (nn.Module, type)) or callable(value):
        return []
    return [(f"{path}.{name}", item) for name, item in getattr(value, "__dict__", {}).items()]


def _keyed(mapping: Mapping[Any, Any], path: str, key: Any) -> str:
    return f"{path}[{key!r}]" if type(mapping) is dict else f"{path}.{key}"


@dataclass(frozen=True)
class InputSet:
    """One set of inputs: positional and keyword arguments, and how reports call it."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    label: str
    origin: Literal["given", "drawn"] = "given"
    names: tuple[str, ...] = ()  # of the positional arguments

    def call(self, function: Callable[..., Any]) -> Any:
        return function(*self.args, **self.kwargs)

    def tensors(self) -> list[tuple[str, Tensor]]:
        """The tensors inside, each with its name: the parameter that takes it, and its place in what is nested."""
        return [(part.path, part.value) for part in self.parts() if isinstance(part.value, Tensor)]

    def parts(self) -> list[Part]:
        """Containers and leaves of every argument; see `flatten`."""
        named = [*zip(self.names, self.args, strict=True), *self.kwargs.items()]
        return [part for name, value in named for part in flatten(value, name)]

    def with_tensors(self, tensors: Mapping[int, Tensor]) -> InputSet:
        """The same nest of containers with other tensors, by the `id` of the tensor replaced."""
        memo: dict[int, Any] = dict(tensors)
        args, kwargs = copy.deepcopy((self.args, dict(self.kwargs)), memo)
        return replace(self, args=args, kwargs=kwargs)

    def clone(self, dtype: torch.dtype | None = None) -> InputSet:
        """A copy that shares no memory with this one; tensors that share memory here share it there.

        With `dtype`, floating-point tensors come in it (complex ones in the complex dtype of the same width).
        """
        return self.with_tensors(clone_tensors([tensor for _, tensor in self.tensors()], dtype))


def clone_tensors(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> dict[int, Tensor]:
    """Copies by `id`, detached, with equal strides; tensors of one storage become tensors of one new storage.

    With `dtype`, floats are converted, the whole storage at once, so that views stay views.
    """
    storages: dict[tuple[int, torch.dtype], Tensor] = {}
    copies: dict[int, Tensor] = {}
    with torch.no_grad():
        for tensor in tensors:
            copies[id(tensor)] = _clone(tensor, dtype, storages)
    return copies


def _clone(tensor: Tensor, dtype: torch.dtype | None, storages: dict[tuple[int, torch.dtype], Tensor]) -> Tensor:
    to = widened(tensor.dtype, dtype)
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
    if not plain or tensor.device.type == "meta" or tensor.is_conj() or tensor.is_neg():
        return tensor.detach().clone().to(to)
    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    if not count:
        return tensor.detach().clone().to(to)
    key = (storage.data_ptr(), tensor.dtype)
    if key not in storages:
        storages[key] = tensor.detach().as_strided((count,), (1,), 0).to(to, copy=True)
    return storages[key].as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def widened(dtype: torch.dtype, to: torch.dtype | None) -> torch.dtype:
    """`to` for a floating-point dtype, its complex partner for a complex one, else `dtype` itself."""
    if to is None:
        return dtype
    if dtype.is_complex:
        return to.to_complex()
    return to if dtype.is_floating_point else dtype


def normal_form(inputs: Any, function: Callable[..., Any]) -> list[InputSet]:
    """Input sets from what a user gives: a tensor, a tuple (positional), a mapping (keywords), or a list of those.

    Positional arguments are named by the parameters of `function`. UsageError for anything else, and an empty list.
    """
    if not isinstance(inputs, list):
        return [_one(inputs, function, "given input set")]
    if not inputs:
        raise UsageError("inputs is an empty list: give at least one input set, a tuple or a dict")
    return [_one(item, function, f"given input set {i} of {len(inputs)}") for i, item in enumerate(inputs, 1)]


def _one(inputs: Any, function: Callable[..., Any], label: str) -> InputSet:
    if isinstance(inputs, InputSet):
        return inputs
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if isinstance(inputs, tuple):
        return InputSet(inputs, {}, label, names=_parameter_names(function, len(inputs)))
    if isinstance(inputs, Mapping):
        if strange := [key for key in inputs if not isinstance(key, str)]:
            raise UsageError(f"an input set as a dict needs parameter names as keys, but has {strange[0]!r}")
        return InputSet((), dict(inputs), label)
    raise UsageError(f"an input set is a tuple, a dict (keywords) or a tensor, not {type(inputs).__name__}")


def _parameter_names(function: Callable[..., Any], count: int) -> tuple[str, ...]:
    numbered = tuple(f"args[{i}]" for i in range(count))
    try:
        parameters = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return numbered
    names = tuple(p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return (names + numbered[len(names) :])[:count]


# --------------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Axis:
    """A size that may vary: what it was in each given set, and its least and greatest value."""

    given: tuple[int, ...]
    least: int
    most: int


Symbol = Any  # a sympy.Symbol; sympy comes with torch, without types
Size = Any  # an int, or a sympy expression of symbols


@dataclass(frozen=True)
class Sampler:
    """Draws input sets like the given ones; see `draw`."""

    given: tuple[InputSet, ...]
    sizes: Mapping[str, tuple[Size, ...]]  # by the input's name; a symbol is one of `axes`
    axes: Mapping[Symbol, Axis]

    @property
    def dynamic(self) -> bool:
        """Whether any size may differ from the given ones."""
        return bool(self.axes)

    def draw(self, number: int, seed: int, resize: bool = True) -> InputSet:
        """The drawn set of that number: the same for the same seed.

        In turn: the given sizes, right-padded; other sizes, left-padded, small floats; the least sizes, not padded;
        greater sizes, right-padded, large floats. `resize=False` keeps the given sizes. Floats are normal with the
        mean and deviation of the given ones (uniform in their range if none is negative), integers uniform in their
        range. Tensors that are one object stay one object. No global random state is read or written.
        """
        which = number % len(self.given)
        chance = random.Random(f"{seed}/{number}")
        generator = torch.Generator().manual_seed(chance.getrandbits(62))
        values = self._choose(number % 4, which, chance) if resize and self.dynamic else self._as_given(which)
        filling = _Filling(
            generator=generator,
            chance=chance,
            padding=("right", "left", "none", "right")[number % 4],
            scale=(1.0, 0.01, 1.0, 8.0)[number % 4],
            sizes=tuple((axis.given, values[symbol]) for symbol, axis in self.axes.items()),
        )
        return self._filled(which, values, filling, f"drawn input set {number + 1}")

    def _as_given(self, which: int) -> dict[Symbol, int]:
        return {symbol: axis.given[which] for symbol, axis in self.axes.items()}

    def _choose(self, turn: int, which: int, chance: random.Random) -> dict[Symbol, int]:
        """A size for each symbol; symbols that were equal in every given set stay equal.

        Export gives the batch of each input its own symbol where broadcasting would allow them to differ, but a
        model that is given two batches at once rarely means it.
        """
        groups: dict[tuple[int, ...], list[Symbol]] = {}
        for symbol, axis in self.axes.items():
            groups.setdefault(axis.given, []).append(symbol)
        chosen: dict[Symbol, int] = {}
        for given, symbols in groups.items():
            least = max(self.axes[s].least for s in symbols)
            most = max(least, min(self.axes[s].most for s in symbols))
            size = _choose_size(turn, given[which], least, most, chance)
            chosen.update(dict.fromkeys(symbols, size))
        return chosen

    def _filled(self, which: int, values: Mapping[Symbol, int], filling: _Filling, label: str) -> InputSet:
        base, drawn, notes = self.given[which], {}, []
        for name, tensor in base.tensors():
            if id(tensor) in drawn:
                continue
            shape = tuple(_evaluate(size, values) for size in self.sizes.get(name, tuple(tensor.shape)))
            seen = [t for one in self.given for n, t in one.tensors() if n == name]
            drawn[id(tensor)], note = filling.fill(name, tensor, seen, shape)
            notes.append(f"{name} {'×'.join(map(str, shape)) or 'scalar'}{note}")
        label = f"{label} ({', '.join(notes)})" if notes else label
        return self._with_sizes(replace(base.with_tensors(drawn), label=label, origin="drawn"), values)

    def _with_sizes(self, drawn: InputSet, values: Mapping[Symbol, int]) -> InputSet:
        """Integers that are inputs themselves and stand for a symbol follow it."""

        def follow(name: str, value: Any) -> Any:
            size = self.sizes.get(name)
            return _evaluate(size[0], values) if size and type(value) is int else value

        args = tuple(follow(name, value) for name, value in zip(drawn.names, drawn.args, strict=True))
        kwargs = {name: follow(name, value) for name, value in drawn.kwargs.items()}
        return replace(drawn, args=args, kwargs=kwargs)


def _choose_size(turn: int, given: int, least: int, most: int, chance: random.Random) -> int:
    most = max(least, min(most, given + min(given, _GROWTH)))
    if turn == 0:
        return given
    if turn == 2:
        return least
    if turn == 3:
        return most
    return chance.randint(least, most)


def _evaluate(size: Size, values: Mapping[Symbol, int]) -> int:
    return size if isinstance(size, int) else int(size.subs(dict(values)))


def sampler(given: Sequence[InputSet], captured_as: Callable[..., Any]) -> Sampler:
    """A sampler whose sizes vary as the captured graph says, or as the given sets do.

    If `captured_as` is a graph module, sizes come from its placeholders' `meta["val"]`. Where no placeholder has one,
    sizes that differ between the given sets vary within what was given.
    """
    captured = _placeholder_values(captured_as) if isinstance(captured_as, GraphModule) else {}
    sizes, axes = _captured_sizes(given, captured) if captured else _observed_sizes(given)
    return Sampler(tuple(given), sizes, axes)


def _placeholder_values(gm: GraphModule) -> dict[str, Any]:
    """Fake tensors and symbolic integers by input name, where the capture recorded them."""
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [node.meta.get("val", node.meta.get("example_value")) for node in nodes]
    if not any(isinstance(value, (Tensor, torch.SymInt)) for value in values):
        return {}
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is None or info.in_spec.num_leaves != len(values):
        return {str(node.target): value for node, value in zip(nodes, values, strict=True)}
    args, kwargs = pytree.tree_unflatten(values, info.in_spec)
    named = {**dict(zip(info.orig_args, args, strict=False)), **kwargs}
    return {part.path: part.value for name, value in named.items() for part in flatten(value, name)}


def _captured_sizes(
    given: Sequence[InputSet], captured: Mapping[str, Any]
) -> tuple[dict[str, tuple[Size, ...]], dict[Symbol, Axis]]:
    sizes: dict[str, tuple[Size, ...]] = {}
    observed: dict[Symbol, list[int | None]] = {}
    ranges: dict[Symbol, tuple[int, int]] = {}
    for which, one in enumerate(given):
        for part in one.parts():
            symbolic = _dimensions(captured.get(part.path))
            actual = tuple(part.value.shape) if isinstance(part.value, Tensor) else (part.value,)
            if symbolic is None or len(symbolic) != len(actual):
                continue
            sizes[part.path] = tuple(_expression(size, ranges) for size in symbolic)
            for size, value in zip(sizes[part.path], actual, strict=True):
                if isinstance(size, sympy.Symbol):
                    observed.setdefault(size, [None] * len(given))[which] = value
    axes = {s: Axis(tuple(v), *ranges[s]) for s, v in observed.items() if None not in v}  # type: ignore[arg-type]
    known = {name: size for name, size in sizes.items() if all(_is_known(s, axes) for s in size)}
    return known, axes


def _dimensions(value: Any) -> tuple[Any, ...] | None:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return (value,) if isinstance(value, torch.SymInt) else None


def _expression(size: Any, ranges: dict[Symbol, tuple[int, int]]) -> Size:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    for symbol in expression.free_symbols:
        bounds = size.node.shape_env.bound_sympy(symbol)
        ranges[symbol] = (max(1, int(bounds.lower)), int(min(bounds.upper, 2**31)))
    return int(expression) if expression.is_number else expression


def _is_known(size: Size, axes: Mapping[Symbol, Axis]) -> bool:
    return isinstance(size, int) or all(symbol in axes for symbol in size.free_symbols)


def _observed_sizes(
    given: Sequence[InputSet],
) -> tuple[dict[str, tuple[Size, ...]], dict[Symbol, Axis]]:
    """Sizes that went together in every given set are one axis; those that never changed are constants."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for one in given:
        for name, tensor in one.tensors():
            shapes.setdefault(name, []).append(tuple(tensor.shape))
    symbols: dict[tuple[int, ...], sympy.Symbol] = {}
    sizes: dict[str, tuple[Size, ...]] = {}
    for name, seen in shapes.items():
        if len(seen) != len(given) or len({len(shape) for shape in seen}) != 1:
            continue
        together = list(zip(*seen, strict=True))
        for column in together:
            if len(set(column)) > 1:
                symbols.setdefault(column, sympy.Symbol(f"size{len(symbols)}"))
        sizes[name] = tuple(symbols.get(column, column[0]) for column in together)
    axes = {symbol: Axis(column, max(1, min(column)), max(column)) for column, symbol in symbols.items()}
    return sizes, axes


@dataclass(frozen=True)
class _Filling:
    """How the tensors of one drawn set are filled."""

    generator: torch.Generator
    chance: random.Random
    padding: str
    scale: float
    sizes: tuple[tuple[tuple[int, ...], int], ...]  # what varies: in each given set, and here
    lengths: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # masks of one batch are padded alike

    def fill(self, name: str, example: Tensor, seen: Sequence[Tensor], shape: tuple[int, ...]) -> tuple[Tensor, str]:
        """A tensor of that shape, of the example's dtype, device and order of strides; and a note for the label."""
        if type(example) not in (Tensor, nn.Parameter) or example.layout is not torch.strided or example.is_quantized:
            return example.detach().clone(), " as given"
        if example.numel() == 0 or 0 in shape:
            return torch.zeros(shape, dtype=example.dtype, device=example.device), ""
        if (off_on := _mask_values(name, seen)) is not None:
            values, note = self._mask(example, shape, *off_on), f" {self.padding}-padded mask"
            note = " full mask" if self.padding == "none" else note
        elif example.dtype is torch.bool:
            values, note = torch.randint(0, 2, shape, generator=self.generator).bool(), ""
        elif example.is_complex():
            values, note = torch.randn(shape, generator=self.generator, dtype=torch.complex128), ""
        elif example.is_floating_point():
            values, note = self._floats(seen, shape), ""
        else:
            values, note = self._integers(seen, shape), ""
        return _ordered_like(example, values), note

    def _floats(self, seen: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        known = torch.cat([t.detach().double().flatten().cpu() for t in seen])
        known = known[known.isfinite()]
        if not len(known) or not known.any():
            return self.scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        low, high, mean = float(known.min()), float(known.max()), float(known.mean())
        if low == high:  # a constant: around it, without a change of sign
            return mean * (0.5 + torch.rand(shape, generator=self.generator, dtype=torch.float64))
        if low >= 0:  # perhaps a domain without negative numbers
            return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)
        normal = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return self.scale * (mean + float(known.std(correction=0)) * normal)

    def _integers(self, seen: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        if all(_is_arange(t) for t in seen) and shape:
            return (int(seen[0].flatten()[0]) + torch.arange(shape[-1])).expand(shape)
        low, high = min(int(t.min()) for t in seen), max(int(t.max()) for t in seen)
        # Integers that are below a size in every given set may be places along it.
        for given, drawn in self.sizes:
            if len(given) == len(seen) and all(int(t.max()) < size for t, size in zip(seen, given, strict=True)):
                high = max(low, min(high, drawn - 1))
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def _mask(self, example: Tensor, shape: tuple[int, ...], off: float, on: float) -> Tensor:
        keep = torch.ones(shape, dtype=torch.bool)
        if shape and self.padding != "none":
            keep &= (
                self._unpadded(shape[0] if len(shape) > 1 else 1, shape[-1])
                .reshape(-1, *[1] * (len(shape) - 2), shape[-1])
                .expand(shape if len(shape) > 1 else (1, *shape))
                .reshape(shape)
            )
        if len(shape) > 2 and _is_causal(example, off):
            keep &= torch.ones(shape[-2:], dtype=torch.bool).tril(shape[-1] - shape[-2])
        if len(shape) > 2:  # a row that attends to nothing has no defined value
            keep |= torch.eye(shape[-2], shape[-1], dtype=torch.bool)
        return torch.where(keep, torch.tensor(on, dtype=torch.float64), torch.tensor(off, dtype=torch.float64))

    def _unpadded(self, rows: int, length: int) -> Tensor:
        """Which places are not padding, [rows, length]: at least one a row, one row in full if there are more."""
        if (rows, length) not in self.lengths:
            drawn = torch.randint(1, length + 1, (rows,), generator=self.generator)
            if rows > 1:
                drawn[self.chance.randrange(rows)] = length
            elif length > 1:
                drawn = drawn.clamp(max=length - 1)
            self.lengths[rows, length] = drawn
        lengths, places = self.lengths[rows, length][:, None], torch.arange(length)
        return places < lengths if self.padding == "right" else places >= length - lengths


def _mask_values(name: str, seen: Sequence[Tensor]) -> tuple[float, float] | None:
    """The values of "off" and "on" if these tensors are masks: of zeros and ones, of booleans, or additive."""
    first, named = seen[0], "mask" in name.rpartition(".")[2]
    if first.dtype is torch.bool:
        return (0.0, 1.0) if named or first.dim() == 2 else None
    if first.is_complex() or (first.is_floating_point() and any(bool(t.isnan().any()) for t in seen)):
        return None
    values = {float(v) for t in seen for v in (t.amin(), t.amax())}
    low, high = min(values), max(values)
    two = all(bool(((t == low) | (t == high)).all()) for t in seen)
    if not two or not first.dim():
        return None
    if low in (0.0, 1.0) and high == 1.0:
        return (0.0, 1.0) if named or not first.is_floating_point() else None
    if first.is_floating_point() and high == 0.0 and (low <= _FAR or (named and low == 0.0)):
        return (low if low <= _FAR else _FAR, 0.0)
    return (0.0, 1.0) if named and values == {0.0} else None


def _is_causal(example: Tensor, off: float) -> bool:
    above = torch.ones(example.shape[-2:], dtype=torch.bool, device=example.device).triu(
        1 + example.shape[-1] - example.shape[-2]
    )
    return bool(above.any()) and bool((example == off)[..., above].all())


def _is_arange(tensor: Tensor) -> bool:
    if not tensor.dim() or tensor.shape[-1] < 2:
        return False
    places = tensor.flatten()[0] + torch.arange(tensor.shape[-1], device=tensor.device)
    return bool((tensor == places).all())


def _ordered_like(example: Tensor, values: Tensor) -> Tensor:
    """`values` in the example's dtype, on its device, dense, its strides in the example's order."""
    strides = example.stride()
    order = sorted(range(example.dim()), key=lambda d: -strides[d])
    empty = torch.empty_permuted(values.shape, order, dtype=example.dtype, device=example.device)
    if example.is_floating_point():
        finite = torch.finfo(example.dtype)
        values = torch.where(values.isfinite(), values.clamp(finite.min, finite.max), values)
    return empty.copy_(values)
