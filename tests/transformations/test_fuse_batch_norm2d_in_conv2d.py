import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxopt.history import history
from fxopt.transformations.fuse_batch_norm2d_in_conv2d import FuseBatchNorm2dInConv2d
from tests.rewriting import rewrites, trace, unchanged
from tests.transformations.batch_norms import Pair, norm, unchecked  # noqa: F401
from tests.transformations.modules import fn

T = FuseBatchNorm2dInConv2d()
X = (torch.randn(2, 4, 5, 6),)
AFTER = "%0 = conv2d(x, conv.weight, conv.bias)\nreturn %0"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_after(bias, affine):
    model = Pair(conv=nn.Conv2d(4, 3, 2, bias=bias), bn=norm(3, 2, affine))
    for dialect, gm in rewrites(T, model, X, AFTER, count=1, rtol=1e-4, atol=1e-5).items():
        assert [n for n, _ in gm.named_parameters()] == ["conv.weight", "conv.bias"]
        assert not any(isinstance(m, nn.BatchNorm2d) for m in gm.modules())
        if dialect == "module":
            assert type(gm.conv) is nn.Conv2d


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_before(bias, affine):
    model = Pair(bn=norm(4, 2, affine), conv=nn.Conv2d(4, 3, 2, bias=bias))
    rewrites(T, model, X, AFTER, count=1, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups(groups):
    after = f"%0 = conv2d(x, conv.weight, conv.bias, groups={groups})\nreturn %0"
    conv = nn.Conv2d(4, 8, 2, groups=groups)
    rewrites(T, Pair(conv=conv, bn=norm(8, 2)), X, after, rtol=1e-4, atol=1e-5)
    rewrites(T, Pair(bn=norm(4, 2), conv=conv), X, after, rtol=1e-4, atol=1e-5)


def test_every_option_stays():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), dilation=2, groups=2)
    after = "%0 = conv2d(x, conv.weight, conv.bias, [2, 2], [1, 2], [2, 2], 2)\nreturn %0"
    rewrites(T, Pair(conv=conv, bn=norm(6, 2)), X, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding):
    model = Pair(conv=nn.Conv2d(4, 3, 3, padding=padding), bn=norm(3, 2))
    said = f"%0 = conv2d(x, conv.weight, conv.bias, padding={padding!r})\nreturn %0"
    after = said if padding == "same" else AFTER
    rewrites(T, model, X, after, rtol=1e-4, atol=1e-5)
    if padding == "valid":
        rewrites(T, Pair(bn=norm(4, 2), conv=model.conv), X, after, rtol=1e-4, atol=1e-5)


def test_both_sides():
    model = Pair(a=nn.Conv2d(4, 3, 1), bn1=norm(3, 2), b=nn.Conv2d(3, 3, 1), bn2=norm(3, 2), bn3=norm(3, 2))
    after = """
        %0 = conv2d(x, a.weight, a.bias)
        %1 = conv2d(%0, b.weight, b.bias)
        return %1
    """
    rewrites(T, model, X, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 8e-2), (torch.float64, 1e-12)])
def test_types(dtype, tolerance):
    model = Pair(conv=nn.Conv2d(4, 3, 2).to(dtype), bn=norm(3, 2, dtype=dtype))
    x = (X[0].to(dtype),)
    for gm in rewrites(T, model, x, AFTER, rtol=tolerance, atol=tolerance).values():
        assert {p.dtype for p in gm.parameters()} == {dtype}


def test_a_normalisation_of_half_precision_with_statistics_in_full():
    model = Pair(conv=nn.Conv2d(4, 3, 2).bfloat16(), bn=norm(3, 2))
    rewrites(T, model, (X[0].bfloat16(),), AFTER, rtol=8e-2, atol=8e-2)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.5])
def test_momentum_does_not_matter(momentum):
    rewrites(T, Pair(conv=nn.Conv2d(4, 3, 2), bn=norm(3, 2, momentum=momentum)), X, AFTER, rtol=1e-4, atol=1e-5)


def test_weights_keep_their_order_in_memory_and_their_role():
    conv = nn.Conv2d(4, 3, 2).to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    for gm in rewrites(T, Pair(conv=conv, bn=norm(3, 2)), X, AFTER, rtol=1e-4, atol=1e-5).values():
        assert gm.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert (gm.conv.weight.requires_grad, gm.conv.bias.requires_grad) == (False, True)


def test_a_convolution_called_twice_is_folded_where_it_is_normalised():
    model = fn(lambda m, x: m.bn(m.conv(x)) + m.conv(x), conv=nn.Conv2d(4, 3, 2), bn=norm(3, 2))
    for gm in rewrites(T, model, X, None, count=1, rtol=1e-4, atol=1e-5).values():
        names = [n for n, _ in gm.named_parameters()]
        assert len(names) == 4 and {"conv.weight", "conv.bias"} <= set(names), names
        assert gm.conv.weight is model.conv.weight


def test_tied_weights_come_apart_only_where_they_are_folded():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(4, 3, 2), nn.Conv2d(4, 3, 2), norm(3, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.bn(self.a(x)), self.b(x)

    model = Tied()
    for gm in rewrites(T, model, X, None, rtol=1e-4, atol=1e-5).values():
        assert any(p is model.a.weight for p in gm.parameters())


def test_one_normalisation_for_two_convolutions():
    model = fn(lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), a=nn.Conv2d(4, 3, 2), b=nn.Conv2d(4, 3, 2), bn=norm(3, 2))
    after = "%0 = conv2d(x, a.weight, a.bias)\n%1 = conv2d(x, b.weight, b.bias)\n%2 = add(%0, %1)\nreturn %2"
    rewrites(T, model, X, after, rtol=1e-4, atol=1e-5)


