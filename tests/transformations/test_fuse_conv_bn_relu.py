import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxopt.history import history
from fxopt.text import show
from fxopt.transformations.fuse_conv_bn_relu import FuseConvBNReLU
from tests.rewriting import DIALECTS, rewrites, trace, unchanged
from tests.transformations.batch_norms import Pair, norm, unchecked  # noqa: F401
from tests.transformations.captures import applies

T = FuseConvBNReLU()
X = (torch.randn(2, 4, 5, 6),)
AFTER = "%0 = conv_relu(x, conv.weight, conv.bias, [1, 1], [0, 0], [1, 1], 1)\nreturn %0"
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def block(bias=True, affine=True, **options):
    conv = nn.Conv2d(4, 6, 2, bias=bias, **options)
    return Pair(conv=conv, bn=norm(6, 2, affine), act=nn.ReLU())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_three_become_one(bias, affine):
    for gm in rewrites(T, block(bias, affine), X, AFTER, count=1, rtol=1e-4, atol=1e-5).values():
        assert [n for n, _ in gm.named_parameters()] == ["conv.weight", "conv.bias"]
        assert not [n for n, _ in gm.named_buffers() if "running" in n]


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.ReLU()], ids=str)
def test_in_place(act):
    model = block()
    model.act = act
    rewrites(T, model, X, AFTER, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_dimensions_and_every_option(n):
    conv = CONVOLUTIONS[n](4, 6, 3, stride=2, padding=1, dilation=2, groups=2)
    model = Pair(conv=conv, bn=norm(6, n), act=nn.ReLU())
    two, one = str([2] * n), str([1] * n)
    after = f"%0 = conv_relu(x, conv.weight, conv.bias, {two}, {one}, {two}, 2)\nreturn %0"
    rewrites(T, model, (torch.randn(2, 4, *([7] * n)),), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 2e-2), (torch.bfloat16, 1e-1), (torch.float64, 1e-12)])
def test_types(dtype, tolerance):
    rewrites(T, block().to(dtype), (X[0].to(dtype),), AFTER, rtol=tolerance, atol=tolerance)


def test_a_varying_batch():
    gm = rewrites(
        T, block(), X, AFTER, dialects=("aten",), dynamic=({0: torch.export.Dim.DYNAMIC},), rtol=1e-4, atol=1e-5
    )["aten"]
    assert gm(torch.randn(5, 4, 5, 6)).shape == (5, 6, 4, 5)


def test_a_convolution_that_is_called_twice_keeps_its_own_weight():
    model = Pair(conv=nn.Conv2d(4, 4, 1), bn=norm(4, 2), act=nn.ReLU(), again=None)
    model.again, model.names = model.conv, ("conv", "bn", "act", "again")
    for gm in rewrites(T, model, X, None, count=1, rtol=1e-4, atol=1e-5).values():
        assert torch.equal(gm.conv.weight, model.conv.weight)


def test_nothing_stays_of_a_negative():
    model = block()
    with torch.no_grad():
        model.bn.bias.fill_(-100.0)
    for gm in rewrites(T, model, X, AFTER).values():
        assert not gm(*X).any()


class Net(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def _parts(**other):
    return {"conv": nn.Conv2d(4, 6, 2), "bn": norm(6, 2), **other}


def read_between(self, x):
    y = self.bn(self.conv(x))
    return y.relu() + y


def convolution_read_too(self, x):
    y = self.conv(x)
    return self.bn(y).relu() + y


@pytest.mark.parametrize(
    ("forward", "modules", "reason"),
    [
        (read_between, _parts(), "other users"),
        (convolution_read_too, _parts(), "other users"),
        (lambda self, x: self.bn(self.conv(x)), _parts(), None),
        (lambda self, x: self.conv(x).relu(), _parts(), None),
        (lambda self, x: F.relu6(self.bn(self.conv(x))), _parts(), None),
        (lambda self, x: self.bn(self.conv(x).relu()), _parts(), None),
        (lambda self, x: self.bn(self.conv(x)).relu(), _parts(bn=norm(6, 2, track_running_stats=False)), "mean = None"),
        (
            lambda self, x: self.bn(self.conv(x)).relu(),
            _parts(conv=nn.Conv2d(4, 6, 3, padding="same")),
            "padding is 'same', expected numbers",
        ),
        (lambda self, x: self.bn(x).relu(), _parts(bn=norm(4, 2)), "is not conv"),
        (lambda self, x: self.bn(self.up(x)).relu(), _parts(up=nn.ConvTranspose2d(4, 6, 2)), "is not conv"),
    ],
)
def test_near_misses(forward, modules, reason):
    unchanged(T, Net(forward, **modules), X, reason, dialects=DIALECTS)


def test_a_normalisation_in_training_stays():
    unchanged(T, block(), X, "expected False, found True", training=True, dialects=("module", "aten"))


def test_a_normalisation_that_would_not_be_finite_stays():
    model = block()
    with torch.no_grad():
        model.bn.running_mean.fill_(torch.inf)
    unchanged(T, model, X, "would not be finite")


def test_captured_models():
    gm = applies(
        T, "resnet", 2, exact=False
    )  # the first two are one rewrite: the pooling reads one, and is read by one
    assert show(gm).count("conv_relu") == 3  # the stem, and the first convolution of each of two blocks
    applies(T, "bert", 0)
    applies(T, "gpt2", 0)


@given(
    n=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    bias=st.booleans(),
    affine=st.booleans(),
    batch=st.integers(0, 2),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_convolution(n, groups, stride, padding, bias, affine, batch, seed):
    torch.manual_seed(seed)
    conv = CONVOLUTIONS[n](4, 4, 2, stride, padding, groups=groups, bias=bias)
    model = Pair(conv=conv, bn=norm(4, n, affine), act=nn.ReLU()).eval()
    x = torch.randn(batch, 4, *([4] * n))
    gm = trace(model, (x,), "function")
    code = gm.code
    with torch.no_grad():
        expected = model.double()(x.double()).float()
        model.float()
        T(gm)
        assert history(gm)[-1].rewrites
        torch.testing.assert_close(gm(x), expected, rtol=1e-4, atol=1e-4)
        T.reverse(gm)
    assert gm.code == code
