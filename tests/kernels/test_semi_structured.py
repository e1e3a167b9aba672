"""The 2:4 product: torch's own form of the weight, dense float64, gradients, and what is refused."""

import io

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from fxopt.kernels import semi_structured as kernels
from fxopt.kernels.semi_structured import accelerated, compress, semi_structured_linear, to_dense
from fxopt.sparse import n_m_mask

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HALF = (torch.float16, torch.bfloat16)


def sparse_weight(out, inputs, dtype=torch.float32, kept=2):
    weight = torch.randn(out, inputs, generator=torch.Generator().manual_seed(out + inputs)).to(dtype)
    return weight * n_m_mask(weight, kept, 4)


def compressed(weight):
    return compress(weight, n_m_mask(weight, 2, 4))


def close(found, wanted, dtype):
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(found.double().cpu(), wanted.cpu(), rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", ((32, 64), (96, 192), (64, 1024)))
def test_the_form_is_that_of_torch(shape, dtype):
    weight = sparse_weight(*shape, dtype)
    values, metadata = compressed(weight)
    torch_values, torch_meta = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(values, torch_values) and torch.equal(metadata, torch_meta)


@pytest.mark.parametrize("kept", (0, 1, 2))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_it_is_lossless_in_any_dtype(dtype, kept):
    weight = sparse_weight(64, 128, dtype, kept)
    values, metadata = compressed(weight)
    assert values.shape == (64, 64) and metadata.shape == (64, 8) and torch.equal(to_dense(values, metadata), weight)


def check(weight, tokens, dtype, bias, device="cpu"):
    """Value and all three gradients, against dense float64."""
    g = torch.Generator().manual_seed(0)
    values, metadata = (t.to(device) for t in compressed(weight))
    values.requires_grad_()
    out, inputs = weight.shape
    x = torch.randn(*tokens, inputs, generator=g).to(device, dtype).requires_grad_()
    b = torch.randn(out, generator=g).to(device, dtype).requires_grad_() if bias else None
    y = semi_structured_linear(x, values, b, metadata)
    assert y.dtype == dtype and y.shape == (*tokens, out) and y.is_contiguous()
    xr, wr = x.detach().double().requires_grad_(), weight.to(device).double().requires_grad_()
    br = None if b is None else b.detach().double().requires_grad_()
    wanted = F.linear(xr, wr, br)
    gy = torch.randn(y.shape, generator=g).to(device, dtype)
    y.backward(gy)
    wanted.backward(gy.double())
    close(y.detach(), wanted.detach(), dtype)
    close(x.grad, xr.grad, dtype)
    close(to_dense(values.grad, metadata), wr.grad * (to_dense(torch.ones_like(values), metadata) != 0), dtype)
    if b is not None:
        close(b.grad, br.grad, dtype)


@hypothesis.settings(max_examples=20, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    tokens=st.sampled_from(((), (1,), (7,), (3, 11), (2, 0))),
    dtype=st.sampled_from(tuple(TOLERANCE)),
    bias=st.booleans(),
)
def test_it_is_the_dense_product(rows, columns, tokens, dtype, bias):
    check(sparse_weight(32 * rows, 64 * columns, dtype), tokens, dtype, bias)


def test_opcheck():
    values, metadata = compressed(sparse_weight(32, 128))
    x, b = torch.randn(2, 5, 128, requires_grad=True), torch.randn(32, requires_grad=True)
    torch.library.opcheck(torch.ops.fxopt.semi_structured_linear.default, (x, values.requires_grad_(), b, metadata))


def test_it_can_be_differentiated_twice():
    values, metadata = compressed(sparse_weight(32, 64, torch.float64))
    x, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 64), (32,)))
    check = (x, values.requires_grad_(), b)
    assert torch.autograd.gradcheck(lambda x, v, b: semi_structured_linear(x, v, b, metadata), check, fast_mode=True)
    assert torch.autograd.gradgradcheck(
        lambda x, v, b: semi_structured_linear(x, v, b, metadata), check, fast_mode=True
    )


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        values, metadata = compressed(sparse_weight(32, 64))
        self.values, self.metadata = torch.nn.Parameter(values), torch.nn.Buffer(metadata)

    def forward(self, x):
        return torch.ops.fxopt.semi_structured_linear(x, self.values, None, self.metadata)


def test_it_is_one_node_and_reloads():
    module, any_ = Module(), torch.export.Dim.DYNAMIC
    program = torch.export.export(module, (torch.randn(2, 5, 64),), dynamic_shapes={"x": {0: any_, 1: any_}})
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [
        torch.ops.fxopt.semi_structured_linear.default
    ]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again, x = torch.export.load(file).module(), torch.randn(3, 9, 64)
    assert torch.equal(again(x), module(x))
    traced = torch.fx.symbolic_trace(module)
    assert sum(n.op == "call_function" for n in traced.graph.nodes) == 1 and torch.equal(traced(x), module(x))


