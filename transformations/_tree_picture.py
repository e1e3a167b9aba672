"""Pruning trees as a picture: a bar for each over the graph's operations."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _ROW, _CELLS = 960, 16, 24
_COLOURS = {
    "branch": "#4878a8",
    "operand": "#6aa5a9",
    "block": "#d28b45",
    "run": "#e3c08d",
    "norm": "#8c8c8c",
    "layer": "#9b6a9e",
    "cat": "#7a9a4b",
    "heads": "#c05a5a",
}


def bar(span: tuple[int, int], nodes: int) -> str:
    """Where in a graph of so many nodes a span lies, as a line of blocks."""
    scale = _CELLS / max(nodes, 1)
    start, end = int(span[0] * scale), int(span[1] * scale)
    return "·" * start + "█" * (end - start + 1) + "·" * (_CELLS - end - 1)


def picture(trees: Sequence[Any], nodes: int, scores: Mapping[str, float]) -> str:
    """An SVG: one bar a tree, at the positions of its operations; what overlaps lies in rows below each other."""
    rows: list[int] = []  # where the last bar of each row ends
    shapes = []
    scale = _WIDTH / max(nodes, 1)
    for tree in sorted(trees, key=lambda t: (t.span[0], -t.span[1])):
        row = next((i for i, end in enumerate(rows) if end < tree.span[0]), len(rows))
        rows[row:] = [tree.span[1], *rows[row + 1 :]]
        x, width = tree.span[0] * scale, max((tree.span[1] - tree.span[0] + 1) * scale, 3)
        said = f"{tree.id} ({tree.kind}, {tree.elements:,} parameters) {tree.module}"
        said += f" score {scores[tree.id]:.4g}" if tree.id in scores else ""
        shapes.append(
            f'<rect x="{x:.1f}" y="{20 + row * _ROW}" width="{width:.1f}" height="{_ROW - 3}" rx="2" '
            f'fill="{_COLOURS[tree.kind]}"><title>{html.escape(said)}</title></rect>'
        )
    kinds = [k for k in _COLOURS if any(t.kind == k for t in trees)]
    legend = "".join(
        f'<rect x="{i * 90}" y="2" width="10" height="10" fill="{_COLOURS[k]}"/>'
        f'<text x="{i * 90 + 14}" y="11" font-size="11" font-family="sans-serif" fill="currentColor">{k}</text>'
        for i, k in enumerate(kinds)
    )
    height = 24 + len(rows) * _ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="100%" role="img">'
        f"<title>{len(trees)} pruning trees</title>{legend}{''.join(shapes)}</svg>"
    )
