import pytest
import torch
from torch import nn

from fxopt.errors import UsageError
from fxopt.history import history
from fxopt.transformations import SparsifyWeights
from tests.rewriting import DIALECTS, state, trace, unchanged


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.second = nn.Conv2d(4, 8, 3), nn.Linear(8, 16), nn.Linear(16, 12, bias=False)

    def forward(self, x):
        return self.second(self.first(self.conv(x).mean((2, 3))))


X = (torch.randn(3, 4, 6, 6),)


def weights(gm: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in gm.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.75},
        {"sparsity": 0.9, "scope": "global"},
        {"threshold": 0.1},
        {"pattern": "2:4"},
        {"sparsity": 0.5, "layers": "first|conv"},
    ],
)
def test_zeros_what_was_asked_for_and_is_undone_exactly(dialect, options):
    net = Net()
    gm = trace(net, X, dialect)
    owned, code, original = state(gm), gm.code, weights(net)
    content = {n: w.clone() for n, w in original.items()}
    prune = SparsifyWeights(**options)
    prune(gm)
    pruned = weights(gm)
    assert pruned.keys() == original.keys()
    for name, weight in pruned.items():
        mask = weight != 0
        assert torch.equal(weight, original[name] * mask)
        if name == "second.weight" and "layers" in options:
            assert bool(mask.all())
        elif "threshold" in options:
            assert torch.equal(mask, original[name].abs() > 0.1)
        elif "pattern" in options:
            assert bool((mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all())
        elif options.get("scope") is None:
            assert int((~mask).sum()) == round(options["sparsity"] * mask.numel())
    if options.get("scope") == "global":
        zeros = sum(int((w == 0).sum()) for w in pruned.values())
        assert zeros == round(0.9 * sum(w.numel() for w in pruned.values()))
        assert prune.report(gm).sparsity == pytest.approx(0.9, abs=1e-3)
    assert all(torch.equal(w, content[n]) for n, w in weights(net).items()), "the caller's model was touched"
    assert all(p.requires_grad for p in gm.parameters())
    prune.reverse(gm)
    assert state(gm) == owned and gm.code == code


def test_trained_weights_are_carried_back():
    gm = trace(Net(), X, "aten")
    prune = SparsifyWeights(sparsity=0.5)
    prune(gm)
    with torch.no_grad():
        gm.first.weight.mul_(3)
    trained = gm.first.weight.clone()
    prune.reverse(gm, edited="carry")
    assert torch.equal(gm.first.weight, trained)


def test_existing_zeros_change_nothing_and_say_so():
    gm = trace(Net(), X, "aten")
    for prune in (SparsifyWeights(), SparsifyWeights(existing=True)):
        prune(gm)
        assert "did nothing" in str(history(gm)[-1])
        assert prune.report(gm).sparsity == 0


def _nan() -> nn.Module:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0] = float("inf")
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("prune", "net", "x", "reason"),
    [
        (SparsifyWeights(sparsity=0.5), _nan(), torch.randn(2, 4), "NaN or infinite"),
        (SparsifyWeights(pattern="2:4"), nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 6), "which 4 does not divide"),
        (SparsifyWeights(sparsity=0.5, layers="x"), nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 6), "does not match 'x'"),  # noqa: E501
    ],
)  # fmt: skip
def test_near_misses(prune, net, x, reason):
    unchanged(prune, net, (x,), reason)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sparsity": 0.5, "threshold": 0.1}, "expected at most one of"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "expected at most one of"),
        ({"sparsity": 50}, "sparsity=50 was given; expected a share from 0 to 1"),
        ({"threshold": -1}, "expected a magnitude"),
        ({"pattern": "4:2"}, "expected 'unstructured' or N:M such as '2:4'"),
        ({"sparsity": 0.5, "scope": "local"}, "expected 'uniform' or 'global'"),
        ({"threshold": "a"}, "threshold=a was given; expected a magnitude"),
        ({"sparsity": True}, "sparsity=True was given; expected a share"),
        ({"sparsity": 0.5, "layers": None}, "layers=None was given; expected a regular expression"),
        ({"sparsity": 0.5, "layers": "("}, "is no regular expression"),
    ],
)
def test_wrong_options_are_one_line(options, told):
    with pytest.raises(UsageError, match=told) as error:
        SparsifyWeights(**options)
    assert "\n" not in str(error.value)
