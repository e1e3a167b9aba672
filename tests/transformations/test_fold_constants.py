import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxopt.history import history
from fxopt.text import show
from fxopt.transformation import clone
from fxopt.transformations.fold_constants import FoldConstants
from tests.rewriting import DIALECTS, rewrites, trace, unchanged
from tests.transformations.captures import applies, captured

X = (torch.randn(4, 4),)
LITERALS = ("aten",)  # symbolic_trace computes what is made of numbers alone by itself


class Net(nn.Module):
    def __init__(self, forward, trained=False):
        super().__init__()
        self.table = nn.Parameter(
            torch.randn(4, 4), requires_grad=False
        )  # a buffer would not be seen by symbolic_trace
        self.weight = nn.Parameter(torch.randn(4, 4), requires_grad=trained)
        self.embedding = nn.Embedding.from_pretrained(torch.randn(10, 4))
        self.ids = nn.Parameter(torch.tensor([1, 5, 2, 2]), requires_grad=False)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def test_a_chain_of_constants_becomes_one_buffer():
    def forward(self, x):
        return x * (self.table.exp() + self.weight)

    for gm in rewrites(FoldConstants(), Net(forward), X, "%0 = mul(x, add_folded)\nreturn %0", rtol=0, atol=0).values():
        assert "add_folded" in dict(gm.named_buffers())
        assert "add_folded" not in gm.state_dict() and "table" not in gm.state_dict()


def test_numbers_alone():
    def forward(self, x):
        return x + torch.arange(4, device=x.device) * torch.ones(4, 1).exp()

    rewrites(FoldConstants(), Net(forward), X, "%0 = add(x, mul_folded)\nreturn %0", dialects=LITERALS, rtol=0, atol=0)


def test_a_module_of_constants():
    def forward(self, x):
        return x + self.embedding(self.ids)

    for gm in rewrites(FoldConstants(), Net(forward), X, None, count=1, rtol=0, atol=0).values():
        assert "embedding_folded" in dict(gm.named_buffers())


def test_a_view_of_a_buffer_is_copied():
    def forward(self, x):
        return x + self.table[:2, :].sum(0) + x.matmul(self.table.t()) + self.table

    net = Net(forward)
    for gm in rewrites(FoldConstants(), net, X, None, rtol=0, atol=0).values():
        folded = [b for n, b in gm.named_buffers() if n.endswith("_folded")]
        assert len(folded) == 2
        storages = {b.untyped_storage().data_ptr() for b in folded}
        assert net.table.untyped_storage().data_ptr() not in storages
        transposed = next(b for b in folded if b.dim() == 2)
        assert transposed.stride() == (1, 4)  # as the view had it


def test_a_number_becomes_an_argument():
    def forward(self, x):
        return x * self.table.size(0)

    rewrites(FoldConstants(), Net(forward), X, "%0 = mul(x, 4)\nreturn %0", dialects=("module", "function"))


def test_over_the_limit_the_largest_parts_within_it_are_stored():
    def forward(self, x):
        small = self.table[0].exp().cos()  # 16 bytes
        return x + torch.outer(small, small)  # 64 bytes

    text = show(rewrites(FoldConstants(limit=16), Net(forward), X, None, rtol=0, atol=0)["aten"])
    assert text.startswith("%0 = outer") and "cos_folded, cos_folded" in text
    rewrites(FoldConstants(limit=64), Net(forward), X, "%0 = add(x, outer_folded)\nreturn %0", rtol=0, atol=0)
    gm = trace(Net(forward), X, "aten")
    assert any("64 bytes, over the limit of 16" in m.reason for m in FoldConstants(limit=16).misses(gm))


def test_trained_parameters_when_asked():
    def forward(self, x):
        return x * self.weight.exp()

    rewrites(
        FoldConstants(trained=True), Net(forward, trained=True), X, "%0 = mul(x, exp_folded)\nreturn %0", rtol=0, atol=0
    )
    unchanged(FoldConstants(), Net(forward, trained=True), X, "weight is trained")


def test_the_generator_is_left_alone():
    gm = trace(Net(lambda self, x: x * self.table.exp()), X, "aten")
    before = torch.random.get_rng_state()
    FoldConstants()(gm)
    assert torch.equal(torch.random.get_rng_state(), before)


def returned(self, x):
    return x + 1, self.table.exp()


def returned_view(self, x):
    return x + 1, self.table.exp().view(-1)


def written(self, x):
    y = self.table.exp()
    y.add_(1)
    return x + y


