"""The hierarchy: a transformation, one that can be undone, and one made of a pattern and its replacement."""

from __future__ import annotations

import copy
import functools
import hashlib
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from fxopt import ops
from fxopt.delta import MARKS, Delta, graphs
from fxopt.errors import UsageError
from fxopt.history import Edited, find, mark, run, undo, unmark
from fxopt.pattern import Match, Miss, candidates, match, roots
from fxopt.pattern import value as known_value
from fxopt.reuse import reused
from fxopt.shapes import infer


class Transformation(ABC):
    """
    Changes a graph module in place.

    Write `transform` in plain torch.fx; the call records, lints and recompiles.  The protocol is that of
    ``optimum.fx.optimization.Transformation``, so a class written for that one runs with this as its base.
    """

    preserves_computation: bool = False
    replayable: bool = True  # False when it needs data or chance, and would not do the same again
    root_only: bool = False  # True when `transform` of the outermost graph module sees to those inside it

    @property
    def signature(self) -> str:
        """The call that makes this transformation: readable, and equal in every process."""
        if is_dataclass(self) and "__repr__" in vars(type(self)):
            options = {f.name: getattr(self, f.name) for f in fields(self)}
        else:
            options = dict(sorted((k, v) for k, v in vars(self).items() if not k.startswith("_")))
        return f"{type(self).__qualname__}({', '.join(f'{k}={_stable(v)}' for k, v in options.items())})"

    @abstractmethod
    def transform(self, graph_module: GraphModule) -> GraphModule | None:
        """Edit ``graph_module`` in place.  It is called for the graph module and for each one inside it."""

    def __call__(
        self, graph_module: GraphModule, lint_and_recompile: bool = True, reverse: bool = False
    ) -> GraphModule:
        """Apply to ``graph_module`` and commit, or undo the latest commit; returns ``graph_module``."""
        if reverse:
            return self._undo(graph_module)
        return run(graph_module, self, lint_and_recompile)

    def _undo(self, graph_module: GraphModule) -> GraphModule:
        raise UsageError(f"{self.signature} is not a ReversibleTransformation; undo with fxopt.history(gm).undo(...)")

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The nodes that come close to what this transformation rewrites, each with the reason why it does not."""
        return iter(())

    def carry(self, gm: GraphModule, rewrite: Delta) -> Mapping[str, torch.Tensor] | None:
        """The values of the original parameters, by path, after the new ones were edited; None if it cannot say."""
        return None

    def mark_as_transformed(self, node: Node) -> None:
        """Note on ``node`` that this transformation touched it; done by itself for all that it creates or changes."""
        mark(node, self.signature)

    def mark_as_restored(self, node: Node) -> None:
        """Take that note back."""
        unmark(node, self.signature)

    def transformed(self, node: Node) -> bool:
        """Whether this transformation created or changed ``node``."""
        return self.signature in node.meta.get(MARKS, ())

    def get_transformed_nodes(self, graph_module: GraphModule) -> list[Node]:
        """The nodes that this transformation created or changed, in graph order."""
        return [n for inner in graphs(graph_module).values() for n in inner.graph.nodes if self.transformed(n)]

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.signature == other.signature

    def __hash__(self) -> int:
        return hash(self.signature)

    def __repr__(self) -> str:
        return self.signature


class ReversibleTransformation(Transformation):
    """
    A transformation that can be undone; from the history, with nothing to write.

    A `reverse` written by hand, as optimum asks for, is used only on a graph module whose history does not know the
    transformation: the recorded difference is exact, and an inverse written by hand can rarely be.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("reverse")
        if own is not None and not getattr(own, "_exact", False):
            cls._reverse_by_hand = own
            cls.reverse = _exact(own)  # type: ignore[method-assign]

    _reverse_by_hand: ClassVar[Any] = None

    def reverse(self, graph_module: GraphModule, edited: Edited = "refuse") -> GraphModule:
        """
        Leave ``graph_module`` as if the latest commit of this transformation had never been made.

        ``edited``: what to do with parameters that this transformation made and that were written to since:
        "refuse" (raise `fxopt.errors.Conflict`), "carry" the edit back where the transformation can, or "discard" it.
        What was never applied is not undone: ``graph_module`` is returned as it is.
        """
        return self._undo(graph_module, edited)

    def _undo(self, graph_module: GraphModule, edited: Edited = "refuse") -> GraphModule:
        index = find(graph_module, self.signature)
        if index is not None:
            undo(graph_module, index, edited)
        elif self._reverse_by_hand is not None:
            run(graph_module, ByHand(self))
        return graph_module


