"""Passes with a mistake in them, and models to make it on, beside those of `planted`."""

from dataclasses import dataclass

import torch

from fxopt.transformation import Transformation
from tests.bisect.planted import calls, put, swap

aten = torch.ops.aten


@dataclass(frozen=True)
class Unclamp(Transformation):
    """Removes the clamps of those numbers, and makes the others anew: of the two of a layer, one is enough."""

    numbers: tuple[int, ...]
    of: tuple[int, ...] = tuple(range(24))

    def transform(self, graph_module):
        for i, node in enumerate(calls(graph_module, "clamp.default")):
            if i in self.numbers:
                put(graph_module, node, node.args[0])
            elif i in self.of:
                swap(graph_module, node)


@dataclass(frozen=True)
class UnclampNamed(Transformation):
    name: str

    def transform(self, graph_module):
        (node,) = (n for n in graph_module.graph.nodes if n.name == self.name)
        put(graph_module, node, node.args[0])


@dataclass(frozen=True)
class Scale(Transformation):
    """Multiplies the output of the tanh of number ``at`` by ``by``."""

    at: int
    by: float

    def transform(self, graph_module):
        for i, node in enumerate(calls(graph_module, "tanh.default")):
            again = swap(graph_module, node)
            if i == self.at:
                with graph_module.graph.inserting_after(again):
                    scaled = graph_module.graph.call_function(aten.mul.Tensor, (again, self.by))
                again.replace_all_uses_with(scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled)


@dataclass(frozen=True)
class Unscale(Transformation):
    by: float

    def transform(self, graph_module):
        for node in calls(graph_module, "mul.Tensor"):
            if node.args[1] == self.by:
                put(graph_module, node, node.args[0])


class NaN(Transformation):
    """NaN where Scale has changed the values already: the same output, another failure."""

    def transform(self, graph_module):
        for i, node in enumerate(calls(graph_module, "tanh.default")):
            if i == 9:
                swap(graph_module, node, node.args[0], target=aten.acosh.default)


class Shifted(Transformation):
    """Another weight in the place of one: no node changes."""

    def transform(self, graph_module):
        layer = graph_module.get_submodule("layers.5")
        layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.1)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)

    def forward(self, x):
        return x + torch.nn.functional.relu(self.fc(self.norm(x)))


class Branches(torch.nn.Module):
    """Cannot be captured whole: its own code stays as the frame around two graphs."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Sequential(*(Block() for _ in range(4)))
        self.b = torch.nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x):
        y = self.a(x)
        return y if y.sum().item() > 1e9 else self.b(y)


@dataclass(frozen=True)
class Abs(Transformation):
    """relu(x) -> abs(x) for the third relu of every graph: a bug."""

    def transform(self, graph_module):
        for i, node in enumerate(calls(graph_module, "relu.default")):
            node.target = torch.abs if i == 2 else torch.relu


@dataclass(frozen=True)
class Norms(Transformation):
    """Replaces the module of every layer norm, the sixth by one with another epsilon: a bug."""

    def transform(self, graph_module):
        for i, node in enumerate(n for n in graph_module.graph.nodes if str(n.target).endswith("norm")):
            old = graph_module.get_submodule(node.target)
            new = torch.nn.LayerNorm(8, eps=0.1 if i == 5 else 1e-5).eval()
            new.weight, new.bias = old.weight, old.bias
            graph_module.add_submodule(f"{node.target}_new", new)
            node.target = f"{node.target}_new"


def faster_gelu(graph_module):
    for node in calls(graph_module, "gelu.default"):
        node.kwargs = {"approximate": "tanh"}


@dataclass(frozen=True)
class FasterGELU(Transformation):
    """An approximation, which the tolerance below does not allow."""

    def transform(self, graph_module):
        faster_gelu(graph_module)
