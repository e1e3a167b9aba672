import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.transformations.fuse_swiglu import FuseSwiGLU
from tests.rewriting import rewrites, unchanged
from tests.transformations.captures import applies
from tests.transformations.fusions import cases, hooked, refuses_odd_parameters, same_gradients
from tests.transformations.modules import fn

G, U = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
X = (G, U)
EXACT = {"rtol": 0, "atol": 0}
AFTER = "%0 = swiglu(gate, up)\nreturn %0"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize(
    "f",
    [
        lambda gate, up: F.silu(gate) * up,
        lambda gate, up: up * F.silu(gate),
        lambda gate, up: torch.mul(input=up, other=F.silu(input=gate)),
        lambda gate, up: F.silu(gate).mul_(up),
    ],
)
def test_silu_and_product_are_one(f):
    rewrites(FuseSwiGLU(), fn(f), X, AFTER, count=1, **EXACT)


def test_in_a_network():
    after = """
        %0 = linear(x, gate.weight, gate.bias)
        %1 = linear(x, up.weight, up.bias)
        %2 = swiglu(%0, %1)
        %3 = linear(%2, down.weight, down.bias)
        return %3
    """
    rewrites(FuseSwiGLU(), Net(), (G,), after, count=1, **EXACT)
    same_gradients(FuseSwiGLU(), Net(), (G,))


def test_broadcasting_promotion_empty_and_dynamic_sizes():
    model = fn(lambda gate, up: F.silu(gate) * up)
    for up in (torch.randn(8), torch.randn(2, 1, 1), torch.tensor(2.0), U.double(), torch.arange(8)):
        rewrites(FuseSwiGLU(), model, (G, up), AFTER, count=1, **EXACT)
    rewrites(FuseSwiGLU(), model, (G.bfloat16(), U), AFTER, count=1, **EXACT)
    rewrites(FuseSwiGLU(), model, (G[:0], U[:0]), AFTER, count=1, **EXACT)
    dynamic = ({0: torch.export.Dim("n")}, {0: torch.export.Dim("n")})
    rewrites(FuseSwiGLU(), model, X, AFTER, count=1, dialects=("aten",), dynamic=dynamic, **EXACT)


def used_elsewhere(gate, up):
    y = F.silu(gate)
    return y * up + y


def written_between(gate, up):
    gate = gate * 2
    y = F.silu(gate)
    gate.add_(1)
    return y * up + gate.sum()


@cases(
    ("a number", fn(lambda gate: F.silu(gate) * 2), (G,), "2 is not a Tensor|2 is not silu"),
    (
        "a size",
        fn(lambda gate: F.silu(gate) * gate.shape[0]),
        (G,),
        "is a tensor is not known|is not a Tensor",
        {"dialects": ("module", "function")},
    ),
    ("a sigmoid", fn(lambda gate, up: torch.sigmoid(gate) * up), X, "is not silu"),
    ("a sum", fn(lambda gate, up: F.silu(gate) + up), X, None),
    ("used elsewhere", fn(used_elsewhere), X, "has other users"),
    ("the gate changes in between", fn(written_between), X, "writes in place"),
    ("in place on an input", fn(lambda gate, up: F.silu(gate, inplace=True) * up), (G.clone(), U), "in place"),
    (
        "in place, narrower than the product",
        fn(lambda gate, up: F.silu(gate).mul_(up)),
        (G.bfloat16(), U),
        "is of torch.bfloat16, and silu",
    ),
    (
        "hooks",
        fn(lambda s, x: s.act(x) * x, act=hooked(nn.SiLU())),
        (G,),
        "has hooks|is not silu",
        {"dialects": ("module",)},
    ),
)
def test_near_misses(model, inputs, reason, options):
    unchanged(FuseSwiGLU(), model, inputs, reason, **options)


def test_an_operand_of_another_type_stays():
    refuses_odd_parameters(FuseSwiGLU(), fn(lambda s, x: F.silu(x) * s.w, w=nn.Parameter(torch.randn(8))), (G,), "w")


@pytest.mark.parametrize("name", ["llama", "llama_bfloat16", "qwen3"])
def test_real_models(name):
    applies(FuseSwiGLU(), name, count=2)  # one in each of the two layers
