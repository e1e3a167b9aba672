"""Which weights a Pruner takes, that zeros stay, and going on from a checkpoint."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fxopt
from fxopt.errors import UsageError
from fxopt.models import build
from fxopt.sparse import CubicSchedule, Pruner, SparseLinear, swap
from fxopt.transformations import SparsifyWeights, SwapSparse


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: int = 20) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, inputs)).square().mean().backward()
    optimizer.step()


def zeros(weight: torch.Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / weight.numel()


SCHEDULE = CubicSchedule(0.9, 20, every=5)


class TestCheckpoint:
    @pytest.mark.parametrize("scope", ["uniform", "global"])
    def test_goes_on_as_if_it_had_not_stopped(self, scope):
        """The weights after 24 steps are those of a run that was stopped after 7, to the bit."""

        def run(stop: int | None) -> dict[str, torch.Tensor]:
            model = net()
            optimizer, file = torch.optim.SGD(model.parameters(), lr=0.1), io.BytesIO()
            pruner = Pruner(model, SCHEDULE, scope)
            pruner.attach(optimizer)
            for i in range(24):
                torch.manual_seed(i)
                step(model, optimizer)
                if i == stop:
                    torch.save({"model": model.state_dict(), "pruner": pruner.state_dict()}, file)
                    file.seek(0)
                    last = torch.load(file)
                    model = net()
                    model.load_state_dict(last["model"])
                    pruner = Pruner(model, SCHEDULE, scope)
                    pruner.load_state_dict(last["pruner"])
                    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                    pruner.attach(optimizer)
            assert pruner.steps == 24 and pruner.sparsity == pytest.approx(0.9, abs=1e-3)
            return model.state_dict()

        whole, stopped = run(None), run(6)
        assert all(torch.equal(whole[k], stopped[k]) for k in whole)

    @pytest.mark.parametrize("sparsity", [SCHEDULE, CubicSchedule(0.9, 20, begin=5), 0.5])
    def test_zeros_that_are_there_stay_without_the_state_too(self, sparsity):
        model = net()
        Pruner(model, 0.9)
        masks = [model[i].weight != 0 for i in (0, 2)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = Pruner(model, sparsity)
        pruner.attach(optimizer)
        for _ in range(22):
            step(model, optimizer)
            assert all(torch.equal(model[i].weight != 0, m) for i, m in zip((0, 2), masks, strict=True))

    def test_a_weight_of_zeros_alone_is_one_to_be_trained(self):
        model = net()
        nn.init.zeros_(model[2].weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Pruner(model, SCHEDULE).attach(optimizer)
        step(model, optimizer)
        assert zeros(model[2].weight) < 0.5
        assert Pruner(model, 0.5).sparsity >= 0.5

    def test_what_was_swapped_since_keeps_its_own_pattern(self):
        model = net()
        state = Pruner(model, 0.9).state_dict()
        sparse = swap(model, (2, 20), skip_modules=["0"], measure=False)[0]
        pruner = Pruner(sparse, "existing")
        pruner.load_state_dict(state)
        assert isinstance(sparse[2], SparseLinear) and pruner.sparsity == pytest.approx(0.9)

    @pytest.mark.parametrize(
        ("state", "told"),
        [
            ({}, "a dict was given; expected what Pruner.state_dict"),
            ({"steps": 1, "masks": {"9": torch.ones(1, dtype=torch.bool)}}, r"mask of '9' is \(1,\), here is no such"),
            ({"steps": 1, "masks": {"0": torch.ones(1, dtype=torch.bool)}}, r"mask of '0' is \(1,\), here is \(30, 20\)"),  # noqa: E501
        ],
    )  # fmt: skip
    def test_another_state_is_refused_and_nothing_changed(self, state, told):
        pruner = Pruner(net(), 0.5)
        with pytest.raises(UsageError, match=told):
            pruner.load_state_dict(state)
        assert pruner.steps == 0 and pruner.sparsity == 0.5


class TestGraph:
    def test_weights_of_a_captured_graph(self):
        model, x = net(), torch.randn(8, 20)
        gm = fxopt.capture(model, (x,))
        optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
        pruner = Pruner(gm, SCHEDULE)
        pruner.attach(optimizer)
        for _ in range(22):
            step(gm, optimizer)
        assert [zeros(p) for p in gm.parameters() if p.dim() == 2] == [0.9, 0.9] and pruner.sparsity == 0.9

    def test_zeros_of_what_swap_sparse_left_dense_stay(self):
        gm = fxopt.capture(net(), (torch.randn(8, 20),))
        SparsifyWeights(sparsity=0.9)(gm)
        SwapSparse(measure=False, layers="0")(gm)
        optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
        pruner = Pruner(gm, "existing")
        pruner.attach(optimizer)
        step(gm, optimizer)
        weight = gm.get_parameter("2.weight")
        assert zeros(weight) == 0.9
        assert list(pruner.left_out.values()) == ["it is sparse already, and in a graph its pattern stays"]
        SwapSparse(measure=False)(gm)
        with pytest.raises(UsageError, match="has no parameter 'weight' any more; make the Pruner anew"):
            step(gm, optimizer)
        assert Pruner(gm, "existing").sparsity == 1  # nothing is dense, so there is nothing to keep
        with pytest.raises(UsageError, match=r"no layer of this .* can be pruned .*: it is sparse already"):
            Pruner(gm, 0.95)

    def test_weights_the_other_way_round(self):
        class Turned(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.addmm(self.bias, x, self.weight)

        gm = fxopt.capture(Turned(), (torch.randn(3, 8),))
        Pruner(gm, pattern="2:4")
        assert bool((gm.weight.t().reshape(6, 2, 4) != 0).sum(-1).eq(2).all())

    def test_a_graph_in_a_model_and_modules_in_a_graph(self):
        inner = fxopt.capture(net(), (torch.randn(8, 20),))
        outer = nn.Sequential(inner, nn.Linear(20, 4))
        assert Pruner(outer, 0.5).sparsity == 0.5
        gm = torch.fx.symbolic_trace(net())
        assert Pruner(gm, 0.5, layers=["2"]).sparsity == 0.5 and zeros(gm.get_parameter("0.weight")) == 0


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.table = nn.Embedding(8, 8)
    model[1].weight = model.table.weight
    return model


def viewed() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.table = nn.Embedding(4, 8)
    model.table.weight = nn.Parameter(model[1].weight.detach()[2:6])  # another parameter on the same memory
    return model


def other(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), layer)


class TestLeftOut:
    @pytest.mark.parametrize(
        ("make", "options", "reason"),
        [
            (tied, {"sparsity": 0.5}, r"used by table \(Embedding\) too"),
            (viewed, {"sparsity": 0.5}, r"used by table \(Embedding\) too"),
            (lambda: other(parametrizations.weight_norm(nn.Linear(8, 8))), {"sparsity": 0.5}, "its weight is computed"),
            (lambda: other(prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.1)), {"sparsity": 0.5}, "is computed"),
            (lambda: other(nn.Linear(8, 8, device="meta")), {"sparsity": 0.5}, "meta device"),
            (lambda: other(nn.Linear(6, 8)), {"pattern": "2:4"}, "it has 6 inputs, which 4 does not divide"),
        ],
    )
    def test_is_left_alone_and_told(self, make, options, reason):
        model = make()
        before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("0.")}
        pruner = Pruner(model, **options)
        assert list(pruner.left_out) == ["1"] and zeros(model[0].weight) == 0.5
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(pruner.left_out["1"])
        assert all(v.is_meta or torch.equal(v, before[k]) for k, v in model.state_dict().items() if k in before)
        with pytest.raises(UsageError, match=f"layers names '1', which cannot be pruned: .*{reason}.*; leave it out"):
            Pruner(model, **options, layers=["1"])

    def test_memory_in_one_piece_is_no_tie(self):
        """The parameters of a model may all lie in one storage, side by side."""
        model = net()
        flat = nn.utils.parameters_to_vector(model.parameters())
        nn.utils.vector_to_parameters(flat.detach(), model.parameters())
        assert not Pruner(model, 0.9).left_out
        assert len(swap(model, (2, 20), measure=False)[1].swapped) == 2

    def test_linear_layers_with_one_weight_are_pruned_as_one(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].weight = model[0].weight
        assert Pruner(model, 0.5).sparsity == 0.5 and zeros(model[0].weight) == 0.5
        assert Pruner(model, 0.75, layers=["1"]).sparsity == 0.75
        model.alias = model[0]
        assert Pruner(model, 0.875, layers=["alias"]).sparsity == 0.875

    def test_gpt2(self):
        model = build("gpt2-tiny")
        pruner = Pruner(model, 0.95)
        assert pruner.left_out == {"lm_head": "its weight is used by transformer.wte (Embedding) too"}
        assert zeros(model.transformer.wte.weight) == 0
        assert zeros(model.transformer.h[0].mlp.c_fc.weight) == pytest.approx(0.95, abs=1e-3)
        report = swap(model, {"input_ids": torch.arange(8)[None]}, measure=False)[1]
        told = {layer.name: layer for layer in report.layers}
        assert "fxopt.capture" in told["transformer.h.0.mlp.c_fc"].reason and not report.changed

    def test_a_stem_of_three_channels(self):
        pruner = Pruner(build("resnet18-tiny"), pattern="2:4")
        assert pruner.left_out == {"resnet.embedder.embedder.convolution": "it has 3 inputs, which 4 does not divide"}
        assert pruner.sparsity == 0.5


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "told"),
        [
            (lambda: Pruner(nn.Sequential(nn.ReLU()), 0.5), "no layer of this Sequential can be pruned"),
            (lambda: Pruner(nn.LazyLinear(8), 0.5), "a LazyLinear was given whose weight has no shape yet"),
            (lambda: Pruner(nn.Linear(4, 4), pattern=24), "pattern=24 was given; expected 'unstructured' or N:M"),
            (lambda: Pruner(nn.Linear(4, 4), True), "sparsity=True was given; expected a share"),
            (lambda: Pruner(None, 0.5), "a NoneType was given; expected a torch.nn.Module"),
            (lambda: Pruner(nn.Linear(4, 4), 0.5, layers="fc"), r"expected a list of names, such as \['fc'\]"),
            (lambda: Pruner(net(), 0.5, layers=["1"]), "layers names '1', which is a ReLU"),
            (lambda: CubicSchedule(0.9, "10"), "end='10' was given; expected a number of steps"),
        ],
    )
    def test_in_one_line(self, make, told):
        with pytest.raises(UsageError, match=told) as error:
            make()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_begins_anew_where_a_pattern_shrinks(line_search):
    torch.manual_seed(0)
    model = nn.Sequential(
        SparseLinear.from_dense(nn.Linear(20, 30)), nn.Tanh(), SparseLinear.from_dense(nn.Linear(30, 2))
    )
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn=line_search)
    pruner = Pruner(model, CubicSchedule(0.8, 3))
    pruner.attach(optimizer)
    x, y = torch.randn(64, 20), torch.randn(64, 2)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(8)]
    assert pruner.sparsity == pytest.approx(0.8, abs=0.01) and losses[-1] < losses[4] < 10
    assert optimizer._numel() == sum(p.numel() for p in model.parameters())
