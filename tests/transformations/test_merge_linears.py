import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxopt.errors import Conflict
from fxopt.history import history
from fxopt.text import show
from fxopt.transformations.merge_linears import MergeLinears
from tests.rewriting import rewrites, trace, unchanged

X = (torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)),)


class Attention(nn.Module):
    """Three projections of one input, the third without a bias if ``mixed``."""

    def __init__(self, bias=True, mixed=False):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(8, 8, bias), nn.Linear(8, 4, bias)
        self.v = nn.Linear(8, 6, bias and not mixed)

    def forward(self, x):
        return torch.cat([self.q(x).relu(), self.k(x).tanh(), self.v(x).sigmoid()], dim=-1)


AFTER = """
    %0 = linear(x, q_k_v.weight{bias})
    %1 = split(%0, [8, 4, 6], -1)
    %2 = getitem(%1, 0)
    %3 = relu(%2)
    %4 = getitem(%1, 1)
    %5 = tanh(%4)
    %6 = getitem(%1, 2)
    %7 = sigmoid(%6)
    %8 = cat([%3, %5, %7], -1)
    return %8
"""


@pytest.mark.parametrize("bias", (True, False))
def test_parallel_layers_become_one(bias):
    after = AFTER.format(bias=", q_k_v.bias" if bias else "")
    found = rewrites(MergeLinears(), Attention(bias), X, after, count=1)
    for gm in found.values():
        assert [*gm.state_dict()] == ["q_k_v.weight", "q_k_v.bias"][: 1 + bias]
    assert isinstance(found["module"].q_k_v, nn.Linear)


def test_mixed_bias():
    rewrites(MergeLinears(), Attention(mixed=True), X, AFTER.format(bias=", q_k_v.bias"), count=1)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_types(dtype):
    x = (X[0].to(dtype),)
    rewrites(MergeLinears(), Attention().to(dtype), x, None, count=1, rtol=2e-2, atol=2e-2)


class Layers(nn.Module):
    def __init__(self, count=2):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention() for _ in range(count))
        self.out = nn.Linear(18, 8)

    def forward(self, x):
        for layer in self.layers:
            x = self.out(layer(x))
        return x


def test_each_group_is_a_rewrite_of_its_own():
    for gm in rewrites(MergeLinears(), Layers(3), X, None, count=3).values():
        assert "layers.1.q_k_v.weight" in gm.state_dict()
        y = gm(*X)
        history(gm)[-1].rewrites[1].reverse()
        assert "layers.1.q.weight" in gm.state_dict() and "layers.0.q_k_v.weight" in gm.state_dict()
        torch.testing.assert_close(gm(*X), y)
        history(gm)[-1].rewrites[1].apply()
        assert torch.equal(gm(*X), y)


def test_tied_and_shared_weights():
    class Tied(Attention):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(8, 8)
            self.again.weight = self.q.weight

        def forward(self, x):
            return super().forward(x) + self.again(super().forward(x)[..., :8]).sum() + self.q(x.tanh()).sum()

    found = rewrites(MergeLinears(), Tied(), X, None)
    assert "again.weight" in found["module"].state_dict()  # torch.export knows tied weights by one path


def test_root_parameters_and_functions():
    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(5, 8))

        def forward(self, x):
            return torch.cat([F.linear(x, self.a).relu(), F.linear(input=x, weight=self.b).relu()], -1)

    for gm in rewrites(MergeLinears(), Functions(), X, None, count=1).values():
        assert [*gm.state_dict()] == ["a_b"]


def test_addmm_as_gpt2_has_it():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.w1, self.w2 = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8, 6))
            self.b1, self.b2 = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(6))

        def forward(self, x):
            x = x.view(-1, 8)
            return torch.cat([torch.addmm(self.b1, x, self.w1).relu(), torch.addmm(self.b2, x, self.w2).relu()], -1)

    rewrites(MergeLinears(), Conv1D(), X, None, count=1, atol=1e-5)


class Viewed(Attention):
    """Heads are split by a view, and flattened by another that needs dense memory."""

    def forward(self, x):
        q, k = self.q(x).view(2, 3, 2, 4), self.k(x).view(2, 12)
        return q.sum() + k.sum()


