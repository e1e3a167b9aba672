import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

from fxopt.kernels import layouts, native, packed

pytestmark = pytest.mark.skipif(not packed.available(), reason="this torch has no oneDNN")

ANY = (1, packed.ALL_ROWS)


def linear(x, weight, bias=None, activation="none", transposed=False, min_rows=1, max_rows=packed.ALL_ROWS):
    """The operator, packing at any number of rows."""
    return operator(x, weight, bias, activation, transposed, min_rows, max_rows)


operator = torch.ops.fxopt.packed_linear.default
conv = torch.ops.fxopt.packed_conv2d.default
PLAIN = ([1, 1], [0, 0], [1, 1], 1)


@pytest.fixture(autouse=True)
def _empty_cache():
    layouts.release()
    yield
    layouts.release()


def _layer(inputs=24, outputs=40, dtype=torch.float32):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(outputs, inputs, dtype=dtype) / inputs**0.5)
    return weight, nn.Parameter(torch.randn(outputs, dtype=dtype))


def _packed_after(calls, weight):
    for _ in range(calls):
        y = linear(torch.ones(3, weight.shape[1]), weight)
    return layouts.packed_bytes(weight) > 0, y


@pytest.mark.parametrize("activation", packed.ACTIVATIONS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (24,), (0, 24), (1, 1, 24)])
def test_linear_computes_its_reference(activation, transposed, biased, shape):
    weight, bias = _layer()
    if transposed:
        weight = nn.Parameter(weight.detach().t().contiguous())
    x, b = torch.randn(shape), bias if biased else None
    with torch.no_grad():
        expected = packed.packed_linear(x, weight, b, activation, transposed)
        for _ in range(3):
            torch.testing.assert_close(linear(x, weight, b, activation, transposed), expected, rtol=1e-5, atol=1e-5)
    assert (layouts.packed_bytes(weight) > 0) == (len(shape) > 1 and 0 not in shape)


