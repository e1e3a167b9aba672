"""From a module and example inputs to a graph module: the only file that knows front ends.

Three routes, tried in this order and always reported (`capture_report`):

given       the module is a graph module already, such as a user's own `symbolic_trace`
whole       `torch.export` (non-strict) of the whole model, with dynamic sizes, else with the sizes as given
submodules  the model's own code stays as the frame; the largest submodules that can be exported become graph modules

A capture shares every parameter and buffer with the model, as the same objects; the model itself is never touched.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.graph import _PyTreeCodeGen
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fxopt.errors import CaptureError, UsageError
from fxopt.guards import picklable
from fxopt.log import install
from fxopt.shapes import propagate
from fxopt.text import to_html

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Call",
    "CaptureReport",
    "Captured",
    "Eager",
    "Guard",
    "InputSpec",
    "capture",
    "capture_report",
    "difference",
    "export",
    "positional_names",
    "propagate",
    "quiet",
    "register_caches",
    "structural_copy",
]

_META = "fxopt.capture"
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
# relative, and absolute below one: what a graph may differ from eager by, given that both run the same operators
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Inputs = tuple[Any, ...] | Mapping[str, Any]
Sizes = Literal["all", "leading", "static"]


@dataclass(frozen=True)
class InputSpec:
    """One leaf of the example inputs: its path, dtype (or the type's name) and sizes, symbols for dynamic ones."""

    path: str
    dtype: str
    shape: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Eager:
    """A part that stayed eager: the module's path ("" is the whole model) and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class CaptureReport:
    """How a graph module came to be.

    `captured` holds the paths of the graph modules inside it ("" is itself). The shares are of floating-point
    operations (as `torch.utils.flop_counter` counts them on the example inputs) and of parameter elements, 0 to 1.
    """

    route: Literal["whole", "submodules", "given"]
    dynamic: bool
    captured: tuple[str, ...]
    share_of_flops: float
    share_of_parameters: float
    eager: tuple[Eager, ...] = ()
    notes: tuple[str, ...] = ()
    inputs: tuple[InputSpec, ...] = ()

    def __str__(self) -> str:
        head = (
            f"captured {self.route}: {self.share_of_flops:.0%} of the compute, "
            f"{self.share_of_parameters:.0%} of the parameters, {'dynamic' if self.dynamic else 'static'} sizes"
        )
        lines = [head, *self.notes, *(f"eager: {part.path or 'the model'}: {part.reason}" for part in self.eager)]
        return "\n  ".join(lines)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table("input", "dtype", "sizes", title=Text(str(self)), title_justify="left")
        for spec in self.inputs:
            table.add_row(Text(spec.path), spec.dtype, Text(", ".join(map(str, spec.shape))))
        return table

    def _repr_html_(self) -> str:
        return to_html(self)


def capture(model: nn.Module, example_inputs: Inputs, dynamic: bool = True) -> GraphModule:
    """A graph module in eval mode that computes what `model` computes in eval mode.

    `example_inputs`: a tuple is positional, a mapping is keywords; they must be inputs that `model` can run on. With
    `dynamic`, every size that the model's code allows to vary may vary (a sample with a batch of one is doubled,
    for torch.export fixes sizes of one). The result takes the same inputs by the same names, and gives the same
    output structure. A graph module is returned as it is, with a report. Nodes carry `val`, `nn_module_stack` and
    `stack_trace`. Raises CaptureError if the inputs do not fit, or if no part of the model can be captured.
    """
    args, kwargs = as_call(example_inputs)
    if isinstance(model, GraphModule):
        return _given(model, args, kwargs)
    frame = structural_copy(model).eval()
    register_caches(frame)
    call = Call.of(frame, args, kwargs)
    expected = _reference(frame, call)
    sample = _enlarged(frame, call) if dynamic else call
    gm, notes = _whole(frame, call, sample, expected, dynamic)
    if gm is not None:
        specs = _input_specs(gm)
        varies = any(isinstance(size, str) for spec in specs for size in spec.shape)
        gm.meta[_META] = CaptureReport("whole", varies, ("",), 1.0, 1.0, (), notes, specs)
        return gm
    return _by_submodules(frame, call, sample, expected, dynamic, notes)


def capture_report(gm: GraphModule) -> CaptureReport:
    """How `gm` was captured. UsageError if it did not come from `capture`."""
    report = gm.meta.get(_META) if isinstance(gm, GraphModule) else None
    if not isinstance(report, CaptureReport):
        raise UsageError(f"this {type(gm).__name__} was not captured by fxopt: give the result of fxopt.capture")
    return report


def structural_copy(model: nn.Module) -> nn.Module:
    """New module objects all through, sharing every tensor with `model`: parameters, buffers, plain attributes.

    Raises CaptureError if some attribute of the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                memo[id(value)] = value
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({_line(error)}): remove the attribute that cannot be"
        ) from error


