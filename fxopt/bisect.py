"""Which transformation, and which single rewrite of it, makes a graph fail.

First the transformations: the graph after the first k of them, by halving.  Then the rewrites of the guilty one: its
first k, the others taken back.  Then the one found is asked alone; if it does not fail alone, the others that it needs
are found by delta debugging.  One guilty rewrite of R, in one of P transformations, costs at most
⌈log₂P⌉ + ⌈log₂R⌉ + 3 probes: the original, all, and the one alone are the three.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

import fxopt
from fxopt import checks
from fxopt.bisection import Bisection, Probe
from fxopt.capture import capture
from fxopt.checks import ByScript, Check, Failure
from fxopt.delta import share
from fxopt.errors import UsageError
from fxopt.hint import hints
from fxopt.limit import spelled
from fxopt.repro import Repro, of_pass, of_rewrite, of_script
from fxopt.search import Answer, Items, Journal, Record, complete, halve, minimized, prefix
from fxopt.shapes import propagate
from fxopt.trials import Stage, Trials, Unbuildable, flat, spans

JOURNAL = "bisect.jsonl"


def _short(answer: Answer) -> str:
    """What is new in an answer that is not the first of its kind."""
    return answer.note if answer.verdict == "skip" else answer.note.partition(" (")[0].partition(" on ")[0]


def _total(tensor: torch.Tensor) -> str:
    """A number that tells tensors apart, for the journal: the same model with other weights is another bisection."""
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return "" if dense.is_meta else repr(dense.detach().double().nan_to_num().sum().item())


def bisect(
    model: nn.Module,
    pipeline: Any,
    check: str | Callable[[GraphModule], bool | None] | Check = "outputs",
    example_inputs: Any = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    directory: str | Path | None = None,
    resume: bool = False,
    confirm: bool = True,
    say: Callable[[str], None] | None = None,
) -> Bisection:
    """
    Find the transformation and the rewrite that make ``model`` fail; neither it nor any graph of the caller's changes.

    ``model``: a graph module, or a module to capture.  ``pipeline``: what `compose` returns, or takes.  ``check``:
    "outputs" (another result than the original, `fxopt.verify`), "nan" (NaN or Inf where the original has none),
    "crash" (it raises where the original runs), "slower" (than the original, measurably), or a function
    ``gm -> bool | None``: True is good, False or an exception is bad, None cannot be judged.  All but a function need
    ``example_inputs``: a tuple is positional, a dict is keywords; also a list of those.  ``rtol``, ``atol``: see
    `fxopt.verify`.

    The failure of the whole pipeline is remembered, and only the same one (the same output, in the same way) counts;
    where all is good, each transformation is asked whether something fails there that a later one hides.  A
    transformation that raises is itself the culprit.  ``directory``: keep a journal of the answers there, from which
    ``resume`` goes on; nothing is kept elsewhere.  ``confirm=False`` makes the reproducer but does not run it, so that
    nothing counts as found.  ``say`` gets a line for each probe as it is made.

    Raises `UsageError` if the original itself fails the check.
    """
    gm = _graph(model, example_inputs)
    asked = check if isinstance(check, Check) else checks.make(check, gm, example_inputs, rtol, atol)
    path = None
    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        path = Path(directory) / JOURNAL
    elif resume:
        raise UsageError("resume=True needs the directory of the bisection to resume; give directory=…")
    search = _Search(gm, Trials(gm, flat(pipeline)), asked, say or (lambda line: None))
    search.journal = Journal(path, search.about() | asked.about(), resume)
    return search.run((rtol, atol), confirm)


def _graph(model: nn.Module, example_inputs: Any) -> GraphModule:
    if not isinstance(model, nn.Module):
        raise UsageError(f"bisect was given a {type(model).__name__}, expected a module or a graph module")
    first = example_inputs[0] if isinstance(example_inputs, list) and example_inputs else example_inputs
    if isinstance(model, GraphModule):
        captured = model.meta.get("fxopt.capture")
        if first is None or (captured is not None and captured.route == "submodules"):  # eager code between the graphs
            return model
        return propagate(share(model), first)
    if first is None:
        raise UsageError("bisect needs example_inputs to capture a model; give them, or a graph module")
    return capture(model, first)


class _Search:
    """One bisection under way."""

    def __init__(self, gm: GraphModule, trials: Trials, check: Check, say: Callable[[str], None]) -> None:
        self.gm, self.trials, self.check, self.say = gm, trials, check, say
        self.journal = Journal(None, {})
        self.record = Record(self._answer)
        self.failure: Failure | None = None
        self.probes: list[Probe] = []
        self.notes: list[str] = []

    def about(self) -> dict[str, Any]:
        """What is bisected, for the journal."""
        text = [f"{n.name} {n.op} {n.args} {n.kwargs}" for n in self.gm.graph.nodes]
        tensors = [*self.gm.state_dict().items(), *(pair for case in self.check.cases for pair in case.tensors())]
        text += [f"{name} {t.dtype} {tuple(t.shape)} {_total(t)}" for name, t in tensors]
        return {
            "graph": hashlib.sha256("\n".join(text).encode()).hexdigest()[:16],
            "pipeline": [t.signature for t in self.trials.transformations],
        }

    # --- asking

    def _answer(self, items: Items) -> Answer:
        try:
            gm = self.trials.build(items)
        except Unbuildable as problem:
            return Answer("skip", str(problem))
        return self._probe(spans(items) or "0", self._what(items), gm)

    def _probe(self, key: str, what: str, gm: GraphModule) -> Answer:
        asked_before = sum(p.what == what for p in self.probes)
        key = f"{key} again" if asked_before else key
        known = self.journal.answer(key)
        answer = known or self._judge(gm)
        if known is None:
            self.journal.note(key, answer)
        if self.failure is None and answer.verdict == "bad":
            self.failure = Failure(**answer.data)
            self.check.remember(self.failure)
        note = answer.note if len(self.probes) < 2 else _short(answer)
        self.probes.append(Probe(what, answer.verdict, note, answer.seconds, known is not None))
        self.say(f"probe {len(self.probes)}: {self.probes[-1]}")
        return answer

    def _judge(self, gm: GraphModule) -> Answer:
        began = time.perf_counter()
        judgement = self.check.judge(gm)
        verdict, note = judgement.verdict(self.failure)
        data = judgement.failures[0].to_json() if judgement.failures else {}
        return Answer(verdict, note, time.perf_counter() - began, data)

    def _what(self, items: Items) -> str:
        """A set of rewrites in words."""
        if not items:
            return "the original"
        if len(items) == self.trials.count:
            return "all"
        top = self.trials.stage(max(items))
        if items == prefix(top.last):
            return f"transformations 1–{top.index + 1} (to {self._name(top)})"
        mine = frozenset(n - top.first + 1 for n in items if n >= top.first)
        below = frozenset(n for n in items if n < top.first)
        if below == prefix(top.first - 1) and mine == prefix(len(mine)):
            return f"rewrites 1–{len(mine)} of {len(top.parts)} of {self._name(top)}"
        if len(items) == 1:
            return f"rewrite {spans(mine)} of {self._name(top)} alone"
        if below == prefix(top.first - 1):
            return f"rewrites {spans(mine)} of {self._name(top)}, after all before it"
        return f"rewrites {spans(items)} of the pipeline"

    def _name(self, stage: Stage) -> str:
        return spelled(self.trials.transformations, stage.index)

    # --- the search

    def run(self, tolerances: tuple[float | None, float | None], confirm: bool) -> Bisection:
        self._original()
        if self.trials.broken is not None:
            return self._broken(confirm)
        everything = prefix(self.trials.count)
        if not everything or self.record(everything) != "bad":
            if everything and self.record.answers[everything].verdict == "skip":
                self.notes.append(f"the whole pipeline cannot be judged: {self.record.answers[everything].note}")
            self._look_for_hidden()
            return replace(self._result(), failure=None)
        assert self.failure is not None
        low, high = self._transformation()
        low, high = halve(low, high, lambda k: self.record(prefix(k)))
        if high - low > 1:
            return self._undecided(low, high)
        return self._guilty(high, tolerances, confirm)

    def _original(self) -> None:
        self.record(frozenset())
        answer = self.record.answers[frozenset()]
        if answer.verdict == "good":
            return
        reason = "cannot be judged" if answer.verdict == "skip" else "fails the check itself"
        raise UsageError(f"the original {reason}: {answer.note}; bisect needs a check that the original passes")

    def _look_for_hidden(self) -> None:
        """Where all together are good: say whether they fail on the way, and the rest hides it."""
        for stage in self.trials.stages[:-1]:
            if self.record(prefix(stage.last)) == "bad":
                limit = self._name(stage)
                self.notes.append(f"not monotonic: with limit={limit!r} it fails, and what comes later hides that")
                return

    def _transformation(self) -> tuple[int, int]:
        """The numbers of the last rewrite that is still good and of the first that is bad, to whole transformations."""
        ends = [0, *(s.last for s in self.trials.stages)]
        low, high = halve(0, len(ends) - 1, lambda k: self.record(prefix(ends[k])))
        return ends[low], ends[high]

    def _guilty(self, number: int, tolerances: tuple[float | None, float | None], confirm: bool) -> Bisection:
        """The result, where the first ``number`` rewrites are bad and one fewer are good."""
        items: Items = frozenset({number})
        context = self._alone(items)
        if (context is None and self.record(items) == "good") or self._needs_others(items):
            # Rare enough to ask the two answers that say so again.
            if any([self.record.doubt(prefix(number)), self.record.doubt(prefix(number - 1))]):
                return self._result(flaky=True)
            low = 0 if self.record(items) == "good" else len(self._before(items))
            items, range_ = complete(number - 1, items, self.record, lambda some: self._alone(some) is not None, low)
            context = self._alone(items)
            if range_ is not None:
                self.notes.append(f"rewrites {range_[0]}–{range_[1]} of the pipeline could not be told apart")
        if context is None:
            self.notes.append("it cannot be judged without what was applied before it")
            context = prefix(number) - items
        if len(items) > 1:
            items = minimized(items, lambda some: self.record(some | context))
        return self._named(number, items, context, tolerances, confirm)

    def _before(self, items: Items) -> Items:
        """All that the transformations before those of ``items`` do."""
        return prefix(self.trials.stage(min(items)).first - 1)

    def _alone(self, items: Items) -> Items | None:
        """What ``items`` need in order to be bad: nothing, or all transformations before theirs; None if it is more."""
        if (verdict := self.record(items)) == "bad":
            return frozenset()
        before = self._before(items)
        if verdict == "skip" and before and self.record(items | before) == "bad":
            return before
        return None

    def _needs_others(self, items: Items) -> bool:
        """Whether ``items``, which do not exist alone, are good after all transformations before theirs."""
        return self.record(items) == "skip" and self.record(items | self._before(items)) == "good"

    def _named(
        self,
        number: int,
        items: Items,
        context: Items,
        tolerances: tuple[float | None, float | None],
        confirm: bool,
    ) -> Bisection:
        if (masked := self.record.masked()) is not None:
            bad, good = masked
            hiding = spans(good - bad)
            self.notes.append(f"not monotonic: rewrites {spans(bad)} of the pipeline are bad, and good with {hiding}")
        stage = self.trials.stage(number)
        found = self._result(stage, items, number)
        self.say(f"culprit: {found.rewrite.id if found.rewrite else stage.transformation.signature}")
        before, after = self.trials.build(context), self.trials.build(context | items)
        title, facts = self._title(found), self._facts(found)
        assert self.failure is not None
        made: Repro | str
        if isinstance(self.check, ByScript):
            made = of_script(before, after, self.check.cases[0], self.check.command, title, facts)
        else:
            made = of_rewrite(before, after, self.check, self.failure, title, facts, tolerances)
        return self._confirmed(found, made, confirm)

    def _confirmed(self, found: Bisection, made: Repro | str, confirm: bool) -> Bisection:
        if isinstance(made, str):
            return replace(found, notes=(*found.notes, f"no reproducer: {made}"))
        if not confirm:
            return replace(found, repro=replace(made, note="it was not tried"))
        self.say("running the reproducer in a fresh process")
        return replace(found, repro=made.confirm())

    def _broken(self, confirm: bool) -> Bisection:
        """The result, where a transformation raises."""
        assert self.trials.broken is not None
        index, error = self.trials.broken
        t = self.trials.transformations[index]
        kind = type(error.__cause__ or error).__name__
        self.failure = Failure(f"raised {kind}", t.signature, str(error))
        self.say(f"all: {error}")
        found = replace(
            self._result(),
            transformation=t,
            last_good=spelled(self.trials.transformations, index - 1) if index else None,
            first_bad=spelled(self.trials.transformations, index),
        )
        before = self.trials.build(prefix(self.trials.count))
        return self._confirmed(found, of_pass(before, t, error, self._title(found), self._facts(found)), confirm)

    def _undecided(self, low: int, high: int) -> Bisection:
        """The result, where all between ``low``, which is good, and ``high``, which is bad, was skipped."""
        stages = {self.trials.stage(n).index: self.trials.stage(n) for n in range(low + 1, high + 1)}
        found = self._result()
        if len(stages) == 1:
            found = replace(found, transformation=next(iter(stages.values())).transformation)
        suspects = tuple(self.trials.rewrite(n) for n in range(low + 1, high + 1))
        return replace(found, suspects=suspects, last_good=self._limit(low), first_bad=self._limit(high))

    def _limit(self, number: int) -> str | None:
        """The limit that stops after the rewrite of that number."""
        if not number:
            return None
        stage = self.trials.stage(number)
        return spelled(self.trials.transformations, stage.index, number - stage.first + 1)

    def _result(
        self, stage: Stage | None = None, items: Items = frozenset(), number: int = 0, flaky: bool = False
    ) -> Bisection:
        rewrites = tuple(self.trials.rewrite(n) for n in sorted(items))
        hinted = [h for n in sorted(items) for h in self._hints(n)]
        good = None
        if stage is not None:
            good = spelled(self.trials.transformations, stage.index, number - stage.first)
        return Bisection(
            failure=self.failure,
            transformation=None if stage is None else stage.transformation,
            rewrite=rewrites[-1] if rewrites else None,
            interacting=rewrites if len(rewrites) > 1 else (),
            suspects=(),
            probes=tuple(self.probes),
            hints=tuple(dict.fromkeys(hinted)),
            repro=None,
            last_good=good,
            first_bad=self._limit(number),
            notes=tuple(self.notes),
            flaky=flaky,
            count=self.trials.count,
        )

    def _hints(self, number: int) -> tuple[str, ...]:
        before, after = self.trials.build(prefix(number - 1)), self.trials.build(prefix(number))
        return hints(before, after, self.trials.part(number))

    def _title(self, found: Bisection) -> str:
        assert found.transformation is not None and found.failure is not None
        what = " with ".join(r.id for r in found.interacting) or (
            found.rewrite.id if found.rewrite else f"{found.transformation.signature} itself"
        )
        return f"{what}\n\n{found.failure.text}"

    def _facts(self, found: Bisection) -> dict[str, Any]:
        """What `repro.json` says."""
        kept = ("failure", "transformation", "rewrite", "interacting", "hints", "last_good", "first_bad")
        versions = {"fxopt": fxopt.__version__, "torch": torch.__version__}
        return {k: v for k, v in found.to_json().items() if k in kept} | {"versions": versions}
