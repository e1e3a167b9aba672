"""Weights lose their least elements."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.delta import Delta, graphs
from fxopt.errors import UsageError
from fxopt.ops import Attr
from fxopt.pattern import Miss, match, roots
from fxopt.sparse.measure import Pruned, PruneReport
from fxopt.sparse.pruning import (
    Scope,
    check_magnitude,
    check_regex,
    check_share,
    magnitude_masks,
    n_m_mask,
    parse_n_m,
)
from fxopt.transformation import New, ReversibleTransformation, Site, sweeping_once
from fxopt.transformations._constants import path_of
from fxopt.transformations._sparse_layers import LAYERS, Found, become


@dataclass(frozen=True)
class SparsifyWeights(ReversibleTransformation):
    """
    linear(x, w, b)  ->  linear(x, w * mask, b)
    conv2d(x, w, b)  ->  conv2d(x, w * mask, b)

    Not what the model computed: elements of the weights become zeros.  Also ``addmm`` and ``mm``.  At most one of
    `sparsity`, the share of zeros (those of least magnitude), and `threshold`, up to which magnitudes become zeros;
    without any, or with `existing`, the zeros that are there stay and nothing changes.  `scope` is "uniform", each
    layer for itself, or "global".  `pattern` "2:4", or another N:M, keeps the 2 largest of every 4 inputs instead.
    `layers` is a regular expression that a layer's whole path matches.  `report(gm)` tells of every layer.
    ``SwapSparse`` then makes use of the zeros.  Undone after training with ``reverse(gm, edited="carry")``, the
    weights that were trained take the place of the original ones.
    """

    sparsity: float | None = None
    threshold: float | None = None
    existing: bool = False
    pattern: str = "unstructured"
    scope: Scope = "uniform"
    layers: str = ".*"

    def __post_init__(self) -> None:
        n_m = parse_n_m(self.pattern)
        asked = (self.sparsity is not None) + (self.threshold is not None) + bool(self.existing) + (n_m is not None)
        if asked > 1:
            given = f"sparsity={self.sparsity}, threshold={self.threshold}, existing={self.existing}"
            wanted = "at most one of sparsity, threshold, existing, N:M"
            raise UsageError(f"{given}, pattern={self.pattern!r} were given; expected {wanted}")
        if self.sparsity is not None:
            check_share("sparsity", self.sparsity)
        if self.threshold is not None:
            check_magnitude(self.threshold)
        if self.scope not in get_args(Scope):
            raise UsageError(f"scope={self.scope!r} was given; expected 'uniform' or 'global'")
        check_regex("layers", self.layers)

    def transform(self, graph_module: GraphModule) -> None:
        sites = [found for found in self._layers(graph_module) if isinstance(found, Found)]
        masks = self._masks(sites)
        report = []
        with sweeping_once(graph_module):
            for found, mask in zip(sites, masks, strict=True):
                weight = found.tensor()
                before = 1 - int(weight.count_nonzero()) / max(1, weight.numel())
                after = 1 - int((weight * mask).count_nonzero()) / max(1, weight.numel())
                report.append(Pruned(found.name, tuple(weight.shape), before, after))
                if bool((weight * mask != weight).any()):
                    self._replace(found, mask)
        _REPORTS.setdefault(graph_module, {})[self.signature] = PruneReport(tuple(report))

    def report(self, gm: GraphModule) -> PruneReport:
        """The zeros of each layer before and after the latest call on `gm`; `UsageError` if there was none."""
        if self.signature not in _REPORTS.get(gm, {}):
            raise UsageError(f"{self.signature} was not applied to this graph module in this process; apply it first")
        inner = [_REPORTS.get(g, {}).get(self.signature, PruneReport()) for g in graphs(gm).values()]
        return PruneReport(tuple(layer for report in inner for layer in report.layers))

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The layers whose weights stay as they are, each with the reason."""
        for inner in graphs(gm).values():
            yield from (found for found in self._layers(inner) if isinstance(found, Miss))

    def carry(self, gm: GraphModule, rewrite: Delta) -> Mapping[str, Tensor] | None:
        """The pruned weights that were trained, as they are now; the others give way to the original ones."""
        carried: dict[str, Tensor] = {}
        for path, (before, after) in rewrite.tensors().items():
            now = mechanism.constant(gm, Attr(path))
            made = rewrite.slots[path][1]
            if before is not None and after is not None and now is not None and made is not None and made.edited():
                carried[path] = now.detach().clone()
        return carried

    def _layers(self, gm: GraphModule) -> Iterator[Found | Miss]:
        for node in list(gm.graph.nodes):
            op, doubt = mechanism.operation(gm, node)
            if op not in roots(LAYERS):
                continue
            if doubt is not None:
                yield Miss(node, doubt)
                continue
            found = _matched(gm, node)
            reason = None if isinstance(found, Miss) else self._refusal(found)
            yield found if reason is None else Miss(node, reason)

    def _refusal(self, found: Found) -> str | None:
        if re.fullmatch(self.layers, found.name) is None:
            return f"{found.name} does not match {self.layers!r}"
        if (reason := found.refusal()) is not None:
            return reason
        weight = found.tensor()
        if not bool(torch.isfinite(weight).all()):
            return f"{path_of(found.weight)} has elements that are NaN or infinite"
        n_m = parse_n_m(self.pattern)
        if n_m is not None and weight.shape[1] % n_m[1] != 0:
            return f"{path_of(found.weight)} has {weight.shape[1]} inputs, which {n_m[1]} does not divide"
        return None

    def _masks(self, sites: list[Found]) -> list[Tensor]:
        weights = {str(i): found.tensor() for i, found in enumerate(sites)}
        n_m = parse_n_m(self.pattern)
        if n_m is not None:
            return [n_m_mask(w, *n_m) for w in weights.values()]
        if self.sparsity is None and self.threshold is None:
            return [w != 0 for w in weights.values()]
        return list(magnitude_masks(weights, self.sparsity, self.threshold, self.scope).values())

    def _replace(self, found: Found, mask: Tensor) -> None:
        at, held = found.at, found.at.tensor(found.weight)
        assert held is not None
        pruned = held.detach() * (mask.t() if found.transposed else mask)
        parameter = nn.Parameter(pruned, requires_grad=held.requires_grad) if isinstance(held, nn.Parameter) else pruned
        weight = New(parameter, path_of(found.weight))
        new: Node
        if found.op is ops.addmm:
            new = at.emit(ops.addmm, found.bias, found.x, weight)
        elif found.op is ops.mm:
            new = at.emit(ops.mm, found.x, weight)
        else:
            new = at.emit(found.op, found.x, weight, found.bias, **found.window)
        become(at, new, self)


def _matched(gm: GraphModule, node: Node) -> Found | Miss:
    matched = match(gm, LAYERS, node)
    return matched if isinstance(matched, Miss) else Found.of(Site(gm, matched), **matched.bindings)


_REPORTS: WeakKeyDictionary[GraphModule, dict[str, PruneReport]] = WeakKeyDictionary()
