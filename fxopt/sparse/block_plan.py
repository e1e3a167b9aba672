"""What becomes of each layer: its specification, what is kept and lost, and whether it pays."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.benchmark import benchmark_many
from fxopt.errors import UsageError
from fxopt.kernels.semi_structured import accelerated
from fxopt.sparse.block_linear import BlockSparseLinear, checked_block, grid
from fxopt.sparse.block_report import BLOCKS, DENSE, PAIRS, LayerReport, Timing
from fxopt.sparse.block_select import Select, check_select, count, dense_mask, kept_blocks
from fxopt.sparse.dense_layers import HOOKS
from fxopt.sparse.semi_structured import SELECTS, SemiStructuredLinear, has_pairs, kept_pairs
from fxopt.sparse.sparsified_linear import SparsifiedLinear

Pattern = str | Callable[[str, Tensor], bool]
"""A regular expression that the whole path of a layer matches, or a predicate of the path and the weight (out, in)."""

CALIBRATION_ROWS = 4096
"""How many rows of a layer's inputs are looked at."""

GUARDS = ("auto", "off")


@dataclass(frozen=True)
class Spec:
    """
    How a layer is made block-sparse: see `fxopt.sparse.kept_blocks` and `BlockSparseLinear.from_dense`.

    `block` may be "2:4", two of every four weights: see `fxopt.sparse.kept_pairs`; `density` is left out then.
    """

    density: float | None = None
    block: tuple[int, int] | str = (32, 32)
    select: Select = "magnitude"
    rescale: bool = False

    def __post_init__(self) -> None:
        if hasattr(self.density, "shape"):
            kind = type(self.density).__name__
            raise UsageError(f"a {kind} was given as density, expected a number in (0, 1]; give a mask as select")
        named = isinstance(self.select, str)  # nothing else is compared with a string: of an array, that is an array
        object.__setattr__(self, "select", self.select.strip() if named else dense_mask(self.select))
        check_select(self.select)
        if isinstance(self.block, str) and self.block == PAIRS:
            if self.density not in (None, 0.5) or not named or self.select not in SELECTS:
                raise UsageError(f'block="2:4" keeps 0.5 by {", ".join(SELECTS)}; leave density out, and select so')
            return
        object.__setattr__(self, "block", checked_block(self.block))  # type: ignore[arg-type]
        if self.density is not None:
            count(self.density, 1)
        elif named and self.select != "existing":
            raise UsageError(f"select={self.select!r} needs a density, a number in (0, 1]")

    def offers_pairs(self, weight: Tensor) -> bool:
        """
        Whether 2:4 is no less than what was asked for: no weight more is dropped than by blocks, where they are chosen
        by what they are worth, and none that is not zero with "existing".
        """
        if not isinstance(self.select, str):
            return False
        if self.select == "existing":
            return has_pairs(weight)
        return self.select in SELECTS and self.density is not None and self.density <= 0.5

    @classmethod
    def of(cls, value: Any) -> Spec:
        """What a user writes: a density, a mapping of options, a tuple of them in order, or a Spec."""
        if isinstance(value, Spec):
            return value
        if isinstance(value, Mapping):
            try:
                return cls(**value)
            except TypeError as error:
                raise UsageError(f"{dict(value)} is no specification; its options are {_OPTIONS}") from error
        if isinstance(value, tuple | list):
            if len(value) > 4:
                raise UsageError(f"{value!r} is no specification; give ({_OPTIONS})")
            return cls(*value)
        return cls(value)


_OPTIONS = "density, block, select, rescale"


def specified(patterns: Any) -> tuple[tuple[Any, Spec], ...]:
    """Patterns and their specifications; `UsageError` for what is none."""
    if isinstance(patterns, Mapping):
        pairs = list(patterns.items())
    elif isinstance(patterns, tuple | list):
        pairs = [(p[0], p[1] if len(p) == 2 else tuple(p[1:])) for p in patterns]
    else:
        raise UsageError(f"{patterns!r} was given, expected {{pattern: density or Spec(…)}}")
    for pattern, _ in pairs:
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"the pattern {pattern!r} is no regular expression: {error}") from error
        elif not callable(pattern):
            raise UsageError(f"{pattern!r} was given as a pattern, expected a regular expression or a predicate")
    return tuple((pattern, Spec.of(spec)) for pattern, spec in pairs)


def matching(patterns: Sequence[tuple[Any, Spec]], paths: Iterable[str], weight: Tensor) -> int | None:
    """The index of the first pattern that one of the layer's `paths` matches in full."""
    names = list(paths)
    for i, (pattern, _) in enumerate(patterns):
        if isinstance(pattern, str):
            if any(re.fullmatch(pattern, name) for name in names):
                return i
        elif any(pattern(name, weight) for name in names):
            return i
    return None


