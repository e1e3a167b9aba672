"""What every pass's test asks: the rewrite as text in all dialects, the same numbers, exact undo, near-misses."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Tracer

from fxopt.history import history
from fxopt.shapes import propagate
from fxopt.text import show

DIALECTS = ("module", "function", "aten")


class _Functions(Tracer):
    """Looks into torch's own modules, so that what they compute stands there as functions of parameters."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def trace(model: nn.Module, inputs: tuple[Any, ...], dialect: str, dynamic: Any = None) -> GraphModule:
    """``model`` as a graph module in ``dialect``, every node with its fake value."""
    if dialect == "aten":
        with torch.no_grad():
            return torch.export.export(model, inputs, dynamic_shapes=dynamic, strict=False).module()
    tracer = Tracer() if dialect == "module" else _Functions()
    graph: Graph = tracer.trace(model)
    gm = GraphModule(tracer.root, graph)
    propagate(gm, inputs)
    return gm


def state(gm: nn.Module) -> list[tuple[Any, ...]]:
    """The state dict in order, by object."""
    return [(k, id(v), v.requires_grad) for k, v in gm.state_dict(keep_vars=True).items()]


def flags(gm: nn.Module) -> list[tuple[str, bool]]:
    return [(n, m.training) for n, m in gm.named_modules() if n]


def nodes(gm: GraphModule) -> list[tuple[Any, ...]]:
    return [(n.name, n.op, n.target, str(n.args), str(n.kwargs), sorted(map(str, n.meta))) for n in gm.graph.nodes]


def rewrites(
    transformation: Any,
    model: nn.Module,
    inputs: tuple[Any, ...],
    after: str | dict[str, str] | None,
    *,
    count: int | None = None,
    dialects: tuple[str, ...] = DIALECTS,
    dynamic: Any = None,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    training: bool = False,
) -> dict[str, GraphModule]:
    """
    Assert that ``transformation`` turns ``model`` into the text ``after`` (the same in every dialect unless a dict),
    that it computes the same (``rtol=atol=0``: bitwise), leaves the caller's model alone, and that its undo is exact.
    Returns the graph modules, transformed again, by dialect.
    """
    model.train(training)
    found = {}
    held = state(model)
    content = {k: v.clone() for k, v in model.state_dict().items()}
    for dialect in dialects:
        gm = trace(model, inputs, dialect, dynamic)
        text, code, before, owned, flagged = show(gm), gm.code, nodes(gm), state(gm), flags(gm)
        with torch.no_grad():
            expected = gm(*inputs)
        transformation(gm)
        commit = history(gm)[-1]
        assert commit.rewrites, f"{dialect}: {transformation} did nothing to\n{text}"
        if count is not None:
            assert len(commit.rewrites) == count, (dialect, commit.rewrites)
        if after is not None:
            wanted = after if isinstance(after, str) else after[dialect]
            assert show(gm) == dedent(wanted).strip(), f"{dialect}:\n{show(gm)}\n--- from\n{text}"
        with torch.no_grad():
            torch.testing.assert_close(gm(*inputs), expected, rtol=rtol, atol=atol, equal_nan=True)
        assert state(model) == held, f"{dialect}: the caller's model was touched"
        transformation.reverse(gm)
        assert gm.code == code and show(gm) == text, f"{dialect}: reverse left\n{show(gm)}\n--- not\n{text}"
        assert nodes(gm) == before and state(gm) == owned and flags(gm) == flagged, dialect
        with torch.no_grad():
            assert all(map(torch.equal, _leaves(gm(*inputs)), _leaves(expected))), dialect
        found[dialect] = transformation(gm)
    assert all(torch.equal(v, content[k]) for k, v in model.state_dict().items())
    return found


def unchanged(
    transformation: Any,
    model: nn.Module,
    inputs: tuple[Any, ...],
    reason: str | None,
    *,
    dialects: tuple[str, ...] = DIALECTS,
    dynamic: Any = None,
    training: bool = False,
) -> None:
    """Assert that ``transformation`` leaves ``model`` alone and that one of its misses says ``reason`` (a regex)."""
    model.train(training)
    for dialect in dialects:
        gm = trace(model, inputs, dialect, dynamic)
        text = show(gm)
        misses = [m.reason for m in transformation.misses(gm)]
        transformation(gm)
        assert show(gm) == text, f"{dialect}: rewrote\n{text}\n--- into\n{show(gm)}"
        assert not history(gm)[-1].rewrites, dialect
        if reason is not None:
            assert any(re.search(reason, m) for m in misses), f"{dialect}: no miss says {reason!r}: {misses}\n{text}"


def _leaves(value: Any) -> list[torch.Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]
