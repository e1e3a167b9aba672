"""What a transformation changed: the difference of two snapshots."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxopt.garbage import uncollected
from fxopt.snapshot import (
    Held,
    Record,
    Ref,
    Slot,
    Snapshot,
    graph_of,
    graphs,
    node_key,
    path_in,
    same,
    same_container,
    snapshot,
)

__all__ = ["MARKS", "Delta", "Record", "Ref", "Slot", "Snapshot", "diff", "graph_of", "graphs", "share", "snapshot"]

MARKS = "fxopt"  # the key of node.meta under which the signatures of transformations stand
Pair = tuple[Any, Any]  # (before, after); None is absence


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
    codegens: dict[str, tuple[Held, Held]] = field(default_factory=dict)
    users: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    bridges: tuple[
        tuple[str, tuple[str, ...]], ...
    ] = ()  # (changed path, what surrounds an unchanged node that reads it)
    ties: tuple[tuple[str, ...], ...] = ()  # a node of which only the meta differs, and what differs of what it reads

    def __bool__(self) -> bool:
        return bool(
            self.nodes or self.slots or self.attributes or self.orders or self.metas or self.codegens or self.entries
        )

    def inverse(self) -> Delta:
        def swap(d: dict[Any, Any]) -> dict[Any, Any]:
            return {k: (b, a) for k, (a, b) in d.items()}

        return Delta(
            nodes=swap(self.nodes),
            metas=swap(self.metas),
            slots=swap(self.slots),
            attributes=swap(self.attributes),
            entries=swap(self.entries),
            orders=swap(self.orders),
            used={p: (gone, new, swap(counts)) for p, (new, gone, counts) in self.used.items()},
            codegens=swap(self.codegens),
            users=swap(self.users),
            bridges=self.bridges,
            ties=self.ties,
        )

    def touched(self) -> set[str]:
        """The nodes and the paths that differ."""
        found = {*self.nodes, *self.slots, *(f"{m}:{a}" for m, a in self.attributes), *self.metas}
        found |= {f"order of {p or 'the graph'}" for p in self.reordered()}
        return found | {f"signature of {p or 'the graph'}" for p in self.codegens}

    def reordered(self) -> list[str]:
        """The graphs whose surviving nodes stand in another order."""
        return [p for p, (a, b) in self.orders.items() if permuted(a, b)]

    def mentions(self) -> set[str]:
        """What differs, what that refers to, and the modules (``path/``) that hold it."""
        found = self.touched()
        inside = {graph_of(k) for k in self.nodes} | {p.rpartition(".")[0] for p in self.slots}
        for path in inside | {m for m, _ in self.attributes}:
            while path:
                found.add(f"{path}/")
                path = path.rpartition(".")[0]
        for key, pair in self.nodes.items():
            for record in pair:
                if record is not None:
                    found |= {node_key(graph_of(key), r) for r in record.refs()}
                    if record.op in ("get_attr", "call_module"):
                        found.add(path_in(graph_of(key), str(record.target)))
        return found

    def existence(self) -> set[str]:
        """The nodes and paths that existed only before, or only after; a module is ``path/`` too."""
        nodes = {k for k, (a, b) in self.nodes.items() if a is None or b is None}
        slots = {p: (a or b) for p, (a, b) in self.slots.items() if a is None or b is None}
        return nodes | {*slots} | {f"{p}/" for p, slot in slots.items() if slot is not None and slot.kind == "module"}

    def tensors(self) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
        """The parameters and buffers that differ, by path."""

        def tensor(slot: Slot | None) -> torch.Tensor | None:
            return slot.value if slot is not None and isinstance(slot.value, torch.Tensor) else None

        return {p: (tensor(a), tensor(b)) for p, (a, b) in self.slots.items() if tensor(a) is not tensor(b)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Delta:
        """Records are immutable and known to the copy by the same names; tensors and modules are copied along."""
        return dataclasses.replace(
            self,
            slots=copy.deepcopy(self.slots, memo),
            attributes=copy.deepcopy(self.attributes, memo),
            codegens=copy.deepcopy(self.codegens, memo),
        )

    def __getstate__(self) -> dict[str, Any]:
        """What can be pickled: of `node.meta` only plain values, as fake tensors and traces cannot."""
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        kept["metas"] = {
            k: (None if a is None else plain_meta(a), None if b is None else plain_meta(b))
            for k, (a, b) in self.metas.items()
        }
        return kept

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update(kept)


def permuted(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether what is in both stands in another order."""
    in_a, in_b = set(a), set(b)
    return [n for n in a if n in in_b] != [n for n in b if n in in_a]


