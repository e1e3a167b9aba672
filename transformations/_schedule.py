"""An order of tasks with little memory in use at once.

Plain integers throughout: what a task is, the pass knows.  A task makes blocks of memory and reads others; a block is
freed after its last reader.  Small problems are solved exactly, by a search for the path of lowest peak through the
sets of finished tasks (after B. H. Ahn et al., Ordering Chaos: Memory-Aware Scheduling of Irregularly Wired Neural
Networks for Edge Devices, MLSys 2020, whose division at bottlenecks `cuts` does in linear time); larger ones by greedy
and beam search, and then exactly in a window around the peak.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

EXACT = 512  # tasks; beyond, the sets of finished tasks are too large to keep many of them
WINDOW = 8  # tasks on each side of the peak, doubled as long as it does not help


@dataclass(frozen=True)
class Problem:
    """
    Tasks 0 … n-1, given in an order that is possible.

    ``before[i]``: the tasks that task i waits for.  ``makes[i]`` and ``reads[i]``: blocks, each once.  ``size[b]``:
    bytes.  ``kept``: blocks that are still needed when all tasks are done.  ``live``: blocks that are there at the
    start.  ``base``: bytes in use all the time.
    """

    before: Sequence[frozenset[int]]
    makes: Sequence[tuple[int, ...]]
    reads: Sequence[tuple[int, ...]]
    size: Sequence[int]
    kept: frozenset[int]
    live: frozenset[int]
    base: int = 0
    after: list[list[int]] = field(init=False)
    readers: list[list[int]] = field(init=False)  # of each block
    frees: list[tuple[int, ...]] = field(init=False)  # the blocks that a task frees if it is their last reader
    made: list[int] = field(init=False)  # bytes

    def __post_init__(self) -> None:
        after: list[list[int]] = [[] for _ in self.before]
        readers: list[list[int]] = [[] for _ in self.size]
        for i, preds in enumerate(self.before):
            for p in preds:
                after[p].append(i)
            for b in self.reads[i]:
                readers[b].append(i)
        frees = [tuple({*m, *r} - self.kept) for m, r in zip(self.makes, self.reads, strict=True)]
        made = [sum(self.size[b] for b in m) for m in self.makes]
        for name, value in (("after", after), ("readers", readers), ("frees", frees), ("made", made)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.before)

    @property
    def start(self) -> int:
        """The bytes in use before the first task."""
        return self.base + sum(self.size[b] for b in self.live)

    def trace(self, order: Sequence[int]) -> tuple[list[int], list[int]]:
        """The bytes in use before each task of ``order``, and while it runs."""
        left = [len(r) for r in self.readers]
        now, before, during = self.start, [], []
        for task in order:
            before.append(now)
            now += self.made[task]
            during.append(now)
            for b in self.reads[task]:
                left[b] -= 1
            now -= sum(self.size[b] for b in self.frees[task] if not left[b])
        return before, during

    def peak(self, order: Sequence[int]) -> int:
        """The most bytes in use at once."""
        return max(self.trace(order)[1], default=self.start)

    def floor(self) -> int:
        """A peak that no order can go below."""
        through = self.kept & self.live
        always = self.base + sum(self.size[b] for b in through)
        pairs = zip(self.makes, self.reads, strict=True)
        return max(self.start, *(always + sum(self.size[b] for b in {*m, *r} - through) for m, r in pairs))


class Timeline:
    """One order of a problem: when each block comes and goes, for cutting smaller problems out of it."""

    def __init__(self, problem: Problem, order: Sequence[int]) -> None:
        self.problem, self.order = problem, order
        self.before, self.during = problem.trace(order)
        place = {task: i for i, task in enumerate(order)}
        self.born = [-1] * len(problem.size)
        self.last = [max((place[t] for t in readers), default=-1) for readers in problem.readers]
        for task in order:
            for b in problem.makes[task]:
                self.born[b] = place[task]
                self.last[b] = max(self.last[b], place[task])
        for b in problem.kept:
            self.last[b] = len(order)

    def part(self, low: int, high: int) -> Problem:
        """The problem of the tasks at the places ``low`` to ``high``, with all else where it is."""
        whole, tasks = self.problem, self.order[low:high]
        number = {task: i for i, task in enumerate(tasks)}
        blocks: dict[int, int] = {}
        for task in tasks:
            for b in (*whole.makes[task], *whole.reads[task]):
                blocks.setdefault(b, len(blocks))
        live = [b for b in blocks if self.born[b] < low <= self.last[b]]
        return Problem(
            [frozenset(number[p] for p in whole.before[t] if p in number) for t in tasks],
            [tuple(blocks[b] for b in whole.makes[t]) for t in tasks],
            [tuple(blocks[b] for b in whole.reads[t]) for t in tasks],
            [whole.size[b] for b in blocks],
            frozenset(i for b, i in blocks.items() if self.last[b] >= high),
            frozenset(blocks[b] for b in live),
            self.before[low] - sum(whole.size[b] for b in live),
        )


def cuts(before: Sequence[frozenset[int]]) -> list[int]:
    """
    The tasks, given in a possible order, that have the same place in every order: all earlier ones lead to them, all
    later ones come from them.  In linear time: no earlier task may have its first successor behind it, no later one
    its last predecessor before it.
    """
    n = len(before)
    first_after = [n] * n
    for i, preds in enumerate(before):
        for p in preds:
            first_after[p] = min(first_after[p], i)
    last_before = [max(preds, default=-1) for preds in before]
    lowest = [n] * (n + 1)  # of last_before, from each task on
    for i in range(n - 1, -1, -1):
        lowest[i] = min(lowest[i + 1], last_before[i])
    found, reach = [], -1
    for i in range(n):
        if reach <= i <= lowest[i + 1]:
            found.append(i)
        reach = max(reach, first_after[i])
    return found


@dataclass
class Effort:
    """How many further steps a search may take; counted, not timed, so that the result is the same everywhere."""

    steps: int

    def spend(self, steps: int = 1) -> bool:
        """Take ``steps``; False where none are left."""
        self.steps -= steps
        return self.steps > 0


def schedule(problem: Problem, pieces: Sequence[tuple[int, int]], effort: Effort) -> tuple[list[int], bool]:
    """
    An order of a lower peak than the given one, if one is found, and whether none can be better.

    ``pieces``: places (low, high) in the given order between which tasks may move.  Only the pieces that stand in the
    way of a lower peak are changed; without any, the given order comes back.
    """
    order = list(range(len(problem)))
    timeline = Timeline(problem, order)
    worst = [(-max(timeline.during[low:high]), low, high) for low, high in pieces]
    heapq.heapify(worst)
    reached, optimal = 0, True
    while worst and -worst[0][0] > reached:
        _, low, high = heapq.heappop(worst)
        part = timeline.part(low, high)
        found, best = improve(part, reached, effort)
        order[low:high] = [low + i for i in found]
        if (peak := part.peak(found)) > reached:
            reached, optimal = peak, best
    return order, optimal


def improve(problem: Problem, enough: int, effort: Effort) -> tuple[list[int], bool]:
    """
    An order with a lower peak than the given one, if one is found, and whether none can be better.

    A peak of ``enough`` or less need not be improved.
    """
    best = list(range(len(problem)))
    peak = problem.peak(best)
    enough = max(enough, problem.floor())
    for find in (_greedy_by_order, _greedy_by_size, _greedy_by_depth):
        if peak <= enough:
            return best, True
        best, peak = _better(problem, find(problem), best, peak)
    if peak <= enough:
        return best, True
    if len(problem) <= EXACT:
        share = Effort(effort.steps // 2)
        effort.steps -= share.steps
        found, complete = _Search(problem).exact(peak, enough, share)
        effort.steps += max(0, share.steps)
        if complete:
            return found or best, True
        for width in (4, 64):
            found = _Search(problem).beam(peak, width, effort)
            best, peak = _better(problem, found or best, best, peak)
    return _polish(problem, best, enough, effort)


def _better(problem: Problem, order: list[int], best: list[int], peak: int) -> tuple[list[int], int]:
    found = problem.peak(order)
    return (order, found) if found < peak else (best, peak)


# --- greedy -------------------------------------------------------------------------------------------------------


def _greedy_by_order(problem: Problem) -> list[int]:
    """What gives memory back comes first; else the given order."""
    return _greedy(problem, lambda task, gain, when: (max(gain, 0), task))


def _greedy_by_size(problem: Problem) -> list[int]:
    """What leaves the least memory in use comes first."""
    return _greedy(problem, lambda task, gain, when: (gain, problem.made[task], task))


def _greedy_by_depth(problem: Problem) -> list[int]:
    """What gives memory back comes first; else what became possible last."""
    return _greedy(problem, lambda task, gain, when: (max(gain, 0) > 0, -when, gain, task))


def _greedy(problem: Problem, key: Callable[[int, int, int], tuple[int, ...]]) -> list[int]:
    """Always the possible task of lowest ``key(task, bytes that it adds, step at which it became possible)``."""
    left = [len(r) for r in problem.readers]
    waits = [len(p) for p in problem.before]
    when = {i: 0 for i, w in enumerate(waits) if not w}
    entries: dict[int, tuple[int, ...]] = {}
    heap: list[tuple[tuple[int, ...], int]] = []
    order: list[int] = []

    def offer(task: int) -> None:
        freed = sum(problem.size[b] for b in problem.frees[task] if left[b] == (task in readers[b]))
        entry = key(task, problem.made[task] - freed, when[task])
        if entries.get(task) != entry:
            entries[task] = entry
            heapq.heappush(heap, (entry, task))

    readers = [set(r) for r in problem.readers]
    for task in when:
        offer(task)
    while heap:
        entry, task = heapq.heappop(heap)
        if entries.get(task) != entry:
            continue
        del entries[task]
        order.append(task)
        for b in problem.reads[task]:
            left[b] -= 1
            readers[b].discard(task)
            if left[b] == 1 and (last := next(iter(readers[b]))) in entries:
                offer(last)
        for succ in problem.after[task]:
            waits[succ] -= 1
            if not waits[succ]:
                when[succ] = len(order)
                offer(succ)
    return order


# --- search -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """A set of finished tasks, as a bit mask, and how it was reached."""

    done: int
    ready: int
    now: int  # bytes in use
    peak: int
    tasks: tuple[int, ...]  # finished since the state it came from
    came: _State | None

    def order(self) -> list[int]:
        found: list[int] = []
        state: _State | None = self
        while state is not None:
            found += reversed(state.tasks)
            state = state.came
        return found[::-1]


class _Search:
    """Walks through the sets of finished tasks of a problem."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._waits = [sum(1 << p for p in preds) for preds in problem.before]
        self._readers = [sum(1 << t for t in readers) for readers in problem.readers]
        self._full = (1 << len(problem)) - 1
        ready = sum(1 << i for i, waits in enumerate(self._waits) if not waits)
        self._start = _State(0, ready, problem.start, problem.start, (), None)

    def exact(self, below: int, enough: int, effort: Effort) -> tuple[list[int] | None, bool]:
        """
        The order of lowest peak, if that is lower than ``below``; and whether the search came to its end.

        Takes the states by lowest peak so far, the fullest first: Dijkstra's algorithm with the maximum in the place
        of the sum, so that the first full state is reached by a best order.  Peaks up to ``enough`` count as equal.
        """
        heap: list[tuple[int, int, int, _State]] = [(enough, 0, 0, self._start)]
        reached = {0: enough}
        count = 0
        while heap:
            peak, _, _, state = heapq.heappop(heap)
            if state.done == self._full:
                return state.order(), True
            if reached[state.done] < peak:
                continue
            for new in self._next(state, below, effort, enough):
                value = max(new.peak, enough)
                if value < reached.get(new.done, below):
                    count += 1
                    reached[new.done] = value
                    heapq.heappush(heap, (value, -new.done.bit_count(), count, new))
            if effort.steps <= 0:
                return None, False
        return None, True

    def beam(self, below: int, width: int, effort: Effort) -> list[int] | None:
        """An order with a peak lower than ``below``, keeping the ``width`` best states at each step; or None."""
        states = [self._start]
        while states:
            found: dict[int, _State] = {}
            for state in states:
                for new in self._next(state, below, effort, 0):
                    known = found.get(new.done)
                    if known is None or new.peak < known.peak:
                        found[new.done] = new
            if effort.steps <= 0:
                return None
            if (full := found.get(self._full)) is not None:
                return full.order()
            states = sorted(found.values(), key=lambda s: (s.peak, s.now, -s.done.bit_count(), s.tasks))[:width]
        return None

    def _next(self, state: _State, below: int, effort: Effort, enough: int) -> Iterator[_State]:
        """The states that one more task leads to, with all tasks behind it that cannot be a mistake."""
        for task in _bits(state.ready):
            if not effort.spend():
                return
            during = state.now + self._problem.made[task]
            if during < below:
                yield self._advance(state, task, max(state.peak, during, enough), effort)

    def _advance(self, state: _State, task: int, peak: int, effort: Effort) -> _State:
        """
        ``task`` done, and then each that neither raises the peak nor leaves more memory in use than before it: moving
        such a task to the front of any order makes that no worse.
        """
        problem, done, ready, now = self._problem, state.done, state.ready, state.now
        tasks: list[int] = []
        following: int | None = task
        while following is not None:
            now += self._gain(following, done)
            done |= 1 << following
            ready &= ~(1 << following)
            tasks.append(following)
            for succ in problem.after[following]:
                if not self._waits[succ] & ~done:
                    ready |= 1 << succ
            following = self._harmless(done, ready, now, peak, effort)
        return _State(done, ready, now, peak, tuple(tasks), state)

    def _harmless(self, done: int, ready: int, now: int, peak: int, effort: Effort) -> int | None:
        """The first ready task that neither raises the peak nor leaves more memory in use."""
        for task in _bits(ready):
            effort.spend()
            if now + self._problem.made[task] <= peak and self._gain(task, done) <= 0:
                return task
        return None

    def _gain(self, task: int, done: int) -> int:
        """The bytes that ``task`` adds to those in use when it runs after the tasks of ``done``."""
        done |= 1 << task
        problem = self._problem
        return problem.made[task] - sum(problem.size[b] for b in problem.frees[task] if not self._readers[b] & ~done)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _polish(problem: Problem, order: list[int], enough: int, effort: Effort) -> tuple[list[int], bool]:
    """``order``, made better around its peak as long as an exact search in a window there finds something."""
    radius, n = WINDOW, len(order)
    while effort.spend(n):
        timeline = Timeline(problem, order)
        peak = max(timeline.during)
        if peak <= enough:
            return order, True
        at = timeline.during.index(peak)
        low, high = max(0, at - radius), min(n, at + radius + 1)
        found, complete = _Search(timeline.part(low, high)).exact(peak, enough, effort)
        if found is not None:
            order = [*order[:low], *(order[low + i] for i in found), *order[high:]]
            radius = WINDOW
        elif not complete or high - low > EXACT:
            break
        elif (low, high) == (0, n):
            return order, True
        else:
            radius *= 2
    return order, False