# --------------------------------------------------------------------------------------------- calls and guards


@contextlib.contextmanager
def _buffers_kept(module: Any) -> Iterator[None]:
    """Put back what the body writes to the module's buffers, or puts in their place."""
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    tables = [(m._buffers, dict(m._buffers)) for m in modules if m._buffers]
    contents = [(b, b._version, b.clone()) for _, held in tables for b in held.values() if _writable(b)]
    try:
        yield
    finally:
        for table, held in tables:
            table.clear()
            table.update(held)
        with torch.no_grad():
            for buffer, version, content in contents:
                if buffer._version != version:
                    buffer.copy_(content)


def _writable(buffer: Tensor | None) -> TypeGuard[Tensor]:
    return buffer is not None and not buffer.is_inference() and not isinstance(buffer, FakeTensor)


@dataclass(frozen=True)
class Call:
    """The inputs of one call by name, in the order in which an exported graph takes them; the first are positional."""

    names: tuple[str, ...]
    values: tuple[Any, ...]
    positional: int = 0

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call `module(*args, **kwargs)`, positional inputs named as `forward` names them."""
        return cls((*positional_names(module)(len(args)), *kwargs), (*args, *kwargs.values()), len(args))

    def fresh(self) -> Call:
        """The same inputs as new objects, for caches are written into."""
        return Call(self.names, tuple(_fresh(value) for value in self.values), self.positional)

    def into(self, module: Callable[..., Any]) -> Any:
        """What `module` gives for these inputs, without gradients; it gets copies, for caches are written into.

        The module's buffers are as before afterwards: whoever counts his calls would count these.
        """
        values = self.fresh().values
        keywords = dict(zip(self.names[self.positional :], values[self.positional :], strict=True))
        with torch.no_grad(), _buffers_kept(module):
            return module(*values[: self.positional], **keywords)

    def mapped(self, change: Callable[[Tensor], Any]) -> Call:
        """The same call with each tensor changed."""
        values = tuple(pytree.tree_map_only(Tensor, change, value) for value in self.values)
        return Call(self.names, values, self.positional)

    def tensors(self) -> list[Tensor]:
        """Every tensor in it, inside containers too."""
        return [leaf for leaf in pytree.tree_leaves(list(self.values)) if isinstance(leaf, Tensor)]

    def signature(self) -> tuple[Any, ...]:
        """What distinguishes calls that one graph cannot serve both of, sizes left out; equal for equal calls."""
        leaves, structure = pytree.tree_flatten(list(self.values))
        return self.names, str(structure), tuple(_kind(leaf) for leaf in leaves)


class Guard:
    """Which inputs a captured graph is for: names, structure, dtypes, devices, ranks, constants, and its conditions
    on sizes. Immutable: a copy is the same object.
    """

    def __init__(self, gm: GraphModule, call: Call) -> None:
        self.names = call.names
        leaves, self._structure = pytree.tree_flatten(list(call.values))
        self._kinds = tuple(_kind(leaf) for leaf in leaves)
        self._paths = tuple(_paths(call))
        conditions = getattr(gm, "_guards_fn", None)
        self._conditions: Callable[..., None] | None = conditions

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        return self

    def refuses(self, given: Mapping[str, Any]) -> str | None:
        """Why the graph is not for these inputs (by name), or None if it is."""
        if given.keys() != set(self.names):
            unknown, missing = sorted(given.keys() - set(self.names)), sorted(set(self.names) - given.keys())
            takes = f"it takes no {', '.join(unknown)}" if unknown else ""
            needs = f"it needs {', '.join(missing)}" if missing else ""
            return " and ".join(filter(None, (takes, needs)))
        leaves, structure = pytree.tree_flatten([given[name] for name in self.names])
        if structure != self._structure:
            return "inputs of another structure"
        for path, kind, leaf in zip(self._paths, self._kinds, leaves, strict=True):
            if _kind(leaf) != kind:
                return f"{path} is {_said(_kind(leaf))} instead of {_said(kind)}"
        return self._broken_condition(leaves)

    def _broken_condition(self, leaves: Sequence[Any]) -> str | None:
        if self._conditions is None:
            return None
        try:
            self._conditions(*leaves)
        except AssertionError as error:  # the conditions that torch.export found are a function of asserts
            return str(error)
        return None


def _kind(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, Tensor):
        return (leaf.dtype, leaf.device, leaf.dim())
    return (type(leaf), leaf)


def _said(kind: tuple[Any, ...]) -> str:
    if isinstance(kind[0], torch.dtype):
        return f"a {kind[2]}-d {kind[0]} tensor on {kind[1]}"
    return repr(kind[1])


def _paths(call: Call) -> Iterator[str]:
    for name, value in zip(call.names, call.values, strict=True):
        count = len(pytree.tree_leaves(value))
        yield from [name] if count == 1 else (f"{name}[{i}]" for i in range(count))


def positional_names(module: nn.Module) -> Callable[[int], list[str]]:
    """Names for the first so many positional inputs of `module`, by the signature that its forward has now."""
    parameters = inspect.signature(module.forward).parameters.values()
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return functools.partial(_first_names, plain)


def _first_names(plain: list[str], count: int) -> list[str]:
    return [plain[i] if i < len(plain) else f"argument_{i}" for i in range(count)]


def as_call(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs; UsageError if they are neither a tuple nor a dict."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    raise UsageError(
        f"example_inputs is a {type(example_inputs).__name__}: give a tuple (positional) or a dict (keywords)"
    )


def _fresh(value: Any) -> Any:
    """A copy: tensors cloned (views of one storage come apart), objects that are no pytree deep-copied."""
    return pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf), value
    )


def _reference(frame: nn.Module, call: Call) -> Any:
    try:
        return call.into(frame)
    except Exception as error:
        raise CaptureError(
            f"{type(frame).__name__} does not run on the example inputs {', '.join(call.names)} ({_line(error)}): "
            "give inputs that the model itself accepts"
        ) from error


def _enlarged(frame: nn.Module, call: Call) -> Call:
    """The call with every leading size of one doubled, if the model runs on that; else the call as it is.

    torch.export fixes sizes of one, so that a graph made from a batch of one would run on no other.
    """
    if all(t.dim() == 0 or t.shape[0] != 1 for t in call.tensors()):
        return call
    larger = call.mapped(lambda t: torch.cat((t, t)) if t.dim() and t.shape[0] == 1 else t)
    try:
        larger.into(frame)
    except Exception:  # noqa: BLE001 - a probe: a model that takes no second row keeps its batch of one
        return call
    return larger


# -------------------------------------------------------------------------------------------------- route: whole


class _Specs(_PyTreeCodeGen):
    """The export's code generator. Its specs are immutable, and copying them warns in torch 2.13."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Specs:
        twin = _Specs(self.pytree_info)
        twin._body_transformer, twin._func_name = self._body_transformer, self._func_name
        return twin


