import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.transformations.fold_batch_norm import FoldBatchNorm
from fxopt.transformations.fuse_conv_relu import FuseConvReLU
from tests.rewriting import rewrites, unchanged
from tests.transformations.captures import captured
from tests.transformations.fusions import cases, hooked, refuses_odd_parameters, same_gradients
from tests.transformations.modules import fn

X = (torch.randn(2, 4, 8, 8),)
EXACT = {"rtol": 0, "atol": 0}
MODULE = {"dialects": ("module",)}


def conv(**options):
    return nn.Conv2d(4, 6, 3, **options)


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9), "[2], [0], [1], 1"),
    (nn.Conv2d(4, 6, 3, padding=1, dilation=2), (2, 4, 9, 9), "[1, 1], [1, 1], [2, 2], 1"),
    (nn.Conv2d(4, 6, (3, 1), stride=(2, 1), groups=2), (4, 9, 9), "[2, 1], [0, 0], [1, 1], 2"),
    (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 9, 9), "[1, 1], [0, 0], [1, 1], 1"),
    (nn.Conv3d(4, 6, 2), (1, 4, 5, 5, 5), "[1, 1, 1], [0, 0, 0], [1, 1, 1], 1"),
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("layer", "shape", "window"), CONVOLUTIONS, ids=lambda v: str(v)[:24])
def test_convolution_and_relu_are_one(layer, shape, window, inplace):
    after = f"%0 = conv_relu(input, 0.weight, 0.bias, {window})\nreturn %0"
    model = nn.Sequential(layer, nn.ReLU(inplace))
    rewrites(FuseConvReLU(), model, (torch.randn(shape),), after, count=1, **EXACT)


def test_without_a_bias():
    after = "%0 = conv_relu(input, 0.weight, None, [1, 1], [0, 0], [1, 1], 1)\nreturn %0"
    rewrites(FuseConvReLU(), nn.Sequential(conv(bias=False), nn.ReLU()), X, after, count=1, **EXACT)


def test_dynamic_sizes_channels_last_and_bfloat16():
    model = nn.Sequential(conv(), nn.ReLU())
    dynamic = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    found = rewrites(FuseConvReLU(), model, X, None, count=1, dialects=("aten",), dynamic=dynamic)
    assert found["aten"](torch.randn(3, 4, 10, 12)).shape == (3, 6, 8, 10)
    rewrites(FuseConvReLU(), model, (X[0].to(memory_format=torch.channels_last),), None, count=1)
    rewrites(FuseConvReLU(), model.bfloat16(), (X[0].bfloat16(),), None, count=1)


def test_in_training_the_gradients_are_the_same():
    same_gradients(FuseConvReLU(), nn.Sequential(conv(), nn.ReLU()), X)


def used_twice(s, x):
    y = s.c(x)
    return y.relu() + y


def written_between(s, x):
    x = x * 2
    y = s.c(x)
    x.zero_()
    return y.relu() + x.sum()


@cases(
    ("padding by name", nn.Sequential(conv(padding="same"), nn.ReLU()), X, "padding is 'same'"),
    (
        "padding by reflection",
        nn.Sequential(conv(padding=1, padding_mode="reflect"), nn.ReLU()),
        X,
        "padding_mode='reflect'",
        MODULE,
    ),
    ("the map is used twice", fn(used_twice, c=conv()), X, "has other users"),
    ("x changes in between", fn(written_between, c=conv()), X, "writes in place"),
    ("a sum in between", fn(lambda s, x: F.relu(s.c(x) + 1), c=conv()), X, "is not conv"),
    (
        "a normalisation in between",
        nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU()),
        X,
        "is not conv",
        {"dialects": ("module", "aten")},
    ),
    ("transposed", nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.ReLU()), X, "is not conv"),
    ("hooks", nn.Sequential(hooked(conv()), nn.ReLU()), X, "has hooks", MODULE),
    ("another activation", nn.Sequential(conv(), nn.LeakyReLU()), X, None),
)
def test_near_misses(model, inputs, reason, options):
    unchanged(FuseConvReLU(), model, inputs, reason, **options)


def test_a_weight_of_another_type_stays():
    refuses_odd_parameters(FuseConvReLU(), nn.Sequential(conv(), nn.ReLU()), X, "0.weight")


def test_resnet_once_its_normalisations_are_folded():
    gm, inputs = captured("resnet")
    with torch.no_grad():
        FoldBatchNorm()(gm)
        before = gm(**inputs).logits
        FuseConvReLU()(gm)
        fused = [n for n in gm.graph.nodes if n.target is torch.ops.fxopt.conv_relu.default]
        assert len(fused) == 3  # the embedder, and the first of two convolutions in each of two layers
        assert torch.equal(gm(**inputs).logits, before)
