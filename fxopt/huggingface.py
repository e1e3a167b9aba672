"""Optimised Hugging Face models that are still themselves, and the `torch.compile` backend.

`optimize` gives a model of the same class: `generate`, `pipeline`, `save_pretrained` and `deepcopy` work as before. Its
`forward` runs a captured and transformed graph where the inputs are those that the graph is for, and the model's own
code everywhere else; every such fallback is counted by its reason in `model.fxopt.fallbacks`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.fx import GraphModule

from fxopt import catalogue, models
from fxopt.capture import (
    Call,
    CaptureReport,
    Guard,
    as_call,
    capture,
    capture_report,
    difference,
    positional_names,
    quiet,
    register_caches,
    structural_copy,
)
from fxopt.compose import Pipeline, Result, compose
from fxopt.delta import share
from fxopt.errors import CaptureError, FxoptError, UsageError, VerificationError
from fxopt.history import history
from fxopt.inputs import example_inputs as made_up_inputs
from fxopt.inputs import fitting_length
from fxopt.reuse import reusing
from fxopt.text import to_html
from fxopt.transformation import Transformation
from fxopt.verify import verify

Apply = Callable[[GraphModule], GraphModule]
_FLAGS = ("use_cache", "output_attentions", "output_hidden_states", "return_dict")
_STEPS = (
    5  # forward calls recorded of one `generate`: the first is the prefill, the last a decode step with a real past
)
_MOST_GRAPHS = 3  # of one module: a cache whose Python state differs in every step would otherwise give one for each


def optimize(
    model: nn.Module | str | Path,
    pipeline: str | Apply | None = "default",
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    generation: bool = True,
    dynamic: bool = True,
) -> nn.Module:
    """A model of the same class in eval mode, whose `forward` (and, in `generate`, prefill and decode) runs on graphs.

    `model`: a module, or whatever `fxopt.models.load` takes. `pipeline`: "default", passes by name
    (`"FuseLinearGELU,MergeLinears"`), any function of a graph module such as `fxopt.compose(…)`, or None to capture
    only. `example_inputs` as for `fxopt.capture`, made up if None. `generation=False` leaves `generate` eager.

    The given model is not touched; the result shares its parameters. `result.fxopt` holds the graphs, their histories
    and the counts of calls and fallbacks; its graphs are for inference: they give no gradients, and a model in training
    mode, one whose weights were replaced or edited, or inputs that need gradients run eagerly.

    Raises UsageError for a wrong argument, CaptureError if no graph can be captured, VerificationError if a transformed
    graph does not compute what the model computes, and whatever a pass raises.
    """
    result = _own(model, device, dtype)
    apply = passes(pipeline, _device(result))
    register_caches(result)
    state = Optimized(generation=generation, dynamic=dynamic)
    with reusing():
        for module, title, calls in _calls(result, example_inputs, generation, state):
            for graph in _graphs(module, title, calls, apply, dynamic, state):
                state.add(module, graph)
    if not state.entries:
        raise CaptureError(f"no graph of {type(result).__name__} can be captured: {'; '.join(state.notes)}")
    state.install(result)
    return result


def passes(pipeline: str | Apply | None, device: torch.device) -> Apply:
    """The function that a pipeline's spelling stands for; see `optimize`."""
    if pipeline is None:
        return lambda gm: gm
    if callable(pipeline):
        return pipeline
    if not isinstance(pipeline, str):
        raise UsageError(f"pipeline is {pipeline!r}: give 'default', NAME,NAME(option=value),…, a function, or None")
    return compose(*(default_passes(device) if pipeline == "default" else catalogue.parse(pipeline, device.type)))


def default_passes(device: torch.device) -> list[Transformation]:
    """The passes of the default pipeline on `device`."""
    return catalogue.default(device.type)


# ------------------------------------------------------------------------------------------------ the result's state


@dataclass(frozen=True)
class Captured:
    """A graph that stands in for one kind of call of one module."""

    name: str
    gm: GraphModule
    guard: Guard

    @property
    def report(self) -> CaptureReport:
        """How it was captured."""
        return capture_report(self.gm)


