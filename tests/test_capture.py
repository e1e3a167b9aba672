"""Captured graphs compute what the model computes, at other sizes too, share its tensors and leave it alone."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace
from torch.utils import _pytree as pytree

from fxopt import models
from fxopt.capture import Captured, capture, capture_report, structural_copy
from fxopt.errors import CaptureError, UsageError
from fxopt.inputs import example_inputs
from tests.builtin import TINY, built_in, each, fingerprint


def run(module, inputs):
    with torch.no_grad():
        return module(*inputs) if isinstance(inputs, tuple) else module(**inputs)


def assert_equal(expected, actual):
    """Same type, same structure, same numbers bit for bit."""
    assert type(expected) is type(actual)
    before, structure = pytree.tree_flatten(expected)
    after, other = pytree.tree_flatten(actual)
    assert structure == other
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def targets(gm):
    """How often each target is called in a graph module and the graph modules inside it."""
    graphs = [m for m in gm.modules() if isinstance(m, GraphModule)]
    return Counter(str(n.target) for g in graphs for n in g.graph.nodes if n.op.startswith("call"))


@pytest.mark.parametrize("name", each(*TINY))
def test_a_built_in_model_is_captured_whole(name):
    model, before, gm = built_in(name)
    assert fingerprint(model) == before

    report = capture_report(gm)
    assert (report.route, report.dynamic, report.captured, report.notes) == ("whole", True, ("",), ())
    assert (report.share_of_flops, report.share_of_parameters, report.eager) == (1.0, 1.0, ())
    assert not any(m.training for m in gm.modules())
    for sizes in ((3, 10), (1, 10), (2, 1), (5, 7)):
        inputs = example_inputs(model, *sizes, seed=sizes[0])
        assert_equal(run(model, inputs), run(gm, inputs))

    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert all(id(t) in own for t in gm.parameters())
    assert {p.requires_grad for p in gm.parameters()} == {p.requires_grad for p in model.parameters()}
    assert all("wrap_with" not in target for target in targets(gm))
    assert set(gm.state_dict()) <= set(model.state_dict())

    calls = [n for n in gm.graph.nodes if n.op == "call_function" and "aten" in str(n.target) and n.users]
    assert all("val" in n.meta for n in calls)
    assert any("nn_module_stack" in n.meta for n in calls) and any(n.meta.get("stack_trace") for n in calls)


def test_a_copy_of_a_capture_is_its_own():
    model = models.build("bert-base-tiny")
    gm = capture(model, example_inputs(model))
    twin = copy.deepcopy(gm)
    assert capture_report(twin) == capture_report(gm)
    assert list(twin.state_dict()) == list(gm.state_dict())
    inputs = example_inputs(model, 3, 5)
    expected = run(model, inputs)
    next(twin.parameters()).data.zero_()
    assert_equal(expected, run(gm, inputs))
    assert not torch.equal(expected.last_hidden_state, run(twin, inputs).last_hidden_state)
    assert gm.train() is gm and gm.eval() is gm


def test_a_tuple_is_positional_and_a_dict_is_keywords():
    model = models.build("gnn-tiny")
    inputs = example_inputs(model, 2, 6)
    expected = run(model, inputs)
    assert_equal(expected, run(capture(model, tuple(inputs.values())), tuple(inputs.values())))
    by_name = capture(model, dict(reversed(inputs.items())))
    assert_equal(expected, by_name(**inputs).detach())
    with pytest.raises(UsageError, match="tuple"):
        capture(model, list(inputs.values()))


def test_a_model_in_training_mode_is_captured_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model[0].eval()
    state = copy.deepcopy(model.state_dict())
    gm = capture(model, (torch.randn(3, 4),))
    assert [m.training for m in model] == [False, True, True] and model.training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    x = torch.randn(5, 4)
    assert_equal(run(copy.deepcopy(model).eval(), (x,)), run(gm, (x,)))


def test_static_capture_keeps_the_sizes():
    model = models.build("mlp-tiny")
    gm = capture(model, example_inputs(model, 3), dynamic=False)
    assert not capture_report(gm).dynamic
    assert capture_report(gm).inputs[0].shape == (3, 16)
    with pytest.raises(AssertionError):
        run(gm, example_inputs(model, 4))


class FixedBatch(nn.Module):
    """Its code allows one batch size only."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return x * self.scale.view(3, 4)


