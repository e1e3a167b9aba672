"""Names to transformations: what the command line, saved journals and the documentation call a pass."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxopt import transformations
from fxopt.compose import adopt
from fxopt.errors import StoreError, UsageError
from fxopt.kernels import pays
from fxopt.kernels.linear import LARGE_WEIGHT
from fxopt.transformation import Transformation


def catalogue() -> dict[str, type[Transformation]]:
    """Every pass that fxopt ships, by name, in the order of the catalogue."""
    found = {}
    for name in transformations.__all__:
        member = getattr(transformations, name)
        if inspect.isclass(member) and issubclass(member, Transformation) and not inspect.isabstract(member):
            found[name] = member
    return found


# The order matters: first what tidies the graph, then algebra on weights, then fusions, and packed weights last, since
# nothing reads them any more.
_DEFAULT: tuple[tuple[str, dict[str, Any]], ...] = (
    ("MakeOutOfPlace", {}),
    ("EliminateDropout", {}),
    ("EliminateNoOps", {"asserts": True}),
    ("FoldConstants", {}),
    ("EliminateCommonSubexpressions", {}),
    ("EliminateDeadNodes", {}),
    ("FuseBatchNorm2dInConv2d", {}),
    ("FuseBatchNorm1dInLinear", {}),
    ("FuseBiasInLinear", {}),
    ("ChangeTrueDivToMulByInverse", {}),
    ("FuseAttention", {}),
    ("FoldAttentionScale", {}),
    ("FuseTanhGELU", {}),
    ("FuseRMSNorm", {}),
    ("FuseAddLayerNorm", {}),
    ("FuseLayerNormLinearLayerNorm", {}),
    ("FoldLayerNormAffine", {}),
    ("MergeGateUp", {}),
    ("FuseSwiGLU", {}),
    ("MergeLinears", {}),
    ("FuseConvReLU", {}),
    ("FuseLinearReLU", {"min_elements": LARGE_WEIGHT}),
    ("FuseLinearGELU", {"min_elements": LARGE_WEIGHT}),
    ("EliminateDeadNodes", {}),
    ("ReorderNodes", {}),
    ("PackWeights", {}),
)
# The operator that a fusion introduces: where `fxopt.kernels.pays` says no, the fusion is left out.
_INTRODUCES = {
    "FuseRMSNorm": "rms_norm",
    "FuseAddLayerNorm": "add_layer_norm",
    "FuseLayerNormLinearLayerNorm": "layer_norm_linear_layer_norm",
    "MergeGateUp": "swiglu_packed",
    "FuseSwiGLU": "swiglu",
    "FuseConvReLU": "conv_relu",
    "FuseLinearReLU": "linear_relu",
    "FuseLinearGELU": "linear_gelu",
}
_CPU_ONLY = ("PackWeights",)


def default(device_type: str) -> list[Transformation]:
    """The default pipeline on "cpu" or "cuda": what preserves the computation and never loses there."""
    known = catalogue()
    out = left_out(device_type)
    return [known[name](**options) for name, options in _DEFAULT if name in known and name not in out]


def left_out(device_type: str) -> tuple[str, ...]:
    """The fusions that bring nothing on "cpu" or "cuda", as far as was measured, and stay out of the default there."""
    names = [name for name, operator in _INTRODUCES.items() if not pays(operator, device_type)]
    return (*names, *(() if device_type == "cpu" else _CPU_ONLY))


def equation(kind: type[Transformation]) -> str:
    """The equation with which a pass's docstring begins."""
    return _paragraphs(kind)[0]


def summary(kind: type[Transformation]) -> str:
    """What the docstring says after the equation: how exact the pass is."""
    return " ".join(_paragraphs(kind)[1].split()) if len(_paragraphs(kind)) > 1 else ""


def _paragraphs(kind: type[Transformation]) -> list[str]:
    text = textwrap.dedent(f"    {(kind.__doc__ or kind.__name__).strip()}")
    return [textwrap.dedent(p) for p in inspect.cleandoc(text).split("\n\n")]


