"""What shows a failure again: the graphs without and with the guilty rewrites, cut down; or the pass that raises."""

from __future__ import annotations

import functools
import math
import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch.fx import GraphModule

from fxopt import catalogue, serial
from fxopt.checks import SLOWER, Against, ByCall, ByScript, Check, Failure, Slower, without_history, write_graph
from fxopt.compose import Foreign, Result, Step, adopt
from fxopt.delta import graph_of, graphs, share, snapshot
from fxopt.difference import diff
from fxopt.errors import FxoptError, StoreError, TransformationError
from fxopt.portable import NotPortable, Portable, portable
from fxopt.reduce import Cut, reduce, shortest
from fxopt.report import report
from fxopt.repro import Repro, write_graphs, write_inputs, write_json, write_portable, write_script
from fxopt.repro_texts import AGAIN, ASK, CALL, COMPARE, FLAKY, INPUTS, PASS, SCRIPT, TIME
from fxopt.samples import InputSet
from fxopt.transformation import Transformation

_MOST_ASKED = 6  # parts of which a check of the caller's own is asked: each may take it minutes


def of_rewrite(
    before: GraphModule,
    after: GraphModule,
    check: Check,
    failure: Failure,
    title: str,
    facts: Mapping[str, Any],
    tolerances: tuple[float | None, float | None] = (None, None),
) -> Repro | str:
    """
    A reproducer from the graphs without and with the guilty rewrites, cut down; or why there is none.

    For a check of the caller's own that no other process can ask, it shows what differs in value on the example inputs.
    """
    case = next((c for c in check.cases if c.label == failure.input_set), check.cases[0] if check.cases else None)
    if case is None:
        return "without example_inputs there is nothing to run before and after on"
    before, after, case = _inside(before, after, case)
    own = not isinstance(check, Against | Slower)
    if own:
        failure = _difference(before, after, case, tolerances) or failure
        if failure.kind in ("check", "script") or failure.kind.startswith("raised"):
            return "before and after compute the same on the example inputs"
    timed = isinstance(check, Slower)

    def fails(a: GraphModule, b: GraphModule, inputs: tuple[Any, ...]) -> bool:
        return _fails_alike(a, b, inputs, failure, tolerances)

    cut = reduce(before, after, case, fails, by="ends" if timed else "values")
    if cut is None:
        return "before and after, run alone on the inputs that failed, do not differ in the same way"
    if timed:
        threshold = max(SLOWER, min(2.0, math.sqrt(_ratio(cut))))
        script = Template(TIME).substitute(again=AGAIN, threshold=repr(round(threshold, 3)))
    else:
        script = Template(COMPARE).substitute(
            again=AGAIN, rtol=repr(tolerances[0]), atol=repr(tolerances[1]), kind=repr(failure.kind)
        )
    writers = (
        lambda folder: write_graphs(folder, {"before": cut.before, "after": cut.after}),
        lambda folder: write_inputs(folder, cut),
        lambda folder: write_script(folder, title, INPUTS + script),
        lambda folder: _write_report(folder, title, cut.before, cut.after),
    )
    return Repro(title, facts, writers, cut.nodes, cut.whole)


def _write_report(folder: Path, title: str, before: GraphModule, after: GraphModule) -> None:
    report(diff(before, after), folder / "report.html", title=title)


def _inside(before: GraphModule, after: GraphModule, case: InputSet) -> tuple[GraphModule, GraphModule, InputSet]:
    """The inner graph module in which alone the two differ, if there is one, with the inputs of its first call."""
    a, b = snapshot(before), snapshot(after)
    records = ((key, a.record(key), b.record(key)) for key in {**a.raw, **b.raw})
    paths = {graph_of(key) for key, old, new in records if old is None or not old.same(new)}
    if len(paths) != 1 or "" in paths:
        return before, after, case
    path, calls = next(iter(paths)), []
    twin = share(before)
    twin.get_submodule(path).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        case.clone().call(twin)
    if not calls:
        return before, after, case
    args, kwargs = calls[0]
    inner = InputSet(tuple(args), dict(kwargs), case.label, names=tuple(f"args[{i}]" for i in range(len(args)))).clone()
    old, new = (graphs(gm)[path] for gm in (before, after))
    return old, new, inner


def _difference(
    before: GraphModule, after: GraphModule, case: InputSet, tolerances: tuple[float | None, float | None]
) -> Failure | None:
    found = Against("outputs", before, case, *tolerances, n_drawn=0).judge(after)
    return found.failures[0] if found.failures else None


def _fails_alike(
    before: GraphModule,
    after: GraphModule,
    inputs: tuple[Any, ...],
    failure: Failure,
    tolerances: tuple[float | None, float | None],
) -> bool:
    try:
        if failure.kind == "slower":
            found = Slower(before, inputs).judge(after)
        else:
            found = Against("outputs", before, inputs, *tolerances, n_drawn=0).judge(after)
    except FxoptError:  # the part before the rewrite does not run alone
        return False
    return any(f.kind == failure.kind for f in found.failures)


def _ratio(cut: Cut) -> float:
    found = Slower(cut.before, cut.inputs).judge(cut.after)
    return found.failures[0].ratio if found.failures else 1.0


# ------------------------------------------------------------------------------------------ a check of the caller's own


