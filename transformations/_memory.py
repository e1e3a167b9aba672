"""What the nodes of a graph share and do: which values may be one memory, what has an effect, how large a value is."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.fx.operator_schemas import get_signature_for_torch_op
from torch.utils._pytree import tree_leaves

from fxopt import ops

GUARDS = "_guards_fn"  # torch.export's check of the input sizes, a module

Kind = Literal["write", "random", "assertion", "unknown"]


@dataclass(frozen=True)
class Effect:
    """What a node does besides computing its value; ``unknown`` may be anything, a change of autograd's mode too."""

    kind: Kind
    reason: str


def effect(gm: GraphModule, node: Node) -> Effect | None:
    """What ``node`` does besides computing its value, the graph modules that it calls included; None for nothing."""
    return _effect(gm, node, ops.read(gm, node))


def _effect(gm: GraphModule, node: Node, call: ops.Call | None) -> Effect | None:
    if node.op in ("placeholder", "get_attr", "output"):
        return None
    if isinstance(out := node.kwargs.get("out"), Node):
        return Effect("write", f"writes to {out} in place")
    if call is not None:
        return _effect_of_call(node, call)
    called, hooked = called_graphs(gm, node)
    if called and not hooked:
        found = (effect(inner, n) for inner in called for n in inner.graph.nodes)
        return next((Effect(e.kind, f"{node} calls a graph that {e.reason}") for e in found if e is not None), None)
    if (said := _said_effect(node)) is not None:
        return Effect(*said)
    if not ops.effectful(gm, node):
        return None
    if isinstance(node.target, OpOverload):
        return _effect_of_overload(gm, node)
    if str(node.target) == GUARDS or getattr(node.target, "__name__", "").startswith("_assert"):
        return Effect("assertion", "asserts")
    if node.op == "call_module":
        module = ops.submodule(gm, str(node.target))
        return Effect("unknown", f"calls {node.target}, a {type(module).__name__} that the vocabulary cannot read")
    if node.op == "call_method" and str(node.target).endswith("_"):
        return Effect("write", f"writes to {node.all_input_nodes[0]} in place")
    return Effect("unknown", f"calls {getattr(node.target, '__name__', node.target)}, which may have an effect")


def _effect_of_call(node: Node, call: ops.Call) -> Effect | None:
    op = call.op
    if op.random is not None and op.random(call.arguments):
        return Effect("random", "draws random numbers")
    if op.effect:
        return Effect("assertion", "asserts")
    written = op.writes(call.arguments) if op.writes is not None else ()
    if call.inplace or written:
        named = [call.arguments[n] for n in ((op.parameters[0],) if call.inplace else ()) + tuple(written)]
        return Effect("write", f"writes to {', '.join(map(str, named))} in place")
    return None


def _effect_of_overload(gm: GraphModule, node: Node) -> Effect:
    assert isinstance(node.target, OpOverload)
    if written := ops.writes(gm, node):
        return Effect("write", f"writes to {', '.join(map(str, written))} in place")
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return Effect("random", "draws random numbers")
    return Effect("assertion", "asserts")


def called_graphs(gm: GraphModule, node: Node) -> tuple[list[GraphModule], bool]:
    """The graph modules that ``node`` runs, as a module or as branches of a higher-order operator; and if hooked."""
    if node.op == "call_module":
        module = ops.submodule(gm, str(node.target))
        return ([module], ops.hooked(module)) if isinstance(module, GraphModule) else ([], False)
    found = []
    for n in node.all_input_nodes if node.op == "call_function" else ():
        if n.op == "get_attr" and isinstance(inner := ops.submodule(gm, str(n.target)), GraphModule):
            found.append(inner)
    return found, False


# Arguments by which torch's own functions write or draw, where the vocabulary does not know the function.
_TELLING: dict[str, tuple[Kind, str]] = {
    "inplace": ("write", "writes to its input in place"),
    "out": ("write", "writes to its output argument in place"),
    "training": ("unknown", "draws random numbers, or updates statistics"),
    "train": ("unknown", "draws random numbers, or updates statistics"),
    "dropout_p": ("random", "draws random numbers"),
    "dropout": ("random", "draws random numbers"),
    "max_norm": ("write", "writes to its weight in place"),
    "use_input_stats": ("write", "updates statistics in place"),
    "_random_samples": ("random", "draws random numbers"),
}


def _said_effect(node: Node) -> tuple[Kind, str] | None:
    if node.op != "call_function":
        return None
    for names in _parameters(node.target):
        bound = {n: default for n, default in names if default is not inspect.Parameter.empty}
        bound |= {n: value for (n, _), value in zip(names, node.args, strict=False)} | node.kwargs
        if any(n == "_random_samples" for n, _ in names):
            return _TELLING["_random_samples"]
        told = next((told for n, told in _TELLING.items() if n in bound and bound[n] not in (False, None, 0)), None)
        if told is not None:
            return told
    return None