class Optimized:
    """What `model.fxopt` is: the graphs behind a model's forward, and how often they were and were not used.

    `enabled = False` makes the model eager. `calls` counts by graph, `fallbacks` by reason, `cut` the calls that gave
    no gradients though these were on, `notes` says what was left eager from the start and why. `results` holds what
    the pipeline did to each graph, step by step.
    """

    def __init__(self, generation: bool = True, dynamic: bool = True) -> None:
        self.generation = generation
        self.dynamic = dynamic
        self.example_inputs: dict[str, Any] = {}  # of `forward`, by name
        self.enabled = True
        self.calls: Counter[str] = Counter()
        self.cut = 0  # calls of a graph in which eager would have recorded gradients
        self.fallbacks: Counter[str] = Counter()
        self.notes: tuple[str, ...] = ()
        self.results: dict[str, Result] = {}
        self.known_to_fail = False  # a pipeline with on_failure="keep" made it so
        self.entries: list[Dispatch] = []
        self.stamp: Stamp | None = None

    @property
    def graphs(self) -> dict[str, GraphModule]:
        """The graph modules by name, such as `forward`, `prefill`, `decode`."""
        return {graph.name: graph.gm for entry in self.entries for graph in entry.graphs}

    def add(self, module: nn.Module, graph: Captured) -> None:
        """Let `graph` stand in for calls of `module`, from `install` on."""
        entry = next((e for e in self.entries if e.module is module), None)
        if entry is None:
            entry = Dispatch(module, self)
            self.entries.append(entry)
        entry.graphs.append(graph)

    def install(self, model: nn.Module) -> None:
        """Put the graphs in the place of `forward`."""
        self.stamp = Stamp(model, list(self.graphs.values()))
        for entry in self.entries:
            entry.module.__dict__["forward"] = entry
        model.__dict__["fxopt"] = self

    def note(self, text: str) -> None:
        """Say what was left eager."""
        self.notes = (*self.notes, text)

    def __str__(self) -> str:
        lines = [
            f"{graph.name}: {graph.report.route}, {graph.report.share_of_flops:.0%} of the compute, "
            f"{len(graph.gm.graph.nodes)} nodes, {self.calls[graph.name]} calls"
            for entry in self.entries
            for graph in entry.graphs
        ]
        lines += [f"eager from the start: {note}" for note in self.notes]
        if self.cut:
            lines.append(
                f"gave no gradients {self.cut} times, though they were on: the graphs are for inference; "
                "set model.fxopt.enabled = False to train in eval mode, or call under torch.no_grad()"
            )
        lines += [f"fell back to eager {count} times: {reason}" for reason, count in self.fallbacks.most_common()]
        return "\n".join(lines)

    __repr__ = __str__

    def __rich__(self) -> Table:
        table = Table(
            "graph", "route", "compute", "nodes", "calls", title="graphs behind the model", title_justify="left"
        )
        for entry in self.entries:
            for graph in entry.graphs:
                share, nodes = f"{graph.report.share_of_flops:.0%}", str(len(graph.gm.graph.nodes))
                table.add_row(graph.name, graph.report.route, share, nodes, str(self.calls[graph.name]))
        for note in self.notes:
            table.add_row("", Text(f"eager from the start: {note}"), style="yellow")
        for reason, count in self.fallbacks.most_common():
            table.add_row("", Text(f"fell back to eager: {reason}"), "", "", str(count), style="yellow")
        return table

    def _repr_html_(self) -> str:
        return to_html(self)