def test_sizes_that_cannot_vary_are_fixed():
    gm = capture(FixedBatch(), (torch.randn(3, 4),))
    assert capture_report(gm).route == "whole"
    assert not capture_report(gm).dynamic


def test_tied_weights_stay_tied():
    model = models.build("gpt2-tiny")
    gm = capture(model, example_inputs(model))
    wte = [n for n in gm.graph.nodes if (n.op == "get_attr" and "wte" in str(n.target)) or "lm_head" in str(n.target)]
    assert wte
    held = [p for p in gm.parameters() if p is model.lm_head.weight]
    assert len(held) == 1 and model.lm_head.weight is model.transformer.wte.weight


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, pair, options, flag=True):
        a, b = pair
        y = self.linear(a) + b["x"] * options["scale"]
        return {"sum": y if flag else -y, "parts": (a, [b["x"]])}, None


def test_nested_inputs_and_outputs_keep_their_structure():
    model = Nested()
    args = ((torch.randn(3, 4), {"x": torch.randn(3, 4)}), {"scale": 2.0})
    gm = capture(model, args)
    assert_equal(run(model, args), run(gm, args))
    assert any(spec.dtype == "float" for spec in capture_report(gm).inputs)


class Branches(nn.Module):
    """Control flow that depends on data, which no single graph can hold."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.up = nn.Linear(16, 8)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x):
        h = self.stem(x)
        return {"y": self.up(h) if x.sum() > 0 else self.down(h)}


def test_data_dependent_control_flow_is_captured_by_submodules():
    torch.manual_seed(0)
    model = Branches()
    before = fingerprint(model)
    x = torch.rand(1, 8)
    gm = capture(model, {"x": x})
    assert fingerprint(model) == before
    report = capture_report(gm)
    assert report.route == "submodules"
    assert set(report.captured) == {"model.stem.graph", "model.up.graph"}
    assert all(isinstance(gm.get_submodule(path), GraphModule) for path in report.captured)
    assert report.share_of_flops == 1.0 and 0.6 < report.share_of_parameters < 1.0
    assert report.eager[0].path == "" and "x.sum() > 0" in report.eager[0].reason
    for rows in (torch.rand(1, 8), -torch.rand(1, 8), torch.rand(5, 8), -torch.rand(5, 8)):
        assert_equal(run(model, {"x": rows}), run(gm, {"x": rows}))
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in gm.parameters())
    assert sum(p.numel() for p in gm.parameters()) == sum(p.numel() for p in model.parameters())
    twin = copy.deepcopy(gm)
    assert_equal(run(model, {"x": x}), run(twin, {"x": x}))
    assert str(report).count("eager") == 1


class Recurrent(nn.Module):
    """One submodule called with inputs of two kinds."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        y = self.cell(x) + self.cell(x[0])
        return y if y.mean() > 10 else -y


def test_a_submodule_called_in_two_ways_falls_back_to_eager_for_one():
    model = Recurrent()
    gm = capture(model, (torch.randn(3, 4),))
    (piece,) = (m for m in gm.modules() if isinstance(m, Captured))
    piece.fallbacks.clear()
    x = torch.randn(2, 4)
    assert_equal(run(model, (x,)), run(gm, (x,)))
    (reason,) = piece.fallbacks
    assert "1-d" in reason and "2-d" in reason
    piece.double()
    assert piece._eager[0].weight.dtype == torch.float64