def check_all_matched(patterns: Sequence[tuple[Any, Spec]], used: Iterable[int | None], paths: Sequence[str]) -> None:
    """`UsageError` for a pattern that matched no layer, with some of the paths that there are."""
    found = set(used)
    for i, (pattern, _) in enumerate(patterns):
        if i not in found:
            shown = ", ".join(list(paths)[:3]) + (", …" if len(paths) > 3 else "") if paths else "none"
            hidden = matching_elsewhere(patterns[:i], pattern, paths)
            why = (
                "an earlier pattern takes them" if hidden else f"a pattern matches a whole path; linear layers: {shown}"
            )
            raise UsageError(f"the pattern {pattern!r} matches no linear layer; {why}")


def matching_elsewhere(earlier: Sequence[tuple[Any, Spec]], pattern: Any, paths: Sequence[str]) -> bool:
    """Whether `pattern` matches paths, all of which earlier patterns match too."""
    return bool(earlier) and isinstance(pattern, str) and any(re.fullmatch(pattern, p) for p in paths)


@dataclass(frozen=True)
class Plan:
    """One layer, as it would be: made of copies, nothing is changed yet."""

    path: str
    layer: SparsifiedLinear
    report: LayerReport
    factor: Tensor | None = None  # by which its outputs were rescaled

    @property
    def kept(self) -> bool:
        """Whether the layer becomes block-sparse or 2:4."""
        return self.report.decision != DENSE


