import copy
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.errors import Conflict, UsageError
from fxopt.history import checkout, history
from fxopt.transformations import SparsifyWeights, SwapSparse
from tests.rewriting import DIALECTS, rewrites, state, trace, unchanged


def thin(layer: nn.Module, sparsity: float = 0.9) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) > sparsity)
    return layer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = thin(nn.Conv2d(3, 8, 3, 2, padding=1, bias=False))
        self.even = thin(nn.Conv2d(8, 8, (3, 2), padding="same", groups=2))
        self.first, self.second = thin(nn.Linear(128, 32)), thin(nn.Linear(32, 10, bias=False))
        self.dense = nn.Linear(10, 10)

    def forward(self, x):
        x = torch.relu(self.even(torch.relu(self.conv(x))))
        return self.dense(self.second(self.first(x.flatten(1))))


def dense_again(gm: torch.fx.GraphModule) -> dict[str, torch.Tensor]:
    twin = copy.deepcopy(gm)
    FORCED.reverse(twin)
    return twin.state_dict()


X = (torch.randn(5, 3, 8, 8),)
FORCED = SwapSparse(measure=False)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
class TestNet:
    def test_all_that_is_sparse_is_swapped_and_undone_exactly(self):
        places = "{0}.row_start, {0}.column, {0}.column_start, {0}.row, {0}.place"
        conv, even, first, second = (places.format(n) for n in ("conv", "even", "first", "second"))
        rewrites(
            FORCED,
            Net(),
            X,
            f"""
            %0 = sparse_conv2d(x, conv.values, None, {conv}, [3, 3], [2, 2], [1, 1, 1, 1], [1, 1], 1)
            %1 = relu(%0)
            %2 = sparse_conv2d(%1, even.values, even.bias, {even}, [3, 2], [1, 1], [1, 1, 0, 1], [1, 1], 2)
            %3 = relu(%2)
            %4 = flatten(%3, 1)
            %5 = sparse_linear(%4, first.values, first.bias, {first})
            %6 = sparse_linear(%5, second.values, None, {second})
            %7 = linear(%6, dense.weight, dense.bias)
            return %7
            """,
        )

    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_reports_every_layer(self, dialect):
        gm = trace(Net(), X, dialect)
        with pytest.raises(UsageError, match="was not applied to this graph module"):
            FORCED.report(gm)
        FORCED(gm)
        report = FORCED.report(gm)
        assert [layer.name for layer in report.layers] == ["conv", "even", "first", "second", "dense"]
        assert [layer.swapped for layer in report.layers] == [True] * 4 + [False]
        assert [m.reason for m in FORCED.misses(gm)] == ["dense: less than 50% zeros"]

    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_trained_values_are_carried_back(self, dialect):
        gm = trace(Net(), X, dialect)
        before = {k: v.clone() for k, v in gm.state_dict().items()}
        FORCED(gm)
        optimizer = torch.optim.SGD(gm.parameters(), lr=0.05)
        gm(*X).square().sum().backward()
        optimizer.step()
        trained = gm(*X).detach()
        with pytest.raises(Conflict, match="edited since"):
            FORCED.reverse(gm)
        discarded = copy.deepcopy(gm)
        FORCED.reverse(gm, edited="carry")
        torch.testing.assert_close(gm(*X), trained, rtol=1e-4, atol=1e-5)
        now = gm.state_dict()
        assert now.keys() == before.keys()
        assert torch.equal(now["first.weight"] != 0, before["first.weight"] != 0)
        assert not torch.equal(now["first.weight"], before["first.weight"])
        FORCED.reverse(discarded, edited="discard")
        assert torch.equal(discarded.state_dict()["first.weight"], before["first.weight"])

    @pytest.mark.parametrize("dialect", DIALECTS)
    @pytest.mark.parametrize("edited", ["carry", "discard"])
    def test_what_was_carried_is_carried_on(self, dialect, edited):
        gm = trace(Net(), X, dialect)
        owned, code, before = state(gm), gm.code, {k: v.clone() for k, v in gm.state_dict().items()}
        prune = SparsifyWeights(sparsity=0.95)
        prune(gm)
        FORCED(gm)
        pruned = {k: v.clone() for k, v in dense_again(gm).items()}
        optimizer = torch.optim.SGD([gm.get_parameter(n) for n, _ in gm.named_parameters() if "first" in n], lr=0.05)
        gm(*X).square().sum().backward()
        optimizer.step()
        trained = gm(*X).detach()
        FORCED.reverse(gm, edited="carry")
        carried = gm.state_dict()["first.weight"]
        assert not torch.equal(carried, pruned["first.weight"])
        assert torch.equal(gm.state_dict()["second.weight"], pruned["second.weight"])
        pickled = [] if dialect == "aten" else [pickle.loads(pickle.dumps(gm))]  # torch pickles no exported one
        for one in (copy.deepcopy(gm), *pickled, gm):
            with pytest.raises(Conflict, match=r"first\.weight, edited since"):
                prune.reverse(one)
            torch.testing.assert_close(one(*X), trained, rtol=1e-4, atol=1e-5)
            prune.reverse(one, edited=edited)
            assert one.code == code and not history(one)
            found = one.state_dict()
            wanted = carried if edited == "carry" else before["first.weight"]
            assert torch.equal(found["first.weight"], wanted)
            assert torch.equal(found["second.weight"], before["second.weight"])
        if edited == "discard":
            assert [o for o in state(gm) if "bias" not in o[0]] == [o for o in owned if "bias" not in o[0]]

    def test_checkout_carries_all_the_way_down(self):
        gm = trace(Net(), X, "aten")
        SparsifyWeights(sparsity=0.95, layers="first")(gm)
        FORCED(gm)
        with torch.no_grad():
            gm.first.values.mul_(2)
        expected = gm(*X)
        checkout(gm, 0, edited="carry")
        torch.testing.assert_close(gm(*X), expected, rtol=1e-4, atol=1e-5)
        assert not history(gm) and int(gm.first.weight.count_nonzero()) < 0.06 * gm.first.weight.numel()

    @pytest.mark.parametrize("whole", [False, True])
    def test_what_was_carried_into_an_edit_from_outside_stays(self, whole):
        gm = trace(Net(), X, "aten")
        SparsifyWeights(sparsity=0.95, layers="first")(gm)
        gm.first.weight = nn.Parameter(gm.first.weight.detach() * 3)  # by hand
        FORCED(gm)
        with torch.no_grad():
            gm.first.values.mul_(2)
        expected = gm(*X)
        if whole:
            with pytest.raises(Conflict, match="first"):  # the edit lies over what SparsifyWeights made
                checkout(gm, 0, edited="carry")
            assert torch.equal(gm(*X), expected)
        FORCED.reverse(gm, edited="carry")
        torch.testing.assert_close(gm(*X), expected, rtol=1e-4, atol=1e-5)
        assert len(history(gm)) == 1

    def test_one_rewrite_is_carried_and_made_again(self):
        gm = trace(Net(), X, "aten")
        FORCED(gm)
        with torch.no_grad():
            gm.first.values.mul_(2)
        expected, values = gm(*X), gm.first.values
        rewrite = next(r for r in history(gm)[0].rewrites if any("first.values" in p for p in r.part.delta.slots))
        rewrite.reverse(edited="carry")
        torch.testing.assert_close(gm(*X), expected, rtol=1e-4, atol=1e-5)
        history(gm)[0].rewrites[[r.id for r in history(gm)[0].rewrites].index(rewrite.id)].apply()
        assert torch.equal(gm(*X), expected) and gm.first.values is values

    def test_gradients_are_those_of_dense(self):
        gm = trace(Net(), X, "aten")
        dense = copy.deepcopy(gm)
        FORCED(gm)
        for module in (gm, dense):
            module(*X).square().sum().backward()
        mask = dense.first.weight != 0
        torch.testing.assert_close(gm.first.values.grad, dense.first.weight.grad[mask], rtol=1e-4, atol=1e-5)


