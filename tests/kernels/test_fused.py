"""Every fused operator: registered whole, equal to its reference, and one node to whatever records it."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fxopt.kernels
from fxopt.errors import UsageError
from fxopt.kernels import linear

OPS = torch.ops.fxopt
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass(frozen=True)
class Sample:
    """One call: the operator's name, and its arguments, with a `T` for each tensor."""

    name: str
    label: str
    arguments: tuple[Any, ...]

    def draw(self, dtype=torch.float32, device="cpu", seed=0) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(a.draw(generator, dtype, device) if isinstance(a, T) else a for a in self.arguments)


@dataclass(frozen=True)
class T:
    """A tensor to be drawn: its shape, and how it lies in memory."""

    shape: tuple[int, ...]
    layout: str = "contiguous"

    def draw(self, generator, dtype, device):
        shape = self.shape[::-1] if self.layout == "transposed" else self.shape
        tensor = torch.randn(shape, generator=generator).to(device, dtype)
        if self.layout == "transposed":
            return tensor.permute(*reversed(range(tensor.dim())))
        if self.layout == "channels_last":
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor


def t(*shape: int, layout: str = "contiguous") -> T:
    return T(shape, layout)


def sample(name: str, label: str, *arguments: Any):
    return pytest.param(Sample(name, label, arguments), id=f"{name}-{label}")


SAMPLES = [
    sample("linear_gelu", "erf", t(3, 5), t(4, 5), t(4)),
    sample("linear_gelu", "tanh", t(2, 3, 5), t(4, 5), t(4), "tanh"),
    sample("linear_gelu", "no_bias", t(2, 5), t(4, 5)),
    sample("linear_gelu", "vector", t(5), t(4, 5), t(4)),
    sample("linear_gelu", "transposed", t(3, 5, layout="transposed"), t(4, 5, layout="transposed"), t(4)),
    sample("linear_gelu", "no_rows", t(0, 5), t(4, 5), t(4)),
    sample("linear_relu", "bias", t(3, 5), t(4, 5), t(4)),
    sample("linear_relu", "no_bias", t(2, 3, 5), t(4, 5)),
    sample("conv_relu", "1d", t(2, 4, 9), t(6, 4, 3), t(6), [2], [1], [1], 1),
    sample("conv_relu", "2d", t(2, 4, 9, 8), t(6, 4, 3, 3), t(6), [1, 2], [1, 0], [1, 2], 1),
    sample("conv_relu", "groups", t(2, 4, 9, 8), t(6, 2, 3, 3), None, [1, 1], [1, 1], [1, 1], 2),
    sample(
        "conv_relu",
        "channels_last",
        t(2, 4, 9, 8, layout="channels_last"),
        t(6, 4, 3, 3),
        t(6),
        [1, 1],
        [1, 1],
        [1, 1],
        1,
    ),
    sample("conv_relu", "no_batch", t(4, 9, 8), t(6, 4, 3, 3), t(6), [1, 1], [1, 1], [1, 1], 1),
    sample("conv_relu", "3d", t(1, 2, 5, 5, 5), t(3, 2, 3, 3, 3), t(3), [1, 1, 1], [1, 1, 1], [1, 1, 1], 1),
    sample(
        "layer_norm_linear_layer_norm", "all", t(2, 3, 5), [5], t(5), t(5), 1e-5, t(4, 5), t(4), [4], t(4), t(4), 1e-6
    ),
    sample(
        "layer_norm_linear_layer_norm", "bare", t(3, 5), [5], None, None, 1e-5, t(4, 5), None, [4], None, None, 1e-6
    ),
    sample(
        "layer_norm_linear_layer_norm",
        "two_axes",
        t(2, 3, 5),
        [3, 5],
        t(3, 5),
        None,
        1e-5,
        t(4, 5),
        None,
        [3, 4],
        None,
        t(3, 4),
        1e-6,
    ),
    sample("add_layer_norm", "all", t(2, 3, 5), t(2, 3, 5), [5], t(5), t(5), 1e-12),
    sample("add_layer_norm", "broadcast", t(2, 3, 5), t(3, 5), [5]),
    sample("add_layer_norm_sum", "all", t(2, 3, 5), t(2, 3, 5), [5], t(5), t(5), 1e-12),
    sample("add_layer_norm_sum", "two_axes", t(2, 3, 5), t(2, 3, 5), [3, 5]),
    sample("rms_norm", "weight", t(2, 3, 5), t(5)),
    sample("rms_norm", "bare", t(3, 5), None, 1e-5),
    sample("rms_norm", "torch_order", t(2, 3, 5), t(5), 1e-5, False),
    sample("rms_norm", "transposed", t(4, 3, 5, layout="transposed"), t(5)),
    sample("rms_norm", "wide_weight", t(3, 5), t(3, 5)),
    sample("swiglu", "same", t(2, 3, 5), t(2, 3, 5)),
    sample("swiglu", "broadcast", t(2, 3, 5), t(5)),
    sample("swiglu", "layouts", t(3, 5, layout="transposed"), t(3, 5)),
    sample("swiglu_packed", "contiguous", t(2, 3, 6)),
    sample("swiglu_packed", "transposed", t(3, 6, layout="transposed")),
]
each_sample = pytest.mark.parametrize("case", SAMPLES)
SAMPLE_OF = {p.values[0].name: p.values[0] for p in reversed(SAMPLES)}


