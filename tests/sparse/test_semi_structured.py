"""`SemiStructuredLinear` as a module, which weights it keeps, and where the guard takes it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from transformers.pytorch_utils import Conv1D

from fxopt.errors import Conflict, UsageError
from fxopt.kernels.semi_structured import accelerated
from fxopt.sparse import (
    BlockSparseLinear,
    BlockSparseModelPatcher,
    SemiStructuredLinear,
    Spec,
    block_plan,
    following,
    kept_pairs,
    n_m_mask,
)
from fxopt.sparse.block_plan import Planner
from fxopt.sparse.block_report import Timing


def test_it_keeps_the_two_largest_of_four():
    linear = nn.Linear(128, 96)
    layer = SemiStructuredLinear.from_dense(linear)
    assert torch.equal(layer.weight, linear.weight * n_m_mask(linear.weight, 2, 4)) and layer.bias is linear.bias
    assert torch.equal(layer.kept, n_m_mask(linear.weight, 2, 4))
    x = torch.randn(2, 3, 128)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, linear.bias))
    dense = layer.to_dense()
    assert torch.equal(dense.weight, layer.weight) and dense.bias is linear.bias


def test_activation_weighs_by_the_norm_of_the_input():
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 128, bias=False), torch.randn(500, 256) * torch.logspace(-2, 1, 256)[torch.randperm(256)]
    kept = kept_pairs(linear.weight, "activation", x)
    assert torch.equal(kept, n_m_mask(linear.weight * x.norm(dim=0), 2, 4))
    errors = {
        select: float((SemiStructuredLinear.from_dense(linear, select, x)(x) - linear(x)).detach().norm())
        for select in ("magnitude", "activation")
    }
    assert errors["activation"] < 0.9 * errors["magnitude"], errors


def test_existing_is_lossless():
    linear = nn.Linear(128, 96)
    with pytest.raises(UsageError, match="more than two of four weights that are not zero"):
        SemiStructuredLinear.from_dense(linear, "existing")
    with torch.no_grad():
        linear.weight.mul_(n_m_mask(linear.weight, 2, 4))
        linear.weight[:, :64] = 0
    assert torch.equal(SemiStructuredLinear.from_dense(linear, "existing").weight, linear.weight)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("calibrated", (True, False))
def test_rescale_comes_closer(dtype, calibrated):
    torch.manual_seed(0)
    linear = nn.Linear(256, 64, bias=False, dtype=dtype)
    x = 30 * (torch.randn(300, 1) + 0.3 * torch.randn(300, 256)).to(dtype)
    plain, scaled = (
        SemiStructuredLinear.from_dense(linear, inputs=x if calibrated else None, rescale=r) for r in (0, 1)
    )
    if calibrated:
        lost = [float((layer(x) - linear(x)).detach().float().norm()) for layer in (plain, scaled)]
        assert lost[1] < lost[0]
    else:
        torch.testing.assert_close(scaled.weight.norm(dim=1), linear.weight.norm(dim=1))


def test_a_conv1d_of_transformers_is_one_too():
    linear, x = Conv1D(64, 128), torch.randn(3, 128)
    layer = SemiStructuredLinear.from_dense(linear)
    wanted = linear.weight.t() * n_m_mask(linear.weight.t(), 2, 4)
    torch.testing.assert_close(layer(x), F.linear(x, wanted, linear.bias))


def test_its_state_goes_through_safetensors_and_casts():
    a, x = SemiStructuredLinear(128, 64), torch.randn(3, 128)
    state = load(save(a.state_dict()))
    assert {k: v.dtype for k, v in state.items()} == {
        "values": torch.float32,
        "bias": torch.float32,
        "metadata": torch.int16,
    }
    b = SemiStructuredLinear(128, 64, device="meta").to_empty(device="cpu")
    b.load_state_dict(state)
    assert torch.equal(a(x), b(x))
    half = copy.deepcopy(a).half()
    assert half.metadata.dtype == torch.int16 and torch.equal(half.weight, a.weight.half())
    assert repr(a) == "SemiStructuredLinear(in_features=128, out_features=64, bias=True)"


def test_made_from_nothing_it_is_drawn_as_a_dense_layer_and_trains():
    torch.manual_seed(0)
    layer, x = SemiStructuredLinear(1024, 256), torch.randn(200, 1024)
    with torch.no_grad():
        ratio = layer(x).std() / nn.Linear(1024, 256)(x).std()
    assert 0.8 < float(ratio) < 2
    optimizer, kept = torch.optim.AdamW(layer.parameters(), lr=0.01), layer.kept
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0] and torch.equal(layer.weight != 0, kept)


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: SemiStructuredLinear(64, 33), r"shape \(33, 64\) was given, expected multiples of 32 and 64 for 2:4"),
        (lambda: SemiStructuredLinear(96, 32), r"shape \(32, 96\) was given"),
        (
            lambda: SemiStructuredLinear.from_dense(nn.Linear(64, 32), "balanced"),
            "expected magnitude, activation, exis",
        ),
        (lambda: SemiStructuredLinear.from_dense(nn.Linear(64, 32), torch.ones(32, 64)), "select=tensor"),
        (lambda: SemiStructuredLinear.from_dense(nn.Linear(64, 32), "activation"), "needs inputs"),
        (lambda: SemiStructuredLinear.from_dense(nn.ReLU()), "a ReLU was given"),
        (lambda: Spec(0.25, "2:4"), 'block="2:4" keeps 0.5 by magnitude, activation, existing'),
        (lambda: Spec(None, "2:4", torch.ones(32, 64)), 'block="2:4" keeps 0.5'),
        (lambda: Spec(0.5, "4:8"), "block_shape='4:8' was given"),
    ),
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


# --- the guard -------------------------------------------------------------------------------------------------------


@pytest.fixture
def times(monkeypatch):
    """Let 2:4 be there, as on a GPU, and the speeds be those that are said: of the contenders, by tokens."""

    def set_(**speeds):
        named = {"dense": {1: 1.0, 128: 1.0}, "block-sparse": speeds["blocks"], "2:4": speeds["pairs"]}

        def timed(contenders, weight, tokens):
            return {n: {t: Timing(1e-4 / named[n][t], named[n][t]) for t in tokens} for n in contenders}

        monkeypatch.setattr(block_plan, "timed", timed)

    monkeypatch.setattr(block_plan, "accelerated", lambda weight: weight.shape[1] % 64 == 0)
    return set_


WEIGHT, INPUTS = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), torch.randn(5, 128)


def decided(spec, weight=WEIGHT):
    return Planner("auto", (1, 128)).plan("layer", weight, None, spec, INPUTS[:, : weight.shape[1]])


@pytest.mark.parametrize(
    ("blocks", "pairs", "decision"),
    (
        ({1: 2.0, 128: 2.0}, {1: 1.5, 128: 1.5}, "block-sparse"),
        ({1: 1.5, 128: 1.5}, {1: 2.0, 128: 2.0}, "2:4"),
        ({1: 1.1, 128: 4.0}, {1: 2.0, 128: 2.0}, "block-sparse"),  # geometric means: 2.1 and 2
        ({1: 0.9, 128: 9.0}, {1: 1.1, 128: 1.1}, "2:4"),  # never slower
        ({1: 1.2, 128: 1.2}, {1: 0.9, 128: 9.0}, "block-sparse"),
        ({1: 1.0, 128: 9.0}, {1: 0.9, 128: 9.0}, "dense"),
    ),
)
def test_what_is_slower_nowhere_and_fastest_in_the_mean_is_kept(blocks, pairs, decision, times):
    times(blocks=blocks, pairs=pairs)
    plan = decided(Spec(0.25, (16, 16)))
    report = plan.report
    assert report.decision == decision and plan.kept == (decision != "dense")
    assert {n: {t: x.speed for t, x in found.items()} for n, found in report.timings.items()} == {
        "dense": {1: 1.0, 128: 1.0},
        "block-sparse": blocks,
        "2:4": pairs,
    }
    assert report.speed == (pairs if decision == "2:4" else blocks)
    if decision == "2:4":
        assert type(plan.layer) is SemiStructuredLinear and report.block == "2:4" and report.density == 0.5
        assert report.bytes_after == 64 * 64 * 4 + 64 * 8 * 2
    else:
        assert type(plan.layer) is BlockSparseLinear and report.density == 0.25
    assert report.error == block_plan.output_error(WEIGHT, plan.layer, INPUTS)
    squares = WEIGHT.double().square()
    assert report.energy == pytest.approx(float(squares[plan.layer.kept].sum() / squares.sum()))


FAST = {"blocks": {1: 1.1, 128: 1.1}, "pairs": {1: 2.0, 128: 2.0}}


@pytest.mark.parametrize(
    ("spec", "offered"),
    (
        (Spec(0.5), True),
        (Spec(0.25, (16, 16), "activation"), True),
        (Spec(0.51), False),  # what was asked for keeps more
        (Spec(0.75), False),
        (Spec(0.25, (16, 16), "balanced"), False),
        (Spec(0.25, (16, 16), "random(1)"), False),
        (Spec(None, (16, 16), torch.ones(4, 8)), False),
        (Spec(0.25, (16, 16), torch.ones(4, 8)), False),
        (Spec(select="existing"), False),  # of a weight without zeros
    ),
)
def test_it_is_offered_where_it_is_no_less_than_asked_for(spec, offered, times):
    times(**FAST)
    plan = decided(spec)
    assert plan.report.decision == ("2:4" if offered else "block-sparse")
    assert ("2:4" in plan.report.timings) == offered


def test_existing_offers_it_for_a_weight_that_is_two_of_four(times):
    times(**FAST)
    weight = torch.randn(64, 128)
    weight *= n_m_mask(weight, 2, 4)
    plan = decided(Spec(select="existing"), weight)
    assert plan.report.decision == "2:4" and torch.equal(plan.layer.weight, weight)


def test_shapes_without_kernels_and_forced_layers_are_left_to_blocks(times):
    times(**FAST)
    assert decided(Spec(0.5), torch.randn(64, 100)).report.decision == "block-sparse"
    assert Planner("off").plan("a", torch.randn(64, 128), None, Spec(0.5), None).report.decision == "block-sparse"


def test_asked_for_it_is_timed_against_dense_alone(times):
    times(**FAST)
    report = decided(Spec(block="2:4", select="activation")).report
    assert report.decision == "2:4" and set(report.timings) == {"dense", "2:4"}
    assert Planner("off").plan("a", torch.randn(64, 128), None, Spec(block="2:4"), None).report.decision == "2:4"
    with pytest.raises(UsageError, match=r"a: a weight of shape \(64, 100\) was given"):
        Planner("off").plan("a", torch.randn(64, 100), None, Spec(block="2:4"), None)


def test_really_timed_all_three_are_told(monkeypatch):
    monkeypatch.setattr(block_plan, "accelerated", lambda weight: True)
    report = Planner("auto", (1, 16)).plan("a", torch.randn(64, 128), None, Spec(0.25, (16, 16)), None).report
    assert set(report.timings) == {"dense", "block-sparse", "2:4"}
    assert all(set(found) == {1, 16} for found in report.timings.values())
    assert all(x.seconds > 0 and x.speed > 0 for found in report.timings.values() for x in found.values())
    assert all(x.speed < 1 for x in report.timings["2:4"].values())  # decompressed each time, on the CPU
    assert report.decision != "2:4"


# --- plain models ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """One weight under two biases, a module called twice, and a weight (in, out)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.turned = nn.Linear(64, 64), nn.Linear(64, 64, bias=False), Conv1D(64, 64)
        self.again, self.b.weight = self.a, self.a.weight
        self.small = nn.Linear(64, 3)

    def forward(self, x):
        return self.small(self.turned(self.b(self.again(self.a(x)))))


