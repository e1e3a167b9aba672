"""Taking one pruning tree out of a graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import GraphModule, Node

from fxopt import ops
from fxopt import vocabulary as words
from fxopt.errors import TransformationError, UsageError
from fxopt.transformations._axes import Axes
from fxopt.transformations._cut import cut
from fxopt.transformations._flow import Flow
from fxopt.transformations._heads import attentions
from fxopt.transformations._joins import join
from fxopt.transformations._memory import Memory
from fxopt.transformations._restate import bury, refresh, restate
from fxopt.transformations._stand_ins import (
    UNEQUAL,
    Fit,
    StandIn,
    Unequal,
    fold_around,
    instead_of_layer,
    read_layer,
    replacement,
)
from fxopt.transformations._trees import kept_operand


@dataclass(frozen=True)
class Ends:
    """Where a tree begins and ends in a graph as it is now; ``keep`` is read in place of ``exit``."""

    keep: Node | None
    exit: Node
    what: Literal["replace", "layer", "cat", "heads"]
    index: int = 0
    part: str = ""  # the operand of a concatenation that goes


def find(gm: GraphModule, name: str, flow: Flow | None = None) -> Ends | str:
    """The ends of the tree called ``name``, or why it is not there."""
    nodes = {n.name: n for n in gm.graph.nodes}
    first, dots, last = name.partition("..")
    if dots:
        return _find_region(gm, nodes.get(first), nodes.get(last), name, flow)
    parsed = re.fullmatch(r"(\w+)(?:([:#])(\d+))?", name)
    if parsed is None:
        return f"{name!r} is no name of a pruning tree; expected first..exit, exit:operand, layer or attention#group"
    exit, mark, number = nodes.get(parsed[1]), parsed[2], int(parsed[3] or 0)
    if exit is None:
        return f"{name}: there is no node {parsed[1]}"
    call = ops.read(gm, exit)
    if mark == "#":
        attention = call is not None and call.op is words.scaled_dot_product_attention
        return Ends(None, exit, "heads", number) if attention else f"{name}: {exit} is no attention that is there"
    if mark == ":" and call is not None and call.op is words.cat:
        parts = call.arguments["tensors"]
        if number >= len(parts):
            return f"{name}: {exit} joins {len(parts)} tensors"
        return Ends(None, exit, "cat", number, parts[number].name)
    if mark == ":":
        kept = kept_operand(gm, exit, number)
        return Ends(kept, exit, "replace") if isinstance(kept, Node) else f"{name}: {exit} has no operand to drop there"
    entry = None if call is None else call.arguments.get("mat1", call.arguments.get("input"))
    return Ends(entry, exit, "layer") if isinstance(entry, Node) else f"{name}: {exit} is no layer"


def _find_region(gm: GraphModule, first: Node | None, exit: Node | None, name: str, flow: Flow | None) -> Ends | str:
    if first is None or exit is None:
        return f"{name}: its nodes are not there"
    flow = flow or Flow(gm)
    for entry in flow.preds.get(first, ()):
        region = flow.region(entry, exit)
        if region is not None and first in region.nodes:
            return Ends(entry, exit, "replace")
    return f"{name}: what lies between is no region with one entry and one exit any more"


def remove(gm: GraphModule, name: str, part: str, given: StandIn | None, unequal: Unequal, rank: float) -> None:
    """
    Take the tree called ``name`` out of ``gm``, which has no writes in place; raises `TransformationError`.

    ``part``: of a concatenation, the operand that its number meant at first.
    """
    ends = find(gm, name)
    if isinstance(ends, str):
        raise TransformationError(f"{ends}; print fxopt.pruning.trees(gm) to see what is there")
    if given is not None and ends.keep is not None:
        instead = replacement(gm, ends.keep, ends.exit, given)
        _replace(gm, ends.exit, instead)
        if isinstance(given, Fit):
            fold_around(gm, instead)
        return
    if ends.what == "heads":
        cut_groups(gm, {ends.exit.name: [ends.index]})
        return
    if ends.what == "cat":
        _drop_from_cat(gm, ends.exit, part)
        return
    assert ends.keep is not None
    keep: Node | None = ends.keep
    if ends.what == "layer":
        keep = instead_of_layer(gm, ends.keep, ends.exit, unequal, rank)
    if keep is not None:
        _replace(gm, ends.exit, keep)


def _replace(gm: GraphModule, exit: Node, replacement: Node) -> None:
    memory = Memory(gm)
    for node in (exit, replacement):
        if node in memory.position and memory.last_write(node) > memory.position[node]:
            raise TransformationError(f"{node} is written to in place after it was computed; MakeOutOfPlace may help")
    joins = [u for u in exit.users if _is_cat(gm, u)]
    exit.replace_all_uses_with(replacement, delete_user_cb=lambda user: user is not replacement)
    bury(gm, exit)
    for node in joins:
        if not node._erased:
            _sum_columns(gm, node)


def _is_cat(gm: GraphModule, node: Node) -> bool:
    call = ops.read(gm, node)
    return call is not None and call.op is words.cat


# --- concatenations and heads -----------------------------------------------------------------------------------------


def _drop_from_cat(gm: GraphModule, node: Node, part: str) -> None:
    found = join(gm, node)
    if isinstance(found, str):
        raise TransformationError(f"{part} cannot be dropped from {node}: {found}, so its columns cannot go")
    index = [p.name for p in found.parts].index(part)
    starts = [sum(found.sizes[:i]) for i in range(len(found.parts))]
    kept = [torch.arange(s, s + n) for i, (s, n) in enumerate(zip(starts, found.sizes, strict=True)) if i != index]
    columns = torch.cat(kept)
    for consumer in found.consumers:
        layer = read_layer(gm, consumer)
        if layer is None:
            raise TransformationError(f"{consumer} reads {node} with a weight that cannot be sliced")
        restate(gm, consumer, layer.restated(layer.weight.index_select(1, columns), None))
    for norm in found.norms:
        call = ops.read(gm, norm)
        assert call is not None
        held = {n: ops.constant(gm, call.arguments[n]) for n in ("weight", "bias", "running_mean", "running_var")}
        restate(gm, norm, {n: t.detach()[columns] for n, t in held.items() if t is not None})
    dropped = found.parts[index]
    _rejoin(gm, node, [p for i, p in enumerate(found.parts) if i != index])
    if not dropped.users:
        bury(gm, dropped)


def _rejoin(gm: GraphModule, node: Node, parts: Sequence[Node]) -> None:
    """Let a concatenation join ``parts``, where its readers are ready for them; of one part, nothing is left of it."""
    changed = [node]
    if len(parts) == 1:
        changed = list(node.users)
        node.replace_all_uses_with(parts[0])
        bury(gm, node)
    else:
        restate(gm, node, {"tensors": tuple(parts)})
    _refresh_after(gm, changed)


def _sum_columns(gm: GraphModule, node: Node) -> None:
    """Of a tensor that is joined with itself, let the consumer add up its columns and read it once."""
    found = join(gm, node)
    if isinstance(found, str) or len(set(found.parts)) == len(found.parts) or found.norms:
        return
    layers = [read_layer(gm, c) for c in found.consumers]
    if any(layer is None for layer in layers):
        return
    once = list(dict.fromkeys(found.parts))
    for layer in layers:
        assert layer is not None
        pieces = layer.weight.split(found.sizes, 1)
        summed = [sum(p for p, part in zip(pieces, found.parts, strict=True) if part is one) for one in once]
        restate(gm, layer.node, layer.restated(torch.cat([torch.as_tensor(s) for s in summed], 1), None))
    _rejoin(gm, node, once)


def _refresh_after(gm: GraphModule, nodes: Sequence[Node]) -> None:
    """Work the values out again of ``nodes`` and all that depends on them."""
    changed, found = {n for n in nodes if not n._erased}, []
    for node in gm.graph.nodes:
        if (node in changed or any(n in changed for n in node.all_input_nodes)) and node.op != "output":
            changed.add(node)
            found.append(node)
    refresh(gm, found)


def cut_groups(gm: GraphModule, groups: Mapping[str, Sequence[int]]) -> None:
    """Cut the key/value groups of each attention, by the name of its node, with the heads that read them."""
    for name, gone in groups.items():
        axes = Axes(gm)
        found = {a.node.name: a for a in attentions(axes)}
        if name not in found:
            raise TransformationError(f"{name}: its heads cannot be cut; fxopt.pruning.axes(gm) says why")
        axis = found[name].axis
        wrong = [g for g in gone if not 0 <= g < axis.size]
        if wrong or len(set(gone)) >= axis.size:
            raise TransformationError(
                f"{name} has {axis.size} groups, {len(set(gone))} of them to go; one has to stay, or drop the branch"
            )
        cut(gm, axes, [(axis.leaf, list(gone))])


def check_unequal(unequal: str) -> None:
    """Refuse a way that does not exist."""
    if unequal not in UNEQUAL:
        raise UsageError(f"unequal={unequal!r} is not known; give one of {', '.join(UNEQUAL)}")