@dataclass
class Planner:
    """
    Plans layers; times alike layers once.

    With `guard` "auto" a layer becomes what is faster than dense at each of the numbers of `tokens`, and of that the
    fastest in the geometric mean over them: block-sparse as asked for, or, where that is no less than was asked for
    (`Spec.offers_pairs`) and a GPU has it, 2:4.
    """

    guard: str = "auto"
    tokens: tuple[int, ...] = (128,)
    _timed: dict[Any, dict[str, dict[int, Timing]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.guard not in GUARDS:
            raise UsageError(f"guard={self.guard!r} was given, expected 'auto' (keep what is faster) or 'off' (force)")
        numbers = isinstance(self.tokens, tuple | list) and all(isinstance(t, int) and t > 0 for t in self.tokens)
        if not numbers or not self.tokens:
            raise UsageError(f"tokens={self.tokens!r} was given, expected numbers of rows, such as (1, 128)")

    def plan(self, path: str, weight: Tensor, bias: nn.Parameter | None, spec: Spec, inputs: Tensor | None) -> Plan:
        """What becomes of the layer `weight` (out, in), `bias`, by `spec`; `inputs` (rows, in) are its calibration."""
        try:
            contenders = self._contenders(weight, bias, spec, inputs)
            factors = {n: c.rescale(weight, inputs) for n, c in contenders.items()} if spec.rescale else {}
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
        asked = next(iter(contenders))
        timings = self._timings(weight, bias, contenders) if self.guard == "auto" else {}
        decision, reason = _decided(timings) if timings else (asked, "")
        name = decision if decision in contenders else asked
        report = _report(path, weight, contenders[name], inputs, timings, decision, reason)
        return Plan(path, contenders[name], report, factors.get(name))

    def _contenders(
        self, weight: Tensor, bias: nn.Parameter | None, spec: Spec, inputs: Tensor | None
    ) -> dict[str, SparsifiedLinear]:
        """What the layer may become, beside dense; what was asked for first."""
        found: dict[str, SparsifiedLinear] = {}
        if isinstance(spec.block, tuple):
            mask = kept_blocks(weight, spec.block, spec.density, spec.select, inputs)
            found[BLOCKS] = BlockSparseLinear.of(weight, bias, mask, spec.block)
        if spec.block == PAIRS or (self.guard == "auto" and accelerated(weight) and spec.offers_pairs(weight)):
            found[PAIRS] = SemiStructuredLinear.of(weight, bias, kept_pairs(weight, spec.select, inputs))
        return found

    def _timings(
        self, weight: Tensor, bias: Tensor | None, contenders: Mapping[str, SparsifiedLinear]
    ) -> dict[str, dict[int, Timing]]:
        shape, parts = tuple(weight.shape), tuple((n, tuple(c.tensors[0].shape)) for n, c in contenders.items())
        key = (shape, parts, weight.dtype, weight.device, bias is None, torch.get_num_threads(), tuple(self.tokens))
        if key not in self._timed:
            dense = nn.Linear(shape[1], shape[0], bias=bias is not None, device="meta")
            dense.weight = nn.Parameter(weight.detach(), requires_grad=False)
            dense.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]
            self._timed[key] = timed({DENSE: dense, **contenders}, weight, self.tokens)
        return self._timed[key]


def timed(contenders: Mapping[str, nn.Module], weight: Tensor, tokens: Sequence[int]) -> dict[str, dict[int, Timing]]:
    """Time layers in the place of one with `weight` (out, in), in interleaved rounds without gradients."""
    found: dict[str, dict[int, Timing]] = {name: {} for name in contenders}
    for rows in tokens:
        x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        options: dict[str, Any] = {"rounds": 25, "warmup": 2, "max_time": 0.5, "precision": 0.02, "memory": False}
        with torch.no_grad():
            compared = benchmark_many(contenders, (x,), baseline=DENSE, **options)
        found[DENSE][rows] = Timing(compared.baseline.median, 1.0)
        for one in compared:
            found[one.b.name][rows] = Timing(one.b.median, 1 / one.ratio)
    return found


def _decided(timings: Mapping[str, Mapping[int, Timing]]) -> tuple[str, str]:
    """What a layer becomes by its timings, and why it stays dense."""
    speeds = {name: {t: x.speed for t, x in found.items()} for name, found in timings.items() if name != DENSE}
    faster = {name: statistics.geometric_mean(s.values()) for name, s in speeds.items() if min(s.values()) > 1}
    if faster:
        return max(faster, key=faster.__getitem__), ""
    worst = {name: min(s, key=s.__getitem__) for name, s in speeds.items()}
    lost = " or ".join(f"{name} ({speeds[name][t]:.2f} × at {t} tokens)" for name, t in worst.items())
    return DENSE, f"no faster {lost}"


def _report(
    path: str,
    weight: Tensor,
    layer: SparsifiedLinear,
    inputs: Tensor | None,
    timings: Mapping[str, Mapping[int, Timing]],
    decision: str,
    reason: str,
) -> LayerReport:
    squares = weight.detach().double().square()
    total = float(squares.sum())
    shape = (layer.out_features, layer.in_features)
    block: tuple[int, int] | str = layer.block_shape if isinstance(layer, BlockSparseLinear) else PAIRS
    values = layer.tensors[0]
    return LayerReport(
        path=path,
        shape=shape,
        block=block,
        kept=values.shape[0] if isinstance(layer, BlockSparseLinear) else values.numel(),
        blocks=pieces(shape, block),
        energy=float(squares[layer.kept].sum()) / total if total else 1.0,
        error=None if inputs is None else output_error(weight, layer, inputs),
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=sum(t.numel() * t.element_size() for t in layer.tensors),
        timings=timings,
        decision=decision,
        reason=reason,
    )


def left(path: str, weight: Tensor, spec: Spec, reason: str) -> LayerReport:
    """The report of a layer with `weight` (out, in) that stays dense for a `reason`, whatever it would become."""
    size, shape = weight.numel() * weight.element_size(), (weight.shape[0], weight.shape[1])
    blocks = pieces(shape, spec.block)
    return LayerReport(path, shape, spec.block, blocks, blocks, 1.0, None, size, size, {}, DENSE, reason)


def pieces(shape: tuple[int, int], block: tuple[int, int] | str) -> int:
    """In how many pieces a weight (out, in) is cut: blocks, or for 2:4 its weights."""
    rows, columns = grid(*shape, block) if isinstance(block, tuple) else shape
    return rows * columns


@torch.no_grad()
def output_error(weight: Tensor, layer: SparsifiedLinear, inputs: Tensor) -> float:
    """|x wᵀ - x sᵀ| / |x wᵀ| over `inputs` (rows, in), without the bias, in float64."""
    x, w = inputs.to(weight.device).double(), weight.detach().double()
    wanted = x @ w.t()
    lost = wanted - x @ layer.dense().detach().double().t()
    norm = float(wanted.norm())
    return float(lost.norm()) / norm if norm else 0.0


def hook_of(module: nn.Module | None, weight: Tensor) -> str:
    """What was attached to a layer or its weight and would be lost, in words; "" where nothing is."""
    held = vars(module) if module is not None else {}
    for name in HOOKS:
        if held.get(name):
            return name.strip("_").replace("_", " ")
    if "forward" in held:
        return "a forward of its own"
    return "hooks on its weight" if weight._backward_hooks or weight._post_accumulate_grad_hooks else ""


def rows_of(x: Tensor, limit: int = CALIBRATION_ROWS) -> Tensor:
    """At most `limit` rows (…, in) of `x`, evenly spaced, as a copy (rows, in)."""
    flat = x.detach().reshape(-1, x.shape[-1])
    return flat[:: max(1, -(-flat.shape[0] // limit))].clone()
