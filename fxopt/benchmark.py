"""Is one callable faster than another? Interleaved rounds in one process, and the interval of the ratio.

In each round every contender is timed once, in random order; what is compared is the ratio within the round, so that a
machine that slows down for a while slows both. What is made of it: `fxopt.measurement`.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import BenchmarkError, UsageError
from fxopt.isolation import module_of, own_copies, own_tensors, quiet
from fxopt.measurement import Comparison, Comparisons, Measurement, is_precise
from fxopt.samples import InputSet, flatten, normal_form

_FEWEST = 6  # with fewer rounds there is no interval of 95 %: even the extremes miss the median in 2 of 2^5 cases
_FEWEST_FOR_PRECISION = 10
_MOST_CALLS = 10_000

Clock = Callable[[], float]


def benchmark(
    a: Callable[..., Any],
    b: Callable[..., Any],
    inputs: Any,
    *,
    rounds: int = 100,
    warmup: int = 3,
    min_time: float = 1e-3,
    max_time: float = 10.0,
    precision: float = 0.005,
    device: str | torch.device | None = None,
    threads: int | None = None,
    train: bool = False,
    memory: bool = True,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Comparison:
    """Time `b` against `a` on the same inputs (a tuple is positional, a dict is keywords; of a list, one call each).

    `warmup` calls first; then at most `rounds` rounds, fewer once the interval of the ratio is within ± `precision`
    of it, or `max_time` seconds are over (never fewer than 6). A sample is as many calls as take `min_time` seconds.
    `train` times a training step: forward and backward of the sum of the float outputs' means, no optimizer. `device`
    says whose clock counts (CUDA events on a GPU); by default that of the inputs and weights. `threads` sets torch's
    threads for the time being. Peak memory is measured in one more call of each. Both get their own copies of the
    inputs; gradients, random state and the buffers of a module in training mode are left as they were.

    UsageError for a wrong argument, BenchmarkError if a call fails or the device is not there.
    """
    options = Options(rounds, warmup, min_time, max_time, precision, device, threads, train, memory, seed, clock)
    return _compete({"before": a, "after": b}, inputs, "before", options).contenders[0]


def benchmark_many(
    contenders: Mapping[str, Callable[..., Any]], inputs: Any, *, baseline: str | None = None, **options: Any
) -> Comparisons:
    """Time several callables in the same rounds, each against the one named `baseline` (by default the first).

    The options are those of `benchmark`.
    """
    baseline = next(iter(contenders), "") if baseline is None else baseline
    if baseline not in contenders:
        raise UsageError(f"the baseline {baseline!r} is not among the contenders {list(contenders)}")
    return _compete(contenders, inputs, baseline, Options(**options))


def measure(function: Callable[..., Any], inputs: Any, *, name: str = "latency", **options: Any) -> Measurement:
    """Time one callable. The options are those of `benchmark`; `precision` is that of the median latency."""
    return _compete({name: function}, inputs, name, Options(**options)).baseline


@dataclass(frozen=True)
class Options:
    """How to measure; see `benchmark`."""

    rounds: int = 100
    warmup: int = 3
    min_time: float = 1e-3
    max_time: float = 10.0
    precision: float = 0.005
    device: str | torch.device | None = None
    threads: int | None = None
    train: bool = False
    memory: bool = True
    seed: int = 0
    clock: Clock = time.perf_counter

    def __post_init__(self) -> None:
        least = {"rounds": 1, "warmup": 0, "min_time": 0, "max_time": 0, "precision": 0, "threads": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise UsageError(f"{name} is {value}, expected at least {bound}")


def _compete(contenders: Mapping[str, Callable[..., Any]], inputs: Any, baseline: str, options: Options) -> Comparisons:
    sets = normal_form(inputs, contenders[baseline])
    device = _device(contenders.values(), sets, options.device)
    with _surroundings(contenders.values(), sets, options):
        steps = {name: _step(name, function, sets, options.train) for name, function in contenders.items()}
        timer = _CudaTimer(device) if device.type == "cuda" else _Timer(options.clock)
        samples, starts, calls, stopped = _rounds(steps, baseline, timer, options)
        peaks = {name: _peak(step, device) if options.memory else None for name, step in steps.items()}
        threads = torch.get_num_threads()
    measured = {
        name: Measurement(
            name, tuple(samples[name]), calls[name], peaks[name], str(device), threads, tuple(starts[name])
        )
        for name in steps
    }
    others = [one for name, one in measured.items() if name != baseline]
    return Comparisons(measured[baseline], tuple(Comparison(measured[baseline], one, stopped) for one in others))


def _device(functions: Any, sets: Sequence[InputSet], asked: str | torch.device | None) -> torch.device:
    if asked is not None:
        device = torch.device(asked)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise BenchmarkError(f"the device {asked} was asked for, but torch.cuda.is_available() is False here")
        return device
    modules = [module for function in functions if (module := module_of(function)) is not None]
    tensors = [tensor for one in sets for _, tensor in one.tensors()]
    tensors += [tensor for module in modules for tensor in own_tensors(module).values()]
    return next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))


@contextmanager
def _surroundings(functions: Any, sets: Sequence[InputSet], options: Options) -> Iterator[None]:
    """Threads as asked, no garbage collection between two samples, and everything put back afterwards."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    with ExitStack() as stack:
        stack.enter_context(quiet(options.seed, [tensor for one in sets for _, tensor in one.tensors()]))
        for module in {id(m): m for f in functions if (m := module_of(f)) is not None}.values():
            if any(inner.training for inner in module.modules()):
                stack.enter_context(own_copies(module))
        try:
            if options.threads is not None:
                torch.set_num_threads(options.threads)
            gc.disable()
            yield
        finally:
            torch.set_num_threads(threads)
            if collecting:
                gc.enable()


