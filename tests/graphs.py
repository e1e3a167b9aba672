"""
Random models, and their graph modules in three dialects.

A model is a list of steps.  All values of one model have one shape, that of its inputs, so that any step can follow
any other: vectors (2, 4), sequences (2, 3, 4) or images (2, 4, 4, 4).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.snapshot import OWNER
from fxopt.watch import own

WIDTH = 4
SHAPES = {"vector": (2, WIDTH), "sequence": (2, 3, WIDTH), "image": (2, WIDTH, WIDTH, WIDTH)}
DIALECTS = ("module", "function", "aten")
DIVISORS = (2.0, 3.0, 7, 0.1, -4.0, 49, 0.0)


@dataclass(frozen=True)
class Step:
    kind: str
    a: int  # which of the values so far
    b: int
    option: int


class Net(nn.Module):
    """What a list of steps computes; ``ends`` says which values it returns, and how."""

    def __init__(self, shape: str, steps: tuple[Step, ...], ends: tuple[str, tuple[int, ...]], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shape, self.steps, self.ends = shape, steps, ends
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.spare = nn.Parameter(torch.randn(3))  # that nothing reads
        for i, step in enumerate(steps):
            if make := getattr(self, f"make_{step.kind}", None):
                make(i, step.option)

    def forward(self, x, y):
        values = [x, y]
        for i, step in enumerate(self.steps):
            a, b = values[step.a % len(values)], values[step.b % len(values)]
            values.append(getattr(self, f"do_{step.kind}")(i, step.option, a, b))
        how, which = self.ends
        found = [values[-1], *(values[w % len(values)] for w in which)]
        if how == "one":
            return found[0]
        if how == "dict":
            return {"last": found[0], "more": found[1:]}
        return tuple(found)

    def at(self, i, what="m"):
        return getattr(self, f"{what}{i}")

    # --- with parameters

    def make_linear(self, i, o):
        self.add_module(f"m{i}", nn.Linear(WIDTH, WIDTH, bias=o % 3 != 0))

    def do_linear(self, i, o, a, b):
        return self.at(i)(a) if o % 4 else self.at(i)(input=a)

    def do_shared(self, i, o, a, b):
        return self.shared(self.shared(a).relu()) if o % 2 else self.shared(a)

    def make_tied(self, i, o):
        self.make_linear(i, o)
        self.at(i).weight = self.shared.weight

    def do_tied(self, i, o, a, b):
        return self.at(i)(a) + self.shared(b) if o % 2 else self.at(i)(a)

    def make_weights(self, i, o):
        self.register_parameter(f"w{i}", nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=o % 2 == 0))
        self.register_parameter(f"c{i}", nn.Parameter(torch.randn(WIDTH)))

    def do_weights(self, i, o, a, b):
        if o % 3 == 0:
            return F.linear(input=a, weight=self.at(i, "w"), bias=self.at(i, "c"))
        return torch.matmul(a, self.at(i, "w").t()) + self.at(i, "c") if o % 3 == 1 else F.linear(a, self.at(i, "w"))

    def make_sequential(self, i, o):
        parts = [
            nn.Linear(WIDTH, WIDTH),
            (nn.ReLU, nn.GELU, nn.SiLU)[o % 3](),
            nn.Dropout(0.3),
            nn.Linear(WIDTH, WIDTH),
        ]
        self.add_module(f"m{i}", nn.Sequential(*parts))

    def do_sequential(self, i, o, a, b):
        return a + self.at(i)(b) if o % 2 else self.at(i)(a)

    def make_layer_norm(self, i, o):
        self.add_module(f"m{i}", nn.LayerNorm(WIDTH, eps=(1e-5, 1e-12)[o % 2], elementwise_affine=o % 3 != 0))

    def do_layer_norm(self, i, o, a, b):
        return self.at(i)(a + b) if o % 2 else F.layer_norm(self.at(i)(a), (WIDTH,))

    def make_rms_norm(self, i, o):
        self.register_parameter(f"w{i}", nn.Parameter(torch.rand(WIDTH) + 0.5))

    def do_rms_norm(self, i, o, a, b):
        return self.at(i, "w") * (a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6))

    def make_batch_norm(self, i, o):
        kind, size = {"vector": (nn.BatchNorm1d, 4), "sequence": (nn.BatchNorm1d, 3), "image": (nn.BatchNorm2d, 4)}[
            self.shape
        ]
        norm = kind(size, affine=o % 3 != 0)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        self.add_module(f"n{i}", norm)
        self.make_linear(i, o)

    def do_batch_norm(self, i, o, a, b):
        norm = self.at(i, "n")
        if o % 4 == 3 and not self.training:
            return F.batch_norm(self.at(i)(a), norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return norm(self.at(i)(a)) if o % 2 else norm(a)

    def make_conv(self, i, o):
        if self.shape != "image":
            self.make_linear(i, o)
            return
        self.add_module(f"m{i}", nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=o % 2 == 0))
        self.add_module(f"n{i}", nn.BatchNorm2d(WIDTH, track_running_stats=o % 5 != 0))

    def do_conv(self, i, o, a, b):
        if self.shape != "image":
            return self.at(i)(a).relu_()
        found = self.at(i)(a)
        return F.relu(self.at(i, "n")(found)) if o % 3 else found.relu()

    def make_attention(self, i, o):
        for n in "qkv":
            self.add_module(f"{n}{i}", nn.Linear(WIDTH, WIDTH, bias=o % 2 == 0))
        self.register_buffer(f"f{i}", torch.zeros(1), persistent=o % 3 == 0)

    def do_attention(self, i, o, a, b):
        q, k, v = self.at(i, "q")(a), self.at(i, "k")(a), self.at(i, "v")(a if o % 4 else b)
        scores = q @ k.transpose(-2, -1) / 2.0 if o % 2 else torch.matmul(q * 0.5, k.transpose(-1, -2))
        if o % 3 == 0:
            scores = scores + self.at(i, "f")
        return F.dropout(scores.softmax(-1), 0.1, training=False) @ v

    def make_gate(self, i, o):
        self.make_linear(i, 1)
        self.add_module(f"g{i}", nn.Linear(WIDTH, WIDTH))

    def do_gate(self, i, o, a, b):
        return F.silu(self.at(i)(a)) * self.at(i, "g")(a)

    # --- without

    def do_activation(self, i, o, a, b):
        return (a.relu(), F.gelu(a), F.gelu(a, approximate="tanh"), torch.tanh(a), a.sigmoid(), F.silu(a))[o % 6]

    def make_relu(self, i, o):
        self.add_module(f"m{i}", nn.ReLU(inplace=o % 2 == 0))

    def do_relu(self, i, o, a, b):
        return self.at(i)(a + b)

    def make_dropout(self, i, o):
        self.add_module(f"m{i}", nn.Dropout((0.0, 0.5)[o % 2]))

    def do_dropout(self, i, o, a, b):
        return self.at(i)(a) if o % 3 else F.dropout(self.at(i)(a), p=0.2, training=False)

    def do_arithmetic(self, i, o, a, b):
        return (a + b, a - b, a * b, torch.add(a, b, alpha=2), 3 - a, a + 1.5, 0.5 * a, -a)[o % 8]

    def do_divide(self, i, o, a, b):
        return a / DIVISORS[o % len(DIVISORS)] if o % 2 else torch.div(a, DIVISORS[o % len(DIVISORS)])

    def make_buffer(self, i, o):
        self.register_buffer(f"b{i}", torch.rand(WIDTH) + 1, persistent=o % 2 == 0)

    def do_buffer(self, i, o, a, b):
        return (a / self.at(i, "b"), a * self.at(i, "b"), a + self.at(i, "b").detach())[o % 3]

    def do_constant(self, i, o, a, b):
        return (a + torch.tensor([1.0, 2.0, 3.0, 4.0]), a * torch.full((1,), 2.0), a + torch.arange(WIDTH))[o % 3]

    def do_no_op(self, i, o, a, b):
        return (a + 0, a * 1, a.contiguous(), a.to(torch.float32), a.transpose(0, 1).transpose(0, 1), a / 1, a[:])[
            o % 7
        ]

    def do_views(self, i, o, a, b):
        if o % 4 == 0:
            return a.reshape(-1, WIDTH).reshape(a.shape if o % 8 else SHAPES[self.shape])
        if o % 4 == 1:
            first, second = a.chunk(2, dim=-1)
            return torch.cat((second, first), -1)
        if o % 4 == 2:
            return a.unsqueeze(0).squeeze(0) + b.flip(-1)
        return torch.stack((a[..., 0], a[..., 1], b[..., 2], b[..., 3]), dim=-1)

    def do_in_place(self, i, o, a, b):
        fresh = a * 1.25
        if o % 4 == 0:
            return fresh.add_(1)
        if o % 4 == 1:
            fresh[..., :2].fill_(0.5)
            return fresh
        if o % 4 == 2:
            fresh.view(-1, WIDTH)[0].mul_(b.flatten()[0])
            return fresh
        kept = fresh + 0.5
        return torch.relu_(fresh) + kept

    def do_late_write(self, i, o, a, b):
        fresh = a + b
        early = fresh.exp() if o % 2 else fresh.view(-1, WIDTH)
        fresh += 2
        return (early.reshape(SHAPES[self.shape]) / 3.0).tanh() + fresh

    def do_twice(self, i, o, a, b):
        return (a.tanh() + a.tanh()) / 2 if o % 2 else torch.add(F.gelu(a), F.gelu(a)) - b

    def do_dead(self, i, o, a, b):
        unused = self.shared(a) / 3
        unused = (unused.relu(), torch.zeros(2))
        return b * 1.5

    def do_mask(self, i, o, a, b):
        return torch.where(a > 0, a, b) if o % 2 else a.masked_fill(b > 1, 0.0)

    def do_reduce(self, i, o, a, b):
        return a - a.mean(dim=-1, keepdim=True) if o % 2 else a * b.amax(-1, True) + a.size(0)


KINDS = sorted(n.removeprefix("do_") for n in dir(Net) if n.startswith("do_"))


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and how it is captured."""

    model: Net
    dialect: str
    route: str  # of the ATen dialect: torch.export, or make_fx, which is quicker
    nested: bool
    training: bool

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        gen = torch.Generator().manual_seed(7)
        shape = SHAPES[self.model.shape]
        return torch.randn(shape, generator=gen), torch.randn(shape, generator=gen)

    def trace(self) -> GraphModule:
        """A new graph module of the same model, the same in all respects."""
        if self.dialect == "aten":
            gm = exported(self.model, self.inputs) if self.route == "export" else made(self.model, self.inputs)
        else:
            tracer = Tracer() if self.dialect == "module" else Functions()
            graph = tracer.trace(self.model)
            gm = GraphModule(tracer.root, graph)
            gm.train(self.training)
        return around(gm, self.model) if self.nested else gm


