"""Passes on what `capture` and `optimize` give besides whole models: submodules, and the graphs of `generate`."""

import copy

import pytest
import torch
from torch import nn

from fxopt import models
from fxopt.capture import capture, capture_report
from fxopt.history import history
from fxopt.huggingface import optimize
from fxopt.inputs import example_inputs
from fxopt.transformations.eliminate_common_subexpressions import EliminateCommonSubexpressions
from fxopt.transformations.eliminate_dead_nodes import EliminateDeadNodes
from fxopt.transformations.eliminate_dropout import EliminateDropout
from fxopt.transformations.fold_constants import FoldConstants
from fxopt.transformations.fuse_conv_bn_relu import FuseConvBNReLU
from fxopt.transformations.reorder_nodes import ReorderNodes
from tests.transformations.captures import leaves

PASSES = (
    EliminateDropout(),
    EliminateDeadNodes(),
    EliminateCommonSubexpressions(),
    FoldConstants(),
    ReorderNodes(),
)


class Block(nn.Module):
    """Something to do for each of the passes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.drop = nn.Dropout()
        self.register_buffer("table", torch.randn(3, 1, 1))

    def forward(self, x):
        y = self.drop(self.norm(self.conv(x)).relu()) * self.table.exp()
        a, b = torch.cat([y, y, y]), torch.cat([y * 2, y * 2, y * 2])
        return a.sum(0) + b.sum(0) + x


class Branching(nn.Module):
    """Control flow that depends on data stays eager; the blocks around it are captured."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if x.sum() > 0 else self.second(-x)


@pytest.mark.parametrize("transformation", [*PASSES, FuseConvBNReLU()], ids=lambda t: type(t).__name__)
def test_captured_submodules(transformation):
    torch.manual_seed(0)
    model = Branching().eval()
    x = torch.randn(2, 3, 4, 4)
    gm = capture(model, (x,))
    assert capture_report(gm).route == "submodules"
    with torch.no_grad():
        expected = gm(x)
        state = list(gm.state_dict())
        transformation(gm)
        touched = {
            r.split("::")[0]
            for rewrite in history(gm)[-1].rewrites
            for r in (*rewrite.created, *rewrite.removed, *rewrite.changed)
        }
        if not isinstance(transformation, EliminateDeadNodes | ReorderNodes):
            assert {"model.first.graph", "model.second.graph"} <= touched
        assert history(gm)[-1].rewrites
        torch.testing.assert_close(gm(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-5)
        transformation.reverse(gm)
        assert torch.equal(gm(x), expected)
        assert list(gm.state_dict()) == state


@pytest.mark.parametrize(
    "name",
    [
        "gpt2-tiny",
        pytest.param("llama-small-tiny", marks=pytest.mark.slow),
        pytest.param("t5-small-tiny", marks=pytest.mark.slow),
    ],
)
def test_prefill_and_decode(name):
    model = models.build(name).eval()
    done = {}

    def each(gm):
        for transformation in PASSES:
            transformation(gm)
        done[id(gm)] = gm
        return gm

    result = optimize(model, pipeline=each)
    assert len(done) >= 2
    inputs = example_inputs(model, 3, 7)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert torch.equal(result.generate(**inputs, **options), expected)
    assert not result.fxopt.fallbacks
    for gm in done.values():
        assert [type(e.transformation) for e in history(gm)] == [type(t) for t in PASSES]
        assert any(e.rewrites for e in history(gm))
        history(gm).checkout(0)
    assert torch.equal(result.generate(**inputs, **options), expected)


def test_a_copy_of_transformed_submodules_is_undone_on_its_own():
    gm = capture(Branching().eval(), (torch.randn(2, 3, 4, 4),))
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = leaves(gm(x))
        FoldConstants()(gm)
        twin = copy.deepcopy(gm)
        FoldConstants().reverse(twin)
        assert all(map(torch.equal, leaves(twin(x)), expected))
        assert "table" in " ".join(twin.state_dict()) and "table" not in " ".join(gm.state_dict())