_PLAIN: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def plain_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a ``node.meta`` that consist of plain values, and so can be written anywhere."""
    if stack := meta.get("nn_module_stack"):  # the classes in it may be anybody's
        named = {k: tuple(_class_name(v) for v in entry) for k, entry in stack.items()}
        meta = {**meta, "nn_module_stack": named}
    return {k: v for k, v in meta.items() if _is_plain(v)}


def _class_name(value: Any) -> Any:
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return False
    if type(value) in (tuple, list, set, frozenset, torch.Size):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values())) and all(map(_is_plain, value))
    return type(value) in _PLAIN


def same_codegen(a: Held, b: Held) -> bool:
    """Whether two graphs' calling conventions are the same."""
    return type(a.value) is type(b.value) and same_container(a.content, b.content)


# --- comparing ----------------------------------------------------------------------------------------------------


@uncollected()
def diff(before: Snapshot, after: Snapshot) -> Delta:
    """What differs between two snapshots of the same graph module."""
    # A graph module that came, went or was replaced as a whole is one slot; its nodes are its own affair.
    shared = {p for p, m in after.modules.items() if before.modules.get(p) is m}
    everywhere = len(shared) == len(after.modules) == len(before.modules)
    slots = _pairs(before.slots, after.slots, Slot.entry_same)
    whole = inside_replaced(slots)
    nodes = _diff_nodes(before, after)
    metas = _diff_metas(before, after)
    if not everywhere:
        nodes = {k: pair for k, pair in nodes.items() if graph_of(k) in shared}
        metas = {k: pair for k, pair in metas.items() if graph_of(k) in shared}
    found = Delta(
        nodes=nodes,
        metas=metas,
        slots=_pairs(before.slots, after.slots, Slot.entry_same, whole),
        attributes=_pairs(before.attributes, after.attributes, Held.same, lambda key: whole(key[0])),
        entries=_pairs(before.entries, after.entries, operator.eq, whole),
        orders={p: (before.orders[p], after.orders[p]) for p in shared if before.orders[p] != after.orders[p]},
        used={p: u for p in shared if (u := _diff_used(before.used[p], after.used[p])) is not None},
        codegens={
            p: (before.codegens[p], after.codegens[p])
            for p in shared
            if not same_codegen(before.codegens[p], after.codegens[p])
        },
        users=_diff_users(before, after),
    )
    return dataclasses.replace(found, bridges=_bridges(found, after), ties=_ties(found, after))


def _renamed(before: Snapshot, after: Snapshot) -> bool:
    return any(before.names.get(n, name) != name for n, name in after.names.items())


def _diff_nodes(before: Snapshot, after: Snapshot) -> dict[str, tuple[Record | None, Record | None]]:
    renamed = _renamed(before, after)
    changed: dict[str, tuple[Record | None, Record | None]] = {}
    for key, new in after.raw.items():
        old = before.raw.get(key)
        if old is not None and not renamed and all(map(operator.is_, old, new)):
            continue
        a, b = before.record(key), after.record(key)
        if a is None or not a.same(b):
            changed[key] = (a, b)
    for key in before.raw:
        if key not in after.raw:
            changed[key] = (before.record(key), None)
    return changed


def _diff_metas(before: Snapshot, after: Snapshot) -> dict[str, Pair]:
    mutated = {}  # what was changed inside, by somebody who then left the same object there
    for i, (held, content) in before.containers.items():
        alike = len(held) == len(content) and all(map(operator.is_, held, content))
        if alike and isinstance(held, dict):
            alike = all(map(operator.is_, held.values(), content.values()))
        if not alike and not same_container(held, content):
            mutated[i] = content
    found: dict[str, Pair] = {}
    for key, new in after.metas.items():
        old = before.metas.get(key)
        if old is None:
            found[key] = (None, kept_meta(new, after))
            continue
        if mutated and any(id(v) in mutated for v in old.values()):
            old = kept_meta(old, before)
        if not same_meta(old, new):
            found[key] = (kept_meta(old, before), kept_meta(new, after))
    found |= {k: (kept_meta(old, before), None) for k, old in before.metas.items() if k not in after.metas}
    return found


def kept_meta(meta: Mapping[str, Any], when: Snapshot) -> dict[str, Any]:
    """``meta`` with what its containers held, which somebody may change later."""
    return {k: when.containers[id(v)][1] if id(v) in when.containers else v for k, v in meta.items()}


