import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxopt.history import history
from fxopt.text import show
from fxopt.transformations.make_out_of_place import MakeOutOfPlace
from tests.rewriting import rewrites, trace, unchanged
from tests.transformations.modules import fn

T = MakeOutOfPlace()
X = (torch.randn(2, 4),)
EXACT = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize("spelled", [lambda y: y.relu_(), torch.relu_, lambda y: F.relu(y, inplace=True)])
def test_an_activation(spelled):
    rewrites(T, fn(lambda x: spelled(x.exp())), X, "%0 = exp(x)\n%1 = relu(%0)\nreturn %1", **EXACT)


@pytest.mark.parametrize("module", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardtanh, nn.LeakyReLU, nn.Hardswish])
def test_a_module_becomes_one_that_does_not_write(module):
    model = fn(lambda m, x: m.act(x.exp()), act=module(inplace=True))
    gm = rewrites(T, model, X, None, dialects=("module", "aten"), **EXACT)["module"]
    assert type(gm.act) is module and gm.act.inplace is False and model.act.inplace is True


def test_arithmetic():
    def steps(x, y):
        z = x.exp()
        z += y
        z.mul_(2).sub_(y, alpha=3)
        z /= 4
        return z

    after = """
        %0 = exp(x)
        %1 = add(%0, y)
        %2 = mul(%1, 2)
        %3 = sub(%2, y, 3)
        %4 = div(%3, 4)
        return %4
    """
    rewrites(T, fn(steps), (*X, torch.randn(4)), after, **EXACT)


def test_later_readers_of_the_old_name_read_the_new_value():
    def written(x):
        y = x.exp()
        z = y * 2
        y.relu_()
        return y + 1, z

    after = "%0 = exp(x)\n%1 = mul(%0, 2)\n%2 = relu(%0)\n%3 = add(%2, 1)\nreturn [%3, %1]"
    rewrites(T, fn(written), X, after, **EXACT)


def test_a_chain_under_one_name():
    def written(x):
        y = x.exp()
        y.relu_()
        y.add_(1)
        y.tanh_()
        return y

    after = "%0 = exp(x)\n%1 = relu(%0)\n%2 = add(%1, 1)\n%3 = tanh(%2)\nreturn %3"
    rewrites(T, fn(written), X, after, **EXACT)


def test_a_view_taken_afterwards_is_of_the_new_value():
    def written(x):
        y = x.exp()
        y.neg_()
        return y.flatten(), y.t()

    gm = rewrites(T, fn(written), X, None, count=1, **EXACT)["function"]
    assert "_(" not in show(gm)


def test_a_view_that_is_read_before_only():
    def written(x):
        y = x.exp()
        z = y.view(-1).sum()
        y.neg_()
        return y, z

    rewrites(
        T, fn(written), X, "%0 = exp(x)\n%1 = view(%0, [-1])\n%2 = sum(%1)\n%3 = neg(%0)\nreturn [%3, %2]", **EXACT
    )


def test_a_residual_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            out += x
            return self.relu(out)

    x = (torch.randn(1, 4, 5, 5),)
    found = rewrites(T, Block(), x, None, dialects=("module", "aten"), **EXACT)
    for gm in found.values():
        assert "_(" not in show(gm)
    assert found["module"].relu.inplace is False


def test_a_module_called_twice_writes_where_it_must():
    def twice(m, x):
        y = x.exp()
        v = y.view(-1)
        return m.act(y), v, m.act(x.tanh())

    gm = rewrites(T, fn(twice, act=nn.ReLU(inplace=True)), X, None, dialects=("module",), **EXACT)["module"]
    assert (gm.act.inplace, gm.act_1.inplace) == (True, False)


def test_gradients_stay():
    gm = trace(
        fn(lambda m, x: m.fc(x).add_(m.a).relu_(), fc=nn.Linear(4, 3), a=nn.Parameter(torch.randn(3))), X, "aten"
    )
    expected = torch.autograd.grad(gm(*X).sum(), list(gm.parameters()))
    T(gm)
    assert len(history(gm)[0].rewrites) == 1
    assert all(map(torch.equal, torch.autograd.grad(gm(*X).sum(), list(gm.parameters())), expected))


def test_without_shapes_numbers_are_enough():
    gm = torch.fx.symbolic_trace(fn(lambda x: (x * 2).relu_().add_(1)))
    T(gm)
    assert "_(" not in show(gm)


# --- near-misses ----------------------------------------------------------------------------------------------------


def test_an_input_is_seen_outside():
    unchanged(T, fn(lambda x: x.relu_()), X, "may write to x, which is seen outside")


