"""A class or a function as another process can import it: by its name, from its file, or written anew from its source.

What stands in a script that was run, in a notebook's cell or inside another function cannot be imported.  Its source is
known all the same: it is written into a module of its own, with what it refers to there, down to plain values and
tensors.  Nothing is pickled, so that the module can be read.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import hashlib
import inspect
import linecache
import math
import symtable
import sys
import sysconfig
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MODULE = "bisected"  # the name of a module that is written anew
_HEAD = '"""What a bisection was asked with, written from its source."""'
_TENSORS = """from pathlib import Path

from safetensors.torch import load_file

TENSORS = load_file(Path(__file__).with_suffix(".safetensors"))
"""


class NotPortable(Exception):
    """Why something cannot be taken to another process."""


@dataclass(frozen=True)
class Portable:
    """How another process finds it: ``module:name``, with those files beside it."""

    module: str
    name: str
    copied: tuple[Path, ...] = ()
    text: str = ""  # of the module, where it is written anew
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"


def portable(thing: Any) -> Portable:
    """``thing``, a class or a function, for another process; raises `NotPortable`, which says what is in the way."""
    if not isinstance(thing, type | types.FunctionType | types.BuiltinFunctionType):
        raise NotPortable(f"a {type(thing).__qualname__} is no class or function of a module")
    if _importable(thing):
        module = thing.__module__
        if module in ("fxopt", "torch", "builtins") or "." in module:
            return Portable(module, thing.__qualname__)
        return Portable(module, thing.__qualname__, (Path(_file(thing)),))
    writer = _Writer()
    name = writer.define(thing)
    return Portable(MODULE, name, tuple(writer.copied), writer.text, writer.tensors)


def _importable(thing: Any) -> bool:
    return thing.__module__ != "__main__" and "<" not in thing.__qualname__


def _file(thing: Any) -> str:
    try:
        return inspect.getfile(thing)
    except (TypeError, OSError) as error:  # built in, or made without a file
        raise NotPortable(f"the file of {thing.__qualname__} is not there any more") from error


class _Writer:
    """A module as it grows: each definition after those that it needs."""

    def __init__(self) -> None:
        self.imports: list[str] = []
        self.lines: list[str] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.copied: list[Path] = []
        self.future = False
        self._known: dict[str, Any] = {}  # what a name of the module stands for

    @property
    def text(self) -> str:
        """The module."""
        future = ["from __future__ import annotations"] if self.future else []
        head = [_HEAD, *future, "\n".join(self.imports), _TENSORS if self.tensors else ""]
        return "\n\n".join(filter(None, head)) + "\n\n" + "\n".join(self.lines) + "\n"

    def define(self, thing: Any) -> str:
        """Write a class or function, and first what it refers to; its name in the module."""
        source, name = _source(thing)
        if name in self._known:
            return name
        self._known[name] = thing
        scope = _scope(thing)
        self.future |= scope.get("annotations") is __future__.annotations
        for used in _names(source, name):
            if used in scope:
                self._bind(used, scope[used], f"{thing.__qualname__} refers to {used}")
        self.lines += [source, ""]
        return name

    def _bind(self, name: str, value: Any, where: str) -> None:
        """Let ``name`` stand for ``value``."""
        if name in self._known:
            if self._known[name] is not value:
                raise NotPortable(f"{where}, and another thing has that name too")
            return
        if isinstance(value, types.ModuleType) and sys.modules.get(value.__name__) is value:
            self.imports.append(f"import {value.__name__} as {name}")
            self._copy(value.__name__, getattr(value, "__file__", None))
        elif isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
            if not _importable(value):
                self.define(value)
                return
            self.imports.append(self._import(name, value))
        else:
            self.lines += [f"{name} = {self._expression(name, value, where)}", ""]
        self._known[name] = value

    def _import(self, name: str, value: Any) -> str:
        module, qualified = value.__module__, value.__qualname__
        if module is None or "." in qualified:
            raise NotPortable(f"{qualified} cannot be imported by its name")
        self._copy(module, getattr(sys.modules.get(module), "__file__", None))
        return f"from {module} import {qualified}" + (f" as {name}" if name != qualified else "")

    def _copy(self, module: str, file: str | None) -> None:
        """Take the file along of a module that is no package's, and not installed."""
        if file is None or "." in module or Path(file).name == "__init__.py":
            return
        installed = {Path(p).resolve() for p in sysconfig.get_paths().values()}
        if Path(file).resolve().parent not in installed and Path(file) not in self.copied:
            self.copied.append(Path(file))

    def _expression(self, path: str, value: Any, where: str) -> str:
        """``value`` as Python text."""
        if value is None or isinstance(value, bool | int | str | bytes) or value is Ellipsis:
            return repr(value)
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else f"float({str(value)!r})"
        if isinstance(value, torch.dtype):
            return f"__import__('torch').{str(value).removeprefix('torch.')}"
        if isinstance(value, types.ModuleType | torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            text = f"torch.ops.{value}" if not isinstance(value, types.ModuleType) else value.__name__
            if text.startswith("torch.ops."):  # a namespace of operators, or one of them
                return f"__import__('torch').{text.removeprefix('torch.')}"
        if isinstance(value, torch.device):
            return f"__import__('torch').device({str(value)!r})"
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_mkldnn:
            self.tensors[path] = value.detach().contiguous().clone()
            return f"TENSORS[{path!r}]"
        if type(value) in (tuple, list, set):
            inner = [self._expression(f"{path}.{i}", v, where) for i, v in enumerate(value)]
            return f"{type(value).__name__}([{', '.join(inner)}])"
        if isinstance(value, Mapping):
            pairs = (
                f"{self._expression(f'{path}.key', k, where)}: {self._expression(f'{path}.{k}', v, where)}"
                for k, v in value.items()
            )
            return f"{{{', '.join(pairs)}}}"
        raise NotPortable(f"{where}, a {type(value).__qualname__}, which cannot be written as source")


def _scope(thing: Any) -> dict[str, Any]:
    """The names that its source can refer to: those of its module, and those of the functions around it."""
    functions = [thing] if isinstance(thing, types.FunctionType) else list(_methods(thing))
    found: dict[str, Any] = {}
    for function in functions:
        found |= function.__globals__
    for kind in thing.__bases__ if isinstance(thing, type) else ():
        found.setdefault(kind.__name__, kind)
    for function in functions:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name == "__class__":
                continue
            try:
                found[name] = cell.cell_contents
            except ValueError:  # not yet assigned
                continue
    return found


def _methods(kind: type) -> Iterator[types.FunctionType]:
    for value in vars(kind).values():
        value = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if isinstance(value, types.FunctionType):
            yield inspect.unwrap(value)


def _names(source: str, own: str) -> list[str]:
    """The names that ``source`` takes from outside, but for those of Python itself."""
    found: dict[str, None] = {}
    waiting = [symtable.symtable(source, "source", "exec")]
    while waiting:
        table = waiting.pop()
        for symbol in table.get_symbols():
            outer = symbol.is_referenced() and (not symbol.is_assigned() if table.get_type() == "module" else False)
            if (outer or symbol.is_global()) and symbol.get_name() != own:
                found[symbol.get_name()] = None
        waiting += table.get_children()
    return [n for n in found if not hasattr(builtins, n)]


def _source(thing: Any) -> tuple[str, str]:
    """The source of a class or function, moved to the left margin, and the name that it defines."""
    functions = [thing] if isinstance(thing, types.FunctionType) else list(_methods(thing))
    written = [f for f in functions if not f.__code__.co_filename.startswith("<string>")]  # a dataclass writes some
    for function in written:
        lines = linecache.getlines(function.__code__.co_filename)
        try:
            tree = ast.parse("".join(lines))
        except SyntaxError:
            continue
        node = _definition(tree, thing, function.__code__)
        if isinstance(node, ast.Lambda):
            return f"judged = {ast.get_source_segment(''.join(lines), node)}", "judged"
        if node is not None:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            return textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).rstrip(), node.name
    raise NotPortable(f"the source of {thing.__qualname__} is not known; put it into a file")


