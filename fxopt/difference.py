"""Two graph modules side by side: which lines are the same, which changed, and which transformation did it."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.fx import GraphModule
from torch.fx.node import _get_qualified_name

from fxopt.alignment import Pair, align
from fxopt.delta import related, share
from fxopt.errors import UsageError
from fxopt.listing import Line, Listing, listing, states
from fxopt.log import Commit, commits, label
from fxopt.text import to_text

Kind = Literal["same", "changed", "removed", "added", "moved"]

SIGNS: Mapping[str, str] = {"same": " ", "changed": "~", "removed": "-", "added": "+", "moved": ">"}
_STYLES: Mapping[str, str] = {
    "same": "dim",
    "changed": "yellow",
    "removed": "red",
    "added": "green",
    "moved": "magenta",
}


@dataclass(frozen=True, eq=False)
class Row:
    """
    A line before, beside the line after that took its place; one of them may be missing.

    ``moved``: the same line stands elsewhere on the other side.  ``by``: the transformations that did it.
    """

    kind: Kind
    before: Line | None
    after: Line | None
    graph: str  # the path of the graph module inside, "" for the outermost
    by: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The path of the module of the model's source that it belongs to."""
        line = self.after or self.before
        return line.module if line else ""

    def to_json(self) -> dict[str, Any]:
        """The row as plain values."""
        return {
            "kind": self.kind,
            "before": None if self.before is None else self.before.text,
            "after": None if self.after is None else self.after.text,
            "graph": self.graph,
            "module": self.module,
            "by": list(self.by),
        }


@dataclass(frozen=True)
class TensorChange:
    """A parameter or buffer that differs: what it was and what it is, ``float32 [2, 3]``; None where there is none."""

    path: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        if self.before == self.after:
            return f"{self.path}: {self.after}, other values"
        return f"{self.path}: {self.before or 'nothing'} → {self.after or 'nothing'}"


@dataclass(frozen=True, eq=False)
class Difference:
    """Two graph modules side by side, in graph order; true where they differ.  Prints in two columns."""

    title: str
    rows: tuple[Row, ...]
    tensors: tuple[TensorChange, ...]

    def __bool__(self) -> bool:
        return bool(self.tensors) or any(row.kind != "same" for row in self.rows)

    @property
    def changes(self) -> tuple[Row, ...]:
        """The rows that differ."""
        return tuple(row for row in self.rows if row.kind != "same")

    @property
    def summary(self) -> str:
        """One line: how many nodes were removed, added, changed and moved."""
        if not self:
            return "no difference"
        left = sum(row.before is not None for row in self.rows)
        right = sum(row.after is not None for row in self.rows)
        counts = {kind: sum(row.kind == kind for row in self.rows) for kind in SIGNS if kind != "same"}
        counts["moved"] //= 2  # one row where it was, one where it is
        said = [f"{SIGNS[kind]}{count} {kind}" for kind, count in counts.items() if count]
        said += [f"{len(self.tensors)} tensor{'s' * (len(self.tensors) != 1)} differ"] if self.tensors else []
        return f"{left} → {right} nodes: {', '.join(said)}"

    def only(self, title: str, keys: Set[str], paths: Set[str]) -> Difference:
        """The same, with what does not concern the nodes ``keys`` or the tensors at ``paths`` as it is after."""
        rows = []
        for row in self.rows:
            if row.kind == "same" or any(line is not None and line.key in keys for line in (row.before, row.after)):
                rows.append(row)
            elif row.after is not None:
                rows.append(dataclasses.replace(row, kind="same", before=row.after, by=()))
        return Difference(title, tuple(rows), tuple(t for t in self.tensors if t.path in paths))

    def folded(self, context: int = 1) -> Iterator[Row | int]:
        """The rows, with a number in the place of so many unchanged ones further than ``context`` from a change."""
        near = _near(self.rows, context)
        count = 0
        for row, shown in zip(self.rows, near, strict=True):
            if not shown:
                count += 1
                continue
            if count:
                yield count
                count = 0
            yield row
        if count:
            yield count

    def to_json(self) -> dict[str, Any]:
        """All rows as plain values."""
        return {
            "title": self.title,
            "summary": self.summary,
            "rows": [row.to_json() for row in self.rows],
            "tensors": [dataclasses.asdict(t) for t in self.tensors],
        }

    def __repr__(self) -> str:
        return to_text(self)

    def __rich__(self) -> Group:
        return self.rich()

    def rich(self, context: int = 1) -> Group:
        """The rows for the terminal, with ``context`` unchanged lines around each change."""
        title = Text.assemble((self.title, "bold"), f": {self.summary}")
        if not self:
            return Group(title)
        table = Table.grid(padding=(0, 1), expand=True)
        labels = {name for row in self.rows for name in row.by}
        labelled = bool(labels) and not (len(labels) == 1 and self.title.startswith(next(iter(labels))))
        table.add_column(width=1, no_wrap=True)
        table.add_column(ratio=5, overflow="fold")
        table.add_column(ratio=5, overflow="fold")
        if labelled:
            table.add_column(ratio=2, overflow="fold")
        heading = ""
        for row in self.folded(context):
            if isinstance(row, int):
                table.add_row("", Text(f"… {row} unchanged", style="dim italic"))
                heading = ""
                continue
            if (said := _heading(row)) != heading:
                table.add_row("", Text(heading := said, style="bold cyan"))
            table.add_row(*_cells(row, labelled))
        tensors = [Text(f"  {t}", style="yellow") for t in self.tensors]
        return Group(title, table, *([Text("tensors", style="bold cyan"), *tensors] if tensors else ()))

    def _repr_html_(self) -> str:
        body = [f"<tr><th colspan=4 style='text-align:left'>{_escape(self.title)}"]
        body.append(f"<span style='font-weight:normal'>: {_escape(self.summary)}</span></th></tr>")
        heading = ""
        for row in self.folded() if self else ():
            if isinstance(row, int):
                body.append(f"<tr><td></td><td colspan=3 style='opacity:.6'>… {row} unchanged</td></tr>")
                heading = ""
                continue
            if (said := _heading(row)) != heading:
                heading = said
                body.append(f"<tr><td></td><td colspan=3 style='font-weight:bold'>{_escape(said)}</td></tr>")
            body.append(_html_row(row))
        body += [f"<tr><td>~</td><td colspan=3>{_escape(str(t))}</td></tr>" for t in self.tensors]
        style = "font-family:monospace;border-collapse:collapse;text-align:left"
        return f"<table style='{style}'>{''.join(body)}</table>"


