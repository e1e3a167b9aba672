"""What a transformation changed: the difference of two snapshots, split into independent rewrites, and its inverse.

Nodes are known by name and tensors by path, so a delta outlives copies of the graph module it was taken from.  A graph
module may hold further graph modules (captured submodules, branches of ``torch.cond``); a delta covers them all.  A
node of the inner graph module at path ``p`` has the key ``p::name``.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import heapq
import math
import operator
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
MARKS = "fxopt"  # the key of node.meta under which the signatures of transformations stand
_OWNER = "_fxopt_owner"
_INTERNAL = frozenset(
    "_graph _code _lineno_map _prologue_start meta shape_env _tracer_cls _tracer_extras _parameters _buffers _modules "
    "_non_persistent_buffers_set _fxopt_owner _fxopt_history _graphmodule_cls_name _replace_hooks _create_node_hooks "
    "_erase_node_hooks _deepcopy_hooks _is_full_backward_hook".split()
)


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


@dataclass(frozen=True)
class Slot:
    """One entry of a module: a parameter, a buffer or a child."""

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


@dataclass(frozen=True)
class Held:
    """A plain attribute of a module; of a mutable container also what it held."""

    value: Any
    content: Any = None

    def same(self, other: Held | None) -> bool:
        if other is None or not same(self.value, other.value):
            return False
        return self.content is None or _same_container(self.content, other.content)


Pair = tuple[Any, Any]  # (before, after); None is absence


@dataclass(frozen=True)
class Snapshot:
    """A graph module at one moment, by name and reference: nothing is copied that can be large."""

    raw: dict[str, tuple[Any, ...]]  # key -> (node, op, target, args, kwargs, type)
    names: dict[Node, str]
    metas: dict[str, dict[str, Any]]
    slots: dict[str, Slot]
    attributes: dict[tuple[str, str], Held]
    entries: dict[str, tuple[tuple[str, ...], ...]]  # module path -> the order of its parameters, buffers, children
    orders: dict[str, tuple[str, ...]]  # graph path -> its nodes in order
    used: dict[str, tuple[frozenset[str], dict[str, int]]]  # graph path -> names handed out
    codegens: dict[str, Any]

    def record(self, key: str) -> Record | None:
        found = self.raw.get(key)
        if found is None:
            return None
        _, op, target, args, kwargs, type_ = found
        return Record(op, target, _by_name(args, self.names), _by_name(kwargs, self.names), type_)


@dataclass(frozen=True)
class Delta:
    """Only what differs, each as (before, after), where None means that the thing did not exist."""

    nodes: dict[str, tuple[Record | None, Record | None]] = field(default_factory=dict)
    metas: dict[str, Pair] = field(default_factory=dict)
    slots: dict[str, tuple[Slot | None, Slot | None]] = field(default_factory=dict)
    attributes: dict[tuple[str, str], tuple[Held | None, Held | None]] = field(default_factory=dict)
    entries: dict[str, Pair] = field(default_factory=dict)
    orders: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    used: dict[str, tuple[frozenset[str], frozenset[str], dict[str, Pair]]] = field(default_factory=dict)
    codegens: dict[str, Pair] = field(default_factory=dict)
    bridges: tuple[tuple[str, tuple[str, ...]], ...] = ()  # (changed path, what surrounds an unchanged node that reads it)

    def __bool__(self) -> bool:
        return bool(self.nodes or self.slots or self.attributes or self.orders or self.metas or self.codegens)

    def inverse(self) -> Delta:
        def swap(d: dict[Any, Any]) -> dict[Any, Any]:
            return {k: (b, a) for k, (a, b) in d.items()}

        used = {p: (gone, new, swap(counts)) for p, (new, gone, counts) in self.used.items()}
        return Delta(
            swap(self.nodes),
            swap(self.metas),
            swap(self.slots),
            swap(self.attributes),
            swap(self.entries),
            swap(self.orders),
            used,
            swap(self.codegens),
            self.bridges,
        )

    def touched(self) -> set[str]:
        """The nodes and the paths that differ."""
        found = {*self.nodes, *self.slots, *(f"{m}:{a}" for m, a in self.attributes), *self.metas}
        return found | {f"order of {p or 'the graph'}" for p in self.reordered()}

    def reordered(self) -> list[str]:
        """The graphs whose surviving nodes stand in another order."""
        return [p for p, (a, b) in self.orders.items() if _permuted(a, b)]

    def mentions(self) -> set[str]:
        """What differs, and what that refers to."""
        found = self.touched()
        for key, pair in self.nodes.items():
            for record in pair:
                if record is not None:
                    found |= {_key(graph_of(key), r) for r in record.refs()}
                    if record.op in ("get_attr", "call_module"):
                        found.add(_path(graph_of(key), str(record.target)))
        return found

    def existence(self) -> set[str]:
        """The nodes and paths that existed only before, or only after."""
        nodes = {k for k, (a, b) in self.nodes.items() if a is None or b is None}
        return nodes | {p for p, (a, b) in self.slots.items() if a is None or b is None}

    def tensors(self) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
        """The parameters and buffers that differ, by path."""

        def tensor(slot: Slot | None) -> torch.Tensor | None:
            return slot.value if slot is not None and isinstance(slot.value, torch.Tensor) else None

        return {p: (tensor(a), tensor(b)) for p, (a, b) in self.slots.items() if tensor(a) is not tensor(b)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Delta:
        """Records are immutable and known to the copy by the same names; tensors and modules are copied along."""
        slots = {p: (_copy_slot(a, memo), _copy_slot(b, memo)) for p, (a, b) in self.slots.items()}
        attributes = {
            k: (None if a is None else copy.deepcopy(a, memo), None if b is None else copy.deepcopy(b, memo))
            for k, (a, b) in self.attributes.items()
        }
        codegens = {p: (copy.deepcopy(a, memo), copy.deepcopy(b, memo)) for p, (a, b) in self.codegens.items()}
        return dataclasses.replace(self, slots=slots, attributes=attributes, codegens=codegens)


# --- taking a snapshot --------------------------------------------------------------------------------------------


def graphs(gm: GraphModule) -> dict[str, GraphModule]:
    """``gm`` and the graph modules inside it, by path; each once."""
    return {path: m for path, m in gm.named_modules() if isinstance(m, GraphModule)}


def graph_of(key: str) -> str:
    """The path of the graph module to which a node's key belongs."""
    return key.rpartition("::")[0]


