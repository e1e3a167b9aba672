"""What a report shows, as plain values: the lines of the graph once, and per step what became of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule

from fxopt.catalogue import catalogue, equation, summary
from fxopt.compose import Result, Step
from fxopt.delta import graphs, share
from fxopt.difference import Difference, step
from fxopt.errors import Conflict
from fxopt.history import Rewrite, history
from fxopt.listing import Line, Listing, states
from fxopt.log import Commit, commits, label
from fxopt.measurement import Comparison
from fxopt.transformations.reorder_nodes import curve
from fxopt.verify import Verification

Json = Any
_MOST_POINTS = 2000  # of a curve; a longer one is cut into as many stretches, each with its maximum


@dataclass(frozen=True)
class Subject:
    """What a report is about: graphs by name, each with what a pipeline did to it, and what is said of the whole."""

    title: str
    graphs: Mapping[str, tuple[GraphModule, Result | None]]
    facts: Sequence[tuple[str, str]] = ()
    verification: Verification | None = None
    comparison: Comparison | None = None


def report_data(subject: Subject) -> Json:
    """Everything that the page shows."""
    return {
        "title": subject.title,
        "facts": [list(fact) for fact in subject.facts],
        "verification": _verification(subject.verification),
        "comparison": _comparison(subject.comparison),
        "graphs": [_graph(name, gm, result) for name, (gm, result) in subject.graphs.items()],
    }


def difference_data(found: Difference, facts: Sequence[tuple[str, str]] = ()) -> Json:
    """The same for two graphs side by side: all that differs is one step with one rewrite."""
    pool = _Pool()
    sides = [[row.before for row in found.rows if row.before], [row.after for row in found.rows if row.after]]
    before, after = ({line.key for line in side} for side in sides)
    changed = {line.key for row in found.changes for line in (row.before, row.after) if line is not None}
    source = next((line.source for row in found.changes if (line := row.before or row.after) and line.source), "")
    keys = {"removed": changed & (before - after), "created": changed & (after - before)}
    keys["changed"] = changed & before & after
    rewrite = {name: [pool.string(key) for key in sorted(found)] for name, found in keys.items()}
    step = {
        **dict.fromkeys(("seconds", "verification", "in_sequence", "alone")),
        **dict.fromkeys(("equation", "summary", "note"), ""),
        "label": found.title,
        "signature": found.title,
        "nodes": [len(side) for side in sides],
        "kept": True,
        "count": 1 if found else 0,
        "rewrites": [
            {"id": "", "module": "", "source": source, "active": True, "tensors": [t.path for t in found.tensors]}
            | rewrite
        ],
    }
    graph = {
        "name": "",
        "facts": [],
        "nodes": [len(side) for side in sides],
        "rewrites": step["count"],
        "start": [pool.line(line) for line in sides[0]],
        "steps": [step | _difference(found, pool)],
        "curves": [],
        "total": None,
        "verification": None,
        "strings": pool.strings,
        "lines": pool.lines,
    }
    return {
        "title": found.title,
        "facts": [list(fact) for fact in facts],
        "verification": None,
        "comparison": None,
        "graphs": [graph],
    }


@dataclass
class _Pool:
    """Strings and lines, each once, by number."""

    strings: list[str] = field(default_factory=list)
    lines: list[Json] = field(default_factory=list)
    _known: dict[str, int] = field(default_factory=dict)
    _placed: dict[int, tuple[int, Line]] = field(default_factory=dict)  # holds the line, so that its id stays its own

    def string(self, text: str) -> int:
        if (number := self._known.get(text)) is None:
            number = self._known[text] = len(self.strings)
            self.strings.append(text)
        return number

    def line(self, line: Line | None) -> int:
        if line is None:
            return -1
        if (placed := self._placed.get(id(line))) is None:
            placed = self._placed[id(line)] = (len(self.lines), line)
            words = map(self.string, (line.key, line.module, line.shape, line.source))
            self.lines.append([line.text, *words, [self.string(key) for key in dict.fromkeys(line.reads)]])
        return placed[0]


def _graph(name: str, gm: GraphModule, result: Result | None) -> Json:
    """
    One graph.  Its lines are ``[text, key, module, shape, source, keys read]``, all but the text by number.

    ``start`` is the original, by number of line; the rows of each step lead from one state to the next.
    """
    pool = _Pool()
    found = commits(gm)
    listings, curves, stopped = _walk(gm)
    first = len(found) - len(listings) + 1  # the first commit that can be shown
    by_commit = _steps(found, result)
    shown: list[Json] = []
    pool_start = [pool.line(line) for line in listings[0].lines()]
    for index, commit in enumerate(found):
        shown += [_not_kept(s) for s in by_commit.get(index, ())[:-1] if s is not None]
        done = by_commit[index][-1] if index in by_commit else None
        entry = _commit(gm, index, commit, done, pool)
        if index >= first:
            difference = step(found, index, listings[index - first], listings[index - first + 1])
            entry |= _difference(difference, pool)
            entry["curves"] = [index - first, index - first + 1]
        else:
            entry |= {"rows": None, "why_no_rows": stopped}
        shown.append(entry)
    shown += [_not_kept(s) for s in by_commit.get(len(found), ()) if s is not None]
    return {
        "name": name,
        "facts": [["captured", str(gm.meta["fxopt.capture"])]] if "fxopt.capture" in gm.meta else [],
        "nodes": [len(list(listings[0].lines())), len(list(listings[-1].lines()))],
        "rewrites": sum(entry["count"] for entry in shown if entry["kept"]),
        "start": pool_start,
        "steps": shown,
        "curves": curves,
        "total": _comparison(result.total if result else None),
        "verification": _verification(result.verification if result else None),
        "strings": pool.strings,
        "lines": pool.lines,
    }


def _walk(gm: GraphModule) -> tuple[list[Listing], list[Json], str]:
    """The lines and the memory curve before the first commit that can be taken back, after it, …; and why no more."""
    listings: list[Listing] = []
    curves: list[Json] = []
    try:
        for state, listed in states(share(gm)):
            unchanged = bool(listings) and all(
                len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
                for a, b in zip(listings[-1].graphs.values(), listed.graphs.values(), strict=False)
            )
            listings.append(listed)
            curves.append(curves[-1] if unchanged else _curves(state))
    except Conflict as stopped:
        return listings[::-1], curves[::-1], str(stopped)
    return listings[::-1], curves[::-1], ""


def _curves(gm: GraphModule) -> Json:
    """The bytes in use over the schedule of the outermost graph, or why they are not known."""
    points, why = curve(graphs(gm)[""])
    size = -(-len(points) // _MOST_POINTS) or 1
    stretches = [max(points[i : i + size], key=lambda p: p[1]) for i in range(0, len(points), size)]
    return {
        "bytes": [used for _, used in stretches],
        "names": [name for name, _ in stretches],
        "peak": max((used for _, used in points), default=0),
        "stretch": size,
        "why": why,
    }


def _steps(found: Sequence[Commit], result: Result | None) -> dict[int, list[Step | None]]:
    """By commit: the steps taken back before it was made, and last the one that made it; the rest after the end."""
    if result is None:
        return {}
    made: dict[int, list[Step | None]] = {}
    waiting: list[Step | None] = []
    index = max(0, len(found) - sum(s.kept for s in result.steps))
    for s in result.steps:
        if not s.kept:
            waiting.append(s)
            continue
        at = next((i for i in range(index, len(found)) if found[i].signature == s.signature), None)
        if at is None:  # undone since
            continue
        made[at], waiting, index = [*waiting, s], [], at + 1
    made[len(found)] = waiting
    return made


def _commit(gm: GraphModule, index: int, commit: Commit, done: Step | None, pool: _Pool) -> Json:
    rewrites = history(gm)[index].rewrites
    note = done.note if done else ""
    return {
        **_about(commit.transformation),
        **_measured(done),
        "kept": True,
        "note": note,
        "count": sum(r.active for r in rewrites),
        "rewrites": [_rewrite(r, pool) for r in rewrites],
    }


def _not_kept(done: Step) -> Json:
    return {
        **_about(done.transformation),
        **_measured(done),
        "kept": False,
        "note": done.note,
        "count": done.rewrites,
        "rewrites": [],
        "rows": None,
        "why_no_rows": "it was taken back",
    }


def _about(transformation: Any) -> Json:
    known = type(transformation).__name__ in catalogue()
    kind = type(transformation)
    return {
        "label": label(transformation),
        "signature": transformation.signature,
        "equation": equation(kind) if known else "",
        "summary": summary(kind) if known else "",
    }


def _measured(done: Step | None) -> Json:
    return {
        "seconds": done.seconds if done else None,
        "nodes": list(done.nodes) if done else None,
        "verification": _verification(done.verification if done else None),
        "in_sequence": _comparison(done.in_sequence if done else None),
        "alone": _comparison(done.alone if done else None),
    }


def _rewrite(rewrite: Rewrite, pool: _Pool) -> Json:
    def numbers(keys: Iterable[str]) -> list[int]:
        return [pool.string(key) for key in keys]

    return {
        "id": rewrite.part.id,
        "module": rewrite.module_path,
        "source": rewrite.source or "",
        "active": rewrite.active,
        "removed": numbers(rewrite.removed),
        "created": numbers(rewrite.created),
        "changed": numbers(rewrite.changed),
        "tensors": sorted(rewrite.part.delta.slots),
    }


_CODES = {"same": "=", "changed": "~", "removed": "-", "added": "+", "moved": ">"}


def _difference(difference: Difference, pool: _Pool) -> Json:
    """The rows: a number stands for so many lines that are the very same, else ``[sign, line before, line after]``."""
    rows: list[Json] = []
    for row in difference.rows:
        if row.kind == "same" and row.before is row.after:
            if rows and isinstance(rows[-1], int):
                rows[-1] += 1
            else:
                rows.append(1)
        else:
            rows.append([_CODES[row.kind], pool.line(row.before), pool.line(row.after)])
    return {"rows": rows, "difference": difference.summary, "tensors": [str(t) for t in difference.tensors]}


def _verification(found: Verification | None) -> Json:
    if found is None:
        return None
    return found.to_json() | {"summary": found.summary}


def _comparison(found: Comparison | None) -> Json:
    if found is None:
        return None
    return found.to_json() | {"summary": found.summary}
