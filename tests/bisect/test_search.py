"""The search alone, against brute force."""

import itertools
import json
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fxopt.errors import UsageError
from fxopt.search import Answer, Journal, Record, complete, halve, minimized, prefix
from fxopt.trials import spans


@given(st.integers(1, 300), st.data())
def test_halving_finds_the_first_bad_one_in_as_few_questions_as_can_be(count, data):
    first = data.draw(st.integers(1, count))
    asked = []

    def ask(k):
        asked.append(k)
        return "bad" if k >= first else "good"

    assert halve(0, count, ask) == (first - 1, first)
    assert len(asked) <= math.ceil(math.log2(count)) and len(set(asked)) == len(asked)
    assert not {0, count} & set(asked)


@given(st.lists(st.sampled_from("gbs"), max_size=40))
def test_halving_keeps_what_it_was_told(verdicts):
    """Whatever the answers: good below, bad above, and only what was skipped between."""
    told = dict(enumerate(verdicts, 1))
    count = len(verdicts) + 1
    asked = {}

    def ask(k):
        asked[k] = {"g": "good", "b": "bad", "s": "skip"}[told[k]]
        return asked[k]

    low, high = halve(0, count, ask)
    assert low == 0 or asked[low] == "good"
    assert high == count or asked[high] == "bad"
    assert all(asked[k] == "skip" for k in range(low + 1, high))


@given(st.integers(1, 12), st.lists(st.sampled_from("gbs"), max_size=40))
def test_halving_loses_patience(patience, verdicts):
    told = dict(enumerate(verdicts, 1))
    asked = []

    def ask(k):
        asked.append({"g": "good", "b": "bad", "s": "skip"}[told[k]])
        return asked[-1]

    low, high = halve(0, len(verdicts) + 1, ask, patience)
    assert "".join(v[0] for v in asked).count("s" * (patience + 1)) == 0
    if high - low > 1:
        assert asked[-patience:] == ["skip"] * patience or all(told[k] == "s" for k in range(low + 1, high))


@st.composite
def culprits(draw):
    count = draw(st.integers(1, 24))
    items = draw(st.sets(st.integers(1, count), min_size=1, max_size=4))
    return count, frozenset(items)


@given(culprits())
def test_all_that_fail_only_together_are_found(case):
    count, wanted = case
    asked = []

    def ask(items):
        asked.append(items)
        return "bad" if wanted <= items else "good"

    record = Record(lambda items: Answer(ask(items)))
    last = halve(0, count, lambda k: record(prefix(k)))[1]
    assert last == max(wanted)
    found = frozenset({last})
    if record(found) != "bad":
        found, left = complete(last - 1, found, record, lambda some: record(some) == "bad")
        assert left is None
    assert found == wanted == minimized(found, record)
    assert len(asked) == len(set(asked))
    assert len(asked) <= len(wanted) * (math.ceil(math.log2(count)) + 1) + 2 ** len(wanted)


@given(st.integers(1, 7), st.data())
def test_any_answers_lead_to_a_minimal_set(count, data):
    """Not monotonic at all: what is found was asked and is bad, and no single item of it can be left out."""
    every = [frozenset(c) for n in range(count + 1) for c in itertools.combinations(range(1, count + 1), n)]
    bad = {items: data.draw(st.booleans()) for items in every}
    bad[frozenset()], bad[prefix(count)] = False, True
    record = Record(lambda items: Answer("bad" if bad[items] else "good"))
    last = halve(0, count, lambda k: record(prefix(k)))[1]
    found, left = frozenset({last}), None
    if record(found) != "bad":
        found, left = complete(last - 1, found, record, lambda some: record(some) == "bad")
    found = minimized(found, record)
    assert left is None and bad[found] and record.answers[found].verdict == "bad"
    assert all(not bad[found - {i}] for i in found if len(found) > 1)
    pair = record.masked()
    assert pair is None or (pair[0] < pair[1] and bad[pair[0]] and not bad[pair[1]])
    asked = record.answers
    assert (pair is not None) == any(a < b and bad[a] and not bad[b] for a in asked for b in asked)


@given(st.integers(2, 10), st.sets(st.integers(1, 10), min_size=1), st.data())
def test_delta_debugging_finds_a_minimal_set(count, wanted, data):
    """Several sets may be bad, each with all that contain it; skipped ones do not fail."""
    wanted = [
        frozenset(i for i in wanted if i <= count) or prefix(1),
        frozenset(data.draw(st.sets(st.integers(1, count), min_size=1))),
    ]
    skipped = data.draw(st.sets(st.integers(0, 2**count - 1), max_size=30))

    def ask(items):
        if any(w <= items for w in wanted):
            return "bad"
        return "skip" if sum(1 << (i - 1) for i in items) in skipped else "good"

    found = minimized(prefix(count), ask)
    assert ask(found) == "bad" and all(ask(found - {i}) != "bad" for i in found)


def test_doubt_tells_a_flaky_answer():
    answers = iter(("bad", "bad", "good"))
    record = Record(lambda items: Answer(next(answers)))
    assert record(prefix(1)) == "bad" == record(prefix(1))
    assert not record.doubt(prefix(1)) and not record.flaky
    assert record.doubt(prefix(1)) and record.flaky == [prefix(1)]
    assert record(prefix(1)) == "good"


@given(st.sets(st.integers(1, 60)))
def test_numbers_as_text(numbers):
    text = spans(frozenset(numbers))
    read = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        read |= set(range(int(first), int(last or first) + 1))
    assert read == numbers


# -------------------------------------------------------------------------------------------------------------- journal

ABOUT = {"graph": "x", "check": "outputs"}


def test_a_journal_goes_on_where_it_was(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path, ABOUT)
    journal.note("1-3", Answer("bad", "why", 0.5, {"kind": "values"}))
    journal.note("1", Answer("skip"))
    with path.open("a") as file:
        file.write('{"key": "1-2", "verd')  # an interrupt
    again = Journal(path, ABOUT, resume=True)
    assert again.answer("1-3") == Answer("bad", "why", 0.5, {"kind": "values"})
    assert again.answer("1") == Answer("skip") and again.answer("1-2") is None
    again.note("1-2", Answer("good"))
    assert Journal(path, ABOUT, resume=True).answer("1-2") == Answer("good")
    assert Journal(path, ABOUT).answer("1-3") is None  # a new run forgets


@pytest.mark.parametrize(
    ("content", "message"),
    (
        ("", "is no journal of a bisection"),
        ("hello\n", "is no journal of a bisection"),
        (
            json.dumps({"format": 1, "graph": "y", "check": "outputs"}) + "\n",
            r"another bisection \(its graph differs\)",
        ),
        (json.dumps({"format": 1, **ABOUT}) + "\n{\n{}\n", "line 2 of .* is damaged"),
    ),
)
def test_another_journal_is_refused(tmp_path, content, message):
    path = tmp_path / "j.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        Journal(path, ABOUT, resume=True)
    assert path.read_text() == content
