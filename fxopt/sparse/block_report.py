"""The table of what became of each layer."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class LayerReport:
    """One layer: what of it is kept, what that costs and brings."""

    path: str
    shape: tuple[int, int]  # (out, in)
    block: tuple[int, int]
    kept: int
    blocks: int
    energy: float  # the share of the sum of squares that the kept blocks have
    error: float | None  # of the outputs on calibration inputs, relative; None without such inputs
    bytes_before: int
    bytes_after: int
    speed: dict[int, float]  # tokens -> times as fast as dense; empty where nothing was timed
    decision: str  # "block-sparse" or "dense"
    reason: str  # why it stays dense

    @property
    def density(self) -> float:
        """The share of blocks that are kept."""
        return self.kept / self.blocks


_COLUMNS = ("layer", "weight", "blocks kept", "energy kept", "error", "MB", "speed", "")


@dataclass(frozen=True)
class SparsifyReport:
    """The layers that the patterns named, in the order of the model."""

    layers: tuple[LayerReport, ...]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, path: str) -> LayerReport:
        return next(layer for layer in self.layers if layer.path == path)

    @property
    def changed(self) -> tuple[LayerReport, ...]:
        """The layers that are block-sparse now."""
        return tuple(layer for layer in self.layers if layer.decision == "block-sparse")

    @property
    def summary(self) -> str:
        """One line: how many layers, and their bytes."""
        changed = self.changed
        if not changed:
            return f"0 of {len(self.layers)} layers are block-sparse; nothing was changed"
        before, after = sum(x.bytes_before for x in changed), sum(x.bytes_after for x in changed)
        return (
            f"{len(changed)} of {len(self.layers)} layers are block-sparse: {before / 1e6:.1f} → {after / 1e6:.1f} MB"
        )

    def to_json(self) -> dict[str, Any]:
        """All figures as plain values."""
        return {"summary": self.summary, "layers": [asdict(layer) for layer in self.layers]}

    def __rich__(self) -> Table:
        table = Table(title=self.summary, title_justify="left")
        for i, name in enumerate(_COLUMNS):
            table.add_column(name, overflow="fold", no_wrap=0 < i < len(_COLUMNS) - 1)
        for layer in self.layers:
            table.add_row(*_cells(layer))
        return table

    def __str__(self) -> str:
        console = Console(width=140)
        with console.capture() as held:
            console.print(self)
        return held.get()

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in _COLUMNS)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in _cells(x)) + "</tr>" for x in self.layers)
        return f"<p>{html.escape(self.summary)}</p><table><tr>{head}</tr>{rows}</table>"


def _cells(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.path,
        f"{layer.shape[0]}×{layer.shape[1]}",
        f"{layer.density:.3g} of {layer.block[0]}×{layer.block[1]}",
        f"{layer.energy:.1%}",
        "" if layer.error is None else f"{layer.error:.1%}",
        f"{layer.bytes_before / 1e6:.2f}→{layer.bytes_after / 1e6:.2f}",
        ", ".join(f"{r:.2f} × at {t}" for t, r in layer.speed.items()),
        layer.reason or layer.decision,
    )
