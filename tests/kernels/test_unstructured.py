"""The operators over unstructured sparse weights, against dense ones in float64, and as torch's own checks see them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxopt.errors import UsageError
from fxopt.kernels import native
from fxopt.kernels.unstructured_conv import SparseConv2d
from fxopt.kernels.unstructured_linear import SparseLinear
from tests.kernels.ways import WAYS, take, why_not

linear_op, conv_op = torch.ops.fxopt.sparse_linear.default, torch.ops.fxopt.sparse_conv2d.default


@pytest.fixture(params=WAYS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way to compute."""
    take(request.param, monkeypatch)
    return request.param


def thinned(weight: nn.Parameter, sparsity: float, seed: int) -> None:
    """Zeros at random places; exactly one value is left where nearly nothing is."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(weight.shape, generator=generator) >= sparsity
    if sparsity == 0.999:
        mask[:] = False
        mask.view(-1)[seed % mask.numel()] = True
    with torch.no_grad():
        weight.mul_(mask)


def close(found: Tensor, expected: Tensor, magnitudes: Tensor, times: float = 4) -> None:
    """
    The rounding of a float32 sum is judged by the sum of the absolute values of its terms, element by element: what
    cancels leaves a small sum with the error of large terms (Higham, Accuracy and Stability, section 4.2).
    """
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    allowed = times * torch.finfo(torch.float32).eps * magnitudes.detach() + 1e-30
    excess = (found.double() - expected).abs() / allowed
    assert not (excess > 1).any(), f"up to {float(excess.max()):.3g} times the rounding allowed"
    assert torch.equal(found.isnan(), expected.isnan())


def agree(dense: nn.Module, x: Tensor, kind: str, way: str) -> None:
    """
    Result and every gradient of the sparse layer are those of the dense one in float64.

    Torch sums long rows one term after the other, and so the gradients of the copies that its padding makes.
    """
    sparse = SparseLinear.from_dense(dense) if isinstance(dense, nn.Linear) else SparseConv2d.from_dense(dense)
    exact, sizes = copy.deepcopy(dense).double(), copy.deepcopy(dense).double()
    for parameter in sizes.parameters():  # every sum of it is one of absolute values
        parameter.data.abs_()
    a, b = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(), x.detach().double().requires_grad_()
    c = b.detach().abs().requires_grad_()
    y, expected, size = sparse(a), exact(b), sizes(c)
    close(y, expected, size)
    if kind == "expanded":
        y.sum().backward()
        expected.sum().backward()
        size.sum().backward()
    else:
        g = torch.randn_like(y)
        y.backward(g)
        expected.backward(g.double())
        size.backward(g.double().abs())
    times = 64 if way == "torch" else 4
    copies = 0
    if getattr(dense, "padding_mode", "zeros") != "zeros":
        sides = sparse.to_dense()._reversed_padding_repeated_twice
        copies = (x.shape[-1] + sum(sides[:2])) * (x.shape[-2] + sum(sides[2:])) / (x.shape[-1] * x.shape[-2])
    close(a.grad, b.grad, c.grad, times + copies / 2)
    close(sparse.values.grad, exact.weight.grad[sparse.mask()], sizes.weight.grad[sparse.mask()], times)
    if dense.bias is not None:
        close(sparse.bias.grad, exact.bias.grad, sizes.bias.grad, times)
    assert torch.equal(sparse.to_dense().weight, dense.weight)


sparsities = st.sampled_from([0.0, 0.5, 0.8, 0.95, 0.999, 1.0])


class TestLinear:
    @given(
        inputs=st.integers(1, 90),
        outputs=st.integers(1, 90),
        batch=st.lists(st.integers(0, 40), max_size=2),
        sparsity=sparsities,
        bias=st.booleans(),
        seed=st.integers(0, 2**20),
        threads=st.integers(1, 3),
        kind=st.sampled_from(["expanded", "random"]),
        isa=st.sampled_from(WAYS),
    )
    def test_as_dense(self, inputs, outputs, batch, sparsity, bias, seed, threads, kind, isa):
        torch.manual_seed(seed)
        dense = nn.Linear(inputs, outputs, bias)
        thinned(dense.weight, sparsity, seed)
        with pytest.MonkeyPatch.context() as patch, threading(threads):
            way = "torch" if why_not(isa) else isa
            take(way, patch)
            agree(dense, torch.randn(*batch, inputs), kind, way)

    def test_strided_misaligned_and_transposed_input(self, isa):
        dense = nn.Linear(37, 21)
        thinned(dense.weight, 0.8, 0)
        whole = torch.randn(50, 80)
        agree(dense, whole[1::2, 3:40], "random", isa)
        agree(dense, torch.randn(37, 12).t(), "random", isa)
        agree(dense, torch.randn(400)[1:371].view(10, 37), "random", isa)

    @pytest.mark.parametrize(("inputs", "outputs", "batch"), [(0, 5, 4), (5, 0, 4), (0, 0, 4), (5, 3, 0), (0, 5, 0)])
    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
    def test_nothing_in_or_out(self, isa, inputs, outputs, batch):
        agree(nn.Linear(inputs, outputs), torch.randn(batch, 2, inputs), "random", isa)
        with torch.no_grad():
            assert SparseLinear.from_dense(nn.Linear(inputs, outputs))(torch.randn(inputs)).shape == (outputs,)

    def test_a_row_is_the_same_in_any_batch(self, isa):
        dense = nn.Linear(100, 70)
        thinned(dense.weight, 0.8, 0)
        sparse, x = SparseLinear.from_dense(dense), torch.randn(130, 100)
        if isa != "torch":
            assert torch.equal(sparse(x)[17:40], sparse(x[17:40]))
            assert torch.equal(sparse(x)[129], sparse(x[129]))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # torch's dense one
class TestConv2d:
    @given(
        groups=st.sampled_from([1, 1, 2, 3]),
        inner=st.integers(1, 5),
        outer=st.integers(1, 5),
        kernel=st.tuples(st.integers(1, 4), st.integers(1, 5)),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        padding=st.one_of(st.tuples(st.integers(0, 6), st.integers(0, 6)), st.sampled_from(["same", "valid"])),
        dilation=st.tuples(st.integers(1, 3), st.integers(1, 2)),
        mode=st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]),
        size=st.tuples(st.integers(1, 20), st.integers(1, 40)),
        batch=st.integers(0, 11),
        sparsity=sparsities,
        bias=st.booleans(),
        last=st.booleans(),
        seed=st.integers(0, 2**20),
        threads=st.integers(1, 3),
        kind=st.sampled_from(["expanded", "random"]),
        isa=st.sampled_from(WAYS),
    )
    def test_as_dense(
        self, groups, inner, outer, kernel, stride, padding, dilation, mode, size, batch, sparsity, bias, last, seed,
        threads, kind, isa,
    ):  # fmt: skip
        torch.manual_seed(seed)
        stride = (1, 1) if padding == "same" else stride
        dense = nn.Conv2d(inner * groups, outer * groups, kernel, stride, padding, dilation, groups, bias, mode)
        thinned(dense.weight, sparsity, seed)
        x = torch.randn(batch, inner * groups, *size)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        try:  # in float64: torch 2.13 itself reads where nothing is for some of these in float32, channels last
            copy.deepcopy(dense).double()(x.double())
        except RuntimeError:  # torch refuses these sizes
            with pytest.raises((UsageError, RuntimeError)):
                SparseConv2d.from_dense(dense)(x)
            return
        with pytest.MonkeyPatch.context() as patch, threading(threads):
            way = "torch" if why_not(isa) else isa
            take(way, patch)
            agree(dense, x, kind, way)

    @pytest.mark.parametrize("shape", [(3, 12, 9), (1, 3, 12, 9)])
    def test_without_a_batch(self, isa, shape):
        dense = nn.Conv2d(3, 5, 3, padding=1)
        thinned(dense.weight, 0.5, 0)
        agree(dense, torch.randn(shape), "random", isa)

    def test_an_image_without_pixels_is_padding_alone(self, isa):
        dense = nn.Conv2d(3, 5, 3, padding=2)
        sparse, x = SparseConv2d.from_dense(dense), torch.randn(2, 3, 0, 4, requires_grad=True)
        y = sparse(x)
        y.sum().backward()
        assert torch.equal(y, dense.bias.view(-1, 1, 1).expand(2, 5, 2, 6)) and x.grad.shape == x.shape
        assert not sparse.values.grad.any() and sparse.bias.grad.tolist() == [24.0] * 5

    @given(
        kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
        dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        groups=st.sampled_from([1, 2]),
        size=st.tuples(st.integers(7, 20), st.integers(7, 20)),
        number=st.sampled_from([float("inf"), float("nan")]),
        of_input=st.booleans(),
        seed=st.integers(0, 2**20),
        threads=st.integers(1, 3),
        isa=st.sampled_from(native.ISAS),
    )
    def test_what_is_not_finite_spreads_no_further_than_it_is_read(
        self, kernel, stride, padding, dilation, groups, size, number, of_input, seed, threads, isa
    ):
        torch.manual_seed(seed)
        dense = nn.Conv2d(2 * groups, 3 * groups, kernel, stride, padding, dilation, groups, bias=False)
        thinned(dense.weight, 0.5, seed)
        sparse, x = SparseConv2d.from_dense(dense), torch.randn(2, 2 * groups, *size)
        g = torch.randn_like(sparse(x))
        hit = x if of_input else g
        hit.view(-1)[seed % hit.numel()] = number
        # Which pairs of pixels meet in a sum, counted: an integer for each element of the result and of the gradients.
        mask, options = sparse.mask().double(), (stride, padding, dilation, groups)
        bad_x, bad_g = (~x.isfinite()).double(), (~g.isfinite()).double()
        whole = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
        back = torch.ops.aten.convolution_backward
        by_x = back(torch.ones_like(bad_g), bad_x, mask, None, *whole, [False, True, False])[1]
        by_g = back(bad_g, torch.ones_like(bad_x), mask, None, *whole, [False, True, False])[1]
        with pytest.MonkeyPatch.context() as patch, threading(threads):
            take("portable" if why_not(isa) else isa, patch)  # every CPU has that
            x.requires_grad_()
            y = sparse(x)
            y.backward(g)
        assert torch.equal(y.isfinite(), torch.conv2d(bad_x, mask, None, *options) < 0.5)
        assert torch.equal(sparse.values.grad.isfinite(), (by_x + by_g)[sparse.mask()] < 0.5)
        dx = back(bad_g, bad_x, mask, None, *whole, [True, False, False])[0]
        assert torch.equal(x.grad.isfinite(), dx < 0.5)
        if not of_input:  # the others are what they would be
            finite = sparse.values.grad.isfinite()
            expected = back(g.nan_to_num(0, 0, 0), x.detach(), dense.weight, None, *whole, [False, True, False])[1]
            torch.testing.assert_close(
                sparse.values.grad[finite], expected[sparse.mask()][finite], rtol=1e-4, atol=1e-4
            )

    def test_wide_images_and_many_channels(self, isa):
        dense = nn.Conv2d(70, 40, 3, stride=2, padding=1)
        thinned(dense.weight, 0.9, 0)
        agree(dense, torch.randn(3, 70, 33, 130), "random", isa)

    @pytest.mark.parametrize(
        "channels, padding, size", [(4, (0, 16), (40, 4)), (1, (8, 8), (15, 4)), (2, (0, 40), (9, 1))]
    )
    def test_gaps_between_rows_that_are_wider_than_a_vector(self, isa, channels, padding, size):
        """Nothing is written for them: it would be the next channel's, or beyond the last."""
        dense = nn.Conv2d(channels, 8, 1, padding=padding)
        for batch in (1, 3):
            agree(dense, torch.randn(batch, channels, *size), "random", isa)
        wide = nn.Conv2d(channels, 3, (1, 40), dilation=(1, 2), padding=(0, 39))
        agree(wide, torch.randn(2, channels, *size), "random", isa)

    @pytest.mark.parametrize("stride", [1, 2, (2, 1), 3])
    def test_nothing_is_left_of_the_calls_before(self, isa, stride):
        """The kernels keep the zeros around images between calls, of the same sizes and of others as large."""
        dense = nn.Conv2d(5, 4, 3, stride=stride, padding=1)
        thinned(dense.weight, 0.6, 0)
        taller = nn.Conv2d(5, 4, (5, 3), stride=stride, padding=(2, 1))
        thinned(taller.weight, 0.6, 1)
        sizes = [(9, 14), (14, 9), (9, 14), (14, 9), (10, 13), (9, 14), (17, 7)]
        for turn, (height, width) in enumerate(sizes * 2):
            with threading(1 + turn % 3):
                spoiled = torch.full((3, 5, height, width), float("nan"), requires_grad=True)
                y = SparseConv2d.from_dense(dense)(spoiled)
                y.backward(torch.full_like(y, float("inf")))
                agree(dense if turn % 2 else taller, torch.randn(3, 5, height, width), "random", isa)
                agree(dense, torch.randn(3, 5, height, width), "random", isa)
        SparseConv2d.from_dense(dense)(torch.randn(1, 5, 70, 90))
        wide = nn.Conv2d(5, 4, 9, stride=stride, padding=4)  # what stands behind the last plane counts
        agree(wide, torch.randn(2, 5, 20, 90), "random", isa)

    @pytest.mark.parametrize("taps", [(), (0,), (4,), (1, 3), (0, 2, 6, 8)])
    def test_phases_that_no_weight_reads(self, isa, taps):
        """Of a stride of two a tap reads one pixel of four; the others have no gradient, and those alone none."""
        dense = nn.Conv2d(40, 6, 3, stride=2, padding=1)
        with torch.no_grad():
            dense.weight.flatten(2)[..., [t for t in range(9) if t not in taps]] = 0
            dense.weight[:, 20:] = 0  # whole groups of channels
        for height, width in ((9, 12), (40, 35), (1, 1), (1, 2)):
            agree(dense, torch.randn(3, 40, height, width), "random", isa)

    def test_more_than_32767_values_in_a_channel(self, isa):
        dense = nn.Conv2d(4000, 2, 3, padding=1)
        agree(dense, torch.randn(2, 4000, 4, 5), "random", isa)