def _key(graph: str, name: str) -> str:
    return f"{graph}::{name}" if graph else name


def _path(graph: str, target: str) -> str:
    return f"{graph}.{target}" if graph else target


def snapshot(gm: GraphModule) -> Snapshot:
    """Everything about ``gm`` that a transformation can change, by name and reference."""
    raw: dict[str, tuple[Any, ...]] = {}
    names: dict[Node, str] = {}
    metas: dict[str, dict[str, Any]] = {}
    orders, used, codegens = {}, {}, {}
    for path, inner in graphs(gm).items():
        prefix = f"{path}::" if path else ""
        order = []
        for node in inner.graph.nodes:
            key = prefix + node.name
            raw[key] = (node, node.op, node.target, node._args, node._kwargs, node.type)
            names[node] = node.name
            metas[key] = node.meta.copy()
            order.append(key)
        orders[path] = tuple(order)
        space = inner.graph._graph_namespace
        used[path] = (frozenset(space._used_names), dict(space._base_count))
        codegens[path] = inner.graph._codegen
    slots, attributes, entries = _state(gm)
    return Snapshot(raw, names, metas, slots, attributes, entries, orders, used, codegens)


_PLAIN = (bool, int, float, str, type(None), tuple, torch.dtype, torch.device)


def _state(gm: GraphModule) -> tuple[dict[str, Slot], dict[tuple[str, str], Held], dict[str, tuple[tuple[str, ...], ...]]]:
    slots: dict[str, Slot] = {}
    attributes: dict[tuple[str, str], Held] = {}
    entries: dict[str, tuple[tuple[str, ...], ...]] = {}
    for path, module in gm.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            slots[prefix + name] = _slot("parameter", parameter)
        for name, buffer in module._buffers.items():
            slots[prefix + name] = _slot("buffer", buffer, name not in module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            slots[prefix + name] = Slot("module", child)
        entries[path] = (tuple(module._parameters), tuple(module._buffers), tuple(module._modules))
        for name, value in module.__dict__.items():
            if name in _INTERNAL or (isinstance(value, dict) and not value and name.startswith("_")):
                continue
            content = copy.copy(value) if type(value) in _CONTAINERS else None
            attributes[path, name] = Held(value, content)
    return slots, attributes, entries


def _slot(kind: Literal["parameter", "buffer"], tensor: torch.Tensor | None, persistent: bool = True) -> Slot:
    if tensor is None:
        return Slot(kind, None, persistent)
    return Slot(kind, tensor, persistent, _version(tensor), _pointer(tensor), tensor.requires_grad)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _pointer(tensor: torch.Tensor) -> int:
    if tensor.is_mkldnn or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return id(tensor)
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a fake or functional tensor has no memory of its own
        return id(tensor)


def _copy_slot(slot: Slot | None, memo: dict[int, Any]) -> Slot | None:
    if slot is None or slot.value is None:
        return slot
    value = copy.deepcopy(slot.value, memo)
    if not isinstance(value, torch.Tensor):
        return dataclasses.replace(slot, value=value)
    edited = not slot.same(_slot("parameter" if slot.kind == "parameter" else "buffer", slot.value, slot.persistent))
    version = -1 if edited else _version(value)  # no tensor has version -1: it stays known as edited
    return dataclasses.replace(slot, value=value, version=version, pointer=_pointer(value))


# --- comparing ----------------------------------------------------------------------------------------------------


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
    if isinstance(a, torch.Tensor):
        return False  # not the same object
    try:
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):  # an object that cannot say; only identity counts, and it differs
        return False


