import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.transformations.fuse_linear_relu import FuseLinearReLU
from tests.rewriting import rewrites, trace, unchanged
from tests.transformations.captures import applies
from tests.transformations.fusions import Subclass, cases, hooked, refuses_odd_parameters, same_gradients
from tests.transformations.modules import fn

X = (torch.randn(2, 3, 8),)
MODULE = {"dialects": ("module",)}
EXACT = {"rtol": 0, "atol": 0}  # the weights are too small for oneDNN
AFTER = "%0 = linear_relu(input, 0.weight, 0.bias)\nreturn %0"


def linear():
    return nn.Linear(8, 4)


def net(inplace=False):
    return nn.Sequential(linear(), nn.ReLU(inplace))


def test_linear_and_relu_are_one():
    rewrites(FuseLinearReLU(), net(), X, AFTER, count=1, **EXACT)


def test_in_place_on_the_fresh_product():
    rewrites(FuseLinearReLU(), net(inplace=True), X, AFTER, count=1, **EXACT)
    model = fn(lambda s, x: s.l(x).relu_(), l=linear())
    rewrites(FuseLinearReLU(), model, X, "%0 = linear_relu(x, l.weight, l.bias)\nreturn %0", count=1, **EXACT)


def test_without_a_bias_and_with_keywords():
    model = fn(lambda s, x: F.relu(input=F.linear(weight=s.w, input=x)), w=nn.Parameter(torch.randn(4, 8)))
    rewrites(FuseLinearReLU(), model, X, "%0 = linear_relu(x, w)\nreturn %0", count=1, **EXACT)


def test_a_weight_that_is_computed():
    model = fn(lambda x, w: F.relu(F.linear(x, w)))
    inputs = (torch.randn(2, 8), torch.randn(4, 8))
    rewrites(FuseLinearReLU(), model, inputs, "%0 = linear_relu(x, w)\nreturn %0", count=1, **EXACT)


def test_not_a_number_stays_one():
    gm = trace(net(), X, "aten")
    FuseLinearReLU()(gm)
    assert bool(gm(torch.full((2, 3, 8), torch.nan)).isnan().all())


def test_in_training_the_gradients_are_the_same():
    same_gradients(FuseLinearReLU(), net(), X)


def used_twice(s, x):
    y = s.l(x)
    return y.relu() + y


def weight_written_between(x, v):
    w = v * 2
    y = F.linear(x, w)
    w.zero_()
    return y.relu() + w.sum()


@cases(
    ("the product is used twice", fn(used_twice, l=linear()), X, "has other users"),
    ("the weight changes in between", fn(weight_written_between), (*X, torch.randn(4, 8)), "writes in place"),
    ("no linear", fn(lambda x: F.relu(x + 1)), X, "is not linear"),
    ("a dropout in between", fn(lambda s, x: F.relu(F.dropout(s.l(x), 0.5, True)), l=linear()), X, "is not linear"),
    ("hooks", nn.Sequential(hooked(linear()), nn.ReLU()), X, "has hooks", MODULE),
    ("hooks on relu", nn.Sequential(linear(), hooked(nn.ReLU())), X, "has hooks", MODULE),
    ("a subclass", nn.Sequential(Subclass(8, 4), nn.ReLU()), X, "is not linear|subclass of Linear", MODULE),
    ("relu6", nn.Sequential(linear(), nn.ReLU6()), X, None),
)
def test_near_misses(model, inputs, reason, options):
    unchanged(FuseLinearReLU(), model, inputs, reason, **options)


def test_a_weight_of_another_type_stays():
    refuses_odd_parameters(FuseLinearReLU(), net(), X, "0.weight")


@pytest.mark.slow
def test_t5():
    applies(FuseLinearReLU(), "t5", count=4)  # one in each of two encoder and two decoder layers


def test_small_weights_are_left_alone_when_asked():
    unchanged(FuseLinearReLU(min_elements=33), net(), X, "fewer than min_elements=33")
    rewrites(FuseLinearReLU(min_elements=32), net(), X, AFTER, count=1, **EXACT)