def overload(case: Sample):
    return getattr(OPS, case.name).default


def reference(case: Sample):
    return getattr(fxopt.kernels, case.name)


def outputs(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def tensors_of(arguments) -> list[torch.Tensor]:
    return [a for a in arguments if isinstance(a, torch.Tensor)]


def require_grad(arguments):
    for tensor in tensors_of(arguments):
        tensor.requires_grad_()
    return arguments


def test_every_operator_is_sampled_and_judged():
    names = set(fxopt.kernels.__all__) - {"PAYS", "pays"}
    assert names == set(SAMPLE_OF) == set(fxopt.kernels.PAYS)


def test_pays_names_device_types_and_knows_its_operators():
    assert fxopt.kernels.pays("rms_norm", "cpu")
    assert not fxopt.kernels.pays("rms_norm", "no such device")
    with pytest.raises(KeyError):
        fxopt.kernels.pays("no_such_operator", "cpu")


@each_sample
@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "trainable"])
def test_opcheck(case, grad):
    arguments = case.draw()
    torch.library.opcheck(overload(case), require_grad(arguments) if grad else arguments)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", sorted(SAMPLE_OF))
def test_opcheck_halves(name, dtype):
    torch.library.opcheck(overload(SAMPLE_OF[name]), SAMPLE_OF[name].draw(dtype))


@each_sample
def test_gradients_in_float64(case):
    arguments = require_grad(case.draw(torch.float64))
    assert torch.autograd.gradcheck(overload(case), arguments, check_forward_ad=True)


@pytest.mark.parametrize("name", sorted(SAMPLE_OF))
def test_second_gradients_in_float64(name):
    arguments = require_grad(SAMPLE_OF[name].draw(torch.float64))
    assert torch.autograd.gradgradcheck(overload(SAMPLE_OF[name]), arguments)


@each_sample
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_against_the_reference(case, dtype, device, mode):
    """Same rounding, memory layout and dtype as the operators it stands for, with and without gradients."""
    arguments = case.draw(dtype, device)
    with mode():
        if mode is torch.enable_grad:
            require_grad(arguments)
        got, expected = outputs(overload(case)(*arguments)), outputs(reference(case)(*arguments))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert one.requires_grad == other.requires_grad


@each_sample
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(case, dtype, device):
    """The error is what rounding inputs to the dtype explains, not more."""
    arguments = case.draw(dtype, device)
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    for one, other in zip(outputs(overload(case)(*arguments)), outputs(overload(case)(*wide)), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@each_sample
def test_arguments_are_not_written_to_and_results_are_fresh(case):
    arguments = case.draw()
    before = copy.deepcopy(tensors_of(arguments))
    with torch.no_grad():
        results = outputs(overload(case)(*arguments))
    for result in results:
        result.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(arguments), before, strict=True))


class Layer(nn.Module):
    """Calls one operator on its input; the sample's other tensors are parameters."""

    def __init__(self, case: Sample):
        super().__init__()
        first, *rest = case.draw()
        self.name, self.example = case.name, first
        self.rest = [nn.Parameter(a) if isinstance(a, torch.Tensor) else a for a in rest]
        for index, a in enumerate(self.rest):
            if isinstance(a, nn.Parameter):
                self.register_parameter(f"p{index}", a)

    def forward(self, x):
        parameters = [getattr(self, f"p{i}") if isinstance(a, nn.Parameter) else a for i, a in enumerate(self.rest)]
        return getattr(torch.ops.fxopt, self.name).default(x, *parameters)


def calls(graph: torch.fx.Graph) -> list[str]:
    ours = [node for node in graph.nodes if node.op == "call_function" and "getitem" not in node.name]
    return [str(node.target) for node in ours if "_assert" not in str(node.target) and "_guards" not in node.name]


each_operator = pytest.mark.parametrize("name", sorted(SAMPLE_OF))


