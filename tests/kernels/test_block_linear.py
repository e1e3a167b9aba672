"""The block-sparse product and its gradients, by every way there is to compute them, against dense float64."""

import io

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

from fxopt.kernels import block_linear as kernels
from fxopt.kernels import native
from fxopt.kernels.block_linear import block_gradient, block_linear, from_dense, to_dense, transposed_index
from tests.kernels.ways import WAYS, take

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Every instruction set that this CPU has, the library through ctypes, and plain torch."""
    take(request.param, monkeypatch)
    return request.param


class Weight:
    """A random block-sparse weight, and what it is as a dense one."""

    def __init__(self, out, inputs, block, density, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.grid = -(-out // block[0]), -(-inputs // block[1])
        mask = torch.rand(self.grid, generator=g) < density
        row, col = mask.nonzero(as_tuple=True)
        self.row, self.col, self.block, self.out, self.inputs = row, col.int(), block, out, inputs
        self.crow = torch.zeros(self.grid[0] + 1, dtype=torch.int32)
        self.crow[1:] = mask.sum(1).cumsum(0)
        self.where = (self.crow, self.col, transposed_index(self.crow, self.col, self.grid[1]))
        self.data = from_dense(torch.randn(out, inputs, generator=g), row, self.col, block).to(dtype).clone()
        self.kept = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:out, :inputs]

    def dense(self, data=None):
        whole = to_dense(self.data if data is None else data, self.row, self.col, self.grid)
        return whole[: self.out, : self.inputs].double()


def close(found, wanted, tolerance):
    scale = wanted.abs().max() if wanted.numel() else 1.0
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * float(max(scale, 1.0)))


def check(weight, tokens, dtype, bias, seed=0):
    """Value and all three gradients."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*tokens, weight.inputs, generator=g).to(dtype).requires_grad_()
    b = torch.randn(weight.out, generator=g).to(dtype).requires_grad_() if bias else None
    data = weight.data.clone().requires_grad_()
    y = block_linear(x, data, b, *weight.where, weight.out)
    assert y.dtype == dtype and y.shape == (*tokens, weight.out) and y.is_contiguous()
    xr, wr = x.detach().double().requires_grad_(), weight.dense().requires_grad_()
    br = None if b is None else b.detach().double().requires_grad_()
    wanted = F.linear(xr, wr, br)
    gy = torch.randn(y.shape, generator=g).to(dtype)
    y.backward(gy)
    wanted.backward(gy.double())
    close(y, wanted.detach(), TOLERANCE[dtype])
    close(x.grad, xr.grad, TOLERANCE[dtype])
    close(data.grad, from_dense(wr.grad, weight.row, weight.col, weight.block), TOLERANCE[dtype])
    if b is not None:
        close(b.grad, br.grad, TOLERANCE[dtype])


