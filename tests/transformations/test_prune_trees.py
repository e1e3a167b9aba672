import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn
from torch.fx import Interpreter, symbolic_trace
from torch.utils._pytree import tree_leaves

import fxopt.pruning as P
from fxopt.capture import capture
from fxopt.delta import graphs, share
from fxopt.errors import TransformationError, UsageError
from fxopt.history import history
from fxopt.shapes import propagate
from fxopt.store import load, save
from fxopt.transformations import PruneTrees
from fxopt.transformations.prune_trees import Fit, Matching, trees
from tests.graphs import cases


def tensors(value):
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


def state(gm):
    inner = {
        p: [(n.name, n.op, str(n.target), n.args, sorted(n.meta)) for n in g.graph.nodes] for p, g in graphs(gm).items()
    }
    return gm.code, str(inner), [(k, id(v)) for k, v in gm.state_dict(keep_vars=True).items()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


class Patched(Interpreter):
    """What the graph computes if ``exit`` had the value of ``entry``: the definition of a removal."""

    def __init__(self, gm, entry, exit):
        super().__init__(gm)
        self.entry, self.exit, self.kept = entry, exit, None

    def run_node(self, n):
        value = super().run_node(n)
        if n.name == self.entry:
            self.kept = value.clone()
        return self.kept if n.name == self.exit else value


class Block(nn.Module):
    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(12, width)

    def attention(self, x):
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, 8)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x)))


X = torch.randn(2, 6, 5)


@pytest.fixture(scope="module")
def traced():
    return capture(Model(), (X,))


@pytest.fixture
def gm(traced):
    return copy.deepcopy(traced)


class TestRandomGraphs:
    @settings(max_examples=60)
    @given(cases())
    def test_every_tree_is_what_its_name_says_and_is_undone_exactly(self, case):
        gm = propagate(case.trace(), case.inputs)
        if case.training or case.nested:
            return  # in training mode outputs are random; nested graphs have a test of their own
        before, expected = state(gm), None
        for tree in trees(gm):
            if tree.kind in ("heads", "cat", "layer"):
                continue
            with torch.no_grad():
                reference = Patched(copy.deepcopy(gm), tree.entry, tree.exit).run(*case.inputs)
                expected = gm(*case.inputs)
                left = sum(p.numel() for p in gm.parameters())
                PruneTrees((tree,))(gm)
                got = gm(*case.inputs)
            for a, b in zip(tensors(reference), tensors(got), strict=True):
                torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-5)
            assert left - sum(p.numel() for p in gm.parameters()) == tree.elements > 0
            PruneTrees((tree,)).reverse(gm)
            assert state(gm) == before
            assert all(
                torch.equal(x.nan_to_num(), y.nan_to_num())
                for x, y in zip(tensors(gm(*case.inputs)), tensors(expected), strict=False)
            )

    @settings(max_examples=40)
    @given(cases(dialects=("module", "function")))
    def test_undone_means_never_applied(self, case):
        if case.training or case.nested:
            return
        gm = propagate(case.trace(), case.inputs)
        found = [t for t in trees(gm) if t.kind in ("branch", "block", "operand")]
        if len(found) < 2:
            return
        first, second = PruneTrees((found[0],)), PruneTrees((found[-1],))
        alone = share(gm)
        first(gm)
        try:
            second(gm)
        except TransformationError:  # the second went with the first
            return
        first.reverse(gm)
        second(alone)
        assert state(gm)[0] == state(alone)[0] and state(gm)[2] == state(alone)[2]


