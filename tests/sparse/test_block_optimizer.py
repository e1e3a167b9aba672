"""An optimizer that goes along with weights that become blocks or 2:4, and weights again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.optimization import Adafactor

import fxopt
from fxopt.errors import UsageError
from fxopt.sparse import BlockSparseLinear, BlockSparseModelPatcher, SemiStructuredLinear, Spec, following
from fxopt.transformations import BlockSparsify

X = (torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)),)
HALF = (0.5, (16, 16))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x):
        return F.linear(x, self.w)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Crowded(nn.Module):
    """A layer whose module has attributes of the names that blocks would have."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.inner.data = nn.Parameter(torch.randn(64))
        self.inner.register_buffer("index", torch.arange(64))

    def forward(self, x):
        return F.linear(x, self.inner.weight) * self.inner.data[self.inner.index]


class Squares(nn.Module):
    """Square weights (in, out), which shapes do not tell from those (out, in)."""

    def __init__(self):
        super().__init__()
        self.w, self.bias = nn.Parameter(torch.randn(64, 64) / 8), nn.Parameter(torch.zeros(64))

    def forward(self, x):
        return torch.addmm(self.bias, x[0], self.w)


def parameters(optimizer):
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def step(model, optimizer, x=X):
    @torch.enable_grad()  # transformers' optimizers call it without
    def loss():
        optimizer.zero_grad()
        value = model(*x).square().mean()
        value.backward()
        return value

    optimizer.step(loss)


def everything(block=HALF):
    return BlockSparsify({".*": block}, guard="off")


def test_it_takes_along_what_no_name_tells():
    for kind in (Functional, Attention, Crowded, Squares):
        torch.manual_seed(0)
        gm = fxopt.capture(kind(), X)
        optimizer, sparsify = torch.optim.AdamW(gm.parameters(), lr=0.1), everything()
        step(gm, optimizer)
        dense = [p for p in gm.parameters() if p.dim() == 2]
        whole = sum(optimizer.state[p]["exp_avg"].abs().sum() for p in dense)
        with following(optimizer, gm):
            sparsify(gm)
        blocks = [p for p in gm.parameters() if p.dim() == 3]
        assert len(blocks) == len(dense) and parameters(optimizer) == {id(p) for p in gm.parameters()}
        assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in blocks)
        assert 0 < sum(optimizer.state[p]["exp_avg"].abs().sum() for p in blocks) < whole
        was = [p.detach().clone() for p in blocks]
        step(gm, optimizer)
        assert all((p != w).any() for p, w in zip(blocks, was, strict=True)), kind
        with following(optimizer, gm):
            sparsify.reverse(gm, edited="discard")
        assert parameters(optimizer) == {id(p) for p in gm.parameters()}
        step(gm, optimizer)


@pytest.mark.parametrize("block", (HALF, Spec(block="2:4")), ids=("blocks", "pairs"))
def test_state_of_a_weight_turned_round_is_cut_as_the_weight_is(block):
    gm = fxopt.capture(Squares(), X)
    optimizer, sparsify = torch.optim.SGD(gm.parameters(), lr=0.1, momentum=0.9), everything(block)
    held = torch.randn(64, 64)
    optimizer.state[gm.w]["momentum_buffer"] = held.clone()
    gm.w.data.copy_(held)  # cut alike, the state is the weight
    with following(optimizer, gm):
        sparsify(gm)
    kept = next(p for p in gm.parameters() if p.dim() == 3 or p.shape == (64, 32))
    assert torch.equal(optimizer.state[kept]["momentum_buffer"], kept)
    with torch.no_grad():
        kept.mul_(2)
        optimizer.state[kept]["momentum_buffer"].mul_(2)
    with following(optimizer, gm):
        sparsify.reverse(gm, mode="zeros")
    assert torch.equal(optimizer.state[gm.w]["momentum_buffer"], gm.w)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))


def patcher():
    return BlockSparseModelPatcher(guard="off").add_pattern("0|2", HALF)


OF_ANOTHER_SHAPE = {
    "torch.optim.LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "torch.optim.Adafactor": lambda p: torch.optim.Adafactor(p),
    "transformers' Adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
}


@pytest.mark.parametrize("make", OF_ANOTHER_SHAPE.values(), ids=OF_ANOTHER_SHAPE)
def test_state_of_another_shape_begins_anew(make):
    model, made = plain(), patcher()
    optimizer = make(model.parameters())
    step(model, optimizer)
    with pytest.warns(UserWarning, match="the state that .* had for 0.weight, 2.weight cannot be carried over"):
        made.patch_model(model, optimizer=optimizer)
    assert not any(p in optimizer.state for p in (model[0].data, model[2].data))
    trained_as_new(model, optimizer, make)
    with pytest.warns(UserWarning, match="had for 0.data, 2.data cannot be carried over"):
        made.restore(model, mode="zeros", optimizer=optimizer)
    trained_as_new(model, optimizer, make)


def trained_as_new(model, optimizer, make):
    """Every parameter is trained; and by `LBFGS`, whose state is of all of them, as by a new one."""
    twin = copy.deepcopy(model)
    was = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer)
    assert all((p != w).any() for p, w in zip(model.parameters(), was, strict=True))
    if isinstance(optimizer, torch.optim.LBFGS):
        step(twin, make(twin.parameters()))
        for p, wanted in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, wanted)


