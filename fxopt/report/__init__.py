"""What happened to a model, as one HTML file that needs nothing else: no network, no build step."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx import GraphModule

from fxopt.compose import Result
from fxopt.difference import Difference
from fxopt.errors import UsageError

if TYPE_CHECKING:
    from fxopt.report.data import Subject

__all__ = ["report"]


def report(what: Any, path: str | os.PathLike[str], title: str | None = None) -> Path:
    """
    Write a report of ``what`` to ``path``: one HTML file, to be opened in a browser.

    ``what``: the `Result` of a pipeline, what ``fxopt.optimize`` returned, a graph module with its history, what
    ``fxopt optimize`` prints (`fxopt.frontend.Report`), the `Difference` of two graphs, or a `Bisection`.  Raises
    `UsageError` for anything else, and where ``path`` cannot be written.
    """
    from fxopt.report.page import page

    target = Path(path)
    check_writable(target)
    write_aside(target, page(_subject(what, title)))
    return target


def write_aside(target: Path, text: str) -> None:
    """Write ``text`` to ``target`` in one step: whoever interrupts leaves the old file."""
    with tempfile.TemporaryDirectory(dir=target.resolve().parent, prefix=f".{target.name}-") as folder:
        aside = Path(folder) / "aside"  # not mkstemp, whose files nobody else may read
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, target)


def check_writable(target: Path, option: str = "report") -> None:
    """`UsageError` if no file can be written at ``target``."""
    if target.is_dir() or not target.resolve().parent.is_dir():
        raise UsageError(
            f"{option} {target} cannot be written: it is a folder or its folder does not exist; give a file name"
        )


def _subject(what: Any, title: str | None) -> Subject | Difference:
    from fxopt.bisection import Bisection
    from fxopt.frontend import Report
    from fxopt.huggingface import Optimized
    from fxopt.report.data import Subject

    if isinstance(what, Difference):
        return dataclasses.replace(what, title=title or what.title)
    if isinstance(what, Result):
        return Subject(title or "fxopt", {"": (what.gm, what)}, (), what.verification, what.total)
    if isinstance(what, GraphModule):
        return Subject(title or type(what).__name__, {"": (what, None)})
    if isinstance(what, Bisection) and what.gm is not None:
        return Subject(title or what.summary, {"": (what.gm, what.result)}, what.facts)
    if isinstance(what, Report):
        graphs = {name: (result.gm, result) for name, result in what.results.items()}
        return Subject(title or what.name, graphs, what.facts, what.verification, what.comparison)
    state = what.__dict__.get("fxopt") if isinstance(what, nn.Module) else None
    if isinstance(state, Optimized):
        found = {name: (gm, state.results.get(name)) for name, gm in state.graphs.items()}
        return Subject(title or type(what).__name__, found, [("eager from the start", note) for note in state.notes])
    raise UsageError(
        f"report was given a {type(what).__name__}, expected the Result of a pipeline, a graph module, "
        "a difference, a bisection, or what fxopt.optimize returned"
    )
