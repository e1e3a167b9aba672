"""Saving and loading: the original weights as safetensors, the graph and the journal as JSON; no pickle anywhere.

What is saved is what the model was before any transformation, and the journal of its transformations.  Loading makes
them again and checks that every one leads to the graph that was saved; so a loaded result can be undone like any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.fx import GraphModule

import fxopt
from fxopt import catalogue, serial
from fxopt.delta import graphs, share
from fxopt.errors import StoreError
from fxopt.history import commits, history, undo_rewrite

JOURNAL, GRAPH, WEIGHTS = "fxopt.json", "graph.json", "model.safetensors"
FORMAT = 1


def save(gm: GraphModule, directory: str | Path) -> Path:
    """
    Write ``gm`` with its history to ``directory``: model.safetensors, graph.json, fxopt.json.

    Everything is written aside first; what stood there before survives an interrupted save.  Raises `StoreError` if
    something of it cannot be written without pickle, or a transformation cannot be made again.
    """
    original = history(share(gm)).checkout(0)
    graph, tensors = serial.to_json(original)
    with aside(directory) as folder:
        write_tensors(folder / WEIGHTS, tensors)
        write_json(folder / GRAPH, graph)
        entry = {"format": FORMAT, "kind": "graph", "fxopt": fxopt.__version__, "torch": torch.__version__}
        write_journal(folder, entry | {"commits": journal(gm)})
    return Path(directory)


def load(directory: str | Path) -> GraphModule:
    """
    The graph module that `save` wrote, with its history: each transformation is made again, and checked.

    Raises `StoreError` if files are missing, damaged or do not belong together, or a transformation made again leads to
    another graph.
    """
    folder = Path(directory)
    entry = read_journal(folder)
    if entry["kind"] != "graph":
        raise StoreError(f"{folder} holds a saved {entry['kind']}, not a graph module; use fxopt.load")
    gm = serial.from_json(read_json(folder / GRAPH), read_tensors(folder / WEIGHTS))
    replay(gm, entry["commits"])
    return gm


# --- the journal ----------------------------------------------------------------------------------------------------


def journal(gm: GraphModule) -> list[dict[str, Any]]:
    """The history of ``gm`` as plain values, with a digest of the graph after each commit."""
    found = []
    trial = share(gm)
    digests = []
    for count in range(len(commits(gm)), 0, -1):
        digests.append(digest(history(trial).checkout(count)))
    for commit, after in zip(commits(gm), reversed(digests), strict=True):
        if not commit.transformation.replayable and commit.delta:
            raise StoreError(f"{commit.signature} cannot be made again from the journal alone; undo it before saving")
        saved = catalogue.to_json(commit.transformation)  # type: ignore[arg-type]
        ids = [p.id for p in commit.parts]
        undone = sorted(commit.undone)
        found.append(saved | {"signature": commit.signature, "rewrites": ids, "undone": undone, "after": after})
    return found


def replay(gm: GraphModule, saved: Sequence[Mapping[str, Any]]) -> GraphModule:
    """Make the commits of a journal again on ``gm``, and check each against its digest."""
    for entry in saved:
        transformation = catalogue.from_json(dict(entry))
        transformation(gm)
        index = len(commits(gm)) - 1
        for part in entry["undone"]:
            undo_rewrite(gm, index, part)
        if digest(gm) != entry["after"]:
            raise StoreError(
                f"{entry['signature']} made another graph than was saved, under torch {torch.__version__}; "
                "load with the versions that fxopt.json names, or optimize again"
            )
    return gm


def digest(gm: GraphModule) -> str:
    """A hash of the graphs' nodes: names, operations, arguments and order."""
    text = []
    for path, inner in graphs(gm).items():
        for node in inner.graph.nodes:
            if node.target != serial.GUARDS:
                text.append(f"{path} {node.name} {node.op} {serial.target_name(node)} {node.args} {node.kwargs}")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


# --- files ----------------------------------------------------------------------------------------------------------


@contextmanager
def aside(directory: str | Path) -> Iterator[Path]:
    """
    A folder to write into, whose files move to ``directory`` at the end, the journal last.

    If the body raises or is interrupted, ``directory`` is as it was.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise StoreError(f"{target} is a file, expected a folder to save into; give another path")
    existed = target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    except OSError as error:
        raise StoreError(f"cannot write to {target}: {error.strerror}; give another path") from error
    try:
        yield folder
        names = sorted(p.name for p in folder.iterdir())
        for name in sorted(names, key=lambda n: n == JOURNAL):
            os.replace(folder / name, target / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed and not any(target.iterdir()):
            target.rmdir()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_journal(folder: Path, entry: dict[str, Any]) -> None:
    """Write the journal, with the hash of every file beside it, which tells an interrupted save from a whole one."""
    files = {p.name: file_hash(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != JOURNAL}
    write_json(folder / JOURNAL, entry | {"files": files})


def read_journal(folder: Path) -> dict[str, Any]:
    """The journal in ``folder``, after checking that it and the files it names belong together."""
    if not folder.is_dir():
        raise StoreError(f"{folder} is no folder; give one that fxopt.save or `fxopt optimize --save` wrote")
    if not (folder / JOURNAL).is_file():
        raise StoreError(f"{folder} has no {JOURNAL}; give a folder that fxopt.save or `fxopt optimize --save` wrote")
    entry = read_json(folder / JOURNAL)
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise StoreError(f"{folder / JOURNAL} is not of format {FORMAT}; it was saved by another version of fxopt")
    for name, expected in entry.get("files", {}).items():
        if not (folder / name).is_file():
            raise StoreError(f"{folder} lacks {name}, which its journal names; save it again")
        if file_hash(folder / name) != expected:
            raise StoreError(f"{folder / name} is not the file that was saved with the journal; save it again")
    return entry


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreError(f"{path} cannot be read ({error}); save it again") from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write ``tensors`` by path; those that share memory (views of one another) are written as copies."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        separate[name] = separate[name].contiguous()
        seen.add(memory)
    save_file(separate, path, metadata={"format": "pt"})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read ({error}); save it again") from error


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
