"""Passes as a user writes them, in plain torch.fx, with nothing of fxopt but the base class; and the catalogue's."""

from __future__ import annotations

import dataclasses
import importlib
import operator
import pkgutil
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node, subgraph_rewriter

import fxopt.transformations
from fxopt.compose import adopt
from fxopt.sparse import Spec
from fxopt.transformation import ReversibleTransformation, Rewrite, Transformation
from fxopt.transformations import BlockSparsify, SparsifyWeights, SwapSparse

ATEN = torch.ops.aten
# All of one signature, so that one can stand for another.
UNARY = (
    torch.relu,
    torch.tanh,
    torch.sigmoid,
    F.relu,
    F.silu,
    torch.exp,
    torch.neg,
    ATEN.relu.default,
    ATEN.tanh.default,
)
METHODS = ("relu", "tanh", "sigmoid", "neg", "exp")


def calls(gm: GraphModule) -> list[Node]:
    """The nodes that compute one tensor of the common shape, or may well do."""
    unary = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in UNARY and not n.kwargs]
    methods = [n for n in gm.graph.nodes if n.op == "call_method" and n.target in METHODS]
    kinds = (nn.Linear, nn.ReLU, nn.LayerNorm, nn.GELU, nn.SiLU, nn.Dropout)
    leaves = [n for n in gm.graph.nodes if n.op == "call_module" and isinstance(gm.get_submodule(n.target), kinds)]
    return sorted({*unary, *methods, *leaves, *(n for n in gm.graph.nodes if n.op == "placeholder")})


def leaves(gm: GraphModule, *kinds: type) -> list[tuple[str, nn.Module]]:
    return [(p, m) for p, m in gm.named_modules() if isinstance(m, kinds)]


@dataclass(frozen=True, eq=False, repr=False)
class Plain(ReversibleTransformation):
    """``pick`` says which of the places that a graph offers is taken."""

    pick: int = 0

    def choose(self, places: list[Any]) -> Any:
        return places[self.pick % len(places)] if places else None

    def transform(self, graph_module: GraphModule) -> GraphModule | None:
        return self.edit(graph_module)

    def edit(self, gm: GraphModule) -> GraphModule | None:
        raise NotImplementedError


class Retarget(Plain):
    def edit(self, gm):
        node = self.choose([n for n in calls(gm) if n.op in ("call_function", "call_method")])
        if node is not None:
            others = METHODS if node.op == "call_method" else UNARY
            node.target = others[(self.pick + 1) % len(others)]
        return gm


class ChangeArguments(Plain):
    def edit(self, gm):
        pairs = (operator.add, operator.mul, torch.add, torch.mul, ATEN.add.Tensor, ATEN.mul.Tensor)
        found = [n for n in gm.graph.nodes if n.target in pairs and len(n.args) == 2]
        node = self.choose(found)
        if node is not None:
            a, b = node.args
            node.args = (b, a) if isinstance(b, Node) else (a, b + 1)


class Insert(Plain):
    def edit(self, gm):
        node = self.choose(calls(gm))
        if node is not None:
            with gm.graph.inserting_after(node):
                new = gm.graph.call_function(torch.neg, (node,))
            node.replace_all_uses_with(new)
            new.args = (node,)


class InsertFirst(Insert):
    """The same, at the same name and place as another instance of `Insert` may take."""


class Bypass(Plain):
    def edit(self, gm):
        node = self.choose([n for n in calls(gm) if n.op != "placeholder" and n.args])
        if node is not None:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


class BypassOnce(Bypass):
    """The same, of a kind that needs data, and cannot be made again."""

    replayable = False