class _Exported(GraphModule):
    """A graph module whose copies keep what fx loses: which buffers are not persistent."""

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModule:
        for spec in (self.__dict__.get("_in_spec"), self.__dict__.get("_out_spec")):
            memo[id(spec)] = spec
        twin = super().__deepcopy__(memo)
        modules = dict(twin.named_modules())
        for path, module in self.named_modules():
            if path in modules:
                modules[path]._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        return twin


def export(module: nn.Module, call: Call, sizes: Sizes, exact_kernels: bool = True) -> GraphModule:
    """The ATen graph of `module` on this call, by torch.export; the module's tensors are shared, as the same objects.

    `sizes` says which may vary: "all" of two and more, only the "leading" ones (the first two; the first of images),
    or none. `exact_kernels=False` traces attention by its plain definition, which some models need. Raises whatever
    torch.export raises. `module.forward` is replaced meanwhile: give a copy of a model that others hold.
    """
    spec = {name: _dynamic(value, sizes) for name, value in zip(call.names, call.values, strict=True)}
    values = dict(zip(call.names, call.fresh().values, strict=True))
    with quiet(), _flat_signature(module, call), _transformers_patches(module, exact_kernels), torch.no_grad():
        program = torch.export.export(
            module, (), values, dynamic_shapes=None if sizes == "static" else spec, strict=False
        )
        with picklable():
            stateful = program.module()
        return _plain(stateful, type(module).__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch.export logs, and prints, the whole graph when it fails; the reason is raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _plain(stateful: GraphModule, name: str) -> GraphModule:
    """An ordinary graph module of what `ExportedProgram.module()` gives, which forbids eval() and checks by hooks."""
    graph = stateful.graph
    if isinstance(graph._codegen, _PyTreeCodeGen):
        graph.set_codegen(_Specs(graph._codegen.pytree_info))
    gm = _Exported(stateful, graph, class_name=name)
    persistent = set(stateful.state_dict(keep_vars=True))
    for path, _ in list(gm.named_buffers(remove_duplicate=False)):
        prefix, _, leaf = path.rpartition(".")
        if path not in persistent:
            gm.get_submodule(prefix)._non_persistent_buffers_set.add(leaf)
    gm.meta.update(stateful.meta)
    install(gm)  # torch's own pickling fails on what export makes
    return gm.eval()


def _dynamic(value: Any, sizes: Sizes) -> Any:
    """torch.export's description of dynamic sizes, in the structure of the value (its own node types as lists)."""
    if isinstance(value, Tensor):
        return dict.fromkeys(_varying(value, sizes), torch.export.Dim.AUTO)
    if isinstance(value, dict) and type(value) is dict:
        return {key: _dynamic(item, sizes) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_dynamic(item, sizes) for item in value)
    registered = pytree.SUPPORTED_NODES.get(type(value))
    if registered is None:
        return None
    children, _ = registered.flatten_fn(value)
    return [_dynamic(child, sizes) for child in children]


def _varying(tensor: Tensor, sizes: Sizes) -> list[int]:
    rank = {"all": tensor.dim(), "leading": 2 if tensor.dim() < 4 else 1, "static": 0}[sizes]
    return [i for i in range(min(rank, tensor.dim())) if tensor.shape[i] > 1]


@contextlib.contextmanager
def _flat_signature(module: nn.Module, call: Call) -> Iterator[None]:
    """Give `module` a forward with just these inputs: export would make one bundle of a `**kwargs`."""
    own = module.__dict__.get("forward")
    forward = module.forward

    def flat(**given: Any) -> Any:
        values = [given[name] for name in call.names]
        return forward(*values[: call.positional], **{n: given[n] for n in call.names[call.positional :]})

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    flat.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in call.names])  # type: ignore[attr-defined]
    module.__dict__["forward"] = flat
    try:
        yield
    finally:
        module.__dict__.pop("forward")
        if own is not None:
            module.__dict__["forward"] = own


