import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fxopt.transformations.fuse_rms_norm import FuseRMSNorm
from tests.rewriting import rewrites, trace, unchanged
from tests.transformations.captures import applies
from tests.transformations.fusions import cases, refuses_odd_parameters, same_gradients
from tests.transformations.modules import fn

X = (torch.randn(2, 3, 8),)
H = (X[0].bfloat16(),)
EXACT = {"rtol": 0, "atol": 0}
AFTER = "%0 = fused_rms_norm(x, w)\nreturn %0"
ASSERTED = "_ = assert_tensor_metadata(x, dtype=torch.{}, device=device(type='cpu'), layout=torch.strided)\n"


def weight(dtype=torch.float32):
    return nn.Parameter(torch.randn(8, dtype=dtype))


def normed(x, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def llama(s, x):
    return s.w * normed(x.to(torch.float32)).to(x.dtype)


def gemma(s, x):
    return (normed(x.float()) * (1.0 + s.w.float())).type_as(x)


def after(text, dtype="float32"):
    asserted = ASSERTED.format(dtype) + text
    return {"module": text, "function": text, "aten": asserted}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_llama_computes_it(dtype):
    model = fn(llama, w=weight(dtype))
    text = after(AFTER, str(dtype).removeprefix("torch."))
    rewrites(FuseRMSNorm(), model, (X[0].to(dtype),), text, count=1, **EXACT)


@pytest.mark.parametrize("module", [LlamaRMSNorm, T5LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_modules_of_transformers(module, dtype):
    found = rewrites(FuseRMSNorm(), module(8).to(dtype), (X[0].to(dtype),), None, count=1, dialects=("aten",), **EXACT)
    assert "fused_rms_norm" in found["aten"].code or "fxopt.rms_norm" in found["aten"].code


@pytest.mark.parametrize(
    "f",
    [
        lambda s, x: normed(x) * s.w,
        lambda s, x: s.w * (torch.rsqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-6) * x),
        lambda s, x: s.w * (x * torch.rsqrt(1e-6 + torch.mean(torch.square(x), dim=2, keepdim=True))),
        lambda s, x: s.w * (x * ((x * x).mean((-1,), True) + 1e-6).rsqrt()),
        lambda s, x: s.w * (x * (x * x).mean(-1, True).add_(1e-6).rsqrt_()),
        lambda s, x: normed(x).mul_(s.w),
    ],
)
def test_without_casts_in_float32_and_float64(f):
    rewrites(FuseRMSNorm(), fn(f, w=weight()), X, AFTER, count=1, **EXACT)
    rewrites(FuseRMSNorm(), fn(f, w=weight(torch.float64)), (X[0].double(),), AFTER, count=1, **EXACT)


def test_another_epsilon_and_a_weight_that_is_computed():
    model = fn(lambda x, v: v * normed(x, 1e-3))
    text = "%0 = fused_rms_norm(x, v, 0.001)\nreturn %0"
    rewrites(FuseRMSNorm(), model, (*X, torch.randn(2, 3, 8)), text, count=1, **EXACT)


def test_the_weight_before_the_cast_as_gemma_computes_it():
    found = rewrites(FuseRMSNorm(), fn(gemma, w=weight(torch.bfloat16)), H, None, count=1, **EXACT)
    for gm in found.values():
        fused = [n for n in gm.graph.nodes if n.target is torch.ops.fxopt.rms_norm.default]
        assert [n.kwargs for n in fused] == [{"cast_before_weight": False}]


def test_the_widened_input_may_be_used_elsewhere():
    def f(s, x):
        wide = x.float()
        return s.w * normed(wide).to(x.dtype) + wide

    text = "%0 = to(x, torch.float32)\n%1 = fused_rms_norm(x, w)\n%2 = add(%1, %0)\nreturn %2"
    rewrites(FuseRMSNorm(), fn(f, w=weight(torch.bfloat16)), H, after(text, "bfloat16"), count=1, **EXACT)


def test_empty_inputs_vectors_dynamic_sizes_and_promotion():
    model = fn(llama, w=weight())
    for x in (torch.empty(0, 8), torch.randn(8)):
        rewrites(FuseRMSNorm(), model, (x,), None, count=1, **EXACT)
    rewrites(FuseRMSNorm(), model, H, after(AFTER, "bfloat16"), count=1, **EXACT)  # a wider weight widens the result
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    found = rewrites(FuseRMSNorm(), model, X, None, count=1, dialects=("aten",), dynamic=dynamic, **EXACT)
    assert found["aten"](torch.randn(5, 1, 8)).shape == (5, 1, 8)


def test_in_training_the_gradients_are_the_same():
    same_gradients(FuseRMSNorm(), fn(llama, w=weight()), X)


def used_elsewhere(s, x):
    y = normed(x)
    return s.w * y + y


def written_between(s, x):
    x = x * 2
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    x.add_(1)
    return s.w * (x * scale)


def widened_then_written(s, x):
    x = x * 2
    wide = x.float()
    x.add_(1)
    return s.w * normed(wide).to(x.dtype)


@cases(
    (
        "another dimension",
        fn(lambda s, x: s.w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)), w=weight()),
        X,
        "expected the last dimension",
    ),
    (
        "two dimensions",
        fn(lambda s, x: s.w * (x * torch.rsqrt(x.pow(2).mean((1, 2), True) + 1e-6)), w=weight()),
        X,
        "expected the last dimension",
    ),
    ("a sum", fn(lambda s, x: s.w * (x * torch.rsqrt(x.pow(2).sum(-1, True) + 1e-6)), w=weight()), X, "is not mean"),
    (
        "without keepdim",
        fn(lambda s, x: s.w * (x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6)), w=weight()),
        (torch.randn(8, 8),),
        "expected True, found False",
    ),
    (
        "another power",
        fn(lambda s, x: s.w * (x * torch.rsqrt(x.pow(4).mean(-1, True) + 1e-6)), w=weight()),
        X,
        "expected 2, found 4|is not mul",
    ),
    (
        "another x",
        fn(lambda s, x, y: s.w * (x * torch.rsqrt(y.pow(2).mean(-1, True) + 1e-6)), w=weight()),
        (*X, X[0] + 1),
        "x is both|is not",
    ),
    (
        "epsilon is a tensor",
        fn(lambda s, x: s.w * normed(x, s.e), w=weight(), e=torch.tensor(1e-6)),
        X,
        "is not a Number",
    ),
    (
        "a root and no inverse",
        fn(lambda s, x: s.w * (x * torch.sqrt(x.pow(2).mean(-1, True) + 1e-6)), w=weight()),
        X,
        "sqrt is not (rsqrt|to)",
    ),
    ("used elsewhere", fn(used_elsewhere, w=weight()), X, "has other users"),
    (
        "half precision that is not widened",
        fn(lambda s, x: s.w * normed(x), w=weight(torch.bfloat16)),
        H,
        "not widened to torch.float32",
    ),
    (
        "half precision that is not narrowed",
        fn(lambda s, x: s.w * normed(x.float()), w=weight()),
        H,
        "the result is cast to None",
    ),
    (
        "narrowed to another type",
        fn(lambda s, x: s.w * normed(x.float()).half(), w=weight(torch.float16)),
        H,
        "the result is cast to torch.float16",
    ),
    ("float64 rounded in the middle", fn(llama, w=weight(torch.float64)), (X[0].double(),), "which rounds it"),
    ("integers", fn(llama, w=weight()), (torch.arange(16).view(2, 8),), "and cast to torch.float32|not widened"),
    (
        "a wider weight, multiplied before the cast",
        fn(lambda s, x: (normed(x.float()) * s.w).to(x.dtype), w=weight(torch.float64)),
        H,
        "expected no wider type",
    ),
    (
        "a wider weight in place",
        fn(lambda s, x: normed(x).mul_(s.w), w=weight(torch.float64)),
        X,
        "is of torch.float32, expected torch.float64",
    ),
    ("in place on the cast", fn(lambda s, x: normed(x.float()).to(x.dtype).mul_(s.w), w=weight()), H, "in place"),
    ("x changes in between", fn(written_between, w=weight()), X, "writes in place|x is both"),
    ("x changes after it was widened", fn(widened_then_written, w=weight(torch.bfloat16)), H, "writes in place"),
)
def test_near_misses(model, inputs, reason, options):
    unchanged(FuseRMSNorm(), model, inputs, reason, **options)