Method = TypeVar("Method", bound=Callable[..., Any])


def exact(reverse: Method) -> Method:
    """Decorates a `reverse` that is no inverse written by hand, but the base's with more options."""
    reverse._exact = True  # type: ignore[attr-defined]
    return reverse


def _exact(by_hand: Any) -> Any:
    @functools.wraps(by_hand)
    def reverse(self: ReversibleTransformation, graph_module: GraphModule, edited: Edited = "refuse") -> GraphModule:
        return self._undo(graph_module, edited)

    return reverse


class ByHand(Transformation):
    """The `reverse` that the author of ``transformation`` wrote, as a commit of its own."""

    def __init__(self, transformation: ReversibleTransformation) -> None:
        self.transformation = transformation

    def transform(self, graph_module: GraphModule) -> GraphModule | None:
        result: GraphModule | None = self.transformation._reverse_by_hand(graph_module)
        return result


class Rewrite(ReversibleTransformation):
    """Replaces every match of ``pattern`` by what `rewrite` returns.  Subclasses are frozen dataclasses."""

    pattern: ClassVar[Any]
    preserves_computation = True

    @abstractmethod
    def rewrite(self, at: Site, *_: Any, **bindings: Any) -> Node:
        """The node that takes the root's place; ``bindings`` are the pattern's variables, by name."""

    def check(self, at: Site, *_: Any, **bindings: Any) -> str | None:
        """Why a match is not to be rewritten, for what a pattern cannot say; None if it is."""
        return None

    def transform(self, graph_module: GraphModule) -> None:
        with sweeping_once(graph_module):
            for node in list(candidates(graph_module, self.pattern)):
                if node._erased:
                    continue
                found = self._at(graph_module, node)
                if isinstance(found, Site):
                    found.replace(self.rewrite(found, **found.match.bindings))

    def concerns(self, gm: GraphModule, node: Node, op: ops.Op) -> bool:
        """Whether `misses` is to explain why ``node``, which computes a root's operation ``op``, stays."""
        return True

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The nodes that have the right operation but are not rewritten, each with the reason."""
        wanted = roots(self.pattern)
        for inner in graphs(gm).values():
            for node in inner.graph.nodes:
                op, doubt = ops.operation(inner, node)
                if op not in wanted or not self.concerns(inner, node, op):
                    continue
                if doubt is not None:
                    yield Miss(node, doubt)
                elif isinstance(found := self._at(inner, node), Miss):
                    yield found

    def _at(self, gm: GraphModule, node: Node) -> Site | Miss:
        found = match(gm, self.pattern, node)
        if isinstance(found, Miss):
            return found
        site = Site(gm, found)
        reason = self.check(site, **found.bindings)
        return site if reason is None else Miss(node, reason)


@dataclass(frozen=True)
class New:
    """A parameter or buffer that a rewrite makes; a node that uses it registers it, at ``path`` where that is free."""

    tensor: torch.Tensor
    path: str
    persistent: bool = True


@dataclass(frozen=True)
class Site:
    """Where a pattern matched: emits nodes there, in the dialect found there."""

    gm: GraphModule
    match: Match
    made: list[Node] = field(default_factory=list)  # what was emitted here

    @property
    def root(self) -> Node:
        return self.match.root

    def emit(self, op: ops.Op, *args: Any, **kwargs: Any) -> Node:
        """
        Write ``op`` before the root.

        Arguments may be nodes, numbers, `fxopt.ops.Attr` (read through a new ``get_attr``) or `New`.  Where the match
        is made of modules and every parameter is new or an attribute, the result is a module again.
        """
        graph = self.gm.graph
        arguments = dict(op.signature.bind(*args, **kwargs).arguments)
        with graph.inserting_before(self.root):
            if self.match.dialect == "module" and op.build is not None and _buildable(arguments):
                node = self._emit_module(op, arguments)
            else:
                read = {k: self.read(v) for k, v in arguments.items()}
                node = op.emit(graph, self.match.dialect, **read)
        self.describe(node)
        self.made.append(node)
        return node

    def describe(self, node: Node) -> None:
        """Give a new node where it comes from, and its value as far as it can be told."""
        for key, held in self.root.meta.items():
            if key not in ("val", "tensor_meta", "example_value", MARKS, "from_node"):
                node.meta[key] = held
        inferred = infer(self.gm, node)
        if inferred is not None:
            node.meta["val"] = inferred

    def _emit_module(self, op: ops.Op, arguments: dict[str, Any]) -> Node:
        tensors = {k: self._tensor_of(v) for k, v in arguments.items() if isinstance(v, New | ops.Attr)}
        module = op.build(**{k: tensors.get(k, v) for k, v in arguments.items() if not isinstance(v, Node)})  # type: ignore[misc]
        hint = next(v.path for v in arguments.values() if isinstance(v, New | ops.Attr)).rpartition(".")[0]
        path = self.free(hint)
        set_submodule(self.gm, path, module)
        inputs = [v for v in arguments.values() if isinstance(v, Node)]
        return self.gm.graph.call_module(path, tuple(inputs))

    def _tensor_of(self, value: New | ops.Attr) -> torch.Tensor | None:
        return value.tensor if isinstance(value, New) else ops.constant(self.gm, value)

    def read(self, value: Any) -> Any:
        """``value`` as an argument: a `New` is registered, and an `fxopt.ops.Attr` read by a new ``get_attr``."""
        if isinstance(value, New):
            path = self.free(value.path)
            register(self.gm, path, reused(self.gm, value.tensor), value.persistent)
            value = ops.Attr(path)
        if not isinstance(value, ops.Attr):
            return value
        node = self.gm.graph.get_attr(value.path)
        held = ops.constant(self.gm, value)
        if held is not None and (fake := _fake_like(self.gm, held)) is not None:
            node.meta["val"] = fake
        return node

    def free(self, path: str) -> str:
        """``path`` itself where nothing stands or only this match uses what stands there, else a name beside it."""
        owner, _, name = path.rpartition(".")
        for i in range(1_000_000):
            candidate = path if i == 0 else f"{owner}.{name}_{i}".lstrip(".")
            if not exists(self.gm, candidate) or self._only_mine(candidate):
                return candidate
        raise AssertionError("no free name")

    def _only_mine(self, path: str) -> bool:
        mine = set(self.match.nodes)
        for node in self.gm.graph.nodes:
            if node.op not in ("get_attr", "call_module") or node in mine:
                continue
            target = str(node.target)
            touches = target == path or path.startswith(f"{target}.") or target.startswith(f"{path}.")
            if touches and not (node.op == "get_attr" and node.users and all(u in mine for u in node.users)):
                return False
        return True

    def tensor(self, value: Any) -> torch.Tensor | None:
        """The parameter or buffer behind ``value``; None for anything else."""
        return ops.constant(self.gm, value)

    def path(self, value: Any) -> str:
        """The path of the parameter or buffer behind ``value``."""
        return value.path if isinstance(value, ops.Attr) else str(value.target)

    def value(self, x: Any) -> torch.Tensor | None:
        """A tensor with the shape and dtype of ``x``, if they are known (see `fxopt.propagate`)."""
        return known_value(self.gm, x)

    def replace(self, new: Node) -> None:
        """Put ``new`` in the root's place, and remove the match with the parameters that nothing reads any more."""
        root = self.root
        if "val" in root.meta and new in self.made:
            new.meta["val"] = root.meta["val"]
        root.replace_all_uses_with(new)
        erase(self.gm, [n for n in dict.fromkeys((*self.match.nodes, *self.match.shared)) if n is not new])