def parse(text: str, device_type: str = "cpu") -> list[Transformation]:
    """
    Transformations from their spelling: ``FuseLinearGELU,FoldConstants(limit=1024),mypasses:Mine,dir/x.py:Mine(k=2)``;
    ``default`` stands for the default pipeline on that type of device.

    A name alone is one of the catalogue.  ``module:name`` and ``path.py:name`` are anybody's: a `Transformation`, one
    of optimum's, or a function that edits a graph module in place.  Raises `UsageError` that names what is not known,
    and what is close to it.
    """
    parts = [default(device_type) if e == "default" else [_one(e, text)] for e in _elements(text)]
    return [made for part in parts for made in part]


def _elements(text: str) -> Iterator[str]:
    """The parts between commas that stand in no brackets or quotes."""
    depth, quote, begin = 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and depth == 0:
            yield text[begin:i].strip()
            begin = i + 1
    yield text[begin:].strip()


_FROM = re.compile(r"(?P<where>[^()'\"]+?):(?P<call>\w+(\(.*\))?)", re.DOTALL)


def _one(text: str, whole: str) -> Transformation:
    found = _FROM.fullmatch(text)
    call = found["call"] if found else text
    try:
        element = ast.parse(call, mode="eval").body
    except SyntaxError as error:
        raise UsageError(f"{whole!r} is no list of passes; write NAME,NAME(option=value),…") from error
    if isinstance(element, ast.Name):
        name, options = element.id, {}
    elif isinstance(element, ast.Call) and isinstance(element.func, ast.Name) and not element.args:
        name, options = element.func.id, _options(element)
    else:
        raise UsageError(f"{ast.unparse(element)!r} is no pass; write NAME or NAME(option=value)")
    return _foreign(found["where"], name, options) if found else make(name, options)


def _options(call: ast.Call) -> dict[str, Any]:
    try:
        return {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
    except ValueError as error:
        raise UsageError(f"{ast.unparse(call)}: an option is no plain value; write NAME(option=1)") from error


def _foreign(where: str, name: str, options: dict[str, Any]) -> Transformation:
    """The pass ``name`` of a module or a Python file."""
    module = _module(where)
    found = getattr(module, name, None)
    if found is None:
        passes = [k for k, v in vars(module).items() if inspect.isclass(v) and hasattr(v, "transform")]
        close = difflib.get_close_matches(name, passes, n=2) or passes[:3]
        raise UsageError(f"{where} has no {name}; " + (f"it has {', '.join(close)}" if close else "it has no passes"))
    if not inspect.isclass(found):
        if options or not callable(found):
            raise UsageError(f"{where}:{name} is no class, so it takes no options; give {where}:{name}")
        return adopt(found)
    try:
        return adopt(found(**options))
    except TypeError as error:
        raise UsageError(f"{where}:{name} cannot be made with {', '.join(options) or 'no options'}: {error}") from error


def _module(where: str) -> types.ModuleType:
    """A module by its name, also from the current folder, or by the path of its file."""
    path = Path(where)
    if path.suffix != ".py":
        with _findable(Path.cwd()):
            return _imported(where)
    if not path.is_file():
        raise UsageError(f"there is no file {where}; give PATH.py:NAME or MODULE:NAME")
    known = sys.modules.get(path.stem)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() != path.resolve():
        raise UsageError(f"{where} has the name of a module that is loaded already, {path.stem}; rename the file")
    with _findable(path.resolve().parent):
        return _imported(path.stem)


def _imported(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a user's module raises
        text = (str(error).splitlines() or [""])[0]
        raise UsageError(f"{name} cannot be imported: {type(error).__name__}: {text}") from error


@contextmanager
def _findable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def make(name: str, options: dict[str, Any]) -> Transformation:
    """A pass of the catalogue by its name and options."""
    known = catalogue()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=2)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UsageError(f"no pass is called {name!r}; {hint}`fxopt passes` lists them")
    try:
        return known[name](**options)
    except TypeError as error:
        fields = ", ".join(f.name for f in dataclasses.fields(known[name])) or "none"  # type: ignore[arg-type]
        raise UsageError(f"{name} does not take {', '.join(options)}; its options are: {fields}") from error


def to_json(transformation: Transformation, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """
    A transformation as plain values, to be made again by `from_json` in another process.

    ``tensors`` takes the tensors among its options, by the names that stand for them; without, they are refused.
    """
    kind = type(transformation)
    if dataclasses.is_dataclass(transformation):
        options = {f.name: getattr(transformation, f.name) for f in dataclasses.fields(transformation)}
    else:
        options = {k: v for k, v in vars(transformation).items() if not k.startswith("_")}
    plain = {k: _plain(v, transformation, tensors) for k, v in options.items()}
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "options": plain}


def _plain(value: Any, transformation: Transformation, tensors: dict[str, Tensor] | None) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and value.layout is torch.strided and tensors is not None:
        name = next((n for n, t in tensors.items() if t is value), f"option_{len(tensors)}")
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, tuple | list):
        items = [_plain(v, transformation, tensors) for v in value]
        tells = any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
        return {"list": items} if tells and isinstance(value, list) else items  # among inputs it is no tuple
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        held = {k: _plain(v, transformation, tensors) for k, v in value.items()}
        return {"dict": held} if [*held] in _MARKS else held
    shown = f"a tensor of layout {value.layout}" if isinstance(value, Tensor) else repr(value)
    raise StoreError(
        f"{transformation.signature} has the option {shown}, which is no plain value, so it cannot be saved; "
        "undo it before saving"
    )


