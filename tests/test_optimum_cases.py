"""
What optimum's tests of its FX transformations ask, asked of ours on module-level graphs of small models; and classes
written for optimum's base classes, its own among them, run unchanged on ours.
"""

import math
import operator

import optimum.fx.optimization.transformations as theirs
import pytest
import torch
from torch import nn

import fxopt
from fxopt.history import history
from fxopt.transformations.change_truediv_to_mul_by_inverse import ChangeTrueDivToMulByInverse
from fxopt.transformations.fuse_batch_norm1d_in_linear import FuseBatchNorm1dInLinear
from fxopt.transformations.fuse_batch_norm2d_in_conv2d import FuseBatchNorm2dInConv2d
from fxopt.transformations.fuse_bias_in_linear import FuseBiasInLinear
from fxopt.transformations.merge_linears import MergeLinears
from tests.rewriting import flags, nodes, state

X = (torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)),)


class SelfAttention(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8, bias=bias), nn.Linear(8, 8)

    def heads(self, y):
        return y.view(y.size(0), y.size(1), 2, 4).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        scores = q @ k.transpose(-1, -2) / math.sqrt(4)
        y = torch.softmax(scores / 3, -1) @ v
        return y.transpose(1, 2).reshape(x.shape)


class Layer(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.attention, self.norm = SelfAttention(bias), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8)
        self.up_bias, self.shift = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = self.norm(x + self.attention(x))
        hidden = nn.functional.gelu(self.up(x) + self.up_bias)
        return x * 2 + (self.down(hidden) + self.shift)


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(True), Layer(False)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def get_bert():
    torch.manual_seed(0)
    model = Bert().eval()
    return model, fxopt.propagate(torch.fx.symbolic_trace(model), X)


class Swap(fxopt.Transformation):
    """Products become sums."""

    def __init__(self, some_argument=None):
        self.some_argument = some_argument

    def transform(self, graph_module):
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and node.target == operator.mul:
                node.target = operator.add
        return graph_module


def linears(module):
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


# --- the cases ------------------------------------------------------------------------------------------------------


def test_transformation():
    _, traced = get_bert()
    products = [n for n in traced.graph.nodes if n.target is operator.mul]
    Swap()(traced)
    assert products and all(n.target is operator.add for n in products)