def test_a_view_that_needs_dense_memory_gets_it():
    for gm in rewrites(MergeLinears(), Viewed(), X, None, count=1).values():
        assert show(gm).count("contiguous(") == 1


class Returned(Attention):
    def forward(self, x):
        return self.q(x), self.k(x).transpose(1, 2)


class Written(Attention):
    def forward(self, x):
        return self.q(x).relu_() + self.k(x).add_(1).sum()


class Between(Attention):
    def forward(self, x):
        x = x + 1
        q = self.q(x).tanh()
        x.add_(1)
        return q.sum() + self.k(x).tanh().sum()


class Different(Attention):
    def forward(self, x):
        return self.q(x).tanh().sum() + self.k(x + 1).tanh().sum()


class Computed(Attention):
    def forward(self, x):
        return F.linear(x, self.q.weight * 2).tanh().sum() + F.linear(x, self.k.weight * 2).tanh().sum()


class Own(nn.Linear):
    pass


class Subclass(Attention):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = Own(8, 8), Own(8, 4), Own(8, 6)


def test_near_misses():
    merge = MergeLinears()
    unchanged(merge, Returned(), X, "the graph returns it")
    unchanged(merge, Written(), X, "writes to it in place")
    unchanged(merge, Between(), X, "writes in place to .* between it and", dialects=("module", "function"))
    unchanged(merge, Between(), X, "no other such layer reads add_", dialects=("aten",))
    unchanged(merge, Different(), X, "no other such layer reads")
    unchanged(merge, Computed(), X, "its weight is computed")


def test_hooks_and_subclasses_are_left_alone():
    class Traces(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, nn.Linear)

    hooked = Attention()
    for layer in (hooked.q, hooked.k, hooked.v):
        layer.register_forward_hook(lambda m, i, o: o * 2)
    for model, reason in ((Subclass(), "a subclass of Linear"), (hooked, "has hooks")):
        gm = torch.fx.GraphModule(model, Traces().trace(model))
        assert any(reason in m.reason for m in MergeLinears().misses(gm))
        MergeLinears()(gm)
        assert not history(gm)[-1].rewrites
        torch.testing.assert_close(gm(*X), model(*X))


@pytest.mark.parametrize("dialect", ("module", "function", "aten"))
@pytest.mark.parametrize("bias", (True, False))
def test_what_was_trained_is_carried_back(dialect, bias):
    gm = trace(Attention(bias).eval(), X, dialect)
    MergeLinears()(gm)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    gm(*X).sum().backward()
    optimizer.step()
    y = gm(*X)
    with pytest.raises(Conflict, match=r"made .*q_k_v.weight.*, edited since"):
        MergeLinears().reverse(gm)
    trained = copy.deepcopy(gm)
    MergeLinears().reverse(gm, edited="carry")
    torch.testing.assert_close(gm(*X), y)
    assert "q.weight" in gm.state_dict()
    MergeLinears().reverse(trained, edited="discard")
    torch.testing.assert_close(trained(*X), Attention(bias)(*X))


def test_a_bias_that_training_gave_cannot_be_carried():
    gm = trace(Attention(mixed=True).eval(), X, "aten")
    MergeLinears()(gm)
    with torch.no_grad():
        gm.q_k_v.bias.add_(1)
    with pytest.raises(Conflict, match="cannot carry an edit back"):
        MergeLinears().reverse(gm, edited="carry")


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=2, max_size=5),
    st.integers(1, 5),
    st.integers(0, 2**31),
)
def test_any_number_of_layers_of_any_size(layers, inputs, seed):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(inputs, n, bias) for n, bias in layers)

        def forward(self, x):
            return torch.cat([layer(x).tanh() for layer in self.layers], -1)

    torch.manual_seed(seed)
    model = Net().double().eval()
    gm = torch.fx.symbolic_trace(model)
    x = torch.randn(3, inputs, dtype=torch.double)
    MergeLinears()(gm)
    assert len(history(gm)[-1].rewrites) == 1
    torch.testing.assert_close(gm(x), model(x), rtol=1e-9, atol=1e-9)