def _buildable(arguments: Mapping[str, Any]) -> bool:
    tensors = [v for v in arguments.values() if isinstance(v, Node | New | ops.Attr)]
    return sum(isinstance(v, Node) for v in tensors) == 1 and len(tensors) > 1


def erase(gm: GraphModule, nodes: list[Node]) -> None:
    """Erase ``nodes`` that have no users, with the ``get_attr`` nodes, parameters and modules that only they read."""
    waiting, paths = list(nodes), set()
    progress = True
    while progress:
        progress = False
        for node in list(waiting):
            if node.users:
                continue
            inputs = node.all_input_nodes
            if node.op in ("get_attr", "call_module"):
                paths.add(str(node.target))
            gm.graph.erase_node(node)
            waiting.remove(node)
            waiting += [n for n in inputs if n.op == "get_attr" and not n.users and n not in waiting]
            progress = True
    if paths:
        sweep(gm, paths)


_WAITING: dict[int, set[str]] = {}  # by graph module: what `sweeping_once` has collected


@contextmanager
def sweeping_once(gm: GraphModule) -> Iterator[None]:
    """Let `sweep` wait for the end of the body: it reads the whole graph, and once is enough for many rewrites."""
    if id(gm) in _WAITING:
        yield
        return
    waiting = _WAITING[id(gm)] = set()
    try:
        yield
    finally:
        del _WAITING[id(gm)]
    if waiting:
        sweep(gm, waiting)


