"""What `fxopt optimize` does, as functions: load a model, make its inputs, optimise, compare with eager, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.fx import GraphModule

from fxopt import catalogue, models
from fxopt.benchmark import benchmark
from fxopt.bisect import bisect as bisect_graph
from fxopt.bisection import Bisection
from fxopt.checks import ByScript
from fxopt.compose import Pipeline, Result, compose
from fxopt.delta import share
from fxopt.errors import UsageError
from fxopt.history import history
from fxopt.huggingface import Optimized, default_passes
from fxopt.huggingface import optimize as optimize_model
from fxopt.inputs import example_inputs, fitting_length, load_tokenizer, longest_sequence
from fxopt.measurement import Comparison
from fxopt.text import to_html
from fxopt.verify import Verification, verify

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LENGTH = 128  # tokens, where nothing else is asked for


@dataclass(frozen=True)
class Report:
    """An optimised model, what was done to each of its graphs, and how it compares with eager end to end."""

    name: str
    model: nn.Module = field(repr=False)
    results: Mapping[str, Result]
    verification: Verification
    comparison: Comparison | None
    default: bool = False  # whether the passes are those of the default pipeline

    @property
    def state(self) -> Optimized:
        state: Optimized = self.model.__dict__["fxopt"]
        return state

    @property
    def ok(self) -> bool:
        """Whether the result computes what the model computes, and no step had to be taken back."""
        return self.verification.ok and not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The steps that failed, by graph: those that were taken back, and those kept at the caller's wish."""
        steps = [(name, s) for name, r in self.results.items() for s in r.steps]
        return tuple(
            f"{name}: {s.signature} was {'kept, though it fails' if s.kept else 'left out: ' + s.note}"
            for name, s in steps
            if (not s.kept and s.note) or (s.verification is not None and not s.verification.ok)
        )

    @property
    def keeps_class(self) -> bool:
        """Whether a saved result is loaded as a model of the same class; see `fxopt.save`."""
        from fxopt.store import keeps_class

        return keeps_class(self.model)

    def save(self, directory: Path) -> None:
        """Write the result to a folder; see `fxopt.save`."""
        from fxopt.store import save

        save(self.model, directory)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What is said of the model as a whole: what stayed eager, what was left out, and fallbacks, each with why."""
        found = [("eager from the start", note) for note in self.state.notes]
        if out := catalogue.left_out(_device(self.model).type) if self.default else ():
            found.append(("left out, for they bring nothing on this device", ", ".join(out)))
        found += [("fallback to eager", f"{count} × {reason}") for reason, count in self.state.fallbacks.items()]
        return found

    def report(self, path: str | Path) -> Path:
        """Write a report to ``path``, one HTML file; see `fxopt.report`."""
        from fxopt.report import report

        return report(self, path)

    def _repr_html_(self) -> str:
        return to_html(self)

    def to_json(self) -> dict[str, Any]:
        """Everything that the table shows, as plain values."""
        return {
            "model": self.name,
            "graphs": {name: result.to_json() for name, result in self.results.items()},
            "capture": {name: str(g.meta["fxopt.capture"]) for name, g in self.state.graphs.items()},
            "eager": list(self.state.notes),
            "fallbacks": dict(self.state.fallbacks),
            "verification": self.verification.to_json(),
            "latency": None if self.comparison is None else self.comparison.to_json(),
        }

    def __rich__(self) -> Group:
        parts: list[Any] = []
        for name, result in self.results.items():
            title = f"{self.name}: {name}, {self.state.graphs[name].meta['fxopt.capture']}"
            parts += [Text(title, style="bold"), result]
        if out := catalogue.left_out(_device(self.model).type) if self.default else ():
            parts.append(Text(f"left out, for they bring nothing on this device: {', '.join(out)}", style="dim"))
        parts += [Text(f"eager from the start: {note}", style="yellow") for note in self.state.notes]
        parts.append(self._summary())
        return Group(*parts)

    def _summary(self) -> Table:
        table = Table(title="the model, end to end, against eager", title_justify="left", show_header=False)
        verdict = "same as eager" if self.verification.ok else "DIFFERS from eager"
        table.add_row("verification", f"{verdict}; {self.verification.summary}")
        if self.comparison is not None:
            table.add_row("latency", _latency(self.comparison))
        for reason, count in self.state.fallbacks.items():
            table.add_row("fallback to eager", f"{count} × {reason}")
        return table


def _latency(comparison: Comparison) -> str:
    """The ratio with its interval, and two times that it is the ratio of; as much of that as was measured."""
    low, high = comparison.interval
    if high == float("inf"):
        return f"{comparison.conclusion}; give --num-runs more"
    text = f"{comparison.ratio:.3f} [{low:.3f}, {high:.3f}] × eager: {comparison.conclusion}"
    if comparison.verdict == "not measurable":
        return text
    before, after = comparison.typical
    return f"{text} ({before * 1e3:.2f} → {after * 1e3:.2f} ms)"


def load(name: str, device: str, dtype: str | None) -> nn.Module:
    """A built-in model, a local folder or a hub name, on ``device`` as ``dtype`` (a name, or None for its own)."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not known; give one of {', '.join(DTYPES)}")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"--device {device} is no device; give cpu or cuda") from error
    if wanted.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device} is none on which fxopt runs models; give cpu or cuda")
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device} was asked for, but torch sees no CUDA device; give --device cpu")
    return models.load(name, wanted, None if dtype is None else DTYPES[dtype])


