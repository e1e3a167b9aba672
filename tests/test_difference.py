"""diff: two columns that hold both graphs whole and in order, and say who changed what."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from torch.fx import GraphModule, symbolic_trace

import fxopt
from fxopt.alignment import align
from fxopt.difference import diff, of_commits
from fxopt.errors import Conflict, UsageError
from fxopt.listing import Line, listing
from fxopt.transformations import EliminateDropout, FuseLinearGELU, MergeLinears


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout()

    def forward(self, x):
        return torch.relu(x + self.drop(self.down(nn.functional.gelu(self.up(x)))))


X = (torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),)


def blocks(count=2):
    torch.manual_seed(0)
    return fxopt.capture(nn.Sequential(*(Block() for _ in range(count))), X)


def whole(found, before, after):
    """Both columns hold their graph, each line once and in order."""
    assert [r.before.text for r in found.rows if r.before] == [line.text for line in listing(before).lines()]
    assert [r.after.text for r in found.rows if r.after] == [line.text for line in listing(after).lines()]


def shown(found, width=120):
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(found)
    return captured.get()


def test_the_same_has_no_difference():
    gm = blocks()
    found = diff(gm, blocks())
    assert not found and found.summary == "no difference" and not found.changes
    assert "no difference" in repr(found)


def test_one_commit():
    gm, before = blocks(), blocks()
    EliminateDropout()(gm)
    found = fxopt.history(gm)[0].diff()
    whole(found, before, gm)
    assert [r.kind for r in found.changes] == ["removed", "changed"] * 2
    assert {r.by for r in found.changes} == {("EliminateDropout",)}
    assert found.summary == f"{len(before.graph.nodes)} → {len(gm.graph.nodes)} nodes: ~2 changed, -2 removed"
    removed, changed = found.changes[:2]
    assert removed.before.text == "dropout = dropout(linear_1, training=False)" and removed.after is None
    assert (removed.module, changed.module) == ("0.drop", "0")
    assert (changed.before.text, changed.after.text) == ("add = add(input_1, dropout)", "add = add(input_1, linear_1)")
    text = shown(found)
    assert "- dropout = dropout(linear_1, training=False)" in text and "… " in text and "unchanged" in text
    assert ".weight" in text, "a parameter is named as its module sees it"


def test_each_commit_alone_and_both_at_once():
    gm, original = blocks(), blocks()
    EliminateDropout()(gm)
    FuseLinearGELU()(gm)
    first, second = (e.diff() for e in fxopt.history(gm))
    assert {r.by for r in first.changes} == {("EliminateDropout",)}
    assert {r.by for r in second.changes} == {("FuseLinearGELU",)}
    assert [r.after.text for r in first.rows if r.after] == [r.before.text for r in second.rows if r.before]
    assert [d.to_json() for d in of_commits(gm)] == [first.to_json(), second.to_json()]
    both = diff(original, gm)
    whole(both, original, gm)
    by = {r.before.name: r.by for r in both.changes if r.before}
    assert by["dropout"] == ("EliminateDropout",) and by["gelu"] == ("FuseLinearGELU",)
    back = diff(gm, original)
    assert {r.by for r in back.changes} == {("without EliminateDropout",), ("without FuseLinearGELU",)}


def test_rewrites_alone_and_undone():
    gm = blocks()
    EliminateDropout()(gm)
    (entry,) = fxopt.history(gm)
    first, second = entry.rewrites
    assert [r.module for r in first.diff().changes] == ["0.drop", "0"]
    assert [r.module for r in second.diff().changes] == ["1.drop", "1"]
    whole(second.diff(), first_undone(), gm)
    first.reverse()
    assert [r.module for r in fxopt.history(gm)[0].diff().changes] == ["1.drop", "1"]
    assert not fxopt.history(gm)[0].rewrites[0].diff()


def test_a_commit_that_is_no_longer_there():
    gm = blocks(1)
    EliminateDropout()(gm)
    entry = fxopt.history(gm)[0]
    entry.reverse()
    with pytest.raises(UsageError, match="is not where it was in the history"):
        entry.diff()


def first_undone():
    """The graph without the second rewrite: what stands on the left of its diff."""
    gm = blocks()
    EliminateDropout()(gm)
    fxopt.history(gm)[0].rewrites[1].reverse()
    return gm


def test_a_diff_changes_nothing():
    gm = blocks()
    EliminateDropout()(gm)
    MergeLinears()(gm)
    code, state, names = gm.code, dict(gm.state_dict(keep_vars=True)), [e.signature for e in fxopt.history(gm)]
    for entry in fxopt.history(gm):
        entry.diff()
    assert gm.code == code and [e.signature for e in fxopt.history(gm)] == names
    assert all(state[k] is v for k, v in gm.state_dict(keep_vars=True).items())


class Doubled(fxopt.ReversibleTransformation):
    """Doubles the first weight, in a new parameter."""

    def transform(self, graph_module):
        path = next(n.target for n in graph_module.graph.nodes if n.op == "get_attr")
        owner, _, name = path.rpartition(".")
        inner = graph_module.get_submodule(owner)
        setattr(inner, name, nn.Parameter(getattr(inner, name).detach() * 2))


class ReluForGelu(fxopt.ReversibleTransformation):
    """Another operation in the same node."""

    def transform(self, graph_module):
        for node in graph_module.graph.nodes:
            if node.target is torch.ops.aten.gelu.default:
                node.target = torch.ops.aten.relu.default


class LastFirst(fxopt.ReversibleTransformation):
    """Another order."""

    def transform(self, graph_module):
        nodes = [n for n in graph_module.graph.nodes if n.op == "get_attr"]
        nodes[0].prepend(nodes[-1])


def test_other_values_of_a_weight():
    gm = blocks(1)
    Doubled()(gm)
    found = fxopt.history(gm)[0].diff()
    assert [str(t) for t in found.tensors] == ["0.up.weight: float32 [8, 4], other values"]
    assert [(r.kind, r.after.holds) for r in found.changes] == [("changed", "0.up.weight")]
    assert "other values" in shown(found) and "other values" in found._repr_html_()
    assert not diff(gm, gm) and diff(blocks(1), gm).changes[0].by == ("Doubled",)


def test_another_operation_in_the_same_node():
    gm = blocks(1)
    ReluForGelu()(gm)
    (row,) = fxopt.history(gm)[0].diff().changes
    assert (row.kind, row.before.text, row.after.text) == ("changed", "gelu = gelu(linear)", "gelu = relu(linear)")


def test_another_order():
    gm, before = blocks(1), blocks(1)
    LastFirst()(gm)
    found = fxopt.history(gm)[0].diff()
    whole(found, before, gm)
    assert [r.kind for r in found.changes] == ["moved", "moved"] and ">1 moved" in found.summary
    assert found.changes[0].after.key == found.changes[1].before.key


def test_captures_whose_names_differ():
    """A layer more at the front shifts all names; only that layer differs."""

    class Front(nn.Sequential):
        def forward(self, input):
            return super().forward(torch.relu(nn.functional.gelu(input)))

    torch.manual_seed(0)
    plain = fxopt.capture(nn.Sequential(*(Block() for _ in range(2))), X)
    torch.manual_seed(0)
    more = fxopt.capture(Front(*(Block() for _ in range(2))), X)
    found = diff(plain, more)
    whole(found, plain, more)
    first, second, *rest = found.changes
    assert (first.kind, first.after.text) == ("added", "gelu = gelu(input_1)")
    assert (second.kind, second.after.text) == ("added", "relu = relu(gelu)")
    assert [(r.kind, r.after.text) for r in rest] == [
        ("changed", "linear = linear(relu, .weight, .bias)"),
        ("changed", "add = add(relu, dropout)"),
    ], "what read the input"
    assert any(r.before.name == "gelu" and r.after.name == "gelu_1" for r in found.rows if r.kind == "same")


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout()

    def forward(self, x):
        return self.drop(self.a(x)) * self.b(x)


def test_trained_since_and_edited_outside():
    gm = fxopt.capture(Pair(), X)
    MergeLinears()(gm)
    EliminateDropout()(gm)
    with torch.no_grad():
        for p in gm.parameters():
            p.add_(1)
    with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op == "output")):
        gm.graph.call_function(torch.relu, (gm.graph.find_nodes(op="placeholder")[0],))
    gm.recompile()
    with pytest.raises(Conflict, match="edited since"):
        fxopt.history(gm).undo(0)
    merged, dropped = (e.diff() for e in fxopt.history(gm))
    assert any("split" in r.after.text for r in merged.changes if r.after)
    assert {r.kind for r in dropped.changes} == {"removed", "changed"}
    for found in (merged, dropped):  # what was edited outside of fxopt stands on both sides
        assert [r.kind for r in found.rows if r.after and "= relu(" in r.after.text] == ["same"]


def test_graphs_inside():
    inner = symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval())

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 1

    class Keep(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, GraphModule) or super().is_leaf_module(m, name)

    outer = Outer()
    gm = GraphModule(outer, Keep().trace(outer))
    EliminateDropout()(gm)
    found = fxopt.history(gm)[0].diff()
    assert [(r.graph, r.kind) for r in found.changes] == [("inner", "removed"), ("inner", "changed")]
    assert "inner: " in shown(found)


def test_what_is_no_graph_module():
    with pytest.raises(UsageError, match="diff was given a Linear, expected two graph modules"):
        diff(nn.Linear(1, 1), blocks(1))


def test_html_is_escaped():
    gm = symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    other = symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    next(iter(gm.graph.nodes)).name = "<script>alert(1)</script>"
    found = diff(gm, other, "<b>title</b>")
    assert "<script" not in found._repr_html_() and "<b>title" not in found._repr_html_()
    assert "&lt;script&gt;" in found._repr_html_()
    assert "[bold]" in shown(diff(gm, other, "[bold]")), "rich markup is shown, not obeyed"


def test_plain_data():
    gm = blocks(1)
    EliminateDropout()(gm)
    rows = fxopt.history(gm)[0].diff().to_json()["rows"]
    assert next(r for r in rows if r["kind"] != "same") == {
        "kind": "removed",
        "before": "dropout = dropout(linear_1, training=False)",
        "after": None,
        "graph": "",
        "module": "0.drop",
        "by": ["EliminateDropout"],
    }


def line(key, operation, module=""):
    return Line(key, f"{key} = {operation}()", f"{operation}()", operation, (), "", module, "", "", ())


columns = st.lists(st.tuples(st.integers(0, 12), st.sampled_from("ab")), max_size=10, unique_by=lambda pair: pair[0])


@given(columns, columns)
def test_both_columns_are_whole_and_in_order(left, right):
    before, after = ([line(f"n{key}", operation) for key, operation in side] for side in (left, right))
    pairs = align(before, after)
    assert [a for a, _ in pairs if a] == before and [b for _, b in pairs if b] == after
    assert all(a or b for a, b in pairs)
    for a, b in pairs:
        assert not (a and b) or a.key == b.key or a.operation == b.operation


@given(columns)
def test_a_column_is_aligned_with_itself(side):
    before, after = ([line(f"n{key}", operation) for key, operation in side] for _ in range(2))
    assert [(a.key, b.key) for a, b in align(before, after)] == [(x.key, x.key) for x in before]


def relu(x):
    return x.abs()


def test_functions_of_one_name_are_told_apart():
    model = nn.Sequential(nn.Linear(2, 2))
    gm, other = symbolic_trace(model), symbolic_trace(model)
    for graph, function in ((gm.graph, torch.relu), (other.graph, relu)):
        output = graph.output_node()
        with graph.inserting_before(output):
            output.args = (graph.create_node("call_function", function, output.args, name="relu"),)
    found = diff(gm, other)
    assert [row.kind for row in found.changes] == ["changed"]
    assert "torch.relu" in str(found) and "test_difference.relu" in str(found)
