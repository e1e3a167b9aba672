"""The questions of a bisection: a part of the pipeline applied, judged, written into the journal and told."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from fxopt.bisection import Probe
from fxopt.checks import Check, Failure
from fxopt.limit import spelled
from fxopt.portable import digest, total
from fxopt.repro_texts import FLAKY
from fxopt.search import Answer, Items, Journal, Record, prefix
from fxopt.trials import Stage, Trials, Unbuildable, spans


def _short(answer: Answer) -> str:
    """What is new in an answer that is not the first of its kind."""
    return answer.note if answer.verdict == "skip" else answer.note.partition(" (")[0].partition(" on ")[0]


class Flaky(Exception):
    """The check gave several answers for one graph: the message says which."""


class Probing:
    """The answers of one bisection: each graph is asked about once, and told."""

    def __init__(
        self, gm: GraphModule, trials: Trials, check: Check, say: Callable[[str], None], repeat: int = 1
    ) -> None:
        self.gm, self.trials, self.check, self.say, self.repeat = gm, trials, check, say, repeat
        self.journal = Journal(None, {})
        self.record = Record(self.answer)
        self.failure: Failure | None = None
        self.probes: list[Probe] = []
        self.notes: list[str] = []

    def about(self) -> dict[str, Any]:
        """What is bisected, for the journal."""
        text = [f"{n.name} {n.op} {n.args} {n.kwargs}" for n in self.gm.graph.nodes]
        tensors = [*self.gm.state_dict().items(), *(pair for case in self.check.cases for pair in case.tensors())]
        text += [f"{name} {t.dtype} {tuple(t.shape)} {total(t)}" for name, t in tensors]
        return {
            "graph": hashlib.sha256("\n".join(text).encode()).hexdigest()[:16],
            "pipeline": [t.signature for t in self.trials.transformations],
            "code of the passes": [digest(getattr(t, "inner", type(t))) for t in self.trials.transformations],
            "repeat": self.repeat,
        }

    # --- asking

    def answer(self, items: Items) -> Answer:
        try:
            gm = self.trials.build(items)
        except Unbuildable as problem:
            return Answer("skip", str(problem))
        return self._probe(spans(items) or "0", self.what(items), gm)

    def _probe(self, key: str, what: str, gm: GraphModule) -> Answer:
        asked_before = sum(p.what == what for p in self.probes)
        key = f"{key} again" if asked_before else key
        known = self.journal.answer(key)
        answer = known or self._judge(gm, what)
        if known is None:
            self.journal.note(key, answer)
        if self.failure is None and answer.verdict == "bad":
            self.failure = Failure(**answer.data)
            self.check.remember(self.failure)
        note = answer.note if len(self.probes) < 2 else _short(answer)
        self.probes.append(Probe(what, answer.verdict, note, answer.seconds, known is not None))
        self.say(f"probe {len(self.probes)}: {self.probes[-1]}")
        return answer

    def _judge(self, gm: GraphModule, what: str) -> Answer:
        began = time.perf_counter()
        judgement, *more = (self.check.judge(gm) for _ in range(self.repeat))
        verdict, note = judgement.verdict(self.failure)
        seconds = time.perf_counter() - began
        verdicts = [verdict, *(j.verdict(self.failure)[0] for j in more)]
        if len(set(verdicts)) > 1:
            self.probes.append(Probe(what, "skip", f"{FLAKY}: {', '.join(verdicts)}", seconds))
            raise Flaky(f"{FLAKY}: {', '.join(verdicts)} ({what})")
        data = judgement.failures[0].to_json() if judgement.failures else {}
        return Answer(verdict, note, seconds, data)

    def what(self, items: Items) -> str:
        """A set of rewrites in words."""
        if not items:
            return "the original"
        if len(items) == self.trials.count:
            return "all" if self.trials.broken is None else f"all before {self.name_at(self.trials.broken[0])}"
        top = self.trials.stage(max(items))
        if items == prefix(top.last):
            return f"transformations 1–{top.index + 1} (to {self.name(top)})"
        mine = frozenset(n - top.first + 1 for n in items if n >= top.first)
        below = frozenset(n for n in items if n < top.first)
        if below == prefix(top.first - 1) and mine == prefix(len(mine)):
            return f"rewrites 1–{len(mine)} of {len(top.parts)} of {self.name(top)}"
        if len(items) == 1:
            return f"rewrite {spans(mine)} of {self.name(top)} alone"
        if below == prefix(top.first - 1):
            return f"rewrites {spans(mine)} of {self.name(top)}, after all before it"
        return f"rewrites {spans(items)} of the pipeline"

    def name(self, stage: Stage) -> str:
        return self.name_at(stage.index)

    def name_at(self, index: int) -> str:
        return spelled(self.trials.transformations, index)

    def limit(self, number: int) -> str | None:
        """The limit that stops after the rewrite of that number."""
        if not number:
            return None
        stage = self.trials.stage(number)
        return spelled(self.trials.transformations, stage.index, number - stage.first + 1)
