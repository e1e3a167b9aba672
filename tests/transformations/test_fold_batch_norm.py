import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxopt.history import history
from fxopt.transformations.fold_batch_norm import FoldBatchNorm
from tests.rewriting import rewrites, trace, unchanged
from tests.transformations.batch_norms import Pair, norm, unchecked  # noqa: F401

T = FoldBatchNorm()
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def image(n, channels=4):
    return (torch.randn(2, channels, *(4, 5, 3)[:n]),)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_after_a_convolution(n, groups, bias):
    conv = CONV[n](4, 6, 2, padding=1, groups=groups, bias=bias)
    for dialect, gm in rewrites(T, Pair(conv=conv, bn=norm(6, n)), image(n), None, count=1, **CLOSE).items():
        assert [p for p, _ in gm.named_parameters()] == ["conv.weight", "conv.bias"]
        assert dialect != "module" or type(gm.conv) is CONV[n]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_before_a_convolution(n, groups):
    rewrites(T, Pair(bn=norm(4, n), conv=CONV[n](4, 6, 2, groups=groups)), image(n), None, count=1, **CLOSE)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_after_a_transposed_convolution(n, groups, bias):
    conv = TRANSPOSED[n](4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups, bias=bias)
    for dialect, gm in rewrites(T, Pair(conv=conv, bn=norm(6, n)), image(n), None, count=1, **CLOSE).items():
        assert gm.conv.weight.shape == conv.weight.shape
        assert dialect != "module" or type(gm.conv) is TRANSPOSED[n]


def test_beside_a_linear_layer():
    after = "%0 = linear(x, fc.weight, fc.bias)\nreturn %0"
    rewrites(T, Pair(fc=nn.Linear(4, 5), bn=norm(5, 0)), (torch.randn(3, 4),), after, **CLOSE)
    rewrites(T, Pair(bn=norm(4, 0), fc=nn.Linear(4, 5)), (torch.randn(3, 4),), after, **CLOSE)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_transposed_in_half_precision(dtype, tolerance):
    model = Pair(conv=nn.ConvTranspose2d(4, 6, 2, groups=2).to(dtype), bn=norm(6, 2, dtype=dtype))
    rewrites(T, model, (image(2)[0].to(dtype),), None, rtol=tolerance, atol=tolerance)


# --- near-misses ----------------------------------------------------------------------------------------------------


def test_before_a_transposed_convolution_stays():
    """At the borders, fewer taps of the kernel are summed, and the shift is another."""
    unchanged(T, Pair(bn=norm(4, 2), conv=nn.ConvTranspose2d(4, 6, 2)), image(2), None)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_before_a_convolution_that_pads_stays(n):
    unchanged(T, Pair(bn=norm(4, n), conv=CONV[n](4, 6, 3, padding=1)), image(n), "pads with zeros")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_unbatched_input_stays(n):
    """Of (C, L), a normalisation takes L for the channels."""
    x = (torch.randn(4, *(6, 6, 6)[:n]),)
    unchanged(T, Pair(conv=CONV[n](4, 6, 1), bn=norm(6, n)), x, "dimensions, expected", dialects=("function", "aten"))


def test_circular_padding_stays():
    model = Pair(conv=nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), bn=norm(6, 1))
    unchanged(T, model, image(1), "padding_mode='circular'", dialects=("module",))


def test_an_activation_between_stays():
    unchanged(T, Pair(conv=nn.Conv1d(4, 6, 2), act=nn.ReLU(), bn=norm(6, 1)), image(1), "relu is not|act is not")


def test_training_stays():
    unchanged(T, Pair(conv=nn.Conv3d(4, 6, 2), bn=norm(6, 3)), image(3), "expected False, found True", training=True,
              dialects=("module", "aten"))  # fmt: skip


def test_a_padding_mode_after_which_nothing_is_folded_is_no_loss_of_the_other():
    model = Pair(a=nn.Conv1d(4, 6, 1), n1=norm(6, 1), act=nn.ReLU(), n2=norm(6, 1), b=nn.Conv1d(6, 2, 3, padding=1))
    rewrites(T, model, image(1), None, count=1, **CLOSE)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    n=st.sampled_from([1, 2]),
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    affine=st.booleans(),
    stride=st.integers(1, 2),
)
def test_computes_the_same(seed, n, transposed, groups, bias, affine, stride):
    torch.manual_seed(seed)
    conv = (TRANSPOSED if transposed else CONV)[n](4, 8, 2, stride=stride, groups=groups, bias=bias)
    model = Pair(conv=conv, bn=norm(8, n, affine)).double().eval()
    x = (image(n)[0].double(),)
    gm = trace(model, x, "function")
    T(gm)
    assert len(history(gm)[0].rewrites) == 1
    torch.testing.assert_close(gm(*x), model(*x), rtol=1e-9, atol=1e-9)
    T(gm, reverse=True)
    assert torch.equal(gm(*x), model(*x))
