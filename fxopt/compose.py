"""Pipelines: transformations in a row, each verified and timed as it is made."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch.fx import GraphModule

from fxopt.benchmark import benchmark as compare
from fxopt.delta import graphs, share
from fxopt.errors import FxoptError, TransformationError, UsageError, VerificationError
from fxopt.history import Edited, atomic, commits, find, history, undo, undo_rewrites
from fxopt.limit import Limit
from fxopt.log import label
from fxopt.measurement import Comparison
from fxopt.shapes import propagate
from fxopt.text import to_html, to_text
from fxopt.transformation import ReversibleTransformation, Transformation
from fxopt.verify import Baseline, Verification

Inputs = tuple[Any, ...] | Mapping[str, Any]
_RESULT = "fxopt.result"


@dataclass(frozen=True)
class Step:
    """What one transformation of a pipeline did."""

    transformation: Transformation
    rewrites: int
    nodes: tuple[int, int]  # before, after
    seconds: float
    kept: bool = True
    note: str = ""
    verification: Verification | None = None
    in_sequence: Comparison | None = None  # after this step against before it
    alone: Comparison | None = None  # only this step against the original

    @property
    def signature(self) -> str:
        return self.transformation.signature

    def to_json(self) -> dict[str, Any]:
        """The step as plain values: seconds, node counts, errors and latency ratios."""
        return {
            "signature": self.signature,
            "rewrites": self.rewrites,
            "nodes": list(self.nodes),
            "seconds": self.seconds,
            "kept": self.kept,
            "note": self.note,
            "verification": None if self.verification is None else self.verification.to_json(),
            "in_sequence": None if self.in_sequence is None else self.in_sequence.to_json(),
            "alone": None if self.alone is None else self.alone.to_json(),
        }

    def __rich__(self) -> Table:
        table = Table(title=Text(label(self.transformation)), title_justify="left", show_header=False)
        table.add_row("rewrites", f"{self.rewrites}" if self.kept else f"{self.rewrites}, taken back", style=_red(self))
        table.add_row("nodes", f"{self.nodes[0]} → {self.nodes[1]}")
        table.add_row("seconds", f"{self.seconds:.3g}")
        asked = {"verification": self.verification, "latency": self.in_sequence, "alone": self.alone}
        for name, found in asked.items():
            if found is not None:
                table.add_row(name, Text(found.summary))
        if self.note:
            table.add_row("note", Text(self.note))
        return table

    def _repr_html_(self) -> str:
        return to_html(self)


@dataclass(frozen=True)
class Result:
    """What a pipeline did to a graph module, step by step; prints as a table."""

    gm: GraphModule = field(repr=False)
    steps: tuple[Step, ...]
    total: Comparison | None = None  # the result against the original
    verification: Verification | None = None  # of the result

    @property
    def rewrites(self) -> int:
        return sum(s.rewrites for s in self.steps if s.kept)

    def to_json(self) -> dict[str, Any]:
        """The table as plain values."""
        return {
            "steps": [s.to_json() for s in self.steps],
            "rewrites": self.rewrites,
            "total": None if self.total is None else self.total.to_json(),
            "verification": None if self.verification is None else self.verification.to_json(),
        }

    def __repr__(self) -> str:
        return to_text(self)

    def __rich__(self) -> Group:
        timed = any(s.in_sequence for s in self.steps) or self.total is not None
        verified = self.verification is not None or any(s.verification for s in self.steps)
        table = Table(show_footer=True)
        nodes = f"{self.steps[0].nodes[0]} → {self.steps[-1].nodes[1]}" if self.steps else ""
        table.add_column("step", footer="all", no_wrap=True)
        table.add_column("rewrites", footer=str(self.rewrites), justify="right")
        table.add_column("nodes", footer=nodes, justify="right", no_wrap=True)
        if verified:
            table.add_column("error", footer=_error(self.verification), justify="right", no_wrap=True)
        if timed:
            table.add_column("latency ×", footer=_ratio(self.total), justify="right", no_wrap=True)
            table.add_column("alone ×", footer="", justify="right", no_wrap=True)
            table.add_column("MiB", footer=_memory(self.total), justify="right", no_wrap=True)
        for s in self.steps:
            if not s.rewrites and s.kept:
                continue
            cells: list[Any] = [Text(label(s.transformation)), str(s.rewrites) if s.kept else "undone"]
            cells.append(f"{s.nodes[0]} → {s.nodes[1]}" if s.nodes[0] != s.nodes[1] else str(s.nodes[0]))
            if verified:
                cells.append(_error(s.verification))
            if timed:
                cells += [_ratio(s.in_sequence), _ratio(s.alone), _memory(s.in_sequence)]
            table.add_row(*cells, style=_red(s))
        parts: list[Any] = [table]
        failed = [s for s in self.steps if not s.kept or (s.rewrites and s.note)]
        parts += [Text(f"{label(s.transformation)}: {s.note}", style="red") for s in failed]
        if idle := [s for s in self.steps if not s.rewrites and s.kept]:
            parts.append(Text(f"did nothing: {', '.join(map(_idle, idle))}", style="dim"))
        return Group(*parts)

    def _repr_html_(self) -> str:
        return to_html(self)


def _red(step: Step) -> str | None:
    return "red" if not step.kept or (step.verification is not None and not step.verification.ok) else None


def _idle(step: Step) -> str:
    near = step.note.removeprefix("did nothing").removeprefix("; ")
    return f"{label(step.transformation)} ({near})" if near else label(step.transformation)


def _error(verification: Verification | None) -> Text:
    if verification is None:
        return Text("")
    text = "0" if verification.max_error == 0 else f"{verification.max_error:.1e}"
    return Text(text, style="" if verification.ok else "bold red")


def _ratio(comparison: Comparison | None) -> Text:
    if comparison is None:
        return Text("")
    style = {"faster": "green", "slower": "red"}.get(comparison.verdict, "")
    low, high = comparison.interval
    if high == float("inf"):
        return Text("too few rounds", style="dim")
    return Text(f"{comparison.ratio:.2f} [{low:.2f}, {high:.2f}]", style=style)


def _memory(comparison: Comparison | None) -> Text:
    if comparison is None or comparison.memory is None:
        return Text("")
    before, after = comparison.memory
    return Text(f"{before / 2**20:.1f} → {after / 2**20:.1f}" if before != after else f"{after / 2**20:.1f}")


class Pipeline(ReversibleTransformation):
    """
    Transformations in a row; made by `compose`.

    Calling it applies them left to right and returns the graph module; `run` returns the `Result`, which
    ``fxopt.result(gm)`` also gives afterwards.  `reverse` undoes them right to left.
    """

    def __init__(
        self,
        transformations: Sequence[Transformation],
        *,
        inplace: bool = True,
        verify: bool = False,
        benchmark: bool = False,
        example_inputs: Inputs | None = None,
        on_failure: Literal["raise", "undo", "keep"] = "raise",
        on_regression: Literal["keep", "undo"] = "keep",
        rtol: float | None = None,
        atol: float | None = None,
        rounds: int | None = None,
        warmup: int | None = None,
        show: bool | None = None,
        limit: str | None = None,
    ) -> None:
        self.transformations = tuple(transformations)
        self.limit = None if limit is None else Limit.parse(limit, self.transformations)
        self.strict_limit = True  # whether a number beyond the rewrites that there are is an error
        self.inplace = inplace
        self.verify = verify
        self.benchmark = benchmark
        self.example_inputs = example_inputs
        self.on_failure = on_failure
        self.on_regression = on_regression
        self.rtol, self.atol = rtol, atol
        self.timing: dict[str, Any] = {k: v for k, v in (("rounds", rounds), ("warmup", warmup)) if v is not None}
        self.show = show

    @property
    def preserves_computation(self) -> bool:  # type: ignore[override]
        return all(t.preserves_computation for t in self.transformations)

    @property
    def replayable(self) -> bool:  # type: ignore[override]
        return all(t.replayable for t in self.transformations)

    @property
    def signature(self) -> str:
        return f"compose({', '.join(t.signature for t in self.transformations)})"

    def on(self, example_inputs: Inputs) -> Pipeline:
        """The same pipeline, asking its questions of ``example_inputs``."""
        other = copy.copy(self)
        other.example_inputs = example_inputs
        return other

    def __iter__(self) -> Iterator[Transformation]:
        return iter(self.transformations)

    def __len__(self) -> int:
        return len(self.transformations)

    def transform(self, graph_module: GraphModule) -> None:
        for t in self.transformations:
            t.transform(graph_module)

    def __call__(
        self, graph_module: GraphModule, lint_and_recompile: bool = True, reverse: bool = False
    ) -> GraphModule:
        if not self.inplace:
            graph_module = copy.deepcopy(graph_module)
        if reverse:
            return self._undo(graph_module)
        return self.run(graph_module, lint_and_recompile).gm

    def _undo(self, graph_module: GraphModule, edited: Edited = "refuse") -> GraphModule:
        """Undo right to left, all or nothing."""
        with atomic(graph_module):
            mine = _aligned([e.signature for e in history(graph_module)], [t.signature for t in self.transformations])
            for step, t in reversed(list(enumerate(self.transformations))):
                if step in mine:
                    undo(graph_module, mine[step], edited)
                elif isinstance(t, ReversibleTransformation) and find(graph_module, t.signature) is None:
                    t.reverse(graph_module)
        return graph_module

    def run(self, gm: GraphModule, lint_and_recompile: bool = True) -> Result:
        """
        Apply every step to ``gm`` in place, verify and time it as asked, and say what happened.

        With ``on_failure="raise"``, a step that fails or computes something else raises, and ``gm`` is as it was
        before the first; with ``"undo"`` that step alone is taken back; with ``"keep"`` it stays, where it computes
        something else, and is taken back where it raised.
        """
        questions = _Questions(self, gm)
        steps: list[Step] = []
        within = self.transformations if self.limit is None else self.transformations[: self.limit.index + 1]
        with atomic(gm), questions.progress(len(within)) as advance:
            for t in within:
                advance(t.signature)
                cut = self.limit if len(steps) == len(within) - 1 else None
                steps.append(self._step(gm, t, questions, lint_and_recompile, cut))
            advance("the result")
            result = Result(gm, tuple(steps), questions.total(gm), questions.last)
        gm.meta[_RESULT] = result.to_json()
        if questions.show:
            Console().print(result)
        return result

    def _step(
        self,
        gm: GraphModule,
        t: Transformation,
        questions: _Questions,
        lint_and_recompile: bool,
        limit: Limit | None = None,
    ) -> Step:
        nodes, began = _count(gm), time.perf_counter()
        before = questions.copy(gm)
        try:
            t(gm, lint_and_recompile=lint_and_recompile)
        except TransformationError as error:
            if self.on_failure == "raise":
                raise
            return Step(t, 0, (nodes, nodes), time.perf_counter() - began, kept=False, note=_first(error))
        seconds = time.perf_counter() - began
        done = history(gm)[-1]
        rewrites = len(done.rewrites)
        if limit is not None and self.strict_limit and (missed := limit.missed(rewrites)):
            there = f"{rewrites} rewrite{'s' * (rewrites != 1)} here" if rewrites else "no rewrite here"
            raise UsageError(f"the limit asks for rewrite {missed} of {t.signature}, which makes {there}")
        if limit is not None and rewrites:
            apart = [r.part.id for i, r in enumerate(done.rewrites, 1) if not limit.keeps(i)]
            undo_rewrites(gm, done.index, apart)
            done, rewrites = history(gm)[-1], rewrites - len(apart)
        if not rewrites and limit is not None and (made := len(history(gm)[-1].rewrites)):
            return Step(t, 0, (nodes, nodes), seconds, note=f"none of its {made} rewrites, by the limit")
        if not rewrites:
            misses = sum(1 for _ in t.misses(gm))
            note = f"did nothing; {misses} near-miss{'es' * (misses != 1)}" if misses else "did nothing"
            return Step(t, 0, (nodes, nodes), seconds, note=note)
        verification = questions.verify(gm)
        if verification is not None and not verification.ok:
            guilty = questions.guilty(before, t)
            if self.on_failure == "raise":
                raise VerificationError(f"{t.signature}: {verification.summary}{guilty}")
            if self.on_failure == "keep":
                note = f"kept, though it fails: {verification.summary}{guilty}"
                return Step(t, rewrites, (nodes, _count(gm)), seconds, True, note, verification)
            done.reverse()
            return Step(
                t, rewrites, (nodes, nodes), seconds, False, f"undone: {verification.summary}{guilty}", verification
            )
        in_sequence, alone = questions.time(before, gm, t)
        step = Step(t, rewrites, (nodes, _count(gm)), seconds, True, "", verification, in_sequence, alone)
        if self.on_regression == "undo" and in_sequence is not None and in_sequence.verdict == "slower":
            done.reverse()
            return Step(t, rewrites, (nodes, nodes), seconds, False, "undone: slower", verification, in_sequence, alone)
        return step


def _aligned(commits: Sequence[str], steps: Sequence[str]) -> dict[int, int]:
    """Which commit each step made: the longest common subsequence, of the latest commits; a step may have left none."""
    length = [[0] * (len(steps) + 1) for _ in range(len(commits) + 1)]
    for i, commit in enumerate(commits, 1):
        for j, step in enumerate(steps, 1):
            extended = length[i - 1][j - 1] + 1 if commit == step else 0
            length[i][j] = max(extended, length[i - 1][j], length[i][j - 1])
    found, i, j = {}, len(commits), len(steps)
    while i and j:
        if length[i][j] == length[i][j - 1]:
            j -= 1
        elif commits[i - 1] == steps[j - 1]:
            i, j = i - 1, j - 1
            found[j] = i
        else:
            i -= 1
    return found


def _count(gm: GraphModule) -> int:
    return sum(len(inner.graph.nodes) for inner in graphs(gm).values())


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]


class _Questions:
    """What a pipeline asks of each step, and what it needs to ask it: the original, and the graph before the step."""

    def __init__(self, pipeline: Pipeline, gm: GraphModule) -> None:
        self.pipeline = pipeline
        self.asked = pipeline.verify or pipeline.benchmark
        self.inputs: Any = pipeline.example_inputs
        self.last: Verification | None = None
        self.original: GraphModule | None = None
        self._console = Console(stderr=True)
        live = self._console.is_terminal or "ipykernel" in sys.modules
        self.show = (self.asked and live) if pipeline.show is None else pipeline.show
        if self.asked and self.inputs is None:
            raise UsageError("verify and benchmark need inputs; give compose(..., example_inputs=...)")
        if self.inputs is not None:
            propagate(gm, self.inputs)
        if self.asked:
            self.original = share(gm)
        self.baseline: Baseline | None = None
        if pipeline.verify and self.original is not None:
            self.baseline = Baseline(self.original, self.inputs, rtol=pipeline.rtol, atol=pipeline.atol)

    def copy(self, gm: GraphModule) -> GraphModule | None:
        return share(gm) if self.asked else None

    def verify(self, gm: GraphModule) -> Verification | None:
        if self.baseline is None:
            return None
        self.last = self.baseline.verify(gm)
        return self.last

    def guilty(self, before: GraphModule | None, t: Transformation) -> str:
        """Which rewrite of ``t`` is the first that breaks the graph, found by halving."""
        assert before is not None and self.baseline is not None
        again = t(share(before))
        rewrites = history(again)[-1].rewrites
        low, high = 0, len(rewrites)  # the first `low` are right, the first `high` are wrong
        while high - low > 1:
            middle = (low + high) // 2
            trial = share(again)
            for rewrite in history(trial)[-1].rewrites[middle:]:
                rewrite.reverse()
            if self.baseline.verify(trial).ok:
                low = middle
            else:
                high = middle
        found = rewrites[high - 1]
        return f"; by its rewrite {found.id}" + (f" ({found.source})" if found.source else "")

    def time(
        self, before: GraphModule | None, gm: GraphModule, t: Transformation
    ) -> tuple[Comparison | None, Comparison | None]:
        if not self.pipeline.benchmark or before is None or self.original is None:
            return None, None
        in_sequence = compare(before, gm, self.inputs, **self.pipeline.timing)
        if not commits(before) or all(not c.delta for c in commits(before)):
            return in_sequence, in_sequence  # the first step that did something stands alone already
        try:
            only = t(share(self.original))
        except FxoptError:  # it needs what an earlier step prepared; the table leaves the cell empty
            return in_sequence, None
        if not history(only)[-1].rewrites:
            return in_sequence, None
        return in_sequence, compare(self.original, only, self.inputs, **self.pipeline.timing)

    def total(self, gm: GraphModule) -> Comparison | None:
        if not self.pipeline.benchmark or self.original is None:
            return None
        return compare(self.original, gm, self.inputs, **self.pipeline.timing)

    @contextmanager
    def progress(self, steps: int) -> Iterator[Callable[[str], None]]:
        if not self.show or self._console.is_jupyter:  # a notebook shows a bar with ipywidgets alone
            with nullcontext():
                yield lambda _: None
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task("", total=steps + 1)

            def advance(name: str) -> None:
                bar.update(task, description=name, advance=1)

            yield advance


class Foreign(ReversibleTransformation):
    """A transformation that does not derive from ours: an optimum instance, or a function of a graph module."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.preserves_computation = bool(getattr(inner, "preserves_computation", False))

    @property
    def signature(self) -> str:
        if isinstance(self.inner, type) or not hasattr(self.inner, "transform"):
            return f"{getattr(self.inner, '__qualname__', type(self.inner).__qualname__)}"
        options = {k: v for k, v in sorted(vars(self.inner).items()) if not k.startswith("_")}
        return f"{type(self.inner).__qualname__}({', '.join(f'{k}={v!r}' for k, v in options.items())})"

    def transform(self, graph_module: GraphModule) -> GraphModule | None:
        call = getattr(self.inner, "transform", self.inner)
        result: GraphModule | None = call(graph_module)
        return result


