"""The modules: state, training, copies, swapping in a model; and how pruning keeps what it should."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.nn.utils import prune

from fxopt.errors import UsageError
from fxopt.sparse import (
    CubicSchedule,
    Pruner,
    SparseConv2d,
    SparseLinear,
    magnitude_masks,
    n_m_mask,
    sparsify_conv2d_auto,
    sparsify_if_faster,
    swap,
    swap_modules_with_sparse,
)
from fxopt.sparse.measure import compare


def sparse_linear(inputs: int = 12, outputs: int = 9, sparsity: float = 0.7, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) > sparsity)
    return layer


def sparse_conv(sparsity: float = 0.7, seed: int = 0, **options: object) -> nn.Conv2d:
    torch.manual_seed(seed)
    layer = nn.Conv2d(6, 8, 3, **{"padding": 1, **options})
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) > sparsity)
    return layer


def with_padding(padding: tuple[int, int]) -> nn.Conv2d:
    layer = sparse_conv()
    layer.padding = padding
    return layer


def mixed(layer: nn.Module) -> nn.Module:
    layer.bias = nn.Parameter(layer.bias.detach().double())
    return layer


class TestModules:
    @pytest.mark.parametrize("make", [sparse_linear, sparse_conv])
    def test_state_dict_holds_the_pattern_and_brings_another(self, make):
        kind = SparseLinear if make is sparse_linear else SparseConv2d
        one, other = kind.from_dense(make(seed=0)), kind.from_dense(make(sparsity=0.9, seed=1))
        assert list(one.state_dict()) == ["values", "bias", "row_start", "column"]
        stored = load(save({k: v.contiguous() for k, v in other.state_dict().items()}))
        parameter = one.values
        one.load_state_dict(stored)
        assert one.values is parameter
        x = torch.randn(3, 12) if kind is SparseLinear else torch.randn(2, 6, 5, 5)
        assert torch.equal(one(x), other(x))
        one(x).sum().backward()
        other(x).sum().backward()
        assert torch.equal(one.values.grad, other.values.grad)

    def test_state_without_its_pattern_is_refused(self):
        one = SparseLinear.from_dense(sparse_linear())
        values = {"values": one.values.detach(), "bias": one.bias.detach()}
        with pytest.raises(RuntimeError, match="values without their pattern"):
            one.load_state_dict(values, strict=False)
        bad = {**one.state_dict(), "column": one.column + 100}
        with pytest.raises(RuntimeError, match="no pattern of a weight"):
            one.load_state_dict(bad)

    @pytest.mark.parametrize("make", [sparse_linear, lambda **k: sparse_conv(groups=2, **k)])
    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("change", [lambda t: t.long(), lambda t: torch.stack([t, t], 1)[:, 0]])
    def test_a_pattern_is_loaded_as_contiguous_int32(self, make, assign, change):
        kind = SparseLinear if make is sparse_linear else SparseConv2d
        one, other = kind.from_dense(make(seed=0)), kind.from_dense(make(sparsity=0.9, seed=1))
        state = {k: change(v) if k in ("row_start", "column") else v for k, v in other.state_dict().items()}
        one.load_state_dict(state, assign=assign)
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in one.pattern)
        assert one.column.data_ptr() != other.column.data_ptr()
        x = torch.randn(3, 12) if kind is SparseLinear else torch.randn(2, 6, 5, 5)
        assert torch.equal(one(x), other(x))

    def test_a_held_loss_keeps_its_values_where_others_are_assigned(self):
        one, other = (SparseLinear.from_dense(sparse_linear(sparsity=s)) for s in (0.5, 0.8))
        x = torch.randn(3, 12)
        held, before = one(x).sum(), one.values
        one.load_state_dict(other.state_dict(), assign=True)
        held.backward()
        assert one.values is not before and before.grad.shape == before.shape and one.values.grad is None
        assert torch.equal(one(x), other(x))

    def test_a_layer_on_the_meta_device_is_loaded_by_assigning(self):
        one, other = (SparseLinear.from_dense(sparse_linear(sparsity=s)) for s in (0.5, 0.8))
        one.to("meta")
        with pytest.raises(RuntimeError, match="meta device, which holds no numbers"):
            one.load_state_dict(other.state_dict())
        one.load_state_dict(other.state_dict(), assign=True)
        x = torch.randn(3, 12)
        assert torch.equal(one(x), other(x))

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda s: {"column": s["column"] + 60}, "no pattern of a weight"),  # of other groups, or none
            (lambda s: {"column": s["column"].flip(0)}, "no pattern of a weight"),
            (lambda s: {"column": s["column"].index_copy(0, torch.tensor([1]), s["column"][:1])}, "no pattern"),
            (lambda s: {"row_start": s["row_start"].index_fill(0, torch.tensor([2]), 0)}, "no pattern of a weight"),
            (lambda s: {"row_start": s["row_start"] + 1}, "no pattern of a weight"),
            (lambda s: {"row_start": s["row_start"][1:]}, "no pattern of a weight"),
            (lambda s: {"row_start": s["row_start"][:0]}, "no pattern of a weight"),
            (lambda s: {"column": s["column"] - 2**32}, "no pattern of a weight"),
            (lambda s: {"column": s["column"].float()}, "column of torch.float32 were given; expected int32"),
            (lambda s: {"column": s["column"].to("meta")}, "meta device"),
            (lambda s: {"values": s["values"].long()}, "no floating-point numbers"),
            (lambda s: {"values": s["values"][:-1]}, "no pattern of a weight"),
            (lambda s: {"values": "none"}, "values without their pattern"),
            (lambda s: {"bias": s["bias"][1:]}, "a bias of shape"),
            (lambda s: {"bias": 1.0}, "a bias of shape None"),
            (lambda s: {"bias": None}, "the state has no bias"),
        ],
    )
    @pytest.mark.parametrize("make", [sparse_linear, lambda **k: sparse_conv(groups=2, **k)])
    @pytest.mark.parametrize("assign", [False, True])
    def test_a_state_that_is_refused_changes_nothing(self, make, change, told, assign):
        kind = SparseLinear if make is sparse_linear else SparseConv2d
        one, other = kind.from_dense(make(seed=0, sparsity=0.5)), kind.from_dense(make(seed=1, sparsity=0.2))
        held = dict(one.state_dict(keep_vars=True))
        before = {k: v.clone() for k, v in one.state_dict().items()}
        state = {k: v.long() if k in ("row_start", "column") else v for k, v in other.state_dict().items()}
        with pytest.raises(RuntimeError, match=told):
            one.load_state_dict({**state, **change(state)}, assign=assign)
        assert all(torch.equal(v, before[k]) for k, v in one.state_dict().items())
        assert all(v is held[k] for k, v in one.state_dict(keep_vars=True).items())
        one.load_state_dict(state, assign=assign)  # as it is, it is taken

    def test_a_pattern_without_groups_does_not_go_into_one_with(self):
        one = SparseConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2))
        whole = SparseConv2d.from_dense(nn.Conv2d(4, 4, 3))
        with pytest.raises(RuntimeError, match="no pattern of a weight"):
            one.load_state_dict(whole.state_dict())
        assert one.to_dense().weight.shape == (4, 2, 3, 3)

    @pytest.mark.parametrize("make", [sparse_linear, sparse_conv])
    def test_no_random_numbers_are_drawn(self, make):
        dense = make()
        before = torch.get_rng_state()
        (SparseLinear if make is sparse_linear else SparseConv2d).from_dense(dense).to_dense()
        assert torch.equal(torch.get_rng_state(), before)

    def test_copies_and_pickles(self):
        one = SparseConv2d.from_dense(sparse_conv(groups=2, stride=2))
        x = torch.randn(2, 6, 7, 7)
        two = copy.deepcopy(one)
        file = io.BytesIO()
        torch.save(one, file)
        file.seek(0)
        three = torch.load(file, weights_only=False)
        with torch.no_grad():
            one.values.add_(1)
        assert torch.equal(two(x), three(x)) and not torch.equal(one(x), two(x))

    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
    def test_any_optimizer_trains_the_values_as_masked_dense(self, kind):
        dense = sparse_linear(seed=3)
        sparse, mask, x = SparseLinear.from_dense(dense), dense.weight != 0, torch.randn(16, 12)
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        one, two = kind(dense.parameters(), lr=0.01, **options), kind(sparse.parameters(), lr=0.01, **options)
        for _ in range(10):
            for layer, optimizer in ((dense, one), (sparse, two)):
                optimizer.zero_grad()
                layer(x).square().mean().backward()
                if layer is dense:
                    dense.weight.grad.mul_(mask)
                optimizer.step()
        torch.testing.assert_close(sparse.dense_weight(), dense.weight * mask, rtol=1e-4, atol=1e-6)

    def test_frozen_stays_frozen_and_modes_stay(self):
        dense = sparse_linear().eval()
        dense.weight.requires_grad_(False)
        sparse = SparseLinear.from_dense(dense)
        assert not sparse.values.requires_grad and sparse.bias.requires_grad and not sparse.training
        back = sparse.to_dense()
        assert not back.weight.requires_grad and back.bias.requires_grad and not back.training

    def test_float64_follows_double(self):
        sparse, x = SparseLinear.from_dense(sparse_linear()), torch.randn(3, 12)
        torch.testing.assert_close(sparse(x).double(), sparse.double()(x.double()))

    def test_the_source_is_not_touched(self):
        dense = sparse_linear()
        before = dense.weight.clone(), dense.bias.clone()
        sparse = SparseLinear.from_dense(dense)
        with torch.no_grad():
            sparse.values.zero_()
            sparse.bias.zero_()
        assert torch.equal(dense.weight, before[0]) and torch.equal(dense.bias, before[1])

    def test_keep_drops_values_in_place(self):
        sparse = SparseConv2d.from_dense(sparse_conv(groups=2))
        parameter, kept = sparse.values, sparse.values.detach().abs() > 0.05
        expected = sparse.dense_weight() * (sparse.dense_weight().abs() > 0.05)
        left = sparse.keep(kept)
        assert sparse.values is parameter and left.tolist() == kept.nonzero()[:, 0].tolist()
        assert torch.equal(sparse.dense_weight(), expected)
        with pytest.raises(UsageError, match="expected a boolean one of"):
            sparse.keep(torch.ones(3))

    @pytest.mark.parametrize(
        ("make", "told"),
        [
            (lambda: SparseLinear.from_dense(nn.Conv2d(1, 1, 1)), "given a Conv2d; expected a torch.nn.Linear"),
            (lambda: SparseLinear.from_dense(sparse_linear().bfloat16()), "bfloat16; expected float32 or float64"),
            (lambda: SparseLinear(torch.tensor([[float("nan")]])), "NaN or infinite"),
            (lambda: SparseLinear(torch.ones(3)), r"shape \(3,\).*expected \(out, in\)"),
            (lambda: SparseConv2d(torch.ones(3, 3)), "expected .out, in / groups, height, width."),
            (lambda: SparseConv2d(torch.ones(4, 4, 3, 3), padding=-1), r"padding \(-1, -1\).*expected .* 0 or more"),
            (lambda: SparseConv2d.from_dense(with_padding((-1, 0))), r"padding \(-1, 0\)"),
            (lambda: SparseConv2d(torch.ones(4, 4, 3, 3), padding=-1, padding_mode="circular"), "padding"),
            (lambda: SparseConv2d(torch.ones(4, 4, 3, 3), stride=0), r"stride \(0, 0\)"),
            (lambda: SparseConv2d(torch.ones(4, 4, 3, 3), stride=(1,)), "expected two of each"),
            (lambda: SparseConv2d(torch.ones(4, 4, 3, 3), dilation=(1, 0)), r"dilation \(1, 0\)"),
            (lambda: SparseConv2d(torch.ones(4, 4, 3, 3), groups=0), "groups must be a positive integer"),
            (lambda: SparseConv2d(torch.ones(4, 4, 3, 3), groups=3), "out_channels must be divisible by groups"),
            (lambda: SparseConv2d(torch.ones(4, 4, 3, 3), padding="all"), "options that torch.nn.Conv2d refuses"),
            (lambda: SparseLinear.from_dense(mixed(sparse_linear())), "a bias of torch.float64 on cpu beside a weight"),
            (lambda: SparseConv2d.from_dense(mixed(sparse_conv())), "a bias of torch.float64 on cpu beside a weight"),
            (lambda: SparseLinear(torch.ones(3, 3), torch.ones(3, device="meta")), "a bias of torch.float32 on meta"),
        ],
    )
    def test_wrong_weights_are_one_line(self, make, told):
        with pytest.raises(UsageError, match=told) as error:
            make()
        assert "\n" not in str(error.value)

    def test_seed_names(self):
        conv = sparse_conv()
        for flag in (True, False):
            x = torch.randn(2, 6, 9, 9)
            torch.testing.assert_close(SparseConv2d.from_dense(conv, vectorizing_over_on=flag)(x), conv(x))
        sparse = SparseLinear.from_dense(sparse_linear())
        assert sparse.weight is sparse.values
        sparse.apply_further_mask(torch.zeros_like(sparse.values))
        assert sparse.sparsity == 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 64)
        self.wide, self.dense = nn.Linear(64, 512), nn.Linear(512, 512)
        self.shared = nn.ModuleList([sparse_linear(512, 512, 0.98)] * 2)
        self.head = nn.Linear(512, 64, bias=False)
        self.out = nn.Linear(64, 10, bias=False)
        self.out.weight = self.embed.weight
        with torch.no_grad():
            self.wide.weight.mul_(torch.rand_like(self.wide.weight) > 0.98)
            self.head.weight.mul_(torch.rand_like(self.head.weight) > 0.98)
            self.head.weight[0, 0] = float("nan")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.dense(self.wide(self.embed(x))))
        for layer in self.shared:
            y = layer(y)
        return self.out(torch.nan_to_num(self.head(y)))


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return {}["missing"]


class TestSwap:
    def test_each_layer_is_told_about_and_the_model_stays(self):
        model, x = Model(), torch.randint(0, 10, (4, 50))
        state = {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}
        swapped, report = swap(model, {"x": x}, measure=False)
        assert {k: id(v) for k, v in model.state_dict(keep_vars=True).items()} == state
        told = {layer.name: layer for layer in report.layers}
        assert [n for n, layer in told.items() if layer.swapped] == ["wide", "shared.0"]
        assert told["dense"].reason == "less than 50% zeros"
        assert told["head"].reason == "the weight has elements that are NaN or infinite"
        assert told["out"].reason == "its weight is used by another module too"
        assert swapped.shared[0] is swapped.shared[1] and isinstance(swapped.shared[0], SparseLinear)
        assert swapped.out.weight is swapped.embed.weight
        torch.testing.assert_close(swapped(x), model(x), rtol=1e-4, atol=1e-5)
        assert str(report).endswith("2 of 5 layers are sparse")

    def test_measured(self, capsys):
        """What is faster by far is swapped, what is hopeless is not; near 1 either may be right."""
        model = nn.Sequential(sparse_conv(0.99), nn.BatchNorm2d(8), nn.Flatten(), sparse_linear(8 * 256, 1024, 0.99))
        model.append(sparse_linear(1024, 2, 0.8))
        statistics = model[1].running_mean.clone()
        swapped = swap_modules_with_sparse(model, (64, 6, 16, 16), verbose=True)
        assert isinstance(swapped[3], SparseLinear) and isinstance(model[3], nn.Linear)
        assert torch.equal(model[1].running_mean, statistics) and model.training
        assert "backward" in capsys.readouterr().out

    def test_inplace_and_skipping(self):
        model = nn.Sequential(sparse_linear(), sparse_linear(9, 9))
        swapped, report = swap(model, (2, 12), inplace=True, skip_modules=["0"], measure=False)
        assert swapped is model and isinstance(model[0], nn.Linear) and isinstance(model[1], SparseLinear)
        assert report.layers[0].reason == "named in skip_modules"
        lone = swap(sparse_linear(), (2, 12), measure=False)[0]
        assert isinstance(lone, SparseLinear)

    @pytest.mark.parametrize(
        ("run", "told"),
        [
            (lambda m: swap(m, (2, 13)), "cannot be called with these inputs: RuntimeError: .*; give a shape or"),
            (lambda m: swap(m, (2, 12), min_sparsity=80), "min_sparsity=80 was given"),
            (lambda m: swap(m, (2, 12), skip_modules=["9"]), "skip_modules has '9', which the model has not"),
            (lambda m: sparsify_if_faster(nn.ReLU(), (2, 12)), "a ReLU was given"),
            (lambda m: sparsify_if_faster(m[0], (2, 13)), r"input_shape \(2, 13\) was given; this layer takes \(\.\.\., 12\)"),  # noqa: E501
            (lambda m: sparsify_conv2d_auto(sparse_conv(), (2, 5, 8, 8)), r"takes \(batch, 6, height, width\)"),
        ],
    )  # fmt: skip
    def test_wrong_use_is_one_line_and_changes_nothing(self, run, told):
        model = nn.Sequential(sparse_linear())
        with pytest.raises(UsageError, match=told) as error:
            run(model)
        assert "\n" not in str(error.value) and type(model[0]) is nn.Linear and not model[0]._forward_pre_hooks

    def test_hooks_and_subclasses_stay(self):
        class Mine(nn.Linear):
            pass

        model = nn.Sequential(
            Mine(4, 4), sparse_linear(4, 4, 0.9), torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        )
        model[1].register_forward_hook(lambda *_: None)
        _, report = swap(model, (2, 4), min_sparsity=0, measure=False)
        reasons = [layer.reason for layer in report.layers]
        assert len(report.swapped) == 0 and "subclass" in reasons[0] and "hooks" in reasons[1]

    @pytest.mark.parametrize(
        "hook",
        [
            lambda m: m.register_forward_pre_hook(lambda *_: None),
            lambda m: m.register_full_backward_hook(lambda *_: None),
            lambda m: m.register_full_backward_pre_hook(lambda *_: None),
            lambda m: m.register_state_dict_post_hook(lambda *_: None),
            lambda m: m.register_state_dict_pre_hook(lambda *_: None),
            lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
            lambda m: m.register_load_state_dict_post_hook(lambda *_: None),
            lambda m: m.weight.register_hook(lambda g: g),
            lambda m: m.bias.register_post_accumulate_grad_hook(lambda p: None),
        ],
    )
    def test_no_hook_is_lost(self, hook):
        model = nn.Sequential(sparse_linear(4, 4, 0.9))
        hook(model[0])
        swapped, report = swap(model, (2, 4), measure=False, inplace=True)
        assert swapped[0] is model[0] and report.layers[0].reason == "it has hooks, or a forward of its own"

    @pytest.mark.parametrize("tie", ["module", "parent", "memory"])
    def test_tied_biases_stay_tied(self, tie):
        model = nn.Sequential(sparse_linear(8, 8), sparse_linear(8, 8, seed=1))
        if tie == "module":
            model[1].bias = model[0].bias
        elif tie == "parent":
            model.bias = model[0].bias
        else:
            model[1].bias = nn.Parameter(model[0].bias.detach())
        swapped, report = swap(model, (2, 8), measure=False, inplace=True)
        told = [layer.reason for layer in report.layers]
        assert told[0] == "its bias is used by another module too" and (told[1] == told[0]) is (tie != "parent")
        other = swapped.bias if tie == "parent" else swapped[1].bias
        with torch.no_grad():
            swapped[0].bias.add_(1)
        assert torch.equal(other, swapped[0].bias)

    def test_pruned_by_torch_is_copied_and_left(self):
        model = nn.Sequential(sparse_linear(4, 4, 0.9))
        model.append(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.9))
        swapped, report = swap(model, (2, 4), measure=False)
        assert [layer.swapped for layer in report.layers] == [True, False] and "prune" in report.layers[1].reason
        x = torch.randn(2, 4)
        torch.testing.assert_close(swapped(x), model(x))
        assert swapped[1].weight_orig is not model[1].weight_orig

    @pytest.mark.parametrize("kind", ["linear", "conv"])
    @given(sparsity=st.floats(0, 1))
    def test_what_was_pruned_to_a_share_has_that_share(self, kind, sparsity):
        model = nn.Sequential(nn.Linear(7, 11) if kind == "linear" else nn.Conv2d(3, 5, 3))
        Pruner(model, sparsity)
        report = swap(model, (2, 7), sparsity, measure=False)[1]
        assert report.layers[0].swapped, report

    def test_skips_by_any_name(self):
        model = nn.Sequential(sparse_linear(4, 4, 0.9))
        model.alias = model[0]
        report = swap(model, (2, 4), skip_modules=["alias"], measure=False)[1]
        assert report.layers[0].reason == "named in skip_modules"

    @pytest.mark.parametrize("measure", [True, False])
    def test_later_random_numbers_are_those_without_it(self, measure):
        model = nn.Sequential(sparse_linear(), nn.Dropout())
        sparse, before = SparseLinear.from_dense(model[0]), torch.get_rng_state()
        swap(model, (4, 12), measure=measure)
        if measure:
            compare(model[0], sparse, (4, 12))
        assert torch.equal(torch.get_rng_state(), before)

    def test_torchs_own_transformer_layer_has_no_way_around_it(self):
        model = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        )
        x = torch.randn(2, 5, 8)
        swapped, report = swap(model.eval(), x, min_sparsity=0, measure=False)
        assert len(report.swapped) == 4  # not the attention's out_proj, of which only the weight is used
        with torch.no_grad():
            torch.testing.assert_close(swapped(x), model(x), rtol=1e-4, atol=1e-5)

    def test_auto_prints_what_it_measured(self, capsys):
        conv = sparsify_conv2d_auto(sparse_conv(), (2, 6, 8, 8), verbose=True)
        assert isinstance(conv, SparseConv2d) and "backward" in capsys.readouterr().out
        timing = compare(sparse_linear(), SparseLinear.from_dense(sparse_linear()), (4, 12), backward=False)
        assert timing.backward is None and timing.total == timing.forward
        assert isinstance(sparsify_if_faster(sparse_linear(sparsity=0.1), (4, 12)), nn.Linear)

    @pytest.mark.parametrize(
        ("use", "told"),
        [
            (lambda: swap("resnet", (2, 3)), "a str was given; expected a torch.nn.Module"),
            (lambda: swap(nn.Linear(3, 3), None), "None was given as inputs; expected the shape"),
            (lambda: swap(nn.Linear(3, 3), (2, 3), min_sparsity="most"), "min_sparsity=most was given"),
            (lambda: swap(Failing(), (2, 3)), "cannot be called with these inputs: KeyError: 'missing'; give a shape"),
            (lambda: swap(nn.Linear(3, 3), (-2, 3)), r"the shape \(-2, 3\) was given as inputs; expected sizes of 1"),
            (lambda: swap(nn.Linear(3, 3), 8), "8 was given as inputs; expected the shape"),
            (lambda: swap(nn.LazyLinear(3), (2, 3)), "has no shape yet; run it once"),
            (lambda: sparsify_conv2d_auto(nn.Conv2d(3, 3, 5), (1, 3, 2, 9)), "a kernel of 5 × 5 does not fit"),
            (lambda: sparsify_conv2d_auto(nn.Conv2d(3, 3, 5), 8), r"8 was given as input_shape; expected sizes, \(ba"),
            (lambda: sparsify_if_faster(nn.Linear(3, 3), torch.ones(2, 3)), "a Tensor was given as input_shape"),
            (lambda: SparseLinear.from_dense(nn.Linear(3, 4, device="meta")), "holds no numbers; load it first"),
            (lambda: SparseLinear.from_dense(nn.LazyLinear(3)), "has no shape yet; run it once"),
            (lambda: SparseConv2d.from_dense(nn.LazyConv2d(3, 3)), "has no shape yet; run it once"),
            (lambda: SparseConv2d.from_dense(sparse_conv(), vectorizing_over_on=2), "expected True, False or None"),
        ],
    )
    def test_wrong_arguments_are_one_line(self, use, told):
        with pytest.raises(UsageError, match=told) as error:
            use()
        assert "\n" not in str(error.value)

    def test_inputs_that_do_not_fit_leave_nothing_behind(self):
        model = nn.Sequential(sparse_linear())
        for wrong in (None, (2, 5)):
            with pytest.raises(UsageError):
                swap(model, wrong)
        assert not model[0]._forward_pre_hooks and model.training
        assert swap(model, (2, 12), min_sparsity=0)[1].layers[0].timing is not None

    @pytest.mark.parametrize("order", [None, True, False])
    def test_both_orders_of_sparseprop_are_one_kernel(self, order):
        conv, x = sparse_conv(stride=2), torch.randn(2, 6, 9, 7)
        assert torch.equal(
            SparseConv2d.from_dense(conv, vectorizing_over_on=order)(x), SparseConv2d.from_dense(conv)(x)
        )


class TestPruning:
    @given(
        sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
        sparsity=st.floats(0, 1),
        scope=st.sampled_from(["uniform", "global"]),
        seed=st.integers(0, 1000),
    )
    def test_masks_drop_exactly_the_least(self, sizes, sparsity, scope, seed):
        generator = torch.Generator().manual_seed(seed)
        weights = {str(i): torch.randint(-4, 5, s, generator=generator).float() for i, s in enumerate(sizes)}
        masks = magnitude_masks(weights, sparsity, scope=scope)
        groups = [[n] for n in weights] if scope == "uniform" else [list(weights)]
        for group in groups:
            all_, mask = (torch.cat([d[n].flatten() for n in group]) for d in (weights, masks))
            assert int((~mask).sum()) == round(sparsity * all_.numel())
            if mask.any() and not mask.all():
                assert all_[mask].abs().min() >= all_[~mask].abs().max()

    @given(
        n=st.integers(0, 4), m=st.integers(1, 5), groups=st.integers(1, 4), conv=st.booleans(), seed=st.integers(0, 99)
    )
    def test_n_of_m(self, n, m, groups, conv, seed):
        n = min(n, m)
        shape = (3, m * groups, 2, 3) if conv else (3, m * groups)
        mask = n_m_mask(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), n, m)
        assert bool((mask.movedim(1, -1).reshape(-1, m).sum(1) == n).all())

    def test_cubic_schedule(self):
        schedule = CubicSchedule(0.9, end=100, begin=20, initial=0.1, every=7)
        assert [schedule.at(s) for s in (0, 20, 100, 500)] == [0.0, pytest.approx(0.1), 0.9, 0.9]
        assert schedule.at(60) == pytest.approx(0.9 - 0.8 * 0.125)
        assert [s for s in range(120) if schedule.due(s)][:2] == [20, 27] and schedule.due(100)

    @pytest.mark.parametrize("scope", ["uniform", "global"])
    def test_gradual_pruning_reaches_its_end_in_dense_and_sparse_layers(self, scope):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), SparseLinear.from_dense(nn.Linear(30, 20)))
        parameters = list(model.parameters())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        pruner = Pruner(model, CubicSchedule(0.8, end=12, every=3), scope=scope)
        pruner.attach(optimizer)
        x, seen = torch.randn(8, 20), []
        for _ in range(16):
            loss = model(x).square().mean()  # held while the next one is made, as in most loops
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(pruner.sparsity)
        assert seen == sorted(seen) and seen[-1] == pytest.approx(0.8, abs=0.002)
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        values = model[2].values
        assert optimizer.state[values]["exp_avg"].shape == values.shape

    def test_existing_zeros_stay(self):
        layer = sparse_linear()
        zeros, optimizer = layer.weight == 0, torch.optim.SGD(layer.parameters(), lr=1.0)
        pruner = Pruner(layer, "existing")
        handle = pruner.attach(optimizer)
        layer(torch.randn(4, 12)).sum().backward()
        optimizer.step()
        assert torch.equal(layer.weight == 0, zeros)
        handle.remove()
        optimizer.step()
        assert not torch.equal(layer.weight == 0, zeros)

    @pytest.mark.parametrize(
        ("make", "told"),
        [
            (lambda m: Pruner(m), "expected a sparsity or N:M, not both"),
            (lambda m: Pruner(m, 1.5), "sparsity=1.5 was given"),
            (lambda m: Pruner(m, 0.5, pattern="4:2"), "expected 'unstructured' or N:M"),
            (lambda m: Pruner(m, 0.5, layers=["x"]), "layers names 'x', which is nothing"),
            (lambda m: Pruner(m, "all"), "expected a share, a CubicSchedule or 'existing'"),
            (lambda m: Pruner(m, pattern="5:7"), "the model: it has 12 inputs, which 7 does not divide"),
            (lambda m: CubicSchedule(0.9, end=0), "expected 0 <= begin < end"),
            (lambda m: magnitude_masks({"w": torch.tensor([float("inf")])}, 0.5), "w has elements that are NaN"),
        ],
    )
    def test_wrong_use_is_one_line(self, make, told):
        layer = sparse_linear()
        before = layer.weight.clone()
        with pytest.raises(UsageError, match=told) as error:
            make(layer)
        assert "\n" not in str(error.value) and torch.equal(layer.weight, before)