class Stamp:
    """What the graphs rely on in the model: its modules, hooks, tensors, and the values of those that they copied."""

    def __init__(self, model: nn.Module, graphs: list[GraphModule]) -> None:
        modules = list(model.modules())
        self._modules = modules
        self._children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        tensors = [(own, name, t) for m in modules for own in (m._parameters, m._buffers) for name, t in own.items()]
        self._tensors = [(own, name, t) for own, name, t in tensors if t is not None]
        held = {id(t) for gm in graphs for t in (*gm.parameters(), *gm.buffers())}
        # A merged or folded weight is a copy, which an edit of the original would not reach; where any was made, it may
        # be of a parameter that is also read elsewhere. A buffer that is held is the model's own to write to.
        made = any(after is not None for gm in graphs for c in history(gm) for _, after in c.delta.tensors().values())
        named = {id(t): (name, t) for name, t in (*model.named_buffers(), *model.named_parameters())}
        copied = [(n, t) for key, (n, t) in named.items() if key not in held or (made and isinstance(t, nn.Parameter))]
        self._copied = [_Copied.of(name, t) for name, t in copied]
        self._hooks = [_hooks(m) for m in modules]
        # conversions leave integer buffers alone
        first = next((t for _, _, t in self._tensors if t.is_floating_point()), None)
        self._placed = None if first is None else (first, first.dtype, first.device)

    def broken(self) -> str | None:
        """Why the graphs are out of date, or None."""
        if any(m.training for m in self._modules):
            return "the model is in training mode"
        if any(own.get(name) is not child for own, name, child in self._children):
            return "a submodule was replaced: optimize again"
        if any(own.get(name) is not t for own, name, t in self._tensors):
            return "a parameter or buffer was replaced: optimize again"
        if self._placed is not None and (self._placed[0].dtype, self._placed[0].device) != self._placed[1:]:
            return "the model was moved or converted: optimize again"
        if (edited := next((c.name for c in self._copied if c.edited()), None)) is not None:
            return f"a parameter {edited!r} was edited in place: optimize again"
        if any(_hooks(m) != before for m, before in zip(self._modules, self._hooks, strict=True)):
            return "hooks were added or removed"
        return None

    def edited_unseen(self) -> str | None:
        """Why the graphs are out of date where a write through ``.data`` left no trace but in the values, or None."""
        if _as_kept(self._copied):
            return None
        edited = next(c.name for c in self._copied if not _as_kept([c]))
        return f"a parameter {edited!r} was edited in place: optimize again"

    def __deepcopy__(self, memo: dict[int, Any]) -> Stamp:
        """The stamp of a copied model: copied tensors start with versions of their own."""
        twin = Stamp.__new__(Stamp)
        memo[id(self)] = twin
        for name in ("_modules", "_children", "_tensors", "_placed"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        twin._hooks = list(self._hooks)
        twin._copied = [c.of_copy(copy.deepcopy(c.tensor, memo)) for c in self._copied]
        return twin


_SAMPLE = 16


@dataclass(frozen=True, slots=True)
class _Copied:
    """A tensor of the model whose values a graph holds in another form, and how it was then."""

    name: str
    tensor: Tensor
    version: int
    address: int
    sample: Tensor  # some elements, which share its memory
    kept: Tensor  # the same, as they were

    @staticmethod
    def of(name: str, tensor: Tensor) -> _Copied:
        dense = tensor.is_contiguous() and not tensor.is_inference()
        flat = tensor.detach().view(-1) if dense else tensor.detach().reshape(-1)[:0]
        sample = flat[:: max(1, flat.numel() // _SAMPLE)]
        version = 0 if tensor.is_inference() else tensor._version
        return _Copied(name, tensor, version, tensor.data_ptr(), sample, sample.clone())

    def edited(self) -> bool:
        """Whether torch counts a write to it, or it lies in other memory."""
        now = 0 if self.tensor.is_inference() else self.tensor._version
        return now != self.version or self.tensor.data_ptr() != self.address

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.name, self.tensor, self.edited(), None if _as_kept([self]) else self.kept)

    def of_copy(self, tensor: Tensor) -> _Copied:
        """The same of a copy of the tensor; what was edited stays known as edited."""
        twin = _Copied.of(self.name, tensor)
        return dataclasses.replace(twin, version=-1) if self.edited() else dataclasses.replace(twin, kept=self.kept)


def _unpickled(name: str, tensor: Tensor, edited: bool, kept: Tensor | None) -> _Copied:
    made = _Copied.of(name, tensor)
    made = made if kept is None else dataclasses.replace(made, kept=kept)
    return dataclasses.replace(made, version=-1) if edited else made


def _as_kept(copied: Sequence[_Copied]) -> bool:
    """Whether the samples hold what they held, NaN included: one comparison for all of one dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[_Copied]] = {}
    for c in copied:
        groups.setdefault((c.sample.dtype, c.sample.device), []).append(c)
    return all(
        torch.allclose(torch.cat([c.sample for c in g]), torch.cat([c.kept for c in g]), 0, 0, equal_nan=True)
        for g in groups.values()
    )


def _hooks(module: nn.Module) -> int:
    """How many hooks a module has, transformers' own recorders of hidden states aside: they rest unless asked for."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return 0
    own = "transformers.utils.output_capturing"
    foreign = [h for h in module._forward_hooks.values() if getattr(h, "__module__", "") != own]
    return len(foreign) + len(module._forward_pre_hooks)


class Dispatch:
    """The `forward` of an optimised module: a graph where one is for the inputs, else the module's own code."""

    def __init__(self, module: nn.Module, state: Optimized) -> None:
        self.module = module
        self.state = state
        self.graphs: list[Captured] = []
        self.__signature__ = inspect.signature(module.forward)
        self._names = positional_names(module)
        self._own = module.__dict__.get("forward")
        self._last = ""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "__signature__"}  # its annotations may be anybody's

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        own = self._own or types.MethodType(type(self.module).forward, self.module)
        self.__signature__ = inspect.signature(own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module's own forward returns for these inputs."""
        if torch.compiler.is_compiling():  # also under torch.export: the tracer wants the model's own code
            return self.eager(*args, **kwargs)
        found = self._chosen(args, kwargs)
        if isinstance(found, str):
            self.state.fallbacks[f"{type(self.module).__name__}: {found}"] += 1
            return self.eager(*args, **kwargs)
        graph, inputs = found
        self.state.calls[graph.name] += 1
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters()):
            self.state.cut += 1
        with torch.no_grad():
            return _written_back(graph.gm(**inputs), inputs)

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own code."""
        if self._own is not None:
            return self._own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _chosen(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Captured, dict[str, Any]] | str:
        """The graph for these inputs, and the inputs as it takes them; or why there is none."""
        stamp = self.state.stamp
        if not self.state.enabled:
            return "switched off"
        if stamp is not None and (broken := stamp.broken()) is not None:
            return broken
        given = _named(self.module, dict(zip(self._names(len(args)), args, strict=True)) | dict(kwargs))
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return "an input needs gradients"
        if tensors and torch.is_autocast_enabled(tensors[0].device.type):
            return "autocast is on"
        reasons = {}
        # the last used first: a decode step follows a decode step
        for graph in sorted(self.graphs, key=lambda g: g.name != self._last):
            inputs = _completed(given, graph.guard.names)
            refused = graph.guard.refuses(inputs)
            if refused is None:
                # a prefill comes before every row of decoding steps, and looks
                if stamp is not None and graph.name != "decode" and (edited := stamp.edited_unseen()) is not None:
                    return edited
                self._last = graph.name
                return graph, inputs
            reasons[len(set(inputs) ^ set(graph.guard.names))] = f"{graph.name}: {refused}"
        return reasons[min(reasons)]


def _named(module: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Inputs by name without what says nothing: None, and flags that repeat the config."""
    config = getattr(module, "config", None)
    return {
        name: value
        for name, value in given.items()
        if value is not None and not (name in _FLAGS and config is not None and value is getattr(config, name, None))
    }


def _completed(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The inputs with what models assume where it is not given: attend to everything, one segment."""
    if given.keys() >= set(names):
        return given
    tokens = given.get("input_ids")
    if not isinstance(tokens, Tensor):
        tokens = getattr(given.get("encoder_outputs"), "last_hidden_state", None)
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return given
    filled = dict(given)
    past = given.get("past_key_values")
    seen = int(past.get_seq_length()) if past is not None and "input_ids" in given else 0
    rows, columns = tokens.shape[:2]
    if "attention_mask" in names and "attention_mask" not in given:
        filled["attention_mask"] = torch.ones(rows, seen + columns, dtype=torch.long, device=tokens.device)
    if "token_type_ids" in names and "token_type_ids" not in given:
        filled["token_type_ids"] = torch.zeros(rows, columns, dtype=torch.long, device=tokens.device)
    if "logits_to_keep" in names and columns == 1:
        filled.setdefault("logits_to_keep", 1)  # of one position, to keep all is to keep the last
    return filled


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and not isinstance(value, (Tensor, nn.Module))


def _written_back(output: Any, inputs: Mapping[str, Any]) -> Any:
    """A graph returns a new cache where the model's own code writes into the given one: do that here."""
    for name, value in inputs.items():
        if _is_cache(value):
            vars(value).clear()
            vars(value).update(vars(output[name]))
            output[name] = value
    return output


# ------------------------------------------------------------------------------------------------- making the graphs


def _own(model: nn.Module | str | Path, device: str | torch.device | None, dtype: torch.dtype | None) -> nn.Module:
    """A model of our own in eval mode, on the device, sharing tensors with the given one where nothing moves."""
    if not isinstance(model, nn.Module):
        return models.load(model, device or "cpu", dtype)
    if isinstance(model, GraphModule):
        raise UsageError("optimize was given a graph module: apply fxopt.compose(…) to it, or give the model itself")
    copied = structural_copy(model)
    for module in copied.modules():
        if isinstance(module.__dict__.get("forward"), Dispatch):
            del module.__dict__["forward"]
    copied.__dict__.pop("fxopt", None)
    if device is not None or dtype is not None:
        before = list(model.state_dict(keep_vars=True).values())
        moved = dtype is not None and any(t.is_floating_point() and t.dtype != dtype for t in before)
        if moved or (device is not None and any(t.device != torch.device(device) for t in before)):
            copied = copy.deepcopy(copied).to(device=device, dtype=dtype)
    return copied.eval()


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _calls(
    model: nn.Module, given: Mapping[str, Any] | tuple[Any, ...] | None, generation: bool, state: Optimized
) -> Iterator[tuple[nn.Module, str, list[Call]]]:
    """The modules to optimise, with the calls of each that graphs are to be made for."""
    inputs = made_up_inputs(model, batch_size=2) if given is None else given
    args, kwargs = as_call(inputs)
    plain = Call.of(model, args, kwargs)
    named = _named(model, dict(zip(plain.names, plain.values, strict=True)))
    state.example_inputs = named
    yield model, "forward", [Call(tuple(named), tuple(named.values()))]
    if not generation or not getattr(model, "can_generate", lambda: False)():
        return
    recorded = _recorded(model, state)
    for module, calls in recorded:
        yield module, "generate" if module is model else "encoder", calls


def _recorded(model: nn.Module, state: Optimized) -> list[tuple[nn.Module, list[Call]]]:
    """The calls that one `generate` makes of the model and of its encoder."""
    generative: Any = model  # transformers' mixins are not typed
    encoder = generative.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else None
    watched = [module for module in (encoder, model) if module is not None]
    calls: dict[int, list[Call]] = {id(module): [] for module in watched}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call.of(module, args, kwargs)
        named = _named(module, dict(zip(call.names, call.values, strict=True)))
        calls[id(module)].append(Call(tuple(named), tuple(named.values())).fresh())

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in watched]
    try:
        with quiet(), torch.no_grad():
            generative.generate(**_prompt(model), generation_config=_short(model))
    except Exception as error:  # noqa: BLE001 - generate runs much code of others; it stays eager, and that is said
        state.note(f"generate does not run on made-up inputs ({type(error).__name__}: {str(error).splitlines()[0]})")
        return []
    finally:
        for handle in handles:
            handle.remove()
    return [(module, calls[id(module)]) for module in watched if calls[id(module)]]


def _prompt(model: nn.Module) -> dict[str, Any]:
    """A padded batch for `generate`, left-padded as decoders want it."""
    length = max(1, fitting_length(model, 10 + _STEPS) - _STEPS)
    inputs = made_up_inputs(model, batch_size=3, sequence_length=length)
    inputs.pop("decoder_input_ids", None)
    if not getattr(model.config, "is_encoder_decoder", False) and "attention_mask" in inputs:
        inputs = {name: value.flip(1) if value.dim() == 2 else value for name, value in inputs.items()}
    return inputs


def _short(model: Any) -> Any:
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=_STEPS, min_new_tokens=_STEPS, do_sample=False, num_beams=1, use_cache=True)
    config.update(max_length=None, min_length=None)
    return config