def test_without_shapes_a_module_says_enough():
    gm = torch.fx.symbolic_trace(Pair(conv=nn.Conv2d(4, 3, 2), bn=norm(3, 2)).eval())
    T(gm)
    assert len(history(gm)[0].rewrites) == 1


def test_a_dynamic_batch():
    model = Pair(conv=nn.Conv2d(4, 3, 2), bn=norm(3, 2))
    dynamic = {"x": {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}}
    gm = rewrites(T, model, X, AFTER, dialects=("aten",), dynamic=dynamic, rtol=1e-4, atol=1e-5)["aten"]
    other = torch.randn(7, 4, 9, 6)
    torch.testing.assert_close(gm(other), model(other), rtol=1e-4, atol=1e-5)


# --- near-misses ----------------------------------------------------------------------------------------------------


def test_training_stays():
    unchanged(T, Pair(conv=nn.Conv2d(4, 3, 2), bn=norm(3, 2)), X, "expected False, found True", training=True,
              dialects=("module", "aten"))  # fmt: skip


def test_no_statistics_stay():
    model = Pair(conv=nn.Conv2d(4, 3, 2), bn=norm(3, 2, track_running_stats=False))
    unchanged(T, model, X, "mean = None is not a Constant")


def test_padding_before_stays():
    unchanged(T, Pair(bn=norm(4, 2), conv=nn.Conv2d(4, 3, 3, padding=1)), X, "pads with zeros")
    unchanged(T, Pair(bn=norm(4, 2), conv=nn.Conv2d(4, 3, 3, padding="same")), X, "pads with zeros")


def test_another_reader_stays():
    def both(m, x):
        y = m.conv(x)
        return m.bn(y), y.relu()

    unchanged(T, fn(both, conv=nn.Conv2d(4, 3, 2), bn=norm(3, 2)), X, "has other users")


def test_a_subclass_stays():
    class Mine(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = Pair(conv=nn.Conv2d(4, 3, 2), bn=Mine(3))
    gm = torch.fx.GraphModule(model, _leaf(Mine).trace(model.eval()))
    assert any("subclass" in m.reason for m in T.misses(gm))
    T(gm)
    assert not history(gm)[0].rewrites


def _leaf(kind):
    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, kind) or super().is_leaf_module(m, name)

    return Leaf()


def test_hooks_stay():
    model = Pair(conv=nn.Conv2d(4, 3, 2), bn=norm(3, 2))
    model.conv.register_forward_hook(lambda m, args, out: out * 2)
    unchanged(T, model, X, "has hooks", dialects=("module",))


def test_unbatched_input_stays():
    """Of (C, H, W), a normalisation takes H for the channels."""
    model = fn(
        lambda m, x: torch.nn.functional.batch_norm(m.conv(x), m.mean, m.var),
        conv=nn.Conv2d(4, 3, 2), mean=torch.zeros(4), var=torch.ones(4),
    )  # fmt: skip
    unchanged(T, model, (torch.randn(4, 5, 6),), "has 3 dimensions, expected 4")


def test_nothing_known_stays():
    model = fn(
        lambda m, x: torch.nn.functional.batch_norm(m.conv(x), m.mean, m.var),
        conv=nn.Conv2d(4, 3, 2), mean=torch.zeros(3), var=torch.ones(3),
    )  # fmt: skip
    gm = torch.fx.symbolic_trace(model)
    assert any("call fxopt.propagate" in m.reason for m in T.misses(gm))
    T(gm)
    assert not history(gm)[0].rewrites


def test_what_overflows_float16_stays():
    bn = norm(3, 2, dtype=torch.float16)
    bn.weight.data.fill_(60000.0)
    bn.running_var.fill_(1e-3)
    unchanged(T, Pair(conv=nn.Conv2d(4, 3, 2).half(), bn=bn), (X[0].half(),), "not be finite in torch.float16")


def test_weights_on_meta_stay():
    gm = trace(Pair(conv=nn.Conv2d(4, 3, 2), bn=norm(3, 2)), X, "aten")
    gm.conv.weight = nn.Parameter(gm.conv.weight.to("meta"))
    assert any("meta" in m.reason for m in T.misses(gm))
    T(gm)
    assert not history(gm)[0].rewrites


def test_statistics_that_the_graph_writes_to_stay():
    def counting(m, x):
        y = m.bn(m.conv(x))
        m.bn.running_mean.add_(1.0)
        return y

    unchanged(
        T, fn(counting, conv=nn.Conv2d(4, 3, 2), bn=norm(3, 2)), X, "writes to bn.running_mean", dialects=("aten",)
    )


def test_a_write_between_stays():
    def writing(m, x):
        y = m.conv(x)
        x.add_(1.0)
        return m.bn(y), x

    unchanged(T, fn(writing, conv=nn.Conv2d(4, 3, 2), bn=norm(3, 2)), X, "writes in place")


# --- numbers --------------------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    affine=st.booleans(),
    first=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 0.5]),
    trained=st.booleans(),
)
def test_computes_the_same(seed, groups, bias, affine, first, eps, trained):
    torch.manual_seed(seed)
    conv, bn = nn.Conv2d(4, 6, 2, groups=groups, bias=bias), norm(4 if first else 6, 2, affine, eps=eps)
    conv.weight.requires_grad_(trained)
    model = Pair(bn=bn, conv=conv) if first else Pair(conv=conv, bn=bn)
    model = model.double().eval()
    x = (torch.randn(2, 4, 4, 3, dtype=torch.float64),)
    gm = trace(model, x, "function")
    T(gm)
    assert len(history(gm)[0].rewrites) == 1
    torch.testing.assert_close(gm(*x), model(*x), rtol=1e-9, atol=1e-9)
    T(gm, reverse=True)
    assert torch.equal(gm(*x), model(*x))
