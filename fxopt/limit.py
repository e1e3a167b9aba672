"""A part of a pipeline, by hand: which rewrites of which pass stand, with nothing run after it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.errors import UsageError
from fxopt.log import Recordable

_SPELLING = re.compile(r"(?P<name>.+?)(?:#(?P<turn>[1-9]\d*))?(?::(?P<numbers>\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*))?")


@dataclass(frozen=True)
class Limit:
    """
    ``NAME[#TURN][:NUMBERS]``, as in ``FuseLinearGELU:1-30``, ``FuseLinearGELU:1-3,7`` and ``EliminateDeadNodes#2:4``.

    What comes before the pass in the pipeline runs whole.  Of the pass's rewrites, numbered from 1 in graph order as in
    its commit, those of the given numbers stand, and the others are taken back; without numbers all stand, and
    with ``:0`` none does.  What comes after it is not run.  NAME is the name of the pass's class or its signature;
    #TURN says which, where the pipeline runs it several times (1 is the first).
    """

    index: int  # of the pass in the pipeline
    spans: tuple[tuple[int, int], ...] | None = None  # first and last number, both included; None: all

    def keeps(self, number: int) -> bool:
        """Whether the rewrite of that number, counted from 1, stands."""
        return self.spans is None or any(first <= number <= last for first, last in self.spans)

    def missed(self, count: int) -> str:
        """Which of its numbers are beyond the ``count`` rewrites that there are; "" if none or only the end of a range.

        ``P:1-30`` may be asked of fewer, and ``P:0`` asks for none.
        """
        beyond = [(first, last) for first, last in self.spans or () if first > count]
        return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in beyond)

    @classmethod
    def parse(cls, text: str, transformations: Sequence[Recordable]) -> Limit:
        """The limit that ``text`` spells; raises `UsageError` where the pipeline has no such pass."""
        if not isinstance(text, str):
            raise UsageError(f"limit is {text!r}, expected a text such as 'FuseLinearGELU:1-30'")
        found = _SPELLING.fullmatch(text)
        if not found or ":" in found["name"]:
            _refuse_numbers(text, transformations)
        places = found and [i for i, t in enumerate(transformations) if found["name"] in (name_of(t), t.signature)]
        if not found or not places:
            named = ", ".join(dict.fromkeys(map(name_of, transformations))) or "none"
            raise UsageError(f"limit {text!r} names no pass of the pipeline; write NAME or NAME:1-30, NAME of: {named}")
        turn = int(found["turn"] or 1)
        if turn > len(places) or (found["turn"] is None and len(places) > 1):
            raise UsageError(
                f"limit {text!r}: the pipeline runs {found['name']} {len(places)} times; "
                f"say which with {found['name']}#1 to #{len(places)}"
            )
        return cls(places[turn - 1], found["numbers"] and tuple(map(_span, found["numbers"].split(","))))  # type: ignore[arg-type]


def _refuse_numbers(text: str, transformations: Sequence[Recordable]) -> None:
    """`UsageError` where ``text`` names a pass, but what follows the colon are no numbers."""
    name, _, numbers = text.rpartition(":")
    known = {n for t in transformations for n in (name_of(t), t.signature)}
    if name.partition("#")[0] in known or name in known:
        raise UsageError(
            f"limit {text!r}: {numbers!r} says no numbers; write {name}:1-30, {name}:1-3,7, "
            f"{name}:0 for none of its rewrites, or {name} for all"
        )


def _span(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if int(last or first) < int(first):
        raise UsageError(f"limit with the numbers {text}: the first is larger than the last; write {last}-{first}")
    return int(first), int(last or first)


def name_of(transformation: Recordable) -> str:
    """What a limit calls a transformation: the name of its class, or of the function that it wraps."""
    inner = getattr(transformation, "inner", transformation)
    return str(getattr(inner, "__qualname__", type(inner).__qualname__)).rpartition(".")[2]


def spelled(transformations: Sequence[Recordable], index: int, count: int | None = None) -> str:
    """The limit that stops after the first ``count`` rewrites of pass ``index``; after all of them if None."""
    name = name_of(transformations[index])
    same = [i for i, t in enumerate(transformations) if name_of(t) == name]
    turn = f"#{same.index(index) + 1}" if len(same) > 1 else ""
    numbers = "" if count is None else ":0" if count == 0 else ":1" if count == 1 else f":1-{count}"
    return f"{name}{turn}{numbers}"
