"""What a bisection came to: the culprit, how it was found, and what shows it again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch.fx import GraphModule

from fxopt.checks import Failure
from fxopt.compose import Result
from fxopt.history import Rewrite, to_html, to_text
from fxopt.repro import Repro
from fxopt.repro_texts import FLAKY
from fxopt.search import Verdict
from fxopt.transformation import Transformation

NO_SOURCE = (
    "no line of the source: the graph records none; fxopt.capture does, "
    "and symbolic_trace with torch.fx.Tracer.record_stack_traces = True"
)


@dataclass(frozen=True)
class Probe:
    """One graph that was asked about."""

    what: str  # which part of the pipeline was applied
    verdict: Verdict
    note: str
    seconds: float
    resumed: bool = False  # its answer is from the journal of an earlier run

    def __str__(self) -> str:
        told = f"{self.what}: {self.verdict}" + (f", {self.note}" if self.note else "")
        return f"{told} (from the journal)" if self.resumed else told

    def to_json(self) -> dict[str, Any]:
        """The probe as plain values; time in seconds."""
        return {
            "what": self.what,
            "verdict": self.verdict,
            "note": self.note,
            "seconds": self.seconds,
            "resumed": self.resumed,
        }


@dataclass(frozen=True)
class Bisection:
    """
    What a bisection came to; prints as a table.

    ``found``: a culprit is known, and a fresh process failed again on its reproducer.  ``reproduced``: the whole
    pipeline fails at all.  ``rewrite`` is None where the transformation itself raises, and where probes that could not
    be judged leave several in question (``suspects``); ``interacting`` holds all that are guilty only together, in the
    order in which they are applied, ``rewrite`` being the last.  ``notes`` say whatever else was noticed: a flaky
    check, transformations that hide a failure, why there is no reproducer.
    """

    failure: Failure | None
    transformation: Transformation | None
    rewrite: Rewrite | None
    interacting: tuple[Rewrite, ...]
    suspects: tuple[Rewrite, ...]
    probes: tuple[Probe, ...]
    hints: tuple[str, ...]
    repro: Repro | None
    last_good: str | None  # limits, for compose(…, limit=…) and `fxopt optimize --limit`
    first_bad: str | None
    notes: tuple[str, ...] = ()
    flaky: bool = False
    count: int = 0  # the rewrites of the whole pipeline
    gm: GraphModule | None = field(default=None, repr=False)  # up to the culprit, with its history; else after all
    result: Result | None = field(default=None, repr=False)  # where a transformation raises: that step

    @property
    def reproduced(self) -> bool:
        return self.failure is not None

    @property
    def found(self) -> bool:
        return self.transformation is not None and not self.flaky and self.repro is not None and self.repro.confirmed

    @property
    def summary(self) -> str:
        """One line: the culprit, and whether that is certain."""
        if self.flaky:
            return FLAKY.replace("the check gives", "the check is flaky: it gives")
        if self.failure is None:
            everything = self.probes[1] if len(self.probes) > 1 else None
            if everything is not None and everything.verdict == "skip":
                return f"not judged: all {self.count} rewrites together: {everything.note}"
            return f"not reproduced: all {self.count} rewrites together are good"
        if self.transformation is None:
            return f"{len(self.suspects)} rewrites remain, which could not be told apart"
        what = self.rewrite.id if self.rewrite else f"{self.transformation.signature} itself"
        if len(self.interacting) > 1:
            what = f"{len(self.interacting)} rewrites that fail only together: " + ", ".join(
                r.id for r in self.interacting
            )
        if self.rewrite is None and self.suspects:
            what = f"{self.transformation.signature}, one of {len(self.suspects)} rewrites that could not be told apart"
        if self.found:
            return f"found: {what}"
        return f"{what}; not confirmed in a fresh process" + (f": {self.repro.note}" if self.repro else "")

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The result in words, for a report: what was found, and each probe."""
        told = [tuple(line.strip().partition(": ")[::2]) for line in self.lines()[1:] if ": " in line]
        found = [("bisection", self.summary), *((k, v) for k, v in told)]
        return [*found, *((f"probe {i}", str(p)) for i, p in enumerate(self.probes, 1))]

    def report(self, path: str | Path) -> Path:
        """Write a report to ``path``, one HTML file; see `fxopt.report`."""
        from fxopt.report import report

        return report(self, path)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "found": self.found,
            "reproduced": self.reproduced,
            "flaky": self.flaky,
            "summary": self.summary,
            "failure": None if self.failure is None else self.failure.to_json(),
            "transformation": None if self.transformation is None else self.transformation.signature,
            "rewrite": None if self.rewrite is None else _described(self.rewrite),
            "interacting": [_described(r) for r in self.interacting],
            "suspects": [_described(r) for r in self.suspects],
            "hints": list(self.hints),
            "last_good": self.last_good,
            "first_bad": self.first_bad,
            "probes": [p.to_json() for p in self.probes],
            "rewrites": self.count,
            "repro": None
            if self.repro is None
            else {"confirmed": self.repro.confirmed, "nodes": list(self.repro.size), "note": self.repro.note},
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return to_text(self)

    def __rich__(self) -> Group:
        probes = Table(title=f"{len(self.probes)} probes over {self.count} rewrites", title_justify="left")
        for column in ("#", "applied", "verdict", "why"):
            probes.add_column(column, overflow="fold")
        styles = {"good": "green", "bad": "red", "skip": "yellow"}
        for number, p in enumerate(self.probes, 1):
            probes.add_row(str(number), p.what, Text(p.verdict, style=styles[p.verdict]), Text(p.note))
        return Group(probes, *map(Text, self.lines()))

    def _repr_html_(self) -> str:
        return to_html(self)

    def lines(self, limits: bool = True) -> list[str]:
        """The result in words, one fact a line; the limits that lead to the last good and the first bad if asked."""
        told = [self.summary]
        for r in () if self.flaky else self.interacting or (() if self.rewrite is None else (self.rewrite,)):
            told += [f"  in {r.module_path}" if r.module_path else "", f"  from {r.source or NO_SOURCE}"]
            told.append(f"  {r.summary}")
        told += [f"  {r.id}" for r in self.suspects]
        told += [f"  hint: {h}" for h in self.hints]
        if self.failure is not None:
            told.append(f"  fails: {self.failure.text}")
        if self.repro is not None and self.repro.confirmed:
            told.append(f"  reproducer: {'→'.join(map(str, self.repro.size))} operations, failed in a fresh process")
        told += [f"  last good: limit={self.last_good!r}"] if limits and self.last_good else []
        told += [f"  first bad: limit={self.first_bad!r}"] if limits and self.first_bad else []
        told += [f"  note: {n}" for n in self.notes]
        return list(filter(None, told))


def _described(r: Rewrite) -> dict[str, Any]:
    return {
        "id": r.id,
        "module_path": r.module_path,
        "source": r.source,
        "removed": list(r.removed),
        "created": list(r.created),
        "changed": list(r.changed),
    }