def _is_transformers(module: nn.Module) -> bool:
    library = sys.modules.get("transformers")
    return library is not None and any(isinstance(m, library.PreTrainedModel) for m in module.modules())


def register_caches(frame: nn.Module) -> None:
    """Make transformers' key-value caches pytree nodes, so that a graph can take and return them."""
    if not _is_transformers(frame):
        return
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    register_cache_pytrees_for_model(frame)


@contextlib.contextmanager
def _transformers_patches(module: nn.Module, exact_kernels: bool) -> Iterator[None]:
    """transformers' own replacements of what cannot be exported, on its classes, for as long as the export runs.

    One of them traces attention by its plain definition: where it is not needed it would only add copies.
    """
    if not _is_transformers(module):
        yield
        return
    from transformers.exporters.exporter_dynamo import reset_model_state
    from transformers.exporters.utils import apply_patches, patch_attribute

    attention = F.scaled_dot_product_attention
    with apply_patches("dynamo"), reset_model_state(module), contextlib.ExitStack() as stack:
        if exact_kernels:
            stack.enter_context(patch_attribute(F, "scaled_dot_product_attention", lambda _: attention))
        yield


def _whole(
    frame: nn.Module, call: Call, sample: Call, expected: Any, dynamic: bool
) -> tuple[GraphModule | None, tuple[str, ...]]:
    """The graph of the whole model, or None, and what there is to say about how it went."""
    notes: list[str] = []
    plans: list[tuple[Sizes, bool, str]] = [("static", True, "static sizes")]
    if dynamic:
        plans = [("all", True, "dynamic sizes"), ("leading", True, "dynamic leading sizes"), *plans]
    if _is_transformers(frame):
        plans.append(("all" if dynamic else "static", False, "attention by its definition"))
    for sizes, exact, title in plans:
        used = call if sizes == "static" else sample
        try:
            gm = export(frame, used, sizes, exact)
        except GuardOnDataDependentSymNode as error:  # with other sizes it would depend on the data all the same
            notes.append(_line(error))
            break
        except Exception as error:  # noqa: BLE001 - torch.export raises anything; the reason goes into the report
            notes.append(f"{title}: {_line(error)}")
            continue
        wrong = _wrong(gm, frame, call, expected) or (_wrong_alone(gm, frame, call) if sizes != "static" else None)
        if wrong is None:
            return gm, tuple(notes)
        notes.append(f"{title}: {wrong}")
    return None, tuple(notes)


