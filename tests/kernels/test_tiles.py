"""float32 products on the tile unit against float64, and as parts of the packed operators."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.kernels import packed, tiles

pytestmark = pytest.mark.skipif(not tiles.available(), reason="needs a CPU with AMX, and the native library")

SIZES = st.sampled_from([1, 2, 5, 16, 17, 31, 32, 33, 64, 100])


def bound(x: Tensor, weight: Tensor) -> float:
    """The largest error to expect of sums in float32, whose roundings go either way."""
    terms = weight[0].numel()
    scale = float(x.abs().max() * weight.abs().max())
    return scale * math.sqrt(terms) * 2.0**-22 * (1 + math.log2(terms)) + 1e-37


@given(
    batch=st.integers(1, 3),
    channels=SIZES | st.just(1100),
    features=SIZES,
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 24), st.integers(1, 70)),
    has_bias=st.booleans(),
    has_other=st.booleans(),
    relu=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_convolutions(
    batch, channels, features, kernel, stride, padding, dilation, size, has_bias, has_other, relu, threads, seed
) -> None:
    window = zip(size, padding, dilation, kernel, strict=True)
    assume(all(n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in window))
    assume(math.prod((batch, channels, *size, *kernel, features)) < 2**26)
    torch.manual_seed(seed)
    x, weight = torch.randn(batch, channels, *size), torch.randn(features, channels, *kernel)
    bias = torch.randn(features) if has_bias else None
    at = (stride, padding, dilation)
    expected = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), *at)
    other = torch.randn(expected.shape) if has_other else None
    expected = expected if other is None else expected + other
    expected = expected.relu() if relu else expected
    layout = tiles.pack(weight)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = tiles.conv2d(x, layout, bias, other, weight.shape, *at, relu)
        torch.set_num_threads(threads % 3 + 1)
        again = tiles.conv2d(x, layout, bias, other, weight.shape, *at, relu)
    finally:
        torch.set_num_threads(before)
    assert y.shape == expected.shape and y.is_contiguous(memory_format=torch.channels_last)
    assert (y - expected).abs().max() <= bound(x, weight) + 2e-7 * expected.abs().max()
    assert torch.equal(y, again)


@pytest.mark.parametrize(("rows", "inputs", "features"), [(1, 1, 1), (17, 1030, 33), (700, 1500, 96), (2000, 40, 700)])
def test_linears(rows: int, inputs: int, features: int) -> None:
    """More accurate than MKL, also over chunks of rows and ranges of channels."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, rows, inputs), torch.randn(features, inputs), torch.randn(features)
    y = tiles.linear(x, tiles.pack(weight), bias, features)
    expected = F.linear(x.double(), weight.double(), bias.double())
    error, plain = ((z - expected).pow(2).mean().sqrt() for z in (y, F.linear(x, weight, bias)))
    assert error <= max(plain, 2e-7 * expected.abs().max())
    strided = torch.randn(2, inputs, rows).transpose(1, 2)
    assert torch.equal(
        tiles.linear(strided, tiles.pack(weight), bias, features),
        tiles.linear(strided.contiguous(), tiles.pack(weight), bias, features),
    )


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3.4e38])
def test_what_cannot_be_split(value: float) -> None:
    x, weight = torch.randn(64, 300), torch.randn(40, 300)
    layout = tiles.pack(weight)
    assert tiles.linear(x, layout, None, 40) is not None
    x[63, 299] = weight[39, 7] = value
    assert tiles.linear(x, layout, None, 40) is None and tiles.pack(weight) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_type(dtype: torch.dtype) -> None:
    """They are not read as float32; the operator refuses them as torch does, at every call."""
    weight = torch.randn(320, 256).to(dtype)
    assert tiles.pack(weight) is None
    for _ in range(3):
        with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
            torch.ops.fxopt.packed_linear(torch.randn(64, 256), weight)


def test_rows_that_were_measured_are_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, x, weight = counted(monkeypatch, "linear"), torch.randn(64, 256), torch.randn(320, 256)
    with torch.no_grad():
        for _ in range(3):
            torch.ops.fxopt.packed_linear(x, weight, None, "none", False, 1, 63)
        assert not calls
        for _ in range(3):
            torch.ops.fxopt.packed_linear(x, weight, None, "none", False, 1, 64)
    assert calls


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-20, 1e19, 3.3e38])
def test_far_from_one(scale: float) -> None:
    """The largest and the smallest numbers, subnormal ones within float32's least normal number."""
    torch.manual_seed(0)
    x, weight = torch.rand(64, 8) * scale, torch.rand(32, 8) / 16
    expected = F.linear(x.double(), weight.double())
    y = tiles.linear(x, tiles.pack(weight), None, 32)
    assert (y - expected).abs().max() <= 4e-7 * expected.abs().max() + 2.0**-124


@pytest.mark.parametrize("activation", packed.ACTIVATIONS)
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_linear(activation: str, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second call on the operator computes by tiles, and in float32 again where it has to."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 50, 256), torch.randn(320, 256), torch.randn(320)
    given_weight = weight.t().contiguous() if transposed else weight

    def run() -> Tensor:
        with torch.no_grad():
            return torch.ops.fxopt.packed_linear(x, given_weight, bias, activation, transposed)

    calls = counted(monkeypatch, "linear")
    first, _, third = run(), run(), run()
    assert calls and (third - first).abs().max() < 2e-4
    x[0, 0, 0] = math.inf
    plain = packed.packed_linear(x, given_weight, bias, activation, transposed)
    assert torch.allclose(run(), plain, atol=2e-4, equal_nan=True) and calls[-1] is False
    given_weight[0, 0] = math.nan
    x[0, 0, 0] = 0.0
    results = [run() for _ in range(4)]
    plain = packed.packed_linear(x, given_weight, bias, activation, transposed)
    assert all(torch.allclose(y, plain, atol=2e-4, equal_nan=True) for y in results)


@pytest.mark.parametrize("activation", packed.ACTIVATIONS)
@pytest.mark.parametrize("added", [None, "same", "spread"])
def test_packed_conv2d(activation: str, added: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 64, 9, 11), torch.randn(96, 64, 3, 3) / 8, torch.randn(96)
    shape = {"same": (2, 96, 5, 6), "spread": (96, 1, 1)}
    other = None if added is None else torch.randn(shape[added])
    at = ([2, 2], [1, 1], [1, 1], 1, activation)
    monkeypatch.setattr(packed, "_TILES_REUSE", 100)
    calls = counted(monkeypatch, "conv2d")
    expected = packed.packed_conv2d(x, weight, bias, other, *at)
    with torch.no_grad():
        results = [torch.ops.fxopt.packed_conv2d(x, weight, bias, other, *at) for _ in range(4)]
        wider = torch.randn(1, 64, 20, 8)
        once_more = torch.ops.fxopt.packed_conv2d(wider, weight, bias, None, *at)
    assert len(calls) >= 3  # one packed copy serves all sizes
    for y in results:
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(once_more, packed.packed_conv2d(wider, weight, bias, None, *at), atol=1e-4, rtol=1e-4)


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[bool]:
    """Whether each call of a product on tiles gave a result."""
    calls: list[bool] = []
    original = getattr(tiles, name)

    def count(*args: object) -> Tensor | None:
        y = original(*args)
        calls.append(y is not None)
        return y

    monkeypatch.setattr(tiles, name, count)
    return calls
