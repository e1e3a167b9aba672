import itertools

from hypothesis import given
from hypothesis import strategies as st

from fxopt.transformations._schedule import Effort, Problem, Timeline, _Search, cuts, improve, schedule


def orders(before):
    """All possible orders of the tasks."""
    for order in itertools.permutations(range(len(before))):
        place = {t: i for i, t in enumerate(order)}
        if all(place[p] < place[t] for t, preds in enumerate(before) for p in preds):
            yield list(order)


@st.composite
def problems(draw, most=7):
    n = draw(st.integers(1, most))
    before, reads = [], []
    for i in range(n):
        inputs = draw(st.sets(st.integers(0, i - 1), max_size=2)) if i else set()
        before.append(frozenset(inputs))
        reads.append(tuple(sorted(inputs | ({n} if draw(st.booleans()) else set()))))
    sizes = draw(st.lists(st.integers(0, 9), min_size=n + 1, max_size=n + 1))
    kept = frozenset(draw(st.sets(st.integers(0, n), max_size=2)))
    return Problem(before, [(i,) for i in range(n)], reads, sizes, kept, frozenset({n}), draw(st.integers(0, 3)))


def simulated(problem, order):
    """The peak, by hand: which blocks exist while each task runs."""
    born = dict.fromkeys(problem.live, -1)
    last = dict.fromkeys(problem.live, -1)
    for place, task in enumerate(order):
        for b in problem.makes[task]:
            born[b] = last[b] = place
        for b in problem.reads[task]:
            last[b] = place
    last |= dict.fromkeys(problem.kept & born.keys(), len(order))
    in_use = [sum(problem.size[b] for b in born if born[b] <= place <= last[b]) for place in range(len(order))]
    return problem.base + max(in_use)


@given(problems(), st.randoms())
def test_the_peak_of_an_order(problem, random):
    order = random.choice(list(orders(problem.before)))
    unread = [b for b in problem.live if not problem.readers[b] and b not in problem.kept]
    if not unread:  # a block that nobody reads and nobody keeps has no place in a problem
        assert problem.peak(order) == simulated(problem, order)


@given(problems())
def test_the_search_finds_the_best_order(problem):
    best = min(map(problem.peak, orders(problem.before)))
    given_peak = problem.peak(range(len(problem)))
    found, complete = _Search(problem).exact(given_peak, 0, Effort(10**6))
    assert complete
    assert (found is None) == (best == given_peak)
    assert found is None or problem.peak(found) == best
    assert problem.floor() <= best
    order, optimal = improve(problem, 0, Effort(10**6))
    assert optimal and problem.peak(order) == best


@given(problems(12), st.integers(0, 300))
def test_little_effort_gives_a_possible_order_that_is_no_worse(problem, steps):
    order, _ = improve(problem, 0, Effort(steps))
    assert sorted(order) == list(range(len(problem)))
    assert all(order.index(p) < order.index(t) for t, preds in enumerate(problem.before) for p in preds)
    assert problem.peak(order) <= problem.peak(range(len(problem)))


@given(problems(12))
def test_the_beam_finds_a_possible_order(problem):
    found = _Search(problem).beam(10**6, 4, Effort(10**6))
    assert found is not None and sorted(found) == list(range(len(problem)))
    assert all(found.index(p) < found.index(t) for t, preds in enumerate(problem.before) for p in preds)


@given(problems())
def test_cuts_have_one_place(problem):
    possible = list(orders(problem.before))
    fixed = [t for t in range(len(problem)) if all(order.index(t) == t for order in possible)]
    assert cuts(problem.before) == fixed


@given(problems(10), st.data())
def test_a_part_counts_as_in_the_whole(problem, data):
    order = list(range(len(problem)))
    low = data.draw(st.integers(0, len(order) - 1))
    high = data.draw(st.integers(low + 1, len(order)))
    timeline = Timeline(problem, order)
    part = timeline.part(low, high)
    assert part.trace(range(high - low)) == (timeline.before[low:high], timeline.during[low:high])


def test_only_the_pieces_in_the_way_are_changed():
    # two pieces alike: big block, small block from it, big block, small block from it; the second is smaller
    before = [frozenset(p) for p in ((), (), (0,), (1,), (2, 3), (4,), (4,), (5,), (6,), (7, 8))]
    sizes = [100, 100, 1, 1, 1, 40, 40, 1, 1, 1]
    problem = Problem(
        before, [(i,) for i in range(10)], [tuple(sorted(p)) for p in before], sizes, frozenset({9}), frozenset()
    )
    order, optimal = schedule(problem, [(0, 5), (5, 10)], Effort(10**6))
    assert optimal
    assert problem.peak(order) == 102
    assert sorted(order[:5]) == list(range(5)) != order[:5] and order[5:] == list(range(5, 10))
