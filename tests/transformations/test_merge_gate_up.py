import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxopt.errors import Conflict
from fxopt.transformations.fuse_swiglu import FuseSwiGLU
from fxopt.transformations.merge_gate_up import MergeGateUp
from tests.rewriting import DIALECTS, rewrites, trace, unchanged
from tests.transformations.captures import applies, captured, leaves
from tests.transformations.fusions import Odd, cases, hooked
from tests.transformations.modules import fn

X = (torch.randn(2, 3, 8),)


class Net(nn.Module):
    def __init__(self, inputs=8, hidden=16, gate_bias=True, up_bias=True):
        super().__init__()
        self.gate, self.up = nn.Linear(inputs, hidden, gate_bias), nn.Linear(inputs, hidden, up_bias)

    def forward(self, x):
        return F.silu(self.gate(x)) * self.up(x)


def linear():
    return nn.Linear(8, 16)


AFTER = """
    %0 = linear(x, gate_up.weight, gate_up.bias)
    %1 = swiglu_packed(%0)
    return %1
"""


def test_two_products_are_one():
    found = rewrites(MergeGateUp(), Net(), X, AFTER, count=1)
    for gm in found.values():
        assert {n: tuple(p.shape) for n, p in gm.named_parameters()} == {
            "gate_up.weight": (32, 8),
            "gate_up.bias": (32,),
        }


def test_without_biases():
    after = "%0 = linear(x, gate_up.weight)\n%1 = swiglu_packed(%0)\nreturn %1"
    rewrites(MergeGateUp(), Net(gate_bias=False, up_bias=False), X, after, count=1)


def test_what_fuse_swiglu_left():
    for dialect in DIALECTS:
        net = Net().eval()
        gm = trace(net, X, dialect)
        MergeGateUp()(FuseSwiGLU()(gm))
        assert sum(n.target is torch.ops.fxopt.swiglu_packed.default for n in gm.graph.nodes) == 1
        torch.testing.assert_close(gm(*X), net(*X))


def test_parameters_of_one_module():
    model = fn(
        lambda s, x: F.linear(x, s.up) * F.silu(F.linear(x, s.gate)),
        gate=nn.Parameter(torch.randn(4, 8)),
        up=nn.Parameter(torch.randn(4, 8)),
    )
    rewrites(MergeGateUp(), model, X, "%0 = linear(x, gate_up)\n%1 = swiglu_packed(%0)\nreturn %1", count=1)


def test_frozen_weights_stay_frozen_and_buffers_buffers():
    frozen = Net().requires_grad_(False)
    for gm in rewrites(MergeGateUp(), frozen, X, AFTER, count=1).values():
        assert not any(p.requires_grad for p in gm.parameters())
    model = fn(
        lambda s, x: F.silu(F.linear(x, s.v)) * F.linear(x, s.w),
        v=torch.randn(4, 8),
        w=torch.randn(4, 8),
    )
    for gm in rewrites(MergeGateUp(), model, X, None, count=1).values():
        assert [n for n, _ in gm.named_buffers()] == ["v_w"] and not list(gm.parameters())


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.integers(0, 3), max_size=2),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from(DIALECTS),
)
def test_any_sizes(inputs, hidden, batch, bias, dtype, dialect):
    net = Net(inputs, hidden, bias, bias).to(dtype).eval()
    x = torch.randn(*batch, inputs, dtype=dtype)
    gm = trace(net, (x,), dialect)
    before = gm.code
    MergeGateUp()(gm)
    assert "swiglu_packed" in gm.code
    with torch.no_grad():
        torch.testing.assert_close(gm(x), net(x))
    MergeGateUp().reverse(gm)
    assert gm.code == before
    with torch.no_grad():
        assert torch.equal(gm(x), net(x))