def _step(name: str, function: Callable[..., Any], sets: Sequence[InputSet], train: bool) -> Callable[[], Any]:
    """One call of each input set, on the contender's own copies of them; a failure is a BenchmarkError."""
    own = [one.clone() for one in sets]
    for copied, given in zip(own, sets, strict=True):
        for (_, tensor), (_, original) in zip(copied.tensors(), given.tensors(), strict=True):
            tensor.requires_grad_(train and original.requires_grad)

    def infer() -> list[Any]:
        with torch.no_grad():
            return [one.call(function) for one in own]

    def learn() -> list[Any]:
        losses = [_loss(name, one.call(function)) for one in own]
        return [torch.autograd.grad(loss, _leaves(loss), allow_unused=True) for loss in losses]

    def step() -> list[Any]:
        try:
            return learn() if train else infer()
        except BenchmarkError:
            raise
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise BenchmarkError(f"{name} failed on the inputs: {type(error).__name__}: {first}") from error

    return step


def _loss(name: str, output: Any) -> Tensor:
    tensors = [part.value for part in flatten(output, "output") if isinstance(part.value, Tensor)]
    terms = [tensor.float().mean() for tensor in tensors if tensor.requires_grad and tensor.is_floating_point()]
    if not terms:
        raise BenchmarkError(f"{name} has no output that requires a gradient: train needs parameters that do")
    return torch.stack(terms).sum()


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that a backward pass would leave gradients in: asked for by name, none is touched."""
    seen, open_nodes, leaves = set(), [loss.grad_fn], []
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            leaves.append(variable)
        open_nodes.extend(before for before, _ in node.next_functions)
    return leaves


class _Timer:
    """Seconds by a clock of the host."""

    def __init__(self, clock: Clock) -> None:
        self.now = clock

    def time(self, step: Callable[[], Any], calls: int) -> float:
        began = self.now()
        for _ in range(calls):
            step()
        return self.now() - began


class _CudaTimer(_Timer):
    """Seconds between two events in the stream: what the device took, with the gaps that slow launches leave."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(time.perf_counter)
        self.device = device

    def time(self, step: Callable[[], Any], calls: int) -> float:
        with torch.cuda.device(self.device):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            began.record()
            for _ in range(calls):
                step()
            ended.record()
            ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000


