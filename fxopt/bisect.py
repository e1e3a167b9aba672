"""Which transformation, and which single rewrite of it, makes a graph fail.

First the transformations: the graph after the first k of them, by halving.  Then the rewrites of the guilty one: its
first k, the others taken back.  Then the one found is asked alone; if it does not fail alone, the others that it needs
are found by delta debugging.  One guilty rewrite of R, in one of P transformations, costs at most
⌈log₂P⌉ + ⌈log₂R⌉ + 3 probes: the original, all, and the one alone are the three.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

import fxopt
from fxopt import checks
from fxopt.bisection import Bisection
from fxopt.capture import capture
from fxopt.checks import OTHERWISE, ByCall, ByScript, Check, Failure, inputs_of
from fxopt.compose import Result, Step
from fxopt.delta import share
from fxopt.errors import FxoptError, UsageError
from fxopt.hint import hints
from fxopt.limit import spelled
from fxopt.portable import NotPortable
from fxopt.probing import Flaky, Probing
from fxopt.repro import Repro, folder_at
from fxopt.repro_texts import FLAKY
from fxopt.reproduce import of_check, of_pass, of_rewrite
from fxopt.samples import InputSet, normal_form
from fxopt.search import Items, Journal, Verdict, complete, halve, minimized, prefix
from fxopt.shapes import propagate
from fxopt.trials import Stage, Trials, flat, spans

JOURNAL = "bisect.jsonl"
_PATIENCE = 8  # how many that cannot be judged are asked in a row, before some of the suspects are left out instead
_MOST_PIECES = 8  # into which suspects are cut that cannot be judged one after the other
_MOST_TOGETHER = (
    8  # rewrites that are called guilty together; of more, it is only said that they could not be told apart
)


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
    repeat: int = 1,
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
    nothing counts as found.  ``repeat``: ask the check so often of each graph; where the answers are not the same it
    is flaky, and that is the result.  ``say`` gets a line for each probe as it is made.

    A check of one's own is asked again by a fresh process, of the graph without the guilty rewrite and of the one with
    it, or of the smallest part of both for which it answers; a function that no other process can import is asked again
    here, and the fresh process compares values.

    Raises `UsageError` if the original itself fails the check.
    """
    if not isinstance(repeat, int) or repeat < 1:
        raise UsageError(f"bisect was given repeat={repeat!r}, expected how often to ask of each graph, 1 or more")
    if resume and directory is None:
        raise UsageError("resume=True needs the directory of the bisection to resume; give directory=…")
    gm = _graph(model, example_inputs)
    asked = check if isinstance(check, Check) else checks.make(check, gm, example_inputs, rtol, atol)
    path = None if directory is None else folder_at(directory, "bisect") / JOURNAL
    search = _Search(gm, Trials(gm, flat(pipeline)), asked, say or (lambda line: None), repeat)
    if resume and path is not None and not path.exists():
        search.say(f"{path} is not there: nothing to resume, it begins anew")
    search.journal = Journal(path, search.about() | asked.about(), resume)
    return search.run((rtol, atol), confirm)


def _graph(model: nn.Module, example_inputs: Any) -> GraphModule:
    if not isinstance(model, nn.Module):
        raise UsageError(f"bisect was given a {type(model).__name__}, expected a module or a graph module")
    if isinstance(model, GraphModule):
        captured = model.meta.get("fxopt.capture")
        if example_inputs is None or (captured is not None and captured.route == "submodules"):
            return model  # there is eager code between the graphs
        sets = normal_form(example_inputs, model)
        for one in sets:
            _taken(model, one)
        return _propagated(share(model), sets[0])
    if example_inputs is None:
        raise UsageError("bisect needs example_inputs to capture a model; give them, or a graph module")
    return capture(model, inputs_of(normal_form(example_inputs, model)[0]))


def _taken(gm: GraphModule, case: InputSet) -> None:
    """Refuse what ``gm`` cannot be called with; a check of one's own might never call it with these."""
    try:
        inspect.signature(gm.forward).bind(*case.args, **case.kwargs)
    except TypeError as error:
        given = [*(f"{len(case.args)} positional" for _ in case.args[:1]), *case.kwargs]
        raise UsageError(
            f"the graph cannot be called with the {case.label} of example_inputs ({', '.join(given) or 'nothing'}): "
            f"{error}; it takes {', '.join(_taken_by(gm)) or 'none'}"
        ) from error