@hypothesis.settings(max_examples=40, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    out=st.integers(1, 150),
    inputs=st.integers(1, 150),
    block=st.tuples(st.sampled_from((16, 32, 48, 64)), st.sampled_from((16, 32, 48, 128))),
    density=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    tokens=st.sampled_from(((), (1,), (7,), (15,), (3, 11), (2, 0), (300,))),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_is_the_dense_product(way, out, inputs, block, density, tokens, dtype, bias, seed):
    check(Weight(out, inputs, block, density, dtype, seed), tokens, dtype, bias, seed)


@pytest.mark.parametrize("block", ((1, 1), (8, 4), (5, 7), (16, 24), (200, 300)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_blocks_of_any_shape(block, dtype):
    check(Weight(50, 40, block, 0.4, dtype), (9,), dtype, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("block", ((16, 16), (32, 64), (128, 128), (48, 16)))
def test_on_a_gpu(dtype, block):
    weight = Weight(300, 200, block, 0.4, dtype)
    x, where = torch.randn(70, 200).to(dtype), [t.cuda() for t in weight.where]
    y = block_linear(x.cuda(), weight.data.cuda(), None, *where, 300)
    close(y.cpu(), x.double() @ weight.dense().t(), TOLERANCE[dtype])
    g = torch.randn(70, 300).to(dtype)
    d = block_gradient(g.cuda(), x.cuda(), weight.data.cuda(), *where)
    wanted = from_dense(g.double().t() @ x.double(), weight.row, weight.col, block)
    close(d.cpu(), wanted * (from_dense(weight.kept.double(), weight.row, weight.col, block)), TOLERANCE[dtype])


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("transposed", (False, True))
def test_native_results_are_the_same_for_any_batch_and_threads(isa, transposed, monkeypatch):
    if native.library() is None:
        pytest.skip(native.why_not())
    if native.ISAS.index(isa) > native.library().fxopt_best_isa():
        pytest.skip(f"this CPU has no {isa}")
    weight = Weight(160, 5000, (32, 32), 0.6)  # more blocks in a row than are multiplied at once
    features = 5000 if transposed else 160
    x = torch.randn(301, 160 if transposed else 5000)
    found = {}
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "call_context", lambda threads=threads: (native.ISAS.index(isa), threads))
        found[threads] = block_linear(x, weight.data, None, *weight.where, features, transposed)
        for begin, count in ((0, 1), (300, 1), (3, 2), (17, 14), (40, 64), (100, 128)):
            part = block_linear(x[begin : begin + count], weight.data, None, *weight.where, features, transposed)
            assert torch.equal(part, found[threads][begin : begin + count]), (threads, begin, count)
    assert torch.equal(found[1], found[2]) and torch.equal(found[1], found[5])


needs_pairs = pytest.mark.skipif(
    not native.multiplies_bfloat16(),
    reason="no kernels that multiply bfloat16 as it is: no such CPU, compiler or library",
)


@needs_pairs
@pytest.mark.parametrize("tokens", (1, 2, 13, 14, 29, 513, 600))
@pytest.mark.parametrize("block", ((32, 32), (64, 96)))
def test_bfloat16_is_multiplied_exactly_and_summed_in_float32(tokens, block):
    weight = Weight(150, 5000 if tokens == 13 else 170, block, 0.6, torch.bfloat16)
    assert kernels.in_bfloat16(weight.data)
    x, b, g = (torch.randn(*s).bfloat16() for s in ((tokens, weight.inputs), (150,), (tokens, 150)))
    bound = 2**-8  # of one rounding to bfloat16, and what float32 sums lose

    def rounded_once(found, wanted):
        assert found.dtype is torch.bfloat16
        assert ((found.double() - wanted).abs() <= bound * wanted.abs() + 2e-5 * wanted.abs().max()).all()

    rounded_once(block_linear(x, weight.data, b, *weight.where, 150), F.linear(x.double(), weight.dense(), b.double()))
    dx = block_linear(g, weight.data, None, *weight.where, weight.inputs, True)
    rounded_once(dx, g.double() @ weight.dense())
    dw = from_dense(g.double().t() @ x.double(), weight.row, weight.col, block)
    rounded_once(block_gradient(g, x, weight.data, *weight.where), dw)


@needs_pairs
@pytest.mark.parametrize("transposed", (False, True))
def test_bfloat16_is_the_same_for_any_batch_and_threads(transposed, monkeypatch):
    weight, isa = Weight(160, 5000, (32, 32), 0.6, torch.bfloat16), native.call_context()[0]
    features = 5000 if transposed else 160
    x = torch.randn(301, 160 if transposed else 5000).bfloat16()
    whole = block_linear(x, weight.data, None, *weight.where, features, transposed)
    for threads in (1, 5):
        monkeypatch.setattr(native, "call_context", lambda threads=threads: (isa, threads))
        for begin, count in ((0, 301), (0, 1), (300, 1), (17, 14), (100, 128)):
            part = block_linear(x[begin : begin + count], weight.data, None, *weight.where, features, transposed)
            assert torch.equal(part, whole[begin : begin + count]), (threads, begin, count)


@needs_pairs
def test_an_instruction_set_without_it_makes_float32_of_bfloat16(way):
    weight, x = Weight(64, 96, (32, 32), 0.6, torch.bfloat16), torch.randn(5, 96).bfloat16()
    assert kernels.in_bfloat16(weight.data) == (way not in ("portable", "avx2"))
    close(block_linear(x, weight.data, None, *weight.where, 64), x.double() @ weight.dense().t(), 2**-7)


def test_native_gradients_are_the_same_for_any_threads(monkeypatch):
    if native.library() is None:
        pytest.skip(native.why_not())
    weight, isa = Weight(160, 200, (32, 16), 0.6), native.call_context()[0]
    g, x = torch.randn(700, 160), torch.randn(700, 200)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "call_context", lambda threads=threads: (isa, threads))
        found.append(block_gradient(g, x, weight.data, *weight.where))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_opcheck(way):
    weight = Weight(100, 70, (32, 16), 0.4)
    x, b = torch.randn(2, 5, 70, requires_grad=True), torch.randn(100, requires_grad=True)
    data = weight.data.requires_grad_()
    for bias, transposed in ((b, False), (None, False), (None, True)):
        given = torch.randn(2, 5, 100, requires_grad=True) if transposed else x
        features = 70 if transposed else 100
        torch.library.opcheck(
            torch.ops.fxopt.block_linear.default, (given, data, bias, *weight.where, features, transposed)
        )
    g = torch.randn(2, 5, 100, requires_grad=True)
    torch.library.opcheck(torch.ops.fxopt.block_gradient.default, (g, x, data.detach(), *weight.where))


def test_it_can_be_differentiated_twice():
    weight = Weight(10, 7, (4, 4), 0.4, torch.float64)
    x, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (10,)))
    data = weight.data.requires_grad_()

    def product(x, data, b):
        return block_linear(x, data, b, *weight.where, 10)

    assert torch.autograd.gradcheck(product, (x, data, b))
    assert torch.autograd.gradgradcheck(product, (x, data, b))


