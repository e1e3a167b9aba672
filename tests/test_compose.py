import copy
import operator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt import vocabulary
from fxopt.compose import Pipeline, adopt, compose, repeat
from fxopt.errors import TransformationError, UsageError, VerificationError
from fxopt.history import history
from fxopt.ops import read
from fxopt.text import show
from fxopt.transformation import ReversibleTransformation, Transformation
from fxopt.transformations import ChangeTrueDivToMulByInverse, EliminateDeadNodes, EliminateDropout
from tests.rewriting import DIALECTS, nodes, state, trace

X = (torch.randn(2, 8, generator=torch.Generator().manual_seed(0)),)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.drop, self.out = nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(F.gelu(self.fc(self.drop(x / 49)))) / 3


@pytest.fixture(params=DIALECTS)
def gm(request):
    return trace(Net().eval(), X, request.param)


@dataclass(frozen=True)
class Wrong(ReversibleTransformation):
    """x / c -> x * c, for the second division only: a planted bug."""

    preserves_computation = True

    def transform(self, graph_module):
        found = [n for n in graph_module.graph.nodes if (call := read(graph_module, n)) and call.op is vocabulary.mul]
        for node, factor in zip(found, (1.0, 1.5), strict=True):
            node.args = (node.args[0], node.args[1] * factor + 0.0 * factor)
            node.update_kwarg("out", None) if factor < 0 else None


@dataclass(frozen=True)
class Raises(Transformation):
    def transform(self, graph_module):
        graph_module.graph.output_node().prepend(graph_module.graph.create_node("get_attr", "nowhere"))
        raise ValueError("oops")


DROP, DIV = EliminateDropout(), ChangeTrueDivToMulByInverse()


def test_applies_left_to_right_and_reverses(gm):
    before, held, text, y = nodes(gm), state(gm), show(gm), gm(*X)
    pipeline = compose(DROP, DIV)
    assert pipeline(gm) is gm
    assert [c.signature for c in history(gm)] == [DROP.signature, DIV.signature]
    assert "dropout" not in show(gm) and "div" not in show(gm)
    pipeline(gm, reverse=True)
    assert (nodes(gm), state(gm), show(gm)) == (before, held, text) and torch.equal(gm(*X), y)
    assert not history(gm)


def test_not_in_place_leaves_the_original(gm):
    text = show(gm)
    other = compose(DROP, DIV, inplace=False)(gm)
    assert other is not gm and show(gm) == text and show(other) != text


def test_a_pipeline_undoes_its_own_commits_only(gm):
    DROP(gm)
    text = show(gm)
    pipeline = compose(DROP, DIV)
    pipeline(gm)
    pipeline.reverse(gm)
    assert show(gm) == text and len(history(gm)) == 1


def test_a_step_that_was_taken_back_is_not_looked_for_before_the_pipeline(gm):
    nothing = EliminateDeadNodes()
    nothing(gm)
    text = show(gm)
    pipeline = compose(DROP, nothing)
    pipeline(gm)
    history(gm).undo(-1)  # as on_failure="undo" does
    pipeline.reverse(gm)
    assert show(gm) == text and [e.signature for e in history(gm)] == [nothing.signature]


def test_nested_pipelines_are_one_row_of_steps():
    pipeline = compose(compose(DROP), compose(compose(DIV)))
    assert list(pipeline) == [DROP, DIV]
    assert pipeline.signature == "compose(EliminateDropout(), ChangeTrueDivToMulByInverse())"


def test_preserves_computation_if_all_steps_do():
    assert compose(DROP, DIV).preserves_computation
    assert not compose(DROP, Raises()).preserves_computation


def test_every_step_is_verified(gm):
    result = compose(DROP, DIV, verify=True, example_inputs=X).run(gm)
    assert [s.rewrites for s in result.steps] == [1, 2]
    assert all(s.verification.ok for s in result.steps) and result.verification.ok
    assert result.steps[0].nodes[1] == result.steps[0].nodes[0] - 1


def test_a_wrong_step_raises_and_nothing_stays(gm):
    before, held = nodes(gm), state(gm)
    with pytest.raises(VerificationError, match=r"^Wrong\(\): .*by its rewrite .*#\w+") as caught:
        compose(DROP, DIV, Wrong(), verify=True, example_inputs=X)(gm)
    assert "\n" not in str(caught.value)
    assert nodes(gm) == before and state(gm) == held and not history(gm)


def test_the_guilty_rewrite_is_named(gm):
    DIV(gm)
    second = [n.name for n in gm.graph.nodes if (call := read(gm, n)) and call.op is vocabulary.mul][1]
    with pytest.raises(VerificationError) as caught:
        compose(Wrong(), verify=True, example_inputs=X)(gm)
    id_ = str(caught.value).split("by its rewrite Wrong()@")[1].split()[0]
    Wrong()(gm)
    (found,) = [r for r in history(gm)[-1].rewrites if r.part.id == id_]
    assert second in found.changed