def sweep(gm: GraphModule, paths: set[str]) -> None:
    """Delete those of ``paths`` that no node reads any more."""
    if id(gm) in _WAITING:
        _WAITING[id(gm)].update(paths)
        return
    live = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    held = {p for t in live for p in _prefixes(t)}
    for path in paths:
        if path in held or any(p in live for p in _prefixes(path)):
            continue
        owner, _, name = path.rpartition(".")
        module = ops.submodule(gm, owner)
        if module is not None and hasattr(module, name):
            delattr(module, name)


def _prefixes(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def exists(gm: nn.Module, path: str) -> bool:
    """Whether an attribute stands at ``path``."""
    owner, _, name = path.rpartition(".")
    module = ops.submodule(gm, owner)
    return module is not None and hasattr(module, name)


def register(gm: nn.Module, path: str, tensor: torch.Tensor, persistent: bool = True) -> None:
    """Put a parameter or buffer at ``path``, making the modules on the way."""
    owner, _, name = path.rpartition(".")
    module = _owner(gm, owner)
    kind: dict[str, Any] = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
    if name in kind:  # keep the place that the old one had
        kind[name] = tensor
        return
    if hasattr(module, name):
        delattr(module, name)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor, persistent=persistent)


def set_submodule(gm: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path``, making the modules on the way."""
    owner, _, name = path.rpartition(".")
    _owner(gm, owner)._modules[name] = module


def _owner(gm: nn.Module, path: str) -> nn.Module:
    module = gm
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None:
            child = nn.Module()
            module.add_module(name, child)
        module = child
    return module


def _fake_like(gm: GraphModule, tensor: torch.Tensor) -> torch.Tensor | None:
    """``tensor`` as the graph's own fake tensors are; None where the graph has none, or none can be made."""
    if tensor.is_mkldnn:
        return None
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, FakeTensor):
            fake: torch.Tensor = val.fake_mode.from_tensor(tensor, static_shapes=True)
            return fake
        if node.op not in ("placeholder", "get_attr"):
            break
    return None


def _stable(value: Any) -> str:
    """A text for an option that is equal in every process."""
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous()
        digest = hashlib.sha256(content.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:12]
        return f"tensor({tuple(value.shape)}, {value.dtype}, {digest})"
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Transformation):
        return value.signature
    if isinstance(value, tuple):
        return f"({', '.join(map(_stable, value))}{',' * (len(value) == 1)})"
    if isinstance(value, list):
        return f"[{', '.join(map(_stable, value))}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_stable, value)))}}}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_stable(k)}: {_stable(v)}' for k, v in value.items())}}}"
    text = repr(value)
    if " at 0x" in text:  # an address: no two processes would agree
        inner = {k: v for k, v in vars(value).items() if not k.startswith("_")} if hasattr(value, "__dict__") else {}
        return f"{type(value).__qualname__}({', '.join(f'{k}={_stable(v)}' for k, v in sorted(inner.items()))})"
    return text


def clone(gm: GraphModule) -> GraphModule:
    """A copy of ``gm`` with its history, which can be undone on its own."""
    return copy.deepcopy(gm)