class TestEnumeration:
    def test_a_transformer_has_branches_gates_heads_and_layers(self, gm):
        found = trees(gm)
        kinds = {k: [t for t in found if t.kind == k] for k in ("branch", "operand", "heads", "layer", "block")}
        assert len(kinds["branch"]) == 6  # two in each block
        assert len(kinds["operand"]) == 6  # gate and up
        assert len(kinds["heads"]) == 6
        assert len([t for t in kinds["layer"] if t.features == (8, 12)]) == 6
        assert all(t.root is not None for t in kinds["branch"])

    def test_a_branch_is_dropped_whole_never_left_as_its_norm(self, gm):
        branches = [t for t in trees(gm) if t.kind == "branch"]
        for tree in trees(gm):
            inside = [b for b in branches if set(tree.operations) < set(b.operations)]
            for branch in inside:
                left = set(branch.parameters) - set(tree.parameters)
                assert any("norm" not in p for p in left), f"{tree.id} would leave x + norm(x)"

    def test_runs_are_longer_regions(self, gm):
        single, runs = trees(gm), trees(gm, runs=True)
        extra = [t for t in runs if t.kind == "run"]
        assert extra and len(runs) == len(single) + len(extra)
        longest = max(extra, key=lambda t: t.elements)
        assert longest.elements == sum(p.numel() for p in gm.blocks.parameters())
        PruneTrees((longest,))(gm)
        assert not any(n.startswith("blocks") for n, _ in gm.named_parameters())
        torch.testing.assert_close(gm(X), _without_blocks()(X))

    def test_modules_and_functions_are_read_too(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        gm = propagate(symbolic_trace(model), (torch.randn(3, 4),))
        assert [t.kind for t in trees(gm)] == ["block", "block", "layer"]
        PruneTrees((trees(gm)[0],))(gm)
        assert gm.get_submodule("2") is not None and not hasattr(gm, "0")

    def test_without_shapes_it_says_what_to_do(self):
        with pytest.raises(UsageError, match="propagate"):
            trees(symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))
        with pytest.raises(UsageError, match="expected a torch"):
            trees(nn.Linear(2, 2))

    def test_parameters_that_dead_code_reads_too_are_not_freed(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
                self.b.weight = self.a.weight

            def forward(self, x):
                self.a(x)
                return self.b(x).relu()

        gm = propagate(symbolic_trace(Net()), (torch.randn(3, 4),))
        (tree,) = trees(gm)
        assert tree.parameters == ("b.bias",) and tree.elements == 4
        PruneTrees((tree,))(gm)
        assert [n for n, _ in gm.named_parameters()] == ["a.weight", "a.bias"]

    def test_it_prints_as_a_table_and_draws_itself(self, gm):
        found = trees(gm)
        assert "branch" in repr(found) and f"{len(found)} in" in repr(found)
        picture = found.picture()
        assert picture.count("<rect") >= len(found) and picture.startswith("<svg")
        assert picture in found._repr_html_()

    def test_words_exclude_whole_names(self, gm):
        found = trees(gm)
        assert not any("blocks.1." in " ".join(t.parameters) for t in found.without(["blocks.1"]))
        assert len(found.without(["block"])) == len(found)

    def test_in_place_operators_are_no_wall(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

            def forward(self, x):
                y = self.b(self.a(x)).relu_()
                y += x
                return y.relu_()

        x = torch.randn(2, 3, 5, 5)
        gm = capture(Net(), (x,), dynamic=False)
        before, code = gm(x), gm.code
        branch = next(t for t in trees(gm) if t.kind == "branch")
        assert gm.code == code
        PruneTrees((branch,))(gm)
        assert torch.equal(gm(x), x.relu()) and not list(gm.parameters())
        PruneTrees((branch,)).reverse(gm)
        assert gm.code == code and torch.equal(gm(x), before)


def _without_blocks():
    model = Model()
    model.blocks = nn.Identity()
    return model


class TestSeveral:
    def test_all_at_once_and_each_alone_give_one_graph(self, gm):
        going = [t for t in trees(gm) if t.kind == "branch"][1:5]
        other = copy.deepcopy(gm)
        PruneTrees(tuple(going))(gm)
        for tree in going:
            PruneTrees((tree,))(other)
        assert gm.code == other.code and len(history(gm)) == 1 and len(history(other)) == 4

    def test_any_one_comes_back_at_any_time(self, gm, traced):
        going = [t for t in trees(gm) if t.kind == "branch"]
        for tree in going:
            PruneTrees((tree,))(gm)
        for i, tree in enumerate(going):
            rest = copy.deepcopy(gm)
            PruneTrees((tree,)).reverse(rest)
            alone = copy.deepcopy(traced)
            PruneTrees(tuple(t for j, t in enumerate(going) if j != i))(alone)
            assert torch.equal(rest(X), alone(X))

    def test_inner_trees_go_with_outer_ones_whatever_the_order(self, gm):
        found = trees(gm)
        outer = next(t for t in found if t.kind == "branch")
        inner = next(t for t in found if t.kind == "block" and set(t.operations) < set(outer.operations))
        other = copy.deepcopy(gm)
        PruneTrees((inner, outer))(gm)
        PruneTrees((outer,))(other)
        assert gm.code == other.code

    def test_what_is_not_there_is_said_and_nothing_is_changed(self, gm):
        before = state(gm)
        for wrong in ("add_99:0", "nothing..here", "no name", "x#0", "other/add:0"):
            with pytest.raises(TransformationError, match=r"there|name|graph"):
                PruneTrees((trees(gm)[0].id, wrong))(gm)
            assert state(gm) == before
        with pytest.raises(UsageError, match="expected pruning trees"):
            PruneTrees((3,))
        with pytest.raises(UsageError, match="unequal"):
            PruneTrees((), unequal="x")

    def test_saved_and_loaded_with_its_history(self, gm, tmp_path):
        branch = next(t for t in trees(gm) if t.kind == "branch")
        before = gm(X)
        PruneTrees((branch,), fits=(Fit(branch.id, torch.eye(8), torch.zeros(8)),))(gm)
        save(gm, tmp_path / "m")
        again = load(tmp_path / "m")
        assert equal(again(X), gm(X))
        history(again).undo(0)
        assert equal(again(X), before)


class TestLayers:
    @pytest.fixture
    def two(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 9), nn.ReLU())
        x = torch.randn(7, 6)
        return capture(model, (x,)), x

    def test_adjacent_linears_fold_exactly(self, two):
        gm, x = two
        before = gm(x)
        first = next(t for t in trees(gm) if t.features == (6, 16))
        PruneTrees((first,), unequal="fold")(gm)
        torch.testing.assert_close(gm(x), before)
        assert sorted(tuple(p.shape) for p in gm.parameters()) == [(4,), (4, 6), (9,), (9, 4)]

    def test_low_rank_is_the_best_of_its_rank(self, two):
        gm, _x = two
        last = next(t for t in trees(gm) if t.features == (4, 9))
        weight = dict(gm.named_parameters())[last.root].detach()
        PruneTrees((last,), unequal="low_rank", rank=0.9)(gm)
        thin, wide = (p for n, p in gm.named_parameters() if "low_rank" in n and p.dim() == 2)
        rank = int(0.9 * 4 * 9 / 13)
        u, s, v = torch.linalg.svd(weight)
        torch.testing.assert_close(wide @ thin, u[:, :rank] * s[:rank] @ v[:rank])

    def test_pad_and_match_select_channels(self, two):
        gm, x = two
        last = next(t for t in trees(gm) if t.features == (4, 9))
        inner = Patched(copy.deepcopy(gm), last.entry, "")
        inner.run(x)
        PruneTrees((last,), unequal="pad")(gm)
        out = gm(x)
        torch.testing.assert_close(out[:, :4], inner.kept.relu())
        assert not out[:, 4:].any()
        PruneTrees((last,), unequal="pad").reverse(gm)
        PruneTrees((last,), unequal="match")(gm)
        got = gm(x)
        assert (got.abs().sum(0) > 0).sum() <= 4  # each input channel once
        with pytest.raises(TransformationError, match="no linear layer follows"):
            history(gm).checkout(0)
            PruneTrees((last,), unequal="fold")(gm)

    def test_matching_follows_the_weights_not_the_positions(self):
        from fxopt.transformations._stand_ins import matched

        weight = torch.zeros(3, 5)
        weight[0, 4], weight[1, 0], weight[2, 2] = 2.0, 1.0, 3.0
        assert matched(weight).tolist() == [4, 0, 2]

    @pytest.mark.parametrize(("inputs", "features"), ((12, 6), (6, 12)))
    def test_the_difference_is_pruned_and_the_rest_is_the_identity(self, inputs, features, tmp_path):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(5, inputs), nn.GELU(), nn.Linear(inputs, features), nn.GELU(), nn.Linear(features, 3)
        )
        pick = torch.randperm(max(inputs, features))[: min(inputs, features)]
        with torch.no_grad():  # the layer in the middle passes channels on in another order, with some noise
            weight = model[2].weight
            weight *= 0.02
            for i, j in enumerate(pick.tolist()):
                weight[(i, j) if inputs > features else (j, i)] = 1.0
        x = torch.randn(64, 5)
        gm = capture(model, (x,))
        tree = next(t for t in trees(gm) if t.features == (inputs, features))
        found = P.match(gm, tree, P.Calibration.of([x]))
        hidden = model[1](model[0](x)).detach()
        alike = torch.corrcoef(torch.cat([hidden, model[2](hidden).detach()], 1).T)[inputs:, :inputs]
        for out, channel in enumerate(found.channels):
            assert channel < 0 or int(alike[out].argmax()) == channel
        assert sorted(c for c in found.channels if c >= 0) == sorted(
            set(pick.tolist() if inputs > features else range(6))
        )
        before, output = state(gm), gm(x)
        PruneTrees((tree,), fits=(found,))(gm)
        channels = torch.tensor(found.channels)
        kept = (channels >= 0).nonzero()[:, 0]
        expected = F.linear(F.gelu(hidden[:, channels[kept]]), model[4].weight[:, kept], model[4].bias)
        torch.testing.assert_close(gm(x), expected)
        assert max(max(p.shape) for p in gm.parameters()) == 6 and sum(p.dim() == 2 for p in gm.parameters()) == 2
        save(gm, tmp_path / "m")
        again = load(tmp_path / "m")
        assert torch.equal(again(x), gm(x))
        history(again).undo(0)
        assert torch.equal(again(x), output)
        PruneTrees((tree,), fits=(found,)).reverse(gm)
        assert state(gm) == before and torch.equal(gm(x), output)

    def test_a_strided_convolution_has_no_matching(self):
        x = torch.randn(4, 3, 8, 8)
        gm = capture(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)), (x,))
        tree = next(t for t in trees(gm) if t.features == (4, 6))
        with pytest.raises(TransformationError, match="changes more than the channels"):
            PruneTrees((tree,), fits=(P.match(gm, tree, P.Calibration.of([x])),))(gm)

    def test_a_matching_that_does_not_fit_is_refused(self, two):
        gm, _ = two
        last = next(t for t in trees(gm) if t.features == (4, 9))
        before = state(gm)
        for wrong in ((0, 1), (0, 0, 1, 2, 3, -1, -1, -1, -1), (0, 1, 2, 4, -1, -1, -1, -1, -1)):
            with pytest.raises(TransformationError, match="match"):
                PruneTrees((last,), fits=(Matching(last.id, wrong),))(gm)
            assert state(gm) == before

    def test_of_equal_size_by_a_fit_of_its_own(self, gm):
        branch = next(t for t in trees(gm) if t.kind == "branch")
        weight, bias = torch.randn(8, 8), torch.randn(8)
        interpreter = Patched(copy.deepcopy(gm), branch.entry, "")
        interpreter.run(X)
        PruneTrees((branch,), fits=(Fit(branch.id, weight, bias),))(gm)
        node = next(n for n in gm.graph.nodes if "fitted" in str(n.args))
        values = Patched(copy.deepcopy(gm), node.name, "")
        values.run(X)
        torch.testing.assert_close(values.kept, F.linear(interpreter.kept, weight, bias))

    @pytest.mark.parametrize("order", ((0, 1), (1, 0)), ids=str)
    @pytest.mark.parametrize("cast", (False, True))
    def test_fitted_layers_one_behind_the_other_become_one(self, order, cast):
        model = Model()
        if cast:
            for block in model.blocks:
                block.register_forward_hook(lambda module, given, y: y.to(y.dtype))
                block.norm2.register_forward_pre_hook(lambda module, given: given[0].to(given[0].dtype))
        gm = capture(model, (X,))
        assert ("to" in {n.target._opname for n in gm.graph.nodes if n.op == "call_function"}) == cast
        first, second = [t for t in trees(gm) if t.kind == "branch"][1:3]
        made = [Fit(t.id, torch.randn(8, 8), torch.randn(8)) for t in (first, second)]
        alone, before = copy.deepcopy(gm), state(gm)
        PruneTrees((second,), fits=(made[1],))(alone)
        for i in order:
            PruneTrees(((first, second)[i],), fits=(made[i],))(gm)
        assert sum("fitted" in n for n, _ in gm.named_parameters()) == 2  # a weight and a bias

        model = Model().double()
        h = model.embed(X.double())
        h = h + model.blocks[0].attention(model.blocks[0].norm(h))
        for stand_in in made:
            h = F.linear(h, stand_in.weight.double(), stand_in.bias.double())
        y = model.blocks[1].norm2(h)
        h = h + model.blocks[1].down(F.silu(model.blocks[1].gate(y)) * model.blocks[1].up(y))
        torch.testing.assert_close(gm(X), model.head(model.blocks[2](h)).float(), rtol=1e-5, atol=1e-5)

        PruneTrees((first,), fits=(made[0],)).reverse(gm)
        assert torch.equal(gm(X), alone(X))
        PruneTrees((second,), fits=(made[1],)).reverse(gm)
        assert state(gm) == before


