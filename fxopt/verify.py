"""Does a transformed module still compute what the original computes?

The original is run once on several input sets (`Baseline`), natively and in float64; a transformed module is then held
against both. Float outputs pass where they are within the tolerances of the original's, or where their largest error
against float64 is at most twice the original's own: a rewrite may round differently, but not worse.
"""

from __future__ import annotations

import functools
import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.errors import UsageError, VerificationError
from fxopt.isolation import is_plain, module_of, own_copies, own_tensors, quiet
from fxopt.samples import InputSet, Part, Sampler, clone_tensors, flatten, normal_form, sampler, widened

if TYPE_CHECKING:
    from rich.console import RenderableType

DEFAULT_TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
_COARSE = 0.125  # for floats of 8 bits and fewer
_TIMES_OWN_ERROR = 2.0
_FLOOR_ULPS = 4.0  # the original may hit float64 exactly by luck; this many units of its precision are always allowed
_LEAST_ULPS = 64.0  # of 1.0: small differences of large numbers have that much error, however they are computed
_MEMORY_SHARE = 0.5  # of the memory that is available, for weights in float64


@dataclass(frozen=True)
class Difference:
    """How far one output is from the original's: its worst over all input sets.

    `index`, `expected` and `got` are those of the worst element; `max_rel` is |got − expected| / |expected|, elements
    where the original is 0 left out. `own_units` is the largest error against float64, in units of the original's own
    largest error; None where there is no float64 reference, or where the original has no error. `reason` is empty for
    an output that passes.
    """

    name: str
    input_set: str
    reason: str = ""
    dtype: str = ""
    index: tuple[int, ...] | None = None
    expected: Any = None
    got: Any = None
    max_abs: float = 0.0
    max_rel: float = 0.0
    mean_abs: float = 0.0
    own_units: float | None = None
    severity: float = 0.0  # the error over what is allowed; inf where no tolerance applies

    @property
    def ok(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        where = f" at {list(self.index)}" if self.index else ""
        text = f"{self.name}{where} {self.reason or 'is within the tolerance'}"
        if self.index is not None and self.dtype and not self.reason.startswith("has "):
            text += f": expected {_short(self.expected)}, got {_short(self.got)}"
            text += f" (largest error {self.max_abs:.2e} absolute, {self.max_rel:.2e} relative"
            text += f", {self.own_units:.3g} × the original's own)" if self.own_units is not None else ")"
        return f"{text}, on the {self.input_set}"

    def __rich__(self) -> RenderableType:
        from rich.text import Text

        return Text(str(self), style="" if self.ok else "red")

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>"

    def to_json(self) -> dict[str, Any]:
        """The difference as plain values; numbers that JSON lacks (NaN, Inf) as text."""
        return {
            "name": self.name,
            "input_set": self.input_set,
            "ok": self.ok,
            "reason": self.reason,
            "dtype": self.dtype,
            "index": None if self.index is None else list(self.index),
            "expected": _plain(self.expected),
            "got": _plain(self.got),
            "max_abs": _plain(self.max_abs),
            "max_rel": _plain(self.max_rel),
            "mean_abs": _plain(self.mean_abs),
            "own_units": _plain(self.own_units),
        }


@dataclass(frozen=True)
class Verification:
    """What `verify` found. It is truthy where it is `ok`, and prints as a table."""

    outputs: tuple[Difference, ...]  # one for each output, and each input and buffer written: the worst of all sets
    method: str  # what float outputs were judged against
    given: int
    drawn: int
    discarded: tuple[str, ...]  # drawn input sets that the original itself refused, and why
    rtol: float | None  # None: the default of the output's dtype
    atol: float | None

    @property
    def ok(self) -> bool:
        return all(difference.ok for difference in self.outputs)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def worst(self) -> Difference | None:
        """The failure that matters most, else the output with the largest error; None if there are no outputs."""
        ranked = sorted(self.outputs, key=lambda d: (d.ok, -d.severity, -d.max_abs))
        return ranked[0] if ranked else None

    @property
    def max_error(self) -> float:
        """The largest absolute error of any output."""
        return max((d.max_abs for d in self.outputs), default=0.0)

    @property
    def summary(self) -> str:
        """One line: that it holds and how well, or the failure that matters most."""
        if self.ok or self.worst is None:
            return f"equal within {self.max_error:.2e} on {self._sets} ({self.method})"
        failed = sum(not d.ok for d in self.outputs)
        return f"{self.worst}" + (f"; {failed - 1} more outputs fail" if failed > 1 else "")

    @property
    def _sets(self) -> str:
        drawn = f" and {self.drawn} drawn" if self.drawn else ""
        return f"{self.given} given{drawn} input set{'s' * (self.given + self.drawn > 1)}"

    def raise_if_failed(self) -> None:
        """VerificationError of one line, if it failed: the output, the worst element and the input set."""
        if not self.ok:
            raise VerificationError(f"the transformed module differs from the original: {self.summary}")

    def to_json(self) -> dict[str, Any]:
        """The verification as plain values."""
        return {
            "ok": self.ok,
            "method": self.method,
            "given": self.given,
            "drawn": self.drawn,
            "discarded": list(self.discarded),
            "rtol": self.rtol,
            "atol": self.atol,
            "max_error": _plain(self.max_error),
            "outputs": [difference.to_json() for difference in self.outputs],
        }

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self._title, title_justify="left")
        for column in _COLUMNS:
            text = column in ("output", "verdict")
            table.add_column(column, justify="left" if text else "right", overflow="fold")
        for difference in self.outputs:
            table.add_row(*_cells(difference), style=None if difference.ok else "bold red")
        return table if self.ok else Group(table, Text(self.summary, style="red"))

    def _repr_html_(self) -> str:
        rows = [f"<tr>{''.join(f'<th>{column}</th>' for column in _COLUMNS)}</tr>"]
        for difference in self.outputs:
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(difference))
            rows.append(f"<tr>{cells}</tr>" if difference.ok else f"<tr style='color:#c00'>{cells}</tr>")
        table = f"<table><caption>{html.escape(self._title)}</caption>{''.join(rows)}</table>"
        return table if self.ok else f"{table}<p style='color:#c00'>{html.escape(self.summary)}</p>"

    @property
    def _title(self) -> str:
        return f"{'verified' if self.ok else 'FAILED'} on {self._sets}; judged against {self.method}"