class threading:
    """torch's number of threads, for a while."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def layers() -> list[tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    linear, conv = nn.Linear(200, 170), nn.Conv2d(24, 40, 3, 2, 1)
    thinned(linear.weight, 0.8, 1)
    thinned(conv.weight, 0.8, 1)
    small = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    return [
        (SparseLinear.from_dense(linear), torch.randn(333, 200)),
        (SparseConv2d.from_dense(conv), torch.randn(13, 24, 19, 23)),
        (SparseConv2d.from_dense(small), torch.randn(1, 8, 30, 30)),
    ]


@pytest.mark.parametrize("which", range(3))
def test_the_same_bits_for_any_number_of_threads(isa, which):
    if isa == "torch":
        pytest.skip("what torch does itself is torch's to promise")
    layer, x = layers()[which]
    found = []
    for threads in (1, 2, 3, 4, 7, 1):
        with threading(threads):
            a = x.clone().requires_grad_()
            y = layer(a)
            found.append([y, *torch.autograd.grad(y.square().sum(), [a, *layer.parameters()])])
    for other in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(found[0], other, strict=True))


@pytest.mark.parametrize("which", range(3))
def test_wanted_gradients_alone(isa, which):
    """Each combination of gradients is computed by code of its own."""
    layer, x = layers()[which]
    y = layer(x)
    g = torch.randn_like(y)
    backward = torch.ops.fxopt.sparse_linear_backward if which == 0 else torch.ops.fxopt.sparse_conv2d_backward
    window = () if which == 0 else (layer.kernel_size, layer.stride, (1, 1, 1, 1), layer.dilation, layer.groups)
    whole = backward(g, x, layer.values, *layer.pattern, *window, [True, True, True])
    for bits in range(8):
        wanted = [bool(bits & 1), bool(bits & 2), bool(bits & 4)]
        for want, some, every in zip(
            wanted, backward(g, x, layer.values, *layer.pattern, *window, wanted), whole, strict=True
        ):
            if want:
                torch.testing.assert_close(some, every, rtol=1e-4, atol=1e-4)
            else:
                assert some.numel() == 0


def _double(layer: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    return copy.deepcopy(layer).double(), x.double()


def small_layers() -> list[tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    linear, conv = nn.Linear(5, 4), nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), 2)
    thinned(linear.weight, 0.5, 1)
    thinned(conv.weight, 0.5, 1)
    return [
        (SparseLinear.from_dense(linear), torch.randn(3, 2, 5)),
        (SparseConv2d.from_dense(conv), torch.randn(2, 4, 5, 6)),
    ]


def arguments(layer: nn.Module, x: Tensor) -> tuple[object, ...]:
    if isinstance(layer, SparseLinear):
        return (x, layer.values, layer.bias, *layer.pattern)
    padding = (layer.padding[0], layer.padding[0], layer.padding[1], layer.padding[1])
    window = (layer.kernel_size, layer.stride, padding, layer.dilation, layer.groups)
    return (x, layer.values, layer.bias, *layer.pattern, *window)


@pytest.mark.parametrize("make", [nn.Linear(8, 6, False), nn.Conv2d(8, 6, 1, bias=False)])
@pytest.mark.parametrize(
    "change, told",
    [
        (lambda start: start[:3].clone(), "do not end at its"),
        (lambda start: torch.stack([start, start], 1), "2-d; expected contiguous int32"),
        (lambda start: start[0], "0-d; expected contiguous int32"),
        (lambda start: start[:0].clone(), "without a first row"),
    ],
)
def test_rows_that_are_not_of_the_values_are_refused(isa, make, change, told):
    """Without a bias nothing else tells how many rows there are; the backward would read beyond what it packed."""
    sparse = (SparseLinear if isinstance(make, nn.Linear) else SparseConv2d).from_dense(make)
    sparse._buffers["row_start"] = change(sparse.row_start)
    x = torch.randn(2, 8) if isinstance(make, nn.Linear) else torch.randn(2, 8, 3, 3)
    with pytest.raises(UsageError, match=told):
        sparse(x)


@pytest.mark.parametrize("which", range(2))
def test_gradcheck(which):
    layer, x = _double(*small_layers()[which])
    given = arguments(layer, x.requires_grad_())
    tensors = [t for t in given if isinstance(t, Tensor) and t.requires_grad]

    def run(*changed: Tensor) -> Tensor:
        left = iter(changed)
        inputs = [next(left) if isinstance(t, Tensor) and t.requires_grad else t for t in given]
        return (linear_op if which == 0 else conv_op)(*inputs)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("which", range(2))
def test_opcheck(isa, which):
    layer, x = small_layers()[which]
    operator = (linear_op, conv_op)[which]
    torch.library.opcheck(operator, arguments(layer, x.requires_grad_()))
    backward = (torch.ops.fxopt.sparse_linear_backward, torch.ops.fxopt.sparse_conv2d_backward)[which].default
    gradient = torch.randn_like(layer(x))
    given = arguments(layer, x)
    inputs = (gradient, given[0], given[1], *given[3:])
    torch.library.opcheck(backward, (*inputs, [True, True, True]))
    torch.library.opcheck(backward, (*inputs, [False, True, False]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        conv, linear = nn.Conv2d(3, 8, 3, padding="same"), nn.Linear(8, 5)
        thinned(conv.weight, 0.5, 0)
        thinned(linear.weight, 0.5, 0)
        self.conv, self.linear = SparseConv2d.from_dense(conv), SparseLinear.from_dense(linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.conv(x)).mean((2, 3)))


def test_export_and_trace_have_one_node_each():
    net, x, other = Net().eval(), torch.randn(4, 3, 8, 9), torch.randn(7, 3, 8, 9)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
    names = [str(n.target) for n in program.graph.nodes if "fxopt" in str(n.target)]
    assert names == ["fxopt.sparse_conv2d.default", "fxopt.sparse_linear.default"]
    assert torch.equal(program.module()(other), net(other))
    assert torch.equal(torch.fx.symbolic_trace(net)(other), net(other))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_trains_alike(backend):
    net, x = Net(), torch.randn(4, 3, 8, 9)
    compiled = torch.compile(copy.deepcopy(net), backend=backend, fullgraph=True)
    for batch in (x, torch.randn(6, 3, 8, 9)):
        y, z = net(batch), compiled(batch)
        torch.testing.assert_close(z, y)
        expected = torch.autograd.grad(y.sum(), list(net.parameters()))
        torch.testing.assert_close(torch.autograd.grad(z.sum(), list(compiled.parameters())), expected)


def test_autocast_computes_in_float32():
    net, x = Net(), torch.randn(2, 3, 8, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y = net.conv(x.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, net.conv(x.bfloat16().float()))


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (lambda n: n.linear(torch.randn(2, 7)), r"shape \(2, 7\); expected \(\.\.\., 8\)"),
        (
            lambda n: n.linear(torch.randn(2, 8).bfloat16()),
            "torch.bfloat16 and values of torch.float32; expected float32",
        ),
        (lambda n: n.linear(torch.randn(2, 8).double()), "cast one of them"),
        (lambda n: n.conv(torch.randn(2, 4, 8, 8)), r"expected \(batch, 3, height, width\)"),
        (lambda n: n.conv(torch.randn(3, 8)), r"expected \(batch, 3, height, width\)"),
        (
            lambda n: conv_op(torch.randn(1, 3, 1, 1), *arguments(n.conv_, None)[1:]),
            "does not fit a padded input of 1×1",
        ),
        (lambda n: linear_op(torch.randn(2, 8), n.linear.values[1:], None, *n.linear.pattern), "as in the pattern"),
    ],
)
def test_wrong_input_is_one_line(run, told):
    net = Net()
    net.conv_ = SparseConv2d(torch.randn(4, 3, 3, 3))
    with pytest.raises(UsageError, match=told) as error:
        run(net)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("name", ["row_start", "column", "column_start", "row", "place"])
@pytest.mark.parametrize("which", range(2))
def test_a_pattern_that_is_not_int32_is_refused(isa, which, name, differentiated):
    """The C functions would take it for other numbers."""
    for change, told in (
        (lambda t: t.long(), "a pattern of torch.int64"),
        (lambda t: t.float(), "a pattern of torch.float32"),
        (lambda t: torch.stack([t, t], 1)[:, 0], "with gaps; expected contiguous int32"),
        (lambda t: t.to("meta"), "a pattern of torch.int32 on meta; expected contiguous int32 on cpu"),
    ):
        layer, x = small_layers()[which]
        layer.register_buffer(name, change(getattr(layer, name)))
        with torch.set_grad_enabled(differentiated), pytest.raises(UsageError, match=told) as error:
            layer(x)
        assert "\n" not in str(error.value)


def test_type_casts_the_pattern_which_is_then_refused():
    layer, x = small_layers()[0]
    with pytest.raises(UsageError, match=r"a pattern of torch\.float32"):
        layer.type(torch.float32)(x)


@pytest.mark.parametrize("which", range(2))
def test_tensors_that_do_not_go_together_are_refused(isa, which):
    """Forward and backward, before C reads beyond their ends."""
    layer, x = small_layers()[which]
    forward = (linear_op, conv_op)[which]
    backward = (torch.ops.fxopt.sparse_linear_backward, torch.ops.fxopt.sparse_conv2d_backward)[which].default
    given = arguments(layer, x)
    gradient, everything = torch.randn_like(layer(x)), [True, True, True]
    values, bias = given[1].detach(), given[2].detach()
    for changed, told in (
        (values[:-1], "as in the pattern"),
        (torch.cat([values, values]), "as in the pattern"),
        (values.double(), "expected float32 for all"),
    ):
        with pytest.raises(UsageError, match=told):
            forward(x, changed, *given[2:])
        with pytest.raises(UsageError, match=told):
            backward(gradient, x, changed, *given[3:], everything)
    for changed, told in (
        (bias[:-1], "a bias of shape"),
        (bias.double(), "a bias of torch.float64"),
        (bias[None], "bias"),
    ):
        with pytest.raises(UsageError, match=told):
            forward(x, values, changed, *given[3:])
    with pytest.raises(UsageError, match="on cpu and meta; expected one device"):
        forward(x, values, bias.to("meta"), *given[3:])
    for wrong in (gradient[:1], gradient[..., :-1]):
        with pytest.raises((UsageError, RuntimeError), match=r"a gradient of|is invalid for input of size"):
            backward(wrong, x, values, *given[3:], everything)


@pytest.mark.parametrize("which", range(2))
@pytest.mark.parametrize("change", ["keep", "load", "load the same size"])
def test_a_backward_through_a_pattern_that_is_gone_is_refused(isa, which, change):
    layer, x = small_layers()[which]
    for trained in (layer.values, layer.bias, x):
        one = copy.deepcopy(layer)
        if trained is not x:
            one.values.requires_grad_(trained is layer.values)
            one.bias.requires_grad_(trained is layer.bias)
        held = one(x.clone().requires_grad_(trained is x)).sum()
        if change == "keep":
            one.keep(torch.arange(one.values.numel()) % 2 == 0)
        else:
            other = copy.deepcopy(one)
            if change == "load":
                other.keep(torch.arange(one.values.numel()) % 3 == 0)
            one.load_state_dict(other.state_dict())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            held.backward()
        one(x).sum().backward()  # what is computed now is right
        assert all(p.grad is None or p.grad.shape == p.shape for p in one.parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("padding", (-1, 0, 0, 0)),
        ("padding", (0, 0, 0, -2)),
        ("stride", (0, 1)),
        ("dilation", (1, 0)),
        ("kernel_size", (0, 3)),
        ("kernel_size", (3,)),
        ("groups", 0),
        ("groups", 3),
    ],
)
def test_options_that_no_convolution_has_are_refused(isa, name, value):
    layer = SparseConv2d(torch.randn(4, 4, 3, 3))
    options = {
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "padding": (0,) * 4,
        "dilation": (1, 1),
        "groups": 1,
        name: value,
    }
    for x in (torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8, device="meta")):
        tensors = [t.to(x.device) for t in (layer.values.detach(), *layer.pattern)]
        with pytest.raises(UsageError, match=r"was asked for; expected two of each|expected 3 groups of them") as error:
            conv_op(x, tensors[0], None, *tensors[1:], *options.values())
        assert "\n" not in str(error.value)
    g, tensors = torch.randn(2, 4, 7, 6), (layer.values.detach(), *layer.pattern)
    with pytest.raises(UsageError, match=r"was asked for; expected two of each|expected 3 groups of them"):
        torch.ops.fxopt.sparse_conv2d_backward(g, torch.randn(2, 4, 9, 8), *tensors, *options.values(), [True] * 3)


def test_no_library_computes_the_same():
    """Without a compiler at installation, in a process of its own."""
    code = """
