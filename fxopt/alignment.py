"""Two lists of lines in two columns: which line of one belongs beside which of the other."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterator, Sequence

from fxopt.listing import Line

Pair = tuple[Line | None, Line | None]
_LARGE_GAP = 4_000_000  # pairs of lines between two fixed points that are compared with each other


def align(before: Sequence[Line], after: Sequence[Line]) -> list[Pair]:
    """
    ``before`` and ``after`` in two columns, both in their order.

    First the longest series of nodes with the same name that do the same for the same module (names are unique, so
    this is a longest increasing subsequence); between those, what does the same for the same module; then same names.
    """
    places = {line.key: i for i, line in enumerate(after)}
    common = []
    for i, line in enumerate(before):
        j = places.get(line.key)
        if j is not None and (after[j] is line or _alike(after[j]) == _alike(line)):
            common.append((i, j))
    pairs: list[Pair] = []
    i = j = 0
    for next_i, next_j in [*_increasing(common), (len(before), len(after))]:
        pairs += _between(before[i:next_i], after[j:next_j])
        if next_i < len(before):
            pairs.append((before[next_i], after[next_j]))
        i, j = next_i + 1, next_j + 1
    return pairs


def _alike(line: Line) -> tuple[str, str]:
    return line.operation, line.module


def _increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest part of ``pairs``, which are in the order of their first number, where the second one grows too."""
    tops: list[int] = []  # the least second number at which a series of each length ends
    ends: list[int] = []  # its place in `pairs`
    former: list[int] = []
    for place, (_, j) in enumerate(pairs):
        length = bisect.bisect_left(tops, j)
        former.append(ends[length - 1] if length else -1)
        tops[length : length + 1] = [j]
        ends[length : length + 1] = [place]
    found, place = [], ends[-1] if ends else -1
    while place >= 0:
        found.append(pairs[place])
        place = former[place]
    return found[::-1]


def _between(before: Sequence[Line], after: Sequence[Line]) -> Iterator[Pair]:
    """The lines between two that belong together."""
    if not before or not after or len(before) * len(after) > _LARGE_GAP:
        yield from ((line, None) for line in before)
        yield from ((None, line) for line in after)
        return
    here, there = {line.key for line in before}, {line.key for line in after}
    # a line whose name stands on the other side is not given away to another one
    left = [(*_alike(line), line.key if line.key in there else "") for line in before]
    right = [(*_alike(line), line.key if line.key in here else "") for line in after]
    for _, i1, i2, j1, j2 in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        yield from _by_name(before[i1:i2], after[j1:j2])


def _by_name(before: Sequence[Line], after: Sequence[Line]) -> Iterator[Pair]:
    """Lines of one length belong together; of others, those of the same name do."""
    if len(before) == len(after) and all(map(_may_pair, before, after)):
        yield from zip(before, after, strict=True)
        return
    places = {line.key: j for j, line in enumerate(after)}
    j = 0
    for line in before:
        place = places.get(line.key, -1)
        if place < j:
            yield line, None
            continue
        yield from ((None, other) for other in after[j:place])
        yield line, after[place]
        j = place + 1
    yield from ((None, other) for other in after[j:])


def _may_pair(a: Line, b: Line) -> bool:
    return a.key == b.key or _alike(a) == _alike(b)
