"""Names to transformations: what the command line, saved journals and the documentation call a pass."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from fxopt import transformations
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
    Transformations from their spelling: ``FuseLinearGELU,FoldConstants(limit=1024)``; ``default`` stands for the
    default pipeline on that type of device.

    Raises `UsageError` that names what is not known, and what is close to it.
    """
    try:
        tree = ast.parse(f"[{text}]", mode="eval")
    except SyntaxError as error:
        raise UsageError(f"{text!r} is no list of passes; write NAME,NAME(option=value),…") from error
    assert isinstance(tree.body, ast.List)
    return [made for element in tree.body.elts for made in _some(element, device_type)]


def _some(element: ast.expr, device_type: str) -> list[Transformation]:
    if isinstance(element, ast.Name) and element.id == "default":
        return default(device_type)
    return [_one(element)]


def _one(element: ast.expr) -> Transformation:
    if isinstance(element, ast.Name):
        return make(element.id, {})
    if isinstance(element, ast.Call) and isinstance(element.func, ast.Name) and not element.args:
        try:
            options = {k.arg: ast.literal_eval(k.value) for k in element.keywords if k.arg is not None}
        except ValueError as error:
            raise UsageError(f"{ast.unparse(element)}: an option is no plain value; write NAME(option=1)") from error
        return make(element.func.id, options)
    raise UsageError(f"{ast.unparse(element)!r} is no pass; write NAME or NAME(option=value)")


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


def to_json(transformation: Transformation) -> dict[str, Any]:
    """A transformation as plain values, to be made again by `from_json` in another process."""
    kind = type(transformation)
    if dataclasses.is_dataclass(transformation):
        options = {f.name: getattr(transformation, f.name) for f in dataclasses.fields(transformation)}
    else:
        options = {k: v for k, v in vars(transformation).items() if not k.startswith("_")}
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "options": _plain(options, transformation)}


def _plain(value: Any, transformation: Transformation) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(v, transformation) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: _plain(v, transformation) for k, v in value.items()}
    raise StoreError(
        f"{transformation.signature} has the option {value!r}, which is no plain value, so it cannot be saved; "
        "undo it before saving"
    )


def from_json(saved: dict[str, Any]) -> Transformation:
    """The transformation that `to_json` described."""
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
    options = dict(_tuples(kind, saved["options"]))
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


def _tuples(kind: Any, options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """JSON has no tuples; a frozen dataclass has no lists."""
    for name, value in options.items():
        yield name, _hashable(value) if dataclasses.is_dataclass(kind) else value


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
