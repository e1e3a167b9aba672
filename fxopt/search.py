"""The search of a bisection, apart from what is searched: sets of items, and a question that each set answers.

Items are the numbers 1 to n in the order in which they are applied.  A question takes a set of them and says "good",
"bad", or "skip" where it cannot be judged.  Nothing here assumes that more items are worse: each answer that a result
rests on was given, and where answers contradict that assumption it is said.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fxopt.errors import UsageError

Verdict = Literal["good", "bad", "skip"]
Items = frozenset[int]
Ask = Callable[[Items], Verdict]

# ------------------------------------------------------------------------------------------------------------ halving


def halve(low: int, high: int, ask: Callable[[int], Verdict], patience: int | None = None) -> tuple[int, int]:
    """
    Where good turns bad: (low, high) with `low` good and `high` bad, next to each other.

    They stay further apart only if everything between them was skipped, or the last ``patience`` asked were.  ``low``
    is known as good and ``high`` as bad; without skips this asks ⌈log₂(high − low)⌉ times.
    """
    skipped: set[int] = set()
    in_a_row = 0
    while (
        in_a_row != patience
        and (middle := next((k for k in _middles(low, high) if k not in skipped), None)) is not None
    ):
        verdict = ask(middle)
        in_a_row = in_a_row + 1 if verdict == "skip" else 0
        if verdict == "skip":
            skipped.add(middle)
        elif verdict == "good":
            low = middle
        else:
            high = middle
    return low, high


def _middles(low: int, high: int) -> Iterator[int]:
    """What lies between, the middle first, then the middles of the halves: a skipped region is left quickly."""
    waiting = [(low, high)]
    while waiting:
        nearer = []
        for a, b in waiting:
            if b - a > 1:
                middle = (a + b) // 2
                yield middle
                nearer += [(a, middle), (middle, b)]
        waiting = nearer


# ---------------------------------------------------------------------------------------------------- delta debugging


def complete(
    count: int, known: Items, ask: Ask, enough: Callable[[Items], bool], low: int = 0
) -> tuple[Items, tuple[int, int] | None]:
    """
    Items that are bad together, the items ``known`` among them; and a range that could not be told apart, if any.

    ``known`` with all of 1 to ``count`` is bad, with 1 to ``low`` it is not; ``enough`` tells whether some are bad
    without others.  Each further item is found by halving: the last of the shortest prefix that is bad with those known
    (QuickXplain: Junker, AAAI 2004).  Where there is such a range, all of it is among the items.
    """
    while count > low:
        down, up = halve(low, count, functools.partial(_with_prefix, ask, known))
        if up - down > 1:
            return known | frozenset(range(down + 1, up + 1)), (down + 1, up)
        known, count, low = known | {up}, up - 1, 0
        if enough(known):
            break
    return known, None


def _with_prefix(ask: Ask, known: Items, count: int) -> Verdict:
    return ask(known | prefix(count))


def prefix(count: int) -> Items:
    """The items 1 to ``count``."""
    return frozenset(range(1, count + 1))


def minimized(items: Items, ask: Ask, most: int | None = None) -> Items:
    """
    A part of ``items``, which are bad, that is bad itself and of which no single item can be left out.

    With ``most``, they are cut into no more pieces than that, and what is left may be larger: it asks less where little
    can be judged.
    Delta debugging: Zeller and Hildebrandt, IEEE TSE 28(2), 2002; a skipped set counts as one that does not fail.
    """
    found, pieces = sorted(items), 2
    while len(found) >= 2:
        smaller = _smaller(found, pieces, ask)
        if smaller is not None:
            found, pieces = smaller
        elif pieces >= min(len(found), most or len(found)):
            break
        else:
            pieces = min(len(found), 2 * pieces)
    return frozenset(found)


def _smaller(found: list[int], pieces: int, ask: Ask) -> tuple[list[int], int] | None:
    cuts = [found[i * len(found) // pieces : (i + 1) * len(found) // pieces] for i in range(pieces)]
    for cut in cuts if pieces > 1 else ():
        if len(cut) < len(found) and ask(frozenset(cut)) == "bad":
            return cut, 2
    for cut in cuts if pieces > 2 else ():
        rest = [i for i in found if i not in cut]
        if ask(frozenset(rest)) == "bad":
            return rest, max(pieces - 1, 2)
    return None


# ------------------------------------------------------------------------------------------------------- what was asked


@dataclass(frozen=True)
class Answer:
    """What a question got: the verdict, why, and whatever else the asker wants to find again, as plain values."""

    verdict: Verdict
    note: str = ""
    seconds: float = 0.0
    data: Mapping[str, Any] = field(default_factory=dict)


class Record:
    """
    Every set that was asked, with its answer: none is asked twice.

    Tells where a set is bad and a larger one is good (masking), and, after `doubt`, where one set got both answers.
    """

    def __init__(self, ask: Callable[[Items], Answer]) -> None:
        self._ask = ask
        self.answers: dict[Items, Answer] = {}
        self.flaky: list[Items] = []

    def __call__(self, items: Items) -> Verdict:
        if items not in self.answers:
            self.answers[items] = self._ask(items)
        return self.answers[items].verdict

    def know(self, items: Items, verdict: Verdict) -> None:
        """Take an answer that is known from elsewhere."""
        self.answers[items] = Answer(verdict)

    def doubt(self, items: Items) -> bool:
        """Ask ``items`` once more; whether the answer is another one."""
        before, self.answers[items] = self.answers[items], self._ask(items)
        if {before.verdict, self.answers[items].verdict} != {"good", "bad"}:
            return False
        self.flaky.append(items)
        return True

    def masked(self) -> tuple[Items, Items] | None:
        """A bad set and a good one that contains it; None as long as more items were never better."""
        good = [items for items, answer in self.answers.items() if answer.verdict == "good"]
        bad = [items for items, answer in self.answers.items() if answer.verdict == "bad"]
        return next(((b, g) for b in bad for g in good if b < g), None)


# ------------------------------------------------------------------------------------------------------------ journal

FORMAT = 1


class Journal:
    """
    Answers in a file, one line of JSON each, so that an interrupted search goes on where it was.

    The first line holds ``about``: what is searched.  Raises `UsageError` where a file to resume is about another
    search, or is none of ours.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any], resume: bool = False) -> None:
        self.path, self.known = path, {}
        head = {"format": FORMAT, **about}
        if path is None:
            return
        if resume and path.exists():
            self.known = dict(_entries(path, head))
            _write(path, [head, *self.known.values()])  # without a line that an interrupt cut off
        else:
            _write(path, [head])

    known: dict[str, dict[str, Any]]  # by the key of the question

    def note(self, key: str, answer: Answer) -> None:
        """Keep an answer."""
        entry: dict[str, Any] = {"key": key, "verdict": answer.verdict, "note": answer.note}
        entry |= {"seconds": round(answer.seconds, 6), "data": dict(answer.data)}
        self.known[key] = entry
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def answer(self, key: str) -> Answer | None:
        """The answer that an earlier run got."""
        entry = self.known.get(key)
        return entry and Answer(entry["verdict"], entry["note"], entry["seconds"], entry["data"])  # type: ignore[return-value]


def _write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    aside = path.with_name(f".{path.name}.new")
    aside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(aside, path)


def _entries(path: Path, head: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    lines: Sequence[str] = path.read_text().splitlines()
    try:
        first = json.loads(lines[0]) if lines else None
    except json.JSONDecodeError:
        first = None
    if not isinstance(first, dict) or "format" not in first:
        raise UsageError(f"{path} is no journal of a bisection; give another folder, or run without resuming")
    if first != json.loads(json.dumps(head)):
        differs = sorted(k for k in {*first, *head} if first.get(k) != head.get(k))
        raise UsageError(
            f"{path} is of another bisection (its {', '.join(differs)} differs); "
            "give the arguments that it was started with, or run without resuming"
        )
    for number, line in enumerate(lines[1:], 2):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # an interrupt cut it off
                return
            raise UsageError(f"line {number} of {path} is damaged; run without resuming") from error
        yield entry["key"], entry