def test_only_the_gradients_that_are_asked_for():
    weight = Weight(64, 64, (32, 32), 0.5)
    x = torch.randn(4, 64, requires_grad=True)
    block_linear(x, weight.data, None, *weight.where, 64).sum().backward()
    assert x.grad is not None and weight.data.grad is None


def test_autocast_casts_as_for_a_linear_layer():
    weight = Weight(64, 64, (32, 32), 0.5)
    x, data = torch.randn(4, 64), weight.data.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = block_linear(x.bfloat16(), data, torch.zeros(64), *weight.where, 64)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert data.grad.dtype == torch.float32


class Module(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.data, self.out = torch.nn.Parameter(weight.data), weight.out
        self.crow, self.col, self.index = (torch.nn.Buffer(t) for t in weight.where)

    def forward(self, x):
        return torch.ops.fxopt.block_linear(x, self.data, None, self.crow, self.col, self.index, self.out)


def test_it_is_one_node_and_reloads():
    module, any_ = Module(Weight(100, 70, (32, 16), 0.4)), torch.export.Dim.DYNAMIC
    program = torch.export.export(module, (torch.randn(2, 5, 70),), dynamic_shapes={"x": {0: any_, 1: any_}})
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [torch.ops.fxopt.block_linear.default]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again, x = torch.export.load(file).module(), torch.randn(3, 9, 70)
    assert torch.equal(again(x), module(x))
    traced = torch.fx.symbolic_trace(module)
    assert sum(n.op == "call_function" for n in traced.graph.nodes) == 1
    assert torch.equal(traced(x), module(x))


@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiled_it_is_the_same(backend):
    module, x = Module(Weight(100, 70, (32, 16), 0.4)), torch.randn(3, 9, 70)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    y = compiled(x)
    y.sum().backward()
    gradient, module.data.grad = module.data.grad, None
    module(x).sum().backward()
    assert torch.equal(y, module(x)) and torch.equal(gradient, module.data.grad)


@pytest.mark.parametrize(
    ("x", "data", "features", "message"),
    (
        (torch.randn(3, 71), None, 100, "has 71 features, expected 65 to 70"),
        (torch.randn(3, 70), None, 140, "140 features were asked for"),
        (torch.randn(3, 70, dtype=torch.float64), None, 100, "give the same type"),
    ),
)
def test_what_does_not_fit_is_refused(x, data, features, message):
    weight = Weight(100, 70, (32, 35), 0.4)
    if "71" in message:
        message = "has 71 features, expected 36 to 70"
    with pytest.raises(ValueError, match=message):
        block_linear(x, weight.data, None, *weight.where, features)


WRONG = (
    ("crow", lambda t: t.long(), "crow is 1-d torch.int64 on cpu, expected 1-d contiguous torch.int32 on cpu"),
    ("col", lambda t: t.long(), "col is 1-d torch.int64"),
    ("index", lambda t: t.float(), "index is 1-d torch.float32"),
    ("crow", lambda t: t.repeat_interleave(2)[::2], "crow is 1-d torch.int32 on cpu, not contiguous"),
    ("col", lambda t: t.repeat_interleave(2)[::2], "col is .* not contiguous"),
    ("index", lambda t: t.repeat_interleave(2)[::2], "index is .* not contiguous"),
    ("index", lambda t: t.to("meta"), "index is 1-d torch.int32 on meta"),
    ("col", lambda t: t[:, None], "col is 2-d"),
    ("col", lambda t: t[:-1], "col 7, index 29, expected rows \\+ 1, 8 and 24 \\+ columns \\+ 1 for 8 blocks"),
    ("index", lambda t: t[:20], "index 20, expected rows"),
    ("crow", lambda t: t[:0], "crow has 0 numbers"),
    ("data", lambda t: t[0], r"the blocks are \(32, 16\), expected three dimensions"),
    ("bias", lambda t: t[:5], r"the bias is \(5,\), expected \(64,\)"),
    ("bias", lambda t: t.to("meta"), "the input is on cpu, the bias on meta, the blocks are on cpu"),
    ("x", lambda t: t[0, 0], "the input has no dimension"),
    ("x", lambda t: t.to("meta"), "the input is on meta, the bias on cpu, the blocks"),
)


@pytest.mark.parametrize(("name", "change", "message"), WRONG)
@pytest.mark.parametrize("recorded", (False, True))
def test_what_the_kernels_would_read_as_something_else_is_refused(name, change, message, recorded):
    weight = Weight(64, 64, (32, 16), 1.0)
    given = dict(zip(("crow", "col", "index"), weight.where, strict=True))
    given |= {"x": torch.randn(3, 64), "data": weight.data.requires_grad_(recorded), "bias": torch.randn(64)}
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=message) as caught:
        block_linear(*(given[n] for n in ("x", "data", "bias", "crow", "col", "index")), 64)
    assert "\n" not in str(caught.value)
    if name not in ("bias", "data"):
        with pytest.raises(ValueError):
            block_gradient(torch.randn(3, 64), *(given[n] for n in ("x", "data", "crow", "col", "index")))


