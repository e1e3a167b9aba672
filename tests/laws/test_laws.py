"""Laws 1, 4, 5, 6 and 8; `test_undo` and `test_parts` hold 2 and 3, `test_copies` holds 7."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch

from fxopt.errors import FxoptError, IrreversibleEdit, TransformationError
from fxopt.history import history
from fxopt.ops import operation
from fxopt.pattern import Miss, match, roots
from fxopt.shapes import propagate
from fxopt.snapshot import graphs
from fxopt.transformation import Rewrite
from tests.laws.asking import ANY, ASKED, EXAMPLES, OURS, OWN, applied, drawn, edits, law, same, shown, some
from tests.laws.passes import FAILURES, Interrupted, WritesInPlace
from tests.laws.portrait import outputs, portrait, values


@law(2)
def test_the_catalogue_computes_the_same(dialect, data):
    """Law 1, within what rounding alone changes in this model."""
    case, gm = drawn(data, dialect)
    if data.draw(st.integers(0, 3), label="shapes"):
        propagate(gm, case.inputs)
    inputs = case.inputs
    expected, nearby = values(gm, inputs), values(gm, tuple(x * (1 + 2e-6) for x in inputs))
    text = shown(gm)
    for t in some(data, OURS, 1, 4):
        if t.preserves_computation:
            t(gm)
    found = values(gm, inputs)
    assert len(found) == len(expected)
    for a, b, c in zip(found, expected, nearby, strict=True):
        if isinstance(b, torch.Tensor) and b.is_floating_point():
            assert a.shape == b.shape and a.dtype == b.dtype, f"{a} {b}\n{text}\n{shown(gm)}"
            finite = torch.isfinite(b) & torch.isfinite(c)
            sensitive = (b - c).abs()[finite].max().item() if finite.any() else 0.0
            told = f"differs by {(a - b).abs()[finite].max().item() if finite.any() else 0}\n{text}\n{shown(gm)}"
            torch.testing.assert_close(
                a[finite], b[finite], rtol=1e-4, atol=1e-5 + 100 * sensitive, msg=lambda m, told=told: f"{m}\n{told}"
            )
            if torch.equal(torch.isfinite(b), torch.isfinite(c)):
                assert torch.equal(torch.isfinite(a), torch.isfinite(b)), told
        elif isinstance(b, torch.Tensor):
            assert torch.equal(a, b)


@law()
def test_a_failure_leaves_everything_as_it_was(dialect, data):
    """Law 4: an error midway, a graph that lint refuses, a write in place to what the model holds too, an interrupt."""
    case, gm = drawn(data, dialect)
    applied(gm, some(data, ANY, 0, 2))
    before, bits, count = portrait(gm), outputs(gm, case.inputs), len(history(gm))
    held = nodes(gm)
    content = {k: v.clone() for k, v in case.model.state_dict().items()}
    bad = data.draw(edits(FAILURES), label="failure").transformation
    with pytest.raises(TransformationError) as caught:
        bad(gm)
    to_write = [any(p.numel() > 1 for p in inner.parameters()) for inner in graphs(gm).values()]
    if not isinstance(bad, WritesInPlace) or all(to_write) or not any(to_write):
        assert isinstance(caught.value, IrreversibleEdit) == (isinstance(bad, WritesInPlace) and all(to_write))
    assert bad.signature in str(caught.value) and "\n" not in str(caught.value)
    same(gm, before, bits, case)
    with pytest.raises(KeyboardInterrupt):
        Interrupted(bad.pick)(gm)
    same(gm, before, bits, case)
    assert len(history(gm)) == count and all(a is b for a, b in zip(nodes(gm), held, strict=True))
    assert all(torch.equal(v, content[k]) or v.isnan().any() for k, v in case.model.state_dict().items())
    applied(gm, some(data, ANY, 0, 2))  # and work goes on
    while history(gm):
        history(gm).undo(-1)


def nodes(gm):
    return [n for inner in graphs(gm).values() for n in inner.graph.nodes]


@law()
def test_the_callers_model_is_never_touched(dialect, data):
    """Law 5."""
    case = drawn(data, dialect)[0]
    before, inputs = portrait(case.model), case.inputs
    gm = case.trace()  # its modules are the caller's own, as symbolic_trace leaves them
    content = {k: v.clone() for k, v in case.model.state_dict().items()}  # make_fx runs it, which trains batch norms
    gradients = [p.grad for p in case.model.parameters()]
    before_trace = portrait(case.model)
    done = []
    for t in some(data, st.one_of(ANY, edits(FAILURES), edits()), 1, 4):
        done += applied(gm, [t])
    for t in data.draw(st.permutations(done), label="undo"):
        try:
            t.reverse(gm)
        except FxoptError:
            continue
    outputs(gm, inputs)
    found = portrait(case.model).differences(before_trace)
    assert not found, "\n".join(found)
    assert before.keys() == before_trace.keys()
    assert all(torch.equal(v, content[k]) or v.isnan().any() for k, v in case.model.state_dict().items())
    assert all(a is p.grad for a, p in zip(gradients, case.model.parameters(), strict=True))


@law()
def test_what_is_not_rewritten_is_explained(dialect, data):
    """Law 6: after a transformation, every node that has its operation is a miss with a reason."""
    case, gm = drawn(data, dialect)
    if data.draw(st.booleans(), label="shapes"):
        propagate(gm, case.inputs)
    t = data.draw(OURS, label="transformation").transformation
    t(gm)
    before = portrait(gm)
    misses = list(t.misses(gm))
    same(gm, before)  # to ask changes nothing
    there = {n for inner in graphs(gm).values() for n in inner.graph.nodes}
    for miss in misses:
        assert miss.node in there, f"{miss} of a node that is not there"
        assert miss.reason and "\n" not in miss.reason, repr(miss.reason)
    if isinstance(t, Rewrite):
        explained, wanted = {m.node for m in misses}, roots(t.pattern)
        named = [(inner, n, operation(inner, n)[0]) for inner in graphs(gm).values() for n in inner.graph.nodes]
        named = [(inner, n) for inner, n, op in named if op in wanted and t.concerns(inner, n, op)]
        found = [(n, match(inner, t.pattern, n)) for inner, n in named if n not in explained]
        left = [n for n, m in found if isinstance(m, Miss) and m.node not in explained]  # it may blame another
        assert not left, left


@law()
def test_plain_fx_is_enough(dialect, data):
    """Law 8: a user's passes are recorded, marked, split and undone alone, with nothing written for it."""
    case, gm = drawn(data, dialect)
    before, bits = portrait(gm), outputs(gm, case.inputs)
    done = applied(gm, some(data, edits(), 1, 4))
    assert [e.signature for e in history(gm)] == [t.signature for t in done]
    for entry in history(gm):
        touched = [k for r in entry.rewrites for k in (*r.created, *r.changed)]
        assert len(touched) == len(set(touched)), "one node in two rewrites"
        assert set(touched) == {k for k, (_, after) in entry.delta.nodes.items() if after is not None}
        assert len({r.id for r in entry.rewrites}) == len(entry.rewrites)
        assert not entry.delta or entry.rewrites, f"{entry} changed what no rewrite says"
    if done:
        names = {n.name for n in done[-1].get_transformed_nodes(gm)}
        last = {k.rpartition("::")[2] for k, (_, after) in history(gm)[-1].delta.nodes.items() if after is not None}
        assert last <= names
    for t in reversed(done):
        t(gm, reverse=True)
    same(gm, before, bits, case)


def test_the_catalogue_is_there():
    assert len({type(t).__name__ for t in OWN}) == len(OWN) >= 2


def test_the_laws_are_asked_of_enough_graphs():
    """40 graphs for each of FXOPT_EXAMPLES: 2,000 in `make test`, 40,000 in `make test-all`."""
    import tests.laws.test_copies
    import tests.laws.test_parts
    import tests.laws.test_undo  # noqa: F401

    assert sum(ASKED.values()) >= 40 * EXAMPLES, ASKED