def _near(rows: Sequence[Row], context: int) -> list[bool]:
    near = [False] * len(rows)
    for i, row in enumerate(rows):
        if row.kind != "same":
            for j in range(max(0, i - context), min(len(rows), i + context + 1)):
                near[j] = True
    for i in range(1, len(rows) - 1):  # a fold of one line saves nothing
        if near[i - 1] and near[i + 1]:
            near[i] = True
    return near


def _heading(row: Row) -> str:
    inner = f"{row.graph}: " if row.graph else ""
    return f"{inner}{row.module or '(the model)'}"


def _cells(row: Row, labelled: bool) -> list[Text]:
    style = _STYLES[row.kind]
    left, right = (Text(line.text if line else "", style=style) for line in (row.before, row.after))
    if row.kind == "changed":
        left.stylize("red")
        right.stylize("green")
    label = [Text(", ".join(row.by), style="cyan")] if labelled else []
    return [Text(SIGNS[row.kind], style=style), left, right, *label]


_COLOURS: Mapping[str, str] = {
    "removed": "rgba(255,80,80,.22)",
    "added": "rgba(60,190,90,.22)",
    "changed": "rgba(230,170,30,.22)",
    "moved": "rgba(170,90,230,.18)",
    "same": "transparent",
}


def _html_row(row: Row) -> str:
    cells = [SIGNS[row.kind], *(line.text if line else "" for line in (row.before, row.after)), ", ".join(row.by)]
    style = f"background:{_COLOURS[row.kind]};text-align:left;vertical-align:top;padding:0 .5em"
    return f"<tr>{''.join(f'<td style={style!r}>{_escape(cell)}</td>' for cell in cells)}</tr>"


def _escape(text: str) -> str:
    return html.escape(text).replace("\n", " ")


# --- comparing ----------------------------------------------------------------------------------------------------


def diff(before: nn.Module, after: nn.Module, title: str = "before → after") -> Difference:
    """
    What differs between two graph modules: captures of one model, or states of one history.

    Nodes belong together by name where they do the same for the same module, else by what they do and their place;
    tensors by path and value.  Each change is labelled with the transformations that either history holds for it.
    Raises `UsageError` if one is no graph module.
    """
    for one in (before, after):
        if not isinstance(one, GraphModule):
            raise UsageError(
                f"diff was given a {type(one).__name__}, expected two graph modules; "
                "capture the model first, or give model.fxopt.graphs[...]"
            )
    assert isinstance(before, GraphModule) and isinstance(after, GraphModule)
    return compare(listing(before), listing(after), _blame(before, after), title)


def of_commit(gm: GraphModule, index: int) -> Difference:
    """What commit ``index`` of ``gm`` changed; `Conflict` where an edit outside of fxopt is in the way."""
    found = commits(gm)
    steps = states(share(gm))
    after = next(listed for i, (_, listed) in enumerate(steps) if i == len(found) - index - 1)
    return step(found, index, next(steps)[1], after)


