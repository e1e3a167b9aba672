import torch
import torch.nn.functional as F
from torch import nn

from fxopt.transformations.fuse_linear_gelu import FuseLinearGELU
from fxopt.transformations.fuse_linear_relu import FuseLinearReLU
from tests.rewriting import rewrites, trace, unchanged
from tests.transformations.captures import applies
from tests.transformations.fusions import Subclass, cases, hooked, refuses_odd_parameters, same_gradients
from tests.transformations.modules import fn

X = (torch.randn(2, 3, 8),)
MODULE = {"dialects": ("module",)}
EXACT = {"rtol": 0, "atol": 0}  # the weights are too small for oneDNN


def linear():
    return nn.Linear(8, 4)


def net(approximate="none", bias=True):
    return nn.Sequential(nn.Linear(8, 4, bias=bias), nn.GELU(approximate))


def test_linear_and_gelu_are_one():
    rewrites(FuseLinearGELU(), net(), X, "%0 = linear_gelu(input, 0.weight, 0.bias)\nreturn %0", count=1, **EXACT)


def test_the_tanh_form_stays_one():
    after = "%0 = linear_gelu(input, 0.weight, 0.bias, 'tanh')\nreturn %0"
    rewrites(FuseLinearGELU(), net("tanh"), X, after, count=1, **EXACT)


def test_without_a_bias():
    after = "%0 = linear_gelu(input, 0.weight, approximate='tanh')\nreturn %0"
    rewrites(FuseLinearGELU(), net("tanh", bias=False), X, after, count=1, **EXACT)


def test_each_keeps_its_form():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU("tanh"))
    after = """
        %0 = linear_gelu(input, 0.weight, 0.bias)
        %1 = linear_gelu(%0, 2.weight, 2.bias, 'tanh')
        return %1
    """
    rewrites(FuseLinearGELU(), model, X, after, **EXACT)


def test_a_layer_called_twice_is_fused_twice_and_its_weight_is_one():
    model = fn(lambda s, x: F.gelu(s.l(F.gelu(s.l(x)))), l=nn.Linear(8, 8))
    after = "%0 = linear_gelu(x, l.weight, l.bias)\n%1 = linear_gelu(%0, l.weight, l.bias)\nreturn %1"
    rewrites(FuseLinearGELU(), model, X, after, **EXACT)


def test_in_place_on_the_fresh_product():
    model = fn(lambda s, x: torch.ops.aten.gelu_(s.l(x)), l=linear())
    rewrites(FuseLinearGELU(), model, X, "%0 = linear_gelu(x, l.weight, l.bias)\nreturn %0", dialects=("aten",))


def test_dynamic_sizes_empty_inputs_vectors_and_half_precision():
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    found = rewrites(FuseLinearGELU(), net(), X, None, count=1, dialects=("aten",), dynamic=dynamic)
    assert found["aten"](torch.randn(5, 7, 8)).shape == (5, 7, 4)
    for inputs in (torch.randn(0, 8), torch.randn(8)):
        rewrites(FuseLinearGELU(), net(), (inputs,), None, count=1)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        rewrites(FuseLinearGELU(), net().to(dtype), (X[0].to(dtype),), None, count=1)


def test_in_training_the_gradients_are_the_same():
    rewrites(FuseLinearGELU(), net(), X, None, count=1, training=True, dialects=("module", "function"))
    same_gradients(FuseLinearGELU(), net(), X)


def used_twice(s, x):
    y = s.l(x)
    return F.gelu(y) + y


def written_between(s, x):
    x = x * 2
    y = s.l(x)
    x.add_(1)
    return F.gelu(y) + x.sum()


@cases(
    ("the product is used twice", fn(used_twice, l=linear()), X, "has other users"),
    ("x changes in between", fn(written_between, l=linear()), X, "writes in place"),
    ("no linear", fn(lambda x: F.gelu(x * 2)), X, "is not linear"),
    (
        "transposed",
        fn(lambda s, x: F.gelu(torch.addmm(s.b, x, s.w)), w=torch.randn(8, 4), b=torch.randn(4)),
        (torch.randn(3, 8),),
        "is not linear",
    ),
    ("a sum in between", fn(lambda s, x: F.gelu(s.l(x) + 1), l=linear()), X, "is not linear"),
    ("another layout in between", fn(lambda s, x: F.gelu(s.l(x).flatten()), l=linear()), X, "is not linear"),
    ("hooks", nn.Sequential(hooked(linear()), nn.GELU()), X, "has hooks", MODULE),
    ("a subclass", nn.Sequential(Subclass(8, 4), nn.GELU()), X, "is not linear|subclass of Linear", MODULE),
    ("relu", fn(lambda s, x: s.l(x).relu(), l=linear()), X, None),
)
def test_near_misses(model, inputs, reason, options):
    unchanged(FuseLinearGELU(), model, inputs, reason, **options)


def test_a_weight_of_another_type_stays():
    refuses_odd_parameters(FuseLinearGELU(), net(), X, "0.weight")


def test_a_second_pass_finds_nothing():
    gm = trace(net().eval(), X, "aten")
    once = FuseLinearGELU()(gm).code
    assert FuseLinearGELU()(FuseLinearReLU()(gm)).code == once


def test_bert():
    applies(FuseLinearGELU(), "bert", count=2)  # one in each of the two layers


def test_small_weights_are_left_alone_when_asked():
    unchanged(FuseLinearGELU(min_elements=33), net(), X, "fewer than min_elements=33")
