"""Latencies and their ratios: what `fxopt.benchmark` measured, its interval, and how it is shown.

The interval is that of the median by order statistics (exact for any distribution: David and Nagaraja, Order
Statistics, 3rd ed., section 7.1).
"""

from __future__ import annotations

import html
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fxopt.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

CONFIDENCE = 0.95
_WIDEST = 2.0  # an interval of the ratio that spans 1 and more than this factor says nothing

Verdict = Literal["faster", "slower", "no difference", "not measurable"]


@dataclass(frozen=True)
class Measurement:
    """Latencies of one callable, in seconds a call, one for each round; and its peak memory in bytes.

    Memory is what the call allocates beyond what was there before it: on a CPU the peak of live bytes by torch's
    allocator (temporaries of kernels included), on CUDA that of torch's caching allocator. None if not asked for.
    """

    name: str
    latencies: tuple[float, ...]
    calls: int  # a latency is the mean of this many calls
    memory: int | None
    device: str
    threads: int
    starts: tuple[float, ...] = ()  # when each round's sample began, in seconds since the first of all

    @property
    def median(self) -> float:
        """The median latency in seconds."""
        return statistics.median(self.latencies)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the median, in seconds."""
        return median_interval(self.latencies)

    def to_json(self) -> dict[str, Any]:
        """The measurement as plain values, with all latencies."""
        return {
            "name": self.name,
            "median": self.median,
            "interval": [_plain(bound) for bound in self.interval],
            "latencies": list(self.latencies),
            "calls": self.calls,
            "memory": self.memory,
            "device": self.device,
            "threads": self.threads,
        }

    def chrome_trace(self, path: str | os.PathLike[str]) -> Path:
        """Write the rounds as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing; see `Comparisons`."""
        return Comparisons(self, ()).chrome_trace(path)

    def __rich__(self) -> Table:
        table = _table(self._title, ("latency", "95 %", "memory"))
        table.add_row(_seconds(self.median), _interval(self.interval, _seconds), _bytes(self.memory))
        return table

    def _repr_html_(self) -> str:
        cells = (_seconds(self.median), _interval(self.interval, _seconds), _bytes(self.memory))
        return _html(self._title, ("latency", "95 %", "memory"), [cells])

    @property
    def _title(self) -> str:
        return f"{self.name}: {len(self.latencies)} rounds on {self.device}, {self.threads} threads"


@dataclass(frozen=True)
class Comparison:
    """`b` against `a`. `ratio` is latency of b over latency of a: below 1, b is faster."""

    a: Measurement
    b: Measurement
    stopped: str = ""  # why no more rounds were made

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratio of each round."""
        return tuple(b / a for a, b in zip(self.a.latencies, self.b.latencies, strict=True))

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the ratio; (0, inf) with fewer than 6 rounds."""
        return median_interval(self.ratios)

    @property
    def verdict(self) -> Verdict:
        """Whether b is faster or slower than a; "no difference" where the interval spans 1.

        "not measurable" where it spans 1 and so much more (a factor above 2, or anything with fewer than 6 rounds)
        that a difference may well be there.
        """
        low, high = self.interval
        if high < 1:
            return "faster"
        if low > 1:
            return "slower"
        return "no difference" if high <= _WIDEST * low else "not measurable"

    @property
    def conclusion(self) -> str:
        """The verdict in words: "not measurable" tells with how many rounds."""
        rounds = len(self.ratios)
        said = f" with {rounds} round{'s' * (rounds != 1)}" if self.verdict == "not measurable" else ""
        return self.verdict + said

    @property
    def typical(self) -> tuple[float, float]:
        """Seconds of a and of b in the round whose ratio is nearest to `ratio`, which their medians may contradict."""
        nearest = min(range(len(self.ratios)), key=lambda i: abs(self.ratios[i] - self.ratio))
        return self.a.latencies[nearest], self.b.latencies[nearest]

    @property
    def memory(self) -> tuple[int, int] | None:
        """Peak memory of a and of b, in bytes."""
        return None if self.a.memory is None or self.b.memory is None else (self.a.memory, self.b.memory)

    @property
    def summary(self) -> str:
        """One line: the verdict, the ratio and its interval."""
        low, high = self.interval
        if not math.isfinite(high):
            return self.conclusion
        return f"{self.conclusion}: {self.ratio:.3f} × {self.a.name} [{low:.3f}, {high:.3f}]"

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain values, with all latencies; an infinite bound is None."""
        return {
            "verdict": self.verdict,
            "ratio": self.ratio,
            "typical": list(self.typical),
            "interval": [_plain(bound) for bound in self.interval],
            "confidence": CONFIDENCE,
            "rounds": len(self.ratios),
            "stopped": self.stopped,
            "memory": None if self.memory is None else list(self.memory),
            "a": self.a.to_json(),
            "b": self.b.to_json(),
        }

    def chrome_trace(self, path: str | os.PathLike[str]) -> Path:
        """Write the rounds as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing; see `Comparisons`."""
        return Comparisons(self.a, (self,)).chrome_trace(path)

    def __rich__(self) -> Table:
        return Comparisons(self.a, (self,)).__rich__()

    def _repr_html_(self) -> str:
        return Comparisons(self.a, (self,))._repr_html_()