class AddModule(Plain):
    def edit(self, gm):
        node = self.choose(calls(gm))
        if node is None:
            return
        extra = nn.Linear(4, 4)
        with torch.no_grad():
            extra.weight.copy_(torch.arange(16.0).reshape(4, 4) / 16)
            extra.bias.fill_(0.5)
        if self.pick % 2:
            gm.add_module(f"extra_{self.pick}", nn.Sequential(extra, nn.Dropout(0.5).eval()))
        else:
            gm.add_submodule(f"added.extra_{self.pick}", extra)
        with gm.graph.inserting_after(node):
            new = gm.graph.call_module(f"extra_{self.pick}" if self.pick % 2 else f"added.extra_{self.pick}", (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


class AddParameter(Plain):
    def edit(self, gm):
        node = self.choose(calls(gm))
        if node is None:
            return
        name = f"offset_{self.pick}"
        if self.pick % 2:
            gm.register_parameter(name, nn.Parameter(torch.ones(4) * 2, requires_grad=self.pick % 3 == 0))
        else:
            gm.register_buffer(name, torch.ones(4) * 2, persistent=self.pick % 3 == 0)
        with gm.graph.inserting_after(node):
            read = gm.graph.get_attr(name)
        with gm.graph.inserting_after(read):
            new = gm.graph.call_function(operator.add, (node, read))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


class DeleteParameter(Plain):
    def edit(self, gm):
        place = self.choose([m for _, m in leaves(gm, nn.Linear, nn.Conv2d) if m.bias is not None])
        if place is not None:
            if self.pick % 2:
                place.bias = None
            else:
                del place.bias
                place.register_parameter("bias", None)


class SwapParameter(Plain):
    def edit(self, gm):
        found = [(m, n) for m in gm.modules() for n, p in m._parameters.items() if p is not None]
        place = self.choose(found)
        if place is not None:
            module, name = place
            old = module._parameters[name]
            setattr(module, name, nn.Parameter(old.detach() * 0.5, requires_grad=old.requires_grad))


class ParameterToBuffer(Plain):
    def edit(self, gm):
        found = [(m, n) for m in gm.modules() for n, p in m._parameters.items() if p is not None]
        place = self.choose(found)
        if place is not None:
            module, name = place
            old = module._parameters[name]
            delattr(module, name)
            module.register_buffer(name, old.detach(), persistent=self.pick % 2 == 0)


class SwapModule(Plain):
    def edit(self, gm):
        place = self.choose(leaves(gm, nn.Linear))
        if place is not None:
            path, _ = place
            new = nn.Linear(4, 4, bias=self.pick % 2 == 0)
            with torch.no_grad():
                new.weight.copy_(torch.eye(4))
                if new.bias is not None:
                    new.bias.zero_()
            gm.set_submodule(path, new)


class MoveModule(Plain):
    def edit(self, gm):
        node = self.choose([n for n in gm.graph.nodes if n.op == "call_module" and "." not in n.target])
        if node is not None:
            module = getattr(gm, node.target)
            gm.add_module(f"moved_{node.target}", module)
            if not any(n.op == "call_module" and n.target == node.target and n is not node for n in gm.graph.nodes):
                delattr(gm, node.target)
            node.target = f"moved_{node.target}"


class Flags(Plain):
    def edit(self, gm):
        for i, module in enumerate(gm.modules()):
            if (i + self.pick) % 3:
                module.training = False


class Options(Plain):
    def edit(self, gm):
        place = self.choose(leaves(gm, nn.Dropout, nn.LayerNorm, nn.ReLU, nn.Linear))
        if place is None:
            return
        module = place[1]
        if isinstance(module, nn.Dropout):
            module.p = 0.25
        elif isinstance(module, nn.LayerNorm):
            module.eps = 1e-3
        elif isinstance(module, nn.ReLU):
            module.inplace = not module.inplace
        else:
            module.note = ["new", self.pick]


def double(module, inputs, output):
    return output * 2


def shift(module, inputs):
    return tuple(x + 1 for x in inputs)


class Hooks(Plain):
    def edit(self, gm):
        place = self.choose(leaves(gm, nn.Linear, nn.LayerNorm))
        if place is None:
            return
        if place[1]._forward_hooks:
            place[1]._forward_hooks.clear()
        elif self.pick % 2:
            place[1].register_forward_hook(double)
        else:
            place[1].register_forward_pre_hook(shift)


class Reorder(Plain):
    """Every node as late as its first user allows, but for what writes and draws."""

    def edit(self, gm):
        writes = [
            n for n in gm.graph.nodes if str(n.target).rstrip("0123456789").endswith("_") or "_." in str(n.target)
        ]
        for node in reversed(list(gm.graph.nodes)):
            if node.op == "get_attr" and node.users and not writes:
                min(node.users).prepend(node)
        for node in list(gm.graph.nodes)[:: 2 + self.pick % 3]:
            follower = node.next
            if node.op == follower.op == "get_attr":
                follower.append(node)


class Rename(Plain):
    def edit(self, gm):
        node = self.choose([n for n in gm.graph.nodes if n.op not in ("placeholder", "output")])
        if node is not None:
            node._rename(("renamed", "relu", "x_1", node.name)[self.pick % 4])


class ChangeOutput(Plain):
    def edit(self, gm):
        output = gm.graph.output_node()
        node = self.choose([n for n in output.all_input_nodes if n.op != "placeholder"])
        if node is not None:
            with gm.graph.inserting_before(output):
                new = gm.graph.call_function(torch.neg, (node,))
            output.replace_input_with(node, new)


class Notes(Plain):
    def edit(self, gm):
        for i, node in enumerate(gm.graph.nodes):
            if (i + self.pick) % 3 == 0:
                node.type = torch.Tensor if node.op != "output" else None
                node.meta["note"] = self.pick
                node.meta.setdefault("tags", []).append(self.pick)
                node.meta.pop("val", None)


class NothingKept(Plain):
    """Makes and erases a node: only the name that was handed out stays behind."""

    def edit(self, gm):
        with gm.graph.inserting_before(gm.graph.output_node()):
            node = gm.graph.call_function(UNARY[self.pick % len(UNARY)], (next(iter(gm.graph.nodes)),))
        gm.graph.erase_node(node)
        return gm


class Nothing(Plain):
    def edit(self, gm):
        return None if self.pick % 2 else gm


class CleanUp(Plain):
    """torch's own dead code elimination; it erases writes in place that nothing reads, and is none of ours."""

    def edit(self, gm):
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()


class NewGraph(Plain):
    """Puts a new graph in place of the old, as `torch.fx.Transformer` does."""

    def edit(self, gm):
        new, codegen = Graph(), gm.graph._codegen
        output = new.graph_copy(gm.graph, {}, return_output_node=True)
        new.output(output[0])
        new.set_codegen(codegen)
        if self.pick % 2:
            first = next(iter(new.nodes))
            with new.inserting_before(new.output_node()):
                new.call_function(torch.neg, (first,))
        gm.graph = new


class Replace(Plain):
    """torch's own subgraph rewriter."""

    def edit(self, gm):
        def pattern(x):
            return torch.relu(x)

        def method(x):
            return x.relu()

        def replacement(x):
            return torch.clamp(x, min=0) * 1.0

        subgraph_rewriter.replace_pattern(gm, method if self.pick % 2 else pattern, replacement)


class AddGraph(Plain):
    """A graph module inside the graph module."""

    def edit(self, gm):
        node = self.choose(calls(gm))
        if node is None or "." in getattr(gm, "note", ""):
            return
        inner = Graph()
        x = inner.placeholder("x")
        inner.output(inner.call_function(torch.tanh, (inner.call_function(torch.neg, (x,)),)))
        gm.add_module(f"graph_{self.pick}", GraphModule(nn.Module(), inner))
        with gm.graph.inserting_after(node):
            new = gm.graph.call_module(f"graph_{self.pick}", (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


class DropGraph(Plain):
    """Edits a graph module inside, and then takes it out."""

    def edit(self, gm):
        inside = [
            n for n in gm.graph.nodes if n.op == "call_module" and isinstance(gm.get_submodule(n.target), GraphModule)
        ]
        node = self.choose(
            [n for n in inside if len(gm.get_submodule(n.target).graph.output_node().all_input_nodes) == 1]
        )
        if node is None or not isinstance(gm.get_submodule(node.target).graph.output_node().args[0], Node):
            return
        NothingKept(self.pick).edit(gm.get_submodule(node.target))
        Insert(self.pick).edit(gm.get_submodule(node.target))
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
        gm.delete_submodule(node.target)


class Untidy(Plain):
    """Leaves the graph module's code to somebody else, and says that it touched what it did not."""

    def edit(self, gm):
        for node in gm.graph.nodes:
            self.mark_as_transformed(node)


# --- that fail


class Fails(Plain):
    """Raises midway, after some edits."""

    error: ClassVar[type[BaseException]] = ValueError

    def edit(self, gm):
        for kind in (Insert, AddParameter, SwapModule, Options, Rename, NewGraph, SwapParameter, Notes, AddGraph):
            if self.pick % 2 or kind is not NewGraph:
                kind(self.pick).edit(gm)
        Flags(self.pick).edit(gm)
        raise self.error("halfway")


class Interrupted(Fails):
    error = KeyboardInterrupt


class Invalid(Plain):
    """Leaves a graph that lint refuses."""

    def edit(self, gm):
        first = next(n for n in gm.graph.nodes if n.op == "placeholder")
        with gm.graph.inserting_before(first):
            gm.graph.call_function(torch.neg, (next(n for n in reversed(gm.graph.nodes) if n.op != "output"),))


@torch.no_grad()
def set_anew(p):
    p.set_(torch.full_like(p, 11))


def flip(p):
    if not hasattr(p, "flipped"):  # it is asked of each graph module, and two may share it
        p.flipped = p.requires_grad_(not p.requires_grad)


class WritesInPlace(Plain):
    """Writes to a parameter that the caller's model holds too."""

    def edit(self, gm):
        parameter = self.choose([p for p in gm.parameters() if p.numel() > 1])
        if parameter is None:
            raise ValueError("nothing to write to")
        ways = (
            lambda p: p.data.mul_(2),
            lambda p: setattr(p, "data", p.data * 2),
            lambda p: p.data.view(-1)[:1].fill_(17),
            lambda p: torch.add(p.detach(), 1, out=p.data),
            lambda p: p.detach().numpy().fill(3),
            flip,
            lambda p: torch.nn.init.constant_(p, 5),
            lambda p: p.untyped_storage().fill_(1),
            set_anew,
            lambda p: p.data.copy_(torch.full_like(p, 12)),
        )
        ways[self.pick % len(ways)](parameter)


EDITS: tuple[type[Plain], ...] = (
    Retarget, ChangeArguments, Insert, InsertFirst, Bypass, AddModule, AddParameter, DeleteParameter, SwapParameter,
    ParameterToBuffer, SwapModule, MoveModule, Flags, Options, Hooks, Reorder, Rename, ChangeOutput, Notes, NothingKept,
    Nothing, CleanUp, NewGraph, Replace, AddGraph, DropGraph, Untidy,
)  # fmt: skip
FAILURES: tuple[type[Plain], ...] = (Fails, Invalid, WritesInPlace)


# --- the catalogue, and optimum's


def catalogue() -> list[Transformation]:
    """Every transformation of the catalogue that can be made without options."""
    found = []
    for module in pkgutil.iter_modules(fxopt.transformations.__path__, "fxopt.transformations."):
        if module.name.rpartition(".")[2].startswith("_"):
            continue
        for kind in vars(importlib.import_module(module.name)).values():
            if not isinstance(kind, type) or not issubclass(kind, Transformation) or kind.__module__ != module.name:
                continue
            needed = [
                f for f in dataclasses.fields(kind)
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            ] if dataclasses.is_dataclass(kind) else []  # fmt: skip
            if not needed and not kind.__abstractmethods__ and kind is not Rewrite:
                found.append(kind())
    return found


class AnyBlocks(BlockSparsify):
    """Is content where there is nothing to make sparse, as the others are."""

    def _check(self, gm: GraphModule) -> None:
        pass


def sparse() -> list[Transformation]:
    """Those that find sites only with options: weights lose elements or blocks, and are computed with what is left."""
    return [
        SparsifyWeights(sparsity=0.75),
        SparsifyWeights(pattern="2:4"),
        SwapSparse(min_sparsity=0.0, measure=False),
        AnyBlocks({".*": Spec(0.5, (2, 2))}, guard="off"),
    ]


def optimums() -> list[Transformation]:
    """optimum's own instances."""
    from optimum.fx import optimization

    names = (
        "MergeLinears", "FuseBiasInLinear", "ChangeTrueDivToMulByInverse", "FuseBatchNorm2dInConv2d",
        "FuseBatchNorm1dInLinear",
    )  # fmt: skip
    return [adopt(getattr(optimization, n)()) for n in names]
