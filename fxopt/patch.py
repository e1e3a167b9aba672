"""Applying a delta to a graph module, and asking first what stands in the way."""

from __future__ import annotations

import bisect
import dataclasses
import heapq
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxopt.delta import MARKS, Delta, Pair, inside_replaced, permuted, same_codegen, same_meta
from fxopt.garbage import uncollected
from fxopt.snapshot import (
    Record,
    Slot,
    Snapshot,
    by_node,
    fresh,
    graph_of,
    graphs,
    node_key,
    plain_attributes,
    same,
    same_container,
    snapshot,
    state,
)


def conflicts(gm: GraphModule, delta: Delta, now: Snapshot | None = None) -> list[str]:
    """Why ``delta`` cannot be applied to ``gm`` as it is now, without losing somebody else's edits; empty if it can."""
    now = now or snapshot(gm)
    return [*_node_conflicts(delta, now), *_state_conflicts(delta, now)]


def _node_conflicts(delta: Delta, now: Snapshot) -> Iterable[str]:
    born = {k for k, (a, _) in delta.nodes.items() if a is None}
    for key, (before, after) in delta.nodes.items():
        present = now.record(key)
        if before is None and present is not None:
            yield f"the name {key} is taken"
        elif before is not None and present is None:
            yield f"{key} is gone"
        elif before is not None and not before.same(present):
            yield f"{key} changed"
        for name in after.refs() if after is not None else ():
            if (read := node_key(graph_of(key), name)) not in now.raw and read not in born:
                yield f"{read}, which {key} reads, is gone"
            elif delta.nodes.get(read, (None, True))[1] is None:
                yield f"{read}, which {key} reads, goes"
        if after is None and present is not None:
            users = (node_key(graph_of(key), now.name(u)) for u in now.raw[key][0].users)
            yield from (f"{u} reads {key}" for u in users if u not in delta.nodes)


def _state_conflicts(delta: Delta, now: Snapshot) -> Iterable[str]:
    for path, (before, after) in delta.slots.items():
        slot, owner = now.slots.get(path), path.rpartition(".")[0]
        if before is None and slot is not None:
            yield f"{path} exists already"
        elif before is not None and (slot is None or slot.value is not before.value):
            yield f"{path} was replaced"
        elif after is not None and owner not in now.entries and owner not in delta.slots:
            yield f"{owner}, which holds {path}, is gone"
    for (module, name), (held, _) in delta.attributes.items():
        if held is not None and not held.same(now.attributes.get((module, name))):
            yield f"{module}.{name}".lstrip(".") + " changed"
    for path, (codegen, _) in delta.codegens.items():
        if path in now.codegens and not same_codegen(now.codegens[path], codegen):
            yield f"the signature of {path or 'the graph'} changed"


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


@uncollected()
def apply(gm: GraphModule, delta: Delta, known: Snapshot | None = None, upon: bool = False) -> None:
    """
    Bring ``gm`` from the 'before' of ``delta`` to its 'after'; ask `conflicts` first.

    Nodes that come back are the same objects as in ``known``, as far as they were in the same graph: somebody may hold
    them. Entries of modules that ``delta`` does not know are the younger ones, and stand last; where it is made
    ``upon`` them they are the older ones, and stay where they are.
    """
    _apply_state(gm, delta, upon)
    by_graph: dict[str, dict[str, tuple[Record | None, Record | None]]] = {}
    metas: dict[str, dict[str, Pair]] = {}
    users: dict[str, dict[str, tuple[str, ...]]] = {}
    for found, keyed in ((by_graph, delta.nodes), (metas, delta.metas)):
        for key, pair in keyed.items():
            found.setdefault(graph_of(key), {})[key.rpartition("::")[2]] = pair
    for key, (_, after) in delta.users.items():
        users.setdefault(graph_of(key), {})[key.rpartition("::")[2]] = after
    for path, inner in graphs(gm).items():
        graph, local = inner.graph, by_graph.get(path, {})
        if local or path in metas or path in delta.orders or path in users:
            prefix = f"{path}::" if path else ""
            old = {n: known.raw[prefix + n][0] for n in local if prefix + n in known.raw} if known else {}
            _apply_nodes(graph, local, metas.get(path, {}), delta.orders.get(path, ((), ()))[1], prefix, old, upon)
            _arrange_users(graph, users.get(path, {}))
        if path in delta.used:
            _apply_used(graph, *delta.used[path])
        if path in delta.codegens:
            codegen = delta.codegens[path][1]
            graph._codegen = codegen.value
            _refill(vars(codegen.value), codegen.content)