def test_a_weight_of_another_type_stays():
    refuses_odd_parameters(FuseRMSNorm(), fn(lambda s, x: normed(x) * s.w, w=weight()), X, "w")


def test_an_unknown_type_is_a_miss():
    gm = torch.fx.symbolic_trace(fn(llama, w=weight()))
    assert any("call fxopt.propagate" in m.reason for m in FuseRMSNorm().misses(gm))
    code = gm.code
    assert FuseRMSNorm()(gm).code == code


# Two layers, each with one before attention and one before the network, and one at the end; Qwen3 normalises queries
# and keys too; T5's decoder layers have a third, and both stacks one at the end.
@pytest.mark.parametrize(("name", "count"), [("llama", 5), ("llama_bfloat16", 5), ("qwen3", 9), ("t5", 12)])
def test_real_models(name, count):
    gm = applies(FuseRMSNorm(), name, count)
    assert sum(n.target is torch.ops.fxopt.rms_norm.default for n in gm.graph.nodes) == count
    assert not any(n.target is torch.ops.aten.rsqrt.default for n in gm.graph.nodes)


def test_nothing_of_the_cast_remains():
    gm = trace(fn(llama, w=weight()).eval(), X, "aten")
    FuseRMSNorm()(gm)
    assert not any(n.target is torch.ops.aten.to.dtype for n in gm.graph.nodes)