def adopt(transformation: Any) -> Transformation:
    """A `Transformation` from one of ours, one of optimum's, or a function that edits a graph module in place."""
    if isinstance(transformation, Transformation):
        return transformation
    if isinstance(transformation, type):
        raise UsageError(
            f"compose was given the class {transformation.__name__}; give an instance, {transformation.__name__}()"
        )
    if callable(getattr(transformation, "transform", None)) or callable(transformation):
        return Foreign(transformation)
    raise UsageError(f"compose was given {transformation!r}, expected transformations or functions of a graph module")


def compose(
    *transformations: Any,
    inplace: bool = True,
    verify: bool = False,
    benchmark: bool = False,
    example_inputs: Inputs | None = None,
    on_failure: Literal["raise", "undo", "keep"] = "raise",
    on_regression: Literal["keep", "undo"] = "keep",
    rtol: float | None = None,
    atol: float | None = None,
    rounds: int | None = None,
    warmup: int | None = None,
    show: bool | None = None,
    limit: str | None = None,
) -> Pipeline:
    """
    Transformations in a row, applied left to right and undone right to left.

    Accepts fxopt's and optimum's transformations and functions that edit a graph module in place.

    ``inplace``: False works on a copy.  ``verify``: check every step against the original's own numbers
    (`fxopt.verify`).  ``benchmark``: time every step, as it stands in the sequence and alone on the original
    (`fxopt.benchmark`).  Both need ``example_inputs``: a tuple is positional, a dict is keywords.
    ``on_failure``: a step that fails or computes something else raises ("raise"; nothing is changed), is taken back
    alone ("undo"), or stays and is only said ("keep").  ``on_regression``: "undo" takes back a step that is measurably
    slower.  ``rtol``, ``atol``: see `fxopt.verify`.  ``rounds``, ``warmup``: see `fxopt.benchmark`.  ``show``: print
    progress and the table; by default where something is asked and a person watches.  ``limit``: run a part of the
    pipeline, as in "FuseLinearGELU:1-30": what comes before FuseLinearGELU, its first 30 rewrites, and nothing after
    (`fxopt.limit.Limit`).
    """
    for name, value, allowed in (
        ("on_failure", on_failure, ("raise", "undo", "keep")),
        ("on_regression", on_regression, ("keep", "undo")),
    ):
        if value not in allowed:
            raise UsageError(f"compose was given {name}={value!r}, expected one of {', '.join(map(repr, allowed))}")
    steps: list[Transformation] = []
    for t in map(adopt, transformations):
        if isinstance(t, Pipeline) and t.limit is not None:
            raise UsageError("compose was given a pipeline with a limit; give the limit to the outer compose")
        steps += t.transformations if isinstance(t, Pipeline) else [t]
    return Pipeline(
        steps,
        inplace=inplace,
        verify=verify,
        benchmark=benchmark,
        example_inputs=example_inputs,
        on_failure=on_failure,
        on_regression=on_regression,
        rtol=rtol,
        atol=atol,
        rounds=rounds,
        warmup=warmup,
        show=show,
        limit=limit,
    )


def repeat(transformation: Any, most: int = 10) -> Pipeline:
    """Apply ``transformation`` until it does nothing any more, at most ``most`` times."""
    return Repeated(adopt(transformation), most)


class Repeated(Pipeline):
    """A transformation applied until it does nothing any more."""

    def __init__(self, transformation: Transformation, most: int) -> None:
        super().__init__([transformation] * most)
        self.most = most

    @property
    def signature(self) -> str:
        return f"repeat({self.transformations[0].signature}, {self.most})"

    def run(self, gm: GraphModule, lint_and_recompile: bool = True) -> Result:
        questions = _Questions(self, gm)
        steps = []
        with atomic(gm):
            for t in self.transformations:
                steps.append(self._step(gm, t, questions, lint_and_recompile))
                if not steps[-1].rewrites:
                    break
        return Result(gm, tuple(steps))