def same_meta(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two ``node.meta`` hold the same."""
    if len(a) != len(b):
        return False
    return all(k in a and (a[k] is v or same(a[k], v)) for k, v in b.items())


def _diff_users(before: Snapshot, after: Snapshot) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    found, renamed = {}, _renamed(before, after)
    for key, new in after.users.items():
        old = before.users.get(key, ())
        if renamed or old != new:
            a, b = tuple(map(before.name, old)), tuple(map(after.name, new))
            if a != b:
                found[key] = (a, b)
    found |= {k: (tuple(map(before.name, old)), ()) for k, old in before.users.items() if k not in after.users and old}
    return found


def _diff_used(
    old: tuple[frozenset[str], dict[str, int]], new: tuple[frozenset[str], dict[str, int]]
) -> tuple[frozenset[str], frozenset[str], dict[str, Pair]] | None:
    (old_names, old_counts), (new_names, new_counts) = old, new
    if old_names == new_names and old_counts == new_counts:
        return None
    changed = [n for n in old_counts.keys() | new_counts.keys() if old_counts.get(n) != new_counts.get(n)]
    return new_names - old_names, old_names - new_names, {n: (old_counts.get(n), new_counts.get(n)) for n in changed}


def inside_replaced(slots: Mapping[str, Pair]) -> Callable[[str], bool]:
    """Tells whether a path is in a module that came, went or was replaced, of which everything is kept."""
    replaced = {p for p, pair in slots.items() if any(s is not None and s.kind == "module" for s in pair)}

    def inside(path: str) -> bool:
        while path and path not in replaced:
            path = path.rpartition(".")[0]
        return bool(path)

    return inside if replaced else lambda path: False


def _pairs(
    before: Mapping[Any, Any],
    after: Mapping[Any, Any],
    equal: Any,
    whole: Callable[[Any], bool] = lambda key: False,
) -> dict[Any, Pair]:
    found = {}
    for key, old in before.items():
        new = after.get(key)
        if new is None or not equal(old, new) or whole(key):
            found[key] = (old, new)
    for key, new in after.items():
        if key not in before:
            found[key] = (None, new)
    return found


def _bridges(delta: Delta, after: Snapshot) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """An unchanged reader of a changed parameter binds that parameter to the changed nodes around the reader."""
    if not delta.slots and not delta.attributes:
        return ()
    touching = related({*delta.slots, *(m for m, _ in delta.attributes)})
    found = []
    for key, (node, op, target, *_) in after.raw.items():
        if op not in ("get_attr", "call_module") or key in delta.nodes:
            continue
        graph = graph_of(key)
        for changed in touching(path_in(graph, str(target))):
            around = (node_key(graph, after.name(n)) for n in (*node.users, *node.all_input_nodes))
            found.append((changed, tuple(k for k in (key, *around) if k in delta.nodes or k == key in delta.metas)))
    return tuple(found)


def _ties(delta: Delta, after: Snapshot) -> tuple[tuple[str, ...], ...]:
    """Of a node that reads what was changed, a pass may restate shape or strides: that belongs to the same rewrite."""
    found = []
    for key in delta.metas:
        if key in delta.nodes or key not in after.raw:
            continue
        graph, node = graph_of(key), after.raw[key][0]
        read = (node_key(graph, after.name(n)) for n in node.all_input_nodes)
        found.append((key, *(k for k in read if k in delta.nodes or k in delta.metas)))
    return tuple(found)


def related(paths: Collection[str]) -> Callable[[str], Iterator[str]]:
    """Tells which of ``paths`` are a path, hold it, or are inside it."""
    inside: dict[str, list[str]] = {}
    for path in paths:
        owner = path
        while owner := owner.rpartition(".")[0]:
            inside.setdefault(owner, []).append(path)

    def touching(path: str) -> Iterator[str]:
        owner = path
        while owner:
            if owner in paths:
                yield owner
            owner = owner.rpartition(".")[0]
        yield from inside.get(path, ())

    return touching


# --- copies -------------------------------------------------------------------------------------------------------


def share(gm: GraphModule) -> GraphModule:
    """A copy of ``gm`` with its history that holds the very same tensors: cheap, for trying something out."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(gm, set()):
        memo[id(tensor)] = tensor
    twin = copy.deepcopy(gm, memo)
    keep_name(gm, twin)
    return twin


def keep_name(gm: GraphModule, twin: GraphModule) -> None:
    """Call the class of a copy as that of ``gm`` is, after the module that was traced; torch calls it GraphModule."""
    if type(twin) is not type(gm):  # every graph module has a class of its own
        type(twin).__name__ = type(gm).__name__


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors in a module, and in what its history holds."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    inner: Any = ()
    if isinstance(value, nn.Module):
        inner = value.__dict__.values()
    elif isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    elif isinstance(value, Slot | Held):
        inner = (value.value,)
    elif isinstance(value, Delta):
        inner = (value.slots, value.attributes)
    elif hasattr(value, "deltas"):  # a commit
        inner = value.deltas()
    for v in inner:
        yield from _tensors(v, seen)
