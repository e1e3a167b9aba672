import math

import pytest
import torch
from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation

from fxopt.transformations.fuse_tanh_gelu import FuseTanhGELU
from tests.rewriting import DIALECTS, rewrites, trace, unchanged
from tests.transformations.captures import applies
from tests.transformations.fusions import cases
from tests.transformations.modules import fn

X = (torch.randn(3, 8) * 3,)
C = math.sqrt(2 / math.pi)
AFTER = "%0 = gelu(x, 'tanh')\nreturn %0"

SPELLINGS = {
    "as in the paper": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * x**3))),
    "halved first": lambda x: x * (0.5 * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0))))),
    "halved last": lambda x: x * (1.0 + ((x + x.pow(3) * 0.044715) * C).tanh()) * 0.5,
    "cubed by products": lambda x: 0.5 * x * (1 + torch.tanh(C * (0.044715 * (x * x * x) + x))),
    "factored": lambda x: 0.5 * x * (1 + torch.tanh(C * x * (1 + 0.044715 * x * x))),
    "factored, squared first": lambda x: 0.5 * x * (1 + torch.tanh(C * x * (1 + 0.044715 * (x * x)))),
    "functions": lambda x: torch.mul(x, 0.5).mul(
        torch.add(torch.tanh(torch.mul(torch.add(x, x.pow(3).mul(0.044715)), C)), 1)
    ),
}


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_one_operator(spelled):
    rewrites(FuseTanhGELU(), fn(spelled), X, AFTER, count=1)


@pytest.mark.parametrize("activation", [NewGELUActivation, FastGELUActivation])
def test_the_activations_of_transformers(activation):
    rewrites(FuseTanhGELU(), activation(), X, "%0 = gelu(input, 'tanh')\nreturn %0", count=1)


def test_in_place_on_fresh_values():
    model = fn(lambda x: (x * 0.5).mul_((x + x.pow(3).mul_(0.044715)).mul_(C).tanh_().add_(1)))
    rewrites(FuseTanhGELU(), model, X, AFTER, count=1)


def test_the_input_may_be_used_elsewhere():
    model = fn(lambda x: SPELLINGS["as in the paper"](x) + x)
    rewrites(FuseTanhGELU(), model, X, "%0 = gelu(x, 'tanh')\n%1 = add(%0, x)\nreturn %1", count=1)


def test_float64_scalars_empty_tensors_and_dynamic_sizes():
    model = fn(SPELLINGS["as in the paper"])
    for x in (X[0].double(), torch.tensor(0.7), torch.empty(0, 4)):
        rewrites(FuseTanhGELU(), model, (x,), AFTER, count=1)
    rewrites(FuseTanhGELU(), model, X, AFTER, dialects=("aten",), dynamic=({0: torch.export.Dim.DYNAMIC},))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_is_nearer_to_the_truth(dtype):
    x = (torch.linspace(-60, 60, 997, dtype=dtype),)
    for dialect in DIALECTS:
        gm = trace(fn(SPELLINGS["as in the paper"]), x, dialect)
        truth = torch.nn.functional.gelu(x[0].double(), approximate="tanh")
        before = (gm(*x).double() - truth).abs().max()
        FuseTanhGELU()(gm)
        assert (gm(*x).double() - truth).abs().max() <= before


def written_between(x):
    x = x * 2
    y = 0.5 * x
    x.add_(1)
    return y * (1 + torch.tanh(C * (x + 0.044715 * x**3)))


def used_elsewhere(x):
    t = torch.tanh(C * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t) + t


def written_to_x(x):
    x = x * 2
    return x.mul_(0.5) * (1 + torch.tanh(C * (x + 0.044715 * x**3)))


@cases(
    (
        "another c",
        fn(lambda x: 0.5 * x * (1 + torch.tanh(0.797 * (x + 0.044715 * x**3)))),
        X,
        r"expected sqrt\(2 / pi\)",
    ),
    (
        "another k",
        fn(lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.0447 * x**3)))),
        X,
        "expected 0.044715, found 0.0447",
    ),
    (
        "another power",
        fn(lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * x**2)))),
        X,
        "expected 3, found 2|is not mul",
    ),
    ("another half", fn(lambda x: 0.4 * x * (1 + torch.tanh(C * (x + 0.044715 * x**3)))), X, "expected 0.5, found 0.4"),
    ("another one", fn(lambda x: 0.5 * x * (2 + torch.tanh(C * (x + 0.044715 * x**3)))), X, "expected 1, found 2"),
    ("another x", fn(lambda x, y: 0.5 * x * (1 + torch.tanh(C * (y + 0.044715 * y**3)))), (*X, X[0] + 1), "x is both"),
    ("a difference", fn(lambda x: 0.5 * x * (1 - torch.tanh(C * (x + 0.044715 * x**3)))), X, "is not add"),
    ("alpha", fn(lambda x: 0.5 * x * (1 + torch.tanh(C * torch.add(x, 0.044715 * x**3, alpha=2)))), X, "found 2"),
    ("used elsewhere", fn(used_elsewhere), X, "has other users"),
    ("x changes in between", fn(written_between), X, "writes in place|x is both|has other users"),
    ("x itself is written to", fn(written_to_x), X, "writes .*in place|has other users"),
    ("integers", fn(SPELLINGS["as in the paper"]), (torch.arange(4),), "expected a floating-point type"),
)
def test_near_misses(model, inputs, reason, options):
    unchanged(FuseTanhGELU(), model, inputs, reason, **options)


def test_an_unknown_type_is_a_miss():
    gm = torch.fx.symbolic_trace(fn(SPELLINGS["as in the paper"]))
    assert "call fxopt.propagate" in [m.reason for m in FuseTanhGELU().misses(gm)][-1]
    code = gm.code
    assert FuseTanhGELU()(gm).code == code


def test_gpt2():
    applies(FuseTanhGELU(), "gpt2", count=2, exact=False)  # one in each of the two layers


def test_a_network_keeps_its_text():
    model = nn.Sequential(nn.Linear(8, 8), NewGELUActivation())
    rewrites(FuseTanhGELU(), model, X, "%0 = linear(input, 0.weight, 0.bias)\n%1 = gelu(%0, 'tanh')\nreturn %1")