def of_commits(gm: GraphModule) -> list[Difference]:
    """What each commit of ``gm`` changed, oldest first: `of_commit` of all at the price of one."""
    listings = [listed for _, listed in states(share(gm))][::-1]
    found = commits(gm)
    return [step(found, i, listings[i], listings[i + 1]) for i in range(len(found))]


def step(found: Sequence[Commit], index: int, before: Listing, after: Listing) -> Difference:
    """What commit ``index`` of ``found`` changed, from the lines before and after it."""
    name = label(found[index].transformation)
    return compare(before, after, lambda _: (name,), name)


def _blame(before: GraphModule, after: GraphModule) -> Callable[[Row], tuple[str, ...]]:
    """Tells which transformations touched a row: those that only ``after`` has, and those only ``before`` has."""
    old, new = _touched(before), _touched(after)
    gained = {commit: keys - old.get(commit, set()) for commit, keys in new.items()}
    lost = {commit: keys - new.get(commit, set()) for commit, keys in old.items()}
    by: dict[str, list[str]] = {}
    for said, changes in (("{}", gained), ("without {}", lost)):
        for (name, _), keys in changes.items():
            for key in keys:
                by.setdefault(key, []).append(said.format(name))

    def blame(row: Row) -> tuple[str, ...]:
        keys = dict.fromkeys(line.key for line in (row.before, row.after) if line is not None)
        known = tuple(dict.fromkeys(name for key in keys for name in by.get(key, ())))
        marks = [m for m in (row.after.marks if row.after else ()) if row.before is None or m not in row.before.marks]
        return known or tuple(marks)

    return blame


def _touched(gm: GraphModule) -> dict[tuple[str, int], set[str]]:
    """The keys that each commit touched, by its label and which of that label it is."""
    found: dict[tuple[str, int], set[str]] = {}
    for commit in commits(gm):
        name = label(commit.transformation)
        number = sum(name == other for other, _ in found)
        active = commit.active()
        readers = {node.name for node in gm.graph.nodes if active.slots and node.target in active.slots}
        found[name, number] = {*active.nodes, *active.metas, *readers}
    return found


def compare(
    before: Listing,
    after: Listing,
    blame: Callable[[Row], tuple[str, ...]],
    title: str = "before → after",
) -> Difference:
    """The difference of two listings."""
    tensors = tuple(_tensor_changes(before.tensors, after.tensors))
    changed = related({t.path for t in tensors if t.before is not None and t.after is not None})
    rows: list[Row] = []
    for path in dict.fromkeys((*before.graphs, *after.graphs)):
        pairs = align(before.graphs.get(path, ()), after.graphs.get(path, ()))
        rows += _rows(pairs, path, lambda line: bool(line.holds) and any(changed(line.holds)))
    labelled = (row if row.kind == "same" else dataclasses.replace(row, by=blame(row)) for row in rows)
    return Difference(title, tuple(labelled), tensors)


def _rows(pairs: Sequence[Pair], graph: str, differs: Callable[[Line], bool]) -> Iterator[Row]:
    other = {b.key: a.key for a, b in pairs if a is not None and b is not None}
    left = {a.key: a for a, b in pairs if a is not None and b is None}
    right = {b.key: b for a, b in pairs if b is not None and a is None}

    def alike(a: Line, b: Line) -> bool:
        same = a.form == b.form and a.target == b.target
        return same and a.reads == tuple(other.get(key, key) for key in b.reads) and not differs(b)

    for a, b in pairs:
        if a is None or b is None:
            line = a or b
            assert line is not None
            twin = right.get(line.key) if b is None else left.get(line.key)
            moved = twin is not None and twin.operation == line.operation
            yield Row("moved" if moved else "removed" if b is None else "added", a, b, graph)
        else:
            same = (a is b and not differs(b)) or alike(a, b)
            yield Row("same", a, b, graph) if same else Row("changed", *_told_apart(a, b), graph)


def _told_apart(a: Line, b: Line) -> tuple[Line, Line]:
    """Two lines that differ; where they read alike, with the full names of what they call."""
    if a.target == b.target or a.text != b.text:
        return a, b
    return tuple(dataclasses.replace(x, text=f"{x.text}  # {_full_name(x.target)}") for x in (a, b))  # type: ignore[return-value]


def _full_name(target: Any) -> str:
    return _get_qualified_name(target) if hasattr(target, "__name__") else str(target)


def _tensor_changes(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Iterator[TensorChange]:
    for path in dict.fromkeys((*before, *after)):
        a, b = before.get(path), after.get(path)
        if a is b or (a is not None and b is not None and _equal(a, b)):
            continue
        yield TensorChange(path, None if a is None else _described(a), None if b is None else _described(b))


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.layout != b.layout:
        return False
    if a.device.type == "meta":
        return True
    with torch.no_grad():
        x, y = (t.to_dense() if t.is_mkldnn or t.layout is not torch.strided else t for t in (a, b))
        return bool(((x == y) | ((x != x) & (y != y))).all())


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