def state(model):
    return [(k, id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()]


def same(model, before):
    now = state(model)
    return [(k, i) for k, i, _ in now] == [(k, i) for k, i, _ in before] and all(
        torch.equal(a[2], b[2]) for a, b in zip(now, before, strict=True)
    )


def patcher(**patterns):
    made = BlockSparseModelPatcher(tokens=(1, 128))
    for name, spec in (patterns or {"a|turned": 0.25, "small": 0.75}).items():
        made.add_pattern(name, spec)
    return made


@pytest.mark.parametrize("text", (str, lambda report: report._repr_html_()))
def test_a_model_is_patched_told_and_restored_as_the_same_objects(times, text):
    times(**FAST)
    model, x = Net().eval(), torch.randn(5, 64)
    before, wanted, made = state(model), model(x), patcher()
    report = made.patch_model(model, inputs=x)
    assert [type(m) for m in (model.a, model.b, model.turned)] == [SemiStructuredLinear] * 3
    assert model.a is model.again and model.a.values is model.b.values and model.b.bias is None
    assert type(model.small) is BlockSparseLinear
    assert report.summary.startswith("1 of 3 layers are block-sparse, 2 are 2:4: ")
    shown = text(report)
    for told in ("2 of 4", "100 µs", "91 µs, 1.10 ×", "50 µs, 2.00 ×", "2:4", "block-sparse", "tokens"):
        assert told in shown, shown
    assert report.to_json()["layers"][0]["timings"]["2:4"][128] == {"seconds": 5e-5, "speed": 2.0}
    assert report.to_json()["layers"][0]["speed"] == {1: 2.0, 128: 2.0}
    made.restore(model)
    assert same(model, before) and torch.equal(model(x), wanted)


@pytest.mark.parametrize("mode", ("zeros", "merge"))
def test_trained_the_caller_chooses_and_the_optimizer_goes_along(mode, times):
    times(**FAST)
    model, x, made = Net(), torch.randn(5, 64), patcher()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    step()
    originals = {name: getattr(model, name).weight.detach().clone() for name in ("a", "turned")}
    moments = {name: optimizer.state[getattr(model, name).weight]["exp_avg"].clone() for name in ("a", "turned")}
    made.patch_model(model, optimizer=optimizer)
    kept = {"a": model.a.kept, "turned": model.turned.kept.t()}
    for name, layer in (("a", model.a), ("turned", model.turned)):
        held = layer.dense(optimizer.state[layer.values]["exp_avg"])
        assert torch.equal(held.t() if name == "turned" else held, moments[name] * kept[name])
    step()
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    with pytest.raises(Conflict, match="changed since; say mode='zeros'"):
        made.restore(model)
    trained = model(x)
    made.restore(model, mode=mode, optimizer=optimizer)
    if mode == "zeros":
        torch.testing.assert_close(model(x), trained)
    for name, original in originals.items():
        weight = getattr(model, name).weight
        rest = torch.zeros_like(original) if mode == "zeros" else original
        assert torch.equal(weight[~kept[name]], rest[~kept[name]]) and (weight != original)[kept[name]].any()
    assert model.a.weight is model.b.weight
    step()
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_following_leaves_other_values_alone():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(torch.randn(4, 4))

    model = nn.Sequential(Other(), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    with following(optimizer, model):
        model[1] = SemiStructuredLinear.from_dense(model[1])
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_the_guard_on_a_gpu(dtype):
    """What it decides is by its own times; what it leaves behind computes what the masked layer does, and goes back."""
    model = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096)).to("cuda", dtype).eval()
    originals, x = [copy.deepcopy(model[i]) for i in (0, 2)], torch.randn(128, 4096, dtype=dtype, device="cuda")
    before, made = state(model), BlockSparseModelPatcher(tokens=(128, 1024))
    made.add_pattern("0|2", {"density": 0.25, "block": (64, 64)})
    report = made.patch_model(model, inputs=x)
    print(report)
    contenders = {"dense", "block-sparse", *(["2:4"] if accelerated(originals[0].weight) else [])}
    for layer, original in zip(report, originals, strict=True):
        assert set(layer.timings) == contenders
        if layer.decision != "dense":
            assert all(speed > 1 for speed in layer.speed.values())
        now = model.get_submodule(layer.path)
        if layer.decision == "2:4":
            assert torch.equal(now.weight, original.weight * n_m_mask(original.weight, 2, 4))
        masked = F.linear(x.double(), now.weight.double(), now.bias.double())
        torch.testing.assert_close(now(x).double(), masked, rtol=0, atol=3e-2)
    made.restore(model)
    assert same(model, before)