def _apply_nodes(
    graph: Graph,
    changes: dict[str, tuple[Record | None, Record | None]],
    metas: dict[str, Pair],
    order: tuple[str, ...],
    prefix: str,
    old: Mapping[str, Node],
    upon: bool,
) -> None:
    nodes = {n.name: n for n in graph.nodes}
    born = {name for name, (before, _) in changes.items() if before is None}
    inputs = [i for name in changes if name in nodes for i in nodes[name].all_input_nodes]
    lists = {i: [u.name for u in i.users] for i in inputs}  # a node that is given arguments goes to the end of them
    counts = dict(graph._graph_namespace._base_count)
    for name, (before, after) in changes.items():
        if before is None and after is not None:
            nodes[name] = _create(graph, name, after, old.get(name))
    graph._graph_namespace._base_count = counts
    for name, (before, after) in changes.items():
        if after is None:
            nodes[name].args, nodes[name].kwargs = (), {}
            continue
        node = nodes[name]
        if node.op != after.op:
            node.op = after.op
        if node.target is not after.target:
            node.target = after.target
        node.type = after.type
        if before is None or not same(
            (before.args, before.kwargs), (after.args, after.kwargs)
        ):  # else users keep place
            node.args, node.kwargs = by_node(after.args, nodes), by_node(after.kwargs, nodes)
    for name in [n for n, (_, after) in changes.items() if after is None]:
        node = nodes.pop(name)
        graph.erase_node(node)
        graph._graph_namespace._obj_to_name.pop(node, None)
    for node, names in lists.items() if not upon else ():  # somebody who edits with torch.fx leaves them so
        if not node._erased:
            _arrange_list(node, names)
    for name, (was, new) in metas.items():
        if new is not None and name in nodes:
            _apply_meta(nodes[name].meta, was or {}, new, upon)
    if order or changes:
        _arrange(graph, [k[len(prefix) :] for k in order], born)


def _create(graph: Graph, name: str, record: Record, old: Node | None) -> Node:
    """A node at the end of ``graph``, still without arguments: ``old`` itself, if it was erased there."""
    space = graph._graph_namespace
    if old is not None and old._erased and old.graph is graph:
        node = _revived(graph, old, record)
    else:
        with graph.inserting_before(graph._root):
            node = graph.create_node(record.op, record.target, (), {})
        space._used_names.discard(node.name)
    node.name = name
    space._used_names.add(name)
    space._obj_to_name[node] = name
    return node


def name_again(graph: Graph, names: Mapping[Node, str]) -> None:
    """Give the nodes that were renamed their names of before."""
    for node in graph.nodes:
        name = names.get(node, node.name)
        if node.name != name:
            graph._graph_namespace._obj_to_name[node] = node.name = name


def _revived(graph: Graph, node: Node, record: Record) -> Node:
    """``node``, which was erased, at the end of ``graph`` again: the converse of `Graph.erase_node`."""
    node.op, node.target, node.args, node.kwargs = record.op, record.target, (), {}
    node.meta.clear()
    node._prev = node._next = node  # where it was is history
    graph._root.prepend(node)
    graph._find_nodes_lookup_table.insert(node)
    graph._len += 1
    node._erased = False
    return node


_TOLD = frozenset({"val", "tensor_meta", "example_value"})  # of a node as it was: not to be written on another


def _apply_meta(meta: dict[str, Any], old: Mapping[str, Any], new: Mapping[str, Any], upon: bool) -> None:
    """Change what differs between ``old`` and ``new``; what was written since stays, if this is not ``upon`` it."""
    if same_meta(meta, old):
        meta.clear()
        meta.update({k: fresh(v) for k, v in new.items()})
        return
    for key in old.keys() | new.keys():
        if key == MARKS:
            _apply_marks(meta, old.get(key, ()), new.get(key, ()))
        elif key in old and key in new and (old[key] is new[key] or same(old[key], new[key])):
            continue
        elif (key in meta) == (key in old) and (key not in old or meta[key] is old[key] or same(meta[key], old[key])):
            if key in new:
                meta[key] = fresh(new[key])
            else:
                del meta[key]
        elif upon and key not in _TOLD:
            meta.pop(key, None)
            if key in new:
                meta[key] = fresh(new[key])