def _graphs(
    module: nn.Module, title: str, calls: list[Call], apply: Apply, dynamic: bool, state: Optimized
) -> Iterator[Captured]:
    """One transformed graph for each kind of call, each compared with eager on every recorded call it is for."""
    kinds: dict[Any, list[Call]] = {}
    for call in calls:
        kinds.setdefault(call.signature(), []).append(call)
    names = _titles(title, len(kinds))
    if len(kinds) > len(names):
        state.note(f"{title}: {len(kinds) - len(names)} further kinds of call, each with another cache or other inputs")
    for name, group in zip(names, kinds.values(), strict=False):
        call = max(group, key=lambda c: sum(size > 1 for t in c.tensors() for size in t.shape))
        try:
            gm = capture(module, dict(zip(call.names, call.values, strict=True)), dynamic)
        except CaptureError as error:
            state.note(f"{name}: {error}")
            continue
        if not _returns_caches(gm, call):
            state.note(f"{name}: it writes into a cache that it does not return")
            continue
        expected = [each.into(module) for each in group]
        guard = Guard(gm, call)  # of the captured graph: a pass may remove its guards
        original = share(gm)
        gm = _applied(apply, gm, name, call, state)
        for each, before in zip(group, expected, strict=True):
            taken = guard.refuses(dict(zip(each.names, each.values, strict=True))) is None
            if taken and not _keeps_failures(apply) and difference(before, each.into(gm)) is not None:
                _judge(original, gm, each, f"{name} of {type(module).__name__}")
        yield Captured(name, gm, guard)