def test_a_view_of_an_input_is_seen_outside():
    unchanged(T, fn(lambda x: x.view(-1).relu_()), X, "may write to x, which is seen outside")


def test_what_may_be_the_input_itself_is_seen_outside():
    unchanged(T, fn(lambda x: x.contiguous().relu_()), X, "may write to x, which is seen outside")


def test_a_buffer_is_seen_outside():
    def counting(m, x):
        y = x + m.c
        m.c.add_(1)
        return y

    unchanged(T, fn(counting, c=torch.zeros(4)), X, "may write to c, which is seen outside", dialects=("aten",))


def test_a_view_taken_before_and_read_after():
    def written(x):
        y = x.exp()
        v = y.view(-1)
        y.neg_()
        return v + 1

    unchanged(T, fn(written), X, "may write to view.*, which add.* reads afterwards")


def test_a_part_whose_whole_is_read_after():
    def written(x):
        y = x.exp()
        y[0].neg_()
        return y

    unchanged(T, fn(written), X, "may write to exp.*, which output reads afterwards")


def test_a_view_returned():
    def written(x):
        y = x.exp()
        v = y.t()
        y.neg_()
        return y, v

    unchanged(T, fn(written), X, "reads afterwards")


def test_a_wider_type_is_cast_back():
    unchanged(T, fn(lambda x, y: x.exp().add_(y)), (X[0].half(), X[0]), "casts its result of torch.float32")


def test_another_layout():
    x = (torch.randn(3, 4),)
    unchanged(T, fn(lambda x: x.exp()[:, :2].neg_()), x, "lies otherwise in memory")


def test_random_numbers():
    unchanged(T, fn(lambda x: F.dropout(x.exp(), 0.5, True, True)), X, "draws random numbers", dialects=("function",))


def test_an_element_assigned():
    gm = torch.fx.symbolic_trace(fn(lambda x: x.exp()))
    with gm.graph.inserting_after(list(gm.graph.nodes)[1]):
        gm.graph.call_function(operator.setitem, (list(gm.graph.nodes)[1], 0, 1.0))
    gm.recompile()
    assert any("vocabulary" in m.reason for m in T.misses(gm))
    T(gm)
    assert not history(gm)[0].rewrites


def test_hooks():
    model = fn(lambda m, x: m.act(x.exp()), act=nn.ReLU(inplace=True))
    model.act.register_forward_hook(lambda m, args, out: out * 2)
    unchanged(T, model, X, "has hooks", dialects=("module",))


def test_unknown_shapes():
    gm = torch.fx.symbolic_trace(fn(lambda x, y: x.exp().add_(y)))
    assert [m.reason for m in T.misses(gm)] == [
        "the shapes and dtypes at add_ are not known; call fxopt.propagate(gm, inputs)"
    ]
    T(gm)
    assert not history(gm)[0].rewrites


# --- any program ----------------------------------------------------------------------------------------------------

STEPS = {
    "fresh": lambda a, b: a * 0.5 + b,
    "exp": lambda a, b: torch.tanh(a),
    "view": lambda a, b: a.view(2, 2, 2),
    "flat": lambda a, b: a.reshape(-1).view(2, 4)[0:2],
    "row": lambda a, b: a[0],
    "t": lambda a, b: a.transpose(0, 1),
    "relu_": lambda a, b: a.relu_(),
    "add_": lambda a, b: a.add_(1.0),
    "mul_": lambda a, b: a.mul_(b.sum()),
    "neg_": lambda a, b: a.neg_(),
}


@given(
    program=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), max_size=9),
    returned=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    dialect=st.sampled_from(["function", "module"]),
)
def test_any_program_computes_the_same(program, returned, dialect):
    def run(x):
        values = [x, x.exp()]
        for name, i, j in program:
            a, b = values[i % len(values)], values[j % len(values)]
            if name in ("view", "flat", "t", "fresh"):
                a = a.reshape(2, 4) if name != "fresh" else a
                b = b.reshape(-1)[0]
            values.append(STEPS[name](a, b))
        return tuple(values[i % len(values)] for i in returned)

    x = torch.randn(2, 4)
    try:
        expected = run(given_x := x.clone())
    except (RuntimeError, IndexError):
        return  # a program that eager refuses
    gm = trace(fn(run), (x,), dialect)
    code = gm.code
    T(gm)
    got = gm(again := x.clone())
    assert all(map(torch.equal, got, expected)) and torch.equal(given_x, again)
    T(gm, reverse=True)
    assert gm.code == code
