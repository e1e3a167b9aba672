"""Where in the model's source a node comes from: the line that its trace names, else the method of its module."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def source_of(meta: Mapping[str, Any], op: str = "", target: Any = None, root: str = "") -> str:
    """
    The line that a node of that ``meta`` comes from, ``file.py:12: the code``; "" where nothing tells.

    `torch.export` and Dynamo record it (``stack_trace``).  `torch.fx.symbolic_trace` does not, but it notes the modules
    that were running: then it is the one line of the innermost one's ``forward`` that calls ``target``, or, where
    several or none do, the first line of that ``forward``.  ``root``: the name of the outermost module's class, which
    is not among those noted.
    """
    if trace := str(meta.get("stack_trace") or "").strip():
        return source_line(trace)
    classes = [_class(entry[1]) for entry in (meta.get("nn_module_stack") or {}).values()]
    own = [c for c in classes if c is not None and not c.__module__.startswith("torch.nn")]
    if root and not own and len(classes) <= (op == "call_module"):  # a leaf module is not called by itself
        own = _named(root)
    return _line_in(own[-1], str(op), _called(target)) if own else ""


@functools.lru_cache(maxsize=4096)
def source_line(trace: str) -> str:
    """The innermost line of a ``stack_trace`` that is not torch's own: ``file.py:12: the code``."""
    found = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', trace)
    own = [f for f in found if "/torch/" not in f[0]] or found
    if not own:
        return trace.strip().splitlines()[-1].strip()
    file, line, code = own[-1]
    return f"{file.rpartition('/')[2]}:{line}: {code.strip()}"


def _class(named: Any) -> type | None:
    """A class of a module stack, which a graph that was written holds by its name."""
    if isinstance(named, type):
        return named
    module, _, name = str(named).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def _named(name: str) -> list[type]:
    """The module class of that name, if there is just one, and not torch's."""
    found: set[type] = set()
    waiting: list[type] = [nn.Module]
    while waiting:
        new: set[type] = {*type.__subclasses__(waiting.pop())} - found
        found |= new
        waiting += new
    named = [c for c in found if c.__name__ == name and not c.__module__.startswith("torch.")]
    return named if len(named) == 1 else []


def _called(target: Any) -> str:
    """The last name by which source code calls ``target``."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name.rpartition(".")[2]


@functools.lru_cache(maxsize=4096)
def _line_in(kind: type, op: str, name: str) -> str:
    forward = inspect.unwrap(kind.forward) if hasattr(kind, "forward") else None
    try:
        lines, first = inspect.getsourcelines(forward)  # type: ignore[arg-type]
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):  # written nowhere
        return ""
    called = set(_calls(tree, op, name))
    line = first + called.pop() - 1 if len(called) == 1 else _definition(tree, first)
    file = str(inspect.getsourcefile(forward))  # type: ignore[arg-type]
    return f"{file.rpartition('/')[2]}:{line}: {linecache.getline(file, line).strip()}"


def _definition(tree: ast.Module, first: int) -> int:
    return first + tree.body[0].lineno - 1  # below its decorators


def _calls(tree: ast.AST, op: str, name: str) -> Iterator[int]:
    """The lines, counted from 1, that call something of that name, or apply the operator of that name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            last = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if last == name:
                yield node.lineno
        elif isinstance(node, ast.BinOp | ast.UnaryOp) and op == "call_function":
            yield from [node.lineno] if _OPERATORS.get(type(node.op)) == name else ()


_OPERATORS = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "truediv",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Pow: "pow",
    ast.MatMult: "matmul",
    ast.USub: "neg",
}
