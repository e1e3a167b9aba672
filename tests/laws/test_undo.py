"""Laws 2 and 3: undo is exact, and means never applied."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.fx import symbolic_trace

from fxopt import patch
from fxopt.errors import Conflict, FxoptError, TransformationError
from fxopt.history import history, undo
from fxopt.shapes import propagate
from fxopt.transformation import ReversibleTransformation
from fxopt.transformations import EliminateDeadNodes
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


def test_an_edit_from_outside_stays_behind_what_comes_back() -> None:
    """Entries that an undo brings back are older than an edit that was made without them."""

    class Net(nn.Module):
        def forward(self, x):
            unused = x + torch.ones(4)  # noqa: F841
            return x * torch.ones(4)

    gm = symbolic_trace(Net())
    EliminateDeadNodes()(gm)
    gm.register_buffer("foreign", torch.ones(4))
    history(gm)[0].reverse()
    assert list(gm._buffers) == ["_tensor_constant0", "_tensor_constant1", "foreign"]


def three(x):
    a, b, c = torch.relu(x), torch.sigmoid(x), torch.tanh(x)
    return torch.neg(a) + torch.exp(b) + torch.cos(c)


def bypassing(name: str) -> ReversibleTransformation:
    """A pass that takes one node out, and could not be made again."""

    class Once(ReversibleTransformation):
        replayable = False

        def transform(self, graph_module):
            node = next((n for n in graph_module.graph.nodes if n.name == name), None)
            if node is not None:
                node.replace_all_uses_with(node.args[0])
                graph_module.graph.erase_node(node)

    return Once()


def test_neighbours_that_went_one_after_the_other_come_back_in_their_order() -> None:
    """Undone in place in the order in which they were made, under each other."""
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)):
        gm = symbolic_trace(three)
        before = portrait(gm)
        for name in [("relu", "sigmoid", "tanh")[i] for i in order]:
            bypassing(name)(gm)
        while history(gm):
            history(gm)[0].reverse()
        same(gm, before)


def test_an_order_is_undone_under_a_node_that_went() -> None:
    class Turned(ReversibleTransformation):
        def transform(self, graph_module):
            first, second = (n for n in graph_module.graph.nodes if n.name in ("relu", "sigmoid"))
            second.append(first)

    gm = symbolic_trace(three)
    before = portrait(gm)
    Turned()(gm)
    bypassing("relu")(gm)
    history(gm)[0].reverse()
    history(gm)[0].reverse()
    same(gm, before)


class Negate(ReversibleTransformation):
    """Puts a ``neg`` before the output; two of them need signatures of their own."""

    def __init__(self, note: str) -> None:
        self.note = note

    def transform(self, graph_module):
        output = graph_module.graph.output_node()
        with graph_module.graph.inserting_before(output):
            new = graph_module.graph.call_function(torch.neg, (output.args[0],))
        output.args = (new,)


def beside(gm, name):
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.create_node("call_function", torch.add, (next(iter(gm.graph.nodes)), 1), name=name)


def test_an_edit_from_outside_stays_before_what_is_made_again_under_another_name() -> None:
    """The second is ``neg_2``, and ``neg_1`` once the first is undone; the edits keep their place around it."""
    gm, other = symbolic_trace(three), symbolic_trace(three)
    for one in (gm, other):
        if one is gm:
            Negate("first")(one)
        beside(one, "a")
        Negate("second")(one)
        beside(one, "b")
        one.recompile()
    history(gm)[0].reverse()
    assert [n.name for n in gm.graph.nodes][-4:] == ["a", "neg_1", "b", "output"]
    assert not portrait(gm, objects=False).differences(portrait(other, objects=False))


class Holding(ReversibleTransformation):
    """Registers a module that the graph calls, where there is none of that name."""

    def __init__(self, name: str, note: str = "") -> None:
        self.name, self.note = name, note

    def transform(self, graph_module):
        if not hasattr(graph_module, self.name):
            graph_module.add_module(self.name, nn.Identity())


def test_entries_made_again_in_another_order_keep_it_under_an_edit_from_outside() -> None:
    gm = symbolic_trace(three)
    for transformation in (Holding("a"), Holding("b"), Holding("a", "again")):
        transformation(gm)
    gm.register_parameter("foreign", nn.Parameter(torch.ones(1)))
    gm.add_module("last", nn.Identity())
    assert [*gm._modules] == ["a", "b", "last"]
    history(gm)[0].reverse()
    assert [*gm._modules] == ["b", "a", "last"]


def test_a_graph_module_inside_is_not_undone_under_what_was_done_in_it() -> None:
    class AddInner(ReversibleTransformation):
        def transform(self, graph_module):
            if not any(n.target is torch.exp for n in graph_module.graph.nodes):
                return  # the one inside
            graph_module.add_module("inner", symbolic_trace(three))
            graph_module.graph.eliminate_dead_code()

    gm = symbolic_trace(three)
    gm.graph.output_node().args = (gm.graph.output_node().args[0],)
    before = portrait(gm)
    AddInner()(gm)
    inner = gm.inner

    class InnerOnce(ReversibleTransformation):
        replayable = False

        def transform(self, graph_module):
            if graph_module is inner:
                node = next(n for n in graph_module.graph.nodes if n.name == "relu")
                node.replace_all_uses_with(node.args[0])
                graph_module.graph.erase_node(node)

    InnerOnce()(gm)
    now = portrait(gm)
    with pytest.raises(Conflict, match=r"undo .*InnerOnce.* first"):
        history(gm)[0].reverse()
    same(gm, now)
    history(gm)[1].reverse()
    history(gm)[0].reverse()
    same(gm, before)


@given(st.lists(st.sampled_from("abcdefgh"), unique=True), st.lists(st.sampled_from("abcdefgh"), unique=True))
def test_what_nobody_moved_is_a_longest_common_subsequence(before, after):
    stayed = patch._stayed(before, after)
    assert [n for n in before if n in stayed] == [n for n in after if n in stayed]
    assert len(stayed) == max(
        len(some)
        for size in range(len(after) + 1)
        for some in itertools.combinations(after, size)
        if list(some) == [n for n in before if n in some]
    )
    assert patch._redone(tuple(before), tuple(after), tuple(before), set()) == tuple(after)


def test_a_note_from_outside_stays_where_a_pass_had_put_one() -> None:
    class Note(ReversibleTransformation):
        def transform(self, graph_module):
            next(iter(graph_module.graph.nodes)).meta["note"] = "mine"

    gm = symbolic_trace(three)
    Note()(gm)
    next(iter(gm.graph.nodes)).meta["note"] = "theirs"
    history(gm)[0].reverse()
    assert next(iter(gm.graph.nodes)).meta["note"] == "theirs"