@pytest.mark.parametrize("activation", packed.ACTIVATIONS)
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "case",
    [
        (8, 16, 3, (1, 1), (1, 1), (1, 1), 1),
        (8, 16, 1, (2, 2), (0, 0), (1, 1), 1),
        (8, 16, 3, (2, 1), (2, 0), (2, 1), 4),
    ],
)
def test_convolution_computes_its_reference_channels_last(activation, summed, layout, case):
    inputs, outputs, kernel, *at, groups = case
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(outputs, inputs // groups, kernel, kernel) / 8)
    bias = nn.Parameter(torch.randn(outputs))
    for batch in (1, 3):
        x = torch.randn(batch, inputs, 12, 10).contiguous(memory_format=layout)
        with torch.no_grad():
            plain = F.conv2d(x, weight, bias, *at, groups)
            other = torch.randn_like(plain) if summed else None
            expected = packed.packed_conv2d(x, weight, bias, other, *at, groups, activation)
            for _ in range(3):
                y = conv(x, weight, bias, other, *at, groups, activation)
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
                assert y.is_contiguous(memory_format=torch.channels_last)
    assert layouts.packed_bytes(weight) == 2 * weight.numel() * 4  # one layout for each size of the input


def test_nan_and_infinity_stay_where_they_are():
    weight, bias = _layer()
    kernel = nn.Parameter(torch.randn(4, 2, 3, 3))
    x, image = torch.randn(6, 24), torch.randn(1, 2, 6, 6)
    x[1, 3], x[2, 3], image[0, 0, 0, 0], image[0, 0, 5, 5] = torch.nan, torch.inf, torch.nan, -torch.inf
    with torch.no_grad():
        for activation in packed.ACTIVATIONS:
            expected = packed.packed_linear(x, weight, bias, activation)
            image_expected = packed.packed_conv2d(image, kernel, None, None, *PLAIN, activation)
            for _ in range(3):
                torch.testing.assert_close(linear(x, weight, bias, activation), expected, equal_nan=True)
                y = conv(image, kernel, None, None, *PLAIN, activation)
                torch.testing.assert_close(y, image_expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_opcheck():
    weight, bias = _layer()
    x = torch.randn(2, 3, 24)
    kernel, image, other = torch.randn(4, 2, 3, 3), torch.randn(2, 2, 6, 6), torch.randn(2, 4, 4, 4)
    frozen = (weight.detach(), bias.detach())
    for _ in range(3):  # before and after packing
        opcheck(operator, (x, *frozen, "gelu", False, *ANY))
        opcheck(operator, (x, weight, bias, "relu"))
        opcheck(operator, (x, frozen[0].t().contiguous(), None, "gelu_tanh", True, *ANY))
        opcheck(conv, (image, kernel, None, None, *PLAIN, "none"))
        opcheck(conv, (image, kernel, torch.randn(4), other, *PLAIN, "relu"))
        with torch.no_grad():
            linear(x, frozen[0])
            conv(image, kernel, None, None, *PLAIN, "none")


def test_a_weight_is_packed_at_its_second_call():
    weight, _ = _layer()
    with torch.no_grad():
        assert not _packed_after(1, weight)[0]
        assert _packed_after(1, weight)[0]
    assert layouts.packed_bytes() == layouts.packed_bytes(weight) == weight.numel() * 4


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: w.mul_(2),
        lambda w: w.data.mul_(2),
        lambda w: w.__setattr__("data", w.data * 2),
        lambda w: w[-1].fill_(3),
        lambda w: nn.Linear(24, 40).weight.copy_(w),
    ],
    ids=["in place", "through .data", "new data", "one row", "none"],
)
def test_an_edited_weight_is_never_stale(edit):
    weight, _ = _layer()
    x = torch.randn(3, 24)
    with torch.no_grad():
        for _ in range(3):
            linear(x, weight)
        edit(weight)
        for _ in range(3):
            torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_a_weight_that_changes_at_every_call_is_never_packed():
    weight, _ = _layer()
    with torch.no_grad():
        for _ in range(4):
            assert not _packed_after(1, weight)[0]
            weight.add_(1)
    for _ in range(4):
        linear(torch.ones(2, 24), weight.detach().clone())
    gc.collect()
    assert layouts.packed_bytes() == 0


def test_packed_copies_die_with_their_weight():
    weight, _ = _layer()
    with torch.no_grad():
        _packed_after(2, weight)
    assert layouts.packed_bytes() > 0 and len(layouts._cache) == 1
    del weight
    gc.collect()
    assert layouts.packed_bytes() == 0 and not layouts._cache


def _sizes_packed(kernel):
    return [key[0][2] for key in layouts._cache[id(kernel)].layouts]


def _convolve(kernel, size, calls):
    x = torch.randn(1, 2, size, size)
    for _ in range(calls):
        y = conv(x, kernel, None, None, *PLAIN, "none")
        torch.testing.assert_close(y, F.conv2d(x, kernel), rtol=1e-5, atol=1e-5)


def test_a_convolution_keeps_a_few_layouts_and_replaces_them_slowly():
    kernel = torch.randn(4, 2, 3, 3)
    for size in range(20, 120):
        _convolve(kernel, size, 1)  # seen once: nothing is kept for them
    assert layouts.packed_bytes(kernel) == 0
    for size in range(5, 5 + layouts.MAX_LAYOUTS + 1):
        _convolve(kernel, size, 3)
    assert _sizes_packed(kernel) == [5, 6, 7, 8]
    assert layouts.packed_bytes(kernel) == layouts.MAX_LAYOUTS * kernel.numel() * 4
    _convolve(kernel, 9, 5)
    assert _sizes_packed(kernel) == [6, 7, 8, 9]


def test_sizes_in_turn_are_all_packed():
    kernel = torch.randn(4, 2, 3, 3)
    for _ in range(2):
        for size in (5, 6, 7):
            _convolve(kernel, size, 1)
    assert _sizes_packed(kernel) == [5, 6, 7]


