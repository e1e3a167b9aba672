import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxopt.history import history
from fxopt.transformations.fuse_batch_norm1d_in_linear import FuseBatchNorm1dInLinear
from tests.rewriting import rewrites, trace, unchanged
from tests.transformations.batch_norms import Pair, norm, unchecked  # noqa: F401
from tests.transformations.modules import fn

T = FuseBatchNorm1dInLinear()
X = (torch.randn(3, 4),)
AFTER = "%0 = linear(x, fc.weight, fc.bias)\nreturn %0"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_after(bias, affine):
    model = Pair(fc=nn.Linear(4, 5, bias=bias), bn=norm(5, 0, affine))
    for dialect, gm in rewrites(T, model, X, AFTER, count=1, **CLOSE).items():
        assert [n for n, _ in gm.named_parameters()] == ["fc.weight", "fc.bias"]
        assert not any(isinstance(m, nn.BatchNorm1d) for m in gm.modules())
        if dialect == "module":
            assert type(gm.fc) is nn.Linear and (gm.fc.in_features, gm.fc.out_features) == (4, 5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_before(bias, affine):
    rewrites(T, Pair(bn=norm(4, 0, affine), fc=nn.Linear(4, 5, bias=bias)), X, AFTER, count=1, **CLOSE)


def test_between_two_layers_it_goes_into_the_first():
    model = Pair(a=nn.Linear(4, 5), bn=norm(5, 0), b=nn.Linear(5, 2))
    after = "%0 = linear(x, a.weight, a.bias)\n%1 = linear(%0, b.weight, b.bias)\nreturn %1"
    for gm in rewrites(T, model, X, after, **CLOSE).values():
        assert gm.b.weight is model.b.weight


def test_where_the_first_has_another_reader_it_goes_into_the_second():
    def both(m, x):
        y = m.a(x)
        return m.b(m.bn(y)) + y.sum()

    model = fn(both, a=nn.Linear(4, 5), bn=norm(5, 0), b=nn.Linear(5, 2))
    for gm in rewrites(T, model, X, None, count=1, **CLOSE).values():
        assert gm.a.weight is model.a.weight


def test_functions_without_modules():
    model = fn(
        lambda m, x: nn.functional.batch_norm(nn.functional.linear(x, m.w), m.mean, m.var, weight=m.g, eps=0.1),
        w=nn.Parameter(torch.randn(5, 4)), g=nn.Parameter(torch.randn(5)), mean=torch.randn(5), var=torch.rand(5),
    )  # fmt: skip
    rewrites(T, model, X, "%0 = linear(x, w, bias)\nreturn %0", **CLOSE)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 2e-2), (torch.bfloat16, 1e-1), (torch.float64, 1e-12)])
def test_types(dtype, tolerance):
    model = Pair(fc=nn.Linear(4, 5).to(dtype), bn=norm(5, 0, dtype=dtype))
    rewrites(T, model, (X[0].to(dtype),), AFTER, rtol=tolerance, atol=tolerance)


def test_a_linear_called_twice():
    model = fn(lambda m, x: m.bn(m.fc(x)) + m.fc(x), fc=nn.Linear(4, 5), bn=norm(5, 0))
    for gm in rewrites(T, model, X, None, count=1, **CLOSE).values():
        assert gm.fc.weight is model.fc.weight


# --- near-misses ----------------------------------------------------------------------------------------------------


def test_sequences_stay():
    """Of (N, C, L) with C = L, only the shape says that the normalised channels are not the linear ones."""
    unchanged(T, Pair(fc=nn.Linear(4, 4), bn=norm(4, 0)), (torch.randn(2, 4, 4),), "has 3 dimensions, expected 2")
    unchanged(T, Pair(bn=norm(4, 0), fc=nn.Linear(4, 5)), (torch.randn(2, 4, 4),), "has 3 dimensions, expected 2")


@pytest.mark.parametrize("order", ["after", "before"])
def test_nothing_known_stays(order):
    parts = {"fc": nn.Linear(4, 4), "bn": norm(4, 0)}
    model = Pair(**(parts if order == "after" else dict(reversed(parts.items()))))
    gm = torch.fx.symbolic_trace(model.eval())
    assert any("call fxopt.propagate" in m.reason for m in T.misses(gm))
    T(gm)
    assert not history(gm)[0].rewrites


def test_training_stays():
    model = Pair(fc=nn.Linear(4, 5), bn=norm(5, 0))
    unchanged(T, model, X, "expected False, found True", training=True, dialects=("module", "aten"))


def test_no_statistics_stay():
    unchanged(T, Pair(fc=nn.Linear(4, 5), bn=norm(5, 0, track_running_stats=False)), X, "None is not a Constant")


def test_another_reader_stays():
    def both(m, x):
        y = m.fc(x)
        return m.bn(y), y

    unchanged(T, fn(both, fc=nn.Linear(4, 5), bn=norm(5, 0)), X, "has other users")


def test_a_normalisation_with_another_reader_stays():
    def both(m, x):
        y = m.bn(x)
        return m.fc(y), y

    unchanged(T, fn(both, fc=nn.Linear(4, 5), bn=norm(4, 0)), X, "has other users")


def test_a_weight_that_is_computed_stays():
    model = fn(lambda m, x, w: m.bn(nn.functional.linear(x, w)), bn=norm(5, 0))
    unchanged(T, model, (*X, torch.randn(5, 4)), "is not a Constant")


def test_a_negative_variance_stays():
    bn = norm(5, 0)
    bn.running_var.fill_(-1.0)
    unchanged(T, Pair(fc=nn.Linear(4, 5), bn=bn), X, "not be finite")


def test_a_convolution_is_another_pass():
    unchanged(T, Pair(conv=nn.Conv1d(4, 4, 1), bn=norm(4, 0)), (torch.randn(2, 4, 3),), "is not linear")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    bias=st.booleans(),
    affine=st.booleans(),
    first=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 0.5]),
    batch=st.integers(0, 3),
)
def test_computes_the_same(seed, bias, affine, first, eps, batch):
    torch.manual_seed(seed)
    fc, bn = nn.Linear(4, 6, bias=bias), norm(4 if first else 6, 0, affine, eps=eps)
    model = (Pair(bn=bn, fc=fc) if first else Pair(fc=fc, bn=bn)).double().eval()
    x = (torch.randn(batch, 4, dtype=torch.float64),)
    gm = trace(model, x, "function")
    T(gm)
    assert len(history(gm)[0].rewrites) == 1
    torch.testing.assert_close(gm(*x), model(*x), rtol=1e-9, atol=1e-9)
    T(gm, reverse=True)
    assert torch.equal(gm(*x), model(*x))
