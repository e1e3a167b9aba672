"""Laws 2 and 3: undo is exact, and means never applied."""

from __future__ import annotations

import hypothesis.strategies as st

from fxopt.errors import FxoptError, TransformationError
from fxopt.history import history, undo
from fxopt.shapes import propagate
from tests.graphs import twin
from tests.laws.asking import ANY, applied, drawn, law, same, shown, some
from tests.laws.portrait import outputs, portrait


@law()
def test_reverse_gives_back_the_same_graph_module(dialect, data):
    """Law 2."""
    case, gm = drawn(data, dialect)
    if data.draw(st.booleans(), label="shapes"):
        propagate(gm, case.inputs)
    before, bits = portrait(gm), outputs(gm, case.inputs)
    done = []
    for t in some(data, ANY, 1, 3):
        former = portrait(gm)
        if applied(gm, [t]):
            done.append((t, former))
        else:
            same(gm, former)
    for t, former in reversed(done):
        t.reverse(gm)
        same(gm, former)
        if all(t != other for other, _ in done[: len(history(gm))]):
            t.reverse(gm)  # what is not applied is not undone
            same(gm, former)
    same(gm, before, bits, case)
    assert not history(gm)


@law(2)
def test_undo_means_never_applied(dialect, data):
    """Law 3: names included."""
    case, gm = drawn(data, dialect, max_steps=6)
    other = twin(gm)
    unlike = portrait(other, objects=False).differences(portrait(gm, objects=False))
    assert not unlike
    done = applied(gm, some(data, ANY, 2, 5))
    left = list(range(len(done)))
    text = shown(gm)
    for i in data.draw(st.permutations(left), label="order")[: data.draw(st.integers(1, 5), label="count")]:
        now = portrait(gm)
        try:
            undo(gm, left.index(i))
        except FxoptError as error:  # what came later cannot do without it
            assert isinstance(error, TransformationError), text
            same(gm, now)
            assert len(applied(twin(other), [done[j] for j in left if j != i])) < len(left) - 1
            return
        left.remove(i)
    for j in left:
        done[j](other)
    found = portrait(gm, objects=False).differences(portrait(other, objects=False))
    told = "\n".join([*found, "--- from", text, "--- left", shown(gm), "--- wanted", shown(other)])
    assert not found, told
    assert outputs(gm, case.inputs) == outputs(other, case.inputs)
    assert history(gm).checkout(0) is gm and not history(gm)