@each_operator
def test_one_node_to_symbolic_trace(name):
    layer = Layer(SAMPLE_OF[name])
    graph_module = torch.fx.symbolic_trace(layer)
    assert calls(graph_module.graph) == [f"fxopt.{name}.default"]
    assert all(map(torch.equal, outputs(graph_module(layer.example)), outputs(layer(layer.example))))


@each_operator
@pytest.mark.parametrize("strict", [False, True])
def test_one_node_to_export_with_dynamic_batch(name, strict):
    layer = Layer(SAMPLE_OF[name])
    program = torch.export.export(layer, (layer.example,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=strict)
    assert calls(program.graph) == [f"fxopt.{name}.default"]
    with torch.no_grad():
        assert calls(program.run_decompositions({}).graph) == [f"fxopt.{name}.default"]
    assert all(map(torch.equal, outputs(program.module()(layer.example)), outputs(layer(layer.example))))


def test_export_serves_a_new_batch_size():
    layer = Layer(SAMPLE_OF["linear_gelu"])
    program = torch.export.export(layer, (layer.example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(17, 5)
    assert torch.equal(program.module()(x), layer(x))


@each_operator
def test_one_node_to_a_compiler_and_to_make_fx(name):
    layer = Layer(SAMPLE_OF[name])
    seen = []

    def backend(graph_module, _):
        seen.append(calls(graph_module.graph))
        return graph_module

    expected = outputs(layer(layer.example))
    torch._dynamo.reset()
    got = outputs(torch.compile(layer, backend=backend, fullgraph=True)(layer.example))
    assert seen == [[f"fxopt.{name}.default"]]
    assert all(map(torch.equal, got, expected))
    with torch.no_grad():
        traced = make_fx(layer)(layer.example)
    assert calls(traced.graph) == [f"fxopt.{name}.default"]


@each_operator
def test_aot_sees_one_node_without_gradients(name):
    layer, seen = Layer(SAMPLE_OF[name]), []

    def compiler(graph_module, _):
        seen.append([c for c in calls(graph_module.graph) if c.startswith("fxopt")])
        return graph_module

    torch._dynamo.reset()
    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=compiler)
    with torch.no_grad():
        got = outputs(torch.compile(layer, backend=backend)(layer.example))
        assert all(map(torch.equal, got, outputs(layer(layer.example))))
    assert seen == [[f"fxopt.{name}.default"]]


@each_operator
def test_compiled_training_step(name):
    layer = Layer(SAMPLE_OF[name])
    other = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager")
    inputs = [layer.example.clone().requires_grad_() for _ in range(2)]
    for model, x in zip((layer, compiled), inputs, strict=True):
        sum((y * y).sum() for y in outputs(model(x))).backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for one, same in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(same.grad, one.grad)


@each_operator
def test_autocast_is_the_references(name):
    arguments = SAMPLE_OF[name].draw()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.autocast("cpu", torch.bfloat16):
            got = outputs(overload(SAMPLE_OF[name])(*arguments))
            expected = outputs(reference(SAMPLE_OF[name])(*arguments))
        assert [y.dtype for y in got] == [y.dtype for y in expected]
        assert all(map(torch.equal, got, expected))


@each_operator
def test_functional_gradients(name):
    first, *rest = SAMPLE_OF[name].draw(torch.float64)

    def total(function):
        return lambda x: sum((y * y).sum() for y in outputs(function(x, *rest)))

    got = torch.func.grad(total(overload(SAMPLE_OF[name])))(first)
    torch.testing.assert_close(got, torch.func.grad(total(reference(SAMPLE_OF[name])))(first))


# ------------------------------------------------------------------------------------------------- what sets one apart
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("rows", [1, 2, 16, 17])
@pytest.mark.parametrize("biased", [True, False])
def test_few_rows_on_a_large_weight(approximate, rows, biased, monkeypatch):
    """The product is oneDNN's up to 16 rows: still within float32 of float64."""
    monkeypatch.setattr(linear, "LARGE_WEIGHT", 2**18)  # with AVX-512 it takes more rows and elements
    monkeypatch.setattr(linear, "LEAST_ROWS", 2)
    generator = torch.Generator().manual_seed(rows)
    x, w, b = (torch.randn(s, generator=generator) for s in ((rows, 512), (512, 512), (512,)))
    b = b if biased else None
    few = linear.LEAST_ROWS <= rows <= linear.FEW_ROWS
    assert linear._suits_onednn(x, w, b) == (few and linear._HAS_ONEDNN)
    exact = F.linear(x.double(), w.double(), None if b is None else b.double())
    gelu = OPS.linear_gelu(x, w, b, approximate)
    torch.testing.assert_close(gelu.double(), F.gelu(exact, approximate=approximate), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(OPS.linear_relu(x, w, b).double(), F.relu(exact), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "w", "b"),
    [
        (torch.zeros(2, 512), torch.zeros(512, 512).t(), None),
        (torch.zeros(0, 512), torch.zeros(512, 512), None),
        (torch.zeros(2, 512, dtype=torch.float64), torch.zeros(512, 512, dtype=torch.float64), None),
        (torch.zeros(2, 512), torch.zeros(512, 512), torch.zeros(1, 512)),
        (torch.zeros(2, 512), torch.zeros(511, 512), None),
        (torch.zeros(2, 511), torch.zeros(512, 512), None),
        (torch.zeros(()), torch.zeros(512, 512), None),
    ],
    ids=["transposed", "no rows", "float64", "2-d bias", "small weight", "wrong width", "scalar"],
)
def test_onednn_is_left_alone(x, w, b):
    assert not linear._suits_onednn(x, w, b)


def test_onednn_can_be_switched_off():
    x, w = torch.zeros(2, 512), torch.zeros(512, 512)
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns about TF32
    try:
        assert not linear._suits_onednn(x, w, None)
    finally:
        torch._C._set_mkldnn_enabled(enabled)


@pytest.mark.parametrize("rows", [1, 32])
def test_nan_survives(rows):
    x, w = torch.randn(rows, 512), torch.randn(512, 512)
    x[0] = float("nan")
    assert OPS.linear_relu(x, w)[0].isnan().all()
    assert OPS.linear_gelu(x, w)[0].isnan().all()
    image = torch.randn(1, 16, 40, 40)
    image[0, :, 5, 5] = float("nan")
    assert OPS.conv_relu(image, torch.randn(8, 16, 3, 3), None, [1, 1], [1, 1], [1, 1], 1)[0, :, 5, 5].isnan().all()


@pytest.mark.parametrize("dtype", (*DTYPES,), ids=str)
@pytest.mark.parametrize("weight_dtype", (*DTYPES,), ids=str)
def test_rms_norm_is_llamas_bit_for_bit(dtype, weight_dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(33, eps=1e-6)
    norm.weight.data = torch.randn(33).to(weight_dtype)
    x = torch.randn(4, 7, 33).to(dtype)
    with torch.no_grad():
        got, expected = OPS.rms_norm(x, norm.weight, 1e-6), norm(x)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_in_torchs_order(dtype):
    x, weight = torch.randn(4, 7, 33).to(dtype), torch.randn(33).to(dtype)
    assert torch.equal(OPS.rms_norm(x, weight, 1e-6, False), F.rms_norm(x, (33,), weight, 1e-6))


def test_the_two_orders_differ_in_half_precision():
    x, weight = torch.randn(64, 33).bfloat16(), torch.randn(33).bfloat16()
    assert not torch.equal(OPS.rms_norm(x, weight, 1e-6, False), OPS.rms_norm(x, weight, 1e-6, True))


def test_erf_and_tanh_differ():
    x, w = torch.randn(8, 5), torch.randn(4, 5)
    assert not torch.equal(OPS.linear_gelu(x, w), OPS.linear_gelu(x, w, None, "tanh"))
    with pytest.raises(RuntimeError, match="approximate"):
        OPS.linear_gelu(x, w, None, "sigmoid")


def test_swiglu_packed_refuses_what_has_no_halves():
    with pytest.raises(UsageError, match="last dimension of 5"):
        OPS.swiglu_packed(torch.randn(2, 5))


def test_swiglu_packed_is_swiglu_of_the_halves():
    gate, up = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(OPS.swiglu_packed(torch.cat([gate, up], -1)), OPS.swiglu(gate, up))


def test_sum_is_the_residual():
    x, r = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    normed, total = OPS.add_layer_norm_sum(x, r, [5])
    assert torch.equal(total, x + r)
    assert torch.equal(normed, OPS.add_layer_norm(x, r, [5]))


@each_operator
def test_dispatch_modes_see_the_operator(name):
    """Profilers and counters are told of one operator, not of what its kernel calls."""
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    arguments = SAMPLE_OF[name].draw()
    with Recorder():
        overload(SAMPLE_OF[name])(*arguments)
    assert seen == [f"fxopt.{name}.default"]


@pytest.mark.slow
@each_operator
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_inductor(name, mode):
    layer = Layer(SAMPLE_OF[name])
    torch._dynamo.reset()
    with mode():
        got = outputs(torch.compile(layer)(layer.example))
        for one, other in zip(got, outputs(layer(layer.example)), strict=True):
            torch.testing.assert_close(one, other)
