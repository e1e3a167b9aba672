"""A reproducer: a folder whose `repro.py` shows a failure again, with torch and fxopt alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule

import fxopt
from fxopt import serial
from fxopt.errors import FxoptError, StoreError, UsageError
from fxopt.portable import Portable
from fxopt.reduce import Cut
from fxopt.repro_texts import AGAIN, HEAD, TAIL

_TIMEOUT = 600  # seconds for the fresh process


@dataclass(frozen=True)
class Repro:
    """
    A failure that can be shown again.

    ``size``: how many operations it has before and after.  ``confirmed``: whether a fresh process failed again;
    ``note`` says what it printed, or why there was none.
    """

    title: str
    facts: Mapping[str, Any]
    writers: tuple[Callable[[Path], object], ...] = field(repr=False)  # each adds its files
    size: tuple[int, int] = (0, 0)
    whole: bool = True
    confirmed: bool = False
    note: str = ""

    def save(self, directory: str | Path) -> Path:
        """Write the folder; what stands there under the same names is replaced once all is written."""
        target = folder_at(directory, "save")
        folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
        try:
            for write in self.writers:
                write(folder)
            write_json(folder / "repro.json", dict(self.facts))
            for path in sorted(folder.iterdir(), key=lambda p: p.name == "repro.py"):
                if (target / path.name).is_dir():
                    shutil.rmtree(target / path.name)
                os.replace(path, target / path.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return target

    def confirm(self) -> Repro:
        """The same, knowing whether it fails again in a fresh process."""
        with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
            try:
                self.save(folder)
            except FxoptError as error:
                return replace(self, confirmed=False, note=str(error))
            try:
                return replace(self, **_outcome(run(folder)))
            except subprocess.TimeoutExpired:
                return replace(self, confirmed=False, note=f"a fresh process took more than {_TIMEOUT} seconds")


def folder_at(directory: Any, what: str) -> Path:
    """``directory`` as a folder that is there; raises `UsageError` where it cannot be."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except (OSError, TypeError) as error:  # a file stands there, or it may not be written
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{what} was given the folder {directory!r}, which cannot be made: {why}") from error
    return Path(directory)


def run(directory: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the `repro.py` in ``directory`` in a fresh process, with this fxopt."""
    own = str(Path(fxopt.__file__).resolve().parent.parent)
    paths = [own, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, str(Path(directory) / "repro.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_TIMEOUT,
    )


def _outcome(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    said = (done.stdout.strip() or done.stderr.strip()).splitlines() or ["nothing"]
    if done.returncode == 1 and said[-1] == AGAIN:
        return {"confirmed": True, "note": said[0]}
    last = done.stderr.strip().splitlines()[-1] if done.returncode not in (0, 1) and done.stderr.strip() else said[0]
    return {"confirmed": False, "note": f"in a fresh process it ends with exit code {done.returncode}: {last}"}


# ---------------------------------------------------------------------------------------------------------------- files


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def write_portable(folder: Path, found: Portable) -> None:
    """Write the files that another process needs to import ``found``."""
    for path in found.copied:
        shutil.copyfile(path, folder / path.name)
    if found.text:
        (folder / f"{found.module}.py").write_text(found.text)
    if found.tensors:
        write_tensors(folder / f"{found.module}.safetensors", found.tensors)


def write_script(folder: Path, title: str, body: str) -> None:
    """Write `repro.py`."""
    plain = title.replace("\\", "\\\\").replace('"""', "'''")
    (folder / "repro.py").write_text(Template(HEAD).substitute(title=plain) + body + TAIL)


def write_graphs(folder: Path, graphs: Mapping[str, GraphModule]) -> None:
    """Each graph as JSON; the tensors that all of them hold at the same path once, the others beside each."""
    written = {name: serial.to_json(gm) for name, gm in graphs.items()}
    for name, (graph, _) in written.items():
        write_json(folder / f"{name}.json", graph)
    first = next(iter(written.values()))[1]
    shared = {p: t for p, t in first.items() if all(_same(t, tensors.get(p)) for _, tensors in written.values())}
    write_tensors(folder / "weights.safetensors", shared)
    for name, (_, tensors) in written.items():
        write_tensors(folder / f"{name}.safetensors", {p: t for p, t in tensors.items() if p not in shared})


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and (a.data_ptr(), a.shape, a.stride(), a.dtype) == (
        b.data_ptr(),
        b.shape,
        b.stride(),
        b.dtype,
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Those that share memory are written as copies; safetensors has no views."""
    if packed := [p for p, t in tensors.items() if t.layout is not torch.strided]:
        raise StoreError(f"{packed[0]} is {tensors[packed[0]].layout}, which safetensors cannot hold")
    save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()}, path)


def write_inputs(folder: Path, cut: Cut) -> None:
    """Write the inputs of a part, tensors and numbers, in order."""
    tensors = {f"{i}": v for i, v in enumerate(cut.inputs) if isinstance(v, Tensor)}
    write_tensors(folder / "inputs.safetensors", tensors)
    listed: list[dict[str, Any]] = []
    for i, (name, value) in enumerate(zip(cut.names, cut.inputs, strict=True)):
        if isinstance(value, Tensor):
            stride = {} if value.is_contiguous() or 0 in value.stride() else {"stride": list(value.stride())}
            listed.append({"name": name, "tensor": str(i), **stride})
        else:
            listed.append({"name": name, "value": serial.encode(value, f"the input {name}")})
    write_json(folder / "inputs.json", listed)
