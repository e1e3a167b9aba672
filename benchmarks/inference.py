"""How long inference takes after a pipeline, as a ratio to eager.

    python benchmarks/inference.py [MODEL…] [--passes NAME,…] [--steps] [--batch-size N] [--length N] [--threads N]
                                   [--seconds S] [--processes N] [--json FILE] [--check]

Built-in models, float32 on the CPU, captured with dynamic batch and sequence. Eager, the capture as it is and the
result of the pipeline (with `--steps`: after each pass) are timed in interleaved rounds in one process; the interval
is that of the median ratio at 95 %. With `--processes N` each model is measured in N fresh processes, and the median
of their ratios and the least and greatest are printed: eager ResNet-50 takes 57 to 73 ms from process to process. The
error is the largest |a - e| / (1 + |e|) over all outputs, e being eager's. `--check` exits with 1 where a model
misses its aim, or its error is above 1e-4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fxopt import models
from fxopt.benchmark import benchmark_many
from fxopt.capture import capture
from fxopt.catalogue import parse
from fxopt.delta import share
from fxopt.history import history
from fxopt.inputs import example_inputs, fitting_length
from fxopt.transformation import Transformation

AIMS = {"bert-base": 0.88, "resnet50": 0.70}  # latency over that of eager, at batch 1, length 128, 2 threads
LARGEST_ERROR = 1e-4
MODELS = ("bert-base", "distilbert-base", "gpt2", "vit-base", "resnet18", "resnet50", "mlp", "gnn")


@dataclass(frozen=True)
class Row:
    """One contender: `ratio` to eager with its interval, worst error, rewrites of the last pass."""

    model: str
    contender: str
    rewrites: int | None
    error: float
    eager: float  # seconds
    ratio: float
    interval: tuple[float, float]

    @property
    def misses_aim(self) -> bool:
        aim = AIMS.get(self.model)
        too_slow = self.contender == "optimised" and aim is not None and self.ratio > aim
        return too_slow or self.error > LARGEST_ERROR


def contenders(
    gm: GraphModule, passes: list[Transformation], steps: bool
) -> Iterator[tuple[str, int | None, GraphModule]]:
    """The capture, after each pass if `steps`, and the result; all hold the same tensors where they are the same."""
    yield "captured", None, share(gm)
    total = 0
    for number, transformation in enumerate(passes, 1):
        transformation(gm)
        count = len(history(gm)[-1].rewrites)
        total += count
        if steps and count and number < len(passes):
            yield f"{number} {transformation.signature}", count, share(gm)
    yield "optimised", total, gm


def error(expected: Any, actual: Any) -> float:
    """The largest |a - e| / (1 + |e|): the least t for which `torch.allclose` holds with rtol = atol = t."""
    pairs = [(e.double(), a.double()) for e, a in zip(_tensors(expected), _tensors(actual), strict=True) if e.numel()]
    return max((float(((a - e).abs() / (1 + e.abs())).max()) for e, a in pairs), default=0.0)


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def measure(name: str, model: nn.Module, passes: list[Transformation], options: argparse.Namespace) -> list[Row]:
    inputs = example_inputs(model, options.batch_size, fitting_length(model, options.length))
    gm = capture(model, inputs)
    rewrites: dict[str, int | None] = {}
    graphs: dict[str, Any] = {}
    for contender, count, graph in contenders(gm, passes, options.steps):
        graphs[contender], rewrites[contender] = graph, count
    with torch.no_grad():
        expected = model(**inputs)
        for graph in graphs.values():
            for _ in range(2):  # packs what is to be packed
                graph(**inputs)
        errors = {contender: error(expected, graph(**inputs)) for contender, graph in graphs.items()}
    timed = benchmark_many(
        {"eager": model, **graphs}, inputs, max_time=options.seconds * (len(graphs) + 1), threads=options.threads
    )
    return [Row(name, c.b.name, rewrites[c.b.name], errors[c.b.name], c.a.median, c.ratio, c.interval) for c in timed]


def measure_apart(name: str, options: argparse.Namespace) -> list[Row]:
    """What `options.processes` fresh processes find, joined."""
    found: list[list[Row]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        for _ in range(options.processes):
            given = ["--passes", options.passes, *(["--steps"] if options.steps else []), "--json", str(file)]
            for option in ("batch_size", "length", "threads", "seconds"):
                given += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
            subprocess.run([sys.executable, __file__, name, *given], check=True, stdout=subprocess.DEVNULL)
            found.append([Row(**(row | {"interval": tuple(row["interval"])})) for row in json.loads(file.read_text())])
    return [joined(rows) for rows in zip(*found, strict=True)]


def joined(rows: Sequence[Row]) -> Row:
    """The median of several measurements of one contender; the interval is their range."""
    ratios = [row.ratio for row in rows]
    eager, ratio = statistics.median(row.eager for row in rows), statistics.median(ratios)
    worst = max(row.error for row in rows)
    return replace(rows[0], error=worst, eager=eager, ratio=ratio, interval=(min(ratios), max(ratios)))


def table(rows: list[Row], options: argparse.Namespace) -> Table:
    shown = Table(
        title=f"latency over eager, batch {options.batch_size}, {options.threads} threads", title_justify="left"
    )
    spread = "95 %" if options.processes == 1 else f"of {options.processes} processes"
    for column in ("model", "contender", "rewrites", "eager", "ratio", spread, "aim", "error"):
        shown.add_column(column, justify="left" if column in ("model", "contender") else "right")
    for row in rows:
        low, high = row.interval
        aim = AIMS.get(row.model) if row.contender == "optimised" else None
        shown.add_row(
            row.model,
            row.contender,
            "" if row.rewrites is None else str(row.rewrites),
            f"{row.eager * 1e3:.2f} ms",
            f"{row.ratio:.3f}",
            f"{low:.3f} – {high:.3f}",
            "" if aim is None else f"{aim:.2f}",
            f"{row.error:.1e}",
            style="red" if row.misses_aim else "bold" if row.contender == "optimised" else None,
        )
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--passes", default="default", help="'default', or NAME,NAME(option=value),…")
    parser.add_argument("--steps", action="store_true", help="time the graph after each pass that rewrites something")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=128, help="tokens, or as many as the model has positions for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each contender")
    parser.add_argument("--processes", type=int, default=1, help="fresh processes to measure each model in")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for name in options.models:
        passes = parse(options.passes)
        apart = options.processes > 1
        found = measure_apart(name, options) if apart else measure(name, models.build(name), passes, options)
        Console(width=None if sys.stdout.isatty() else 120).print(table(found, options))
        rows += found
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(options.check and any(row.misses_aim for row in rows))


if __name__ == "__main__":
    sys.exit(main())