def test_a_wrong_step_is_taken_back_alone(gm):
    result = compose(DROP, DIV, Wrong(), verify=True, example_inputs=X, on_failure="undo").run(gm)
    assert [s.kept for s in result.steps] == [True, True, False]
    assert [c.signature for c in history(gm)] == [DROP.signature, DIV.signature]
    assert "undone" in result.steps[2].note


def test_a_wrong_step_may_be_kept(gm):
    """It stays in the graph and is said; a step that raises cannot."""
    result = compose(DROP, DIV, Wrong(), Raises(), verify=True, example_inputs=X, on_failure="keep").run(gm)
    assert [s.kept for s in result.steps] == [True, True, True, False]
    assert not result.verification.ok and "kept, though it fails: " in result.steps[2].note
    assert [c.signature for c in history(gm)] == [DROP.signature, DIV.signature, Wrong().signature]
    assert "kept, though it fails" in repr(result) and "oops" in repr(result)


def test_a_step_that_raises_leaves_nothing(gm):
    before = nodes(gm)
    with pytest.raises(TransformationError, match=r"Raises\(\) failed after EliminateDropout\(\): ValueError: oops"):
        compose(DROP, Raises(), DIV)(gm)
    assert nodes(gm) == before and not history(gm)


def test_a_step_that_raises_is_left_out(gm):
    result = compose(DROP, Raises(), DIV, on_failure="undo").run(gm)
    assert [s.kept for s in result.steps] == [True, False, True] and "oops" in result.steps[1].note


def test_a_step_that_did_nothing_says_so(gm):
    result = compose(DROP, DROP, verify=True, example_inputs=X).run(gm)
    assert result.steps[1].note == "did nothing" and result.steps[1].verification is None


def test_every_step_is_timed_in_sequence_and_alone(gm):
    result = compose(DROP, DIV, benchmark=True, example_inputs=X, rounds=5, warmup=1).run(gm)
    for step in result.steps:
        assert step.in_sequence.ratio > 0 and step.alone.ratio > 0
    assert result.total.ratio > 0
    table = result._repr_html_()
    assert "EliminateDropout" in table and "latency" in table


def test_questions_need_inputs(gm):
    with pytest.raises(UsageError, match=r"need inputs; give compose\(..., example_inputs=...\)"):
        compose(DROP, verify=True)(gm)


@pytest.mark.parametrize("wrong", (EliminateDropout, 3, "EliminateDropout"))
def test_what_is_no_transformation_is_refused(wrong):
    with pytest.raises(UsageError, match="compose was given"):
        compose(wrong)


def test_options_are_checked():
    with pytest.raises(UsageError, match="on_failure='explode', expected one of 'raise', 'undo'"):
        compose(DROP, on_failure="explode")


def test_a_function_is_a_step(gm):
    def drop_divisions(graph_module):
        for node in list(graph_module.graph.nodes):
            if node.target in (operator.truediv, torch.ops.aten.div.Tensor):
                node.replace_all_uses_with(node.args[0])
                graph_module.graph.erase_node(node)

    text = show(gm)
    pipeline = compose(DROP, drop_divisions)
    pipeline(gm)
    assert "div" not in show(gm) and "drop_divisions" in history(gm)[1].signature
    pipeline.reverse(gm)
    assert show(gm) == text


def test_an_optimum_transformation_is_a_step():
    transformations = pytest.importorskip("optimum.fx.optimization")
    gm = trace(Net().eval(), X, "module")
    text, held, y = show(gm), state(gm), gm(*X)
    pipeline = compose(DROP, transformations.ChangeTrueDivToMulByInverse())
    pipeline(gm)
    assert "div" not in show(gm)
    torch.testing.assert_close(gm(*X), y)
    pipeline.reverse(gm)
    assert show(gm) == text and state(gm) == held and torch.equal(gm(*X), y)


def test_a_graph_module_is_needed():
    with pytest.raises(UsageError, match=r"was given a Net, expected a torch.fx.GraphModule; make one with"):
        DROP(Net())


def test_repeat_stops_when_nothing_is_left(gm):
    result = repeat(DROP).run(gm)
    assert [s.rewrites for s in result.steps] == [1, 0]


def test_adopt_keeps_ours():
    assert adopt(DROP) is DROP and isinstance(compose(DROP), Pipeline)


def test_a_pass_that_returns_another_module_is_told_in_one_line(gm):
    class Copies(ReversibleTransformation):
        def transform(self, graph_module):
            return copy.deepcopy(graph_module)

    with pytest.raises(TransformationError, match=r"returned another graph module, expected the .* in place") as caught:
        Copies()(gm)
    assert "\n" not in str(caught.value) and "Linear(" not in str(caught.value)
