"""The table of what became of each layer."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

DENSE, BLOCKS, PAIRS = "dense", "block-sparse", "2:4"
"""What a layer may become, and what is timed."""


@dataclass(frozen=True)
class Timing:
    """One contender on one number of tokens: the medians of interleaved rounds."""

    seconds: float
    speed: float  # times as fast as dense


@dataclass(frozen=True)
class LayerReport:
    """One layer: what of it is kept, what that costs and brings, as it was decided; if it stays dense, as asked for."""

    path: str
    shape: tuple[int, int]  # (out, in)
    block: tuple[int, int] | str  # or "2:4"
    kept: int
    blocks: int  # for 2:4, weights
    energy: float  # the share of the sum of squares that what is kept has
    error: float | None  # of the outputs on calibration inputs, relative; None without such inputs
    bytes_before: int
    bytes_after: int
    timings: Mapping[str, Mapping[int, Timing]]  # DENSE and contenders -> tokens; empty where nothing was timed
    decision: str  # DENSE, BLOCKS or PAIRS
    reason: str  # why it stays dense

    @property
    def density(self) -> float:
        """The share of blocks, or for 2:4 of weights, that are kept."""
        return self.kept / self.blocks

    @property
    def speed(self) -> dict[int, float]:
        """Tokens -> times as fast as dense: of what was decided, or of what was asked for where that is dense."""
        name = PAIRS if PAIRS in (self.decision, self.block) else BLOCKS
        return {tokens: timing.speed for tokens, timing in self.timings.get(name, {}).items()}


@dataclass(frozen=True)
class SparsifyReport:
    """The layers that the patterns named, in the order of the model."""

    layers: tuple[LayerReport, ...]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, path: str) -> LayerReport:
        found = next((layer for layer in self.layers if layer.path == path), None)
        if found is None:
            raise KeyError(
                f"no pattern named {path!r}; the layers are {', '.join(x.path for x in self.layers) or 'none'}"
            )
        return found

    @property
    def changed(self) -> tuple[LayerReport, ...]:
        """The layers that are block-sparse or 2:4 now."""
        return tuple(layer for layer in self.layers if layer.decision != DENSE)

    @property
    def summary(self) -> str:
        """One line: how many layers, and their bytes."""
        changed = self.changed
        if not changed:
            return f"0 of {len(self.layers)} layers are block-sparse; nothing was changed"
        before, after = sum(x.bytes_before for x in changed), sum(x.bytes_after for x in changed)
        pairs = sum(layer.decision == PAIRS for layer in changed)
        said = f"{len(changed) - pairs} of {len(self.layers)} layers are block-sparse"
        also = f", {pairs} {'is' if pairs == 1 else 'are'} 2:4" if pairs else ""
        return f"{said}{also}: {before / 1e6:.1f} → {after / 1e6:.1f} MB"

    def to_json(self) -> dict[str, Any]:
        """All figures as plain values."""
        layers = [asdict(layer) | {"speed": layer.speed} for layer in self.layers]
        return {"summary": self.summary, "layers": layers}

    @property
    def _timed(self) -> tuple[str, ...]:
        """What was timed for any layer, dense first."""
        return tuple(name for name in (DENSE, BLOCKS, PAIRS) if any(name in layer.timings for layer in self.layers))

    @property
    def _columns(self) -> tuple[str, ...]:
        timed = self._timed
        head = ("layer", "weight", "blocks kept", "energy kept", "error", "MB")
        return (*head, *(("tokens", *timed) if timed else ()), "")

    def __rich__(self) -> Table:
        table = Table(title=self.summary, title_justify="left")
        columns, timed = self._columns, self._timed
        for i, name in enumerate(columns):
            last = i == len(columns) - 1
            table.add_column(name, overflow="fold", no_wrap=i > 0 and not last, min_width=len(BLOCKS) if last else None)
        for layer in self.layers:
            table.add_row(*_cells(layer, timed))
        return table

    def __str__(self) -> str:
        console = Console(width=180)
        with console.capture() as held:
            console.print(self)
        return held.get()

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in self._columns)
        timed, rows = self._timed, ""
        for layer in self.layers:
            cells = (html.escape(cell).replace("\n", "<br>") for cell in _cells(layer, timed))
            rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        return f"<p>{html.escape(self.summary)}</p><table><tr>{head}</tr>{rows}</table>"


def _cells(layer: LayerReport, timed: tuple[str, ...]) -> tuple[str, ...]:
    tokens = layer.timings.get(DENSE, {})
    times = ["\n".join(map(str, tokens))] if timed else []
    for name in timed:
        found = layer.timings.get(name, {})
        times.append("\n".join(_time(found[t], name) for t in tokens if t in found))
    return (
        layer.path,
        f"{layer.shape[0]}×{layer.shape[1]}",
        "2 of 4" if layer.block == PAIRS else f"{layer.density:.3g} of {layer.block[0]}×{layer.block[1]}",
        f"{layer.energy:.1%}",
        "" if layer.error is None else f"{layer.error:.1%}",
        f"{layer.bytes_before / 1e6:.2f}→{layer.bytes_after / 1e6:.2f}",
        *times,
        layer.reason or layer.decision,
    )


def _time(timing: Timing, name: str) -> str:
    shown = f"{timing.seconds * 1e6:.0f} µs"
    return shown if name == DENSE else f"{shown}, {timing.speed:.2f} ×"