def test_rows_outside_of_the_range_run_plain_bitwise():
    weight, bias = _layer()
    with torch.no_grad():
        for rows in (1, 9):
            x = torch.randn(rows, 24)
            for _ in range(3):
                assert torch.equal(linear(x, weight, bias, "none", False, 2, 8), F.linear(x, weight, bias))
        assert layouts.packed_bytes(weight) == 0
        for _ in range(2):
            linear(torch.randn(2, 4, 24), weight, bias, "none", False, 2, 8)
        assert layouts.packed_bytes(weight) > 0


def test_rows_by_size_and_threads(monkeypatch):
    one, two = (max(n, packed._LEAST_ROWS) for n in (1, 2))  # with AVX-512 MKL is fast on a few rows
    assert packed.rows(64, 64, 1) is None and packed.rows(64, 64, 2) is None
    assert packed.rows(768, 768, 2) is None and packed.rows(2304, 768, 2) == (one, 128)
    assert packed.rows(2048, 2048, 1) == (two, 64) and packed.rows(2048, 2048, 8) == (one, 160)
    monkeypatch.setattr(packed, "rows", lambda features, inputs, threads: (2, 4) if threads == 1 else (3, 3))
    weight, _ = _layer()
    for threads, between in ((1, (2, 4)), (2, (3, 3))):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for count in range(1, 6):
            layouts.release()
            for _ in range(2):
                with torch.no_grad():
                    operator(torch.randn(count, 24), weight)
            assert (layouts.packed_bytes(weight) > 0) == (between[0] <= count <= between[1])


def test_gradients_are_those_of_the_plain_operators():
    weight, bias = _layer(dtype=torch.float64)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    for activation in ("none", "gelu", "gelu_tanh"):
        assert torch.autograd.gradcheck(lambda *a, act=activation: linear(*a, act), (x, weight, bias))
    image = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    other = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda i, k, o: conv(i, k, None, o, *PLAIN, "gelu"), (image, kernel, other))


def test_training_between_inferences():
    layer = nn.Linear(24, 40)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    x = torch.randn(3, 24)
    for _ in range(3):
        with torch.no_grad():
            for _ in range(3):
                y = linear(x, layer.weight, layer.bias)
            torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
        linear(x, layer.weight, layer.bias).sum().backward()
        optimizer.step()


def test_a_module_with_packed_weights_copies_saves_and_moves(tmp_path):
    class Packed(nn.Linear):
        def forward(self, x):
            return linear(x, self.weight, self.bias)

    module, x = Packed(24, 40), torch.randn(3, 24)
    keys = list(module.state_dict())
    with torch.no_grad():
        for _ in range(3):
            y = module(x)
        assert list(module.state_dict()) == keys
        twin = copy.deepcopy(module)
        twin.weight.zero_()
        assert torch.equal(module(x), y) and torch.equal(twin(x), twin.bias.expand(3, -1))
        torch.save(module.state_dict(), tmp_path / "state.pt")
        twin.load_state_dict(torch.load(tmp_path / "state.pt"))
        for _ in range(3):
            torch.testing.assert_close(twin(x), y, rtol=1e-5, atol=1e-5)
        assert module.double()(x.double()).dtype == torch.float64


def test_dynamic_shapes_in_export_and_compile():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.conv = nn.Linear(24, 40), nn.Conv2d(2, 4, 3)

        def forward(self, x, image):
            y = linear(x, self.fc.weight, self.fc.bias, "gelu")
            z = conv(image, self.conv.weight, self.conv.bias, None, *PLAIN, "relu")
            return y.sum(1), z + 1

    net = Net().eval()
    dynamic = torch.export.Dim.DYNAMIC
    inputs = torch.randn(2, 3, 24), torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        shapes = ({0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic})
        gm = torch.export.export(net, inputs, dynamic_shapes=shapes, strict=False).module()
        compiled = torch.compile(net, backend="aot_eager", dynamic=True, fullgraph=True)
        targets = [n.target for n in gm.graph.nodes]
        assert targets.count(operator) == targets.count(conv) == 1
        for batch, rows, height in ((1, 7, 9), (5, 2, 6), (1, 7, 9), (1, 7, 9)):
            x = torch.randn(batch, rows, 24), torch.randn(batch, 2, height, 8)
            for run in (gm, compiled):
                torch.testing.assert_close(run(*x), net(*x), rtol=1e-5, atol=1e-5)