import torch
from fxopt.kernels import native
from fxopt.kernels.unstructured_conv import SparseConv2d
assert native.library() is None
conv = torch.nn.Conv2d(3, 4, 3)
torch.testing.assert_close(SparseConv2d.from_dense(conv)(torch.ones(1, 3, 5, 5)), conv(torch.ones(1, 3, 5, 5)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "FXOPT_NATIVE": "0"})


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called by its numbers on Linux")
@pytest.mark.parametrize("isa", [way for way in WAYS if why_not(way) is None and way in native.ISAS])
def test_nothing_is_read_beyond_the_input(isa):
    """The input ends where a page does that nobody may read."""
    program = """
import ctypes, mmap, sys
import torch
from torch import nn
from fxopt.sparse import BlockSparseLinear, SparseConv2d, SparseLinear

page = mmap.PAGESIZE
memory = mmap.mmap(-1, 17 * page)
begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin + 16 * page), page, 0) == 0

def ending(*shape):
    size = torch.Size(shape).numel()
    x = torch.frombuffer(memory, dtype=torch.float32, count=size, offset=16 * page - 4 * size).view(shape)
    assert x.data_ptr() + 4 * size == begin + 16 * page
    return x.copy_(torch.randn(shape))

def run(layer, *shape):
    x = ending(*shape)
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(y, layer(x.clone()))
    layer(x.requires_grad_()).sum().backward()

for shape in ((2, 1, 1, 1), (4, 1, 1, 1), (3, 1, 1, 3), (2, 1, 2, 2), (2, 1, 5, 5), (2, 3, 2, 2), (5, 2, 7, 1)):
    run(SparseConv2d.from_dense(nn.Conv2d(shape[1], 3, 1)), *shape)
    run(SparseConv2d.from_dense(nn.Conv2d(shape[1], 3, 2, padding=1)), *shape)
    run(SparseConv2d.from_dense(nn.Conv2d(shape[1], 3, 3, 2, padding=1)), *shape)
run(SparseConv2d.from_dense(nn.Conv2d(1, 6, 2)), 3, 1, 2, 3)
for tokens in (1, 7, 31, 33, 65):
    run(SparseLinear.from_dense(nn.Linear(13, 21)), tokens, 13)
    run(BlockSparseLinear.from_dense(nn.Linear(32, 48), 0.5, select="random", block_shape=(16, 16)), tokens, 32)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FXOPT_ISA": isa}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("which", range(2))
def test_what_was_freed_is_refused(isa, which):
    """An input or parameter whose storage is empty, as sharding leaves it."""
    if isa == "torch":
        pytest.skip("what torch does with such a tensor itself is not for this test")
    layer, x = small_layers()[which]
    whole = torch.cat([x, x])
    for freed in (x.clone(), whole[len(x) :]):
        freed.untyped_storage().resize_(0)
        with torch.no_grad(), pytest.raises(UsageError, match="whose storage has 0 bytes"):
            layer(freed)
    layer.values.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(UsageError, match="whose storage has 0 bytes"):
        layer(x)
