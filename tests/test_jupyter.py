"""The stepper: what it shows is what is there, and a bisection by hand ends at the right rewrite."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import UsageError
from fxopt.history import history
from fxopt.jupyter import Stepper, step_through
from fxopt.jupyter.widget import handle
from fxopt.transformation import ReversibleTransformation
from fxopt.transformations import EliminateDropout

X = (torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),)
ATEN = torch.ops.aten


class Swap(ReversibleTransformation):
    """relu -> sigmoid, in one node after another."""

    def transform(self, graph_module):
        for node in graph_module.graph.nodes:
            if node.target is ATEN.relu.default:
                node.target = ATEN.sigmoid.default


@pytest.fixture
def gm():
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.1))]
    found = fxopt.capture(nn.Sequential(*layers).eval(), X)
    fxopt.compose(EliminateDropout(), Swap())(found)
    return found


def sigmoids(graph_module):
    return sum(n.target is ATEN.sigmoid.default for n in graph_module.graph.nodes)


def test_each_position_is_one_rewrite_further(gm):
    code, stepper = gm.code, Stepper(gm, X)
    assert stepper.last == stepper.at == 10
    for position in range(11):
        state = stepper.go(position)
        assert sigmoids(state) == max(0, position - 5)
        assert sum("dropout" in str(n.target) for n in state.graph.nodes) == 5 - min(5, position)
    assert gm.code == code and len(history(gm)) == 2, "looking changed the graph module"


def test_the_difference_is_that_of_the_rewrite_alone(gm):
    stepper = Stepper(gm)
    stepper.go(6)
    assert [row.kind for row in stepper.difference().changes] == ["changed"]
    assert stepper.rewrite == history(gm)[1].rewrites[0]
    stepper.go(0)
    assert stepper.difference() is None and stepper.rewrite is None


def test_toggle_edits_the_graph_module_itself(gm):
    code, stepper = gm.code, Stepper(gm)
    stepper.go(7)
    stepper.toggle()
    assert not history(gm)[1].rewrites[1].active and sigmoids(gm) == 4
    assert "undone" in stepper.status()
    stepper.toggle()
    assert gm.code == code
    stepper.go(0)
    with pytest.raises(UsageError, match="no rewrite before position 0"):
        stepper.toggle()


def test_verify_and_time_at_a_position(gm):
    stepper = Stepper(gm, X)
    stepper.go(5)
    assert stepper.verify().ok
    stepper.go(6)
    assert not stepper.verify().ok
    assert stepper.time(rounds=3).ratio > 0
    with pytest.raises(UsageError, match=r"verify needs inputs; give step_through\(gm, example_inputs\)"):
        Stepper(gm).verify()


@pytest.mark.parametrize("first_bad", range(1, 11))
def test_a_bisection_by_hand_ends_at_the_rewrite(gm, first_bad):
    stepper, asked = Stepper(gm), 0
    while stepper.culprit is None:
        stepper.mark("bad" if stepper.at >= first_bad else "good")
        asked += 1
        assert asked <= 1 + 4, "more than one question for the end and log2 of 10 for the rest"
    at = stepper.positions[first_bad - 1]
    assert stepper.culprit == history(gm)[at.commit].rewrites[at.rewrite]
    assert stepper.status().startswith(f"found: {stepper.culprit.id}")


def test_a_mark_that_contradicts_takes_the_place_of_the_older_ones(gm):
    stepper = Stepper(gm)
    stepper.mark("bad")
    stepper.go(4)
    stepper.mark("bad")
    stepper.go(8)
    stepper.mark("good")
    assert stepper.between == (8, 10) and stepper.marks == {8: "good", 10: "bad"}


def test_all_good_finds_nothing(gm):
    stepper = Stepper(gm)
    stepper.mark("good")
    assert stepper.culprit is None and stepper.at == stepper.last


def test_the_widget_shows_and_drives_the_stepper(gm):
    pytest.importorskip("anywidget")
    view = step_through(gm, X)
    front = view.widget
    assert (front.position, front.last, len(front.labels)) == (10, 10, 11)
    handle(view.stepper, front, {"do": "go", "position": 6})
    assert front.position == 6 and "Swap" in front.status and "sigmoid" in front.diff
    handle(view.stepper, front, {"do": "verify"})
    assert "differs" in front.answer
    handle(view.stepper, front, {"do": "toggle"})
    assert not front.active
    handle(view.stepper, front, {"do": "bad"})
    assert front.marks == {"6": "bad"} and front.position == 3
    handle(view.stepper, front, {"do": "go", "position": 99})
    assert "fxopt-error" in front.answer and front.position == 3


def test_without_a_front_end_it_is_static(gm):
    view = step_through(gm)
    shown = view._repr_mimebundle_()
    data = shown[0] if isinstance(shown, tuple) else shown
    assert data["text/html"].count("<details>") == 2 and "sigmoid" in data["text/html"]
    view.widget = None
    assert set(view._repr_mimebundle_()) == {"text/plain", "text/html"}


def test_an_empty_history_and_no_graph_module():
    stepper = Stepper(torch.fx.symbolic_trace(nn.ReLU()))
    assert stepper.last == 0 and stepper.status() == "0 of 0: before the first commit"
    with pytest.raises(UsageError, match=r"was given a ReLU, expected a torch.fx.GraphModule"):
        Stepper(nn.ReLU())


def test_marks_that_say_nothing_are_refused(gm):
    stepper = Stepper(gm)
    with pytest.raises(UsageError, match=r"mark is 'Good', expected 'good' or 'bad'"):
        stepper.mark("Good")
    stepper.go(0)
    with pytest.raises(UsageError, match="before the first commit cannot be bad"):
        stepper.mark("bad")
    with pytest.raises(UsageError, match=r"go\(1.5\)"):
        stepper.go(1.5)