def test_autocast_and_other_dtypes_run_plain():
    weight, bias = _layer()
    x = torch.randn(3, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert linear(x, weight, bias).dtype == torch.bfloat16
    assert layouts.packed_bytes() == 0
    half, half_bias = _layer(dtype=torch.float16)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(linear(x.half(), half, half_bias), F.linear(x.half(), half, half_bias))
    assert layouts.packed_bytes() == 0


def test_inference_mode():
    weight, bias = _layer()
    with torch.inference_mode():
        x = torch.randn(3, 24)
        for w in (weight, weight.detach().clone()):  # the clone has no version counter
            for _ in range(3):
                torch.testing.assert_close(linear(x, w, bias), F.linear(x, w, bias), rtol=1e-5, atol=1e-5)
    assert layouts.packed_bytes(weight) > 0


def test_what_does_not_fit_the_packed_weight_runs_plain():
    weight, bias = _layer()
    kernel = torch.randn(4, 2, 3, 3)
    image, other = torch.randn(1, 2, 6, 6), torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        for _ in range(3):
            linear(torch.randn(3, 24), weight, bias)
            conv(image, kernel, None, other, *PLAIN, "none")
        spread = torch.randn(4, 1, 1)
        y = conv(image, kernel, None, spread, *PLAIN, "none")
        torch.testing.assert_close(y, F.conv2d(image, kernel) + spread)
        assert linear(torch.randn(3, 24), weight, torch.randn(1)).shape == (3, 40)
        with pytest.raises(RuntimeError, match=r"expanded size|must match"):
            linear(torch.randn(3, 24), weight, torch.randn(39))
        with pytest.raises(RuntimeError, match="dtype"):
            linear(torch.randn(3, 24).double(), weight, bias)
        torch._C._set_mkldnn_enabled(False)
        try:
            x = torch.randn(3, 24)
            assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        finally:
            torch._C._set_mkldnn_enabled(True)


def test_wrong_arguments_say_what_torch_says():
    weight, bias = _layer()
    with torch.no_grad(), pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        linear(torch.randn(3, 23), weight, bias)
    with torch.no_grad(), pytest.raises(ValueError, match="activation='swish' was given; it is one of none, relu"):
        linear(torch.randn(3, 24), weight, bias, "swish")


@pytest.mark.skipif(native.library() is None, reason=f"no native kernels: {native.why_not()}")
@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("size", (1, 7, 16, 1003, 4096))
def test_the_native_sum_and_relu_are_torchs(size, threads):
    y, other = torch.randn(2, size)
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"), 0.0, -1.0)):
        y[i * 211 % size] = value
    expected = torch.relu(y + other)
    best = native.ISAS.index(native.isa())
    for isa in range(best + 1):
        found = y.clone()
        packed._add_relu(native.address(found), native.address(other), size, isa, threads)
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7)) and torch.equal(found.isnan(), expected.isnan())


def test_a_residual_block_ends_as_in_torch_whatever_the_layouts():
    weight, bias = torch.randn(6, 4, 1, 1), torch.randn(6)
    for x_format in (torch.contiguous_format, torch.channels_last):
        for other_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 4, 5, 5).contiguous(memory_format=x_format)
            other = torch.randn(2, 6, 5, 5).contiguous(memory_format=other_format)
            other[0, 0, 0, 0], before = float("nan"), other.clone()
            before[0, 0, 0, 0] = float("nan")
            for _ in range(4):
                y = torch.ops.fxopt.packed_conv2d(x, weight, bias, other, [1, 1], [0, 0], [1, 1], 1, "relu")
                torch.testing.assert_close(y, torch.relu(F.conv2d(x, weight, bias) + before), equal_nan=True)
                torch.testing.assert_close(other, before, rtol=0, atol=0, equal_nan=True)
