"""All that the laws compare of a graph module."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten, tree_map_only

SKIPPED = frozenset(
    ["_graph", "_code", "_lineno_map", "_prologue_start", "meta", "_parameters", "_buffers", "_modules", "_fxopt_owner"]
)
TABLES = frozenset(
    ["_replace_hooks", "_create_node_hooks", "_erase_node_hooks", "_deepcopy_hooks", "_graphmodule_cls_name"]
)


class Portrait(dict):
    """By what it is of, so that a difference says where; keeps the objects that it knows by identity."""

    def differences(self, other: Portrait) -> list[str]:
        found = []
        for key in {**self, **other}:
            a, b = self.get(key, "nothing"), other.get(key, "nothing")
            if a == b:
                continue
            if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
                found += [f"{key}: {x} != {y}" for x, y in zip(a, b, strict=True) if x != y]
            else:
                found.append(f"{key}: {a} != {b}")
        return found


def portrait(gm: GraphModule, objects: bool = True) -> Portrait:
    """``objects``: tensors, modules and meta by identity; else by content, as two graph modules are compared."""
    tell = Teller(objects)
    found = Portrait()
    for path, inner in {p: m for p, m in gm.named_modules() if isinstance(m, GraphModule)}.items():
        found[f"nodes of {path}"] = [
            (n.name, n.op, str(n.target), str(n.args), str(n.kwargs), str(n.type), [str(u) for u in n.users])
            for n in inner.graph.nodes
        ]
        found[f"metas of {path}"] = [
            (n.name, sorted((k, tell(v)) for k, v in n.meta.items())) for n in inner.graph.nodes
        ]
        found[f"code of {path}"] = inner.code.splitlines()
        found[f"names to come of {path}"] = names_to_come(inner)
        found[f"codegen of {path}"] = type(inner.graph._codegen).__name__
    for path, module in gm.named_modules(remove_duplicate=False):
        found[f"module {path}"] = [type(module).__qualname__, tell(module) if path else ""]
        found[f"parameters of {path}"] = [
            (n, tell(p), p is not None and p.requires_grad) for n, p in module._parameters.items()
        ]
        found[f"buffers of {path}"] = [
            (n, tell(b), n not in module._non_persistent_buffers_set) for n, b in module._buffers.items()
        ]
        found[f"children of {path}"] = [(n, tell(c)) for n, c in module._modules.items()]
        found[f"attributes of {path}"] = sorted(
            (n, tell(v)) for n, v in module.__dict__.items() if n not in SKIPPED | TABLES and (type(v) is not dict or v)
        )
    found["state dict"] = [(k, tell(v)) for k, v in gm.state_dict(keep_vars=True).items()]
    found.kept = tell.kept
    return found


class Teller:
    """What an object is, by identity or by content."""

    def __init__(self, objects: bool) -> None:
        self.objects, self.kept = objects, []

    def __call__(self, value: Any) -> str:
        self.kept.append(value)  # so that no later object takes its address
        if isinstance(value, torch.Tensor) and self.objects:
            return f"tensor {id(value)} {value.data_ptr() if type(value) in (torch.Tensor, nn.Parameter) else ''}"
        if type(value) in (torch.Tensor, nn.Parameter):
            content = value.detach().numpy().tobytes().hex()[:400]
            return f"{type(value).__name__} {value.dtype} {tuple(value.shape)} {content}"
        if isinstance(value, GraphModule) and not self.objects:
            return "module GraphModule"  # its class is its own, and what torch calls it after a copy no law promises
        if isinstance(value, nn.Module):
            return f"module {id(value) if self.objects else type(value).__name__}"
        if isinstance(value, dict):  # hooks stand under numbers that no two modules share
            return str({k if isinstance(k, str) else "": self(v) for k, v in value.items()})
        if isinstance(value, set | frozenset):  # has no order
            return str(sorted(self(v) for v in value))
        if isinstance(value, list | tuple):
            return str([self(v) for v in value])
        text = repr(value)
        if callable(value):
            return getattr(value, "__qualname__", type(value).__qualname__)
        return type(value).__qualname__ if " at 0x" in text else text


def names_to_come(gm: GraphModule) -> list[str]:
    """The names that the graph would give to new nodes."""
    space = copy.copy(gm.graph._graph_namespace)
    space._used_names, space._base_count = set(space._used_names), dict(space._base_count)
    bases = sorted({n.name.rstrip("0123456789").rstrip("_") for n in gm.graph.nodes} | {"relu", "neg", "add", "fresh"})
    return [space.create_name(base, None) for base in bases for _ in range(2)]


def outputs(gm: GraphModule, inputs: tuple[torch.Tensor, ...]) -> list[bytes]:
    """What ``gm`` computes, bit for bit; its buffers are left as they are."""
    try:
        return [leaf(v) for v in values(gm, inputs)]
    except (RuntimeError, TypeError) as error:  # a pass broke it
        return [f"raises {type(error).__name__}".encode()]


def values(gm: GraphModule, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    torch.manual_seed(0)
    given = tree_map_only(torch.Tensor, torch.clone, inputs)
    with torch.no_grad():
        if not any(m.training for m in gm.modules()):
            return tree_flatten(gm(*given))[0]
        buffers = {n: b.clone() for n, b in gm.named_buffers()}
        return tree_flatten(torch.func.functional_call(gm, buffers, given))[0]


def leaf(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} ".encode() + value.detach().contiguous().numpy().tobytes()
    return repr(value).encode()