def test_a_warning_that_is_an_error_changes_nothing():
    model = plain()
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer)
    weight, state = model[0].weight, dict(optimizer.state)
    with pytest.raises(UserWarning, match="begins anew"):
        patcher().patch_model(model, optimizer=optimizer)
    assert model[0].weight is weight and weight.grad is not None and dict(optimizer.state) == state
    step(model, optimizer)


def test_untouched_factored_state_comes_back():
    model, made = plain(), patcher()
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer)
    held = {k: v.clone() for k, v in optimizer.state[model[0].weight].items()}
    with pytest.warns(UserWarning, match="begins anew"):
        made.patch_model(model, optimizer=optimizer)
    made.restore(model, optimizer=optimizer)
    now = optimizer.state[model[0].weight]
    assert held.keys() == now.keys() and all(torch.equal(now[k], v) for k, v in held.items())


def test_what_takes_matrices_alone_gets_no_blocks():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    optimizer = torch.optim.Muon(model.parameters())
    step(model, optimizer)
    weight, state = model[0].weight, dict(optimizer.state)
    with pytest.raises(UsageError, match="Muon takes matrices alone"):
        BlockSparseModelPatcher(guard="off").add_pattern("0", HALF).patch_model(model, optimizer=optimizer)
    assert model[0].weight is weight and parameters(optimizer) == {id(weight)} and dict(optimizer.state) == state


def test_what_cannot_be_followed_is_refused_and_nothing_changed():
    model = plain()
    optimizer, layer = torch.optim.AdamW(model.parameters()), model[0]
    with (
        pytest.raises(UsageError, match=r"cannot follow: 0.weight went and other.data came"),
        following(optimizer, model),
    ):
        model.other = BlockSparseLinear.from_dense(layer, 0.5)
        model[0] = nn.Identity()
    assert model[0] is layer and not hasattr(model, "other")
    assert parameters(optimizer) == {id(p) for p in model.parameters()}
    gm = fxopt.capture(Functional(), X)
    optimizer, code, weight = torch.optim.AdamW(gm.parameters()), gm.code, gm.w
    with pytest.raises(UsageError, match="cannot follow: w went and v came"), following(optimizer, gm):
        everything()(gm)
        del gm.w_blocks
        gm.v = nn.Parameter(torch.zeros(3))
    assert gm.code == code and gm.w is weight and not fxopt.history(gm)
    with pytest.raises(ZeroDivisionError), following(optimizer, gm):
        everything()(gm)
        raise ZeroDivisionError
    assert gm.code == code and parameters(optimizer) == {id(weight)}


def test_a_weight_that_is_still_used_is_still_trained():
    model = nn.ModuleDict({"embedding": nn.Embedding(96, 64), "head": nn.Linear(64, 96, bias=False)})
    model["head"].weight = model["embedding"].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model["head"](model["embedding"](torch.arange(9))).sum().backward()
    optimizer.step()
    with following(optimizer, model):
        model["head"] = BlockSparseLinear.from_dense(model["head"], 0.5)
    assert parameters(optimizer) == {id(p) for p in model.parameters()} and len(parameters(optimizer)) == 2
    assert all(len(optimizer.state[p]) for p in model.parameters())
    assert model["embedding"].weight.grad is not None and model["head"].data.grad is None


# --- gradients that were accumulated ----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", (True, False), ids=("with an optimizer", "without"))
@pytest.mark.parametrize("kind", (BlockSparseLinear, SemiStructuredLinear))
def test_an_accumulated_gradient_goes_along(kind, given):
    model = nn.Sequential(nn.Linear(64, 96))
    spec = HALF if kind is BlockSparseLinear else {"block": "2:4"}
    made = BlockSparseModelPatcher(guard="off").add_pattern("0", spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if given else None
    model(*X).square().sum().backward()
    dense = model[0].weight
    grad = dense.grad.clone()
    made.patch_model(model, optimizer=optimizer)
    layer = model[0]
    assert isinstance(layer, kind) and torch.equal(layer.dense(layer.tensors[0].grad), grad * layer.kept)
    assert dense.grad is None
    model(*X).sum().backward()
    accumulated = layer.dense(layer.tensors[0].grad).detach().clone()
    assert not torch.equal(accumulated, grad * layer.kept)
    made.restore(model, optimizer=optimizer)
    assert model[0].weight is dense and torch.equal(dense.grad, accumulated) and layer.tensors[0].grad is None


def test_gradients_go_along_on_a_graph():
    gm, sparsify = fxopt.capture(Squares(), X), everything()
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    gm(*X).square().sum().backward()
    grad, before = gm.w.grad.clone(), gm.w
    with following(optimizer, gm):
        sparsify(gm)
    blocks = next(p for p in gm.parameters() if p.dim() == 3)
    assert before.grad is None and blocks.grad.abs().sum() > 0
    with following(optimizer, gm):
        sparsify.reverse(gm)
    kept = gm.w.grad != 0
    assert gm.w is before and blocks.grad is None
    assert torch.equal(gm.w.grad[kept], grad[kept]) and float(kept.float().mean()) == 0.5
