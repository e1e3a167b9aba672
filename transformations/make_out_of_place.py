"""A write in place to memory that nobody else sees need not be in place."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from fxopt import ops
from fxopt.delta import graphs
from fxopt.pattern import Miss
from fxopt.transformation import ReversibleTransformation, exists, set_submodule
from fxopt.transformations._inference import alike, inferred
from fxopt.transformations._memory import Memory, value


@dataclass(frozen=True)
class MakeOutOfPlace(ReversibleTransformation):
    """
    f_(x); g(x)  ->  y = f(x); g(y)

    Exact.  Every later reader of what was written to reads the new value.  Other passes see no further than a write in
    place, so this one comes first where a graph has them, as torch.export's of a ResNet (``relu_``, ``add_``).
    Refuses a write that is seen outside (to an input, a parameter, a buffer, or a view of one), one to memory of which
    a view taken before is read after it, one whose result is cast back to the type of ``x`` or would lie differently
    in memory, and random numbers.
    """

    preserves_computation = True

    def transform(self, graph_module: GraphModule) -> None:
        memory = _Values(graph_module)
        found = [w.node for w in memory.writes() if w.reason is None]
        modules = [n for n in found if n.op == "call_module"]
        for node in found:
            memory.redirect(node)
            if node.op != "call_module":
                _respell(graph_module, node)
        _replace_modules(graph_module, modules)

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The writes in place that stay, each with the reason."""
        for inner in graphs(gm).values():
            for write in _Values(inner).writes():
                if write.reason is not None:
                    yield Miss(write.node, write.reason)


@dataclass(frozen=True)
class _Write:
    node: Node
    reason: str | None  # why it stays in place


class _Values:
    """The values of a graph: which lie in one memory, which are one tensor under several names."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._memory = Memory(gm)
        self._at = dict(self._memory.position)
        self._members: dict[Node, list[Node]] = {}  # memory -> the nodes whose value may lie there
        self._names: dict[Node, list[Node]] = {}  # a node -> all the nodes that are the same tensor
        for node in gm.graph.nodes:
            self._members.setdefault(self._memory.root(node), []).append(node)

    def writes(self) -> Iterator[_Write]:
        """Every write in place with the reason why it stays, in graph order."""
        for node, effect in self._memory.effects.items():
            call, doubt = ops.read(self._gm, node), ops.unread(self._gm, node)
            if call is not None and call.inplace:
                yield _Write(node, self._write(node, call))
            elif effect.kind == "write" or node.target is operator.setitem:
                yield _Write(node, f"{node} {effect.reason}, and the vocabulary has no spelling of it that does not")
            elif doubt is not None and getattr(ops.submodule(self._gm, str(node.target)), "inplace", False):
                yield _Write(node, doubt[1])

    def _write(self, node: Node, call: ops.Call) -> str | None:
        target = call.arguments[call.op.parameters[0]]
        if not isinstance(target, Node):
            return f"{node} writes to {target!r}, which is seen outside"
        names = self._names.setdefault(target, [target])  # a write in place returns what it wrote to
        names.append(node)
        self._names[node] = names
        return self._seen(node, target, names) or _unspeakable(call) or _other_value(self._gm, node, call, target)

    def _seen(self, node: Node, target: Node, names: list[Node]) -> str | None:
        """Who else sees what ``node`` writes."""
        members = self._members[self._memory.root(target)]
        for member in members:
            if member.op in ("placeholder", "get_attr"):
                return f"{node} may write to {member}, which is seen outside"
        now = self._at[node]
        for member in members:
            later = [u for u in member.users if self._at[u] > now]
            if later and member not in names and self._at[member] < now:
                return f"{node} may write to {member}, which {later[0]} reads afterwards"
        return None

    def redirect(self, node: Node) -> None:
        """Let all that reads what ``node`` wrote to, after it, read ``node`` itself."""
        for name in self._names[node]:
            for user in list(name.users) if name is not node else ():
                if self._at[user] > self._at[node]:
                    user.replace_input_with(name, node)


def _unspeakable(call: ops.Call) -> str | None:
    if call.op.random is not None and call.op.random(call.arguments):
        return f"{call.op} draws random numbers"
    if call.dialect != "module" and all(s.dialect == "module" or s.inplace for s in call.op.spellings):
        return f"the vocabulary has no spelling of {call.op} out of place"
    return None


def _other_value(gm: GraphModule, node: Node, call: ops.Call, target: Node) -> str | None:
    """Why the operation out of place would not give just what the one in place leaves: it takes the type of ``x``."""
    held, new = value(target), inferred(gm, call)
    if not isinstance(held, torch.Tensor) or not isinstance(new, torch.Tensor):
        # an operation of one tensor and numbers is valid in place only if the type stays
        others = [n for n in node.all_input_nodes if n is not target]
        return f"the shapes and dtypes at {node} are not known; call fxopt.propagate(gm, inputs)" if others else None
    if new.dtype != held.dtype:
        return f"{node} casts its result of {new.dtype} to {held.dtype}"
    if not alike(new, held):
        there, here = (f"{tuple(v.shape)} with strides {v.stride()}" for v in (new, held))
        return f"{node} lies otherwise in memory out of place: {there}, not {here}"
    return None


def _respell(gm: GraphModule, node: Node) -> None:
    """Make ``node`` the same operation out of place; it keeps its name, so that all readers are one rewrite with it."""
    call = ops.read(gm, node)
    assert call is not None
    with gm.graph.inserting_before(node):
        new = call.op.emit(gm.graph, call.dialect, **call.arguments)
    node.op, node.target, node.args, node.kwargs = new.op, new.target, new.args, new.kwargs
    gm.graph.erase_node(new)
    _give_own_memory(node)


def _give_own_memory(node: Node) -> None:
    """The fake value of a write in place is its input's; one that writes nothing has its own."""
    held = value(node)
    if isinstance(held, FakeTensor):
        with held.fake_mode, torch.no_grad():
            node.meta["val"] = held.clone()


def _replace_modules(gm: GraphModule, nodes: list[Node]) -> None:
    """Let ``nodes``, calls of modules that write in place, call copies that do not."""
    mine: dict[str, list[Node]] = {}
    for node in nodes:
        mine.setdefault(str(node.target), []).append(node)
    calls = Counter(str(n.target) for n in gm.graph.find_nodes(op="call_module")) if mine else Counter()
    for path, calling in mine.items():
        module: Any = copy.deepcopy(gm.get_submodule(path))
        module.inplace = False
        alone = calls[path] == len(calling) and not any(owner in calls for owner in _owners(path))
        place = path if alone else _beside(gm, path)
        set_submodule(gm, place, module)
        for node in calling:
            node.target = place
            _give_own_memory(node)


def _owners(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path


def _beside(gm: GraphModule, path: str) -> str:
    return next(p for i in range(1, 1_000_000) if not exists(gm, p := f"{path}_{i}"))