@dataclass(frozen=True)
class Comparisons:
    """Several callables against one baseline, timed in the same rounds."""

    baseline: Measurement
    contenders: tuple[Comparison, ...]

    def __getitem__(self, name: str) -> Comparison:
        for comparison in self.contenders:
            if comparison.b.name == name:
                return comparison
        names = ", ".join(c.b.name for c in self.contenders)
        raise UsageError(f"no contender is named {name!r}: there are {names}, against {self.baseline.name}")

    def __iter__(self) -> Iterator[Comparison]:
        return iter(self.contenders)

    def __len__(self) -> int:
        return len(self.contenders)

    def to_json(self) -> dict[str, Any]:
        """All comparisons as plain values, by name."""
        return {comparison.b.name: comparison.to_json() for comparison in self.contenders}

    def chrome_trace(self, path: str | os.PathLike[str]) -> Path:
        """
        Write the rounds as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing: JSON in the trace event format.

        One track per contender, one span per round's sample (its calls together), and the ratio of each round.
        UsageError where ``path`` cannot be written.
        """
        target = Path(path)
        if target.is_dir() or not target.resolve().parent.is_dir():
            raise UsageError(f"a trace cannot be written to {target}: it or its folder is not there; give a file name")
        with tempfile.TemporaryDirectory(dir=target.resolve().parent, prefix=f".{target.name}-") as folder:
            aside = Path(folder) / "aside"
            aside.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": self._events()}), encoding="utf-8")
            os.replace(aside, target)
        return target

    def _events(self) -> list[dict[str, Any]]:
        all_of_them = [self.baseline, *(c.b for c in self.contenders)]
        if unknown := [one.name for one in all_of_them if len(one.starts) != len(one.latencies)]:
            raise UsageError(
                f"when the rounds of {', '.join(unknown)} began is not known: measure with fxopt.benchmark"
            )
        found: list[dict[str, Any]] = [_named("process_name", 0, f"fxopt benchmark on {self.baseline.device}")]
        for track, one in enumerate(all_of_them, start=1):
            found.append(_named("thread_name", track, one.name))
            for number, (start, latency) in enumerate(zip(one.starts, one.latencies, strict=True)):
                span = {"name": one.name, "cat": "round", "ph": "X", "pid": 1, "tid": track, "ts": start * 1e6}
                said = {"round": number, "calls": one.calls, "seconds a call": latency}
                found.append(span | {"dur": latency * one.calls * 1e6, "args": said})
        for comparison in self.contenders:
            name = f"{comparison.b.name} / {self.baseline.name}"
            for start, ratio in zip(comparison.b.starts, comparison.ratios, strict=True):
                found.append({"name": name, "ph": "C", "pid": 1, "ts": start * 1e6, "args": {"ratio": ratio}})
        return found

    def __rich__(self) -> Table:
        table = _table(self._title, _COLUMNS)
        styles = {"faster": "green", "slower": "red", "no difference": None, "not measurable": "dim"}
        table.add_row(*_first_row(self.baseline))
        for comparison in self.contenders:
            table.add_row(*_row(comparison), style=styles[comparison.verdict])
        return table

    def _repr_html_(self) -> str:
        return _html(self._title, _COLUMNS, [_first_row(self.baseline), *map(_row, self.contenders)])

    @property
    def _title(self) -> str:
        one = self.baseline
        return f"{len(one.latencies)} interleaved rounds on {one.device}, {one.threads} threads"


def _named(what: str, track: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": track, "args": {"name": name}}


_COLUMNS = ("", "latency", "ratio", "95 %", "memory", "verdict")


def _first_row(one: Measurement) -> tuple[str, ...]:
    return one.name, _seconds(one.median), "1", "", _bytes(one.memory), ""


def _row(c: Comparison) -> tuple[str, ...]:
    interval = _interval(c.interval, lambda bound: f"{bound:.3f}")
    ratio = f"{c.ratio:.3f}" if math.isfinite(c.interval[1]) else ""
    return c.b.name, _seconds(c.b.median), ratio, interval, _bytes(c.b.memory), c.conclusion


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "verdict") else "right")
    return table


def _html(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [("th", columns), *(("td", row) for row in rows)]
    body = "".join(
        f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>" for tag, cells in lines
    )
    return f"<table><caption>{html.escape(title)}</caption>{body}</table>"


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _bytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.2f} MiB"


def _interval(bounds: tuple[float, float], show: Callable[[float], str]) -> str:
    return f"{show(bounds[0])} – {show(bounds[1])}" if math.isfinite(bounds[1]) else "too few rounds"


def _plain(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None


# ------------------------------------------------------------------------------------------------------ statistics


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """A confidence interval of the median: the k-th smallest and the k-th largest of the samples.

    k is the largest for which the median lies outside with a probability of at most 1 − confidence, by the binomial
    distribution of how many samples fall below it. With too few samples there is none: (0, inf), since samples here are
    durations and their ratios.
    """
    ordered, outside = sorted(samples), (1 - confidence) / 2
    n, k, tail = len(ordered), 0, 0.0
    while k < n // 2 and (tail := tail + math.comb(n, k) / 2**n) <= outside:
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (0.0, math.inf)


def is_precise(ratios: Sequence[float], precision: float) -> bool:
    """Whether the interval of the median is within ± ``precision`` of it, relatively."""
    low, high = median_interval(ratios)
    return high - low <= 2 * precision * statistics.median(ratios)