def _apply_marks(meta: dict[str, Any], old: tuple[str, ...], new: tuple[str, ...]) -> None:
    marks = (*(m for m in meta.get(MARKS, ()) if m not in old or m in new), *(m for m in new if m not in old))
    marks = tuple(dict.fromkeys(marks))
    if marks:
        meta[MARKS] = marks
    else:
        meta.pop(MARKS, None)


def _arrange_users(graph: Graph, wanted: Mapping[str, tuple[str, ...]]) -> None:
    """Let the nodes list their users in the order ``wanted``: passes that walk users then do the same again."""
    for node in graph.nodes if wanted else ():
        if node.name in wanted:
            _arrange_list(node, wanted[node.name])


def _arrange_list(node: Node, wanted: Sequence[str]) -> None:
    if len(node.users) < 2:
        return
    users = {u.name: u for u in node.users}
    order = merged(list(users), wanted)
    node.users.clear()
    node.users.update({users[name]: None for name in order})


def merged(current: list[str], wanted: Sequence[str]) -> list[str]:
    """The names ``current`` in the order ``wanted``; those that it does not know stay behind what they stand behind."""
    there = set(current)
    order = [n for n in wanted if n in there]
    if len(order) == len(current):
        return order
    known = set(order)
    behind: dict[str | None, list[str]] = {}
    anchor: str | None = None
    for name in current:
        if name in known:
            anchor = name
        else:
            behind.setdefault(anchor, []).append(name)
    return [*behind.get(None, ()), *(m for n in order for m in (n, *behind.get(n, ())))]


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


def without(gm: GraphModule, gone: Delta, change: Delta, over: Sequence[Delta]) -> list[Delta]:
    """
    The deltas ``over``, which lie over ``gone``, as if that had never been.

    ``gone`` was taken out from under them, which made ``change``.  What they say of the names handed out, of the order
    of users and of all orders, which no two deltas are apart in, is told anew, so that they can be taken back in their
    turn.
    """
    found = _reordered(gone, list(over))
    inner = graphs(gm)
    for path, (_, _, counts) in change.used.items():
        for base, (now, was) in counts.items():
            at = next((i for i, d in enumerate(found) if base in d.used.get(path, _NO_NAMES)[2]), None)
            if at is not None and now is not None:
                new, old, theirs = found[at].used[path]
                used = {**found[at].used, path: (new, old, {**theirs, base: (was, theirs[base][1])})}
                found[at] = dataclasses.replace(found[at], used=used)
                inner[path].graph._graph_namespace._base_count[base] = now
    order = snapshot(gm).users_by_name() if gone.users else {}
    for key, (before, _) in gone.users.items():
        touching = [i for i, d in enumerate(found) if key in d.users]
        for i, side in ((touching[0], 0), (touching[-1], 1)) if touching and key in order else ():
            pair = (before, found[i].users[key][1]) if side == 0 else (found[i].users[key][0], order[key])
            found[i] = dataclasses.replace(found[i], users={**found[i].users, key: pair})
    return found


def _reordered(gone: Delta, over: list[Delta]) -> list[Delta]:
    """The deltas ``over`` with orders as they were made on the order before ``gone``."""
    for path, (before, after) in gone.orders.items():
        reference = before
        for i, delta in enumerate(over):
            if path in delta.orders:
                pair = _told(delta.orders[path], before, after, reference)
                over[i] = dataclasses.replace(delta, orders={**delta.orders, path: pair})
                reference = pair[1]
    for path, (were, are) in gone.entries.items():
        references = were  # for parameters, buffers and modules each
        for i, delta in enumerate(over):
            early, late = delta.entries.get(path, (None, None))
            if were is None or are is None or early is None or late is None:
                continue
            stores = zip(zip(early, late, strict=True), were, are, references, strict=True)
            told = [_told(*store) for store in stores]
            references = tuple(b for _, b in told)
            pair_of_all = (tuple(a for a, _ in told), references)
            over[i] = dataclasses.replace(delta, entries={**delta.entries, path: pair_of_all})
    return over


