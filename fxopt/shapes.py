"""Shapes and dtypes: what each node's value looks like, as fake tensors in ``node.meta["val"]``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from fxopt import ops


def propagate(gm: GraphModule, example_inputs: tuple[Any, ...] | Mapping[str, Any]) -> GraphModule:
    """
    Give every node of ``gm`` that has none its value as a fake tensor: shape, dtype and device of these inputs.

    ``example_inputs``: a tuple is positional, a mapping is keywords.  Nothing is computed.  Returns ``gm``.  What comes
    after a node whose value or shape decides what is done next (a part of the model that was left eager, say) is not
    known from shapes alone, and stays unknown.
    """
    if all("val" in n.meta for n in gm.graph.nodes if n.op not in ("output", "get_attr") and n.users):
        return gm
    mode = next((v.fake_mode for v in _vals(gm) if isinstance(v, FakeTensor)), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    names = [n.target for n in gm.graph.nodes if n.op == "placeholder"]
    if isinstance(example_inputs, Mapping):
        given = [example_inputs.get(str(n)) for n in names]
    else:
        given = list(example_inputs)

    def fake(t: torch.Tensor) -> torch.Tensor:
        return t if isinstance(t, FakeTensor) else mode.from_tensor(t, static_shapes=True)

    with mode, torch.no_grad(), contextlib.suppress(*_DATA_DEPENDENT):
        _Recorder(gm, mode).run(*tree_map_only(torch.Tensor, fake, given), enable_io_processing=False)
    return gm


_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


def _vals(gm: GraphModule) -> list[Any]:
    return [n.meta["val"] for n in gm.graph.nodes if "val" in n.meta]


class _Recorder(Interpreter):
    def __init__(self, gm: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self._mode = mode

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and not isinstance(result, FakeTensor) and not result.is_mkldnn:
            result = self._mode.from_tensor(result, static_shapes=True)
        if n.op != "output":
            n.meta.setdefault("val", result)
        return result


def infer(gm: GraphModule, node: Node) -> Any:
    """
    The fake tensor (or symbolic number) that ``node`` computes, from those of its inputs.

    None where an input's is not known, or the node is a module.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    mode: FakeTensorMode | None = None
    for n in node.all_input_nodes:
        val = _known(gm, n)
        if val is None:
            return None
        for v in val if isinstance(val, tuple | list) else (val,):
            if isinstance(v, FakeTensor):
                mode = v.fake_mode
    if mode is None:
        return None
    common: FakeTensorMode = mode

    def fake(n: Node) -> Any:
        return tree_map_only(torch.Tensor, lambda t: _in_mode(t, common), _known(gm, n))

    args, kwargs = map_arg(node.args, fake), map_arg(node.kwargs, fake)
    with mode, torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _in_mode(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """``tensor`` as a fake tensor of ``mode``: ``make_fx`` gives every node a mode of its own."""
    if not isinstance(tensor, FakeTensor):
        return mode.from_tensor(tensor, static_shapes=True)
    if tensor.fake_mode is mode or not all(isinstance(n, int) for n in (*tensor.shape, *tensor.stride())):
        return tensor
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _known(gm: GraphModule, node: Node) -> Any:
    val = node.meta.get("val", node.meta.get("example_value"))
    return ops.constant(gm, node) if val is None else val
