import math
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxopt.errors import Conflict
from fxopt.history import history
from fxopt.transformations.change_truediv_to_mul_by_inverse import ChangeTrueDivToMulByInverse
from tests.rewriting import rewrites, trace, unchanged
from tests.transformations.modules import fn

T = ChangeTrueDivToMulByInverse()
X = (torch.randn(2, 8),)
CLOSE = {"rtol": 4e-7, "atol": 0.0}


class By(nn.Module):
    """x / c, with c a number, or a tensor in the role of a parameter or buffer."""

    def __init__(self, c, inplace=False):
        super().__init__()
        if isinstance(c, nn.Parameter):
            self.c = c
        elif isinstance(c, torch.Tensor):
            self.register_buffer("c", c)
        else:
            self.c = c
        self.inplace = inplace

    def forward(self, x):
        if self.inplace:
            return (x + 1).div_(self.c)
        return x / self.c


@pytest.mark.parametrize("c", [8, 8.0, -0.5, 2**-10])
def test_a_power_of_two_is_exact(c):
    rewrites(T, By(c), X, f"%0 = mul(x, {1 / c!r})\nreturn %0", rtol=0, atol=0)


@pytest.mark.parametrize("c", [3, 49, math.sqrt(64) + 1, -7.7, 1e30])
def test_any_other_number_is_close(c):
    rewrites(T, By(c), X, f"%0 = mul(x, {1 / c!r})\nreturn %0", **CLOSE)


def test_every_spelling():
    def spelled(x):
        return torch.div(x, 4), x.div(4), torch.true_divide(x, other=4), x.true_divide(4.0), torch.divide(x, 4), x / 4

    one = "mul(x, 0.25)"
    lines = "\n".join(f"%{i} = {one}" for i in range(6))
    rewrites(T, fn(spelled), X, f"{lines}\nreturn [%0, %1, %2, %3, %4, %5]", rtol=0, atol=0)


@pytest.mark.parametrize("role", ["parameter", "buffer"])
@pytest.mark.parametrize("shape", [(), (1,), (8,), (2, 1)])
def test_a_constant_tensor(role, shape):
    c = torch.rand(shape) + 0.5
    model = By(nn.Parameter(c) if role == "parameter" else c)
    for gm in rewrites(T, model, X, "%0 = mul(x, c_inverse)\nreturn %0", **CLOSE).values():
        assert [n for n, _ in gm.named_parameters()] == (["c_inverse"] if role == "parameter" else [])
        assert list(gm.state_dict()) == ["c_inverse"]


def test_a_tensor_of_integers():
    rewrites(
        T, By(torch.tensor([1, 2, 4, 8])), (torch.randn(3, 4),), "%0 = mul(x, c_inverse)\nreturn %0", rtol=0, atol=0
    )


@pytest.mark.parametrize("x", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("c", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_types_promote_as_before(x, c, shape):
    inputs = (torch.randn(3, 4).to(x),)
    divisor = (torch.rand(shape) + 1).to(c)
    exponents = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}
    eps = 2.0 ** -exponents[torch.result_type(inputs[0], divisor)]
    rewrites(T, By(divisor), inputs, None, rtol=2 * eps, atol=2**-20, dialects=("function",))


def test_a_buffer_outside_of_the_state_dict_stays_outside():
    model = By(1.0)
    del model.c
    model.register_buffer("c", torch.tensor(3.0), persistent=False)
    gm = rewrites(T, model, X, "%0 = mul(x, c_inverse)\nreturn %0", dialects=("aten",), **CLOSE)["aten"]
    assert not gm.state_dict() and dict(gm.named_buffers())


def test_a_divisor_read_elsewhere_stays():
    class Twice(By):
        def forward(self, x):
            return x / self.c + self.c

    for gm in rewrites(
        T, Twice(torch.tensor(3.0)), X, "%0 = mul(x, c_inverse)\n%1 = add(%0, c)\nreturn %1", **CLOSE
    ).values():
        assert set(gm.state_dict()) == {"c", "c_inverse"}


def test_attention_scores_need_no_shapes():
    gm = torch.fx.symbolic_trace(fn(lambda q, k: (q @ k.transpose(-1, -2)) / 8.0))
    T(gm)
    assert len(history(gm)[0].rewrites) == 1


@pytest.mark.slow
def test_every_divisor_comes_back():
    """281 of these are lost by inverting the inverse."""
    gm = trace(fn(lambda x: [(x / c).relu() for c in range(1, 2000)][-1]), X, "function")
    quotients = (operator.mul, operator.truediv)
    code, targets = gm.code, [(n.target, n.args[1:]) for n in gm.graph.nodes if n.target in quotients]
    T(gm)
    assert len(history(gm)[0].rewrites) == 1999
    inverses = [n.args[1] for n in gm.graph.nodes if n.target in quotients]
    assert sum(1 / i != c for i, c in zip(inverses, range(1, 2000), strict=True)) == 281
    T(gm, reverse=True)
    assert gm.code == code
    assert [(n.target, n.args[1:]) for n in gm.graph.nodes if n.target in quotients] == targets


# --- near-misses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0, 0.0, -0.0, math.inf, -math.inf, math.nan, 1e-310, 1e-39, 1e39, 2.0**-149])
def test_a_divisor_without_a_normal_inverse_stays(c):
    unchanged(T, By(c), X, "no normal inverse in torch.float32")


@pytest.mark.parametrize("c", [70000, 3e-5, 2**-15, 65504])
def test_what_float16_cannot_hold_stays(c):
    unchanged(T, By(c), (X[0].half(),), "no normal inverse in torch.float16")


def test_an_enormous_integer_stays():
    unchanged(T, By(2**60 + 1), X, "no exact float")


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan, 1e-40])
def test_one_bad_element_of_a_tensor_is_enough(bad):
    unchanged(T, By(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, bad])), X, "no normal inverse")


