import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxopt.errors import Conflict
from fxopt.history import history
from fxopt.transformations.fuse_bias_in_linear import FuseBiasInLinear
from tests.rewriting import rewrites, trace, unchanged
from tests.transformations.modules import fn

T = FuseBiasInLinear()
X = (torch.randn(3, 4),)
AFTER = "%0 = linear(x, fc.weight, b)\nreturn %0"
IN_FC = "%0 = linear(x, fc.weight, fc.bias)\nreturn %0"


def plus(b, bias=False, out=5):
    b = nn.Parameter(b) if isinstance(b, torch.Tensor) and b.is_floating_point() else b
    return fn(lambda m, x: m.fc(x) + m.b, fc=nn.Linear(4, out, bias=bias), b=b)


def test_a_bias_stays_the_same_parameter():
    model = plus(torch.randn(5))
    for dialect, gm in rewrites(T, model, X, {"module": IN_FC, "function": AFTER, "aten": AFTER}, count=1).items():
        assert any(p is model.b for p in gm.parameters()) and len(list(gm.parameters())) == 2
        if dialect == "module":
            assert type(gm.fc) is nn.Linear and gm.fc.bias is model.b


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1,), (), (1, 1)])
def test_biases_add_up(shape):
    for gm in rewrites(T, plus(torch.randn(shape), bias=True), X, IN_FC, count=1).values():
        assert [n for n, _ in gm.named_parameters()] == ["fc.weight", "fc.bias"]
        assert gm.fc.bias.shape == (5,) and gm.fc.bias.requires_grad


@pytest.mark.parametrize("shape", [(1, 5), (1,), (), (1, 1)])
def test_what_is_broadcast_becomes_a_bias(shape):
    rewrites(T, plus(torch.randn(shape)), X, IN_FC, count=1)


@pytest.mark.parametrize("number", [2, -0.5, 0])
@pytest.mark.parametrize("bias", [True, False])
def test_a_number(number, bias):
    rewrites(T, fn(lambda m, x: number + m.fc(x), fc=nn.Linear(4, 5, bias=bias)), X, IN_FC, count=1)


@pytest.mark.parametrize("bias", [True, False])
def test_a_difference(bias):
    model = fn(lambda m, x: m.fc(x) - m.b, fc=nn.Linear(4, 5, bias=bias), b=nn.Parameter(torch.randn(5)))
    rewrites(T, model, X, IN_FC, count=1)
    rewrites(T, fn(lambda m, x: m.fc(x) - 3, fc=nn.Linear(4, 5, bias=bias)), X, IN_FC, count=1)


def test_every_spelling():
    def spelled(m, x):
        a = torch.add(m.f(x), other=m.b)
        b = m.g(a).add(m.b)
        return torch.subtract(m.h(b), m.b)

    layers = {n: nn.Linear(4, 4) for n in "fgh"}
    after = """
        %0 = linear(x, f.weight, f.bias)
        %1 = linear(%0, g.weight, g.bias)
        %2 = linear(%1, h.weight, h.bias)
        return %2
    """
    rewrites(T, fn(spelled, b=nn.Parameter(torch.randn(4)), **layers), X, after)


def test_in_place_on_the_layers_own_output():
    def add(m, x):
        y = m.fc(x)
        y += m.b
        return y

    after = {"module": IN_FC, "function": AFTER, "aten": AFTER}
    rewrites(T, fn(add, fc=nn.Linear(4, 5, bias=False), b=torch.randn(5)), X, after)


@pytest.mark.parametrize("rows", [(4,), (2, 3, 4), (0, 4)])
def test_any_number_of_rows(rows):
    rewrites(T, plus(torch.randn(5), bias=True), (torch.randn(rows),), IN_FC)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 5e-2), (torch.float64, 1e-12)])
