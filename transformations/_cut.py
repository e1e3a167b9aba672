"""Cutting units out of classes of axes: parameters sliced, and every number that said the old size put right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxopt import ops
from fxopt import vocabulary as words
from fxopt.transformations._axes import Atom, Axes, Dim, Dims, index_map, leaves, size_of
from fxopt.transformations._restate import as_parameter, refresh, respell, with_tensors

_SIZED = frozenset({words.view, words.reshape, words.expand, words.zeros, words.ones, words.empty, words.full})
_SIZED |= {words.new_zeros, words.new_ones}


def cut(gm: GraphModule, axes: Axes, drop: Sequence[tuple[Atom, Sequence[int]]]) -> None:
    """Take units out of classes of axes, each given by its atom; ``axes`` are those of ``gm`` as it is."""
    kept = _Kept([(leaf, torch.tensor(sorted(set(gone)))) for leaf, gone in drop if gone])
    changed = [n for n in gm.graph.nodes if kept.changes(axes.of.get(n))]
    for node in changed:
        _rewrite_sizes(gm, axes, node, kept)
    touched = _slice(gm, axes, kept)
    for node in gm.graph.nodes:
        call = axes.calls.get(node)
        if call is not None and call.dialect == "module" and str(node.target) in touched:
            _tell_module(gm, node)
    refresh(gm, changed)


class _Kept:
    """What is left of an axis."""

    def __init__(self, gone: Sequence[tuple[Atom, Tensor]]) -> None:
        self.gone = gone
        self._mine = {id(leaf) for leaf, _ in gone}

    def has(self, dim: Dim) -> bool:
        return any(id(leaf) in self._mine for atom in dim for leaf in leaves(atom))

    def changes(self, dims: Any) -> bool:
        if not dims:
            return False
        if isinstance(dims[0], Atom):
            return self.has(dims)
        return any(self.changes(d) for d in dims if d is not None)

    def indices(self, dim: Dim) -> Tensor:
        stays = None
        there = {id(leaf) for atom in dim for leaf in leaves(atom)}
        for leaf, gone in self.gone:
            if id(leaf) in there:
                index = index_map(dim, leaf)
                assert index is not None
                stays = ~torch.isin(index, gone) if stays is None else stays & ~torch.isin(index, gone)
        assert stays is not None
        return stays.nonzero()[:, 0]

    def size(self, dim: Dim) -> Any:
        return len(self.indices(dim)) if self.has(dim) else size_of(dim)


def _slice(gm: GraphModule, axes: Axes, kept: _Kept) -> set[str]:
    """Slice every parameter and buffer that has the class; the paths of the modules that hold them."""
    touched = set()
    for _, dims, tensor in axes.parameters.values():
        new = tensor.detach()
        for axis, dim in enumerate(dims):
            if kept.has(dim):
                new = new.index_select(axis, kept.indices(dim).to(new.device))
        if new.shape == tensor.shape:
            continue
        replaced = as_parameter(new, tensor)
        for path, module in gm.named_modules(remove_duplicate=False):
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                for name, held in store.items():
                    if held is tensor:
                        store[name] = replaced
                        touched.add(path)
    refresh(gm, [n for n in gm.graph.find_nodes(op="get_attr") if kept.changes(axes.of.get(n))])
    return touched


def _tell_module(gm: GraphModule, node: Node) -> None:
    """The attributes of a layer that is called as a module."""
    path = str(node.target)
    module = gm.get_submodule(path)
    owner, _, name = path.rpartition(".")
    gm.get_submodule(owner)._modules[name] = with_tensors(module, {})


def _rewrite_sizes(gm: GraphModule, axes: Axes, node: Node, kept: _Kept) -> None:
    call = axes.calls[node]
    if call is None or call.dialect == "module":
        return
    changes = _changes(axes, node, call, kept)
    if not changes:
        return
    if call.op is words.chunk:
        sizes = changes.pop("split_size")
        meant = ops.Call(words.split, call.dialect, {**call.arguments, "split_size": sizes})
        meant.arguments.pop("chunks")
        respell(gm, node, meant, meant.arguments)
        return
    respell(gm, node, call, {**call.arguments, **changes})


def _changes(axes: Axes, node: Node, call: ops.Call, kept: _Kept) -> dict[str, Any]:
    """The arguments of ``node`` that say a size which is another one now."""
    a, dims = call.arguments, axes.of[node]
    for name in ("size", "shape"):
        if call.op in _SIZED and name in a:
            return {name: tuple(_size(n, d, kept) for n, d in zip(a[name], dims, strict=True))}
    if call.op is words.unflatten:
        start = a["dim"] % (len(dims) - len(a["sizes"]) + 1)
        inner = dims[start : start + len(a["sizes"])]
        return {"sizes": tuple(_size(n, d, kept) for n, d in zip(a["sizes"], inner, strict=True))}
    if call.op in (words.layer_norm, words.rms_norm):
        return {"normalized_shape": (kept.size(dims[-1]),)}
    if call.op is words.histc:
        return {"bins": kept.size(dims[0]), "max": kept.size(dims[0]) - 1}
    if call.op in (words.split, words.chunk):
        axis = a["dim"] % len(dims[0])
        return {"split_size": tuple(kept.size(d[axis]) for d in dims)} if kept.has(axes.of[a["input"]][axis]) else {}
    if call.op in (words.slice, words.narrow):
        return _slice_bounds(a, dims, kept)
    if call.op in (words.conv1d, words.conv2d, words.conv3d) and a["groups"] > 1:
        return {"groups": kept.size(dims[1 - len(dims)])}
    return {}


def _slice_bounds(a: Mapping[str, Any], dims: Dims, kept: _Kept) -> dict[str, Any]:
    axis = a["dim"] % len(dims)
    if not kept.has(dims[axis]):  # the whole axis, or another one
        return {}
    if "length" in a:
        return {"length": kept.size(dims[axis])}
    return {"end": None} if isinstance(a["end"], int) and a["end"] >= 0 else {}


def _size(said: Any, dim: Dim, kept: _Kept) -> Any:
    known = isinstance(said, int) and said != -1
    return kept.size(dim) if known and kept.has(dim) else said
