"""What a node's value would look like if its inputs' values looked otherwise."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_aggregate

from fxopt import ops
from fxopt.shapes import infer
from fxopt.transformations._memory import value

_UNKNOWN: Mapping[Node, Any] = {}


def inferred(gm: GraphModule, what: Node | ops.Call, known: Mapping[Node, Any] = _UNKNOWN) -> Any:
    """
    The fake value of a node or a call of the vocabulary (a call in place is asked out of place); None if unknown.

    ``known`` are the values of some of its inputs, in place of what the graph says.  Raises what the operation raises
    where it cannot be done to such values.  The graph is left alone.
    """
    scratch = Graph()

    def stand_in(x: Any) -> Any:
        if not isinstance(x, Node | ops.Attr):
            return x
        held = known.get(x, value(x)) if isinstance(x, Node) else None
        made = scratch.placeholder("x")
        made.meta["val"] = ops.constant(gm, x) if held is None else held
        return made

    call = ops.read(gm, what) if isinstance(what, Node) and what.op == "call_module" else what
    if call is None:
        return None
    if isinstance(call, Node):
        return infer(gm, scratch.node_copy(call, stand_in))
    arguments = {n: map_aggregate(v, stand_in) for n, v in call.arguments.items()}
    return infer(gm, call.op.emit(scratch, "aten" if call.dialect == "aten" else "function", **arguments))


def alike(a: Any, b: Any) -> bool:
    """Whether two values have the same type, shape and strides, as far as can be told without a guard."""
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(alike, a, b))
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and _equal(a, b)
    if a.dtype != b.dtype or a.dim() != b.dim():
        return False
    return all(map(_equal, (*a.shape, *a.stride()), (*b.shape, *b.stride())))


def _equal(a: Any, b: Any) -> bool:
    return a is b or (a is not None and b is not None and statically_known_true(a == b))


# What reads strides or memory by number; elsewhere, a value in another place in memory is the same value.
_BY_NUMBER = frozenset({"as_strided", "as_strided_copy", "as_strided_scatter", "data_ptr", "is_contiguous", "storage"})
_BY_NUMBER |= {"storage_offset", "sym_storage_offset", "sym_stride", "stride", "untyped_storage", "is_set_to"}
# Operations that may return views, and can do so whatever the strides are.
_OF_ANY_STRIDES = frozenset({"transpose", "permute", "t", "getitem", "select", "slice", "narrow", "unsqueeze", "split"})
_OF_ANY_STRIDES |= {"squeeze", "chunk", "unbind", "expand", "detach", "identity", "movedim", "dropout", "to"}
_OF_ANY_STRIDES |= {"reshape", "flatten", "contiguous"}


def relaid(gm: GraphModule, changed: Mapping[Node, Any], at: Mapping[Node, int]) -> dict[Node, Any] | str:
    """
    What becomes of all that depends on nodes whose values are laid out otherwise in memory, ``changed``.

    The new values of these and of the nodes where they differ (None for a value that is not known), or why some node
    could not do with them.  ``at`` are the positions of the nodes.
    """
    found = dict(changed)
    waiting = [(at[u], u) for n in changed for u in n.users if u in at]
    heapq.heapify(waiting)
    while waiting:
        position, node = heapq.heappop(waiting)
        if node in found or node.op == "output" or (waiting and waiting[0][0] == position):
            continue
        try:
            reason = _restate(gm, node, found)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # whatever the operation itself raises
            reason = f"{node} cannot read a part of a larger tensor: {str(error).strip().splitlines()[0]}"
        if reason is not None:
            return reason
        if node in found:
            for user in node.users:
                if user in at:
                    heapq.heappush(waiting, (at[user], user))
    return found


def _restate(gm: GraphModule, node: Node, found: dict[Node, Any]) -> str | None:
    """Enter the value of ``node`` in ``found`` if it is another than before; or say what harm that does."""
    call, was = ops.read(gm, node), value(node)
    if getattr(node.target, "__name__", str(node.target)).partition(".")[0] in _BY_NUMBER:
        return f"{node} asks where its input lies in memory"
    unknown = any(n in found and found[n] is None for n in node.all_input_nodes)
    new = None if unknown else inferred(gm, node, found)
    if new is not None:
        if alike(new, was):
            return None
        found[node] = new
        return None if isinstance(new, torch.Tensor | tuple | list) else f"{node} asks where its input lies in memory"
    if call is None or (call.op.view and call.op.name not in _OF_ANY_STRIDES):
        return f"whether {node} can read a part of a larger tensor is not known; call fxopt.propagate(gm, inputs)"
    if call.op.view:
        found[node] = None
    return None