def _wrong(gm: nn.Module, frame: nn.Module, call: Call, expected: Any) -> str | None:
    """How the graph's outputs differ from eager's, or None."""
    try:
        actual = call.into(gm)
    except Exception as error:  # noqa: BLE001 - a graph that cannot run on the inputs is refused, with the reason
        return f"the graph does not run on the example inputs ({_line(error)})"
    reason = difference(expected, actual)
    if reason is not None and difference(expected, call.into(frame)) is not None:
        return None  # the model does not even agree with itself: it draws random numbers
    return reason


def _wrong_alone(gm: nn.Module, frame: nn.Module, call: Call) -> str | None:
    """How a batch of one differs from eager's, or None: export assumes of every dynamic size that it is not one."""
    tensors = [t for t in call.tensors() if t.dim()]
    if not tensors or any(t.shape[0] != tensors[0].shape[0] or t.shape[0] < 2 for t in tensors):
        return None
    alone = call.mapped(lambda t: t[:1] if t.dim() else t)
    try:
        expected = alone.into(frame)
    except Exception:  # noqa: BLE001 - a probe: a model that takes no batch of one is not asked for it
        return None
    try:
        actual = alone.into(gm)
    except AssertionError:  # the graph's own guard refuses a batch of one: it cannot go wrong in silence
        return None
    reason = difference(expected, actual)
    return None if reason is None else f"on a batch of one, {reason}"


def difference(expected: Any, actual: Any) -> str | None:
    """How outputs differ from eager's in structure or, beyond rounding, in numbers; None if they do not."""
    before, structure = pytree.tree_flatten(expected)
    after, other = pytree.tree_flatten(actual)
    if type(expected) is not type(actual) or len(before) != len(after) or structure != other:
        return f"the output is a {type(actual).__name__} of another structure than eager's {type(expected).__name__}"
    for number, (a, b) in enumerate(zip(before, after, strict=True)):
        if not _equal(a, b):
            return f"output {number} differs from eager's"
    return None


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and (not isinstance(a, _CONSTANTS) or bool(a == b))
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    tolerance = _TOLERANCE.get(a.dtype, 0.0)
    scale = 1.0 if not a.numel() or not a.is_floating_point() else max(1.0, float(a.nan_to_num(0, 0, 0).abs().max()))
    return torch.allclose(a, b, rtol=tolerance, atol=0.1 * tolerance * scale, equal_nan=True)


# --------------------------------------------------------------------------------------------- route: submodules