_COLUMNS = ("output", "max abs", "max rel", "mean abs", "× own", "verdict")


def _cells(d: Difference) -> tuple[str, ...]:
    own = "" if d.own_units is None else f"{d.own_units:.3g}"
    numbers = (f"{number:.1e}" if number else "0" for number in (d.max_abs, d.max_rel, d.mean_abs))
    return d.name.removeprefix("output."), *numbers, own, d.reason or "ok"


def _short(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    return value if isinstance(value, (bool, int, str, type(None))) else str(value)


def verify(
    before: Callable[..., Any] | Baseline,
    after: Callable[..., Any],
    inputs: Any = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    n_drawn: int = 4,
    seed: int = 0,
) -> Verification:
    """Whether `after` computes what `before` computes, on the given input sets and on `n_drawn` drawn ones.

    `before` and `after` are modules, graph modules or functions; `before` may be a `Baseline`, which has its inputs.
    `inputs` is one input set (a tuple is positional, a dict is keywords, a tensor is one argument) or a list of them.
    Drawn sets follow the ranges of the captured graph's symbols (else sizes seen in the given sets), keep integers
    within the values given and masks valid, and vary the padding; those that `before` refuses are left out.

    What must hold, on each set:
    - `after` runs where `before` does; the outputs have the same nesting, shapes, dtypes and devices.
    - Floats: |got − expected| ≤ atol + rtol·|expected|, or the largest error against a float64 run of `before` is at
      most twice the largest error of `before` itself (plus 4 units of its precision). NaN and Inf in the same places,
      Inf with the same sign. By default rtol is 1e-4 for float32 (1e-9 float64, 2e-3 float16, 1.6e-2 bfloat16), and
      atol the same times the largest element, at most 1 (and at least 64 units of the dtype's precision).
      `rtol=0, atol=0` asks for equal bits.
    - Integers, booleans and other values: equal.
    - Strides: the dimensions lie in the same order in memory, where neither output repeats memory (expanded).
      Whether an output is dense or a part of a larger tensor is left open: it is what merging linears changes.
    - Aliasing: the same outputs share memory with the same inputs, with each other, and with the module's own tensors.
    - Mutation: the same inputs and the same buffers are written, with the same values.

    The caller's inputs, buffers, gradients, training flags and random state are left as they were. UsageError if
    `before` itself fails on a given set.
    """
    if isinstance(before, Baseline):
        if inputs is not None:
            raise UsageError("inputs were given beside a Baseline, which has its own: leave them out")
        return before.verify(after, rtol=rtol, atol=atol)
    if inputs is None:
        raise UsageError("verify needs inputs: give a tuple (positional), a dict (keywords), or a list of those")
    like = after if isinstance(after, GraphModule) and not isinstance(before, GraphModule) else None
    return Baseline(before, inputs, n_drawn=n_drawn, seed=seed, like=like).verify(after, rtol=rtol, atol=atol)


# -------------------------------------------------------------------------------------------------------- baseline


@dataclass(frozen=True)
class _Run:
    """What one call left behind."""

    outputs: tuple[Part, ...]
    inputs: tuple[tuple[str, Tensor], ...]  # as they are after the call
    written: Mapping[str, Tensor]  # buffers and other tensors of the module that the call wrote, by path
    shared: frozenset[tuple[str, str]]  # pairs of names that share memory; one of each pair is an output
    owned: frozenset[str] | None  # outputs that share memory with the module's own tensors; None for a function

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has values to compare: outputs, inputs after the call, written tensors of the module."""
        named = {part.path: part.value.detach() for part in self.outputs if isinstance(part.value, Tensor)}
        named.update({f"input {name}": tensor for name, tensor in self.inputs})
        return named | {f"buffer {name}": tensor for name, tensor in self.written.items()}


@dataclass(frozen=True)
class _Case:
    inputs: InputSet
    run: _Run
    seed: int
    reference: Mapping[str, Tensor] = field(default_factory=dict)  # float64, where there is one

    def untouched(self) -> frozenset[str]:
        """The inputs that the original did not write to."""
        pairs = zip(self.run.inputs, self.inputs.tensors(), strict=True)
        return frozenset(f"input {name}" for (name, now), (_, then) in pairs if _same_bits(then, now))


class Baseline:
    """What the original computes on each input set: run once, held against many transformed modules.

    The original may be edited afterwards. `rtol` and `atol` are defaults for `verify`. `like` is a graph module whose
    placeholders tell which sizes are dynamic, for an original that is not one itself.
    """

    def __init__(
        self,
        before: Callable[..., Any],
        inputs: Any,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        n_drawn: int = 4,
        seed: int = 0,
        like: GraphModule | None = None,
    ) -> None:
        _check_tolerance(rtol, atol)
        if n_drawn < 0:
            raise UsageError(f"n_drawn is {n_drawn}, expected 0 or more drawn input sets")
        self.rtol, self.atol = rtol, atol
        given = [one.clone() for one in normal_form(inputs, before)]
        self._discarded: list[str] = []
        cases = [_given_case(before, one, seed) for one in given]
        cases += self._draw(before, sampler(given, like or before), n_drawn, seed)
        self.cases, self.method = _with_references(before, cases)
        self._coarsest = _coarsest(before)

    def _draw(self, before: Callable[..., Any], drawing: Sampler, count: int, seed: int) -> Iterator[_Case]:
        for number in range(count):
            for resize in (True, False) if drawing.dynamic else (False,):
                one = drawing.draw(number, seed, resize)
                ran = _attempt(before, one, seed + number + 1)
                if isinstance(ran, _Run):
                    yield _Case(one, ran, seed + number + 1)
                    break
                self._discarded.append(f"{one.label}: {_line(ran)}")

    def verify(
        self, after: Callable[..., Any], *, rtol: float | None = None, atol: float | None = None
    ) -> Verification:
        """Hold `after` against the original; see `verify`."""
        _check_tolerance(rtol, atol)
        rtol = self.rtol if rtol is None else rtol
        atol = self.atol if atol is None else atol
        found: dict[str, Difference] = {}
        refused: list[str] = []
        for case in self.cases:
            for difference in self._differences(case, after, rtol, atol, refused):
                known = found.get(difference.name)
                if known is None or _rank(difference) > _rank(known):
                    found[difference.name] = difference
        given = sum(case.inputs.origin != "drawn" for case in self.cases)
        drawn = len(self.cases) - given - len(refused)
        discarded = (*self._discarded, *refused)
        return Verification(tuple(found.values()), self.method, given, drawn, discarded, rtol, atol)

    def _differences(
        self, case: _Case, after: Callable[..., Any], rtol: float | None, atol: float | None, refused: list[str]
    ) -> Iterator[Difference]:
        label = case.inputs.label
        ran = _attempt(after, case.inputs, case.seed)
        if not isinstance(ran, _Run):
            if case.inputs.origin == "drawn" and _is_guard(ran):  # a capture of a model says for which sizes it is
                refused.append(f"{label}: {_line(ran)}")
                return
            yield Difference("the transformed module", label, f"raised {_line(ran)}", severity=math.inf)
            return
        if wrong := _structure(case.run, ran):
            yield Difference("output", label, wrong, severity=math.inf)
            return
        yield from _contracts(case.run, ran, label)
        got, quiet = ran.tensors(), case.untouched()
        for name, expected in case.run.tensors().items():
            if name not in got:
                continue
            tolerance = (rtol, atol, self._coarsest) if name not in quiet else (0.0, 0.0, None)
            difference = _compare(name, label, expected, got[name], case.reference.get(name), tolerance)
            if name not in quiet:
                yield difference
            elif not difference.ok:
                yield replace(difference, reason="is written to, which the original does not do")


def _rank(difference: Difference) -> tuple[bool, float, float]:
    return not difference.ok, difference.severity, difference.max_abs


def _check_tolerance(rtol: float | None, atol: float | None) -> None:
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and (not isinstance(value, int | float) or not 0 <= value < math.inf):
            raise UsageError(f"{name} is {value!r}, expected a number of at least 0, or None for the dtype's default")


def _given_case(before: Callable[..., Any], one: InputSet, seed: int) -> _Case:
    ran = _attempt(before, one, seed)
    if isinstance(ran, _Run):
        return _Case(one, ran, seed)
    raise UsageError(f"the original itself fails on the {one.label}: {_line(ran)}") from ran


def _line(error: Exception) -> str:
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0]}"


def _is_guard(error: Exception) -> bool:
    """Whether a graph of ``torch.export`` refused its inputs: their sizes are none that it was captured for."""
    return isinstance(error, AssertionError) and str(error).startswith("Guard failed")


def _coarsest(before: Callable[..., Any]) -> torch.dtype | None:
    """The least precise float dtype that the original computes with, as far as its tensors show."""
    module = module_of(before)
    dtypes = {t.dtype for t in own_tensors(module).values()} if module is not None else set()
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=None)


# --------------------------------------------------------------------------------------------------------- running


def _attempt(function: Callable[..., Any], one: InputSet, seed: int) -> _Run | Exception:
    """Run on copies. An exception is an answer here: a drawn set may be one that the original refuses."""
    try:
        return _run(function, one, seed)
    except Exception as error:  # noqa: BLE001
        return error


def _run(function: Callable[..., Any], one: InputSet, seed: int, wide: _Widened | None = None) -> _Run:
    """Call `function` on a copy of the inputs, with copies of the module's buffers, without gradients."""
    inputs = one.clone(torch.float64 if wide is not None else None)
    module = module_of(function)
    tensors = [tensor for _, tensor in inputs.tensors()]
    copied = own_copies(module) if wide is None else own_copies(module, torch.float64, wide.parameter)
    with quiet(seed, tensors), copied as copies, torch.no_grad():
        # Values are compared, not versions: batch normalisation writes its statistics without a new version.
        untouched = clone_tensors(copies.values())
        if wide is None:
            result = inputs.call(function)
        else:
            with wide.arithmetic():
                result = inputs.call(function)
        outputs = tuple(flatten(result, "output"))
        written = {path: t for path, t in copies.items() if not _same_bits(untouched[id(t)], t)}
        owned = None if module is None else _sharing_with(outputs, [*copies.values(), *own_tensors(module).values()])
    after = tuple(inputs.tensors())
    return _Run(outputs, after, written, _sharing(outputs, after), owned)


# --------------------------------------------------------------------------------------------------------- aliasing


def _sharing(outputs: Sequence[Part], inputs: Sequence[tuple[str, Tensor]]) -> frozenset[tuple[str, str]]:
    out = [(part.path, part.value) for part in outputs if isinstance(part.value, Tensor)]
    others = [*out, *((f"input {name}", tensor) for name, tensor in inputs)]
    pairs = ((a, b) for i, a in enumerate(out) for b in others[i + 1 :])
    return frozenset((a[0], b[0]) for a, b in pairs if overlap(a[1], b[1]))


def _sharing_with(outputs: Sequence[Part], own: Sequence[Tensor]) -> frozenset[str]:
    tensors = [(part.path, part.value) for part in outputs if isinstance(part.value, Tensor)]
    return frozenset(name for name, tensor in tensors if any(overlap(tensor, other) for other in own))


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether any element of `a` lies where one of `b` lies: exact for strided tensors of one dtype.

    Parts of one storage that do not meet, such as the splits of a merged linear, do not overlap.
    """
    if a is b:
        return True
    if a.layout is not torch.strided or b.layout is not torch.strided or a.device != b.device:
        return False
    if not a.numel() or not b.numel() or a.device.type == "meta":
        return False
    storage = a.untyped_storage()
    if storage.data_ptr() != b.untyped_storage().data_ptr() or not storage.data_ptr():
        return False
    if a.dtype != b.dtype:
        return True
    if _end(a) <= b.storage_offset() or _end(b) <= a.storage_offset():
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    taken = torch.zeros(max(_end(a), _end(b)), dtype=torch.bool, device=a.device)
    taken.as_strided(a.size(), a.stride(), a.storage_offset()).fill_(True)
    return bool(taken.as_strided(b.size(), b.stride(), b.storage_offset()).any())


def _end(tensor: Tensor) -> int:
    """One past the last place that the tensor takes in its storage, in elements."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return int(tensor.storage_offset() + reach + 1)


# --------------------------------------------------------------------------------------------------------- float64


class _NotInFloat64(Exception):
    """The original cannot be run in float64: the message says why."""


class _Float64(TorchDispatchMode):
    """Runs every operator in float64: casts to a lower precision become casts to float64, and so do new tensors.

    It works below autograd and below composite operators, so that a captured graph with dtypes written into it, a
    module and a function are all treated alike. Tensors of lower precision that reach an operator (constants, weights
    that were too many to be copied) are widened there.
    """

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._assert_tensor_metadata.default:
            return None
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and (doubtful := _doubtful_arguments(func)) is not None:
            _refuse(func, doubtful, args, kwargs)
        return func(*(_widen(value) for value in args), **{key: _widen(value) for key, value in kwargs.items()})


@functools.cache
def _doubtful_arguments(func: Any) -> tuple[tuple[int, str], ...] | None:
    """The place and name of each argument that the operator writes to; None where there is nothing to look at."""
    arguments = func._schema.arguments
    written = tuple((i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
    special = torch.Tag.nondeterministic_seeded in func.tags or func is torch.ops.aten.view.dtype
    return written if written or special else None


def _refuse(func: Any, written: Sequence[tuple[int, str]], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """_NotInFloat64 where a call would mean something else in float64."""
    if func is torch.ops.aten.view.dtype:
        raise _NotInFloat64("aten.view.dtype reads the bits of a number")
    if torch.Tag.nondeterministic_seeded in func.tags:
        names = (argument.name for argument in func._schema.arguments)
        if not _draws_nothing(func, dict(zip(names, args, strict=False)) | dict(kwargs)):
            raise _NotInFloat64(f"{func} draws random numbers, which differ in float64")
    for place, name in written:
        value = args[place] if place < len(args) else kwargs.get(name)
        if isinstance(value, Tensor) and widened(value.dtype, torch.float64) is not value.dtype:
            raise _NotInFloat64(f"{func} writes to a {_name(value.dtype)} tensor that the call did not make")


def _draws_nothing(func: Any, named: Mapping[str, Any]) -> bool:
    """Operators that could draw random numbers, called so that they do not: dropout at 0 or outside of training."""
    if "scaled_dot_product" in func._schema.name:
        return bool(named.get("dropout_p", 0.0) == 0.0)
    return named.get("train", named.get("training")) is False


def _widen(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return widened(value, torch.float64)
    if type(value) in (Tensor, nn.Parameter):
        wide = widened(value.dtype, torch.float64)
        return value if wide is value.dtype else value.to(wide)
    if type(value) in (list, tuple):
        return type(value)(_widen(item) for item in value)
    return value


class _Widened:
    """Float64 copies of parameters, made once for all input sets; or none, and then each is cast as it is used."""

    def __init__(self, copy_parameters: bool) -> None:
        self._copy_parameters = copy_parameters
        self._copies: dict[int, tuple[Tensor, nn.Parameter]] = {}  # with the original, so that ids stay unique

    def parameter(self, tensor: Tensor) -> Tensor:
        if not self._copy_parameters or type(tensor) is not nn.Parameter:
            return tensor
        if id(tensor) not in self._copies:
            copied = nn.Parameter(tensor.detach().to(widened(tensor.dtype, torch.float64)), requires_grad=False)
            self._copies[id(tensor)] = tensor, copied
        return self._copies[id(tensor)][1]

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with _Float64():  # type: ignore[no-untyped-call]
                yield
        finally:
            torch.set_default_dtype(default)


def _with_references(before: Callable[..., Any], cases: Sequence[_Case]) -> tuple[list[_Case], str]:
    """The cases with what float64 gives, and in words what float outputs are judged against."""
    if not any(t.is_floating_point() or t.is_complex() for c in cases for t in c.run.tensors().values()):
        return list(cases), "the original's output (no output is a float)"
    lowest = {t.dtype for c in cases for t in c.run.tensors().values()} | {_coarsest(before)}
    if not any(dtype is not None and widened(dtype, torch.float64) is not dtype for dtype in lowest):
        return list(cases), "the original's output (it is float64 already)"
    wide, why = _plan(before, cases)
    if wide is None:
        return list(cases), f"the original's output (not float64: {why})"
    references = [_reference(before, case, wide) for case in cases]
    failed = [reason for reason in references if isinstance(reason, str)]
    answered = [
        c if isinstance(r, str) else _Case(c.inputs, c.run, c.seed, r) for c, r in zip(cases, references, strict=True)
    ]
    if len(failed) == len(cases):
        return answered, f"the original's output (not float64: {failed[0]})"
    partly = f", but {len(failed)} of {len(cases)} input sets against its own output: {failed[0]}" if failed else ""
    return answered, f"float64{why}{partly}"


def _reference(before: Callable[..., Any], case: _Case, wide: _Widened) -> dict[str, Tensor] | str:
    """The float64 values by output name, or why there are none: any failure here only costs the better yardstick."""
    try:
        ran = _run(before, case.inputs, case.seed, wide)
    except Exception as error:  # noqa: BLE001
        return str(error) if isinstance(error, _NotInFloat64) else _line(error)
    if _structure(case.run, ran, values=False):
        return "the original takes another course in float64"
    shapes = {name: tensor.shape for name, tensor in case.run.tensors().items()}
    return {name: tensor for name, tensor in ran.tensors().items() if tensor.shape == shapes.get(name)}


def _plan(before: Callable[..., Any], cases: Sequence[_Case]) -> tuple[_Widened | None, str]:
    """How to run in float64 with the memory there is; and a remark, or the reason why not."""
    module = module_of(before)
    own = {id(t): t for t in own_tensors(module).values()}.values() if module is not None else ()
    sizes = [8 * t.numel() for t in own if widened(t.dtype, torch.float64) is not t.dtype]
    flowing = max(8 * sum(t.numel() for t in case.run.tensors().values()) for case in cases)
    devices = {t.device for t in own} | {t.device for c in cases for t in c.run.tensors().values()}
    available = min((available_memory(device) for device in devices), default=available_memory(torch.device("cpu")))
    room = _MEMORY_SHARE * available - 4 * flowing
    if sum(sizes) <= room:
        return _Widened(copy_parameters=True), ""
    if 2 * max(sizes) <= room:
        return _Widened(copy_parameters=False), " (weights cast as they are used, for lack of memory)"
    return None, f"its weights would take {sum(sizes) / 2**30:.1f} GiB of {available / 2**30:.1f} GiB available"


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, as far as the system tells: free memory, limits of the process
    and of its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    bounds = [_free_memory()]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        bounds.append(int(text) - int(used.read_text()))
    return max(0, min(bounds))


def _free_memory() -> int:
    import os

    known = Path("/proc/meminfo")
    if known.exists():
        for line in known.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


# -------------------------------------------------------------------------------------------------------- comparing


def _structure(before: _Run, after: _Run, values: bool = True) -> str:
    """How the nesting of the outputs differs, or nothing."""
    for a, b in zip(before.outputs, after.outputs, strict=False):
        if (a.path, a.kind) != (b.path, b.kind):
            return f"has {b.path} where the original has {a.path}"
        if a.kind == "container" and a.value[0] is not b.value[0]:
            return f"is a {b.value[0].__name__} at {a.path}, expected a {a.value[0].__name__}"
        if a.kind == "container" and a.value != b.value:
            return f"has {len(b.value[1])} parts at {a.path} ({_names(b)}), expected {len(a.value[1])} ({_names(a)})"
        if a.kind == "leaf" and (wrong := _leaf(a.value, b.value, values)):
            return f"{wrong} at {a.path}"
    if len(before.outputs) != len(after.outputs):
        return f"has {len(after.outputs)} parts, expected {len(before.outputs)}"
    return ""


def _names(part: Part) -> str:
    names = [name.removeprefix(part.path) for name in part.value[1]]
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _leaf(expected: Any, got: Any, values: bool) -> str:
    """How a leaf that is no tensor differs, or nothing; without `values`, only by its type."""
    if isinstance(expected, Tensor) and isinstance(got, Tensor):
        return ""
    if type(expected) is not type(got):
        return f"is a {type(got).__name__}, expected a {type(expected).__name__}"
    if not values or expected == got:
        return ""
    if isinstance(expected, float) and (math.isnan(expected) or math.isnan(got)):
        return "" if math.isnan(expected) and math.isnan(got) else f"is {got!r}, expected {expected!r}"
    if isinstance(expected, float) and math.isclose(got, expected, rel_tol=DEFAULT_TOLERANCES[torch.float32]):
        return ""
    return f"is {got!r}, expected {expected!r}"


def _contracts(before: _Run, after: _Run, label: str) -> Iterator[Difference]:
    """Sharing of memory, and writing to inputs and buffers, as far as they are not a matter of values."""
    for a, b in sorted(before.shared ^ after.shared):
        lost = (a, b) in before.shared
        reason = (
            f"{'no longer shares' if lost else 'shares'} memory with {b}, {'as it did' if lost else 'as it did not'}"
        )
        yield Difference(f"{a} / {b}", label, f"{reason} in the original", severity=math.inf)
    if before.owned is not None and after.owned is not None:
        for name in sorted(before.owned ^ after.owned):
            has = "shares" if name in after.owned else "no longer shares"
            yield Difference(
                f"{name} / module", label, f"{has} memory with the module's own tensors", severity=math.inf
            )
    for name in sorted(set(before.written) ^ set(after.written)):
        has = "does not write" if name in before.written else "writes"
        reason = f"{has} this buffer, and the original {'does' if name in before.written else 'does not'}"
        yield Difference(f"buffer {name}", label, reason, severity=math.inf)


Tolerance = tuple[float | None, float | None, torch.dtype | None]  # rtol, atol, the least precise dtype of the original


def _compare(
    name: str, label: str, expected: Tensor, got: Tensor, reference: Tensor | None, tolerance: Tolerance
) -> Difference:
    """Compare one tensor with the original's."""
    for what, a, b in (
        ("dtype", _name(expected.dtype), _name(got.dtype)),
        ("shape", list(expected.shape), list(got.shape)),
        ("device", str(expected.device), str(got.device)),
        ("layout", str(expected.layout), str(got.layout)),
    ):
        if a != b:
            return Difference(name, label, f"has {what} {b}, expected {a}", severity=math.inf)
    if wrong := _stride_order(expected, got):
        return Difference(name, label, wrong, dtype=_name(expected.dtype), severity=math.inf)
    if expected.layout is not torch.strided or expected.is_quantized:
        expected, got, reference = _dense(expected), _dense(got), None
    if not expected.numel():
        return Difference(name, label, dtype=_name(expected.dtype))
    if expected.is_complex():
        expected, got = torch.view_as_real(expected), torch.view_as_real(got)
        reference = None if reference is None else torch.view_as_real(reference)
    if expected.is_floating_point() and expected.element_size() == 1:
        expected, got = expected.float(), got.float()  # exact, and few operators know floats of 8 bits
    if not expected.is_floating_point():
        return _compare_exactly(name, label, expected, got)
    return _compare_floats(name, label, expected, got, reference, tolerance)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dense(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor.to_dense()


def _stride_order(expected: Tensor, got: Tensor) -> str:
    if expected.layout is not torch.strided or expected.numel() < 2:
        return ""
    dims = [d for d in range(expected.dim()) if expected.shape[d] > 1]
    strides = [[tensor.stride(d) for d in dims] for tensor in (expected, got)]
    if 0 in strides[0] or 0 in strides[1]:
        return ""
    orders = [sorted(range(len(dims)), key=lambda i: -stride[i]) for stride in strides]
    if orders[0] == orders[1]:
        return ""
    return f"has strides {list(got.stride())}, expected the order of {list(expected.stride())}"


def _compare_exactly(name: str, label: str, expected: Tensor, got: Tensor) -> Difference:
    dtype, wrong = _name(expected.dtype), expected != got
    if not bool(wrong.any()):
        return Difference(name, label, dtype=dtype)
    distance = (got.double() - expected.double()).abs()
    index = _unravel(int(distance.argmax()) if bool(distance.any()) else int(wrong.flatten().int().argmax()), expected)
    relative = _relative(distance, expected.double())
    return Difference(
        name, label, f"differs in {int(wrong.sum())} of {expected.numel()} elements", dtype, index,
        expected[index].item(), got[index].item(), float(distance.max()), relative, float(distance.mean()),
        severity=math.inf,
    )  # fmt: skip


def _unravel(place: int, tensor: Tensor) -> tuple[int, ...]:
    index = torch.unravel_index(torch.tensor(place), tensor.shape)
    return tuple(int(i) for i in index)


def _relative(distance: Tensor, expected: Tensor) -> float:
    known = expected != 0
    return float((distance[known] / expected[known].abs()).max()) if bool(known.any()) else 0.0


def _compare_floats(
    name: str, label: str, expected: Tensor, got: Tensor, reference: Tensor | None, tolerance: Tolerance
) -> Difference:
    wrong = _not_finite_alike(expected, got)
    if bool(wrong.any()):
        index = _unravel(int(wrong.flatten().int().argmax()), expected)
        reason = (
            f"is not finite where the original is, or the reverse, in {int(wrong.sum())} of {wrong.numel()} elements"
        )
        values = float(expected[index]), float(got[index])
        return Difference(
            name, label, reason, _name(expected.dtype), index, *values, math.inf, math.inf, math.inf, severity=math.inf
        )
    e, g = expected.double(), got.double()
    finite = e.isfinite()
    e, g = torch.where(finite, e, 0.0), torch.where(finite, g, 0.0)
    distance = (g - e).abs()
    rtol, atol = _tolerances(e, expected.dtype, tolerance)
    exact = tolerance[0] == 0 and tolerance[1] == 0
    excess = distance / (atol + rtol * e.abs()).clamp_min(5e-324)
    place = int((distance if exact else excess).argmax())
    severity, units = float(excess.flatten()[place]), None
    if exact:
        bits = _bits_differ(expected, got)
        place = place if bool(distance.any()) else int(bits.flatten().int().argmax())  # 0.0 and -0.0
        severity = math.inf if bool(bits.any()) else 0.0
    elif reference is not None:
        units, against = _against_reference(e, g, reference, finite, expected.dtype, tolerance[2])
        severity = min(severity, against)
    index = _unravel(place, expected)
    reason = "" if severity <= 1 else "differs in its bits" if exact else "differs"
    return Difference(
        name, label, reason, _name(expected.dtype), index, float(expected[index]), float(got[index]),
        float(distance.max()), _relative(distance, e), float(distance.mean()), units, severity,
    )  # fmt: skip


def _not_finite_alike(expected: Tensor, got: Tensor) -> Tensor:
    """Where one is NaN or infinite and the other is not so in the same way."""
    special = ~(expected.isfinite() & got.isfinite())
    same = (expected == got) | (expected.isnan() & got.isnan())
    return special & ~same


def _bits_differ(expected: Tensor, got: Tensor) -> Tensor:
    """Where the bits differ; every NaN is equal to every other, and -0.0 is not 0.0."""
    sign = torch.signbit(expected) != torch.signbit(got)
    return ((expected != got) | sign) & ~(expected.isnan() & got.isnan())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not is_plain(a) or not a.is_floating_point() or a.element_size() == 1:
        return torch.equal(a, b)
    return not bool(_bits_differ(a, b).any())


def _tolerances(expected: Tensor, dtype: torch.dtype, tolerance: Tolerance) -> tuple[float, float]:
    rtol, atol, coarsest = tolerance
    default = DEFAULT_TOLERANCES.get(dtype, _COARSE)
    if coarsest is not None:
        default = max(default, DEFAULT_TOLERANCES.get(coarsest, _COARSE))
    scale = min(1.0, float(expected.abs().max()))
    least = min(default, _LEAST_ULPS * torch.finfo(dtype).eps)
    return default if rtol is None else rtol, max(default * scale, least) if atol is None else atol


def _against_reference(
    expected: Tensor, got: Tensor, reference: Tensor, finite: Tensor, dtype: torch.dtype, coarsest: torch.dtype | None
) -> tuple[float | None, float]:
    """The error against float64 in units of the original's own, and over what is allowed.

    A reference far from the original is no yardstick: a decision fell otherwise in float64 (a router, a threshold).
    Then nothing is allowed here, and the tolerances decide alone.
    """
    known = finite & reference.isfinite()
    ref = torch.where(known, reference.double(), 0.0)
    own = float(torch.where(known, (expected - ref).abs(), 0.0).max())
    error = float(torch.where(known, (got - ref).abs(), 0.0).max())
    scale = float(ref.abs().max())
    eps = max(torch.finfo(kind).eps for kind in (dtype, coarsest) if kind is not None)
    units = error / own if own > 0 else None
    if own > min(0.5, 1e5 * eps) * scale or not bool(known[finite].all()):
        return units, math.inf
    allowed = _TIMES_OWN_ERROR * own + _FLOOR_ULPS * torch.finfo(dtype).eps * scale
    return units, error / allowed if allowed > 0 else (0.0 if error == 0 else math.inf)