def _rounds(
    steps: Mapping[str, Callable[[], Any]], baseline: str, timer: _Timer, options: Options
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, int], str]:
    """Latencies by name, when each was taken, calls a sample by name, and why it stopped."""
    began, order, chance = timer.now(), list(steps), random.Random(options.seed)
    calls = {name: _calls(name, step, timer, options) for name, step in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    starts: dict[str, list[float]] = {name: [] for name in steps}
    first = time.perf_counter()
    for done in range(1, options.rounds + 1):
        chance.shuffle(order)
        for name in order:
            starts[name].append(time.perf_counter() - first)
            samples[name].append(timer.time(steps[name], calls[name]) / calls[name])
            if not samples[name][-1] > 0:
                raise BenchmarkError(f"{name} took no time by the clock: give a min_time above {options.min_time}")
        if done >= _FEWEST_FOR_PRECISION and _all_precise(samples, baseline, options.precision):
            return samples, starts, calls, "precise"
        if done >= _FEWEST and timer.now() - began >= options.max_time:
            return samples, starts, calls, "out of time"
    return samples, starts, calls, "all rounds made"


def _calls(name: str, step: Callable[[], Any], timer: _Timer, options: Options) -> int:
    """Warm up; how many calls make a sample long enough for the clock."""
    quickest = min((timer.time(step, 1) for _ in range(max(1, options.warmup))), default=0.0)
    if quickest <= 0:
        return _MOST_CALLS if options.min_time > 0 else 1
    return min(_MOST_CALLS, max(1, math.ceil(options.min_time / quickest)))


def _all_precise(samples: Mapping[str, Sequence[float]], baseline: str, precision: float) -> bool:
    first = samples[baseline]
    if len(samples) == 1:
        return is_precise(first, precision)
    others = (latencies for name, latencies in samples.items() if name != baseline)
    return all(is_precise([b / a for a, b in zip(first, one, strict=True)], precision) for one in others)


# ------------------------------------------------------------------------------------------------------------ memory


def peak_memory(
    function: Callable[..., Any], inputs: Any, *, device: str | torch.device | None = None, train: bool = False
) -> int:
    """Peak bytes that one call allocates beyond what was there before it; see `Measurement`.

    Its outputs count, its inputs and weights do not. The call is made twice: the first fills what is kept for good.
    """
    sets = normal_form(inputs, function)
    with _surroundings([function], sets, Options()):
        step = _step("the function", function, sets, train)
        step()
        return _peak(step, _device([function], sets, device))


def _peak(step: Callable[[], Any], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    live = peak = 0
    for change in _allocations(step):
        live += change
        peak = max(peak, live)
    return peak


def _allocations(step: Callable[[], Any]) -> list[int]:
    """Every allocation (bytes) and release (minus bytes) of torch's CPU allocator during a call, in order.

    Torch's own recording, read event by event: the profilers built on it add up by operator and lose the order. It
    sees temporaries inside kernels and custom operators, which a dispatch mode does not; and it is deterministic.
    """
    switch: Any = torch._C._autograd  # untyped
    if switch._profiler_enabled():
        raise BenchmarkError("peak memory cannot be measured under torch's profiler: leave it, or give memory=False")
    config = torch._C._profiler.ProfilerConfig(
        torch._C._profiler.ProfilerState.CPU,
        report_input_shapes=False,
        profile_memory=True,
        with_stack=False,
        with_flops=False,
        with_modules=False,
        experimental_config=torch._C._profiler._ExperimentalConfig(),
    )
    switch._enable_profiler_legacy(config)
    try:
        result = step()
    finally:
        threads = switch._disable_profiler_legacy()
    del result
    own = next(events for events in threads if any(event.name() == "__start_profile" for event in events))
    return [int(event.cpu_memory_usage()) for event in own if event.kind() == "memory_alloc"]
