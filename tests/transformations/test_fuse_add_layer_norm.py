import torch
import torch.nn.functional as F
from torch import nn

from fxopt.transformations.fuse_add_layer_norm import FuseAddLayerNorm
from tests.rewriting import rewrites, unchanged
from tests.transformations.captures import applies
from tests.transformations.fusions import cases, hooked, refuses_odd_parameters, same_gradients
from tests.transformations.modules import fn

X = (torch.randn(2, 3, 8), torch.randn(2, 3, 8))
EXACT = {"rtol": 0, "atol": 0}
SUM = torch.ops.fxopt.add_layer_norm_sum.default


def norm(**options):
    layer = nn.LayerNorm(8, **options)
    if layer.weight is not None:
        nn.init.normal_(layer.weight)
    return layer


def residual(s, x, y):
    total = x + y
    return s.n(total) * 2 + total


def test_a_sum_that_is_only_normalised():
    after = "%0 = add_layer_norm(x, y, [8], n.weight, n.bias)\nreturn %0"
    rewrites(FuseAddLayerNorm(), fn(lambda s, x, y: s.n(x + y), n=norm()), X, after, count=1, **EXACT)


def test_without_weights_and_with_another_epsilon():
    after = "%0 = add_layer_norm(x, y, [8], eps=0.1)\nreturn %0"
    model = fn(lambda s, x, y: s.n(x + y), n=norm(elementwise_affine=False, eps=0.1))
    rewrites(FuseAddLayerNorm(), model, X, after, count=1, **EXACT)


def test_a_sum_that_is_used_further():
    after = """
        %0 = add_layer_norm_sum(x, y, [8], n.weight, n.bias)
        %1 = getitem(%0, 0)
        %2 = getitem(%0, 1)
        %3 = mul(%1, 2)
        %4 = add(%3, %2)
        return %4
    """
    rewrites(FuseAddLayerNorm(), fn(residual, n=norm()), X, after, **EXACT)


def test_a_sum_that_is_returned_and_one_that_is_written_to_later():
    rewrites(FuseAddLayerNorm(), fn(returned, n=norm()), X, None, **EXACT)
    rewrites(FuseAddLayerNorm(), fn(written_later, n=norm()), X, None, **EXACT)


def returned(s, x, y):
    total = x + y
    return s.n(total), total


def written_later(s, x, y):
    total = x + y
    normed = s.n(total)
    total.mul_(2)
    return normed, total


def test_a_sum_normalised_twice_is_fused_once():
    def f(s, x, y):
        total = x + y
        return s.n(total) + s.m(total)

    for gm in rewrites(FuseAddLayerNorm(), fn(f, n=norm(), m=norm()), X, None, **EXACT).values():
        assert sum(n.target is SUM for n in gm.graph.nodes) == 1


def test_broadcasting_promotion_several_dimensions_and_dynamic_sizes():
    model = fn(residual, n=norm())
    for inputs in ((X[0], torch.randn(8)), (torch.randn(3, 1), torch.randn(8)), (X[0][:0], X[1][:0])):
        rewrites(FuseAddLayerNorm(), model, inputs, None, **EXACT)
    rewrites(FuseAddLayerNorm(), fn(residual, n=norm()).bfloat16(), (X[0].bfloat16(), X[1].bfloat16()), None, **EXACT)
    rewrites(FuseAddLayerNorm(), model, (X[0].bfloat16(), X[1]), None, **EXACT)
    rewrites(FuseAddLayerNorm(), fn(residual, n=nn.LayerNorm((3, 8))), X, None, **EXACT)
    n = torch.export.Dim("n")
    found = rewrites(FuseAddLayerNorm(), model, X, None, dialects=("aten",), dynamic=({0: n}, {0: n}), **EXACT)
    assert found["aten"](torch.randn(7, 3, 8), torch.randn(7, 3, 8)).shape == (7, 3, 8)


def test_in_training_the_gradients_are_the_same():
    same_gradients(FuseAddLayerNorm(), fn(residual, n=norm()), X)


def read_before(s, x, y):
    total = x + y
    doubled = total * 2
    return s.n(total) + doubled


def sum_written(s, x, y):
    total = x + y
    total.mul_(2)
    return s.n(total)


def input_written(s, x, y):
    x = x * 2
    total = x + y
    x.zero_()
    return s.n(total) + x


def in_place(s, x, y):
    x = x * 2
    z = x + 1
    return s.n(x.add_(y)) + z


@cases(
    ("the sum is read before", fn(read_before, n=norm()), X, "mul reads the sum add before it is normalised"),
    ("the sum is written to", fn(sum_written, n=norm()), X, "writes in place|is not add"),
    ("what is summed is written to", fn(input_written, n=norm()), X, "writes in place"),
    ("a sum in place", fn(in_place, n=norm()), X, "writes to .* in place"),
    ("a number", fn(lambda s, x: s.n(x + 1), n=norm()), X[:1], "is not a Tensor"),
    (
        "a size",
        fn(lambda s, x: s.n(x + x.shape[0]), n=norm()),
        X[:1],
        "whether .* is a tensor is not known",
        {"dialects": ("module", "function")},
    ),
    ("a scaled sum", fn(lambda s, x, y: s.n(torch.add(x, y, alpha=2)), n=norm()), X, "expected 1, found 2"),
    ("a difference", fn(lambda s, x, y: s.n(x - y), n=norm()), X, "is not add"),
    ("a dropout in between", fn(lambda s, x, y: s.n(F.dropout(x + y, 0.5, True)), n=norm()), X, "is not add"),
    ("hooks", fn(lambda s, x, y: s.n(x + y), n=hooked(norm())), X, "has hooks", {"dialects": ("module",)}),
    ("an rms norm", fn(lambda s, x, y: s.n(x + y), n=nn.RMSNorm(8)), X, None),
)
def test_near_misses(model, inputs, reason, options):
    unchanged(FuseAddLayerNorm(), model, inputs, reason, **options)


def test_a_weight_of_another_type_stays():
    refuses_odd_parameters(FuseAddLayerNorm(), fn(residual, n=norm()), X, "n.weight")


def test_an_unknown_operand_is_a_miss():
    gm = torch.fx.symbolic_trace(fn(residual, n=norm()))
    assert any("call fxopt.propagate" in m.reason for m in FuseAddLayerNorm().misses(gm))
    code = gm.code
    assert FuseAddLayerNorm()(gm).code == code


def count(gm, op):
    return sum(n.target is op for n in gm.graph.nodes)


def test_bert_normalises_behind_each_sum():
    gm = applies(FuseAddLayerNorm(), "bert", count=1)  # all hang together
    # behind the embeddings, and two in each of the two layers
    assert count(gm, torch.ops.fxopt.add_layer_norm.default) == 5 and count(gm, SUM) == 0
    assert count(gm, torch.ops.aten.layer_norm.default) == 0


def test_gpt2_carries_the_sum_on():
    gm = applies(FuseAddLayerNorm(), "gpt2", count=1)  # all hang together
    # behind attention and network of both layers; the first norm follows a dropout, the last sum goes no further
    assert count(gm, SUM) == 3 and count(gm, torch.ops.fxopt.add_layer_norm.default) == 1
