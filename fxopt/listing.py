"""The nodes of a graph module as lines of text, at one moment of its history."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxopt.delta import MARKS, Delta, related
from fxopt.history import checkout
from fxopt.log import Commit, commits
from fxopt.origin import source_of
from fxopt.snapshot import graphs, node_key, path_in
from fxopt.text import computed

_NAME = re.compile("\x1f([^\x1f]*)\x1f")  # a node's name within a line; no name holds this character


@dataclass(frozen=True, eq=False)
class Line:
    """One node: what it computes as text, and where that comes from."""

    key: str  # the node's name, after the path of the graph module inside that holds it: ``path::name``
    text: str
    form: str  # what it computes, with the names left out
    operation: str
    reads: tuple[str, ...]  # the keys of the nodes that it reads, in the order in which the text names them
    holds: str  # the path of the tensor or module that it stands for, or ""
    module: str  # the path of the innermost module of the model's source that it comes from
    shape: str
    source: str  # the line of the model's source, or ""
    marks: tuple[str, ...]  # the transformations that created or changed it
    target: Any = None  # the function that it calls: two may bear one name

    @property
    def name(self) -> str:
        return self.key.rpartition("::")[2]


@dataclass(frozen=True, eq=False)
class Listing:
    """The lines of a graph module and of the graph modules inside it, in graph order, and its tensors; by path."""

    graphs: dict[str, tuple[Line, ...]]
    tensors: dict[str, torch.Tensor]

    def lines(self) -> Iterator[Line]:
        """All lines, graph by graph."""
        for found in self.graphs.values():
            yield from found


def listing(gm: GraphModule, former: Listing | None = None, touched: Callable[[Line], bool] | None = None) -> Listing:
    """The lines of ``gm``; those of ``former`` that are not ``touched`` are taken over."""
    known: dict[str, Line] = {}
    if former is not None and touched is not None:
        known = {line.key: line for line in former.lines() if not touched(line)}
    found = {}
    for path, inner in graphs(gm).items():
        nodes = inner.graph.nodes
        found[path] = tuple(known.get(node_key(path, n.name)) or _line(inner, n, path) for n in nodes)
    return Listing(found, dict(_tensors(gm)))


def states(gm: GraphModule) -> Iterator[tuple[GraphModule, Listing]]:
    """
    ``gm`` as it is after its last commit, after the last but one, …, and before the first.

    ``gm`` is taken back as the iteration goes; give a copy.
    """
    found = commits(gm)
    now = listing(gm)
    yield gm, now
    for index in range(len(found) - 1, -1, -1):
        checkout(gm, index, edited="discard")  # what was trained since is not in the text
        now = listing(gm, now, _touching(found[index]))
        yield gm, now


def _touching(commit: Commit) -> Callable[[Line], bool]:
    deltas: tuple[Delta, ...] = commit.deltas()
    keys = {key for d in deltas for key in (*d.nodes, *d.metas)}
    paths = related({p for d in deltas for p in (*d.slots, *(m for m, _ in d.attributes))})
    return lambda line: line.key in keys or bool(line.holds and any(paths(line.holds)))


def _tensors(gm: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from gm.named_parameters(remove_duplicate=False)
    yield from gm.named_buffers(remove_duplicate=False)


def _line(gm: GraphModule, node: Node, path: str) -> Line:
    module = module_of(node)
    said = computed(gm, node, lambda n: f"\x1f{n.name}\x1f")
    parameters = {n.name: str(n.target) for n in node.all_input_nodes if n.op == "get_attr"}
    held = path_in(path, str(node.target)) if node.op in ("get_attr", "call_module") else ""

    def shown(name: re.Match[str]) -> str:
        return _relative(parameters[name[1]], module) if name[1] in parameters else name[1]

    value = f"get_attr {_relative(str(node.target), module)}" if node.op == "get_attr" else _NAME.sub(shown, said)
    return Line(
        key=node_key(path, node.name),
        text=value if node.op == "output" else f"{node.name} = {value}",
        form=_NAME.sub("%", said),
        operation=f"{node.op} {said.partition('(')[0]}" if node.op != "output" else "output",
        reads=tuple(node_key(path, name) for name in _NAME.findall(said)),
        holds=held,
        module=module,
        shape=_shape(node.meta.get("val", node.meta.get("example_value"))),
        source=source_of(node.meta, node.op, node.target),
        marks=tuple(map(str, node.meta.get(MARKS, ()))),
        target=node.target if node.op == "call_function" else None,
    )


def _relative(path: str, module: str) -> str:
    """The path of a parameter as seen from a module: ``.weight`` inside of it, ``…dense.weight`` beside it."""
    if module and path.startswith(f"{module}."):
        return path[len(module) :]
    parts, inside = path.split("."), module.split(".")
    common = next((i for i, (a, b) in enumerate(zip(parts, inside, strict=False)) if a != b), 0)
    return f"…{'.'.join(parts[common:])}" if common > 1 else path


def module_of(node: Node) -> str:
    """The path of the innermost module of the model's source that ``node`` comes from; "" for the model itself."""
    stack: dict[str, Any] | None = node.meta.get("nn_module_stack")
    if not stack:
        return str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""
    path = str(list(stack.values())[-1][0])
    return "" if path.startswith("_empty_nn_module_stack") else path


_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def _shape(value: Any) -> str:
    """``f32[2, 16]``: a tensor's dtype and sizes; of a sequence, those of its elements."""
    if isinstance(value, torch.Tensor):
        named = str(value.dtype).removeprefix("torch.")
        kind = re.fullmatch(r"([a-z]+)(\d+)", named)
        dtype = f"{_SHORT.get(kind[1], kind[1])}{kind[2]}" if kind else named
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_shape, value))})"
    return "" if value is None else type(value).__name__.removeprefix("Sym").lower()