def test_hooks_of_a_captured_submodule_still_run():
    model = Branches()
    seen = []
    model.stem.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    gm = capture(model, (torch.rand(3, 8),))
    seen.clear()
    run(gm, (torch.rand(4, 8),))
    assert seen == [torch.Size([4, 16])]
    assert len(model.stem._forward_hooks) == 1


@pytest.mark.slow
def test_a_mixture_of_experts_with_a_loop_is_partly_captured():
    model = models.build("mixtral-tiny")
    model.set_experts_implementation("eager")
    gm = capture(model, example_inputs(model, 2, 6))
    report = capture_report(gm)
    assert report.route == "submodules"
    assert 0.2 < report.share_of_flops < 1.0
    assert any("expert" in part.path and "depends on data" in part.reason for part in report.eager)
    for sizes in ((2, 6), (3, 5), (1, 1)):
        inputs = example_inputs(model, *sizes, seed=7)
        assert torch.equal(run(model, inputs).logits, run(gm, inputs).logits)


def test_a_graph_module_is_accepted_as_it_is():
    gm = symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    code = gm.code
    assert capture(gm, (torch.randn(2, 4),)) is gm
    assert gm.code == code
    assert capture_report(gm).route == "given"
    assert all(n.meta["val"].shape == (2, 4) for n in gm.graph.nodes if n.op.startswith("call"))
    with pytest.raises(CaptureError, match="input"):
        capture(gm, {"x": torch.randn(2, 4)})


@pytest.mark.parametrize(
    "inputs", [(torch.randn(2, 5),), (torch.randn(2, 4), torch.randn(2, 4)), {"y": torch.randn(1)}]
)
def test_inputs_that_do_not_fit_are_refused(inputs):
    with pytest.raises(CaptureError, match="does not run on the example inputs"):
        capture(nn.Linear(4, 4), inputs)


class Opaque(nn.Module):
    """Nothing in it has weights, and its one decision depends on data."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_model_of_which_nothing_can_be_captured_is_refused():
    with pytest.raises(CaptureError, match="no part of Opaque") as caught:
        capture(Opaque(), (torch.randn(3),))
    assert "\n" not in str(caught.value)


def test_a_report_is_asked_of_captures_only():
    with pytest.raises(UsageError, match="captured"):
        capture_report(symbolic_trace(nn.ReLU()))


def test_a_structural_copy_shares_every_tensor():
    model = models.build("gpt2-tiny")
    model.note = torch.ones(2)
    twin = structural_copy(model)
    own, copied = model.state_dict(keep_vars=True), twin.state_dict(keep_vars=True)
    assert list(own) == list(copied)
    assert all(own[name] is copied[name] for name in own)
    assert twin.note is model.note
    assert twin.transformer is not model.transformer and twin.config is not model.config


def main():
    """`python -m tests.test_capture`: every call target in the captures of the built-in models, and how often."""
    total = Counter()
    for name in TINY:
        model = models.build(name)
        total += targets(capture(model, example_inputs(model)))
    for target, count in total.most_common():
        print(f"{count:6d} {target}")


if __name__ == "__main__":
    main()


class Even(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] % 2 == 0 else x * 3


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))])
def test_the_conditions_on_sizes_are_in_copies_and_pickles_too(copied):
    gm = copied(capture(Even(), (torch.randn(4, 3),)))
    assert torch.equal(gm(torch.ones(6, 3)), torch.full((6, 3), 2.0))
    with pytest.raises(AssertionError, match=r"Guard failed: x.size\(\)\[0\] % 2 == 0"):
        gm(torch.ones(5, 3))


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return x * self.calls


def test_buffers_that_a_model_writes_to_are_left_as_they_were():
    model = Counts()
    before, buffer = fingerprint(model)[0], model.calls
    gm = capture(model, (torch.randn(2, 3),))
    assert fingerprint(model)[0] == before and model.calls is buffer and buffer == 0
    gm(torch.randn(2, 3))
    assert buffer == 1  # as the model itself does