@pytest.mark.parametrize("transformation", [MergeLinears(), FuseBiasInLinear(), ChangeTrueDivToMulByInverse()])
def test_reversible_transformation(transformation):
    model, traced = get_bert()
    code, held, before, flagged = traced.code, state(traced), nodes(traced), flags(traced)
    assert transformation(traced) is traced and transformation.preserves_computation
    assert traced.code != code
    torch.testing.assert_close(traced(*X), model(*X), rtol=1e-5, atol=1e-6)
    assert transformation(traced, reverse=True) is traced
    assert torch.equal(traced(*X), model(*X))
    assert (traced.code, state(traced), nodes(traced), flags(traced)) == (code, held, before, flagged)
    assert dict(traced.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert traced.get_parameter(name) is parameter


@pytest.mark.parametrize("inplace", [True, False])
def test_compose(inplace):
    _, traced = get_bert()
    transformed = MergeLinears()(ChangeTrueDivToMulByInverse()(traced))
    _, other = get_bert()
    original = other.code
    composition = fxopt.compose(ChangeTrueDivToMulByInverse(), MergeLinears(), inplace=inplace)
    composed = composition(other)
    assert (composed is other) is inplace
    assert composed.code == transformed.code and (inplace or other.code == original)
    restored = MergeLinears()(ChangeTrueDivToMulByInverse()(transformed, reverse=True), reverse=True)
    assert restored.code == composition(composed, reverse=True).code == original


def test_compose_preserves():
    assert fxopt.compose(ChangeTrueDivToMulByInverse(), MergeLinears()).preserves_computation
    assert not fxopt.compose(Swap(), ChangeTrueDivToMulByInverse(), MergeLinears()).preserves_computation


def test_a_composition_of_one_reverses():
    _, traced = get_bert()
    code, composition = traced.code, fxopt.compose(MergeLinears())
    assert composition(composition(traced), reverse=True).code == code


def test_transformation_signature():
    one, other = Swap(), Swap(some_argument=1)
    assert one.signature == Swap().signature
    assert one.signature != other.signature
    assert other.signature != type("Different", (Swap,), {})(some_argument=1).signature
    assert Swap(-1).signature != Swap(-2).signature
    assert Swap([1]).signature == Swap([1]).signature
    composed = fxopt.compose(one, other).signature
    assert composed == fxopt.compose(Swap(), Swap(1)).signature != fxopt.compose(other, one).signature


def test_transformation_mark_and_transformed():
    class MarkLinears(fxopt.ReversibleTransformation):
        def __init__(self, some_argument=None):
            self.some_argument = some_argument

        def transform(self, graph_module):
            for node in layers(graph_module):
                self.mark_as_transformed(node)
            return graph_module

        def reverse(self, graph_module):
            for node in layers(graph_module):
                self.mark_as_restored(node)
            return graph_module

    def layers(gm):
        return [
            n for n in gm.graph.nodes if n.op == "call_module" and isinstance(gm.get_submodule(n.target), nn.Linear)
        ]

    _, traced = get_bert()
    one, other = MarkLinears(), MarkLinears(some_argument="test")
    one(traced)
    assert all(map(one.transformed, layers(traced))) and not any(map(other.transformed, layers(traced)))
    assert one.get_transformed_nodes(traced) == layers(traced)
    other(traced)
    assert all(map(other.transformed, layers(traced)))
    one(traced, reverse=True)
    assert not any(map(one.transformed, layers(traced))) and all(map(other.transformed, layers(traced)))


def test_fuse_bias_in_linear():
    """Ours folds what is added; optimum's appends a column of ones to the input, which no runtime is faster with."""
    model, traced = get_bert()
    assert sum(m.bias is None for m in linears(traced)) == 3
    FuseBiasInLinear()(traced)
    assert [m for m in linears(traced) if m.bias is None] == [traced.get_submodule("layers.1.attention.key")]
    assert "up_bias" not in " ".join(traced.state_dict()) and "shift" not in " ".join(traced.state_dict())
    torch.testing.assert_close(traced(*X), model(*X))


def test_merge_linears():
    model, traced = get_bert()
    assert [len(linears(layer.attention)) for layer in model.layers] == [3, 3]
    MergeLinears()(traced)
    for i, bias in enumerate((False, True)):
        (merged,) = linears(traced.get_submodule(f"layers.{i}.attention"))
        assert (merged.in_features, merged.out_features) == (8, 24)
        assert bool((merged.bias[8:16] == 0).all()) is bias
    MergeLinears()(traced, reverse=True)
    assert [len(linears(layer.attention)) for layer in traced.layers.children()] == [3, 3]
    assert traced.layers.get_submodule("1").attention.key.bias is None


def test_change_truediv_to_mul_by_inverse():
    _, traced = get_bert()

    def count(target):
        return sum(n.target is target for n in traced.graph.nodes)

    quotients, products = count(operator.truediv), count(operator.mul)
    assert quotients == 4
    ChangeTrueDivToMulByInverse()(traced)
    assert (count(operator.truediv), count(operator.mul)) == (0, products + quotients)
    ChangeTrueDivToMulByInverse()(traced, reverse=True)
    assert (count(operator.truediv), count(operator.mul)) == (quotients, products)


def shaken(model):
    """``model`` in inference, with statistics and weights as after training."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (m.running_mean, m.weight, m.bias):
                nn.init.normal_(tensor)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    return model.eval()


def test_fuse_conv2d_batchnorm2d():
    class Block(nn.Module):
        def __init__(self, n, m):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(n, m, 3, padding=1, bias=False), nn.BatchNorm2d(m)
            self.shortcut = nn.Sequential(nn.Conv2d(n, m, 1), nn.BatchNorm2d(m))

        def forward(self, x):
            return torch.relu(self.norm(self.conv(x)) + self.shortcut(x))

    model, x = shaken(nn.Sequential(Block(3, 4), Block(4, 5))), torch.randn(8, 3, 9, 9)
    traced = torch.fx.symbolic_trace(model)
    FuseBatchNorm2dInConv2d()(traced)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in traced.modules())
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
    FuseBatchNorm2dInConv2d()(traced, reverse=True)
    assert torch.equal(traced(x), model(x))


def test_fuse_linear_batchnorm1d():
    """A projection head as GroupViT's, and one as LeViT's, with the normalisation first."""
    head = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    model, x = shaken(nn.Sequential(head, nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 3))), torch.randn(5, 8)
    traced = fxopt.propagate(torch.fx.symbolic_trace(model), (x,))
    FuseBatchNorm1dInLinear()(traced)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in traced.modules())
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
    FuseBatchNorm1dInLinear()(traced, reverse=True)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("pass_", [FuseBatchNorm2dInConv2d(), MergeLinears(), FuseBiasInLinear()])
def test_modules_at_the_root(pass_):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.a, self.b, self.shift = nn.Linear(5, 2), nn.Linear(5, 3), nn.Parameter(torch.randn(3))

        def forward(self, x):
            y = self.norm(self.conv(x))
            return self.a(y).exp(), self.b(y).exp() if isinstance(pass_, MergeLinears) else self.b(y) + self.shift

    model, x = shaken(Root()), torch.randn(2, 3, 4, 5)
    traced = fxopt.propagate(torch.fx.symbolic_trace(model), (x,))
    pass_(traced)
    assert len(history(traced)[0].rewrites) == 1
    for a, b in zip(traced(x), model(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- classes written for optimum ------------------------------------------------------------------------------------

OWN = {"__dict__", "__weakref__", "__abstractmethods__", "_abc_impl"}


def rebased(kind):
    """The class body of ``kind``, one of optimum's, on the base of ours that has the same name."""
    base = getattr(fxopt, kind.__mro__[1].__name__)
    return type(kind.__name__, (base,), {k: v for k, v in vars(kind).items() if k not in OWN})


REVERSIBLE = [theirs.MergeLinears, theirs.FuseBiasInLinear, theirs.ChangeTrueDivToMulByInverse]


class Plain(nn.Module):
    """What optimum can do without a mistake: no layer is at the root or called twice, all have a bias."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.query, self.inner.key = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.inner.query(x) / 4.0 + self.inner.key(x)


def get_plain():
    torch.manual_seed(0)
    model = Plain().eval()
    return model, torch.fx.symbolic_trace(model)


@pytest.mark.parametrize("kind", REVERSIBLE)
def test_optimums_own_class_is_undone_exactly(kind):
    transformation = rebased(kind)()
    model, traced = get_plain()
    content = {k: v.clone() for k, v in model.state_dict().items()}
    code, held, before = traced.code, state(traced), nodes(traced)
    transformation(traced)
    assert traced.code != code or state(traced) != held
    assert transformation.get_transformed_nodes(traced)
    torch.testing.assert_close(traced(*X), model(*X))
    transformation(traced, reverse=True)
    assert (traced.code, state(traced), nodes(traced)) == (code, held, before)
    assert torch.equal(traced(*X), model(*X))
    assert all(torch.equal(v, content[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", REVERSIBLE)
def test_optimums_own_reverse_runs_where_no_history_knows_better(kind):
    transformation = rebased(kind)()
    _, traced = get_plain()
    expected = traced(*X)
    transformation.transform(traced)
    traced.recompile()
    torch.testing.assert_close(traced(*X), expected)
    transformation(traced, reverse=True)
    torch.testing.assert_close(traced(*X), expected)
    assert sorted(n for n, _ in traced.named_parameters()) == sorted(n for n, _ in Plain().named_parameters())
    assert {n.target for n in traced.graph.nodes if n.op == "call_module"} == {"inner.query", "inner.key"}


@pytest.mark.parametrize("kind,model,x", [
    (theirs.FuseBatchNorm2dInConv2d, nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)), (2, 3, 5, 5)),
    (theirs.FuseBatchNorm1dInLinear, nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (2, 3)),
])  # fmt: skip
def test_optimums_one_way_passes_can_be_undone_here(kind, model, x):
    transformation, model, x = rebased(kind)(), shaken(model), torch.randn(x)
    traced = torch.fx.symbolic_trace(model)
    code, held = traced.code, state(traced)
    transformation(traced)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
    history(traced).undo(transformation)
    assert (traced.code, state(traced)) == (code, held) and torch.equal(traced(x), model(x))


def test_an_instance_of_optimums_goes_into_compose():
    model, traced = get_plain()
    code, held = traced.code, state(traced)
    composition = fxopt.compose(theirs.ChangeTrueDivToMulByInverse(), theirs.MergeLinears())
    composition(traced)
    torch.testing.assert_close(traced(*X), model(*X))
    assert composition(traced, reverse=True) is traced
    assert (traced.code, state(traced)) == (code, held)


def test_where_optimum_is_wrong():
    """The bias of a convolution is scaled, one without weights has no shift, and training changes nothing."""
    conv, bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)
    model, x = nn.Sequential(conv, bn).eval(), torch.randn(2, 3, 5, 5)
    bn.running_var.fill_(9.0)
    ours, other = torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(model)
    rebased(theirs.FuseBatchNorm2dInConv2d)()(other)
    assert not torch.allclose(other(x), model(x), atol=0.1)
    FuseBatchNorm2dInConv2d()(ours)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-5)
    training = torch.fx.symbolic_trace(model.train())
    FuseBatchNorm2dInConv2d()(training)
    assert not history(training)[0].rewrites
