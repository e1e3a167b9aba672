"""What a rewrite changed that it may not have meant to: options, operands and types, before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from fxopt import ops
from fxopt.split import Part

_MOST = 4
_CALLS = ("call_function", "call_method", "call_module")


def hints(before: GraphModule, after: GraphModule, part: Part) -> tuple[str, ...]:
    """
    How the operations before and after ``part`` differ beyond their names, one line each.

    As in ``gelu approximate 'tanh' → 'none'``.  Operations are compared with the one of the same name that they take
    the place of, else with one that has an option of the same name.
    """
    old = _calls(before, [k for k, (a, _) in part.delta.nodes.items() if a is not None])
    new = _calls(after, [k for k, (_, b) in part.delta.nodes.items() if b is not None])
    found = dict.fromkeys([*_compared(old, new), *_tensors(part)])
    return tuple(found)[:_MOST]


Call = tuple[str, dict[str, Any], Node]


def _calls(gm: GraphModule, names: list[str]) -> dict[str, Call]:
    wanted = {n for n in names if "::" not in n}
    nodes = [n for n in gm.graph.nodes if n.name in wanted and n.op in _CALLS]
    return {n.name: (*_read(gm, n), n) for n in nodes}


def _read(gm: GraphModule, node: Node) -> tuple[str, dict[str, Any]]:
    """The operation's name and its arguments by name, defaults included, as far as they are known."""
    if (call := ops.read(gm, node)) is not None:
        defaults = {k: v for k, v in call.op.defaults.items() if v is not ops.REQUIRED}
        return call.op.name, defaults | dict(call.arguments)
    if isinstance(node.target, OpOverload):
        arguments = node.target._schema.arguments
        values = {a.name: a.default_value for a in arguments if a.has_default_value()}
        values |= dict(zip((a.name for a in arguments), node.args, strict=False))
        return node.target._opname, values | dict(node.kwargs)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return str(name), {**{f"argument {i}": a for i, a in enumerate(node.args)}, **node.kwargs}


def _compared(old: Mapping[str, Call], new: Mapping[str, Call]) -> Iterator[str]:
    for name, (op, arguments, node) in new.items():
        partner = old.get(name) or next((c for c in old.values() if c[0] == op), None)
        if partner is not None and partner[0] == op:
            yield from _options(op, partner[1], arguments)
            yield from _operands(op, partner[1], arguments)
            yield from _types(op, partner[2], node)
            continue
        for other, values, _ in old.values():
            common = {k: v for k, v in values.items() if k in arguments}
            yield from _options(f"{other} → {op}", common, {k: arguments[k] for k in common})


def _options(op: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key, a in before.items():
        if key not in after:
            continue
        b = after[key]
        if _is_tensor(a) and _is_tensor(b):
            continue
        plain = not _holds_nodes(a) and not _holds_nodes(b)
        if _is_tensor(a) or _is_tensor(b) or (plain and (type(a) is not type(b) or a != b)):
            yield f"{op} {key} {_said(a)} → {_said(b)}"


def _operands(op: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Two operands that changed places."""
    a = {k: str(v) for k, v in before.items() if _is_tensor(v)}
    b = {k: str(v) for k, v in after.items() if _is_tensor(v)}
    moved = [k for k in a if k in b and a[k] != b[k]]
    if len(moved) > 1 and sorted(a[k] for k in moved) == sorted(b[k] for k in moved):
        yield f"{op} {', '.join(moved)}: {', '.join(a[k] for k in moved)} → {', '.join(b[k] for k in moved)}"


def _types(op: str, before: Node, after: Node) -> Iterator[str]:
    a, b = before.meta.get("val"), after.meta.get("val")
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype != b.dtype:
        yield f"{op} gives {a.dtype} → {b.dtype}"


def _tensors(part: Part) -> Iterator[str]:
    for path, (a, b) in part.delta.tensors().items():
        if a is None or b is None:
            continue
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{path} {a.dtype} {list(a.shape)} → {b.dtype} {list(b.shape)}"
        else:
            yield f"{path} has other values"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Node | ops.Attr)


def _holds_nodes(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_holds_nodes, value))
    return _is_tensor(value)


def _said(value: Any) -> str:
    return value.path if isinstance(value, ops.Attr) else repr(value) if not isinstance(value, Node) else value.name
