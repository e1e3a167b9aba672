"""Writing what pruning gives: folders, exported programs, ONNX; each aside first, then in its place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from fxopt.errors import StoreError, UsageError
from fxopt.pruning.calibration import Batch
from fxopt.store import save

FORMATS = ("fxopt", "pt2", "onnx")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step."""
    _aside(path, lambda place: place.write_text(text))


def save_pruned(
    gm: GraphModule, directory: str | Path, batch: Batch | None = None, formats: Sequence[str] = ("fxopt",)
) -> list[Path]:
    """
    Write a pruned graph module to ``directory``; returns what was written.

    ``fxopt``: the original weights as safetensors, the graph, and the journal that makes it what it is, so that
    `fxopt.load` gives it back with its history, and it can be undone.  ``pt2``: `torch.export`'s program, ``onnx``: by
    torch's exporter; in both the pruned work and its weights are gone.  ``batch``: example inputs for these two.
    """
    if wrong := [f for f in formats if f not in FORMATS]:
        raise UsageError(f"format {wrong[0]!r} is not known; give some of {', '.join(FORMATS)}")
    if batch is None and set(formats) - {"fxopt"}:
        raise UsageError("a program is exported with example inputs; give batch=Batch(…)")
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, expected a folder; give another path")
    written = []
    if "fxopt" in formats:
        written.append(save(gm, folder / "model"))
    folder.mkdir(parents=True, exist_ok=True)
    if "pt2" in formats:
        program = exported(gm, batch)
        _aside(folder / "model.pt2", lambda place: torch.export.save(program, place))
        written.append(folder / "model.pt2")
    if "onnx" in formats:
        to_onnx(gm, batch, folder / "model.onnx")
        written.append(folder / "model.onnx")
    return written


def exported(gm: GraphModule, batch: Batch | None) -> torch.export.ExportedProgram:
    """The graph as it is now, by `torch.export`, with the sizes of ``batch``."""
    assert batch is not None
    args, kwargs = batch.inputs, {}
    if isinstance(batch.inputs, dict):
        args, kwargs = (), batch.inputs
    return torch.export.export(gm, tuple(args), kwargs, strict=False)


def to_onnx(gm: GraphModule, batch: Batch | None, path: Path) -> None:
    """Write ``gm`` as ONNX, by torch's exporter from its exported program."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise StoreError('writing ONNX needs onnx and onnxscript: pip install "fxopt[onnx]"') from error
    program: Any = torch.onnx.export(exported(gm, batch), dynamo=True, verbose=False)
    _aside(path, lambda place: program.save(str(place)))


def _aside(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