def _keeps_failures(apply: Apply) -> bool:
    """Whether it is the caller's wish that a graph which computes something else is kept."""
    return getattr(apply, "on_failure", "raise") == "keep"


def _judge(original: GraphModule, gm: GraphModule, call: Call, name: str) -> None:
    """Raise VerificationError unless ``gm`` is as near to the truth as ``original``: half precision rounds widely."""
    found = verify(original, gm, dict(zip(call.names, call.values, strict=True)), n_drawn=0)
    if not found.ok:
        raise VerificationError(f"{name}, transformed: {found.summary}")


def _applied(apply: Apply, gm: GraphModule, name: str, call: Call, state: Optimized) -> GraphModule:
    """The graph after the pipeline; what a `compose` pipeline measured on the recorded inputs goes into ``state``."""
    if (named := getattr(apply, "named", None)) is not None:  # a journal, which differs from graph to graph
        made: GraphModule = named(name, gm)
        state.known_to_fail |= _keeps_failures(apply)
        return made
    if not isinstance(apply, Pipeline):
        return apply(gm)
    asked = (
        apply if apply.example_inputs is not None else apply.on(dict(zip(call.names, call.fresh().values, strict=True)))
    )
    state.results[name] = result = asked.run(gm)
    wrong = any(s.kept and s.verification is not None and not s.verification.ok for s in result.steps)
    state.known_to_fail |= _keeps_failures(apply) and wrong
    return gm


