"""A graph module at one moment, by name and reference: what a transformation can change, without a copy of it.

Nodes are known by name and tensors by path, so what is recorded here outlives copies of the graph module.  A graph
module may hold further graph modules (captured submodules, branches of ``torch.cond``); a snapshot covers them all.  A
node of the inner graph module at path ``p`` has the key ``p::name``.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import pickle
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import _get_qualified_name
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fxopt.garbage import uncollected

OWNER = "_fxopt_owner"
# fmt: off
_INTERNAL = frozenset((  # what is recorded in another way, or is made anew from the graph
    "_graph", "_code", "_lineno_map", "_prologue_start", "meta", "shape_env", "_tracer_cls", "_tracer_extras",
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_fxopt_owner",
    "_graphmodule_cls_name", "_replace_hooks", "_create_node_hooks", "_erase_node_hooks", "_deepcopy_hooks",
    "_is_full_backward_hook",
))
# fmt: on
_CONTAINERS: tuple[type, ...] = (dict, list, set, OrderedDict)


@dataclass(frozen=True)
class Ref:
    """A node as an argument, by name."""

    name: str


@dataclass(frozen=True)
class Record:
    """One node, by name."""

    op: str
    target: Any
    args: Any
    kwargs: Any
    type: Any

    def refs(self) -> set[str]:
        """The names of the nodes that it reads."""
        found: set[str] = set()
        _collect_refs((self.args, self.kwargs), found)
        return found

    def same(self, other: Record | None) -> bool:
        return other is not None and all(
            same(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        target = self.target
        if isinstance(target, OpOverload | OpOverloadPacket):
            target = _Named(f"torch.ops.{target}")
        elif isinstance(target, HigherOrderOperator):
            target = _Named(f"torch.ops.higher_order.{target.name()}")
        elif isinstance(target, types.BuiltinFunctionType):  # many of torch's cannot be pickled, but all can be found
            name = _get_qualified_name(target)
            target = _Named(name if "." in name else f"builtins.{name}")
            if target.find() is not self.target:
                raise pickle.PicklingError(f"{self.target} is not {target.name}; it cannot be pickled")
        return _load_record, (self.op, target, self.args, self.kwargs, self.type)


@dataclass(frozen=True)
class _Named:
    """A function, by the name that the code of a graph module calls it by."""

    name: str

    def find(self) -> Any:
        path = self.name.split(".")
        found: Any = importlib.import_module(path[0])
        for name in path[1:]:
            found = getattr(found, name, None)
        return found


def _load_record(op: str, target: Any, args: Any, kwargs: Any, type_: Any) -> Record:
    return Record(op, target.find() if isinstance(target, _Named) else target, args, kwargs, type_)


@dataclass(frozen=True)
class Slot:
    """One entry of a module: a parameter, a buffer or a child; of a tensor also whether it was written to since."""

    kind: Literal["parameter", "buffer", "module"]
    value: Any
    persistent: bool = True
    version: int = 0
    pointer: int = 0
    requires_grad: bool = False

    def entry_same(self, other: Slot | None) -> bool:
        """Whether the same object stands there in the same way."""
        return (
            other is not None
            and self.value is other.value
            and self.kind == other.kind
            and self.persistent == other.persistent
        )

    def same(self, other: Slot | None) -> bool:
        """Whether the same object stands there, untouched."""
        return self.entry_same(other) and other is not None and self.content() == other.content()

    def content(self) -> tuple[int, int, bool]:
        return self.version, self.pointer, self.requires_grad

    def edited(self) -> bool:
        """Whether the tensor was written to since."""
        return isinstance(self.value, torch.Tensor) and self.content() != slot_of(self.kind, self.value).content()

    def of_copy(self, value: Any, edited: bool) -> Slot:
        """This entry for ``value``, a copy of its own; what was edited stays known as edited."""
        if not isinstance(value, torch.Tensor):
            return dataclasses.replace(self, value=value)
        fresh = slot_of(self.kind, value, self.persistent)
        return dataclasses.replace(fresh, version=-1) if edited else fresh  # no tensor has version -1

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return self.of_copy(copy.deepcopy(self.value, memo), self.edited())

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_slot, (self.kind, self.value, self.persistent, self.edited())


def _load_slot(kind: Literal["parameter", "buffer", "module"], value: Any, persistent: bool, edited: bool) -> Slot:
    return Slot(kind, value, persistent).of_copy(value, edited)


@dataclass(frozen=True)
class Held:
    """A plain attribute of a module; of a mutable container also what it held."""

    value: Any
    content: Any = None

    def same(self, other: Held | None) -> bool:
        if other is None or not same(self.value, other.value):
            return False
        return self.content is None or same_container(self.content, other.content)


@dataclass(frozen=True)
class Snapshot:
    """A graph module at one moment, by name and reference: nothing is copied that can be large."""

    raw: dict[str, tuple[Any, ...]]  # key -> (node, op, target, args, kwargs, type)
    names: dict[Node, str]
    users: dict[str, tuple[Node, ...]]
    metas: dict[str, dict[str, Any]]
    containers: dict[int, tuple[Any, Any]]  # id -> (a container that stands in some meta, what it held)
    slots: dict[str, Slot]
    attributes: dict[tuple[str, str], Held]
    entries: dict[str, tuple[tuple[str, ...], ...]]  # module path -> the order of its parameters, buffers, children
    orders: dict[str, tuple[str, ...]]  # graph path -> its nodes in order
    used: dict[str, tuple[frozenset[str], dict[str, int]]]  # graph path -> names handed out
    codegens: dict[str, Held]
    modules: dict[str, GraphModule]

    def record(self, key: str) -> Record | None:
        found = self.raw.get(key)
        if found is None:
            return None
        _, op, target, args, kwargs, type_ = found
        return Record(op, target, by_name(args, self.names), by_name(kwargs, self.names), type_)

    def name(self, node: Node) -> str:
        return self.names.get(node, node.name)

    def graph(self, path: str) -> Graph:
        """The graph of the graph module at ``path``, as an object."""
        node: Node = self.raw[self.orders[path][0]][0]
        return node.graph

    def users_by_name(self) -> dict[str, tuple[str, ...]]:
        """The users of each node, in order."""
        return {key: tuple(map(self.name, users)) for key, users in self.users.items()}

    def within(self, path: str) -> Snapshot:
        """What this says of the graph of the graph module at ``path``, and of that alone."""
        prefix = f"{path}::" if path else ""

        def cut(keyed: dict[str, Any]) -> dict[str, Any]:
            return {k.rpartition("::")[2]: v for k, v in keyed.items() if graph_of(k) == path}

        inner = self.modules[path]
        slots, attributes, entries = state(inner)
        return dataclasses.replace(
            self,
            raw=cut(self.raw),
            users=cut(self.users),
            metas=cut(self.metas),
            slots=slots,
            attributes=attributes,
            entries=entries,
            orders={"": tuple(k[len(prefix) :] for k in self.orders[path])},
            used={"": self.used[path]},
            codegens={"": self.codegens[path]},
            modules={"": inner},
        )


def graphs(gm: GraphModule) -> dict[str, GraphModule]:
    """``gm`` and the graph modules inside it, by path; each once."""
    return {path: m for path, m in gm.named_modules() if isinstance(m, GraphModule)}


def graph_of(key: str) -> str:
    """The path of the graph module to which a node's key belongs."""
    return key.rpartition("::")[0]