def test_compiled_it_is_the_same():
    module, x = Module(), torch.randn(3, 9, 64)
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    gradient, module.values.grad = module.values.grad, None
    module(x).sum().backward()
    assert torch.equal(y, module(x)) and torch.equal(gradient, module.values.grad)


def test_autocast_casts_as_for_a_linear_layer():
    module = Module()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(torch.randn(4, 64))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and module.values.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"x": torch.randn(3, 65)}, r"the input is \(3, 65\), expected 64 features"),
        ({"x": torch.tensor(1.0)}, r"the input is \(\), expected 64 features"),
        ({"x": torch.randn(3, 64).double()}, "give the same type"),
        ({"bias": torch.randn(32).double()}, "give the same type"),
        ({"bias": torch.randn(31)}, r"the bias is \(31,\), expected \(32,\)"),
        (
            {"metadata": torch.zeros(32, 2, dtype=torch.int16)},
            r"metadata is \(32, 2\) of torch.int16, expected \(32, 4\)",
        ),
        ({"metadata": torch.zeros(32, 4, dtype=torch.int32)}, "metadata is .* of torch.int32"),
        ({"values": torch.randn(33, 32)}, r"the values are \(33, 32\), expected"),
        ({"values": torch.randn(32, 30)}, r"the values are \(32, 30\), expected"),
    ),
)
def test_what_does_not_fit_is_refused(change, message):
    values, metadata = compressed(sparse_weight(32, 64))
    given = {"x": torch.randn(3, 64), "values": values, "bias": None, "metadata": metadata} | change
    with pytest.raises(ValueError, match=message):
        semi_structured_linear(*given.values())


@pytest.mark.parametrize(("capability", "has"), (((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), False)))
def test_which_devices_torch_has_kernels_for(capability, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernels._has_kernels.__wrapped__(torch.device("cuda:0")) == has
    assert not accelerated(torch.randn(32, 64, dtype=torch.float16))  # which is on the CPU


def test_the_kernels_get_rows_of_eight_and_give_contiguous_results(monkeypatch):
    """The GPU's path with torch's operators replaced by what they compute."""
    seen = []

    def mm(values, metadata, x):
        seen.append((tuple(x.shape), x.stride(), x.data_ptr() % 16))
        return to_dense(values, metadata) @ x

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", mm)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", lambda b, v, m, x: b[:, None] + mm(v, m, x))
    weight, b = sparse_weight(32, 64), torch.randn(32)
    values, metadata = compressed(weight)
    for tokens in (1, 8, 11):
        odd = torch.randn(tokens * 64 + 1)[1:].view(tokens, 64)  # starts at no multiple of 16 bytes
        for x in (torch.randn(tokens, 64), torch.randn(tokens, 128)[:, ::2], odd):
            for bias in (None, b):
                y = kernels._product(x, values, bias, metadata)
                assert y.shape == (tokens, 32) and y.is_contiguous()
                torch.testing.assert_close(y, F.linear(x, weight, bias))
    assert {shape[1] % 8 for shape, *_ in seen} == {0} and {stride for _, stride, _ in seen} == {(1, 64)}
    assert {rest for *_, rest in seen} == {0}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (*HALF, torch.float32))
@pytest.mark.parametrize("tokens", ((1,), (8,), (3, 43), (0,)))
@pytest.mark.parametrize("bias", (True, False))
def test_on_a_gpu(dtype, tokens, bias):
    """On sparse tensor cores or, where this GPU has none that torch can use, densely."""
    check(sparse_weight(96, 256, dtype), tokens, dtype, bias, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
def test_sparse_tensor_cores_are_used_where_torch_has_kernels_for_them(dtype, monkeypatch):
    weight = sparse_weight(96, 256, dtype).cuda()
    values, metadata = compressed(weight)
    x = torch.randn(43, 256, dtype=dtype, device="cuda")
    wanted = F.linear(x.double(), weight.double())
    if not accelerated(weight):  # should this fail, torch has learned more than 8.x, and so should `accelerated`
        with pytest.raises(RuntimeError, match="compute capability"):
            torch._sparse_semi_structured_mm(values, metadata, x[:40].t())
        return
    monkeypatch.setattr(kernels, "to_dense", None)  # what decompresses would fail
    close(semi_structured_linear(x, values, None, metadata), wanted, dtype)