Definition = ast.FunctionDef | ast.ClassDef | ast.Lambda


def _definition(tree: ast.AST, thing: Any, code: types.CodeType) -> Definition | None:
    """What in ``tree`` defines ``thing``, whose code (for a class, that of one of its methods) is ``code``."""
    line, places = code.co_firstlineno, set(code.co_positions())
    found: Definition | None = None
    for node in ast.walk(tree):  # the outer ones first
        if isinstance(node, ast.ClassDef):
            right = isinstance(thing, type) and node.lineno <= line <= (node.end_lineno or 0)
        elif isinstance(node, ast.FunctionDef):
            right = line in {node.lineno, *(d.lineno for d in node.decorator_list)} and not isinstance(thing, type)
        elif isinstance(node, ast.Lambda) and thing.__name__ == "<lambda>":  # several may stand on one line
            body = node.body
            right = (body.lineno, body.end_lineno, body.col_offset, body.end_col_offset) in places
        else:
            continue
        if right and getattr(node, "name", thing.__name__) == thing.__name__:
            found = node
    return found


# ------------------------------------------------------------------------------------------------------------ a digest


def digest(thing: Any) -> str:
    """A text that is another one where the code of ``thing`` is: of a function, a class, or an instance of one.

    Covers what it refers to in its own module, and the numbers, texts and tensors that it is bound to; not what a list
    or a dict holds, which may be all that it has seen.
    """
    hashed = hashlib.sha256()
    for line in _described(thing, set()):
        hashed.update(f"{line}\n".encode())
    return hashed.hexdigest()[:16]


