"""The direct forward does what the generated one does, whatever becomes of the modules."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace
from torch.nn.utils import parametrize

import fxopt
from fxopt.forward import _compiled, quicken
from fxopt.transformations import EliminateDropout


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3)])
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.scale + self.shift


X = torch.randn(2, 3)


@pytest.fixture(params=("traced", "exported"))
def gm(request: pytest.FixtureRequest) -> GraphModule:
    model = Layers().eval()
    gm = fxopt.capture(model, (X,)) if request.param == "exported" else symbolic_trace(model)
    EliminateDropout()(gm)
    gm(X)
    return gm


def plain(gm: GraphModule) -> Any:
    """What torch's own forward gives."""
    return type(gm).forward.plain_forward(gm, X)


def asked(gm: GraphModule, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The attributes that a call asks `nn.Module.__getattr__` for."""
    names: list[str] = []
    slow = nn.Module.__getattr__

    def watched(self: nn.Module, name: str) -> Any:
        if not isinstance(self, nn.Linear):  # which asks for its own weight
            names.append(name)
        return slow(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__getattr__", watched)
        gm(X)
    return names


def test_nothing_is_asked_of_getattr(gm: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(gm, monkeypatch) == []
    gm.recompile()
    gm(X)
    assert asked(gm, monkeypatch) == []


def test_the_shown_code_is_torchs(gm: GraphModule) -> None:
    assert "_modules" not in gm.code
    code = gm.code
    gm.recompile()
    assert gm.code == code


@pytest.mark.parametrize("again", (copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))), ids=("copy", "pickle"))
def test_copies_read_their_own_modules(gm: GraphModule, again: Any) -> None:
    twin, before = again(gm), gm(X)
    with torch.no_grad():
        twin.scale.mul_(3)
    assert torch.equal(gm(X), before)
    assert torch.equal(twin(X), plain(twin))
    assert not torch.equal(twin(X), before)


def test_what_is_replaced_is_read(gm: GraphModule) -> None:
    gm.scale = nn.Parameter(torch.tensor(5.0))
    gm.shift = torch.tensor(-1.0)
    assert torch.equal(gm(X), plain(gm))
    assert torch.equal(gm(X).min(), plain(gm).min())
    swapped = torch.func.functional_call(gm, {"scale": torch.tensor(0.0)}, (X,))
    assert torch.equal(swapped, torch.full((2, 3), -1.0))


def test_what_is_no_parameter_any_more_is_read(gm: GraphModule) -> None:
    before = gm(X)
    del gm.scale
    gm.scale = torch.tensor(7.0)
    assert torch.equal(gm(X), plain(gm))
    assert not torch.equal(gm(X), before)


def test_what_is_parametrized_is_read(gm: GraphModule) -> None:
    class Negated(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return -w

    last = gm.get_submodule("layers.2")
    before = gm(X)
    parametrize.register_parametrization(last, "weight", Negated())
    assert torch.equal(gm(X), plain(gm))
    assert not torch.equal(gm(X), before)


def test_a_module_that_answers_itself_is_asked() -> None:
    class Answers(nn.Module):
        def __getattr__(self, name: str) -> Any:
            return torch.tensor(4.0) if name == "scale" else super().__getattr__(name)

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.mul, (x, graph.get_attr("inner.scale"))))
    root = nn.Module()
    root.inner = Answers()
    gm = GraphModule(root, graph)
    gm.inner = Answers()
    quicken(gm)
    gm.inner._parameters["scale"] = nn.Parameter(torch.tensor(1.0))
    assert torch.equal(gm(X), X * 4)


def test_tracers_see_the_attributes(gm: GraphModule) -> None:
    targets = [n.target for n in symbolic_trace(gm).graph.nodes if n.op in ("get_attr", "call_module")]
    mine = [n.target for n in gm.graph.nodes if n.op in ("get_attr", "call_module") and n.target != "_guards_fn"]
    assert targets == mine
    assert torch.equal(torch.compile(gm, backend="eager")(X), gm(X))


def test_an_error_shows_the_generated_line() -> None:
    gm = symbolic_trace(Layers().eval())
    direct = _compiled(gm, gm.code, gm.forward.__func__)
    with pytest.raises(RuntimeError) as raised:
        direct(gm, torch.randn(2, 5))
    line = next(entry.lineno for entry in raised.traceback if "eval_with_key" in str(entry.path))
    assert 'getattr(self.layers, "0")(x)' in gm.code.splitlines()[line]