class TestConcatenations:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(7, 5)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], -1).relu())

    def test_a_dropped_operand_takes_its_columns_along(self):
        x, model = torch.randn(6, 4), self.Net()
        gm = capture(model, (x,))
        cat = [t for t in trees(gm) if t.kind == "cat"]
        assert len(cat) == 2
        PruneTrees((cat[1],))(gm)
        expected = F.linear(model.a(x).relu(), model.c.weight[:, :4], model.c.bias)
        torch.testing.assert_close(gm(x), expected)
        assert {tuple(p.shape) for p in gm.parameters()} == {(4, 4), (4,), (5, 4), (5,)}
        PruneTrees((cat[1],)).reverse(gm)
        torch.testing.assert_close(gm(x), model(x))

    def test_a_tensor_joined_with_itself_sums_the_columns(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.c = nn.Linear(4, 4), nn.Linear(8, 5)

            def forward(self, x):
                y = x.tanh()
                return self.c(torch.cat([self.a(y), y], -1))

        x, model = torch.randn(6, 4), Net()
        gm = capture(model, (x,))
        block = next(t for t in trees(gm) if t.kind == "block")
        PruneTrees((block,))(gm)
        expected = F.linear(x.tanh(), model.c.weight[:, :4] + model.c.weight[:, 4:], model.c.bias)
        torch.testing.assert_close(gm(x), expected)
        assert "cat" not in gm.code


class TestHeads:
    def test_a_group_goes_with_its_heads(self, gm):
        heads = [t for t in trees(gm) if t.kind == "heads"][:1]
        left = sum(p.numel() for p in gm.parameters())
        PruneTrees((heads[0],))(gm)
        assert left - sum(p.numel() for p in gm.parameters()) == heads[0].elements
        reference = Model()
        with torch.no_grad():
            reference.blocks[0].o.weight[:, :4] = 0  # the first head's output goes nowhere
        torch.testing.assert_close(gm(X), reference(X))

    def test_the_last_group_stays(self, gm):
        both = [t for t in trees(gm) if t.kind == "heads"][:2]
        assert operator.eq(*(t.exit for t in both))
        with pytest.raises(TransformationError, match="one has to stay"):
            PruneTrees(tuple(both))(gm)


def test_a_tree_in_a_graph_inside():
    inner = propagate(symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), (torch.randn(2, 4),))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 2

    from torch.fx import GraphModule, Tracer

    class Leaf(Tracer):
        def is_leaf_module(self, m, name):
            return name == "inner"

    outer = Outer()
    gm = GraphModule(outer, Leaf().trace(outer))
    x = torch.randn(2, 4)
    propagate(gm, (x,))
    tree = next(t for t in trees(gm) if t.graph == "inner")
    assert tree.id.startswith("inner/")
    before = gm(x)
    PruneTrees((tree,))(gm)
    assert torch.equal(gm(x), x * 2)
    PruneTrees((tree,)).reverse(gm)
    assert torch.equal(gm(x), before)