def _titles(title: str, count: int) -> list[str]:
    if title != "generate":
        return [title, *(f"{title} {i}" for i in range(2, 1 + min(count, _MOST_GRAPHS)))]
    return ["prefill", "decode", *(f"decode {i}" for i in range(2, _MOST_GRAPHS))]


def _returns_caches(gm: GraphModule, call: Call) -> bool:
    caches = [name for name, value in zip(call.names, call.values, strict=True) if _is_cache(value)]
    if not caches:
        return True
    output = call.into(gm)
    return isinstance(output, Mapping) and all(_is_cache(output.get(name)) for name in caches)


# ------------------------------------------------------------------------------------------------------ torch.compile


def dynamo_backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """The backend behind `torch.compile(model, backend="fxopt")`.

    Dynamo's graphs hold torch functions, and parameters as inputs. Every pass of the default pipeline that preserves
    what is computed, gradients included, is tried; one that cannot be applied is left out with a warning.
    """
    for node in gm.graph.nodes:
        if "val" not in node.meta and "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    device = next((x.device for x in example_inputs if isinstance(x, Tensor)), torch.device("cpu"))
    for transformation in default_passes(device):
        try:
            transformation(gm)
        except FxoptError as error:
            warnings.warn(f"fxopt left out {transformation.signature}: {error}", RuntimeWarning, stacklevel=2)
    return gm.forward
