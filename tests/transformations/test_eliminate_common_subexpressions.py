import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.history import history
from fxopt.text import show
from fxopt.transformations.eliminate_common_subexpressions import EliminateCommonSubexpressions
from tests.rewriting import DIALECTS, rewrites, trace, unchanged
from tests.transformations.captures import applies

X = (torch.randn(4, 4),)
CSE = EliminateCommonSubexpressions()


class Net(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def test_equal_chains_become_one():
    def forward(self, x):
        return (x + 1).relu() * (x + 1).relu()

    rewrites(CSE, Net(forward), X, "%0 = add(x, 1)\n%1 = relu(%0)\n%2 = mul(%1, %1)\nreturn %2", rtol=0, atol=0)


def test_a_module_called_twice_on_the_same():
    def forward(self, x):
        return self.fc(x) - self.fc(x)

    after = "%0 = linear(x, fc.weight, fc.bias)\n%1 = sub(%0, %0)\nreturn %1"
    for gm in rewrites(CSE, Net(forward, fc=nn.Linear(4, 4)), X, after, rtol=0, atol=0).values():
        assert list(gm.state_dict()) == ["fc.weight", "fc.bias"]


def test_parameters_read_by_several_nodes_are_one_value():
    def forward(self, x):
        return F.linear(x, self.fc.weight) + F.linear(x, self.fc.weight)

    rewrites(
        CSE, Net(forward, fc=nn.Linear(4, 4, bias=False)), X, "%0 = linear(x, fc.weight)\n%1 = add(%0, %0)\nreturn %1"
    )


def test_views_and_numbers():
    def forward(self, x):
        return x.transpose(0, 1) @ x.transpose(0, 1), x.sum((0, -1)) / x.sum((0, -1))

    for gm in rewrites(CSE, Net(forward), X, None, rtol=0, atol=0, count=2).values():
        assert show(gm).count("transpose") == show(gm).count("sum") == 1


def test_a_repetition_after_a_write_repeats_what_comes_after_it():
    def forward(self, x):
        y = x + 0.0
        y.add_(1)
        return y * 2 + y * 2

    gm = rewrites(CSE, Net(forward), X, None, rtol=0, atol=0)["function"]
    assert show(gm).count("mul") == 1


def test_one_of_two_may_be_returned():
    def forward(self, x):
        return x.relu(), x.relu() * 2

    rewrites(CSE, Net(forward), X, "%0 = relu(x)\n%1 = mul(%0, 2)\nreturn [%0, %1]", count=1)


def written_between(self, x):
    y = x + 0.0
    a = y * 2
    y.add_(1)
    return a + y * 2


def written_through_a_view(self, x):
    y = x + 0.0
    a = y * 2
    y.view(-1).add_(1)
    return a + y * 2


def first_written_to(self, x):
    a = x * 2
    b = x * 2
    a.add_(1)
    return a - b


def second_written_to(self, x):
    a = x * 2
    b = x * 2
    b.add_(1)
    return a - b


def view_of_the_second_written_to(self, x):
    a = x * 2
    b = x * 2
    b.view(-1).add_(1)
    return a - b


def input_written_to(self, x):
    a = x * 2
    x.add_(1)
    return a - x * 2


def both_returned(self, x):
    return x * 2, x * 2


def returned_through_views(self, x):
    return (x * 2).view(-1), (x * 2).view(4, 4)


def random(self, x):
    return F.dropout(x, 0.5, training=True) - F.dropout(x, 0.5, training=True)


def drawn(self, x):
    return torch.rand_like(x) - torch.rand_like(x)


@pytest.mark.parametrize(
    ("forward", "reason", "dialects"),
    [
        (written_between, None, DIALECTS),
        (written_through_a_view, None, DIALECTS),
        (first_written_to, "is written to in place", DIALECTS),
        (second_written_to, "is written to in place", DIALECTS),
        (view_of_the_second_written_to, "is written to in place", DIALECTS),
        (input_written_to, None, DIALECTS),
        (both_returned, "both are outputs of the graph", DIALECTS),
        (returned_through_views, "both are outputs of the graph", DIALECTS),
        (random, "both draw random numbers", DIALECTS),
        (drawn, "both draw random numbers", ("aten",)),
        (lambda self, x: (x + 1) - (x + 1.0), None, DIALECTS),
        (lambda self, x: x * 0.0 - x * -0.0, None, DIALECTS),
        (lambda self, x: x.sum(0) - x.sum(0, keepdim=True), None, DIALECTS),
        (lambda self, x: x.view(2, 8).sum() - x.view(8, 2).sum(), None, DIALECTS),
        (lambda self, x: torch.empty(0).sum() + torch.empty(0).sum() + x, "uninitialised", ("aten",)),
    ],
)
def test_near_misses(forward, reason, dialects):
    unchanged(CSE, Net(forward), X, reason, dialects=dialects)


def test_two_batch_norms_that_update_their_statistics_are_two():
    def forward(self, x):
        return self.norm(x) - self.norm(x)

    unchanged(CSE, Net(forward, norm=nn.BatchNorm1d(4)), X, None, dialects=("module", "aten"), training=True)


def test_a_module_whose_weight_is_written_to_in_between():
    def forward(self, x):
        a = self.fc(x)
        self.fc.weight.add_(1)
        return a - self.fc(x)

    fc = nn.Linear(4, 4).requires_grad_(False)
    unchanged(CSE, Net(forward, fc=fc), X, "fc holds a tensor that is written to in place", dialects=("module",))
    unchanged(CSE, Net(forward, fc=fc), X, None, dialects=("function", "aten"))


def test_a_change_of_mode_in_between():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.mul, (x, 2))
    graph.call_function(torch._C._set_grad_enabled, (False,))
    b = graph.call_function(torch.mul, (x, 2))
    graph.call_function(torch._C._set_grad_enabled, (True,))
    graph.output(graph.call_function(torch.add, (a, b)))
    gm = torch.fx.GraphModule(nn.Module(), graph)
    CSE(gm)
    assert not history(gm)[-1].rewrites


