import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, symbolic_trace

from fxopt.history import history
from fxopt.text import show
from fxopt.transformations.eliminate_dead_nodes import EliminateDeadNodes
from tests.rewriting import DIALECTS, rewrites, trace, unchanged
from tests.transformations.captures import applies

X = (torch.randn(2, 8),)
TRACED = ("module", "function")  # torch.export itself drops what is dead, or returns what is written to


class Dead(nn.Module):
    """A chain of three unused nodes with parameters of its own, beside what is used."""

    def __init__(self):
        super().__init__()
        self.fc, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.fc(x)
        (self.unused(y) + 1).relu()
        return y


def test_unused_nodes_go_with_the_parameters_that_only_they_read():
    after = rewrites(
        EliminateDeadNodes(), Dead(), X, "%0 = linear(x, fc.weight, fc.bias)\nreturn %0", count=1, rtol=0, atol=0
    )
    for gm in after.values():
        assert list(gm.state_dict()) == ["fc.weight", "fc.bias"]


def test_a_parameter_that_something_else_reads_stays():
    class Net(Dead):
        def forward(self, x):
            F.linear(x, self.fc.weight).relu()
            return self.fc(x)

    for gm in rewrites(EliminateDeadNodes(), Net(), X, "%0 = linear(x, fc.weight, fc.bias)\nreturn %0").values():
        assert {"fc.weight", "fc.bias"} <= {*gm.state_dict()}


def test_an_unused_random_looking_node_goes_when_it_draws_nothing():
    class Net(nn.Module):
        def forward(self, x):
            F.dropout(x, training=False)
            F.scaled_dot_product_attention(x, x, x, dropout_p=0.0)
            return x + 1

    rewrites(EliminateDeadNodes(), Net(), X, "%0 = add(x, 1)\nreturn %0", dialects=TRACED, count=2)


class Effect(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.norm = nn.BatchNorm1d(8) if forward is statistics else None
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def write(self, x):
    y = x + 1
    y.add_(5)
    return y


def write_through_a_view(self, x):
    y = x + 1
    y.view(-1).add_(5)
    return y


def write_to_the_input(self, x):
    x.mul_(2)
    return x * 1


def write_by_index(self, x):
    y = x + 1
    y[0] = 7
    return y


def write_to_a_copy(self, x):
    (x + 1).relu_()
    return x + 1


def out(self, x):
    y = x + 1
    torch.add(x, 3, out=y)
    return y


def statistics(self, x):
    self.norm(x)
    return x + 1


def draw(self, x):
    torch.rand_like(x)
    return x + 1


def dropout(self, x):
    F.dropout(x, 0.5)
    return x + 1


def attention(self, x):
    F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    return x + 1


def in_place_by_argument(self, x):
    y = x + 1
    F.elu(y, inplace=True)
    return y


@pytest.mark.parametrize(
    ("forward", "reason", "dialects"),
    [
        (write, "writes to add.* in place", TRACED),
        (write_through_a_view, "writes to view.* in place", DIALECTS),
        (write_to_the_input, "writes to x in place", TRACED),
        (write_by_index, None, ("aten",)),
        (write_to_a_copy, "writes to add.* in place", DIALECTS),
        (out, "in place", TRACED),
        (statistics, "writes to", ("module",)),
        (draw, "random", ("aten", "function")),
        (dropout, "random", DIALECTS),
        (attention, "random", DIALECTS),
        (in_place_by_argument, "in place", TRACED),
    ],
)
def test_an_effect_stays(forward, reason, dialects):
    unchanged(EliminateDeadNodes(), Effect(forward), X, reason, dialects=dialects, training=True)


def test_an_item_assignment_in_a_traced_graph_stays():
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.clone, (x,))
    graph.call_function(__import__("operator").setitem, (y, 0, 7.0))
    graph.output(y)
    gm = GraphModule(nn.Module(), graph)
    EliminateDeadNodes()(gm)
    assert not history(gm)[-1].rewrites
    assert gm(torch.zeros(2)).tolist() == [7.0, 0.0]


def test_a_module_that_the_vocabulary_cannot_read_stays():
    class Counting(nn.Identity):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            return x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.counting = Counting()

        def forward(self, x):
            self.counting(x)
            return x + 1

    unchanged(EliminateDeadNodes(), Net(), X, "Counting", dialects=())
    from torch.fx import Tracer

    class Leaf(Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return True

    net = Net()
    gm = GraphModule(net, Leaf().trace(net))
    assert "a Counting that the vocabulary cannot read" in str(next(iter(EliminateDeadNodes().misses(gm))))
    EliminateDeadNodes()(gm)
    gm(torch.ones(2))
    assert Counting.calls == 1


def test_a_hook_is_an_effect():
    net = Dead()
    net.unused.register_forward_hook(lambda *_: None)
    gm = trace(net, X, "module")
    EliminateDeadNodes()(gm)
    assert "unused" in show(gm)


def test_the_inputs_and_the_guards_of_an_export_stay():
    class Net(nn.Module):
        def forward(self, x, y):
            return x + 1

    example = (torch.randn(4, 3), torch.randn(4, 3))
    gm = trace(Net(), example, "aten", ({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC}))
    before = [n.name for n in gm.graph.nodes]
    assert "_guards_fn" in before
    EliminateDeadNodes()(gm)
    assert [n.name for n in gm.graph.nodes] == before


def test_graphs_inside_the_graph():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = symbolic_trace(Dead())

        def forward(self, x):
            self.inner(x)
            return self.inner(x)

    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, GraphModule)

    outer = Outer()
    gm = GraphModule(outer, Leaf().trace(outer))
    expected = gm(*X)
    state = list(gm.state_dict())
    EliminateDeadNodes()(gm)
    assert show(gm).count("inner") == 1  # the unused call
    assert list(gm.state_dict()) == ["inner.fc.weight", "inner.fc.bias"]
    assert torch.equal(gm(*X), expected)
    EliminateDeadNodes().reverse(gm)
    assert list(gm.state_dict()) == state


def test_a_parameter_that_the_outer_graph_reads_too_stays():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = symbolic_trace(Dead())

        def forward(self, x):
            return self.inner(x) @ self.inner.unused.weight

    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, GraphModule)

    outer = Outer()
    gm = GraphModule(outer, Leaf().trace(outer))
    expected = gm(*X)
    EliminateDeadNodes()(gm)
    assert torch.equal(gm(*X), expected)


def test_captured_models():
    applies(EliminateDeadNodes(), "bert", 1)  # the last unsqueeze of the mask's index over heads
    applies(EliminateDeadNodes(), "gpt2", 2)  # the same, and the reading of wte.weight, which lm_head.weight is tied to
    applies(EliminateDeadNodes(), "resnet", 6)  # the readings of num_batches_tracked
