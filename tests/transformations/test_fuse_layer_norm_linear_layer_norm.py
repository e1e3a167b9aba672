import torch
import torch.nn.functional as F
from torch import nn

from fxopt.transformations.fuse_layer_norm_linear_layer_norm import FuseLayerNormLinearLayerNorm
from tests.rewriting import rewrites, unchanged
from tests.transformations.captures import captured
from tests.transformations.fusions import cases, hooked, refuses_odd_parameters, same_gradients
from tests.transformations.modules import fn

X = (torch.randn(2, 3, 8),)
EXACT = {"rtol": 0, "atol": 0}
PASS = FuseLayerNormLinearLayerNorm()


def net(**options):
    return nn.Sequential(nn.LayerNorm(8, **options), nn.Linear(8, 6), nn.LayerNorm(6, **options))


def children(**others):
    return {"a": nn.LayerNorm(8), "l": nn.Linear(8, 8), "b": nn.LayerNorm(8)} | others


def test_three_layers_are_one():
    after = """
        %0 = layer_norm_linear_layer_norm(input, [8], 0.weight, 0.bias, 1e-05, 1.weight, 1.bias, [6], 2.weight, 2.bias, 1e-05)
        return %0
    """  # noqa: E501
    rewrites(PASS, net(), X, after, count=1, **EXACT)


def test_without_weights_and_with_other_epsilons():
    after = """
        %0 = layer_norm_linear_layer_norm(x, [8], None, None, 0.1, l.weight, None, [6], None, None, 0.2)
        return %0
    """
    model = fn(
        lambda s, x: F.layer_norm(s.l(F.layer_norm(x, (8,), eps=0.1)), (6,), eps=0.2), l=nn.Linear(8, 6, bias=False)
    )
    rewrites(PASS, model, X, after, count=1, **EXACT)


def test_a_norm_over_two_dimensions():
    model = nn.Sequential(nn.LayerNorm((3, 8)), nn.Linear(8, 6), nn.LayerNorm((3, 6)))
    rewrites(PASS, model, X, None, count=1, **EXACT)


def test_dynamic_sizes_empty_inputs_and_half_precision():
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    found = rewrites(PASS, net(), X, None, count=1, dialects=("aten",), dynamic=dynamic, **EXACT)
    assert found["aten"](torch.randn(5, 3, 8)).shape == (5, 3, 6)
    rewrites(PASS, net(), (torch.empty(0, 8),), None, count=1, **EXACT)
    rewrites(PASS, net().bfloat16(), (X[0].bfloat16(),), None, count=1, **EXACT)


def test_a_second_chain_begins_behind_the_first():
    model = nn.Sequential(*net(), nn.Linear(6, 8), nn.LayerNorm(8))
    after = """
        %0 = layer_norm_linear_layer_norm(input, [8], 0.weight, 0.bias, 1e-05, 1.weight, 1.bias, [6], 2.weight, 2.bias, 1e-05)
        %1 = linear(%0, 3.weight, 3.bias)
        %2 = layer_norm(%1, [8], 4.weight, 4.bias)
        return %2
    """  # noqa: E501
    rewrites(PASS, model, X, after, count=1, **EXACT)


def test_in_training_the_gradients_are_the_same():
    same_gradients(PASS, net(), X)


def first_used(s, x):
    y = s.a(x)
    return s.b(s.l(y)) + y


def product_used(s, x):
    y = s.l(s.a(x))
    return s.b(y) + y


def written_between(s, x):
    x = x * 2
    y = s.l(s.a(x))
    x.add_(1)
    return s.b(y) + x


@cases(
    ("the first norm is used elsewhere", fn(first_used, **children()), X, "has other users"),
    ("the product is used elsewhere", fn(product_used, **children()), X, "has other users"),
    ("x changes in between", fn(written_between, **children()), X, "writes in place"),
    ("an activation in between", fn(lambda s, x: s.b(s.l(s.a(x)).relu()), **children()), X, "relu.* is not linear"),
    ("a sum in between", fn(lambda s, x: s.b(s.l(s.a(x)) + x), **children()), X, "is not linear"),
    ("no first norm", fn(lambda s, x: s.b(s.l(x * 2)), **children()), X, "is not layer_norm"),
    ("no linear", fn(lambda s, x: s.b(s.a(x)), **children()), X, "is not linear"),
    ("an rms norm", fn(lambda s, x: s.b(s.l(s.a(x))), **children(a=nn.RMSNorm(8))), X, "is not layer_norm"),
    (
        "hooks",
        fn(lambda s, x: s.b(s.l(s.a(x))), **children(l=hooked(nn.Linear(8, 8)))),
        X,
        "has hooks",
        {"dialects": ("module",)},
    ),
)
def test_near_misses(model, inputs, reason, options):
    unchanged(PASS, model, inputs, reason, **options)


def test_a_weight_of_another_type_stays():
    refuses_odd_parameters(PASS, net(), X, "2.bias")


def test_bert_has_none():
    gm, _ = captured("bert")
    code = gm.code
    assert PASS(gm).code == code  # its normalised states feed the residual sum too
    assert any("is not linear" in m.reason for m in PASS.misses(gm))
