"""Attention heads by key/value group, as axes say."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxopt.transformations._axes import Axes, AxisClass, leaves


@dataclass(frozen=True)
class Attention:
    """The key/value groups of an attention whose heads may be cut; each with the query heads that read it."""

    node: Node
    axis: AxisClass
    groups: int
    parameters: tuple[str, ...]
    elements: int  # of one group
    start: int = -1


def groups(gm: GraphModule) -> list[Attention]:
    """The attentions of ``gm`` that have at least two key/value groups that can be cut one by one."""
    axes = Axes(gm)
    return attentions(axes)


def attentions(axes: Axes) -> list[Attention]:
    """The same, of axes that are known already."""
    found = []
    classes = {id(c.leaf): c for c in axes.classes()}
    for node, dim in axes.attentions:
        cut = [classes[id(x)] for a in dim for x in leaves(a) if id(x) in classes]
        if not cut or cut[0].size < 2:
            continue
        axis = cut[0]  # the outermost factor: key/value groups
        names = tuple(dict.fromkeys(p for p, _ in axis.members))
        found.append(Attention(node, axis, axis.size, names, axis.unit_elements))
    return found