def buffer_written(self, x):
    self.table.add_(1)
    return x + self.table.exp()


def random(self, x):
    return x + torch.nn.functional.dropout(self.table, 0.5)


def expanded(self, x):
    return x + self.ids.expand(4, 4)


def varying(self, x):
    return x + torch.arange(x.shape[0]).unsqueeze(1)


@pytest.mark.parametrize(
    ("forward", "reason", "dialects"),
    [
        (returned, "is returned", DIALECTS),
        (returned_view, "is returned", DIALECTS),
        (written, "written to in place", DIALECTS),
        (buffer_written, "table is written to in place", DIALECTS),
        (random, "draws random numbers", DIALECTS),
        (expanded, "no memory of its own", DIALECTS),
        (varying, None, DIALECTS),
        (lambda self, x: x * self.table, None, DIALECTS),
    ],
)
def test_near_misses(forward, reason, dialects):
    dynamic = ({0: torch.export.Dim.DYNAMIC},) if forward is varying else None
    unchanged(FoldConstants(), Net(forward), X, reason, dialects=dialects, dynamic=dynamic)


def test_statistics_that_a_module_updates_are_no_constants():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.norm.running_mean = nn.Parameter(self.norm.running_mean, requires_grad=False)
            self.table = nn.Parameter(torch.randn(3, 4), requires_grad=False)

        def forward(self, x):
            return self.norm(x) + self.norm.running_mean.exp() + self.norm(self.table).sum()

    unchanged(FoldConstants(), Normed(), X, "in place", training=True, dialects=("module",))


def test_no_values_on_the_meta_device():
    net = Net(lambda self, x: x * self.table.exp()).to("meta")
    gm = torch.fx.symbolic_trace(net)
    assert any("meta device" in m.reason for m in FoldConstants().misses(gm))
    FoldConstants()(gm)
    assert not history(gm)[-1].rewrites


def test_an_unknown_shape_is_a_miss():
    gm = torch.fx.symbolic_trace(Net(lambda self, x: x * self.table.exp()))
    assert any("call fxopt.propagate" in m.reason for m in FoldConstants().misses(gm))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    net = Net(lambda self, x: x * self.table.exp()).to(dtype)
    for gm in rewrites(FoldConstants(), net, (torch.randn(4, 4, dtype=dtype),), None, rtol=0, atol=0).values():
        assert gm.exp_folded.dtype == dtype


def test_a_copy_can_be_undone_on_its_own():
    gm, inputs = captured("bert")
    code = gm.code
    FoldConstants()(gm)
    twin = clone(gm)
    FoldConstants().reverse(twin)
    assert twin.code == code != gm.code
    assert torch.equal(twin(**inputs)[0], gm(**inputs)[0])


def test_an_empty_and_a_0d_tensor():
    net = Net(lambda self, x: x + self.table[:0].sum() + self.table[:0].t().cos().sum(1).sum())
    rewrites(FoldConstants(), net, X, None, rtol=0, atol=0)


def test_captured_models():
    applies(FoldConstants(), "bert", 1)  # token_type_ids, expanded to the size that it has
    applies(FoldConstants(), "gpt2", 0)
    applies(FoldConstants(), "resnet", 0)


UNARY = [torch.exp, torch.relu, torch.t, lambda t: t[:2], lambda t: t.reshape(-1)[:4].view(2, 2), torch.clone]
BINARY = [torch.add, torch.mul, lambda a, b: a.sum() * b, lambda a, b: torch.cat([a, b])]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), max_size=10), st.integers(0, 400))
@settings(max_examples=40)
def test_any_expression_of_constants_and_inputs(program, limit):
    def forward(self, x):
        values = [x[:2, :2], self.table[:2, :2], self.weight[1:3, :2]]
        for which, i, j in program:
            a, b = values[i % len(values)], values[j % len(values)]
            made = UNARY[which](a) if which < 6 else BINARY[which - 6](a[:2, :2], b[:2, :2])
            values.append(made[:2, :2])
        return x[0, 0] + sum(v.sum() for v in values)

    gm = trace(Net(forward), X, "function")
    code = gm.code
    expected = gm(*X)
    FoldConstants(limit=limit)(gm)
    assert torch.equal(gm(*X), expected)
    assert all(b.numel() * b.element_size() <= limit for n, b in gm.named_buffers() if n.endswith("_folded"))
    FoldConstants(limit=limit).reverse(gm)
    assert gm.code == code
