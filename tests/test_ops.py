"""What a node writes to, what it does besides computing, and whose memory its value may share."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule

from fxopt import ops, vocabulary
from fxopt.ops import Attr
from tests.rewriting import trace

aten = torch.ops.aten


def module(*parts, **named):
    root = nn.Module()
    for name, part in named.items():
        setattr(root, name, part)
    return root


class Made:
    """A graph module of one node beside three placeholders, x, y and z."""

    def __init__(self, kind, target, args="x", kwargs=None, root=None, users=True):
        graph = Graph()
        self.x, self.y, self.z = (graph.placeholder(n) for n in "xyz")
        named = {"x": self.x, "y": self.y, "z": self.z}
        values = tuple(
            named.get(a, a) if isinstance(a, str) else a for a in (args if isinstance(args, tuple) else (args,))
        )
        said = {k: named.get(v, v) if isinstance(v, str) else v for k, v in (kwargs or {}).items()}
        self.node = graph.create_node(kind, target, values, said)
        graph.output(self.node if users else self.x)
        self.gm = GraphModule(root or nn.Module(), graph)
        self.x, self.y, self.z, self.node = list(self.gm.graph.nodes)[:4]

    def writes(self):
        return ops.writes(self.gm, self.node)

    def effectful(self):
        return ops.effectful(self.gm, self.node)

    def alias(self):
        return ops.may_alias(self.gm, self.node)


@pytest.mark.parametrize(
    ("kind", "target", "args", "kwargs"),
    [
        ("call_function", torch.add, ("x", "y"), {}),
        ("call_function", operator.add, ("x", 1), {}),
        ("call_method", "add", ("x", "y"), {}),
        ("call_function", aten.add.Tensor, ("x", "y"), {}),
        ("call_function", F.dropout, ("x", 0.5, False), {}),
        ("call_function", F.dropout, ("x", 0.0, True), {}),
        ("call_function", aten.scaled_dot_product_attention.default, ("x", "y", "z"), {}),
        ("call_function", F.embedding, ("x", "y"), {}),
        ("call_function", F.batch_norm, ("x", "y", "z"), {}),
        ("call_function", torch.special.i0, ("x",), {}),  # not in the vocabulary, but torch's, and named like no effect
        ("call_method", "nonzero", ("x",), {}),
        ("call_function", aten.linalg_inv.default, ("x",), {}),
        ("call_function", getattr, ("x", "shape"), {}),
    ],
)
def test_what_only_computes(kind, target, args, kwargs):
    made = Made(kind, target, args, kwargs)
    assert made.writes() == ()
    assert not made.effectful()


@pytest.mark.parametrize(
    ("kind", "target", "args", "kwargs", "written"),
    [
        ("call_method", "add_", ("x", "y"), {}, "x"),
        ("call_function", operator.iadd, ("x", "y"), {}, "x"),
        ("call_function", aten.add_.Tensor, ("x", "y"), {}, "x"),
        ("call_function", F.relu, ("x",), {"inplace": True}, "x"),
        ("call_function", torch.add, ("x", "y"), {"out": "z"}, "z"),
        ("call_function", torch.special.i0, ("x",), {"out": "z"}, "z"),
        ("call_function", F.batch_norm, ("x", "y", "z"), {"training": True}, "yz"),
        ("call_function", F.embedding, ("x", "y"), {"max_norm": 1.0}, "y"),
        ("call_function", operator.setitem, ("x", 0, "y"), {}, "xy"),  # not in the vocabulary: all its inputs
        ("call_method", "erfinv_", ("x",), {}, "x"),
        ("call_function", aten.erfinv_.default, ("x",), {}, "x"),
        ("call_function", aten.add.out, ("x", "y"), {"out": "z"}, "z"),
        ("call_function", aten._foreach_add_.Scalar, (["x"], 1), {}, ""),
        ("call_function", lambda a, b: a, ("x", "y"), {}, "xy"),
    ],
)
def test_what_writes(kind, target, args, kwargs, written):
    made = Made(kind, target, args, kwargs)
    assert {n.name for n in made.writes()} == set(written)
    assert made.effectful()


def test_a_list_that_is_written_to():
    graph = Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten._foreach_add_.Scalar, ([x], 1))
    graph.output(x)
    assert ops.writes(GraphModule({}, graph), node) == (x,)


@pytest.mark.parametrize(
    ("kind", "target", "args", "kwargs"),
    [
        ("call_function", F.dropout, ("x", 0.5), {}),
        ("call_function", torch.rand, (2, 3), {}),
        ("call_function", torch.bernoulli, ("x",), {}),
        ("call_method", "bernoulli", ("x",), {}),
        ("call_function", aten.bernoulli.default, ("x",), {}),
        ("call_function", F.scaled_dot_product_attention, ("x", "y", "z"), {"dropout_p": 0.1}),
        ("call_function", aten._assert_tensor_metadata.default, ("x",), {"dtype": torch.float32}),
        ("call_function", aten._assert_async.msg, ("x", "wrong"), {}),
        ("call_function", torch._assert, ("x", "wrong"), {}),
        ("call_method", "backward", ("x",), {}),
        ("call_function", print, ("x",), {}),
        ("call_function", lambda a: a, ("x",), {}),
    ],
)
def test_what_does_more_than_compute(kind, target, args, kwargs):
    assert Made(kind, target, args, kwargs).effectful()


def test_a_module_that_the_vocabulary_does_not_know_may_do_anything():
    class Own(nn.Linear):
        pass

    made = Made("call_module", "own", root=module(own=Own(2, 2)))
    assert made.effectful() and made.writes() == (made.x,)
    known = Made("call_module", "own", root=module(own=nn.Linear(2, 2)))
    assert not known.effectful() and known.writes() == ()


def test_a_module_in_training_may_draw_and_write():
    training = Made("call_module", "m", root=module(m=nn.Dropout(0.5)))
    assert training.effectful() and training.writes() == ()
    assert not Made("call_module", "m", root=module(m=nn.Dropout(0.5).eval())).effectful()
    norm = Made("call_module", "m", root=module(m=nn.BatchNorm1d(2)))
    assert norm.effectful()  # it writes to buffers that are no nodes
    assert not Made("call_module", "m", root=module(m=nn.BatchNorm1d(2).eval())).effectful()
    inplace = Made("call_module", "m", root=module(m=nn.ReLU(inplace=True)))
    assert inplace.effectful() and inplace.writes() == (inplace.x,)


def test_placeholders_and_the_output_stay_and_constants_do_nothing():
    gm = trace(nn.Linear(2, 2), (torch.randn(1, 2),), "function")
    found = {n.op: ops.effectful(gm, n) for n in gm.graph.nodes}
    assert found == {"placeholder": True, "get_attr": False, "call_function": False, "output": True}
    assert all(ops.writes(gm, n) == () for n in gm.graph.nodes)


def test_export_s_guards_write_to_nothing():
    gm = trace(nn.Linear(2, 2), (torch.randn(1, 2),), "aten")
    guards = next(n for n in gm.graph.nodes if n.target == "_guards_fn")
    assert ops.writes(gm, guards) == () and ops.effectful(gm, guards)


@pytest.mark.parametrize(
    ("kind", "target", "args"),
    [
        ("call_method", "view", ("x", 2)),
        ("call_function", torch.transpose, ("x", 0, 1)),
        ("call_function", aten.slice.Tensor, ("x", 0, 1)),
        ("call_function", operator.getitem, ("x", 0)),
        ("call_function", getattr, ("x", "T")),
        ("call_method", "contiguous", ("x",)),
        ("call_method", "to", ("x", torch.float32)),
        ("call_method", "add_", ("x", "y")),
        ("call_function", F.dropout, ("x", 0.5, False)),
        ("call_function", aten.diagonal.default, ("x",)),  # not in the vocabulary: its schema says so
        ("call_method", "diagonal", ("x",)),  # not in the vocabulary: perhaps
        ("call_function", torch.diagonal, ("x",)),
    ],
)
def test_what_may_share_memory_with_its_input(kind, target, args):
    made = Made(kind, target, args)
    assert made.alias() is made.x


@pytest.mark.parametrize(
    ("kind", "target", "args"),
    [
        ("call_function", torch.add, ("x", "y")),
        ("call_method", "clone", ("x",)),
        ("call_function", F.relu, ("x",)),
        ("call_function", aten.linalg_inv.default, ("x",)),
        ("call_function", F.linear, ("x", "y")),
    ],
)
def test_what_has_memory_of_its_own(kind, target, args):
    made = Made(kind, target, args)
    assert made.alias() is made.node


def test_views_are_followed_to_where_the_memory_came_from():
    graph = Graph()
    x = graph.placeholder("x")
    fresh = graph.call_function(torch.neg, (x,))
    part = graph.call_method("chunk", (fresh, 2))
    half = graph.call_function(operator.getitem, (part, 1))
    written = graph.call_method("add_", (graph.call_method("view", (half, -1)), 1))
    graph.output(written)
    gm = GraphModule({}, graph)
    assert ops.may_alias(gm, written) is fresh
    assert ops.shares(gm, half) is part and ops.shares(gm, fresh) is None and ops.shares(gm, x) is None


class Hooked(nn.Module):
    def __init__(self, hook):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        hook(self.fc)

    def forward(self, x):
        return self.fc(x)


class Sub(nn.Linear):
    pass


def test_why_a_module_cannot_be_read():
    def first(gm):
        node = next(n for n in gm.graph.nodes if n.op == "call_module")
        assert ops.read(gm, node) is None
        return ops.unread(gm, node)

    x = torch.randn(1, 2)
    gm = trace(Hooked(lambda m: m.register_forward_hook(lambda *a: None)), (x,), "module")
    assert first(gm) == (vocabulary.linear, "fc has hooks")
    gm = trace(Hooked(lambda m: m.register_forward_pre_hook(lambda *a: None)), (x,), "module")
    assert first(gm) == (vocabulary.linear, "fc has hooks")
    gm = trace(module_of(nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")), (torch.randn(1, 2, 4),), "module")
    assert first(gm) == (vocabulary.conv1d, "part pads with padding_mode='circular'")
    made = Made("call_module", "m", root=module(m=Sub(2, 2)))
    assert ops.unread(made.gm, made.node) == (vocabulary.linear, "m is a Sub, a subclass of Linear")
    made = Made("call_module", "m", ("x", "y"), root=module(m=nn.Linear(2, 2)))
    assert ops.unread(made.gm, made.node) == (vocabulary.linear, "m passes arguments that Linear does not take")
    assert ops.unread(made.gm, made.x) is None
    made = Made("call_module", "m", root=module(m=nn.Bilinear(2, 2, 2)))
    assert ops.read(made.gm, made.node) is None and ops.unread(made.gm, made.node) is None


def module_of(part):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = part

        def forward(self, x):
            return self.part(x)

    return Root()


def test_a_module_s_parameters_are_read_by_path():
    gm = trace(module_of(nn.Linear(2, 3)), (torch.randn(1, 2),), "module")
    node = next(n for n in gm.graph.nodes if n.op == "call_module")
    call = ops.read(gm, node)
    assert call.arguments["weight"] == Attr("part.weight") and repr(call.arguments["bias"]) == "part.bias"
    assert ops.constant(gm, call.arguments["weight"]) is gm.part.weight
    assert (
        ops.constant(gm, Attr("part.absent")) is None and ops.constant(gm, 3) is None and ops.constant(gm, node) is None
    )
    assert ops.submodule(gm, "part") is gm.part and ops.submodule(gm, "") is gm and ops.submodule(gm, "no.such") is None


def test_a_call_by_keyword_reads_as_one_by_position():
    by_position = Made("call_function", F.linear, ("x", "y", "z"))
    by_keyword = Made("call_function", F.linear, ("x",), {"bias": "z", "weight": "y"})
    said = [{n: str(v) for n, v in ops.read(m.gm, m.node).arguments.items()} for m in (by_position, by_keyword)]
    assert said[0] == said[1] == {"input": "x", "weight": "y", "bias": "z"}
    by_input = Made("call_function", torch.relu, (), {"input": "x"})
    assert ops.read(by_input.gm, by_input.node).arguments["input"] is by_input.x


def test_a_number_first_is_a_number_second():
    made = Made("call_function", operator.mul, (2, "x"))
    assert ops.read(made.gm, made.node).arguments == {"input": made.x, "other": 2}
    made = Made("call_function", operator.sub, (2, "x"))
    assert ops.read(made.gm, made.node).arguments == {"input": 2, "other": made.x, "alpha": 1}