def inputs(
    model: nn.Module, name: str, text: str | None = None, max_length: int | None = None, batch_size: int = 1
) -> dict[str, Any]:
    """Example inputs: ``text`` through the folder's tokenizer where there is one, else made up from the config.

    ``max_length`` is in tokens; if None, 128 or as many as the model has positions for.
    """
    longest = longest_sequence(model)
    if max_length is not None and longest is not None and max_length > longest:
        raise UsageError(f"--max-length {max_length} is more than the {longest} positions of {name}; give at most that")
    max_length = fitting_length(model, _LENGTH) if max_length is None else max_length
    tokenizer = load_tokenizer(name) if Path(name).is_dir() else None
    if text is not None and tokenizer is None:
        raise UsageError(f"--text was given, but {name} has no tokenizer; leave it out for random tokens")
    return example_inputs(model, batch_size, max_length, text, tokenizer)


def optimize(
    model: nn.Module,
    given: Mapping[str, Any],
    name: str = "model",
    passes: str = "default",
    rtol: float | None = None,
    atol: float | None = None,
    benchmarked: bool = True,
    rounds: int = 30,
    warmup: int = 3,
    show: bool | None = None,
    limit: str | None = None,
) -> Report:
    """Run the passes over every graph of ``model``, each step verified and timed, and compare the result with eager."""
    device = _device(model)
    steps = default_passes(device) if passes == "default" else catalogue.parse(passes, device.type)
    pipeline = compose(
        *steps,
        verify=True,
        benchmark=benchmarked,
        on_failure="undo" if limit is None else "keep",  # who asks for a part by hand wants to see just that
        rtol=rtol,
        atol=atol,
        rounds=rounds,
        warmup=warmup,
        limit=limit,
    )
    pipeline.show = False if show is None else show
    pipeline.strict_limit = False  # one graph of a model may hold fewer places than another
    result = optimize_model(model, pipeline, dict(given))
    state: Optimized = result.__dict__["fxopt"]
    _check_limit(pipeline, state)
    verification = verify(model, result, dict(given), rtol=rtol, atol=atol)
    comparison = benchmark(model, result, dict(given), rounds=rounds, warmup=warmup) if benchmarked else None
    return Report(name, result, dict(state.results), verification, comparison, passes == "default")


def _check_limit(pipeline: Pipeline, state: Optimized) -> None:
    """`UsageError` where no graph has a rewrite of a number that the limit asks for."""
    if pipeline.limit is None:
        return
    counts = {name: len(history(r.gm)[pipeline.limit.index].rewrites) for name, r in state.results.items()}
    if counts and (missed := pipeline.limit.missed(max(counts.values()))):
        told = ", ".join(f"{count} in {name}" for name, count in counts.items())
        name = pipeline.transformations[pipeline.limit.index].signature
        raise UsageError(f"the limit asks for rewrite {missed} of {name}, which makes {told}")


def graphs(model: nn.Module, given: Mapping[str, Any], generation: bool) -> dict[str, tuple[GraphModule, Any]]:
    """The graphs that `optimize` would transform, by name, each with the inputs that it was captured with."""
    collect = _Collect()
    state: Optimized = optimize_model(model, collect, dict(given), generation=generation).__dict__["fxopt"]
    return dict(zip(state.results, collect.found, strict=True))


class _Collect(Pipeline):
    """A pipeline that does nothing but keep the graphs that it is given, with their inputs."""

    def __init__(self) -> None:
        super().__init__(())
        self.found: list[tuple[GraphModule, Any]] = []

    def run(self, gm: GraphModule, lint_and_recompile: bool = True) -> Result:
        """Keep a copy of ``gm``."""
        self.found.append((share(gm), self.example_inputs))
        return Result(gm, ())


def bisect(
    model: nn.Module,
    given: Mapping[str, Any],
    passes: str,
    check: str = "outputs",
    script: str | None = None,
    graph: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    out: Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
    repeat: int = 1,
) -> tuple[str, Bisection]:
    """
    Bisect the graph named ``graph``, or else each in turn until one fails; its name, and the result.

    With ``out``, the journal is kept there (in a folder of its own for each further graph), and the reproducer in its
    folder ``repro``.
    """
    steps = default_passes(_device(model)) if passes == "default" else catalogue.parse(passes, _device(model).type)
    tried: list[str] = []
    for generation in (False, True):
        found = graphs(model, given, generation)
        for name, (gm, inputs) in found.items():
            if name in tried or (graph is not None and name != graph):
                continue
            tried.append(name)
            say(f"{name}: {len(gm.graph.nodes)} nodes, {len(steps)} transformation{'s' * (len(steps) != 1)}")
            asked = check if script is None else ByScript(script, gm, inputs)
            place = out if name == "forward" or out is None else out / name.replace(" ", "-")
            result = bisect_graph(
                gm, steps, asked, inputs, rtol=rtol, atol=atol, directory=place, resume=resume, repeat=repeat, say=say
            )
            if result.reproduced or name == graph:
                if place is not None and result.repro is not None and result.repro.confirmed:
                    result.repro.save(place / "repro")
                return name, result
    if not tried:
        raise UsageError(f"--graph {graph} is not there; the model has {', '.join(found)}")
    return name, result


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