@functools.cache
def _parameters(target: Any) -> tuple[tuple[tuple[str, Any], ...], ...]:
    """The parameters with their defaults, of each overload of a function that has a telling one."""
    empty = inspect.Parameter.empty
    if isinstance(target, OpOverload):
        schema = ((a.name, a.default_value if a.has_default_value() else empty) for a in target._schema.arguments)
        overloads = [tuple(schema)]
    else:
        overloads = [tuple((p.name, p.default) for p in s.parameters.values()) for s in _signatures(target)]
    return tuple(names for names in overloads if any(n in _TELLING for n, _ in names))


def _signatures(target: Any) -> list[inspect.Signature]:
    try:
        return [inspect.signature(target)]
    except (TypeError, ValueError):  # a builtin: torch's own are described by their schemas
        return get_signature_for_torch_op(target) or []


# Operators that may return their input, or views of it, although their schema says that the result is fresh.
_UNDECLARED = frozenset(
    {"alpha_dropout", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "cartesian_prod", "chain_matmul"}
    | {"chalf", "conj_physical", "data", "diag", "dropout", "einsum", "feature_alpha_dropout", "feature_dropout"}
    | {"linalg_matrix_power", "linalg_multi_dot", "matrix_power", "meshgrid", "pad", "sum_to_size", "tensordot", "tile"}
    | {"to_dense", "type_as", "unsafe_chunk", "unsafe_split"}
)


class Memory:
    """
    The values of a graph in classes that may share memory, and when each class is written to.

    Conservative: what the vocabulary and the schemas do not know may share memory with all its inputs; inputs of the
    graph may share memory with each other.  Built in one pass over the graph (union-find).
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.position: dict[Node, int] = {}
        self.effects: dict[Node, Effect] = {}
        self.certain: dict[Node, Node | None] = {}  # the input whose memory a value is for certain
        self._parent: dict[Node, Node] = {}
        self._storages: dict[int, Node] = {}
        self._held: dict[Node, frozenset[int]] = {}  # the storages of its fake tensors
        self._dirty: set[int] = set()  # the storages that some node writes to
        self._input: Node | None = None
        self._onward: dict[Node, list[Node]] = {}  # a node -> those whose value may be (in) its memory
        for i, node in enumerate(gm.graph.nodes):
            self.position[node] = i
            self._parent[node] = node
            call = ops.read(gm, node)
            if (found := _effect(gm, node, call)) is not None:
                self.effects[node] = found
            self.certain[node] = _aliased(node, call)
            self._place(node, call)
        self.written: dict[Node, list[int]] = {}  # class -> where it is written to, in graph order
        self._note_writes()
        self.returned = self._reaching_output()  # the nodes whose memory the caller may get

    def targets(self, node: Node) -> tuple[Node, ...]:
        """The nodes to whose memory ``node`` writes or may write."""
        if self.effects[node].kind == "unknown" or called_graphs(self.gm, node)[0]:
            return tuple(node.all_input_nodes)
        if isinstance(out := node.kwargs.get("out"), Node):
            return (out,)
        call = ops.read(self.gm, node)
        if call is None and _said_effect(node) is not None:
            return tuple(node.all_input_nodes)
        return ops.writes(self.gm, node)

    def root(self, node: Node) -> Node:
        """The representative of the values that may share memory with that of ``node``."""
        while (above := self._parent[node]) is not node:
            self._parent[node] = node = self._parent[above]
        return node

    def join(self, a: Node, b: Node) -> None:
        """From now on, ``a`` and ``b`` are one value: their classes are one."""
        if b in self.returned:
            self.returned.add(a)
        a, b = self.root(a), self.root(b)
        if a is b:
            return
        self._parent[b] = a
        if b in self.written:
            self.written[a] = sorted(self.written.get(a, []) + self.written.pop(b))

    def last_write(self, node: Node) -> int:
        """The position of the last node that may write to what ``node`` holds; -1 if none does."""
        return self.written.get(self.root(node), [-1])[-1]

    def reads_written(self, node: Node) -> bool:
        """Whether ``node`` calls a module that computes with a tensor that some node writes to."""
        return bool(self._dirty) and any(storage(t) in self._dirty for t in self._module_tensors(node))

    def _module_tensors(self, node: Node) -> Iterator[torch.Tensor]:
        module = ops.submodule(self.gm, str(node.target)) if node.op == "call_module" else None
        if module is not None:
            yield from module.parameters()
            yield from module.buffers()

    def _note_writes(self) -> None:
        for node, found in self.effects.items():
            if found.kind not in ("write", "unknown"):
                continue
            inside = {storage(t) for t in self._module_tensors(node)}
            self._dirty |= inside
            targets = {
                self.root(n)
                for n in (*self.targets(node), *(self._storages[i] for i in inside & self._storages.keys()))
            }
            for target in targets:
                self.written.setdefault(target, []).append(self.position[node])
        for held, node in self._storages.items() if self.written else ():
            if self.root(node) in self.written:
                self._dirty.add(held)

    def _place(self, node: Node, call: ops.Call | None) -> None:
        val = value(node)
        tensors = (
            [val] if isinstance(val, torch.Tensor) else [v for v in tree_leaves(val) if isinstance(v, torch.Tensor)]
        )
        if node.op == "get_attr" and (held := ops.constant(self.gm, node)) is not None:
            tensors.append(held)
        elif val is not None and not tensors:
            self._held[node] = frozenset()
            return  # numbers share no memory
        mine = self._held[node] = frozenset(map(storage, tensors))
        for i in mine:
            self._union(self._storages.setdefault(i, node), node)
        if node.op == "placeholder":
            self._input = self._input or node
            self._union(self._input, node)
        same = (n for n in node.all_input_nodes if not mine.isdisjoint(self._held.get(n, ())))
        for source in {*_sources(node, call), *same}:
            self._onward.setdefault(source, []).append(node)
            self._union(source, node)

    def _reaching_output(self) -> set[Node]:
        found = {n for output in self.gm.graph.find_nodes(op="output") for n in output.all_input_nodes}
        for node in reversed(self.gm.graph.nodes):
            if any(n in found for n in self._onward.get(node, ())):
                found.add(node)
        return found

    def _union(self, a: Node, b: Node) -> None:
        a, b = self.root(a), self.root(b)
        if a is not b:
            self._parent[b] = a


def storage(tensor: torch.Tensor) -> int:
    """What tells the memory of ``tensor`` from other memory, fake or real, as long as the tensor lives."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a tensor without storage: sparse, or oneDNN's
        return id(tensor)