_MARKS = (["tensor"], ["list"], ["dict"])  # what a dictionary of this one key stands for


def from_json(saved: Mapping[str, Any], tensors: Mapping[str, Tensor] = MappingProxyType({})) -> Transformation:
    """The transformation that `to_json` described; ``tensors`` by the names that stand for them."""
    module, _, name = str(saved["class"]).partition(":")
    try:
        kind: Any = importlib.import_module(module)
        for part in name.split("."):
            kind = getattr(kind, part)
    except (ImportError, AttributeError) as error:
        raise StoreError(
            f"{saved['class']} cannot be imported ({error}); make it importable, then load again"
        ) from error
    if not (inspect.isclass(kind) and issubclass(kind, Transformation)):
        raise StoreError(f"{saved['class']} is no fxopt transformation; the journal is damaged or from elsewhere")
    options = read_options(saved, dataclasses.is_dataclass(kind), tensors)
    if dataclasses.is_dataclass(kind):
        try:
            made = kind(**options)
        except TypeError as error:
            raise StoreError(f"{saved['class']} does not take the options {', '.join(options)}: {error}") from error
    else:
        made = kind.__new__(kind)
        vars(made).update(options)
    assert isinstance(made, Transformation)
    return made


def read_options(
    saved: Mapping[str, Any], frozen: bool, tensors: Mapping[str, Tensor] = MappingProxyType({})
) -> dict[str, Any]:
    """The options that `to_json` wrote; JSON has no tuples, and a ``frozen`` transformation no lists."""
    return {name: _read(value, frozen, tensors) for name, value in saved["options"].items()}


def _read(value: Any, frozen: bool, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        items = [_read(v, frozen, tensors) for v in value]
        return tuple(items) if frozen else items
    if not isinstance(value, dict):
        return value
    if [*value] == ["tensor"]:
        if value["tensor"] not in tensors:
            raise StoreError(f"the tensor {value['tensor']}, an option of a transformation, is missing; save it again")
        return tensors[value["tensor"]]
    if [*value] == ["list"]:
        return [_read(v, frozen, tensors) for v in value["list"]]
    held = value["dict"] if [*value] == ["dict"] else value
    return {k: _read(v, frozen, tensors) for k, v in held.items()}
