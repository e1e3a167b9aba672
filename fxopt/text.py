"""Graphs as text, in the vocabulary: the same program reads the same in every dialect; and what rich shows, as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Node

from fxopt import ops

_SILENT = ("_guards_fn",)


def show(gm: GraphModule) -> str:
    """The graph of ``gm``, one line a node, with values numbered in order and defaults left unsaid."""
    names: dict[Node, str] = {}
    lines: list[str] = []
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            names[node] = str(node.target)
        elif node.op == "output":
            lines.append(f"return {_result(node.args[0], names)}")
        elif node.target not in _SILENT:
            said = _call(gm, node, names)
            names[node] = f"%{sum(not line.startswith('_') for line in lines)}" if node.users else "_"
            lines.append(f"{names[node]} = {said}")
    return "\n".join(lines)


def line(gm: GraphModule, node: Node) -> str:
    """One node as text, its inputs by name."""
    said = computed(gm, node, lambda n: n.name)
    return said if node.op == "output" else f"{node.name} = {said}"


def computed(gm: GraphModule, node: Node, name: Callable[[Node], str]) -> str:
    """What one node computes as text, its inputs as ``name`` says."""
    names = _Named(name)
    if node.op in ("placeholder", "get_attr"):
        return f"{node.op} {node.target}"
    if node.op == "output":
        return f"return {_result(node.args[0], names)}"
    return _call(gm, node, names)


class _Named(dict[Node, str]):
    def __init__(self, name: Callable[[Node], str]) -> None:
        self._name = name

    def __missing__(self, node: Node) -> str:
        return self._name(node)


def _call(gm: GraphModule, node: Node, names: dict[Node, str]) -> str:
    call = ops.read(gm, node)
    if call is None:
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        values = [*(_say(a, names) for a in node.args), *(f"{k}={_say(v, names)}" for k, v in node.kwargs.items())]
        return f"{target}({', '.join(values)})"
    said, positional = [], True
    for name, default in call.op.defaults.items():
        value = call.arguments.get(name, default)
        if default is not ops.REQUIRED and type(value) is type(default) and value == default:
            positional = False
            continue
        said.append(_say(value, names) if positional else f"{name}={_say(value, names)}")
    return f"{call.op.name}{'_' if call.inplace else ''}({', '.join(said)})"


def _result(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, tuple | list) and len(value) == 1:
        value = value[0]
    return _say(value, names)


def _say(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, ops.Attr):
        return value.path
    if isinstance(value, tuple | list):
        return f"[{', '.join(_say(v, names) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_say(v, names)}' for k, v in value.items())}}}"
    return repr(value)


# --- for people ------------------------------------------------------------------------------------------------------


def to_text(renderable: Any) -> str:
    """What rich would print, without colours."""
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=120, color_system=None, force_jupyter=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get().rstrip()


def to_html(renderable: Any) -> str:
    """What rich would print, as HTML for a notebook."""
    import io

    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=120, force_jupyter=False)  # else it prints
    console.print(renderable)
    return console.export_html(
        inline_styles=True, code_format="<pre style='font-family:monospace;line-height:1.25'>{code}</pre>"
    )