class Captured(nn.Module):
    """A captured submodule in its place in the frame: runs `graph` where its guard allows, else the eager module.

    `fallbacks` counts, by reason, the calls that the graph was not for. Attributes that the frame's code asks of the
    submodule are the eager module's.
    """

    def __init__(self, graph: GraphModule, guard: Guard, eager: nn.Module) -> None:
        super().__init__()
        self.training = eager.training
        self.graph = graph
        self.guard = guard
        self.fallbacks: Counter[str] = Counter()
        self._names = positional_names(eager)
        # not a registered submodule: its parameters would appear a second time in the state dict
        self.__dict__["_eager"] = eager
        for hooks in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
            "_forward_hooks_always_called",
        ):
            self.__dict__[hooks], eager.__dict__[hooks] = eager.__dict__[hooks], type(eager.__dict__[hooks])()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the submodule returns."""
        reason = self.guard.refuses(dict(zip(self._names(len(args)), args, strict=True)) | kwargs)
        if reason is None:
            return self.graph(*args, **kwargs)
        self.fallbacks[reason] += 1
        return self._eager(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            eager = self.__dict__.get("_eager")
            if eager is None:
                raise
            return getattr(eager, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Captured:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._eager._apply(fn, recurse)
        return self


def _by_submodules(
    frame: nn.Module, call: Call, sample: Call, expected: Any, dynamic: bool, notes: tuple[str, ...]
) -> GraphModule:
    calls = _recorded(frame, sample)
    total = _elements(frame)
    eager = [Eager("", notes[0] if notes else "it cannot be exported")]
    pieces: dict[int, Captured] = {}
    _replace_children(frame, "", calls, dynamic, pieces, eager)
    if not pieces:
        raise CaptureError(f"no part of {type(frame).__name__} can be captured: {eager[-1].reason}")
    gm = _framed(frame, call)
    wrong = _wrong(gm, frame, call, expected)
    if wrong is not None:
        raise CaptureError(f"{type(frame).__name__}, captured by submodules, is not what it was: {wrong}")
    graphs = {path: m for path, m in gm.named_modules() if path and isinstance(m, GraphModule)}
    held = {id(p): p.numel() for m in graphs.values() for p in m.parameters()}
    gm.meta[_META] = CaptureReport(
        "submodules",
        dynamic,
        tuple(path for path, m in graphs.items() if any(m is piece.graph for piece in pieces.values())),
        _share_of_flops(gm, call, pieces),
        sum(held.values()) / total if total else 1.0,
        tuple(eager),
        notes[1:],
        tuple(_given_specs(call)),
    )
    return gm


def _recorded(frame: nn.Module, sample: Call) -> dict[str, list[Call]]:
    """The calls of every submodule in one run of the frame, at most one of each signature and few of those."""
    calls: dict[str, dict[Any, Call]] = {}
    handles = []

    def recorder(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen = calls.setdefault(path, {})
            call = Call.of(module, args, kwargs)
            key = (call.signature(), tuple(tuple(t.shape) for t in call.tensors()))
            if key not in seen and len(seen) < 8:
                seen[key] = call.fresh()

        return record

    for path, module in frame.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(recorder(path), with_kwargs=True))
    try:
        sample.into(frame)
    finally:
        for handle in handles:
            handle.remove()
    return {path: list(seen.values()) for path, seen in calls.items()}


def _replace_children(
    module: nn.Module,
    path: str,
    calls: Mapping[str, list[Call]],
    dynamic: bool,
    pieces: dict[int, Captured],
    eager: list[Eager],
) -> None:
    """Put captured submodules in the place of the largest children that can be exported, all the way down."""
    for name, child in list(module._modules.items()):
        if child is None or isinstance(child, Captured):
            continue
        inner = f"{path}.{name}" if path else name
        piece = pieces.get(id(child)) or _piece(child, inner, calls.get(inner, []), dynamic, eager)
        if piece is None:
            _replace_children(child, inner, calls, dynamic, pieces, eager)
            continue
        pieces[id(child)] = piece
        module._modules[name] = piece


def _piece(child: nn.Module, path: str, calls: list[Call], dynamic: bool, eager: list[Eager]) -> Captured | None:
    """The captured child, or None; where something of it stays eager for good, that is noted."""
    if not calls or next(child.parameters(), None) is None:
        return None  # never called (a container), or nothing in it that a rewrite could improve
    if (foreign := _foreign(calls[0].values)) is not None:
        eager.append(Eager(path, f"it takes a {foreign}, which it may write into"))
        return None
    call = max(calls, key=lambda c: sum(size > 1 for t in c.tensors() for size in t.shape))
    plans: tuple[Sizes, ...] = ("all", "leading", "static") if dynamic else ("static",)
    reason = ""
    for sizes in plans:
        try:
            gm = export(child, call, sizes)
            reason = _wrong(gm, child, call, call.into(child)) or ""
        except GuardOnDataDependentSymNode as error:  # with other sizes it would depend on the data all the same
            reason = _line(error)
            break
        except Exception as error:  # noqa: BLE001 - torch.export raises anything; the reason goes into the report
            reason = reason or _line(error)
            continue
        if not reason:
            return Captured(gm, Guard(gm, call), child)
    eager.append(Eager(path, reason))
    return None


def _foreign(value: Any) -> str | None:
    """The type of an object inside the inputs that a graph cannot be given without losing what is written into it."""
    if isinstance(value, (Tensor, *_CONSTANTS)):
        return None
    if isinstance(value, Mapping):
        return next((found for item in value.values() if (found := _foreign(item)) is not None), None)
    if isinstance(value, (tuple, list)):
        return next((found for item in value if (found := _foreign(item)) is not None), None)
    return type(value).__name__


def _framed(frame: nn.Module, call: Call) -> GraphModule:
    """A graph module with the call's inputs as placeholders and one node, which calls the frame."""
    root = nn.Module()
    root.add_module("model", frame)
    graph = Graph()
    inputs = {name: graph.placeholder(name) for name in call.names}
    args = tuple(inputs[name] for name in call.names[: call.positional])
    graph.output(graph.call_module("model", args, {name: inputs[name] for name in call.names[call.positional :]}))
    return _Exported(root, graph, class_name=type(frame).__name__).eval()