class Conv1D(nn.Module):
    """GPT-2's linear layer."""

    def __init__(self, square: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16 if square else 12))
        self.bias = nn.Parameter(torch.randn(self.weight.shape[1]))
        thin(self, 0.8)

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("square", [False, True])
def test_addmm_with_its_weight_the_other_way_round(square):
    net = Conv1D(square)
    found = rewrites(FORCED, net, (torch.randn(4, 16),), None, dialects=("function", "aten"))
    for gm in found.values():
        with torch.no_grad():
            gm.values.mul_(2)
        FORCED.reverse(gm, edited="carry")
        assert torch.equal(gm.weight, net.weight * 2)


def test_measured_decisions_are_told():
    net = nn.Sequential(thin(nn.Linear(1024, 1024), 0.99), nn.ReLU(), thin(nn.Linear(1024, 4), 0.6))
    swap = SwapSparse()
    gm = trace(net, (torch.randn(256, 1024),), "aten")
    swap(gm)
    told = swap.report(gm).layers
    assert told[0].swapped and told[0].timing.total > 1.5 and "as fast" in told[0].reason
    assert told[1].timing is not None and not swap.replayable
    again = SwapSparse()
    fresh = trace(net, (torch.randn(256, 1024),), "aten")
    again(fresh)
    assert again.report(fresh).layers == told, "a weight is measured once in a process"
    forward = SwapSparse(backward=False)
    forward(gm)
    assert all(layer.timing is None or layer.timing.backward is None for layer in forward.report(gm).layers)