class Functions(Tracer):
    """Looks into torch's own modules, except the batch norms, which branch on sizes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.modules.batchnorm._BatchNorm)


class _Leaves(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, GraphModule) or super().is_leaf_module(m, module_qualified_name)


def exported(model: nn.Module, inputs: tuple[Any, ...]) -> GraphModule:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, inputs, strict=False).module(check_guards=False)


def made(model: nn.Module, inputs: tuple[Any, ...]) -> GraphModule:
    with torch.no_grad():
        return make_fx(lambda *a: model(*a), pre_dispatch=True)(*inputs)


class Outer(nn.Module):
    def __init__(self, inner: GraphModule, weight: nn.Parameter) -> None:
        super().__init__()
        self.inner, self.scale = inner, weight
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y):
        first = self.drop(self.fc(x)) / 2
        return self.inner(first.relu(), y), first * self.scale[0]


def around(inner: GraphModule, model: Net) -> GraphModule:
    """A graph module that calls ``inner``, a graph module of its own."""
    torch.manual_seed(3)
    outer = Outer(inner, model.spare)
    outer.drop.training = outer.fc.training = model.training
    tracer = _Leaves()
    graph = tracer.trace(outer)
    return GraphModule(tracer.root, graph)


@st.composite
def cases(draw, dialects=DIALECTS, max_steps=8) -> Case:
    """A model with one to ``max_steps`` steps, captured in one of ``dialects``."""
    shape = draw(st.sampled_from(sorted(SHAPES)))
    step = st.builds(Step, st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9), st.integers(0, 23))
    steps = draw(st.lists(step, min_size=1, max_size=max_steps))
    ends = draw(st.sampled_from(("one", "tuple", "dict"))), tuple(draw(st.lists(st.integers(0, 9), max_size=2)))
    training = draw(st.integers(0, 5)) == 0
    model = Net(shape, tuple(steps), ends, draw(st.integers(0, 3))).train(training)
    route = draw(st.sampled_from(("export", "make_fx", "make_fx", "make_fx", "make_fx")))
    nested = draw(st.integers(0, 5)) == 0
    return Case(model, draw(st.sampled_from(dialects)), route, nested, training)


def twin(gm: GraphModule) -> GraphModule:
    """Another graph module, the same in all respects, on the same tensors."""
    root = nn.Module()
    root.__dict__.update({k: v for k, v in gm.__dict__.items() if k not in ("_graph", "_code", "meta", OWNER)})
    for store in ("_parameters", "_buffers", "_modules"):
        root.__dict__[store] = dict(gm.__dict__[store])
    for name, child in gm._modules.items():
        if isinstance(child, GraphModule):
            root._modules[name] = twin(child)
    graph = Graph()
    nodes: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        nodes[node] = graph.node_copy(node, lambda n: nodes[n])
        nodes[node].name = node.name
        graph._graph_namespace._obj_to_name[nodes[node]] = node.name
    for node, new in nodes.items():
        new.users.clear()
        new.users.update({nodes[u]: None for u in node.users})
    graph._graph_namespace._used_names = set(gm.graph._graph_namespace._used_names)
    graph._graph_namespace._base_count = dict(gm.graph._graph_namespace._base_count)
    graph._codegen, graph._tracer_cls = gm.graph._codegen, gm.graph._tracer_cls
    new = GraphModule(root, graph)
    for key, value in root.__dict__.items():
        if key in ("_parameters", "_buffers", "_modules"):
            new.__dict__[key] = value
        elif key not in new.__dict__ or key in ("training", "_non_persistent_buffers_set") or "hooks" in key:
            new.__dict__[key] = value.copy() if isinstance(value, dict | set) else value
    own(new)
    return new
