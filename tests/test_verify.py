"""verify: what must be found is found, what is equal passes, and the caller's things are as they were."""

import copy
import io
import json
import math
import random
import sys
from collections import OrderedDict, namedtuple

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from fxopt.errors import UsageError, VerificationError
from fxopt.verify import Baseline, overlap, verify

module_under_test = sys.modules["fxopt.verify"]  # as an attribute of the package it is the function

DYNAMIC = torch.export.Dim.DYNAMIC


def seeded(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def export(model, inputs, dims):
    shapes = {name: dict.fromkeys(dims, DYNAMIC) for name in inputs}
    return torch.export.export(model.eval(), (), inputs, dynamic_shapes=shapes, strict=False).module()


X = seeded(4, 8)
W = seeded(8, 8, seed=1)
Pair = namedtuple("Pair", "first second")


def poke(x, value, at=(1, 2)):
    y = x.clone()
    y[at] = value
    return y


# What each rewrite got wrong: the original, the wrong one, and a word that the report has to hold.
WRONG = {
    "one element, a little": (lambda x: x + 1, lambda x: poke(x + 1, (x + 1)[1, 2] + 1e-3), "[1, 2] differs"),
    "every element, a little": (lambda x: x @ W, lambda x: x @ W * (1 + 1e-3), "differs"),
    "transposed weight": (lambda x: x @ W, lambda x: x @ W.t(), "differs"),
    "wrong eps": (lambda x: F.layer_norm(x, (8,), eps=1e-5), lambda x: F.layer_norm(x, (8,), eps=1e-3), "differs"),
    "a smaller eps": (lambda x: F.layer_norm(x, (8,), eps=1e-5), lambda x: F.layer_norm(x, (8,), eps=1e-6), "differs"),
    "tanh for erf": (F.gelu, lambda x: F.gelu(x, approximate="tanh"), "differs"),
    "silu for gelu": (F.gelu, F.silu, "differs"),
    "softmax over rows": (lambda x: x.softmax(-1), lambda x: x.softmax(0), "differs"),
    "bias lost": (lambda x: F.linear(x, W, W[0]), lambda x: F.linear(x, W), "differs"),
    "NaN": (lambda x: x + 1, lambda x: poke(x + 1, math.nan), "not finite"),
    "NaN lost": (lambda x: poke(x, math.nan), lambda x: poke(x, 0.0), "not finite"),
    "Inf": (lambda x: x + 1, lambda x: poke(x + 1, math.inf), "not finite"),
    "Inf of the other sign": (lambda x: poke(x, math.inf), lambda x: poke(x, -math.inf), "not finite"),
    "wider dtype": (lambda x: x + 1, lambda x: x.double() + 1, "dtype float64, expected float32"),
    "integer dtype": (lambda x: x.argmax(-1), lambda x: x.argmax(-1).int(), "dtype int32, expected int64"),
    "one integer": (lambda x: (x > 0).long(), lambda x: poke((x > 0).long(), 7), "differs in 1 of 32"),
    "one boolean": (lambda x: x > 0, lambda x: poke(x > 0, (x <= 0)[1, 2]), "differs in 1 of 32"),
    "shape": (lambda x: x.sum(-1), lambda x: x.sum(-1, keepdim=True), "shape [4, 1], expected [4]"),
    "strides": (lambda x: x + 1, lambda x: (x + 1).t().contiguous().t(), "strides [1, 4], expected the order"),
    "alias of the input lost": (lambda x: x.view(8, 4), lambda x: x.view(8, 4).clone(), "no longer shares memory"),
    "alias of the input gained": (lambda x: x * 1, lambda x: x, "shares memory with input"),
    "alias between outputs gained": (lambda x: (x + 1, x + 1), lambda x: (x + 1,) * 2, "shares memory with output[1]"),
    "alias between outputs lost": (lambda x: (x + 1,) * 2, lambda x: (x + 1, x + 1), "no longer shares memory"),
    "write to the input lost": (lambda x: x.mul_(2).sum(), lambda x: (x * 2).sum(), "input x"),
    "write to the input gained": (lambda x: (x * 2).sum(), lambda x: x.mul_(2).sum(), "written to"),
    "write of other values": (lambda x: x.mul_(2).sum() * 0, lambda x: x.mul_(3).sum() * 0, "input x"),
    "tuple for list": (lambda x: [x + 1], lambda x: (x + 1,), "is a tuple at output, expected a list"),
    "tensor for tuple": (lambda x: (x + 1,), lambda x: x + 1, "has output where"),
    "part lost": (lambda x: (x + 1, x + 2), lambda x: (x + 1,), "has 1 parts at output ([0]), expected 2"),
    "key renamed": (lambda x: {"a": x + 1}, lambda x: {"b": x + 1}, "['b']"),
    "None for a tensor": (lambda x: (x + 1, x + 2), lambda x: (x + 1, None), "is a NoneType, expected a Tensor"),
    "number": (lambda x: (x + 1, 3), lambda x: (x + 1, 4), "is 4, expected 3"),
    "float": (lambda x: (x + 1, 0.5), lambda x: (x + 1, 0.6), "is 0.6, expected 0.5"),
    "outputs swapped": (lambda x: Pair(x + 1, x + 2), lambda x: Pair(x + 2, x + 1), "output.first"),
    "raises": (lambda x: x + 1, lambda x: x @ x, "raised RuntimeError"),
    "complex": (lambda x: torch.fft.fft(x), lambda x: torch.fft.fft(x).conj().resolve_conj(), "differs"),
    "half": (lambda x: x.half() * 2, lambda x: x.half() * 2.05, "differs"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_is_found(name):
    before, after, word = WRONG[name]
    found = verify(before, after, (X,))
    assert not found.ok and not found
    assert word in found.summary
    with pytest.raises(VerificationError) as raised:
        found.raise_if_failed()
    assert word in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", WRONG)
def test_each_is_equal_to_itself(name):
    for function in WRONG[name][:2]:
        if name == "raises" and function is WRONG[name][1]:
            continue
        verify(function, function, (X,)).raise_if_failed()


def test_failure_names_output_element_and_input_set():
    found = verify(lambda x: {"y": x + 1}, lambda x: {"y": poke(x + 1, 9.0, (3, 5))}, {"x": X}, n_drawn=0)
    worst = found.worst
    assert (worst.name, worst.index, worst.got) == ("output['y']", (3, 5), 9.0)
    assert worst.expected == float(X[3, 5] + 1)
    assert worst.max_abs == pytest.approx(abs(8 - float(X[3, 5])), rel=1e-6)
    assert worst.max_rel == pytest.approx(worst.max_abs / abs(worst.expected), rel=1e-6)
    assert worst.mean_abs == pytest.approx(worst.max_abs / 32, rel=1e-6)
    assert "on the given input set" in found.summary
    assert found.max_error == worst.max_abs


# ------------------------------------------------------------------------------------------ only on other inputs


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.qkv = nn.Embedding(50, 8), nn.Linear(8, 24)

    def forward(self, input_ids, attention_mask):
        q, k, v = self.qkv(self.embed(input_ids)).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / 8**0.5
        scores = scores.masked_fill(attention_mask[:, None] == 0, torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ v


@pytest.fixture(scope="module")
def attention():
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(50, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    model = Attention().eval()
    return model, export(model, inputs, (0, 1)), inputs


def test_captured_model_is_equal_to_the_model(attention):
    model, gm, inputs = attention
    for before, after in ((model, gm), (gm, model), (gm, copy.deepcopy(gm))):
        found = verify(before, after, inputs)
        found.raise_if_failed()
        assert (found.given, found.drawn, found.discarded, found.method) == (1, 4, (), "float64")


def test_drawn_sets_have_other_sizes_and_padding(attention):
    _, gm, inputs = attention
    cases = Baseline(gm, inputs, n_drawn=8).cases
    shapes = {tuple(case.inputs.kwargs["input_ids"].shape) for case in cases}
    assert len(shapes) > 3
    masks = [case.inputs.kwargs["attention_mask"] for case in cases]
    assert all(bool(mask.bool().any(-1).all()) for mask in masks)
    assert any(bool((mask[:, 0] == 0).any()) for mask in masks)  # left
    assert any(bool((mask[:, -1] == 0).any()) for mask in masks)  # right


def test_wrong_only_for_another_size(attention):
    _, gm, inputs = attention

    def only_here(input_ids, attention_mask):
        y = gm(input_ids=input_ids, attention_mask=attention_mask)
        return y if input_ids.shape[1] == 8 else y * 1.01

    assert verify(gm, only_here, inputs, n_drawn=0).ok
    found = verify(gm, only_here, inputs)
    assert not found.ok and "drawn input set" in found.summary


def test_fails_only_for_another_size(attention):
    _, gm, inputs = attention

    def static(input_ids, attention_mask):
        return gm(input_ids=input_ids, attention_mask=attention_mask).view(2, 8, 8)

    assert verify(gm, static, inputs, n_drawn=0).ok
    assert "raised RuntimeError" in verify(gm, static, inputs).summary


def test_wrong_only_with_padding(attention):
    model, gm, inputs = attention

    def unmasked(input_ids, attention_mask):
        return gm(input_ids=input_ids, attention_mask=torch.ones_like(attention_mask))

    assert verify(gm, unmasked, inputs, n_drawn=0).ok
    for before in (gm, model):  # the module alone has no dynamic sizes, but masks all the same
        found = verify(before, unmasked, inputs)
        assert not found.ok and "padded mask" in found.summary


def test_wrong_only_for_left_padding(attention):
    _, gm, inputs = attention

    def right_only(input_ids, attention_mask):
        lengths = attention_mask.sum(-1, keepdim=True)
        mask = (torch.arange(attention_mask.shape[1])[None] < lengths).long()
        return gm(input_ids=input_ids, attention_mask=mask)

    assert "left-padded mask" in verify(gm, right_only, inputs).summary


def test_sizes_seen_in_the_given_sets_vary():
    def only_given(x):
        return x * 2 if x.shape[0] in (3, 9) else x * 3

    given_sets = [(seeded(3, 5),), (seeded(9, 5),)]
    assert verify(lambda x: x * 2, only_given, given_sets, n_drawn=0).ok
    assert not verify(lambda x: x * 2, only_given, given_sets, n_drawn=16).ok
    assert verify(lambda x: x * 2, only_given, given_sets[0], n_drawn=16).ok  # static: no other size is drawn


def test_wrong_only_for_small_numbers():
    def without_eps(x):
        return x / (x.pow(2).mean(-1, keepdim=True)).sqrt()

    def with_eps(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    assert verify(with_eps, without_eps, X, n_drawn=0).ok
    assert not verify(with_eps, without_eps, X).ok


def test_what_the_original_refuses_is_left_out():
    def picky(x):
        if float(x.abs().max()) > 10:
            raise ValueError("too large\nby far")
        return x + 1

    found = verify(picky, lambda x: x + 1, X, n_drawn=4)
    assert found.ok and found.drawn == 3
    assert found.discarded == ("drawn input set 4 (x 4×8): ValueError: too large",)


# ----------------------------------------------------------------------------------------------------- tolerances


def test_bitwise():
    one = torch.ones(3)
    ulp = torch.nextafter(one, 2 * one)
    for expected, got in ((one, ulp), (torch.zeros(3), -torch.zeros(3))):
        assert verify(lambda x, e=expected: e + x * 0, lambda x, g=got: g.clone(), torch.ones(3), n_drawn=0).ok
        strict = verify(lambda x, e=expected: e.clone(), lambda x, g=got: g.clone(), one, rtol=0, atol=0, n_drawn=0)
        assert not strict.ok and "bits" in strict.summary and strict.worst.index == (0,)
    nan = torch.full((3,), math.nan)
    assert verify(lambda x: nan.clone(), lambda x: -nan, one, rtol=0, atol=0).ok


def test_given_tolerances_decide():
    def off(x):
        return x + 1e-3

    assert not verify(lambda x: x + 0.0, off, X).ok
    assert verify(lambda x: x + 0.0, off, X, rtol=0, atol=2e-3).ok
    assert not verify(lambda x: x + 0.0, off, X, rtol=0, atol=0.9e-3).ok


def test_default_tolerance_shrinks_with_the_output():
    assert not verify(lambda x: x * 1e-3, lambda x: x * 1.01e-3, X).ok


def test_at_most_twice_the_originals_own_error():
    def naive(x):  # sums one after the other, which loses digits
        total = torch.zeros(())
        for value in x:
            total = total + value
        return total

    x = torch.rand(3000, generator=torch.Generator().manual_seed(0))
    own = abs(float(naive(x)) - float(x.double().sum()))
    strict = {"rtol": 1e-12, "atol": 0.0, "n_drawn": 0}
    better = verify(naive, lambda x: x.double().sum().float(), x, **strict)
    assert better.ok and better.worst.own_units < 1
    exact = float(x.double().sum())
    sign = 1 if float(naive(x)) > exact else -1
    assert verify(naive, lambda x: torch.tensor(exact + 1.8 * sign * own), x, **strict).ok
    worse = verify(naive, lambda x: torch.tensor(exact + 3 * sign * own), x, **strict)
    assert not worse.ok and worse.worst.own_units == pytest.approx(3, rel=0.05)


def test_a_reference_that_went_another_way_excuses_nothing():
    def absorbing(x):  # float32 loses x, float64 keeps it
        return x + 1e8 - 1e8

    assert verify(absorbing, absorbing, X).ok
    assert not verify(absorbing, lambda x: absorbing(x) + 1, X).ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_in_each_dtype_passes_and_errors_do_not(dtype):
    x, w = seeded(4, 64, dtype=dtype), seeded(64, 32, dtype=dtype, seed=1)
    reordered = verify(lambda x: x @ w, lambda x: x[:, :32] @ w[:32] + x[:, 32:] @ w[32:], x)
    reordered.raise_if_failed()
    assert ("already" in reordered.method) == (dtype is torch.float64)
    assert not verify(lambda x: x @ w, lambda x: x @ w * 1.2, x).ok


def test_splits_of_one_tensor_share_nothing():
    w = seeded(8, 12, seed=2)
    parts = w.split(4, 1)
    verify(
        lambda x: [x @ part for part in parts], lambda x: list((x @ w).split(4, 1)), X, rtol=1e-5, atol=1e-5
    ).raise_if_failed()


@given(st.data())
def test_overlap_is_exact(data):
    base = torch.zeros(40)

    def part():
        shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        strides = [data.draw(st.integers(0, 5)) for _ in shape]
        reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if reach >= 40:
            return None
        return base.as_strided(shape, strides, data.draw(st.integers(0, 39 - reach)))

    a, b = part(), part()
    if a is None or b is None:
        return
    base.zero_()
    places = torch.arange(40)
    inside = [set(places.as_strided(t.shape, t.stride(), t.storage_offset()).flatten().tolist()) for t in (a, b)]
    assert overlap(a, b) == bool(inside[0] & inside[1])


# -------------------------------------------------------------------------------------------------------- float64


def test_dtypes_written_into_a_graph_are_widened():
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.table = nn.Linear(8, 8), torch.arange(8.0)
            self.register_buffer("scale", torch.full((8,), 0.1))

        def forward(self, x):
            y = self.linear(x).to(torch.float32) * self.scale + self.table.float()
            y = y + torch.full((8,), 0.1, dtype=torch.float32) + torch.ones(8) / 3
            return y.clamp(min=torch.finfo(y.dtype).min).softmax(-1)

    model = Casting()
    for before in (model, export(model, {"x": X}, (0,))):
        found = verify(before, model, {"x": X})
        assert found.ok and found.method == "float64"
        reference = Baseline(before, {"x": X}, n_drawn=0).cases[0].reference["output"]
        wide = copy.deepcopy(model).double()
        wide.table = wide.table.double()
        scale, table = torch.full((8,), 0.1).double(), torch.arange(8.0, dtype=torch.float64)
        third = torch.full((8,), 0.1, dtype=torch.float64) + torch.ones(8, dtype=torch.float64) / 3
        expected = (wide.linear(X.double()) * scale + table + third).softmax(-1)
        if before is model:  # the capture keeps ones / 3 and the like as they are written, too
            assert torch.allclose(reference, expected, rtol=1e-14, atol=0)
        assert reference.dtype is torch.float64
        assert (reference - expected).abs().max() < 1e-15


def test_a_model_is_widened_as_double_would():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    x = seeded(2, 3, 8, 8)
    reference = Baseline(model, x, n_drawn=0).cases[0].reference["output"]
    assert torch.allclose(reference, copy.deepcopy(model).double()(x.double()), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("layer", [nn.LSTM(8, 8, batch_first=True), nn.GRU(8, 8, 2)])
def test_recurrent_layers_are_widened(layer):
    flat = [id(weight) for weight in layer._flat_weights]
    found = verify(layer, copy.deepcopy(layer), seeded(2, 4, 8))
    assert found.ok and found.method == "float64"
    assert [id(weight) for weight in layer._flat_weights] == flat


def test_chance_is_not_judged_against_float64():
    layer = nn.Dropout(0.5)
    same = verify(layer, copy.deepcopy(layer), X)
    assert same.ok and "random numbers" in same.method
    assert not verify(layer, nn.Identity(), X).ok
    assert "float64" in verify(layer.eval(), copy.deepcopy(layer), X).method


def test_an_operator_without_float64_falls_back_and_says_why():
    @torch.library.custom_op("fxopt_test::only_float32", mutates_args=())
    def only_float32(x: torch.Tensor) -> torch.Tensor:
        if x.dtype is not torch.float32:
            raise TypeError("only float32\nis known here")
        return x * 2

    found = verify(only_float32, lambda x: x * 2, X)
    assert found.ok and found.method.startswith("the original's output (not float64: ")
    assert "only float32" in found.method and "\n" not in found.method
    assert not verify(only_float32, lambda x: x * 2.001, X).ok


def test_too_little_memory(monkeypatch):
    model, inputs = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), (seeded(2, 64),)
    all_weights, largest = 8 * 2 * (64 * 64 + 64), 8 * 64 * 64
    between = (all_weights + 2 * largest) // 2 + 4 * 8 * (2 * 64 + 2 * 64)
    monkeypatch.setattr(module_under_test, "available_memory", lambda device: 2 * between)
    scarce = verify(model, copy.deepcopy(model), inputs)
    assert scarce.ok and "cast as they are used" in scarce.method
    reference = Baseline(model, inputs, n_drawn=0).cases[0].reference["output"]
    assert torch.allclose(reference, copy.deepcopy(model).double()(inputs[0].double()), rtol=1e-13, atol=1e-15)
    monkeypatch.setattr(module_under_test, "available_memory", lambda device: 1000)
    none = verify(model, copy.deepcopy(model), inputs)
    assert none.ok and "available" in none.method and none.worst.own_units is None


def test_available_memory_is_a_sensible_number():
    assert 2**20 < module_under_test.available_memory(torch.device("cpu")) < 2**50


# ------------------------------------------------------------------------------------------------- leaves no trace


class Stateful(nn.Module):
    """Writes buffers, draws random numbers, and keeps a cache."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("count", torch.zeros(()))
        self.calls, self.cache = 0, None

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.cache = x * 2
        self.register_buffer("late", torch.ones(2))
        random.random()
        numpy.random.rand()
        return F.dropout(self.norm(self.linear(x)), training=self.training) + torch.rand_like(x)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_callers_changes(training):
    model = Stateful().train(training)
    model.linear(X).sum().backward()
    x = X.clone().requires_grad_()
    state = {
        name: (tensor, tensor._version, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    chance = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    default, grad_mode = torch.get_default_dtype(), torch.is_grad_enabled()

    verify(model, copy.deepcopy(model), x).raise_if_failed()

    now = model.state_dict(keep_vars=True)
    assert list(now) == list(state)
    for name, (tensor, version, values) in state.items():
        assert now[name] is tensor and tensor._version == version and torch.equal(tensor, values)
    assert {n: p.grad for n, p in model.named_parameters() if p.grad is not None}.keys() == grads.keys()
    assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in grads.items())
    assert (model.calls, model.cache, model.training) == (0, None, training)
    assert torch.equal(x, X) and x.requires_grad and x.grad is None and x._version == 0
    assert torch.equal(torch.get_rng_state(), chance[0]) and random.getstate() == chance[1]
    assert (numpy.random.get_state()[1] == chance[2]).all()
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (default, grad_mode)


def test_a_failing_call_leaves_no_trace_either():
    model = Stateful()
    state = {name: (tensor, tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    chance = torch.get_rng_state()

    def fails(x):
        model(x)
        raise RuntimeError("no")

    model.forward, forward = (lambda x, f=model.forward: (f(x), 1 / 0)), model.forward
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        verify(model, fails, X)
    model.forward = forward
    assert all(model.state_dict(keep_vars=True)[n] is t and t._version == v for n, (t, v) in state.items())
    assert torch.equal(torch.get_rng_state(), chance)


def test_a_lost_write_to_a_buffer_is_found():
    training = nn.BatchNorm1d(8, affine=False)

    class Forgets(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(8))
            self.register_buffer("running_var", torch.ones(8))
            self.register_buffer("num_batches_tracked", torch.tensor(0))

        def forward(self, x):
            return F.batch_norm(x, None, None, training=True)

    found = verify(training, Forgets(), X)
    assert not found.ok and "buffer running_mean" in {d.name for d in found.outputs if not d.ok}
    other = copy.deepcopy(training)
    other.momentum = 0.3
    assert "buffer running_mean" in {d.name for d in verify(training, other, X).outputs if not d.ok}
    verify(training, copy.deepcopy(training), X).raise_if_failed()


def test_an_output_that_is_the_modules_own_tensor_is_found():
    class Owner(nn.Module):
        def __init__(self, mine):
            super().__init__()
            self.weight, self.mine = nn.Parameter(torch.ones(3)), mine

        def forward(self, x):
            return x * 2, self.weight if self.mine else self.weight.clone()

    assert "own tensors" in verify(Owner(False), Owner(True), X).summary
    assert "own tensors" in verify(Owner(True), Owner(False), X).summary
    assert verify(Owner(True), Owner(True), X).ok


# ------------------------------------------------------------------------------------------------------- baseline


def test_a_baseline_runs_the_original_once(attention):
    _, gm, inputs = attention
    count = 0

    def counted(input_ids, attention_mask):
        nonlocal count
        count += 1
        return gm(input_ids=input_ids, attention_mask=attention_mask)

    baseline = Baseline(counted, inputs, like=gm)
    ran = count
    for _ in range(3):
        assert baseline.verify(gm).ok and verify(baseline, gm).ok
    assert count == ran == 2 * len(baseline.cases)


def test_a_baseline_outlives_edits_of_the_original():
    model = nn.Linear(8, 8)
    baseline = Baseline(model, X)
    untouched = copy.deepcopy(model)
    with torch.no_grad():
        model.weight.mul_(1.1)
    assert baseline.verify(untouched).ok and not baseline.verify(model).ok


def test_positional_keyword_and_nested_inputs():
    def nested(x, pair, *, scale=1.0, options=None):
        return x + pair[0] * scale + options["y"][0] + pair[1]["z"]

    args = (X, (X, {"z": X}))
    inputs = {"x": X, "pair": args[1], "scale": 2.0, "options": {"y": [X]}}
    assert verify(nested, nested, inputs).ok
    assert verify(nested, lambda x, pair, scale, options: nested(x, pair, options=options), inputs).ok is False
    assert verify(lambda x, pair: x + pair[0], lambda x, pair: x + pair[1]["z"] * 1.01, args).ok is False
    tied = [case.inputs for case in Baseline(nested, inputs).cases]
    assert all(one.kwargs["x"] is one.kwargs["pair"][0] for one in tied)  # one object stays one object


def test_reports():
    found = verify(lambda x: OrderedDict(a=x, b=x + 1), lambda x: OrderedDict(a=x, b=x + poke(x, 1e9)), X)
    text = json.loads(json.dumps(found.to_json()))
    assert text["ok"] is False and {o["name"] for o in text["outputs"]} == {"output.a", "output.b"}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(found)
    shown = console.export_text()
    assert "FAILED on 1 given and 4 drawn input sets" in shown and "differs" in shown
    page = found._repr_html_()
    assert page.startswith("<table>") and page.count("<tr") == 3 and "<lambda>" not in page
    nan = verify(lambda x: x, lambda x: x * math.nan, X)
    assert "NaN" not in json.dumps(nan.to_json())
    good = verify(lambda x: x + 1, lambda x: x + 1, X)
    good.raise_if_failed()
    assert "equal within" in good.summary and "verified" in good._repr_html_()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"inputs": None}, "needs inputs"),
        ({"inputs": []}, "empty list"),
        ({"inputs": 3}, "not int"),
        ({"inputs": {0: X}}, "parameter names"),
        ({"inputs": X, "rtol": -1.0}, "rtol is -1.0"),
        ({"inputs": X, "atol": math.nan}, "atol is nan"),
        ({"inputs": X, "n_drawn": -1}, "n_drawn is -1"),
        ({"inputs": (X, X)}, "the original itself fails on the given input set"),
    ],
)
def test_wrong_arguments(arguments, word):
    with pytest.raises(UsageError, match=word) as raised:
        verify(lambda x: x + 1, lambda x: x + 1, **arguments)
    assert "\n" not in str(raised.value)


def test_inputs_beside_a_baseline_are_refused():
    with pytest.raises(UsageError, match="leave them out"):
        verify(Baseline(F.relu, X), F.relu, X)


# ----------------------------------------------------------------------------------------- equal is never flagged


class Chain(nn.Module):
    def __init__(self, width, norms, activation):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in norms)
        self.norms, self.activation, self.width = norms, activation, width

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            y = self.activation(layer(x))
            x = x + F.layer_norm(y, (self.width,)) if norm else y
        return x, x.mean(-1), x.argmax(-1) * 0


class Spelled(nn.Module):
    """The same chain with every operation written out: other roundings."""

    def __init__(self, chain):
        super().__init__()
        self.chain = chain

    def forward(self, x):
        chain = self.chain
        half = chain.width // 2
        for layer, norm in zip(chain.layers, chain.norms, strict=True):
            w = layer.weight.t()
            y = chain.activation(x[..., half:] @ w[half:] + x[..., :half] @ w[:half] + layer.bias)
            if norm:
                centred = y - y.mean(-1, keepdim=True)
                y = x + centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
            x = y
        return x, x.sum(-1) / chain.width, torch.zeros_like(x[..., 0], dtype=torch.int64)


@given(
    st.integers(4, 12).map(lambda n: 2 * n),
    st.lists(st.booleans(), min_size=1, max_size=4),
    st.sampled_from([torch.tanh, F.gelu, F.relu, torch.sigmoid]),
    st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 2**31),
)
def test_equal_models_pass(width, norms, activation, dtype, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        chain = Chain(width, norms, activation).to(dtype).eval()
    x = seeded(3, width, dtype=dtype, seed=seed)
    verify(chain, copy.deepcopy(chain), x, rtol=0, atol=0, seed=seed).raise_if_failed()
    verify(chain, torch.fx.symbolic_trace(chain), x, rtol=0, atol=0, seed=seed).raise_if_failed()
    if dtype is not torch.bfloat16:  # where the fused operators compute in float32, so that spelling them out is worse
        verify(chain, Spelled(chain), x, seed=seed).raise_if_failed()


@given(st.integers(1, 3), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_equal_attention_passes(batch, length, causal, boolean, seed):
    q, k, v = (seeded(batch, 2, length, 4, seed=seed + i) for i in range(3))
    mask = torch.ones(length, length).tril().bool() if causal else torch.ones(batch, 1, length, length).bool()
    mask = mask if boolean else torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -1e9)

    def eager(q, k, v, mask):
        scores = q @ k.transpose(-1, -2) / 2
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
        return scores.softmax(-1) @ v

    def fused(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask)

    inputs = {"q": q, "k": k, "v": v, "mask": mask}
    verify(eager, fused, inputs, seed=seed).raise_if_failed()
    assert not verify(eager, lambda q, k, v, mask: fused(q, k, v, mask) * 1.01, inputs, seed=seed).ok


@given(st.integers(1, 4), st.integers(1, 8), st.booleans(), st.integers(0, 2**31))
def test_folded_batch_norm_passes(channels, out, bias, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv, norm = nn.Conv2d(channels, out, 3, bias=bias), nn.BatchNorm2d(out)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3)
        nn.init.normal_(norm.weight)
    model = nn.Sequential(conv, norm).eval()
    folded = torch.nn.utils.fuse_conv_bn_eval(conv, norm)
    x = seeded(2, channels, 6, 6, seed=seed)
    verify(model, folded, x, seed=seed).raise_if_failed()
    wrong = copy.deepcopy(folded)
    wrong.bias.data += 0.01 * (1 + wrong.bias.abs())
    assert not verify(model, wrong, x, seed=seed).ok


class EvenBatches(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] % 2 == 0 else x * 3


def test_sizes_that_a_capture_refuses_are_not_held_against_it():
    captured = export(EvenBatches(), {"x": X}, (0,))
    found = verify(EvenBatches(), captured, {"x": X}, n_drawn=6)
    assert found.ok and any("Guard failed" in d for d in found.discarded), found.discarded
    assert found.drawn + len(found.discarded) == 6
    with pytest.raises(VerificationError):  # but the given ones it must take
        verify(EvenBatches(), captured, {"x": seeded(3, 8)}, n_drawn=0).raise_if_failed()