def test_sizes_come_from_inputs_where_the_graph_has_none():
    net = nn.Sequential(thin(nn.Linear(64, 64), 0.9))
    gm = torch.fx.symbolic_trace(net)
    assert "sizes are unknown; give inputs=" in SwapSparse().misses(gm).__next__().reason
    swap = SwapSparse(inputs=(torch.randn(8, 64),))
    swap(gm)
    assert swap.report(gm).layers[0].timing is not None


def _tied() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = thin(nn.Linear(4, 4), 0.6), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    return Tied()


def _nan() -> nn.Module:
    layer = thin(nn.Linear(4, 4), 0.9)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    return nn.Sequential(layer)


class Reflecting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = thin(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(
    ("net", "x", "reason"),
    [
        (_tied(), torch.randn(2, 4), r"reads .*weight too"),
        (_nan(), torch.randn(2, 4), "NaN or infinite"),
        (nn.Sequential(thin(nn.Linear(4, 4), 0.9)).bfloat16(), torch.randn(2, 4).bfloat16(), "bfloat16"),
        (nn.Sequential(thin(nn.Linear(8, 8), 0.2)), torch.randn(2, 8), "less than 50% zeros"),
    ],
)
def test_near_misses(net, x, reason):
    unchanged(FORCED, net, (x,), reason)


def test_an_unsupported_layer_is_a_miss_in_the_dialect_of_modules():
    unchanged(FORCED, Reflecting(), (torch.randn(1, 1, 4, 4),), "padding_mode='reflect'", dialects=("module",))


@pytest.mark.parametrize("value", [-0.1, 80])
def test_a_wrong_share_is_refused(value):
    with pytest.raises(UsageError, match=re.escape(f"min_sparsity={value} was given")):
        SwapSparse(min_sparsity=value)


@pytest.mark.parametrize("layers", [["a"], None, "("])
def test_names_that_are_no_expression_are_refused(layers):
    with pytest.raises(UsageError, match="regular expression"):
        SwapSparse(layers=layers)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_layers_on_both_sides_of_a_node_are_undone_alone(dialect):
    net, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), (torch.randn(3, 6),)
    gm = trace(net, x, dialect)
    names, code, dense = [n.name for n in gm.graph.nodes if n.op != "get_attr"], gm.code, gm(*x)
    prune = SparsifyWeights(sparsity=0.5)
    prune(gm)
    FORCED(gm)
    assert [len(commit.rewrites) for commit in history(gm)] == [2, 2]
    assert [n.name for n in gm.graph.nodes if n.op != "get_attr"] == names
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output").all_input_nodes[0]
    assert prune.transformed(output) and FORCED.transformed(output)
    expected = gm(*x)
    history(gm)[1].rewrites[0].reverse()
    found = dict(gm.named_parameters())
    assert "0.weight" in found and "2.weight" not in found
    torch.testing.assert_close(gm(*x), expected)
    FORCED.reverse(gm)
    history(gm)[0].rewrites[1].reverse()
    assert int((gm.get_parameter("2.weight") == 0).sum()) == 0 < int((gm.get_parameter("0.weight") == 0).sum())
    prune.reverse(gm)
    assert gm.code == code and torch.equal(gm(*x), dense)


def test_random_numbers_after_it_are_those_without_it():
    gm = trace(nn.Sequential(thin(nn.Linear(64, 64), 0.9)), (torch.randn(8, 64),), "aten")
    before = torch.get_rng_state()
    SwapSparse()(gm)
    SwapSparse(measure=False)(gm)
    assert torch.equal(torch.get_rng_state(), before)


@given(
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    order=st.permutations([0, 1]),
    dialect=st.sampled_from(DIALECTS),
    seed=st.integers(0, 100),
)
def test_pruned_and_swapped_is_undone_in_any_order(sparsity, order, dialect, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = (torch.randn(3, 6),)
    gm = trace(net, x, dialect)
    owned, code, expected = state(gm), gm.code, gm(*x)
    passes = [SparsifyWeights(sparsity=sparsity), SwapSparse(measure=False)]
    for p in passes:
        p(gm)
    for i in order:
        passes[i].reverse(gm)
    assert state(gm) == owned and gm.code == code and torch.equal(gm(*x), expected)


def test_a_compressed_model_of_transformers_trains():
    from fxopt.models import build

    model = build("bert-base-tiny")
    inputs = {"input_ids": torch.randint(0, 99, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    gm = fxopt.capture(model, inputs)
    SparsifyWeights(sparsity=0.9, layers=r".*(attention|intermediate|output).*")(gm)
    expected = gm(**inputs)
    FORCED(gm)
    found = gm(**inputs)
    for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(history(gm)[-1].rewrites) > 0
    torch.utils._pytree.tree_leaves(found)[0].sum().backward()
    assert any(n.endswith("values") and p.grad is not None for n, p in gm.named_parameters())