def total(tensor: torch.Tensor) -> str:
    """A number that tells tensors of one shape apart."""
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return "" if dense.is_meta else repr(dense.detach().double().nan_to_num().sum().item())


def _described(value: Any, seen: set[int]) -> Iterator[str]:
    if id(value) in seen:
        return
    if isinstance(value, types.MethodType):
        yield from _described(value.__self__, seen)
        value = value.__func__
    if isinstance(value, types.FunctionType):
        seen.add(id(value))
        yield from _code(value.__code__)
        yield from _described((value.__defaults__, tuple((value.__kwdefaults__ or {}).items())), seen)
        for name, used in _used(value):
            yield name
            yield from _described(used, seen)
    elif isinstance(value, type):
        seen.add(id(value))
        yield value.__qualname__
        for function in _methods(value):
            yield from _described(function, seen)
        for base in value.__bases__:
            if base.__module__ == value.__module__:
                yield from _described(base, seen)
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)} {total(value)}"
    elif isinstance(value, torch.nn.Module):
        yield type(value).__qualname__
        yield from _described(tuple(value.state_dict().items()), seen)
    elif isinstance(value, tuple):
        for item in value:
            yield from _described(item, seen)
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        yield repr(value)
    elif hasattr(value, "func") and hasattr(value, "args"):  # functools.partial
        yield from _described((value.func, value.args, tuple(getattr(value, "keywords", {}).items())), seen)
    else:
        yield from _described(type(value), seen) if callable(value) else ()


def _used(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function is bound to, and the functions, classes and plain values of its own module that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not yet assigned
            continue
    for name in _global_names(function.__code__):
        value = function.__globals__.get(name)
        own = getattr(value, "__module__", None) == function.__module__
        if own or isinstance(value, bool | int | float | str | tuple):
            yield name, value


def _global_names(code: types.CodeType) -> list[str]:
    inner = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in _global_names(c)]
    return [*code.co_names, *inner]


def _code(code: types.CodeType) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        else:
            yield repr(constant) if not isinstance(constant, frozenset) else repr(sorted(map(repr, constant)))
