"""Terms and what they match; the reason and the node where they do not."""

import operator
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule

from fxopt import vocabulary as v
from fxopt.pattern import (
    AnyOf,
    Constant,
    Match,
    Miss,
    Number,
    OptionalConstant,
    OptionalTensor,
    Shared,
    Tensor,
    Var,
    candidates,
    match,
    roots,
    value,
)
from tests.rewriting import trace

X = (torch.randn(2, 3),)
DIALECTS = ("module", "function", "aten")


class Net(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.compute, self.fc, self.act = compute, nn.Linear(3, 3), nn.ReLU()

    def forward(self, x):
        return self.compute(self, x)


def last(gm):
    """The node whose value is returned."""
    result = gm.graph.output_node().args[0]
    return result[0] if isinstance(result, tuple) else result


def matched(pattern, compute, dialects=DIALECTS, root=last):
    """The bindings of ``pattern``, the same in every dialect."""
    found = []
    for dialect in dialects:
        gm = trace(Net(compute), X, dialect)
        result = match(gm, pattern, root(gm))
        assert isinstance(result, Match), f"{dialect}: {result}"
        found.append({k: b if isinstance(b, int | float | str | None) else str(b) for k, b in result.bindings.items()})
    assert found.count(found[0]) == len(found) or len(dialects) == 1 or set(found[0]) == set(found[-1])
    return found[0]


def missed(pattern, compute, reason, dialects=DIALECTS, root=last):
    for dialect in dialects:
        gm = trace(Net(compute), X, dialect)
        result = match(gm, pattern, root(gm))
        assert isinstance(result, Miss), f"{dialect}: {result}"
        assert re.search(reason, result.reason), f"{dialect}: {result}"
        assert str(result) == f"{result.node}: {result.reason}"


LINEAR_RELU = v.relu(v.linear(Tensor("x"), Constant("w"), OptionalTensor("b")))


def test_one_pattern_matches_in_every_dialect():
    assert matched(LINEAR_RELU, lambda m, x: m.act(m.fc(x)))["x"] == "x"
    assert matched(LINEAR_RELU, lambda m, x: F.relu(m.fc(x)))["x"] == "x"
    for dialect, said in (("module", "module"), ("function", "function"), ("aten", "aten")):
        gm = trace(Net(lambda m, x: m.act(m.fc(x))), X, dialect)
        found = match(gm, LINEAR_RELU, last(gm))
        assert found.dialect == said and found.nodes[0] is last(gm) and len(found.nodes) == 2


def test_another_operation_is_a_miss_at_the_root():
    missed(LINEAR_RELU, lambda m, x: m.fc(x).tanh(), "tanh.* is not relu")
    missed(LINEAR_RELU, lambda m, x: x.cos().relu(), "cos.* is not linear")


def test_what_is_left_out_must_have_its_default():
    scaled = v.softmax(Tensor("x"), Var("dim"))
    assert matched(scaled, lambda m, x: x.softmax(-1)) == {"x": "x", "dim": -1}
    missed(scaled, lambda m, x: x.softmax(-1, dtype=torch.float64), r"expected None, found torch\.float64")
    assert matched(v.softmax(Tensor("x"), Var("dim"), ...), lambda m, x: x.softmax(-1, dtype=torch.float64))
    missed(v.div(Tensor("x"), Number("c")), lambda m, x: torch.div(x, 2, rounding_mode="floor"), "found 'floor'")
    missed(v.add(Tensor("x"), Tensor("y")), lambda m, x: torch.add(x, x.cos(), alpha=2), "expected 1, found 2")


def test_a_commutative_operation_matches_both_ways():
    pattern = v.mul(v.sigmoid(Tensor("x")), Tensor("x"))
    assert matched(pattern, lambda m, x: x.sigmoid() * x) == {"x": "x"}
    assert matched(pattern, lambda m, x: x * x.sigmoid()) == {"x": "x"}
    assert matched(v.mul(Number("c"), Tensor("x")), lambda m, x: 2.5 * x) == {"x": "x", "c": 2.5}
    missed(v.sub(v.sigmoid(Tensor("x")), Tensor("x")), lambda m, x: x - x.sigmoid(), "x is not sigmoid")


def test_one_variable_is_one_value():
    pattern = v.add(v.cos(Tensor("x")), v.sin(Tensor("x")))
    assert matched(pattern, lambda m, x: x.cos() + x.sin()) == {"x": "x"}
    missed(pattern, lambda m, x: x.cos() + x.exp().sin(), "x is both x and exp")


def test_one_parameter_read_by_two_nodes_is_one_value():
    pattern = v.add(v.linear(Tensor("x"), Constant("w"), None), v.linear(Tensor("y"), Constant("w"), None))
    missing = v.add(v.linear(Tensor("x"), Constant("w"), None), v.linear(Tensor("y"), Constant("v"), None))

    def twice(m, x):
        return F.linear(x, m.fc.weight) + F.linear(x.cos(), m.fc.weight)

    for dialect in ("function", "aten"):
        gm = trace(Net(twice), X, dialect)
        for term in (pattern, missing):
            assert isinstance(match(gm, term, last(gm)), Match)


def test_kinds_of_variables():
    power = v.pow(Tensor("x"), Number("n"))
    assert matched(power, lambda m, x: x**3)["n"] == 3
    missed(power, lambda m, x: x ** x.cos(), "n = cos.* is not a Number")
    missed(v.mul(Tensor("x"), Number("n")), lambda m, x: x * True, "n = True is not a Number", ("function",))
    missed(v.linear(Tensor("x"), Constant("w")), lambda m, x: F.linear(x, x.cos()), "w = cos.* is not a Constant")
    biased = v.linear(Tensor("x"), Constant("w"), OptionalConstant("b"))
    assert matched(biased, lambda m, x: F.linear(x, m.fc.weight))["b"] is None
    assert matched(biased, lambda m, x: m.fc(x))["b"] is not None
    missed(
        biased, lambda m, x: F.linear(x, m.fc.weight, x[0]), "b = .* is not a OptionalConstant", ("function", "aten")
    )
    optional = v.linear(Tensor("x"), Constant("w"), OptionalTensor("b"))
    assert matched(optional, lambda m, x: F.linear(x, m.fc.weight, x[0].cos()))["b"] == "cos"


def test_any_of_takes_the_first_that_matches_and_says_which():
    gate = AnyOf((v.relu(Tensor("x")), {"kind": "relu"}), (v.tanh(Tensor("x")), {"kind": "tanh"}), v.cos(Tensor("x")))
    assert matched(gate, lambda m, x: x.relu()) == {"x": "x", "kind": "relu"}
    assert matched(gate, lambda m, x: x.tanh()) == {"x": "x", "kind": "tanh"}
    assert matched(gate, lambda m, x: x.cos()) == {"x": "x"}
    missed(gate, lambda m, x: x.sin(), "sin.* is not")
    assert roots(gate) == {v.relu, v.tanh, v.cos} and roots(LINEAR_RELU) == {v.relu}


def test_what_one_term_of_any_of_bound_is_forgotten_when_it_fails():
    pattern = AnyOf(v.add(v.cos(Tensor("a")), v.sin(Tensor("b"))), v.add(v.cos(Tensor("c")), Tensor("d")))
    assert set(matched(pattern, lambda m, x: x.cos() + x.exp())) == {"c", "d"}


def test_any_of_explains_itself_by_the_term_that_came_furthest():
    pattern = AnyOf(v.relu(v.cos(v.sin(Tensor("x")))), v.relu(v.tanh(Tensor("x"))))
    missed(pattern, lambda m, x: x.exp().cos().relu(), "exp is not sin")


def test_an_inner_value_that_others_read_is_a_miss_that_names_them():
    def compute(m, x):
        y = m.fc(x)
        return y.relu(), y.cos()

    missed(LINEAR_RELU, compute, "(fc|linear) has other users: relu, cos", root=lambda gm: last(gm))


def test_a_shared_value_may_have_other_users():
    def compute(m, x):
        y = m.fc(x)
        return y.relu(), y.cos()

    pattern = v.relu(Shared(v.linear(Tensor("x"), Constant("w"), OptionalTensor("b"))))
    for dialect in DIALECTS:
        gm = trace(Net(compute), X, dialect)
        found = match(gm, pattern, last(gm))
        assert isinstance(found, Match)
        assert found.nodes == [last(gm)] and [n.users.keys() >= {last(gm)} for n in found.shared] == [True]


def test_the_root_may_have_any_number_of_users():
    def compute(m, x):
        y = m.fc(x).relu()
        return y, y.cos(), y.sin()

    assert matched(LINEAR_RELU, compute)["x"] == "x"


def test_an_assertion_of_export_is_no_user():
    pattern = v.to(v.cos(Tensor("x")), dtype=torch.float64)
    gm = trace(Net(lambda m, x: x.cos().double()), X, "aten")
    found = match(gm, pattern, last(gm))
    assert isinstance(found, Match)
    assert sum("_assert_tensor_metadata" in str(n.target) for n in found.nodes) == 1


def test_a_write_in_place_to_a_fresh_inner_value_is_none():
    def fresh(m, x):
        return F.relu(m.fc(x), inplace=True)

    assert matched(LINEAR_RELU, fresh, ("module", "function"))["x"] == "x"
    assert matched(v.relu(v.add(Tensor("x"), Tensor("y"))), lambda m, x: torch.relu_(x + x.cos()))


def test_a_write_in_place_to_the_input_or_to_what_others_see_is_a_miss():
    missed(v.relu(Tensor("x")), lambda m, x: torch.relu_(x), "relu_.* writes to x in place")

    def seen(m, x):
        y = m.fc(x)
        z = y.relu_()
        return z, y

    missed(LINEAR_RELU, seen, "writes to (fc|linear) in place|has other users", ("module", "function"))

    def through_a_view(m, x):
        y = x.cos()
        return y.view(-1).relu_(), y

    missed(v.relu(v.view(Tensor("x"), ...)), through_a_view, "writes to view in place")


def test_nothing_between_may_write_to_what_the_match_reads():
    def crossed(m, x):
        y = x.clone()
        z = y.cos()
        y.add_(1)
        return z.sin(), y

    pattern = v.sin(v.cos(Tensor("y")))
    missed(pattern, crossed, "add_ writes in place to clone, which is read on both sides of it")

    def through_a_view(m, x):
        y = x.clone()
        z = y.cos()
        y.view(-1).add_(1)
        return z.sin(), y

    missed(pattern, through_a_view, "writes in place to view")


def test_a_write_before_or_after_the_match_or_to_something_else_is_fine():
    def around(m, x):
        y, other = x.clone(), x.exp()
        y.add_(1)
        z = y.cos()
        other.add_(1)
        w = z.sin()
        y.add_(2)
        return w, y, other

    assert matched(v.sin(v.cos(Tensor("y"))), around) == {"y": "clone"}


def test_an_unknown_call_between_may_write_to_what_it_is_given():
    graph = Graph()
    x = graph.placeholder("x")
    z = graph.call_function(torch.cos, (x,))
    graph.call_function(operator.setitem, (x, 0, 1.0))
    graph.output(graph.call_function(torch.sin, (z,)))
    gm = GraphModule({}, graph)
    found = match(gm, v.sin(v.cos(Tensor("x"))), last(gm))
    assert isinstance(found, Miss) and "setitem writes in place to x" in found.reason


def test_a_module_that_cannot_be_read_says_why():
    def hook(m, x):
        return m.act(m.fc(x))

    net = Net(hook)
    net.fc.register_forward_hook(lambda *a: None)
    gm = trace(net, X, "module")
    found = match(gm, LINEAR_RELU, last(gm))
    assert isinstance(found, Miss) and found.reason == "fc has hooks" and found.node.target == "fc"


def test_tuples_match_item_by_item():
    pair = v.cat((v.cos(Tensor("a")), Tensor("b")), dim=-1)
    assert set(matched(pair, lambda m, x: torch.cat([x.cos(), x], -1))) == {"a", "b"}
    assert set(matched(v.cat([Tensor("a"), Tensor("b")], -1), lambda m, x: torch.cat([x.cos(), x], -1))) == {"a", "b"}
    missed(pair, lambda m, x: torch.cat([x.cos(), x, x], -1), "expected .*, found")
    missed(pair, lambda m, x: torch.cat([x.sin(), x], -1), "sin is not cos")


def test_candidates_are_the_nodes_of_the_root_s_operation():
    gm = trace(Net(lambda m, x: m.act(m.fc(x)).relu() + 1), X, "module")
    assert [n.name for n in candidates(gm, LINEAR_RELU)] == ["act", "relu"]


def test_what_is_known_of_a_value():
    gm = trace(Net(lambda m, x: m.fc(x).relu()), X, "function")
    nodes = {n.name: n for n in gm.graph.nodes}
    assert value(gm, nodes["fc_weight"]) is gm.fc.weight
    assert value(gm, nodes["relu"]).shape == (2, 3)
    assert value(gm, 3) is None
    del nodes["relu"].meta["val"]
    assert value(gm, nodes["relu"]) is None


def test_a_term_reads_as_it_is_written():
    assert repr(v.mul(Tensor("x"), Number("c"))) == "mul(x, c)"


def test_a_term_cannot_have_arguments_that_the_operation_has_not():
    with pytest.raises(TypeError):
        v.relu(Tensor("x"), colour="red")