def _told(
    orders: tuple[tuple[str, ...], tuple[str, ...]], before: Sequence[str], after: Sequence[str], now: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """
    A delta's ``orders`` where it is made on the order ``now``, and not on one that another delta brought from
    ``before`` to ``after``: what that one took away is there, what it brought is not, and what it moved is not moved.
    """
    was, gone = set(before), set(after)
    first, last = ([n for n in order if n in was or n not in gone] for order in orders)
    back = {n for n in now if n in was and n not in gone}
    start = merged([*first, *(n for n in now if n in back and n not in first)], now)
    moved = permuted(orders[0], orders[1])
    end = _between(last, start, back) if moved else merged(_between(last, start, back), start)
    return tuple(start), tuple(end)


def _between(names: list[str], reference: Sequence[str], missing: set[str]) -> list[str]:
    """``names`` with those of ``missing`` that it has not, each behind what it stands behind in ``reference``."""
    there = set(names)
    waiting: dict[str | None, list[str]] = {}
    anchor: str | None = None
    for name in reference:
        if name in there:
            anchor = name
        elif name in missing:
            waiting.setdefault(anchor, []).append(name)
    return [*waiting.get(None, ()), *(m for n in names for m in (n, *waiting.get(n, ())))]


def onto(gm: GraphModule, delta: Delta, moved: Set[str]) -> Delta:
    """
    ``delta`` with the orders of nodes, users and entries that it makes out of those that are in ``gm`` now.

    ``moved``: the keys that stand for another node than they did where ``delta`` was made.
    """
    orders, users, entries = dict(delta.orders), dict(delta.users), dict(delta.entries)
    whole = inside_replaced(delta.slots)
    for path, (before, after) in delta.entries.items():
        module = _module(gm, path)
        if module is not None and before is not None and after is not None and not whole(path):
            there = (tuple(module._parameters), tuple(module._buffers), tuple(module._modules))
            kinds = zip(before, after, there, strict=True)
            entries[path] = there, tuple(_redone(a, b, now, frozenset()) for a, b, now in kinds)
    for path, inner in graphs(gm).items():
        mine = {k for k in users if graph_of(k) == path}
        if path in orders:
            keys = tuple(node_key(path, n.name) for n in inner.graph.nodes)
            orders[path] = keys, _redone(*orders[path], keys, moved)
        for node in inner.graph.nodes if mine else ():
            if (key := node_key(path, node.name)) in mine:
                was, new = users[key]
                other = {n for n in (*was, *new) if node_key(path, n) in moved}
                names = tuple(u.name for u in node.users)
                users[key] = names, _redone(was, new, names, other)
    return dataclasses.replace(delta, orders=orders, users=users, entries=entries)


def _redone(before: tuple[str, ...], after: tuple[str, ...], now: tuple[str, ...], other: Set[str]) -> tuple[str, ...]:
    """
    What becomes of the order ``now`` by what made ``before`` to ``after``; ``other`` names are of other things.

    What is new stands before what it stood before: nodes are inserted before others, and users come last.
    """
    stayed = _stayed(before, after)
    new = {n for n in after if n not in stayed and (n not in other or n not in before)}
    gone = {n for n in before if n not in stayed and n not in other}
    left = [n for n in now if n not in gone]
    reference = [n for n in after if n in new or n not in other]
    return tuple(_between(left[::-1], reference[::-1], new)[::-1])


def _stayed(before: Sequence[str], after: Sequence[str]) -> set[str]:
    """
    The names in both that nobody moved: a longest subsequence that both have, those moved being the last ones.

    By patience sorting: M. L. Fredman, On computing the length of longest increasing subsequences, 1975.
    """
    rank = {n: i for i, n in enumerate(before)}
    common = [n for n in after if n in rank]
    tails: list[int] = []
    levels: list[list[int]] = []  # by the length of the longest subsequence that ends there: places in `common`
    for place, name in enumerate(common):
        level = bisect.bisect_left(tails, rank[name])
        if level == len(tails):
            tails.append(rank[name])
            levels.append([place])
        else:
            tails[level] = rank[name]
            levels[level].append(place)
    found: list[int] = []
    for places in reversed(levels):
        last = found[-1] if found else None
        found.append(next(p for p in places if last is None or rank[common[p]] < rank[common[last]]))
    return {common[p] for p in found}


_NO_NAMES: tuple[frozenset[str], frozenset[str], dict[str, Pair]] = (frozenset(), frozenset(), {})


def _arrange(graph: Graph, wanted: list[str], born: set[str]) -> None:
    """
    Put the nodes in the order ``wanted``.

    Nodes that it does not know stay behind the node they stand behind now.  Where that is no topological order any
    more, the topological order nearest to it is taken.
    """
    nodes = {n.name: n for n in graph.nodes}
    if not wanted:
        wanted = [*(n for n in nodes if n not in born), *(n for n in nodes if n in born)]
    newly = [n for n in wanted if n in born and n in nodes]
    current = [*(n for n in nodes if n not in born), *newly]
    order = [nodes[n] for n in merged(current, wanted)]
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


def _apply_state(gm: GraphModule, delta: Delta, upon: bool) -> None:
    for path in sorted(delta.slots):  # a module before what it holds
        after = delta.slots[path][1]
        if after is None:
            _remove(gm, path)
        else:
            _put(gm, path, after)
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
    _prune(gm, delta)
    for path, (_, entries) in delta.entries.items():
        module = _module(gm, path)
        if module is not None and entries is not None:
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
            for store, order in zip(stores, entries, strict=True):
                _reorder(store, merged(list(store), order) if upon else order)


def _prune(gm: GraphModule, delta: Delta) -> None:
    """Take out of modules that were put back what was put into them before they were taken out."""
    whole = inside_replaced(delta.slots)
    kept = {key for key, (_, held) in delta.attributes.items() if held is not None}
    for path, (_, entries) in delta.entries.items():
        module = _module(gm, path)
        if module is None or entries is None or not whole(path):
            continue
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
        for store, names in zip(stores, entries, strict=True):
            for name in [n for n in store if n not in names]:
                del store[name]
        for name in [n for n in plain_attributes(module) if (path, n) not in kept]:
            _drop_attribute(module, name)


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
    """Let ``slot`` stand at ``path``, in the place that an entry of its kind has there now, else at the end."""
    owner, _, name = path.rpartition(".")
    module = _module(gm, owner)
    if module is None:
        raise AssertionError(f"{path} has no owner")
    stores: dict[str, dict[str, Any]] = {
        "parameter": module._parameters,
        "buffer": module._buffers,
        "module": module._modules,
    }
    for kind, store in stores.items():
        if kind != slot.kind:
            store.pop(name, None)
    stores[slot.kind][name] = slot.value
    module._non_persistent_buffers_set.discard(name)
    if slot.kind == "buffer" and not slot.persistent:
        module._non_persistent_buffers_set.add(name)
    module.__dict__.pop(name, None)


def _reorder(store: dict[str, Any], order: Sequence[str]) -> None:
    wanted = [n for n in order if n in store]
    if list(store)[: len(wanted)] == wanted:
        return
    for name in [*wanted, *(n for n in list(store) if n not in order)]:
        store[name] = store.pop(name)


def _refill(container: Any, content: Any) -> None:
    if same_container(container, content):
        return
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


# --- small edits ---------------------------------------------------------------------------------------------------


def touched_nodes(gm: GraphModule, delta: Delta) -> Iterable[tuple[str, Node]]:
    """The nodes of ``gm`` that ``delta`` created or changed, by key."""
    wanted: dict[str, set[str]] = {}
    for key, (_, after) in delta.nodes.items():
        if after is not None:
            wanted.setdefault(graph_of(key), set()).add(key)
    for path, inner in graphs(gm).items() if wanted else ():
        keys = wanted.get(path, ())
        yield from ((k, n) for n in inner.graph.nodes if (k := node_key(path, n.name)) in keys)


def put_slot(gm: GraphModule, path: str, slot: Slot) -> None:
    """Put ``slot`` at ``path``, in the place that the entry has now."""
    _put(gm, path, slot)


def replace_tensor(gm: GraphModule, path: str, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    Put ``value`` in place of the parameter or buffer at ``path``, which keeps its kind, under every tied path.

    Returns the tensor that stood there and the one that stands there now; None, and all stays, if they are equal.
    """
    slots = state(gm)[0]
    old = slots[path]
    if value.dtype == old.value.dtype and value.device == old.value.device and torch.equal(value, old.value):
        return None
    if old.kind == "parameter":
        value = nn.Parameter(value.detach(), requires_grad=old.value.requires_grad)
    for tied, slot in slots.items():
        if slot.value is old.value:
            _put(gm, tied, dataclasses.replace(slot, value=value))
    return old.value, value
