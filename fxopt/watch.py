"""Keeping the caller's model out of it: module objects of one's own, and an eye on the memory of shared tensors."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.delta import share
from fxopt.garbage import uncollected
from fxopt.snapshot import OWNER, Snapshot, has_memory, slot_of

_CONTAINERS: tuple[type, ...] = (dict, list, set, OrderedDict)


class Owner:
    """The identity of the graph module that owns a module object."""


@uncollected()
def own(gm: GraphModule) -> None:
    """
    Give ``gm`` module objects of its own, which hold the same tensors.

    ``symbolic_trace`` leaves the caller's own submodules in the graph module; whoever edits one there edits the
    caller's model.  Modules that cannot be copied by their attributes (scripted, or with a ``forward`` bound to the
    instance) stay shared; the vocabulary does not read them.
    """
    token: Owner = gm.__dict__.setdefault(OWNER, Owner())
    copies: dict[int, nn.Module] = {}
    originals: list[nn.Module] = []  # kept alive, or another module may get the id of one that was replaced
    waiting: list[nn.Module] = [gm]
    seen: set[int] = set()
    while waiting:
        module = waiting.pop()
        if id(module) in seen or isinstance(module, torch.jit.ScriptModule):
            continue
        seen.add(id(module))
        for name, child in module._modules.items():
            if child is None:
                continue
            if child.__dict__.get(OWNER) is not token and child is not gm:
                if id(child) not in copies:
                    copies[id(child)] = _clone(child, token)
                    originals.append(child)
                module._modules[name] = child = copies[id(child)]
            if child.__dict__.get(OWNER) is token:
                waiting.append(child)


def _clone(module: nn.Module, token: Owner) -> nn.Module:
    kind = type(module)
    if isinstance(module, GraphModule):
        twin = share(module)
        twin.__dict__[OWNER] = token
        name_alike(module, twin)
        return twin
    if isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__ or _slotted(kind):
        return module
    clone: nn.Module = object.__new__(kind)
    for name, value in module.__dict__.items():
        clone.__dict__[name] = value.copy() if type(value) in _CONTAINERS else value
    clone.__dict__[OWNER] = token
    return clone


def _slotted(kind: type) -> bool:
    """Whether instances hold more than their ``__dict__``."""
    return any(vars(base).get("__slots__") for base in kind.__mro__)


def name_alike(gm: GraphModule, twin: GraphModule) -> None:
    """``copy.deepcopy`` of a graph may rename nodes, and forgets which names were handed out."""
    space, own_space = gm.graph._graph_namespace, twin.graph._graph_namespace
    for node, other in zip(gm.graph.nodes, twin.graph.nodes, strict=True):
        other.name = node.name
        own_space._obj_to_name[other] = node.name
    own_space._used_names = set(space._used_names)
    own_space._base_count = dict(space._base_count)
    for node, other in zip(gm.graph.nodes, twin.graph.nodes, strict=True):
        if len(node.users) > 1:
            users = {u.name: u for u in other.users}
            other.users.clear()
            other.users.update({users[u.name]: None for u in node.users})


class Watch(TorchDispatchMode):
    """
    Watches the memory of a graph module's parameters and buffers, and of their gradients, while a transformation runs.

    A write through any torch operation (in place, through ``.data``, a view, ``out=``, or an array that shares the
    memory) is seen by the memory it goes to, whatever tensor object it goes through; the content before the first
    write is kept, so that the write can be taken back.
    """

    supports_higher_order_operators = True

    def __init__(self, before: Snapshot) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before = {p: s for p, s in before.slots.items() if isinstance(s.value, torch.Tensor)}
        for (path, name), held in before.attributes.items():
            if isinstance(held.value, torch.Tensor):
                self._before[f"{path}.{name}".lstrip(".")] = slot_of("buffer", held.value)
        self._grads = {p: s.value.grad for p, s in self._before.items() if s.value.is_leaf and s.value.grad is not None}
        for path, grad in self._grads.items():
            self._before[f"{path}.grad"] = slot_of("buffer", grad)
        self._aliases = {
            p: s.value.detach() for p, s in self._before.items() if not torch.nn.parameter.is_lazy(s.value)
        }
        self._paths = {storage: p for p, a in self._aliases.items() if (storage := _storage(a))}
        self._saved: dict[int, torch.Tensor] = {}
        self._exits = _Exits(self)

    def __enter__(self) -> Watch:
        self._exits.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._exits.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)  # a higher-order operator has none; what it calls comes here too
        if schema is not None and schema.is_mutable:
            for i, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.keep(args[i] if i < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def keep(self, written: Any) -> None:
        """Keep the content of what is about to be written to, if it is watched."""
        if isinstance(written, list | tuple):
            for w in written:
                self.keep(w)
        elif isinstance(written, torch.Tensor):
            storage = _storage(written)
            if storage in self._paths and storage not in self._saved:
                self._saved[storage] = self._bytes(storage).clone()

    def _bytes(self, storage: int) -> torch.Tensor:
        held = self._aliases[self._paths[storage]]
        return torch.empty(0, dtype=torch.uint8, device=held.device).set_(held.untyped_storage())

    def edited(self) -> list[str]:
        """The paths of the parameters and buffers that were changed in place, by content, memory or flag."""
        found = {self._paths[s] for s, content in self._saved.items() if not torch.equal(self._bytes(s), content)}
        for path, slot in self._before.items():
            now = slot_of("parameter", slot.value)
            moved = now.pointer != slot.pointer or now.requires_grad != slot.requires_grad
            if moved or (now.version != slot.version and _storage(slot.value) not in self._saved):
                found.add(path)
        return sorted(found)

    def forget_gradients(self) -> None:
        """Take back the gradients that a transformation's backward left."""
        for path, slot in self._before.items():
            if slot.value.is_leaf and slot.value.grad is not self._grads.get(path):
                slot.value.grad = self._grads.get(path)

    def restore(self) -> None:
        """Take back every change in place."""
        for path, slot in self._before.items():
            if slot_of("parameter", slot.value).pointer != slot.pointer:
                slot.value.data = self._aliases[path]
            if slot.value.requires_grad != slot.requires_grad:
                slot.value.requires_grad_(slot.requires_grad)
        for storage, content in self._saved.items():
            self._bytes(storage).copy_(content)
        self.forget_writes()
        self.forget_gradients()

    def forget_writes(self) -> None:
        """Let tensors that were written to, and hold what they held again, count as not written to."""
        written = {
            id(s.value): s
            for s in self._before.values()
            if not s.value.is_inference() and s.value._version != s.version and _storage(s.value) in self._saved
        }
        for slot in written.values():
            torch._C._autograd._unsafe_set_version_counter((slot.value,), (slot.version,))


class _Exits(TorchFunctionMode):
    """Where memory leaves torch: what is written to it there, no operation sees."""

    _NAMES = frozenset(("numpy", "__array__", "data_ptr", "untyped_storage", "storage", "__dlpack__"))

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self._NAMES and args:
            with torch._C.DisableTorchFunction():
                self._watch.keep(args[0])
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if has_memory(tensor) else 0