def node_key(graph: str, name: str) -> str:
    """The key of the node ``name`` in the graph module at path ``graph``."""
    return f"{graph}::{name}" if graph else name


def path_in(graph: str, target: str) -> str:
    """The path of what the graph module at path ``graph`` calls ``target``."""
    return f"{graph}.{target}" if graph else target


@uncollected()
def snapshot(gm: GraphModule) -> Snapshot:
    """Everything about ``gm`` that a transformation can change, by name and reference."""
    raw: dict[str, tuple[Any, ...]] = {}
    names: dict[Node, str] = {}
    users: dict[str, tuple[Node, ...]] = {}
    metas: dict[str, dict[str, Any]] = {}
    containers: dict[int, tuple[Any, Any]] = {}
    orders, used, codegens = {}, {}, {}
    inner_modules = graphs(gm)
    for path, inner in inner_modules.items():
        prefix = f"{path}::" if path else ""
        order = []
        for node in inner.graph.nodes:
            name = node.name
            key = prefix + name
            raw[key] = (node, node.op, node.target, node._args, node._kwargs, node.type)
            names[node] = name
            users[key] = tuple(node.users)
            metas[key] = meta = node.meta.copy()
            for value in meta.values():
                if type(value) in _CONTAINERS and id(value) not in containers:
                    containers[id(value)] = (value, value.copy())
            order.append(key)
        orders[path] = tuple(order)
        space = inner.graph._graph_namespace
        used[path] = (frozenset(space._used_names), dict(space._base_count))
        codegens[path] = Held(inner.graph._codegen, dict(vars(inner.graph._codegen)))
    slots, attributes, entries = state(gm)
    return Snapshot(
        raw, names, users, metas, containers, slots, attributes, entries, orders, used, codegens, inner_modules
    )