def test_outputs_do_not_begin_to_share_memory():
    gm = trace(Net(lambda self, x: (x.relu(), x.relu(), x.relu() + 1)), X, "function")
    CSE(gm)
    a, b, c = gm(*X)
    assert a.data_ptr() != b.data_ptr() and torch.equal(c, a + 1)


def test_graphs_inside_the_graph():
    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, torch.fx.GraphModule)

    outer = Net(
        lambda self, x: self.inner(x) + self.inner(x), inner=symbolic_trace(Net(lambda self, x: x.cos() * x.cos()))
    )
    gm = torch.fx.GraphModule(outer, Leaf().trace(outer))
    expected = gm(*X)
    CSE(gm)
    assert show(gm).count("inner") == 1 and show(gm.inner).count("cos") == 1
    assert torch.equal(gm(*X), expected)


@pytest.mark.slow
def test_captured_models():
    applies(CSE, "bert", 1)  # the mask's index over keys repeats that over queries: arange, +0, two unsqueeze
    applies(CSE, "gpt2", 2)  # the same twice, and the positions expanded twice
    applies(CSE, "resnet", 0)


OPERATIONS = [
    lambda a, b: a + b,
    lambda a, b: a.relu(),
    lambda a, b: a.reshape(-1).reshape(3, 3),
    lambda a, b: a.t(),
    lambda a, b: a.add_(1),
    lambda a, b: a.mul_(b.clone()),
    lambda a, b: a.clone(),
    lambda a, b: a.contiguous(),
]


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9), st.integers(0, 9)), max_size=12), st.data())
def test_any_program_with_writes_computes_the_same(program, data):
    returned = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))

    def forward(self, x):
        values = [x, x + 0]
        for which, i, j in program:
            values.append(OPERATIONS[which](values[i % len(values)], values[j % len(values)]))
        return tuple(values[i % len(values)] for i in returned)

    inputs = (torch.randn(3, 3),)
    _same_after(CSE, trace(Net(forward), inputs, "function"))
    _same_after(CSE, make_fx(Net(forward), tracing_mode="fake")(*inputs))


def _same_after(transformation, gm):
    x = torch.randn(3, 3)
    before_input, after_input = x.clone(), x.clone()
    before = gm(before_input)
    code = gm.code
    transformation(gm)
    after = gm(after_input)
    assert all(map(torch.equal, before, after)) and torch.equal(before_input, after_input)
    assert [[_shared(a, b) for a in before] for b in before] == [[_shared(a, b) for a in after] for b in after]
    transformation.reverse(gm)
    assert gm.code == code


def _shared(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
