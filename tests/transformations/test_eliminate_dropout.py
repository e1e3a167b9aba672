import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt import ops
from fxopt.history import history
from fxopt.text import show
from fxopt.transformations.eliminate_dropout import EliminateDropout
from tests.rewriting import DIALECTS, rewrites, trace, unchanged
from tests.transformations.captures import applies, captured

X = (torch.randn(2, 8),)
IMAGE = (torch.randn(2, 3, 4, 4),)


class Net(nn.Module):
    def __init__(self, drop=None):
        super().__init__()
        self.drop, self.fc = drop or nn.Dropout(0.1), nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.drop(x.relu()))


class Plain(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


AFTER = "%0 = relu(x)\n%1 = linear(%0, fc.weight, fc.bias)\nreturn %1"
MODULES = [
    nn.Dropout(0.1),
    nn.Dropout(0.1, inplace=True),
    nn.Dropout1d(0.1),
    nn.AlphaDropout(0.1),
    nn.AlphaDropout(0.1, inplace=True),
    nn.FeatureAlphaDropout(0.1),
]


@pytest.mark.parametrize("drop", MODULES, ids=str)
def test_a_dropout_outside_of_training_goes(drop):
    inputs = (X[0].unsqueeze(1),)  # without a batch, a Dropout1d makes one
    rewrites(EliminateDropout(), Net(drop), inputs, AFTER, count=1, rtol=0, atol=0)


@pytest.mark.parametrize("drop", [nn.Dropout2d(0.1), nn.Dropout2d(0.1, inplace=True)], ids=str)
def test_features_of_images(drop):
    net = Plain(lambda self, x: self.drop(x.relu()) + 1, drop=drop)
    rewrites(EliminateDropout(), net, IMAGE, "%0 = relu(x)\n%1 = add(%0, 1)\nreturn %1", rtol=0, atol=0)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: F.dropout(x.relu(), training=False) + 1,
        lambda self, x: F.dropout(x.relu(), 0.5, False, True) + 1,
        lambda self, x: F.dropout(input=x.relu(), p=0.5, training=self.training) + 1,
        lambda self, x: torch.dropout(x.relu(), 0.5, train=False) + 1,
        lambda self, x: torch.dropout_(x.relu(), 0.5, False) + 1,
        lambda self, x: F.alpha_dropout(x.relu()) + 1,
        lambda self, x: F.alpha_dropout(x.relu(), 0.5, False, inplace=True) + 1,
        lambda self, x: F.feature_alpha_dropout(x.relu(), 0.5) + 1,
        lambda self, x: torch.feature_dropout(x.relu(), 0.5, False) + 1,
        lambda self, x: F.dropout(x.relu(), 0.0, True) + 1,
        lambda self, x: F.dropout(x.relu(), 0.0, True, inplace=True) + 1,
    ],
)
def test_functions(forward):
    rewrites(EliminateDropout(), Plain(forward), X, "%0 = relu(x)\n%1 = add(%0, 1)\nreturn %1", rtol=0, atol=0)


def test_in_training_with_p_of_zero():
    rewrites(EliminateDropout(), Net(nn.Dropout(0.0)), X, AFTER, training=True, rtol=0, atol=0)


def test_one_module_called_twice_goes_after_its_last_call():
    net = Plain(lambda self, x: self.drop(x) + self.drop(x * 2), drop=nn.Dropout())
    after = "%0 = mul(x, 2)\n%1 = add(x, %0)\nreturn %1"
    for gm in rewrites(EliminateDropout(), net, X, after, rtol=0, atol=0).values():
        assert not list(gm.children()) or "drop" not in dict(gm.named_children())


def test_the_input_itself_is_returned():
    net = Plain(lambda self, x: self.drop(x), drop=nn.Dropout())
    for gm in rewrites(EliminateDropout(), net, X, "return x", rtol=0, atol=0).values():
        assert gm(*X) is X[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_empty_tensors(dtype):
    rewrites(EliminateDropout(), Net().to(dtype), (torch.ones(2, 8, dtype=dtype),), AFTER, rtol=0, atol=0)
    rewrites(EliminateDropout(), Net().to(dtype), (torch.ones(0, 8, dtype=dtype),), AFTER, rtol=0, atol=0)


def test_a_varying_batch():
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    gm = rewrites(EliminateDropout(), Net(), X, AFTER, dialects=("aten",), dynamic=dynamic)["aten"]
    assert gm(torch.ones(5, 8)).shape == (5, 8)


@pytest.mark.parametrize("drop", [nn.Dropout(0.5), nn.Dropout1d(0.5), nn.AlphaDropout(0.5)], ids=str)
def test_in_training_it_stays(drop):
    dialects = ("module", "aten")  # the tracer of functions sees self.training as it is when traced
    unchanged(EliminateDropout(), Net(drop), X, "expected False, found True", training=True, dialects=dialects)


def scaled(self, x):
    return F.dropout(x, 0.5, training=True, inplace=True)


class Louder(nn.Dropout):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: F.dropout(x, 0.5), "expected False, found True"),
        (lambda self, x: F.dropout(x, 1.0), "expected False, found True"),
        (lambda self, x: F.dropout(x.relu(), 0.5, True, True), "."),
        (lambda self, x: torch.feature_dropout(x, 0.5, True), "expected False, found True"),
        (lambda self, x: F.alpha_dropout(x, 0.5, True), "expected False, found True"),
        (lambda self, x: x * 1.0, None),
        (lambda self, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.0), None),
    ],
)
def test_near_misses(forward, reason):
    unchanged(EliminateDropout(), Plain(forward), X, reason, dialects=DIALECTS)


def test_a_subclass_or_a_hook_is_more_than_a_dropout():
    hooked = nn.Dropout()
    hooked.register_forward_hook(lambda module, args, result: result * 2)
    unchanged(EliminateDropout(), Net(hooked), X, "drop has hooks", dialects=("module",))
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8)))
    gm.add_submodule("louder", Louder().eval())
    with gm.graph.inserting_before(list(gm.graph.nodes)[-1]):
        louder = gm.graph.call_module("louder", (list(gm.graph.nodes)[-2],))
    list(gm.graph.nodes)[-1].args = (louder,)
    gm.recompile()
    assert any("a subclass of Dropout" in m.reason for m in EliminateDropout().misses(gm))
    EliminateDropout()(gm)
    assert not history(gm)[-1].rewrites


def test_training_that_is_decided_at_the_call_stays():
    graph = torch.fx.Graph()
    x, training = graph.placeholder("x"), graph.placeholder("training")
    graph.output(graph.call_function(F.dropout, (x, 0.5, training)))
    gm = torch.fx.GraphModule(nn.Module(), graph)
    EliminateDropout()(gm)
    assert "dropout" in show(gm)


def test_only_a_dropout_that_draws_has_an_effect():
    def effects(forward):
        gm = trace(Plain(forward), X, "function")
        return [ops.effectful(gm, n) for n in gm.graph.nodes if n.op == "call_function"]

    assert effects(lambda self, x: F.dropout(x, 0.5, False, True)) == [False]
    assert effects(lambda self, x: F.dropout(x, 0.5, True)) == [True]
    assert effects(lambda self, x: F.alpha_dropout(x, 0.5, True)) == [True]


def test_captured_models():
    for name, count in (("bert", 4), ("gpt2", 1)):  # those that a residual sum reads together are one rewrite
        assert show(captured(name)[0]).count("dropout(") == 1 + 2 * 2  # embeddings; two in each layer
        gm = applies(EliminateDropout(), name, count)
        assert "dropout" not in show(gm)
    applies(EliminateDropout(), "resnet", 0)
