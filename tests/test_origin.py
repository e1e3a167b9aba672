"""Where a node comes from, with and without a stack trace."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.delta import share
from fxopt.origin import source_line, source_of
from tests.bisect.planted import swap


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        y = F.relu(self.a(x))
        z = F.relu(y - 1)
        return self.b(y @ z)


class OuterOfThisFile(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = Inner(), nn.Linear(4, 4)

    def forward(self, x):
        y = self.inner(x)
        return self.last(y).tanh()


def anew(graph_module):
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function":
            swap(graph_module, node)
        elif node.op == "call_module":
            node.kwargs = {"input": node.args[0]}
            node.args = ()
        elif node.op == "call_method":
            node.kwargs = {}


@pytest.fixture
def traced():
    return torch.fx.symbolic_trace(OuterOfThisFile().eval())


def lines(gm):
    return {n.name: source_of(n.meta, n.op, n.target).partition(": ")[2] for n in gm.graph.nodes}


def test_a_traced_graph_tells_the_line_that_calls_it(traced):
    found = lines(traced)
    assert found["inner_a"] == "y = F.relu(self.a(x))"
    assert found["matmul"] == "return self.b(y @ z)" and found["sub"] == "z = F.relu(y - 1)"
    assert found["relu"] == found["relu_1"] == "def forward(self, x):"  # two lines may be it
    assert found["inner_b"] == "return self.b(y @ z)"
    assert found["last"] == found["tanh"] == ""  # it notes no class for the outermost module


@pytest.mark.parametrize("copied", (lambda gm: gm, share))
def test_a_rewrite_knows_the_outermost_module_too(traced, copied):
    gm = copied(traced)
    fxopt.compose(anew)(gm)
    found = [r.source for r in fxopt.history(gm)[0].rewrites]
    assert found and all(s.startswith("test_origin.py:") for s in found), found
    last = next(n for n in gm.graph.nodes if n.name == "last")
    assert source_of(last.meta, last.op, last.target, "OuterOfThisFile").endswith("return self.last(y).tanh()")
    assert source_of(last.meta, last.op, last.target, "NoSuchModuleAnywhere") == ""


def test_a_captured_graph_tells_its_own_lines():
    gm = fxopt.capture(OuterOfThisFile().eval(), (torch.randn(4, 4),))
    found = lines(gm)
    assert found["relu"] == "y = F.relu(self.a(x))" and found["relu_1"] == "z = F.relu(y - 1)"


def test_what_was_added_is_from_where_it_reads():
    def add(graph_module):
        (node,) = (n for n in graph_module.graph.nodes if n.name == "tanh")
        with graph_module.graph.inserting_after(node):
            new = graph_module.graph.call_function(torch.mul, (node, 2))
        node.replace_all_uses_with(new, delete_user_cb=lambda u: u is not new)

    gm = fxopt.capture(OuterOfThisFile().eval(), (torch.randn(4, 4),))
    fxopt.compose(add)(gm)
    (rewrite,) = fxopt.history(gm)[0].rewrites
    assert rewrite.source.endswith("return self.last(y).tanh()")


def test_a_class_that_was_written_as_its_name():
    meta = {"nn_module_stack": {"inner": ("inner", f"{__name__}.Inner")}}
    assert source_of(meta, "call_module", "inner.a").endswith("y = F.relu(self.a(x))")
    assert source_of({"nn_module_stack": {"i": ("i", "gone.Gone")}}, "call_module", "inner.a") == ""
    assert source_of({}, "call_function", torch.relu) == ""


def test_the_line_of_a_trace():
    trace = 'File "/x/model.py", line 3, in f\n    y = g(x)\nFile "/x/torch/nn/m.py", line 9, in h\n    z = 1\n'
    assert source_line(trace) == "model.py:3: y = g(x)"
    assert source_line("no trace") == "no trace"
