"""What becomes of each layer: its specification, what is kept and lost, and whether it pays."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.benchmark import benchmark
from fxopt.errors import UsageError
from fxopt.sparse.block_linear import BlockSparseLinear, checked_block
from fxopt.sparse.block_report import LayerReport
from fxopt.sparse.block_select import Select, block_energy, check_select, count, kept_blocks

Pattern = str | Callable[[str, Tensor], bool]
"""A regular expression that the whole path of a layer matches, or a predicate of the path and the weight (out, in)."""

CALIBRATION_ROWS = 4096
"""How many rows of a layer's inputs are looked at."""

GUARDS = ("auto", "off")


@dataclass(frozen=True)
class Spec:
    """How a layer is made block-sparse: see `fxopt.sparse.kept_blocks` and `BlockSparseLinear.from_dense`."""

    density: float | None = None
    block: tuple[int, int] = (32, 32)
    select: Select = "magnitude"
    rescale: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", checked_block(self.block))
        check_select(self.select)
        if self.density is not None:
            count(self.density, 1)
        elif self.select in ("magnitude", "activation", "balanced") or str(self.select).startswith("random"):
            raise UsageError(f"select={self.select!r} needs a density, a number in (0, 1]")

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
    layer: BlockSparseLinear
    report: LayerReport

    @property
    def kept(self) -> bool:
        """Whether the layer becomes block-sparse."""
        return self.report.decision == "block-sparse"


@dataclass
class Planner:
    """Plans layers; times alike layers once."""

    guard: str = "auto"
    tokens: tuple[int, ...] = (128,)
    _timed: dict[Any, dict[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.guard not in GUARDS:
            raise UsageError(f"guard={self.guard!r} was given, expected 'auto' (keep what is faster) or 'off' (force)")
        numbers = isinstance(self.tokens, tuple | list) and all(isinstance(t, int) and t > 0 for t in self.tokens)
        if not numbers or not self.tokens:
            raise UsageError(f"tokens={self.tokens!r} was given, expected numbers of rows, such as (1, 128)")

    def plan(self, path: str, weight: Tensor, bias: nn.Parameter | None, spec: Spec, inputs: Tensor | None) -> Plan:
        """What becomes of the layer `weight` (out, in), `bias`, by `spec`; `inputs` (rows, in) are its calibration."""
        try:
            mask = kept_blocks(weight, spec.block, spec.density, spec.select, inputs)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
        layer = BlockSparseLinear.of(weight, bias, mask, spec.block)
        if spec.rescale:
            layer.rescale(weight, inputs)
        speed = self._speed(weight, bias, layer, spec) if self.guard == "auto" else {}
        slower = {t: r for t, r in speed.items() if r <= 1}
        reason = ""
        if slower:
            worst = min(slower, key=slower.__getitem__)
            reason = f"no faster block-sparse ({slower[worst]:.2f} × at {worst} tokens)"
        return Plan(path, layer, _report(path, weight, layer, mask, inputs, speed, reason))

    def _speed(self, weight: Tensor, bias: Tensor | None, layer: BlockSparseLinear, spec: Spec) -> dict[int, float]:
        kept, shape = layer.data.shape, tuple(weight.shape)
        key = (shape, kept, weight.dtype, weight.device, bias is None, torch.get_num_threads(), tuple(self.tokens))
        if key not in self._timed:
            dense = nn.Linear(shape[1], shape[0], bias=bias is not None, device="meta")
            dense.weight = nn.Parameter(weight.detach(), requires_grad=False)
            dense.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]
            self._timed[key] = {t: _ratio(dense, layer, t) for t in self.tokens}
        return self._timed[key]


def _ratio(dense: nn.Module, sparse: BlockSparseLinear, tokens: int) -> float:
    """How many times as fast the sparse layer is, in interleaved rounds without gradients."""
    x = torch.randn(tokens, sparse.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(sparse.data.device, sparse.data.dtype)
    with torch.no_grad():
        found = benchmark(dense, sparse, (x,), rounds=25, warmup=2, max_time=0.5, precision=0.02, memory=False)
    return 1 / found.ratio


def _report(
    path: str,
    weight: Tensor,
    layer: BlockSparseLinear,
    mask: Tensor,
    inputs: Tensor | None,
    speed: dict[int, float],
    reason: str,
) -> LayerReport:
    energy = block_energy(weight, layer.block_shape)
    total = float(energy.sum())
    return LayerReport(
        path=path,
        shape=(layer.out_features, layer.in_features),
        block=layer.block_shape,
        kept=int(mask.sum()),
        blocks=mask.numel(),
        energy=float(energy[mask].sum()) / total if total else 1.0,
        error=None if inputs is None else output_error(weight, layer, inputs),
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=sum(t.numel() * t.element_size() for t in (layer.data, layer.crow, layer.col, layer.index)),
        speed=speed,
        decision="dense" if reason else "block-sparse",
        reason=reason,
    )


@torch.no_grad()
def output_error(weight: Tensor, layer: BlockSparseLinear, inputs: Tensor) -> float:
    """|x wᵀ - x sᵀ| / |x wᵀ| over `inputs` (rows, in), without the bias, in float64."""
    x, w = inputs.to(weight.device).double(), weight.detach().double()
    wanted = x @ w.t()
    lost = wanted - x @ layer.dense().detach().double().t()
    norm = float(wanted.norm())
    return float(lost.norm()) / norm if norm else 0.0


def rows_of(x: Tensor, limit: int = CALIBRATION_ROWS) -> Tensor:
    """At most `limit` rows (…, in) of `x`, evenly spaced, as a copy (rows, in)."""
    flat = x.detach().reshape(-1, x.shape[-1])
    return flat[:: max(1, -(-flat.shape[0] // limit))].clone()
