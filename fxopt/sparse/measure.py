"""Whether a layer is faster with a sparse weight: by measuring it here, now, forward and backward."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from rich.table import Table
from torch import Tensor, nn

from fxopt.kernels.unstructured_conv import SparseConv2d
from fxopt.kernels.unstructured_linear import SparseLinear
from fxopt.sparse.pruning import dropped

_WARMUP, _ROUNDS = 2, 7
_PATIENCE = 1.0
"""Seconds after which a layer's rounds end, three of them made."""


@dataclass(frozen=True)
class Timing:
    """How often faster the sparse layer is than the dense one: medians over interleaved rounds."""

    forward: float
    backward: float | None  # None where the layer was measured for inference
    total: float


@contextmanager
def random_aside() -> Iterator[None]:
    """Leave torch's generators as they are, whatever is drawn inside: measuring must not change a later dropout."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        yield


def sparse_copy(layer: nn.Linear | nn.Conv2d) -> SparseLinear | SparseConv2d:
    """`layer` with a sparse weight."""
    with random_aside():
        return SparseLinear.from_dense(layer) if isinstance(layer, nn.Linear) else SparseConv2d.from_dense(layer)


def compare(
    dense: nn.Module, sparse: nn.Module, shape: Sequence[int], backward: bool = True, input_gradient: bool = True
) -> Timing:
    """
    Time both layers on random input of `shape` with torch's present threads, in turn, and compare.

    `backward`: the gradients of all parameters that are trained count too, and with `input_gradient` that of the input.
    """
    dense, sparse = (_alone(layer) for layer in (dense, sparse))
    # without the engine's watch over what a transformation calls, which would be timed too
    with random_aside(), torch._C.DisableTorchFunction():
        x = torch.randn(tuple(shape), dtype=next(dense.parameters()).dtype)
        runs = [_prepared(layer, x, backward, input_gradient) for layer in (dense, sparse)]
        seconds = _rounds(runs)
    ratios = [(d[0] / s[0], d[1] / s[1] if s[1] else 0.0, sum(d) / sum(s)) for d, s in seconds]
    forward, back, total = (statistics.median(r) for r in zip(*ratios, strict=True))
    return Timing(forward, back if backward else None, total)


def _alone(layer: nn.Module) -> nn.Module:
    """A copy on the same memory, with gradients of its own."""
    own = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in layer.parameters()}
    return copy.deepcopy(layer, dict(own))


Run = Callable[[], tuple[float, float]]


def _prepared(layer: nn.Module, x: Tensor, backward: bool, input_gradient: bool) -> Run:
    x = x.clone().requires_grad_(backward and input_gradient)
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad] if backward else []
    gradient: list[Tensor] = []

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        with torch.set_grad_enabled(bool(wanted)):
            y = layer(x)
        middle = time.perf_counter()
        if not wanted:
            return middle - start, 0.0
        if not gradient:
            gradient.append(torch.randn_like(y))
        before = time.perf_counter()
        torch.autograd.grad(y, wanted, gradient[0])
        return middle - start, time.perf_counter() - before

    return run


def _rounds(runs: Sequence[Run]) -> list[tuple[tuple[float, float], ...]]:
    for _ in range(_WARMUP):
        for run in runs:
            run()
    found: list[tuple[tuple[float, float], ...]] = []
    start = time.perf_counter()
    while len(found) < 3 or (len(found) < _ROUNDS and time.perf_counter() - start < _PATIENCE):
        found.append(tuple(run() for run in runs))
    return found


@dataclass(frozen=True)
class Layer:
    """What was found out about one layer, and what was decided."""

    name: str
    kind: str  # the class of the layer
    shape: tuple[int, ...]  # of the weight
    sparsity: float | None  # None where the weight could not be looked at
    timing: Timing | None  # None where it was not measured
    swapped: bool
    reason: str

    def __str__(self) -> str:
        sparsity = "" if self.sparsity is None else f", {self.sparsity:.1%} zeros"
        timing = ""
        if self.timing is not None:
            back = "" if self.timing.backward is None else f", backward {self.timing.backward:.2f} ×"
            timing = f", forward {self.timing.forward:.2f} ×{back}"
        verdict = "sparse" if self.swapped else "dense"
        return f"{self.name}: {self.kind} {'×'.join(map(str, self.shape))}{sparsity}{timing} → {verdict}: {self.reason}"


@dataclass(frozen=True)
class SwapReport:
    """Every linear layer and 2-d convolution of a model, which of them became sparse, and why; prints as a table."""

    layers: tuple[Layer, ...] = field(default=())

    @property
    def swapped(self) -> tuple[Layer, ...]:
        """The layers that became sparse."""
        return tuple(layer for layer in self.layers if layer.swapped)

    @property
    def changed(self) -> bool:
        """Whether any layer became sparse."""
        return bool(self.swapped)

    def to_json(self) -> dict[str, object]:
        """All figures as plain values."""
        return {"layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        lines = [str(layer) for layer in self.layers]
        return "\n".join([*lines, f"{len(self.swapped)} of {len(self.layers)} layers are sparse"])

    def _repr_html_(self) -> str:
        from html import escape

        rows = [
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(layer)) + "</tr>" for layer in self.layers
        ]
        heads = "".join(f"<th>{h}</th>" for h in ("layer", "weight", "zeros", "forward", "backward", "is now", "why"))
        return f"<table><tr>{heads}</tr>{''.join(rows)}</table>"

    def __rich__(self) -> Table:

        table = Table("layer", "weight", "zeros", "forward", "backward", "is now", "why")
        for layer in self.layers:
            table.add_row(*_cells(layer))
        return table


def _cells(layer: Layer) -> list[str]:
    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f} ×"

    t = layer.timing
    zeros = "" if layer.sparsity is None else f"{layer.sparsity:.1%}"
    times = [ratio(t.forward if t else None), ratio(t.backward if t else None)]
    return [
        layer.name,
        "×".join(map(str, layer.shape)),
        zeros,
        *times,
        "sparse" if layer.swapped else "dense",
        layer.reason,
    ]


def judge(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    shape: Sequence[int] | None,
    min_sparsity: float,
    backward: bool = True,
    input_gradient: bool = True,
    measured: bool = True,
    unknown: str = "it did not run with these inputs, so it was not measured",
) -> tuple[Layer, SparseLinear | SparseConv2d | None]:
    """
    Whether `layer` is to be sparse: `min_sparsity` of it zeros, and faster so on inputs of `shape`; with the sparse
    one.

    `shape` None: nothing can be measured, and it stays dense for the reason `unknown`.
    """
    kind, weight_shape = "Linear" if isinstance(layer, nn.Linear) else "Conv2d", tuple(layer.weight.shape)

    def stays(reason: str, sparsity: float | None = None, timing: Timing | None = None) -> tuple[Layer, None]:
        return Layer(name, kind, weight_shape, sparsity, timing, False, reason), None

    if layer.weight.dtype not in (torch.float32, torch.float64):
        return stays(f"the weight is {layer.weight.dtype}; float32 and float64 are supported")
    if layer.weight.device.type == "meta":
        return stays("the weight is on the meta device")
    if not bool(torch.isfinite(layer.weight).all()):
        return stays("the weight has elements that are NaN or infinite")
    size = layer.weight.numel()
    zeros = size - int(layer.weight.count_nonzero())
    sparsity = zeros / max(1, size)
    if zeros < dropped(size, min_sparsity):
        return stays(f"less than {100 * min_sparsity:.4g}% zeros", sparsity)
    if measured and shape is None:
        return stays(unknown, sparsity)
    sparse = sparse_copy(layer)
    if not measured:
        return Layer(name, kind, weight_shape, sparsity, None, True, "not measured, as asked"), sparse
    assert shape is not None
    timing = compare(layer, sparse, shape, backward, input_gradient)
    what = "a step" if backward else "forward"
    if timing.total <= 1:
        return stays(f"{what} is slower, {timing.total:.2f} ×", sparsity, timing)
    return Layer(name, kind, weight_shape, sparsity, timing, True, f"{what} is {timing.total:.2f} × as fast"), sparse


@dataclass(frozen=True)
class Pruned:
    """The shares of zeros in one layer's weight, before and after."""

    name: str
    shape: tuple[int, ...]
    before: float
    after: float

    def __str__(self) -> str:
        return f"{self.name}: {'×'.join(map(str, self.shape))}, {self.before:.1%} → {self.after:.1%} zeros"


@dataclass(frozen=True)
class PruneReport:
    """The zeros of every layer that could be pruned; prints as lines."""

    layers: tuple[Pruned, ...] = field(default=())

    @property
    def sparsity(self) -> float:
        """The share of zeros in all layers together, afterwards."""
        sizes = [torch.Size(layer.shape).numel() for layer in self.layers]
        return sum(n * layer.after for n, layer in zip(sizes, self.layers, strict=True)) / max(1, sum(sizes))

    def __str__(self) -> str:
        return "\n".join([*map(str, self.layers), f"{self.sparsity:.1%} zeros in {len(self.layers)} layers"])