_CONTAINERS: tuple[type, ...] = (dict, list, set, OrderedDict)


def _same_container(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(v is b[k] or same(v, b[k]) for k, v in a.items())
    if isinstance(a, set):
        return bool(a == b)
    return len(a) == len(b) and all(x is y or same(x, y) for x, y in zip(a, b, strict=True))


def diff(before: Snapshot, after: Snapshot) -> Delta:
    """What differs between two snapshots of the same graph module."""
    nodes = _diff_nodes(before, after)
    metas = {}
    for key in before.metas.keys() | after.metas.keys():
        old, new = before.metas.get(key), after.metas.get(key)
        if old is None or new is None or not _same_meta(old, new):
            metas[key] = (old, new)
    orders = {p: (before.orders.get(p, ()), o) for p, o in after.orders.items() if before.orders.get(p) != o}
    orders |= {p: (o, ()) for p, o in before.orders.items() if p not in after.orders}
    used = {}
    for path in before.used.keys() & after.used.keys():
        (old_names, old_counts), (new_names, new_counts) = before.used[path], after.used[path]
        if old_names is new_names or (old_names == new_names and old_counts == new_counts):
            continue
        counts = {
            n: (old_counts.get(n), new_counts.get(n))
            for n in old_counts.keys() | new_counts.keys()
            if old_counts.get(n) != new_counts.get(n)
        }
        used[path] = (new_names - old_names, old_names - new_names, counts)
    codegens = {p: (c, after.codegens[p]) for p, c in before.codegens.items() if after.codegens.get(p, c) is not c}
    found = Delta(
        nodes,
        metas,
        _pairs(before.slots, after.slots, Slot.entry_same),
        _pairs(before.attributes, after.attributes, Held.same),
        _pairs(before.entries, after.entries, operator.eq),
        orders,
        used,
        codegens,
    )
    return dataclasses.replace(found, bridges=_bridges(found, after))


def _diff_nodes(before: Snapshot, after: Snapshot) -> dict[str, tuple[Record | None, Record | None]]:
    renamed = any(before.names.get(n, name) != name for n, name in after.names.items())
    changed: dict[str, tuple[Record | None, Record | None]] = {}
    for key, new in after.raw.items():
        old = before.raw.get(key)
        if old is not None and not renamed and all(x is y for x, y in zip(old, new, strict=True)):
            continue
        a, b = before.record(key), after.record(key)
        if a is None or not a.same(b):
            changed[key] = (a, b)
    for key in before.raw:
        if key not in after.raw:
            changed[key] = (before.record(key), None)
    return changed


def _pairs(before: Mapping[Any, Any], after: Mapping[Any, Any], equal: Any) -> dict[Any, Pair]:
    found = {}
    for key, old in before.items():
        new = after.get(key)
        if new is None or not equal(old, new):
            found[key] = (old, new)
    for key, new in after.items():
        if key not in before:
            found[key] = (None, new)
    return found


def _same_meta(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if len(a) == len(b) and all(a.get(k, a) is v for k, v in b.items()):
        return True
    keys = (a.keys() | b.keys()) - {MARKS}
    return all(k in a and k in b and (a[k] is b[k] or same(a[k], b[k])) for k in keys)


def _by_name(value: Any, names: Mapping[Node, str]) -> Any:
    if isinstance(value, Node):
        return Ref(names.get(value, value.name))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_by_name(v, names) for v in value))
    if isinstance(value, tuple):
        return tuple(_by_name(v, names) for v in value)
    if isinstance(value, list):
        return [_by_name(v, names) for v in value]
    if isinstance(value, dict):
        return {k: _by_name(v, names) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(_by_name(value.start, names), _by_name(value.stop, names), _by_name(value.step, names))
    return value


def _by_node(value: Any, nodes: Mapping[str, Node]) -> Any:
    if isinstance(value, Ref):
        return nodes[value.name]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_by_node(v, nodes) for v in value))
    if isinstance(value, tuple):
        return tuple(_by_node(v, nodes) for v in value)
    if isinstance(value, list):
        return [_by_node(v, nodes) for v in value]
    if isinstance(value, dict):
        return {k: _by_node(v, nodes) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(_by_node(value.start, nodes), _by_node(value.stop, nodes), _by_node(value.step, nodes))
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


def _permuted(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    in_a, in_b = set(a), set(b)
    return [n for n in a if n in in_b] != [n for n in b if n in in_a]


# --- independent rewrites -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """An independent part of a delta: nothing outside it refers to what it created or removed."""

    id: str  # stable: the module path and a hash of the content
    module_path: str
    delta: Delta


def split(delta: Delta) -> tuple[Part, ...]:
    """
    The independent parts of ``delta``, in graph order.

    Joins changed nodes that refer to each other before or after, a changed parameter with the nodes that read it, and
    all that touches one module object (union-find).  A change of nothing but order is a part of its own.
    """
    groups = _group(delta)
    position = {k: i for _, (a, b) in delta.orders.items() for i, k in enumerate((*a, *b))}
    for i, key in enumerate(delta.nodes):
        position.setdefault(key, i)
    parts = [_restrict(delta, members) for members in groups]
    parts.sort(key=lambda d: min((position[k] for k in d.nodes if k in position), default=-1))
    if delta.reordered() or not parts:
        rest = Delta(orders=delta.orders, codegens=delta.codegens)
        parts += [rest] if rest.reordered() or rest.codegens else []
    found = []
    seen: dict[str, int] = {}
    for part in parts:
        path = _module_path(part)
        name = f"{path or '.'}#{_digest(part)}"
        seen[name] = seen.get(name, 0) + 1
        found.append(Part(name if seen[name] == 1 else f"{name}.{seen[name]}", path, part))
    return tuple(found)


def _group(delta: Delta) -> list[set[Any]]:
    parent: dict[Any, Any] = {}

    def find(x: Any) -> Any:
        parent.setdefault(x, x)
        while parent[x] is not x and parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    def union(a: Any, b: Any) -> None:
        parent[find(a)] = find(b)

    members: list[Any] = [("node", k) for k in delta.nodes]
    members += [("node", k) for k in delta.metas if k not in delta.nodes]
    paths = {*delta.slots, *(m for m, _ in delta.attributes)}
    members += [("path", p) for p in paths]
    for m in members:
        find(m)
    for key, pair in delta.nodes.items():
        graph = graph_of(key)
        for record in pair:
            if record is None:
                continue
            for name in record.refs():
                if (other := _key(graph, name)) in delta.nodes:
                    union(("node", key), ("node", other))
            if record.op in ("get_attr", "call_module"):
                for path in _related(_path(graph, str(record.target)), paths):
                    union(("node", key), ("path", path))
    for path, around in delta.bridges:
        for key in around:
            union(("node", key), ("path", path))
    objects: dict[int, Any] = {}
    for path, pair in delta.slots.items():
        for slot in pair:
            if slot is not None and slot.value is not None:  # one object at two paths: tied weights stay together
                union(("path", path), objects.setdefault(id(slot.value), ("path", path)))
        owner = path
        while owner := owner.rpartition(".")[0]:
            if owner in paths:
                union(("path", path), ("path", owner))
    groups: dict[Any, set[Any]] = {}
    for m in members:
        groups.setdefault(find(m), set()).add(m)
    return list(groups.values())


def _related(path: str, paths: set[str]) -> Iterator[str]:
    """The changed paths that are ``path``, hold it, or (for a module) are inside it."""
    owner = path
    while owner:
        if owner in paths:
            yield owner
        owner = owner.rpartition(".")[0]
    yield from _inside(path, paths)


def _inside(path: str, paths: set[str]) -> list[str]:
    prefix = f"{path}."
    return [p for p in paths if p.startswith(prefix)] if len(paths) < 64 else _indexed(path, paths)


def _indexed(path: str, paths: set[str]) -> list[str]:
    index = _INDEX.get(id(paths))
    if index is None:
        _INDEX.clear()  # one delta at a time
        index = {}
        for p in paths:
            owner = p
            while owner := owner.rpartition(".")[0]:
                index.setdefault(owner, []).append(p)
        _INDEX[id(paths)] = index
    return index.get(path, [])


_INDEX: dict[int, dict[str, list[str]]] = {}


def _bridges(delta: Delta, after: Snapshot) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """An unchanged reader of a changed parameter binds that parameter to the changed nodes around the reader."""
    paths = {*delta.slots, *(m for m, _ in delta.attributes)}
    found = []
    for key, (node, op, target, *_) in after.raw.items() if paths else ():
        if op not in ("get_attr", "call_module") or key in delta.nodes:
            continue
        graph = graph_of(key)
        path = _path(graph, str(target))
        for changed in _related(path, paths):
            around = (_key(graph, after.names.get(n, n.name)) for n in (*node.users, *node.all_input_nodes))
            found.append((changed, tuple(k for k in around if k in delta.nodes)))
    return tuple(found)


def _restrict(delta: Delta, members: set[Any]) -> Delta:
    keys = {k for kind, k in members if kind == "node"}
    paths = {p for kind, p in members if kind == "path"}
    graphs_in = {graph_of(k) for k in keys}
    owners = {p.rpartition(".")[0] for p in paths} | paths
    return Delta(
        {k: delta.nodes[k] for k in delta.nodes if k in keys},
        {k: delta.metas[k] for k in keys if k in delta.metas},
        {p: delta.slots[p] for p in delta.slots if p in paths},
        {k: v for k, v in delta.attributes.items() if k[0] in paths},
        {p: v for p, v in delta.entries.items() if p in owners},
        {p: v for p, v in delta.orders.items() if p in graphs_in},
    )


def _module_path(part: Delta) -> str:
    """The path of the innermost module that all of the part's nodes come from."""
    found: list[list[str]] = []
    for key in part.nodes:
        for meta in part.metas.get(key, (None, None)):
            stack = (meta or {}).get("nn_module_stack")
            if stack:
                path = list(stack.values())[-1][0]
                found.append([p for p in str(path).split(".") if p])
                break
    for key, pair in part.nodes.items():
        record = next(r for r in pair if r is not None)
        if record.op == "call_module" and not found:
            found.append(_path(graph_of(key), str(record.target)).split("."))
    if not found:
        found = [p.rpartition(".")[0].split(".") for p in part.slots]
    common: list[str] = []
    for names in zip(*found, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def _digest(part: Delta) -> str:
    lines = [f"{k}: {_stable(a)} -> {_stable(b)}" for k, (a, b) in sorted(part.nodes.items())]
    lines += [f"{p}: {_stable(a)} -> {_stable(b)}" for p, (a, b) in sorted(part.slots.items())]
    lines += sorted(f"{m}:{a}" for m, a in part.attributes)
    if not lines:
        lines = [f"{p}: {a} -> {b}" for p, (a, b) in sorted(part.orders.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def _stable(thing: Record | Slot | None) -> str:
    """A text that is the same in every process."""
    if thing is None:
        return "nothing"
    if isinstance(thing, Slot):
        if isinstance(thing.value, torch.Tensor):
            return f"{thing.kind} {tuple(thing.value.shape)} {thing.value.dtype}"
        return f"{thing.kind} {type(thing.value).__name__}"
    target = thing.target
    if isinstance(target, types.FunctionType | types.BuiltinFunctionType):
        target = f"{target.__module__}.{target.__qualname__}"
    return f"{thing.op} {target} {thing.args} {thing.kwargs}"


# --- applying -----------------------------------------------------------------------------------------------------


def conflicts(gm: GraphModule, delta: Delta, now: Snapshot | None = None) -> list[str]:
    """Why ``delta`` cannot be applied to ``gm`` as it is now, without losing somebody else's edits; empty if it can."""
    now = now or snapshot(gm)
    found = []
    born = {k for k, (a, _) in delta.nodes.items() if a is None}
    dead = {k for k, (_, b) in delta.nodes.items() if b is None}
    for key, (before, after) in delta.nodes.items():
        present = now.record(key)
        if before is None and present is not None:
            found.append(f"the name {key} is taken")
        elif before is not None and present is None:
            found.append(f"{key} is gone")
        elif before is not None and not before.same(present):
            found.append(f"{key} changed")
        if after is not None:
            missing = [r for r in after.refs() if (k := _key(graph_of(key), r)) not in now.raw and k not in born]
            found += [f"{r}, which {key} reads, is gone" for r in missing]
    for key in dead & now.raw.keys():
        users = (now.names.get(u, u.name) for u in now.raw[key][0].users)
        strangers = [u for u in users if _key(graph_of(key), u) not in delta.nodes]
        found += [f"{u} reads {key}" for u in strangers]
    for path, (before_slot, _) in delta.slots.items():
        slot = now.slots.get(path)
        if before_slot is None and slot is not None:
            found.append(f"{path} exists already")
        elif before_slot is not None and (slot is None or slot.value is not before_slot.value):
            found.append(f"{path} was replaced")
    for (module, name), (held, _) in delta.attributes.items():
        if held is not None and not held.same(now.attributes.get((module, name))):
            found.append(f"{module}.{name} changed")
    return found


def edited(delta: Delta, now: Snapshot) -> list[str]:
    """The paths of parameters and buffers on the 'before' side of ``delta`` that were written to since."""
    return [
        path
        for path, (slot, after) in delta.slots.items()
        if slot is not None
        and isinstance(slot.value, torch.Tensor)
        and (after is None or after.value is not slot.value)
        and (held := now.slots.get(path)) is not None
        and held.value is slot.value
        and not slot.same(held)
    ]


def apply(gm: GraphModule, delta: Delta) -> None:
    """Bring ``gm`` from the 'before' of ``delta`` to its 'after'; ask `conflicts` first."""
    _apply_state(gm, delta)
    by_graph: dict[str, dict[str, tuple[Record | None, Record | None]]] = {}
    for key, pair in delta.nodes.items():
        by_graph.setdefault(graph_of(key), {})[key] = pair
    inner = graphs(gm)
    for path in {*by_graph, *delta.orders, *(graph_of(k) for k in delta.metas), *delta.codegens, *delta.used}:
        if path not in inner:  # a graph that came or went with its module
            continue
        graph = inner[path].graph
        _apply_nodes(graph, path, by_graph.get(path, {}), delta)
        if path in delta.used:
            _apply_used(graph, *delta.used[path])
        if path in delta.codegens:
            graph._codegen = delta.codegens[path][1]


def _apply_nodes(graph: Graph, path: str, changes: dict[str, tuple[Record | None, Record | None]], delta: Delta) -> None:
    prefix = f"{path}::" if path else ""
    nodes = {n.name: n for n in graph.nodes}
    local = {k[len(prefix) :]: pair for k, pair in changes.items()}
    for name, (before, after) in local.items():
        if before is None and after is not None:
            nodes[name] = _create(graph, name, after)
    for name, (_, after) in local.items():
        if after is None:
            nodes[name].args, nodes[name].kwargs = (), {}
            continue
        node = nodes[name]
        if node.op != after.op:
            node.op = after.op
        if node.target is not after.target:
            node.target = after.target
        node.type = after.type
        node.args, node.kwargs = _by_node(after.args, nodes), _by_node(after.kwargs, nodes)
    for name in [n for n, (_, after) in local.items() if after is None]:
        node = nodes.pop(name)
        graph.erase_node(node)
        graph._graph_namespace._obj_to_name.pop(node, None)
    for key, (_, meta) in delta.metas.items():
        if meta is not None and graph_of(key) == path and (target := nodes.get(key[len(prefix) :])) is not None:
            target.meta.clear()
            target.meta.update(meta)
    if path in delta.orders or local:
        _, after_order = delta.orders.get(path, ((), ()))
        _arrange(graph, [k[len(prefix) :] for k in after_order], {n for n, (b, _) in local.items() if b is None})


def _create(graph: Graph, name: str, record: Record) -> Node:
    with graph.inserting_before(graph._root):  # at the end
        node = graph.create_node(record.op, record.target, (), {})
    space = graph._graph_namespace
    space._used_names.discard(node.name)
    node.name = name
    space._used_names.add(name)
    space._obj_to_name[node] = name
    return node


def _apply_used(graph: Graph, added: frozenset[str], removed: frozenset[str], counts: dict[str, Pair]) -> None:
    """Put back which names were handed out, so that what is created next gets the name it would have got."""
    space = graph._graph_namespace
    space._used_names |= added
    space._used_names -= removed
    space._used_names |= {n.name for n in graph.nodes}
    for base, (_, count) in counts.items():
        if count is None:
            space._base_count.pop(base, None)
        else:
            space._base_count[base] = count


def _arrange(graph: Graph, wanted: list[str], born: set[str]) -> None:
    """
    Put the nodes in the order ``wanted``.

    Nodes that it does not know stay behind the node they stand behind now.  Where that is no topological order any
    more, the topological order nearest to it is taken.
    """
    current = [n for n in graph.nodes if n.name not in born]
    nodes = {n.name: n for n in graph.nodes}
    if not wanted:
        wanted = [n.name for n in current] + [n for n in nodes if n in born]
    known = {n for n in wanted if n in nodes}
    order = [nodes[n] for n in wanted if n in known]
    if len(known) != len(nodes):
        behind: dict[str | None, list[Node]] = {}
        anchor: str | None = None
        for node in current:
            if node.name in known:
                anchor = node.name
            else:
                behind.setdefault(anchor, []).append(node)
        order = [*behind.get(None, ()), *(m for n in order for m in (n, *behind.get(n.name, ())))]
    order = _topological(order)
    cursor = graph._root._next
    for node in order:
        if node is cursor:
            cursor = cursor._next
        else:
            cursor.prepend(node)


def _topological(order: list[Node]) -> list[Node]:
    """``order`` itself if every node follows its inputs, else the nearest order that does."""
    rank = {n: i for i, n in enumerate(order)}
    if all(rank[i] < r for n, r in rank.items() for i in n.all_input_nodes):
        output_last = not order or order[-1].op == "output" or all(n.op != "output" for n in order)
        if output_last:
            return order
    for n in order:
        if n.op == "output":
            rank[n] = len(order)
    waiting = {n: len(n.all_input_nodes) for n in order}
    ready = [(rank[n], n.name, n) for n in order if not waiting[n]]
    heapq.heapify(ready)
    found = []
    while ready:
        _, _, node = heapq.heappop(ready)
        found.append(node)
        for user in node.users:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, (rank[user], user.name, user))
    return found


def _apply_state(gm: GraphModule, delta: Delta) -> None:
    for path in sorted((p for p, (_, after) in delta.slots.items() if after is None), reverse=True):
        _remove(gm, path)
    for path in sorted(p for p, (_, after) in delta.slots.items() if after is not None):
        slot = delta.slots[path][1]
        assert slot is not None
        _put(gm, path, slot)
    for (module_path, name), (_, held) in delta.attributes.items():
        module = _module(gm, module_path)
        if module is None:
            continue
        if held is None:
            _drop_attribute(module, name)
            continue
        module.__dict__[name] = held.value
        if held.content is not None:
            _refill(held.value, held.content)
    for path, (_, entries) in delta.entries.items():
        module = _module(gm, path)
        if module is not None and entries is not None:
            for store, order in zip((module._parameters, module._buffers, module._modules), entries, strict=True):
                _reorder(store, order)


def _drop_attribute(module: nn.Module, name: str) -> None:
    value = module.__dict__.get(name)
    if isinstance(value, dict) and name.startswith("_"):  # one of nn.Module's own tables of hooks: empty, never absent
        value.clear()
    else:
        module.__dict__.pop(name, None)


def _module(gm: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = gm
    for name in path.split(".") if path else ():
        found = found._modules.get(name) if found is not None else None
    return found


def _remove(gm: GraphModule, path: str) -> None:
    owner, _, name = path.rpartition(".")
    module = _module(gm, owner)
    if module is None:  # it went with its owner
        return
    for store in (module._parameters, module._buffers, module._modules):
        store.pop(name, None)
    module._non_persistent_buffers_set.discard(name)


def _put(gm: GraphModule, path: str, slot: Slot) -> None:
    _remove(gm, path)
    owner, _, name = path.rpartition(".")
    module = _module(gm, owner)
    if module is None:
        raise AssertionError(f"{path} has no owner")
    if slot.kind == "module":
        module._modules[name] = slot.value
    elif slot.kind == "parameter":
        module._parameters[name] = slot.value
    else:
        module._buffers[name] = slot.value
        if not slot.persistent:
            module._non_persistent_buffers_set.add(name)
    module.__dict__.pop(name, None)


def _reorder(store: dict[str, Any], order: tuple[str, ...]) -> None:
    wanted = [n for n in order if n in store]
    if list(store)[: len(wanted)] == wanted:
        return
    for name in [*wanted, *(n for n in list(store) if n not in order)]:
        store[name] = store.pop(name)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


# --- keeping the caller's model out of it -------------------------------------------------------------------------


def own(gm: GraphModule) -> None:
    """
    Give ``gm`` module objects of its own, which hold the same tensors.

    ``symbolic_trace`` leaves the caller's own submodules in the graph module; whoever edits one there edits the
    caller's model.  Modules that cannot be copied by their attributes (scripted, or with a ``forward`` bound to the
    instance) stay shared; the vocabulary does not read them.
    """
    token = gm.__dict__.get(_OWNER)
    if token is None:
        token = gm.__dict__[_OWNER] = _Owner()
    copies: dict[int, nn.Module] = {}
    for module in list(gm.modules()):
        if module is not gm and (not isinstance(module, GraphModule)):
            continue
        _own_children(module, token, copies)


class _Owner:
    """The identity of the graph module that owns a module object."""


def _own_children(module: nn.Module, token: _Owner, copies: dict[int, nn.Module]) -> None:
    for name, child in module._modules.items():
        if child is None or isinstance(child, GraphModule):
            continue
        if child.__dict__.get(_OWNER) is not token:
            module._modules[name] = child = _clone(child, token, copies)
        if child.__dict__.get(_OWNER) is token:
            _own_children(child, token, copies)


def _clone(module: nn.Module, token: _Owner, copies: dict[int, nn.Module]) -> nn.Module:
    if id(module) in copies:
        return copies[id(module)]
    if isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__ or hasattr(type(module), "__slots__"):
        return module
    clone = type(module).__new__(type(module))
    for name, value in module.__dict__.items():
        clone.__dict__[name] = copy.copy(value) if type(value) in _CONTAINERS else value
    clone.__dict__[_OWNER] = token
    copies[id(module)] = clone
    return clone


# --- writes to tensors that belong to somebody else ----------------------------------------------------------------


class Watch(TorchDispatchMode):
    """
    Watches the memory of a graph module's parameters and buffers while a transformation runs.

    A write through any torch operation (in place, through ``.data``, a view, or ``out=``) is seen by the memory it
    goes to, whatever tensor object it goes through; the content before the first write is kept, so that the write can
    be taken back.
    """

    def __init__(self, before: Snapshot) -> None:
        super().__init__()
        self._before = {p: s for p, s in before.slots.items() if isinstance(s.value, torch.Tensor)}
        self._aliases = {p: s.value.detach() for p, s in self._before.items()}  # survives an assignment to `.data`
        self._paths = {storage: p for p, a in self._aliases.items() if (storage := _storage(a))}
        self._saved: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._keep(args[i] if i < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _keep(self, written: Any) -> None:
        if isinstance(written, list | tuple):
            for w in written:
                self._keep(w)
        elif isinstance(written, torch.Tensor) and (storage := _storage(written)) in self._paths:
            if storage not in self._saved:
                self._saved[storage] = self._bytes(storage).clone()

    def _bytes(self, storage: int) -> torch.Tensor:
        held = self._aliases[self._paths[storage]]
        return torch.empty(0, dtype=torch.uint8, device=held.device).set_(held.untyped_storage())

    def edited(self) -> list[str]:
        """The paths of the parameters and buffers that were changed in place, by content, memory or flag."""
        found = {self._paths[s] for s, content in self._saved.items() if not torch.equal(self._bytes(s), content)}
        for path, slot in self._before.items():
            now = _slot("parameter", slot.value)
            moved = now.pointer != slot.pointer or now.requires_grad != slot.requires_grad
            if moved or (now.version != slot.version and _storage(slot.value) not in self._saved):
                found.add(path)
        return sorted(found)

    def restore(self) -> None:
        """Take back every change in place."""
        for path, slot in self._before.items():
            if _slot("parameter", slot.value).pointer != slot.pointer:
                slot.value.data = self._aliases[path]
            if slot.value.requires_grad != slot.requires_grad:
                slot.value.requires_grad_(slot.requires_grad)
        for storage, content in self._saved.items():
            self._bytes(storage).copy_(content)


def _storage(tensor: torch.Tensor) -> int:
    if tensor.is_mkldnn or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # fake tensors have no memory
        return 0


def touched_nodes(gm: GraphModule, delta: Delta) -> Iterable[Node]:
    """The nodes of ``gm`` that ``delta`` created or changed."""
    inner = graphs(gm)
    wanted: dict[str, set[str]] = {}
    for key, (_, after) in delta.nodes.items():
        if after is not None:
            wanted.setdefault(graph_of(key), set()).add(key.rpartition("::")[2])
    for path, names in wanted.items():
        if path in inner:
            yield from (n for n in inner[path].graph.nodes if n.name in names)


def put_slot(gm: GraphModule, path: str, slot: Slot) -> None:
    """Put ``slot`` at ``path``, in the place that the entry has now."""
    owner = _module(gm, path.rpartition(".")[0])
    assert owner is not None
    orders = [tuple(s) for s in (owner._parameters, owner._buffers, owner._modules)]
    _put(gm, path, slot)
    for store, order in zip((owner._parameters, owner._buffers, owner._modules), orders, strict=True):
        _reorder(store, order)


def replace_tensor(gm: GraphModule, path: str, value: torch.Tensor) -> None:
    """Put ``value`` in place of the parameter or buffer at ``path``, which keeps its kind, under every tied path."""
    slots = _state(gm)[0]
    old = slots[path]
    if old.kind == "parameter":
        value = nn.Parameter(value.detach(), requires_grad=old.requires_grad)
    for tied, slot in slots.items():
        if slot.value is old.value:
            put_slot(gm, tied, dataclasses.replace(slot, value=value))


def share(gm: GraphModule) -> GraphModule:
    """A copy of ``gm`` with its history that holds the very same tensors: cheap, for trying something out."""
    memo: dict[int, Any] = {}
    for module in gm.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            if isinstance(value, torch.Tensor):
                memo[id(value)] = value
    for commit in gm.meta.get("fxopt.history", ()):
        for pair in commit.delta.slots.values():
            for slot in pair:
                if slot is not None:
                    held = slot.value.modules() if isinstance(slot.value, nn.Module) else ()
                    tensors = [t for m in held for t in (*m._parameters.values(), *m._buffers.values())]
                    memo |= {id(t): t for t in (*tensors, slot.value) if isinstance(t, torch.Tensor)}
    found = copy.deepcopy(gm, memo)
    _restore_layout(gm, found)
    return found


def _restore_layout(gm: GraphModule, made: GraphModule) -> None:
    """What GraphModule's own copy forgets: tensors that no node reads, which buffers persist, the order of entries."""
    copies = dict(made.named_modules())
    for path, module in gm.named_modules():
        twin = copies.get(path)
        if twin is None:
            continue
        for store, own in ((module._parameters, twin._parameters), (module._buffers, twin._buffers)):
            own.clear()
            own.update(store)  # type: ignore[arg-type]
        twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        _reorder(twin._modules, tuple(module._modules))