State = tuple[dict[str, Slot], dict[tuple[str, str], Held], dict[str, tuple[tuple[str, ...], ...]]]


def state(gm: nn.Module) -> State:
    """The entries of all modules, their plain attributes, and the order of their entries, each by path."""
    slots: dict[str, Slot] = {}
    attributes: dict[tuple[str, str], Held] = {}
    entries: dict[str, tuple[tuple[str, ...], ...]] = {}
    for path, module in modules(gm):
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            slots[prefix + name] = slot_of("parameter", parameter)
        for name, buffer in module._buffers.items():
            slots[prefix + name] = slot_of("buffer", buffer, name not in module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            slots[prefix + name] = Slot("module", child)
        entries[path] = (tuple(module._parameters), tuple(module._buffers), tuple(module._modules))
        for name, value in plain_attributes(module).items():
            attributes[path, name] = Held(value, value.copy() if type(value) in _CONTAINERS else None)
    return slots, attributes, entries


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What ``module`` holds besides its entries; an empty table of hooks is as good as none."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in _INTERNAL and not (isinstance(value, dict) and not value and name.startswith("_"))
    }


def modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every path that leads to it; a scripted one is taken as a whole."""
    above: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in above or isinstance(module, torch.jit.ScriptModule):
            return
        yield path, module
        above.add(id(module))
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(f"{path}.{name}" if path else name, child)
        above.remove(id(module))

    return walk("", root)


def slot_of(
    kind: Literal["parameter", "buffer", "module"], tensor: torch.Tensor | None, persistent: bool = True
) -> Slot:
    """The entry that holds ``tensor``, as it is now."""
    if tensor is None:
        return Slot(kind, None, persistent)
    return Slot(kind, tensor, persistent, _version(tensor), _pointer(tensor), tensor.requires_grad)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _pointer(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() if has_memory(tensor) else 0


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has memory of its own that can be addressed."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer | FakeTensor | FunctionalTensor):
        return False
    return not tensor.is_mkldnn and tensor.layout is torch.strided and tensor.device.type != "meta"


# --- equality -----------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Equality that tells ``1`` from ``1.0`` and ``True``, and 0.0 from -0.0, and takes NaN as equal to itself."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, slice):
        return same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, complex):
        return same((a.real, a.imag), (b.real, b.imag))
    if isinstance(a, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        return False  # not the same object; to ask a symbol would add a guard
    try:
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):  # an object that cannot say; only identity counts, and it differs
        return False


def fresh(value: Any) -> Any:
    """``value``, or a copy of it if it can be changed in place."""
    return value.copy() if type(value) in _CONTAINERS else value


def same_container(a: Any, b: Any) -> bool:
    """Whether two containers hold the same things in the same order."""
    if len(a) != len(b) or type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(v is b[k] or same(v, b[k]) for k, v in a.items())
    if isinstance(a, set):
        return bool(a == b)
    return all(x is y or same(x, y) for x, y in zip(a, b, strict=True))


# --- arguments by name, and by node --------------------------------------------------------------------------------


def by_name(value: Any, names: Mapping[Node, str]) -> Any:
    """``value`` with `Ref` in place of nodes, and plain lists and dicts."""
    return _mapped(value, Node, lambda n: Ref(names.get(n, n.name)))


def by_node(value: Any, nodes: Mapping[str, Node]) -> Any:
    """``value`` with nodes in place of `Ref`."""
    return _mapped(value, Ref, lambda r: nodes[r.name])


def _mapped(value: Any, kind: type, to: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return to(value)
    if isinstance(value, tuple):
        items = [_mapped(v, kind, to) for v in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        changed = any(a is not b for a, b in zip(items, value, strict=True))
        return tuple(items) if changed else value  # a torch.Size stays one
    if isinstance(value, list):
        return [_mapped(v, kind, to) for v in value]
    if isinstance(value, dict):
        return {k: _mapped(v, kind, to) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(_mapped(value.start, kind, to), _mapped(value.stop, kind, to), _mapped(value.step, kind, to))
    return value


def _collect_refs(value: Any, found: set[str]) -> None:
    if isinstance(value, Ref):
        found.add(value.name)
    elif isinstance(value, tuple | list):
        for v in value:
            _collect_refs(v, found)
    elif isinstance(value, dict):
        for v in value.values():
            _collect_refs(v, found)
    elif isinstance(value, slice):
        _collect_refs((value.start, value.stop, value.step), found)
