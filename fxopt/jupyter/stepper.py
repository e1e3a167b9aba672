"""A history, walked through rewrite by rewrite: what a widget shows and does, without its front end."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import GraphModule

from fxopt.benchmark import benchmark
from fxopt.delta import share
from fxopt.difference import Difference, diff
from fxopt.errors import UsageError
from fxopt.history import History, Rewrite, checkout, history, undo_rewrites
from fxopt.measurement import Comparison
from fxopt.verify import Baseline, Verification

Mark = Literal["good", "bad"]


@dataclass(frozen=True)
class Position:
    """After one rewrite, and all before it: which commit it is of, and which of that commit's rewrites it is."""

    commit: int
    rewrite: int
    signature: str
    name: str  # of the rewrite: its module path and a hash


class Stepper:
    """
    The states of a graph module from before its first commit, position 0, to after its last rewrite.

    ``gm`` is edited by `toggle` alone; everything else works on copies that share its tensors.  `mark` drives a
    bisection by hand: position 0 counts as good and the last as bad until marked otherwise.
    """

    def __init__(self, gm: GraphModule, example_inputs: Any = None) -> None:
        if not isinstance(gm, GraphModule):
            raise UsageError(
                f"step_through was given a {type(gm).__name__}, expected a torch.fx.GraphModule with a history; "
                "give what compose(...) was called on, or model.fxopt.graphs[...]"
            )
        self.gm, self.inputs = gm, example_inputs
        self.positions = tuple(
            Position(entry.index, i, entry.signature, rewrite.part.id)
            for entry in history(gm)
            for i, rewrite in enumerate(entry.rewrites)
        )
        self.at = len(self.positions)
        self.marks: dict[int, Mark] = {}
        self._states: dict[int, GraphModule] = {}
        self._baseline: Baseline | None = None

    @property
    def last(self) -> int:
        """The position after every rewrite."""
        return len(self.positions)

    def go(self, position: int) -> GraphModule:
        """Stand at ``position``; the graph module there, a copy."""
        if not isinstance(position, int) or not 0 <= position <= self.last:
            raise UsageError(f"go({position}) in a history of {self.last} rewrites; give 0 to {self.last}")
        self.at = position
        return self.state(position)

    def state(self, position: int) -> GraphModule:
        """The graph module with the rewrites up to ``position`` and no later ones, a copy."""
        if position not in self._states:
            if len(self._states) >= 8:  # a copy costs as much as the graph; neighbours are asked for again and again
                self._states.pop(next(iter(self._states)))
            self._states[position] = self._state(position)
        return self._states[position]

    def _state(self, position: int) -> GraphModule:
        twin = share(self.gm)
        if position == 0:
            checkout(twin, 0)
            return twin
        here = self.positions[position - 1]
        checkout(twin, here.commit + 1)
        rest = [p.name for p in self.positions[position:] if p.commit == here.commit]
        undo_rewrites(twin, here.commit, rest)
        return twin

    # --- the rewrite at this position

    @property
    def rewrite(self) -> Rewrite | None:
        """The rewrite that led here, in the graph module itself; None at position 0."""
        if self.at == 0:
            return None
        here = self.positions[self.at - 1]
        return history(self.gm)[here.commit].rewrites[here.rewrite]

    def difference(self) -> Difference | None:
        """What the rewrite that led here changed; None at position 0."""
        if self.at == 0:
            return None
        return diff(self.state(self.at - 1), self.state(self.at), self.positions[self.at - 1].signature)

    def toggle(self) -> None:
        """Undo the rewrite that led here in the graph module itself, or make it again."""
        rewrite = self.rewrite
        if rewrite is None:
            raise UsageError("there is no rewrite before position 0; go(1) stands after the first")
        if rewrite.active:
            rewrite.reverse()
        else:
            rewrite.apply()
        self._states.clear()

    # --- questions

    def verify(self) -> Verification:
        """Whether the graph here computes what the one at position 0 does."""
        if self._baseline is None:
            self._baseline = Baseline(self.state(0), self._needed("verify"))
        return self._baseline.verify(self.state(self.at))

    def time(self, rounds: int = 15) -> Comparison:
        """The graph here against the one at position 0."""
        return benchmark(self.state(0), self.state(self.at), self._needed("time"), rounds=rounds)

    def _needed(self, what: str) -> Any:
        if self.inputs is None:
            raise UsageError(f"{what} needs inputs; give step_through(gm, example_inputs)")
        return self.inputs

    # --- bisection by hand

    @property
    def between(self) -> tuple[int, int]:
        """The last position known as good, and the first known as bad after it."""
        good = max((p for p, m in self.marks.items() if m == "good"), default=0)
        bad = min((p for p, m in self.marks.items() if m == "bad" and p > good), default=self.last)
        return good, bad

    @property
    def culprit(self) -> Rewrite | None:
        """The rewrite that turns good into bad, once two positions next to each other are marked so."""
        good, bad = self.between
        if bad - good != 1 or self.marks.get(bad) != "bad" or self.marks.get(good, "good") != "good":
            return None
        here = self.positions[bad - 1]
        return history(self.gm)[here.commit].rewrites[here.rewrite]

    def mark(self, mark: Mark) -> None:
        """Say of the graph here that it is good or bad, and go where to look next: the middle of what is left."""
        if mark not in ("good", "bad"):
            raise UsageError(f"mark is {mark!r}, expected 'good' or 'bad'")
        if mark == "bad" and self.at == 0:
            raise UsageError("the graph before the first commit cannot be bad: no rewrite would be to blame")
        contrary = [p for p, m in self.marks.items() if m != mark and (p <= self.at if m == "bad" else p >= self.at)]
        for p in contrary:  # said later, known better
            del self.marks[p]
        self.marks[self.at] = mark
        if mark == "good" and self.at == self.last:
            return
        good, bad = self.between
        self.at = bad if bad - good <= 1 and bad not in self.marks else (good + bad) // 2 if bad - good > 1 else bad

    # --- as text and HTML

    def status(self) -> str:
        """Where this is, in one line."""
        culprit, (good, bad) = self.culprit, self.between
        if culprit is not None:
            source = f" ({culprit.source})" if culprit.source else ""
            return f"found: {culprit.id}{source} turns good into bad"
        where = "before the first commit" if self.at == 0 else self._said(self.positions[self.at - 1])
        left = f"; the culprit is one of {bad - good}, after {good} and up to {bad}" if self.marks else ""
        return f"{self.at} of {self.last}: {where}{left}"

    def _said(self, position: Position) -> str:
        rewrite = history(self.gm)[position.commit].rewrites[position.rewrite]
        undone = "" if rewrite.active else ", undone"
        source = f" – {rewrite.source}" if rewrite.source else ""
        return f"{position.signature} · {position.name}{undone}{source}"

    def html(self) -> str:
        """What the rewrite here changed, as HTML."""
        found = self.difference()
        return "<p>The graph as it was before the first commit.</p>" if found is None else found._repr_html_()

    def static_html(self) -> str:
        """The whole history, folded, as HTML that needs no front end."""
        parts = [History(self.gm)._repr_html_()]
        for entry in history(self.gm):
            if entry.rewrites:
                title = html.escape(f"{entry.index}: {entry.signature}, {len(entry.rewrites)} rewrites")
                parts.append(f"<details><summary>{title}</summary>{self._commit_html(entry.index)}</details>")
        return "".join(parts)

    def _commit_html(self, index: int) -> str:
        first = next(i for i, p in enumerate(self.positions) if p.commit == index)
        count = sum(p.commit == index for p in self.positions)
        return diff(self.state(first), self.state(first + count), self.positions[first].signature)._repr_html_()