def test_training_after_the_merge_comes_back():
    for dialect in ("module", "function"):
        net = Net().eval()
        gm = trace(net, X, dialect)
        untouched = {n: p.detach().clone() for n, p in net.named_parameters()}
        MergeGateUp()(gm)
        gm(*X).square().sum().backward()
        torch.optim.SGD(gm.parameters(), 0.1).step()
        with torch.no_grad():
            expected = gm(*X)
        with pytest.raises(Conflict):
            MergeGateUp().reverse(gm)
        MergeGateUp().reverse(gm, edited="carry")
        with torch.no_grad():
            torch.testing.assert_close(gm(*X), expected)
        assert list(dict(gm.named_parameters())) == list(untouched)
        assert not any(torch.equal(p, untouched[n]) for n, p in gm.named_parameters())


def test_the_gradients_are_the_same():
    net = Net().eval()
    net(*X).square().sum().backward()
    expected = torch.cat([net.gate.weight.grad, net.up.weight.grad])
    gm = trace(net, X, "function")
    MergeGateUp()(gm)
    gm(*X).square().sum().backward()
    torch.testing.assert_close(gm.get_parameter("gate_up.weight").grad, expected)


def tied():
    net = Net()
    net.up.weight = net.gate.weight
    return net


def half_frozen():
    net = Net()
    net.gate.requires_grad_(False)
    return net


def called_twice(s, x):
    y = F.silu(s.gate(x)) * s.up(x)
    return F.silu(s.gate(y)) * s.up(y)


def gate_used(s, x):
    g = s.gate(x)
    return F.silu(g) * s.up(x) + g


@cases(
    (
        "another x",
        fn(lambda s, x, y: F.silu(s.gate(x)) * s.up(y), gate=linear(), up=linear()),
        (*X, X[0] + 1),
        "x is both",
    ),
    ("one bias", Net(up_bias=False), X, "only one of the two linear layers has a bias"),
    (
        "a width of one",
        fn(lambda s, x: F.silu(s.gate(x)) * s.up(x), gate=linear(), up=nn.Linear(8, 1)),
        X,
        "differ in shape",
    ),
    ("tied", tied(), X, "is (gate|up).weight too|is read elsewhere"),
    (
        "one is frozen",
        half_frozen(),
        X,
        "differ in shape, type, device or whether they are trained",
        {"dialects": ("module", "function")},
    ),
    ("called twice", fn(called_twice, gate=nn.Linear(8, 8), up=nn.Linear(8, 8)), X, "is read elsewhere too"),
    ("the gate is used elsewhere", fn(gate_used, gate=linear(), up=linear()), X, "has other users"),
    ("a gelu", fn(lambda s, x: F.gelu(s.gate(x)) * s.up(x), gate=linear(), up=linear()), X, "is not silu"),
    (
        "weights that are inputs",
        fn(lambda x, v, w: F.silu(F.linear(x, v)) * F.linear(x, w)),
        (torch.randn(2, 8), torch.randn(4, 8), torch.randn(4, 8)),
        "is not a Constant",
    ),
    (
        "hooks",
        fn(lambda s, x: F.silu(s.gate(x)) * s.up(x), gate=linear(), up=hooked(linear())),
        X,
        "has hooks",
        {"dialects": ("module",)},
    ),
)
def test_near_misses(model, inputs, reason, options):
    unchanged(MergeGateUp(), model, inputs, reason, **options)


def test_weights_without_values_stay():
    gm = trace(Net().eval(), X, "function").to("meta")
    assert any("is on the meta device" in m.reason for m in MergeGateUp().misses(gm))
    code = gm.code
    assert MergeGateUp()(gm).code == code


def test_weights_of_another_type_stay():
    gm = trace(Net().eval(), X, "function")
    gm.gate.weight = Odd(gm.gate.weight.detach())
    assert any("gate.weight is a Odd" in m.reason for m in MergeGateUp().misses(gm))
    code = gm.code
    assert MergeGateUp()(gm).code == code


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_real_models(name):
    gm = applies(MergeGateUp(), name, count=2, exact=False)  # one in each of the two layers
    assert gm.get_parameter("model.layers.0.mlp.gate_proj_up_proj.weight").shape == (128, 32)


def test_a_real_model_in_bfloat16():
    gm, inputs = captured("llama_bfloat16")
    with torch.no_grad():
        before = leaves(gm(**inputs))
        MergeGateUp()(gm)
        for a, b in zip(before, leaves(gm(**inputs)), strict=True):
            torch.testing.assert_close(a, b)