def _sources(node: Node, call: ops.Call | None) -> Iterator[Node]:
    """The inputs with which the value of ``node`` may share memory."""
    if node.op in ("placeholder", "get_attr", "output"):
        return
    if call is not None and call.op.name not in _UNDECLARED:
        first = call.arguments[call.op.parameters[0]] if call.op.parameters else None
        if (call.op.view or call.inplace) and isinstance(first, Node):
            yield first
        return
    if isinstance(node.target, OpOverload):
        schema = node.target._schema
        named = schema.name.rpartition("::")[2]
        if named in _UNDECLARED or any(r.alias_info is not None for r in schema.returns):
            yield from node.all_input_nodes
        return
    yield from node.all_input_nodes


# Operators that always return a view, where the storages of fake tensors do not tell.
_VIEWS = frozenset(
    {
        "chunk",
        "detach",
        "diagonal",
        "expand",
        "expand_as",
        "identity",
        "movedim",
        "narrow",
        "permute",
        "select",
        "slice",
    }
    | {"split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view"}
)


def _aliased(node: Node, call: ops.Call | None) -> Node | None:
    """The input whose memory is for certain that of the value of ``node``."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], Node):
        return None
    target: Any = node.target
    if call is not None:
        name, inplace = call.op.name, call.inplace
    elif isinstance(target, OpOverload):
        name, inplace = target._schema.name.rpartition("::")[2], _writes_what_it_returns(target)
    else:
        name, inplace = "", False
    return node.args[0] if inplace or name in _VIEWS or _of_sequence(node) else None


@functools.cache
def _writes_what_it_returns(target: OpOverload) -> bool:
    return any(r.alias_info is not None and r.alias_info.is_write for r in target._schema.returns)


def _of_sequence(node: Node) -> bool:
    """Whether ``node`` takes an element out of a list or tuple."""
    return node.target is operator.getitem and isinstance(value(node.all_input_nodes[0]), tuple | list)


def nbytes(val: Any) -> int | None:
    """
    The bytes of a tensor's own elements, of symbolic sizes by their hints; 0 for a number; None where unknown.

    A sequence of values has the sum of theirs.
    """
    if isinstance(val, torch.Tensor):
        return optimization_hint(val.numel()) * val.element_size()
    if isinstance(val, int | float | bool | complex | torch.SymInt | torch.SymFloat | torch.SymBool):
        return 0
    if isinstance(val, tuple | list):
        sizes = [0 if v is None else nbytes(v) for v in val]
        return None if any(s is None for s in sizes) else sum(s for s in sizes if s is not None)
    return None


def value(node: Node) -> Any:
    """What the graph says about the value of ``node``: a fake tensor, a number, a sequence; None where nothing is."""
    return node.meta.get("val", node.meta.get("example_value"))


def fixed(size: int | torch.SymInt) -> int | None:
    """A size as a number; None where it is open.  torch.export leaves symbols that turned out to be one number."""
    return size if isinstance(size, int) else size.node.maybe_as_int()