def test_fake_tensors_are_refused_alike():
    weight = Weight(64, 64, (32, 16), 1.0)
    with pytest.raises(ValueError, match="has 80 features"):
        block_linear(torch.empty(3, 80, device="meta"), *meta(weight.data, None, *weight.where), 64)
    with pytest.raises(ValueError, match=r"col is 1-d torch\.int64"):
        crow, col, index = weight.where
        block_linear(torch.empty(3, 64, device="meta"), *meta(weight.data, None, crow, col.long(), index), 64)


def meta(*tensors):
    return [t if t is None else t.to("meta") for t in tensors]


@pytest.mark.parametrize(("out", "inputs"), ((5, 0), (0, 5), (0, 0)))
@pytest.mark.parametrize("tokens", ((), (3,), (2, 3)))
def test_weights_without_features(out, inputs, tokens):
    check(Weight(out, inputs, (32, 16), 1.0), tokens, torch.float32, True)


def test_an_instruction_set_is_asked_for_by_name(monkeypatch):
    if native.library() is None:
        pytest.skip(native.why_not())
    monkeypatch.setenv("FXOPT_ISA", "avx1024")
    native.isa.cache_clear()
    try:
        with pytest.raises(ValueError, match="FXOPT_ISA='avx1024' was given; this CPU has portable"):
            native.isa()
        monkeypatch.setenv("FXOPT_ISA", "portable")
        assert native.isa() == "portable"
    finally:
        monkeypatch.undo()
        native.isa.cache_clear()