def of_check(
    before: GraphModule,
    after: GraphModule,
    check: ByCall | ByScript,
    title: str,
    facts: Mapping[str, Any],
    times: int = 2,
) -> Repro:
    """
    A reproducer that asks ``check`` itself, ``times`` times of each graph, on the smallest part that it answers for.

    Where it takes nothing but the whole graph, that is what it is asked of.  Raises `NotPortable` where the check is a
    function that no other process can import.
    """
    found = None if isinstance(check, ByScript) else portable(check.function)
    cut = _part_for(before, after, check)
    case = check.cases[0] if check.cases else InputSet((), {}, "no inputs")
    if cut is not None:
        before, after, case = cut.before, cut.after, _named(cut.inputs, cut.before)
    writers: list[Callable[[Path], object]] = []
    if isinstance(check, ByScript):
        writers.append(lambda folder: write_graph(before, folder / "before", case))
        writers.append(lambda folder: write_graph(after, folder / "after", case))
        ask = Template(SCRIPT).substitute(command=repr(check.command), folder=repr(os.getcwd()))
    else:
        assert isinstance(found, Portable)
        writers.append(lambda folder: write_graphs(folder, {n: without_history(g) for n, g in pair.items()}))
        writers.append(lambda folder: write_portable(folder, found))
        ask = Template(CALL).substitute(check=repr(str(found)))
    pair = {"before": before, "after": after}
    body = ask + Template(ASK).substitute(again=AGAIN, flaky=FLAKY, times=times)
    writers.append(lambda folder: write_script(folder, title, body))
    writers.append(lambda folder: _write_report(folder, title, before, after))
    return Repro(title, facts, tuple(writers), (_size(before), _size(after)), cut is None)


def _part_for(before: GraphModule, after: GraphModule, check: ByCall | ByScript) -> Cut | None:
    """The smallest part of both graphs of which ``check`` says good before and bad after; None if there is none."""
    if not check.cases:
        return None
    strange = 0

    def fails(a: GraphModule, b: GraphModule, inputs: tuple[Any, ...]) -> bool:
        nonlocal strange
        if strange > 1:  # it asks for the whole model, whose inputs and outputs no part has
            return False
        case = _named(inputs, a)
        if not _good(check, a, case):
            strange += 1
            return False
        return bool(check.judge_on(b, case).failures)

    return reduce(before, after, check.cases[0], fails, by="both", most=_MOST_ASKED, whole=False)


def _good(check: ByCall | ByScript, gm: GraphModule, case: InputSet) -> bool:
    try:
        said = check.judge_on(gm, case)
    except FxoptError:  # a script that aborts; or what the part holds cannot be written
        return False
    return not said.failures and not said.skip


def _named(inputs: tuple[Any, ...], gm: GraphModule) -> InputSet:
    names = tuple(str(n.target) for n in gm.graph.nodes if n.op == "placeholder")
    return InputSet(inputs, {}, "the inputs of a part", names=names)


def _size(gm: GraphModule) -> int:
    return sum(n.op.startswith("call_") for n in gm.graph.nodes)


# -------------------------------------------------------------------------------------------------- a pass that raises


def of_pass(
    before: GraphModule, transformation: Transformation, error: BaseException, title: str, facts: Mapping[str, Any]
) -> Repro | str:
    """A reproducer of a transformation that raises; or why there is none."""
    try:
        found, saved = _written(transformation)
    except StoreError:
        return f"{transformation.signature} has options that are no plain values, so it cannot be written"
    except NotPortable as problem:
        return f"{transformation.signature} cannot be taken to another process: {problem}; put it into a module"
    kind = type(error.__cause__).__name__
    before = shortest(without_history(before), functools.partial(_raises, transformation, error))
    count = len(before.graph.nodes)
    step = Step(transformation, 0, (count, count), 0.0, kept=False, note=str(error))
    writers: tuple[Callable[[Path], object], ...] = (
        lambda folder: write_graphs(folder, {"before": before}),
        lambda folder: write_json(folder / "transformation.json", saved),
        lambda folder: write_portable(folder, found),
        lambda folder: write_script(folder, title, Template(PASS).substitute(again=AGAIN, kind=repr(kind))),
        lambda folder: report(Result(before, (step,)), folder / "report.html", title=title),
    )
    return Repro(title, facts, writers, (_size(before), _size(before)))


def _written(transformation: Transformation) -> tuple[Portable, dict[str, Any]]:
    """How another process finds the class or function of ``transformation``, and the rest of it as plain values."""
    inner = transformation.inner if isinstance(transformation, Foreign) else transformation
    if isinstance(inner, types.FunctionType):
        found = portable(inner)
        return found, {"function": str(found)}
    saved = catalogue.to_json(inner)
    found = portable(type(inner))
    return found, {**saved, "class": str(found), "foreign": inner is not transformation}


def read_transformation(saved: Mapping[str, Any]) -> Transformation:
    """The transformation of a reproducer's transformation.json."""
    if "function" in saved:
        return adopt(serial.find(saved["function"]))
    if not saved["foreign"]:
        return catalogue.from_json(saved)
    kind = serial.find(saved["class"])
    made = kind.__new__(kind)
    vars(made).update(catalogue.read_options(saved, frozen=False))
    return adopt(made)


def _raises(transformation: Transformation, expected: BaseException, part: GraphModule) -> bool:
    """Whether ``transformation`` raises likewise on ``part``, as it is after being written and read."""
    try:
        again = serial.from_json(*serial.to_json(part))
    except (StoreError, RuntimeError, TypeError, ValueError):  # it cannot be written, or its shapes do not fit together
        return False
    try:
        transformation(again)
    except TransformationError as error:
        return type(error) is type(expected) and type(error.__cause__) is type(expected.__cause__)
    return False