@pytest.mark.parametrize("x", [torch.arange(4), torch.tensor([True, False])])
def test_integers_stay(x):
    unchanged(T, By(2), (x,), "a quotient promotes")


def test_a_size_stays():
    """49 * (1 / 49) is 0.9999999999999999, and as an integer 0."""
    unchanged(
        T, fn(lambda x: x * (x.size(0) / 49)), (torch.randn(49),), "is not known", dialects=("module", "function")
    )


@pytest.mark.parametrize("mode", ["floor", "trunc"])
def test_a_rounded_quotient_stays(mode):
    unchanged(T, fn(lambda x: torch.div(x, 2, rounding_mode=mode)), X, "expected None")


def test_a_quotient_of_inputs_stays():
    unchanged(T, fn(lambda x, y: x / y), (X[0], X[0]), "is not a")


def test_a_constant_over_x_stays():
    unchanged(T, By(torch.tensor(2.0)), (torch.tensor([1, 2]),), "a quotient promotes")


def test_in_place_stays():
    unchanged(T, By(4, inplace=True), X, "in place")


def test_a_buffer_that_the_graph_writes_to_stays():
    class Counting(By):
        def forward(self, x):
            y = x / self.c
            self.c.view(1).add_(1.0)
            return y

    unchanged(T, Counting(torch.tensor(1.0)), X, "writes to c in place", dialects=("aten",))


def test_nothing_known_stays():
    gm = torch.fx.symbolic_trace(fn(lambda x: x / 2))
    assert [m.reason for m in T.misses(gm)] == [
        "whether x is a floating-point tensor is not known; call fxopt.propagate(gm, inputs)"
    ]
    T(gm)
    assert not history(gm)[0].rewrites


def test_a_divisor_on_meta_stays():
    gm = trace(By(torch.tensor(3.0)), X, "function")
    gm.c = torch.empty((), device="meta")
    assert any("meta" in m.reason for m in T.misses(gm))
    T(gm)
    assert not history(gm)[0].rewrites


# --- training, and numbers ------------------------------------------------------------------------------------------


def test_a_trained_inverse_is_carried_back():
    gm = trace(By(nn.Parameter(torch.tensor([2.0] * 8))), X, "function")
    T(gm)
    with torch.no_grad():
        gm.c_inverse.fill_(0.25)
    with pytest.raises(Conflict):
        T.reverse(gm)
    T.reverse(gm, "carry")
    assert torch.equal(gm.c, torch.full((8,), 4.0))


@given(
    c=st.floats(allow_nan=False, allow_infinity=False, width=32).filter(lambda c: 1e-37 < abs(c) < 1e37),
    x=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=4),
)
def test_differs_by_at_most_three_roundings(c, x):
    inputs = (torch.tensor(x),)
    gm = trace(By(c), inputs, "function")
    expected = gm(*inputs)
    T(gm)
    assert len(history(gm)[0].rewrites) == 1
    got, bound = gm(*inputs), 3 * 2**-24 + 2**-40
    same = (got == expected) | ((got - expected).abs() <= bound * expected.abs() + 3e-45)
    assert bool(same.all()), (got, expected)