def _taken_by(gm: GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]


def _propagated(gm: GraphModule, case: InputSet) -> GraphModule:
    try:
        return propagate(gm, inputs_of(case))
    except FxoptError:
        raise
    except Exception as error:  # whatever an operator raises that is given what it cannot take
        first = next(iter(str(error).splitlines()), "")
        raise UsageError(
            f"the graph does not run on the example_inputs ({type(error).__name__}: {first}); it takes "
            f"{', '.join(_taken_by(gm)) or 'none'}"
        ) from error


class _Search(Probing):
    """One bisection under way."""

    # --- the search

    def run(self, tolerances: tuple[float | None, float | None], confirm: bool) -> Bisection:
        """The result; ``tolerances`` are for the reproducer, which is run in a fresh process if ``confirm``."""
        try:
            return self._run(tolerances, confirm)
        except Flaky as problem:
            self.notes.append(str(problem))
            return self._result(flaky=True)

    def _run(self, tolerances: tuple[float | None, float | None], confirm: bool) -> Bisection:
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
        low, high = halve(low, high, self._prefix, _PATIENCE)
        if high - low > 1:
            return self._undecided(low, high, tolerances, confirm)
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
                limit = self.name(stage)
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
                self._advise()
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
        return self._reproduced(found, items, context, tolerances, confirm)

    def _reproduced(
        self,
        found: Bisection,
        items: Items,
        context: Items,
        tolerances: tuple[float | None, float | None],
        confirm: bool,
    ) -> Bisection:
        """``found`` with what shows it again: the graphs with ``context`` alone, and with ``items`` too."""
        assert found.transformation is not None
        self.say(f"culprit: {found.rewrite.id if found.rewrite else found.transformation.signature}")
        before, after = self.trials.build(context), self.trials.build(context | items)
        title, facts = self._title(found), self._facts(found)
        assert self.failure is not None
        if not isinstance(self.check, ByCall | ByScript):
            made = of_rewrite(before, after, self.check, self.failure, title, facts, tolerances)
            return self._confirmed(found, made, confirm)
        self.say("looking for the smallest part that shows it")
        try:
            own = of_check(before, after, self.check, title, facts, self._times)
            return self._confirmed(found, own, confirm)
        except NotPortable as problem:
            made = of_rewrite(before, after, self.check, self.failure, title, facts, tolerances)
            why = f"the check cannot be taken to a fresh process ({problem})"
            if isinstance(made, str):
                return self._confirmed(found, f"{why}, and {made}; put the check into a module", confirm)
            self._ask_again(before, after)
            found = replace(found, notes=(*found.notes, f"{why}: it was asked again here, and values compared there"))
            return self._confirmed(found, made, confirm)

    @property
    def _times(self) -> int:
        """How often the check is asked of each graph of the reproducer."""
        return max(2, self.repeat)

    def _ask_again(self, before: GraphModule, after: GraphModule) -> None:
        """Ask the check of both graphs once more; raises `Flaky` where it says something else."""
        for gm, expected in ((before, "good"), (after, "bad")):
            said = [self.check.judge(gm).verdict(self.failure)[0] for _ in range(self._times)]
            if set(said) != {expected}:
                which = "without" if expected == "good" else "with"
                raise Flaky(f"{FLAKY}: {expected}, then {', '.join(said)} (the graph {which} the rewrite)")

    def _confirmed(self, found: Bisection, made: Repro | str, confirm: bool) -> Bisection:
        if isinstance(made, str):
            return replace(found, notes=(*found.notes, f"no reproducer: {made}"))
        if not confirm:
            return replace(found, repro=replace(made, note="it was not tried"))
        self.say("running the reproducer in a fresh process")
        tried = made.confirm()
        if FLAKY in tried.note:
            notes = (*found.notes, tried.note)
            return replace(found, repro=tried, flaky=True, notes=notes, transformation=None, rewrite=None, hints=())
        if not tried.confirmed and isinstance(self.check, ByCall | ByScript) and self.repeat == 1:
            found = replace(found, notes=(*found.notes, "whether the check is flaky, repeat=3 (--repeat 3) tells"))
        return replace(found, repro=tried)

    def _broken(self, confirm: bool) -> Bisection:
        """The result, where a transformation raises."""
        assert self.trials.broken is not None
        index, error = self.trials.broken
        t = self.trials.transformations[index]
        kind = type(error.__cause__ or error).__name__
        self.say(f"all: {error}")
        everything = prefix(self.trials.count)
        if everything and self.record(everything) != "good":
            note = self.record.answers[everything].note
            self.notes.append(
                f"what comes before it is not good either: {note}; bisect the passes before {self.name_at(index)}"
            )
        good = self.name_at(index - 1) if index and self.record.answers[everything].verdict == "good" else None
        self.failure = Failure(f"raised {kind}", t.signature, str(error))
        before = self.trials.build(everything)
        count = len(before.graph.nodes)
        found = replace(
            self._result(),
            transformation=t,
            last_good=good,
            first_bad=self.name_at(index),
            gm=before,
            result=Result(before, (Step(t, 0, (count, count), 0.0, kept=False, note=str(error)),)),
        )
        return self._confirmed(found, of_pass(before, t, error, self._title(found), self._facts(found)), confirm)

    def _undecided(
        self, low: int, high: int, tolerances: tuple[float | None, float | None], confirm: bool
    ) -> Bisection:
        """The result, where all between ``low``, which is good, and ``high``, which is bad, was skipped."""
        items = self._bad_alone(low, high)
        if len(items) > _MOST_TOGETHER or len(items) == high - low:
            low, high = halve(low, high, self._prefix)
            if high - low == 1:
                return self._guilty(high, tolerances, confirm)
            items = items & frozenset(range(low + 1, high + 1))
        self._advise()
        good, bad = self.limit(low), self.limit(high)
        if len(items) <= _MOST_TOGETHER and len(items) < high - low:
            for n in sorted(items) if len(items) > 1 else ():
                if self.record(prefix(low) | items - {n}) == "skip":
                    self.notes.append(f"whether it fails without {self.trials.rewrite(n).id} could not be judged")
            found = self._result(self.trials.stage(max(items)), items, max(items))
            found = replace(found, last_good=good, first_bad=bad)
            return self._reproduced(found, items, prefix(low), tolerances, confirm)
        stages = {self.trials.stage(n).index: self.trials.stage(n) for n in items}
        found = self._result()
        if len(stages) == 1:
            found = replace(found, transformation=next(iter(stages.values())).transformation)
        suspects = tuple(self.trials.rewrite(n) for n in sorted(items))
        return replace(found, suspects=suspects, last_good=good, first_bad=bad)

    def _prefix(self, count: int) -> Verdict:
        return self.record(prefix(count))

    def _bad_alone(self, low: int, high: int) -> Items:
        """
        The fewest found of the rewrites after ``low`` up to ``high`` that are bad without the others of them.

        What hides the failure, or cannot be judged, may be left out: first whole transformations, then rewrites.
        """
        context, suspects = prefix(low), frozenset(range(low + 1, high + 1))
        groups = [frozenset(n for n in suspects if s.first <= n <= s.last) for s in self.trials.stages]
        groups = [g for g in groups if g]

        def together(numbers: Items) -> Items:
            return frozenset[int]().union(*(groups[i] for i in numbers))

        chosen = minimized(
            frozenset(range(len(groups))), lambda some: self.record(context | together(some)), _MOST_PIECES
        )
        return minimized(together(chosen), lambda some: self.record(context | some), _MOST_PIECES)

    def _advise(self) -> None:
        """Say what stood in the way of the search, and what to do about it."""
        skipped = {items: a for items, a in self.record.answers.items() if a.verdict == "skip"}
        otherwise = [i for i, a in skipped.items() if i and i == prefix(len(i)) and a.note.startswith(OTHERWISE)]
        if otherwise:
            first = min(otherwise, key=len)
            limit = self.limit(len(first))
            self.notes.append(
                f"something else is wrong too: with limit={limit!r} it {skipped[first].note}; "
                "bisect the passes up to there to find that"
            )
        elif skipped:
            note = next(iter(skipped.values())).note
            self.notes.append(f"some graphs could not be judged ({note}); a check that judges them would tell more")

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
            first_bad=self.limit(number),
            notes=tuple(self.notes),
            flaky=flaky,
            count=self.trials.count,
            gm=self.trials.build(prefix(number or self.trials.count)),
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
