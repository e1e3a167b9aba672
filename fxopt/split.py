"""A delta as independent rewrites, each of which can be undone alone."""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from fxopt.delta import Delta, related
from fxopt.garbage import uncollected
from fxopt.snapshot import Record, Ref, Slot, graph_of, node_key, path_in


@dataclass(frozen=True)
class Part:
    """An independent part of a delta: nothing outside it refers to what it created or removed."""

    id: str  # stable: the module path and a hash of the content
    module_path: str
    delta: Delta

    def sites(self) -> set[str]:
        """The nodes and paths that it found and changed."""
        nodes = {k for k, (before, _) in self.delta.nodes.items() if before is not None}
        return nodes | {p for p, (before, _) in self.delta.slots.items() if before is not None}


@uncollected()
def split(delta: Delta) -> tuple[Part, ...]:
    """
    The independent parts of ``delta``, in graph order.

    Joins changed nodes that refer to each other before or after, or write to the same value; a changed parameter with
    the nodes that read it; and all that touches one module object (union-find).  A change of nothing but order is a
    part of its own.
    """
    position = {k: i for _, (a, b) in delta.orders.items() for i, k in enumerate((*a, *b))}
    for i, key in enumerate(delta.nodes):
        position.setdefault(key, i)
    parts = _restricted(delta, _group(delta))
    parts.sort(key=lambda d: min((position[k] for k in (*d.nodes, *d.metas) if k in position), default=-1))
    rest = Delta(
        orders={p: delta.orders[p] for p in delta.reordered()},
        codegens=delta.codegens,
        entries={} if parts else delta.entries,
    )
    parts += [rest] if rest else []
    found = []
    seen: dict[str, int] = {}
    for part in parts:
        path = _module_path(part)
        name = f"{path or '.'}#{_digest(part)}"
        seen[name] = seen.get(name, 0) + 1
        found.append(Part(name if seen[name] == 1 else f"{name}.{seen[name]}", path, part))
    return tuple(found)


def joined(parts: Sequence[Delta], whole: Delta) -> Delta:
    """The deltas of some parts of ``whole`` as one."""
    found = Delta(orders=whole.orders if parts else {}, entries=whole.entries if parts else {})
    for part in parts:
        found.nodes.update(part.nodes)
        found.metas.update(part.metas)
        found.slots.update(part.slots)
        found.attributes.update(part.attributes)
        found.codegens.update(part.codegens)
    return found


def _group(delta: Delta) -> dict[Any, int]:
    """Every changed node ("node", key) and path ("path", path), and the number of the group that it belongs to."""
    parent: dict[Any, Any] = {}

    def find(x: Any) -> Any:
        parent.setdefault(x, x)
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    def union(a: Any, b: Any) -> None:
        parent[find(a)] = find(b)

    paths = dict.fromkeys((*delta.slots, *(m for m, _ in delta.attributes)))  # in order: rewrites are numbered by it
    members = [("node", k) for k in {**delta.nodes, **delta.metas}] + [("path", p) for p in paths]
    for m in members:
        find(m)
    touching = related(paths)
    for key, pair in delta.nodes.items():
        graph = graph_of(key)
        for record in pair:
            if record is None:
                continue
            if (written := _written(record)) is not None:  # a write that takes the place of another has no users
                union(("node", key), ("written", node_key(graph, written)))
            for name in record.refs():
                if (other := node_key(graph, name)) in delta.nodes:
                    union(("node", key), ("node", other))
            if record.op in ("get_attr", "call_module"):
                for path in touching(path_in(graph, str(record.target))):
                    union(("node", key), ("path", path))
    for path, around in delta.bridges:
        for key in around:
            union(("node", key), ("path", path))
    for key, *read in delta.ties:
        for other in read:
            union(("node", key), ("node", other))
    _join_state(delta, paths, union)
    numbers: dict[Any, int] = {}
    return {m: numbers.setdefault(find(m), len(numbers)) for m in members}


def _join_state(delta: Delta, paths: Collection[str], union: Any) -> None:
    objects: dict[int, Any] = {}
    for path, pair in delta.slots.items():
        for slot in pair:
            if slot is not None and slot.value is not None:  # one object at two paths: tied weights stay together
                union(("path", path), objects.setdefault(id(slot.value), ("path", path)))
    for path in paths:
        owner = path
        while owner := owner.rpartition(".")[0]:
            if owner in paths:
                union(("path", path), ("path", owner))


def _written(record: Record) -> str | None:
    """The name of the node whose value ``record`` writes to in place; None if it writes to none."""
    if record.op == "call_function" and isinstance(record.target, OpOverload):
        arguments = record.target._schema.arguments
        written = (i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
        place = next(written, len(record.args))
    else:
        name = record.target if isinstance(record.target, str) else getattr(record.target, "__name__", "")
        inplace = name in ("setitem", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
        place = 0 if record.op in ("call_function", "call_method") and inplace else len(record.args)
    value = record.args[place] if place < len(record.args) else None
    return value.name if isinstance(value, Ref) else None


def _restricted(delta: Delta, groups: dict[Any, int]) -> list[Delta]:
    """``delta`` cut along ``groups``."""
    parts = [Delta() for _ in range(max(groups.values(), default=-1) + 1)]
    for key, nodes in delta.nodes.items():
        part = parts[groups["node", key]]
        part.nodes[key] = nodes
        if (path := graph_of(key)) in delta.orders:
            part.orders[path] = delta.orders[path]
    for key, meta in delta.metas.items():
        parts[groups["node", key]].metas[key] = meta
    for path, slots in delta.slots.items():
        part = parts[groups["path", path]]
        part.slots[path] = slots
        if (owner := path.rpartition(".")[0]) in delta.entries:
            part.entries[owner] = delta.entries[owner]
    for (path, name), held in delta.attributes.items():
        part = parts[groups["path", path]]
        part.attributes[path, name] = held
        if path in delta.entries:
            part.entries[path] = delta.entries[path]
    return parts


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
            found.append(path_in(graph_of(key), str(record.target)).split("."))
    if not found:
        owners = {p.rpartition(".")[0] for p in part.slots}  # a module that was replaced is among them itself
        found = [(p if p in owners else p.rpartition(".")[0]).split(".") for p in part.slots]
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
    lines = lines or sorted(part.metas)
    lines = lines or [f"{p}: {a} -> {b}" for p, (a, b) in sorted((part.orders or part.entries).items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def _stable(thing: Record | Slot | None) -> str:
    """A text that is the same in every process."""
    if thing is None:
        return "nothing"
    if isinstance(thing, Slot):
        if isinstance(thing.value, torch.Tensor):
            return f"{thing.kind} {tuple(thing.value.shape)} {thing.value.dtype}"
        return f"{thing.kind} {type(thing.value).__name__}"
    return f"{thing.op} {_named(thing.target)} {_named(thing.args)} {_named(thing.kwargs)}"


def _named(value: Any) -> str:
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_named, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_named(v)}' for k, v in value.items())}}}"
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text


def whole(active: Delta, delta: Delta) -> Delta:
    """``active``, all that is left of ``delta``, with what only the whole can say: the names, the order of users."""
    return dataclasses.replace(active, used=delta.used, users=delta.users)