def test_types(dtype, tolerance):
    rewrites(T, plus(torch.randn(5), bias=True).to(dtype), (X[0].to(dtype),), IN_FC, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("b", [torch.tensor(0.5, dtype=torch.float64), torch.randn(5).half(), torch.arange(5)])
def test_narrower_types_and_scalars_do_not_promote(b):
    rewrites(T, plus(b), X, IN_FC)


def test_a_bias_read_elsewhere_stays_there_too():
    def both(m, x):
        return m.fc(x) + m.b, x.sum() * m.b

    model = fn(both, fc=nn.Linear(4, 5), b=nn.Parameter(torch.randn(5)))
    for gm in rewrites(T, model, X, None, count=1).values():
        assert gm.b is model.b


def test_a_layer_called_twice_keeps_its_weight():
    model = fn(lambda m, x: (m.fc(x) + m.b, m.fc(x)), fc=nn.Linear(4, 5), b=nn.Parameter(torch.randn(5)))
    for gm in rewrites(T, model, X, None, count=1).values():
        weights = {id(p) for _, p in gm.named_parameters(remove_duplicate=False) if p.shape == (5, 4)}
        assert weights == {id(model.fc.weight)}


def test_a_frozen_sum_stays_frozen():
    model = plus(torch.randn(5), bias=True).requires_grad_(False)
    assert not any(p.requires_grad for gm in rewrites(T, model, X, IN_FC).values() for p in gm.parameters())


# --- near-misses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape,reason", [((3, 5), "expected"), ((3, 1), "expected"), ((5, 1), "differs between rows")])
def test_what_differs_between_rows_stays(shape, reason):
    unchanged(T, plus(torch.randn(shape)), (torch.randn(*((5, 4) if shape[0] == 5 else (3, 4))),), reason)


def test_more_dimensions_stay():
    unchanged(T, plus(torch.randn(1, 1, 5)), X, "more dimensions")
    unchanged(T, plus(torch.randn(1, 5)), (torch.randn(4),), "more dimensions")


def test_one_feature_that_is_widened_stays():
    unchanged(T, plus(torch.randn(5), out=1), X, "expected")


def test_a_wider_type_stays():
    unchanged(T, plus(torch.randn(5).double()), X, "torch.float64")


def test_another_reader_stays():
    def both(m, x):
        y = m.fc(x)
        return y + m.b, y

    unchanged(T, fn(both, fc=nn.Linear(4, 5), b=torch.randn(5)), X, "has other users")


def test_a_scaled_sum_stays():
    model = fn(lambda m, x: torch.add(m.fc(x), m.b, alpha=2), fc=nn.Linear(4, 5), b=torch.randn(5))
    unchanged(T, model, X, "expected 1, found 2")


def test_a_reversed_difference_stays():
    unchanged(T, fn(lambda m, x: m.b - m.fc(x), fc=nn.Linear(4, 5), b=torch.randn(5)), X, "is not linear")


def test_an_input_stays():
    unchanged(T, fn(lambda m, x, b: m.fc(x) + b, fc=nn.Linear(4, 5)), (*X, torch.randn(5)), "is not a")


def test_a_computed_bias_stays():
    model = fn(lambda m, x, a: nn.functional.linear(x, m.w, a) + m.b, w=torch.randn(5, 4), b=torch.randn(5))
    unchanged(T, model, (*X, torch.randn(5)), "is computed")


def test_an_overflow_stays():
    model = plus(torch.full((5,), 60000.0), bias=True).half()
    with torch.no_grad():
        model.fc.bias.fill_(60000.0)
    unchanged(T, model, (X[0].half(),), "would not be finite")


def test_unknown_shapes_stay_where_they_matter():
    gm = torch.fx.symbolic_trace(plus(torch.randn(1, 5)))
    assert any("call fxopt.propagate" in m.reason for m in T.misses(gm))
    T(gm)
    assert not history(gm)[0].rewrites
    gm = torch.fx.symbolic_trace(plus(torch.randn(5)))
    T(gm)
    assert len(history(gm)[0].rewrites) == 1


# --- training, and numbers ------------------------------------------------------------------------------------------


def test_a_bias_that_moved_takes_its_training_along():
    gm = trace(plus(torch.randn(5)), X, "module")
    T(gm)
    with torch.no_grad():
        gm.fc.bias.fill_(7.0)
    T.reverse(gm, "carry")
    assert torch.equal(gm.b, torch.full((5,), 7.0))


def test_a_trained_sum_cannot_be_told_apart():
    gm = trace(plus(torch.randn(5), bias=True), X, "function")
    T(gm)
    with torch.no_grad():
        gm.fc.bias.fill_(7.0)
    with pytest.raises(Conflict, match="cannot carry"):
        T.reverse(gm, "carry")


@given(
    seed=st.integers(0, 10**6),
    bias=st.booleans(),
    shape=st.sampled_from([(6,), (1, 6), (1,), ()]),
    minus=st.booleans(),
    rows=st.sampled_from([(2,), (1, 3), (0,)]),
)
def test_computes_the_same(seed, bias, shape, minus, rows):
    torch.manual_seed(seed)
    b = nn.Parameter(torch.randn(shape))
    fc = nn.Linear(4, 6, bias=bias)
    model = fn((lambda m, x: m.fc(x) - m.b) if minus else (lambda m, x: m.fc(x) + m.b), fc=fc, b=b).double()
    x = (torch.randn(*rows, 4, dtype=torch.float64),)
    gm = trace(model, x, "function")
    T(gm)
    assert len(history(gm)[0].rewrites) == 1
    torch.testing.assert_close(gm(*x), model(*x), rtol=1e-10, atol=1e-10)
    T(gm, reverse=True)
    assert torch.equal(gm(*x), model(*x))