def _share_of_flops(gm: GraphModule, call: Call, pieces: Mapping[int, Captured]) -> float:
    counter = FlopCounterMode(display=False)
    inside, started = 0, 0

    def enter(*_: Any) -> None:
        nonlocal started
        started = counter.get_total_flops()

    def leave(*_: Any) -> None:
        nonlocal inside
        inside += counter.get_total_flops() - started

    handles = [
        h
        for p in pieces.values()
        for h in (p.graph.register_forward_pre_hook(enter), p.graph.register_forward_hook(leave))
    ]
    try:
        with counter:
            call.into(gm)
    finally:
        for handle in handles:
            handle.remove()
    total = counter.get_total_flops()
    return inside / total if total else 0.0


def _elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --------------------------------------------------------------------------------------------------- route: given


def _given(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    call = (
        Call((*names[: len(args)], *kwargs), (*args, *kwargs.values()), len(args)) if len(args) <= len(names) else None
    )
    if call is None or not set(kwargs) <= set(names):
        raise CaptureError(f"the graph module takes {', '.join(names)}: the example inputs do not fit")
    _reference(gm, call)
    propagate(gm, args or kwargs)
    gm.meta[_META] = CaptureReport("given", False, ("",), 1.0, 1.0, (), (), tuple(_given_specs(call)))
    return gm


def _input_specs(gm: GraphModule) -> tuple[InputSpec, ...]:
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return tuple(_spec(str(node.target), node.meta.get("val")) for node in placeholders)


def _given_specs(call: Call) -> Iterator[InputSpec]:
    leaves = pytree.tree_leaves(list(call.values))
    for path, leaf in zip(_paths(call), leaves, strict=True):
        yield _spec(path, leaf)


def _spec(path: str, value: Any) -> InputSpec:
    if not isinstance(value, Tensor):
        return InputSpec(path, type(value).__name__)
    return InputSpec(path, str(value.dtype).removeprefix("torch."), tuple(_size(size) for size in value.shape))


def _size(size: int | torch.SymInt) -> int | str:
    if isinstance(size, int):
        return size
    fixed = size.node.maybe_as_int()
    return str(size) if fixed is None else int(fixed)


def _line(error: BaseException) -> str:
    """What went wrong, in one line; for control flow that depends on data, the line of code that does."""
    text = str(error)
    if isinstance(error, GuardOnDataDependentSymNode):
        place = re.search(r'File "(?:.*[/\\])?([^"]*)", line (\d+), in \w+\s*\n\s*(.+)', text)
        if place is not None:
            return f"control flow depends on data: `{place[3].strip()}` ({place[1]}:{place[2]})"
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:240]
