"""Saving and loading: the original weights as safetensors, the graph and the journal as JSON; no pickle anywhere.

What is saved is what the model was before any transformation, and the journal of its transformations.  Loading makes
them again and checks that every one leads to the graph that was saved; so a loaded result can be undone like any other.
What was trained since a transformation made it is saved beside, and written over what loading makes: to the history of
a loaded result it is an edit, as it was to that of the saved one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.fx import GraphModule

import fxopt
from fxopt import catalogue, serial
from fxopt.delta import graphs, share
from fxopt.difference import Difference, diff, of_commits
from fxopt.errors import FxoptError, StoreError, UsageError
from fxopt.history import Entry, checkout, commits, history, undo_rewrite, written
from fxopt.huggingface import Optimized, optimize

JOURNAL, GRAPH, WEIGHTS = "fxopt.json", "graph.json", "model.safetensors"
INPUTS, OPTIONS, TRAINED = "inputs.safetensors", "options.safetensors", "trained.safetensors"
FORMAT = 1


def save(model: nn.Module, directory: str | Path) -> Path:
    """
    Write ``model`` with its history to ``directory``.

    A graph module: model.safetensors, graph.json, fxopt.json, and trained.safetensors where parameters that its
    transformations made were trained since.  What `fxopt.optimize` made of a Hugging Face model:
    what ``save_pretrained`` writes (the original weights, so that transformers can load the folder too), the example
    inputs and fxopt.json.  What it made of any other module is saved as its graph: `load` gives back a graph module
    that computes the same, not a module of that class (`keeps_class` tells).  Everything is written aside first; what
    stood there before survives an interrupted save.

    Raises `StoreError` if something of it cannot be written without pickle, or a transformation cannot be made again.
    """
    if isinstance(model, GraphModule):
        with aside(directory) as folder:
            _save_graph(model, folder)
    elif isinstance(model.__dict__.get("fxopt"), Optimized):
        state: Optimized = model.__dict__["fxopt"]
        with aside(directory) as folder:
            if keeps_class(model):
                _save_model(model, state, folder)
            else:  # nothing says how to make a module of another class again, but its graph can be written
                _save_graph(_only(state), folder)
    else:
        raise StoreError(
            f"save was given a {type(model).__name__}, expected a graph module or what fxopt.optimize returned; "
            "capture the model first"
        )
    return Path(directory)


def keeps_class(model: nn.Module) -> bool:
    """Whether `load` gives back a model of the same class: a graph module, or a model of transformers itself."""
    return isinstance(model, GraphModule) or _model_class(_class_name(type(model))) is type(model)


def load(directory: str | Path) -> nn.Module:
    """
    What `save` wrote, with its history: each transformation is made again, and checked.

    Raises `StoreError` if files are missing, damaged or do not belong together, or a transformation made again leads to
    another graph.
    """
    folder = Path(directory)
    entry = read_journal(folder)
    try:
        if entry["kind"] == "graph":
            gm = serial.from_json(read_json(folder / GRAPH), read_tensors(folder / WEIGHTS))
            made: nn.Module = replay(gm, entry["graphs"][""], _options(folder, entry))
        else:
            made = _load_model(folder, entry)
        _write_over(folder, entry, graphs_of(made))
        return made
    except FxoptError:
        raise
    except Exception as error:  # what a graph of another version makes of torch and transformers, they alone know
        text = next(iter(str(error).splitlines()), "")
        raise StoreError(
            f"{folder} cannot be loaded ({type(error).__name__}: {text}); load with the versions that fxopt.json names"
        ) from error


def _save_graph(gm: GraphModule, folder: Path) -> None:
    before = share(gm)
    checkout(before, 0, "discard")  # what would be lost is written beside
    graph, tensors = serial.to_json(before)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / GRAPH, graph)
    _write_journal(folder, {"kind": "graph"}, {"": gm})


def _only(state: Optimized) -> GraphModule:
    graphs = list(state.graphs.values())
    if len(graphs) != 1:
        raise StoreError(
            f"the model has {len(graphs)} graphs and no config; save one: fxopt.save(model.fxopt.graphs[…])"
        )
    return graphs[0]


def _save_model(model: Any, state: Optimized, folder: Path) -> None:
    model.save_pretrained(folder)
    write_tensors(folder / INPUTS, {k: v for k, v in state.example_inputs.items() if isinstance(v, torch.Tensor)})
    plain = {k: v for k, v in state.example_inputs.items() if not isinstance(v, torch.Tensor)}
    entry = {
        "kind": "model",
        "class": _class_name(type(model)),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "inputs": {k: serial.encode(v, f"the example input {k}") for k, v in plain.items()},
        "order": list(state.example_inputs),  # an exported graph takes its inputs in the order in which it saw them
        "generation": state.generation,
        "dynamic": state.dynamic,
        "known_to_fail": state.known_to_fail,
    }
    _write_journal(folder, entry, state.graphs)


def _write_journal(folder: Path, entry: dict[str, Any], gms: Mapping[str, GraphModule]) -> None:
    options: dict[str, torch.Tensor] = {}
    journals = {name: journal(gm, options) for name, gm in gms.items()}
    if options:
        write_tensors(folder / OPTIONS, options)
    trained = {f"{name}:{path}": t for name, gm in gms.items() for path, t in written(gm).items()}
    if trained:
        write_tensors(folder / TRAINED, trained)
    write_journal(folder, entry | {"graphs": journals})


def _options(folder: Path, entry: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that the options of transformations name."""
    return read_tensors(folder / OPTIONS) if OPTIONS in entry["files"] else {}


@torch.no_grad()
def _write_over(folder: Path, entry: Mapping[str, Any], gms: Mapping[str, GraphModule]) -> None:
    """Put what was trained into the parameters that the transformations made again."""
    if TRAINED not in entry["files"]:
        return
    held = {
        f"{name}:{path}": tensor
        for name, gm in gms.items()
        for path, tensor in (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))
    }
    for path, value in read_tensors(folder / TRAINED).items():
        made = held.get(path)
        if made is None or (made.shape, made.dtype) != (value.shape, value.dtype):
            raise StoreError(f"{folder / TRAINED} holds {path}, which the journal's transformations do not make so")
        made.copy_(value)


def _load_model(folder: Path, entry: dict[str, Any]) -> nn.Module:
    kind = _model_class(entry["class"])
    if kind is None:
        raise StoreError(
            f"{folder / JOURNAL}: 'class' is {entry['class']!r}, expected a model class of transformers "
            f"{transformers.__version__}; the journal is damaged or from elsewhere"
        )
    dtype = getattr(torch, entry["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise StoreError(f"{folder / JOURNAL}: 'dtype' is {entry['dtype']!r}, expected one of torch's; save it again")
    try:
        model = kind.from_pretrained(folder, dtype=dtype).eval()
    except (OSError, ValueError) as error:  # what transformers raises where its files are absent or damaged
        raise StoreError(f"{folder} cannot be loaded ({str(error).splitlines()[0]}); save it again") from error
    inputs: dict[str, Any] = dict(read_tensors(folder / INPUTS))
    inputs |= {k: serial.decode(v) for k, v in entry["inputs"].items()}
    if inputs.keys() != set(entry["order"]):
        raise StoreError(f"{folder / JOURNAL}: 'order' does not name the inputs {', '.join(inputs)}; save it again")
    inputs = {name: inputs[name] for name in entry["order"]}
    again = Replay(entry["graphs"], entry.get("known_to_fail") is True, _options(folder, entry))
    made = optimize(model, again, inputs, generation=entry["generation"], dynamic=entry["dynamic"])
    if missing := entry["graphs"].keys() - made.__dict__["fxopt"].graphs.keys():
        raise StoreError(
            f"{folder} holds the graphs {', '.join(sorted(missing))}, which could not be captured again under "
            f" torch {torch.__version__}; load with the versions that fxopt.json names, or optimize again"
        )
    return made


def _class_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _model_class(text: str) -> Any | None:
    """The model class of transformers with that ``module:name``, or None; nothing else is looked up or imported."""
    module, _, name = text.partition(":")
    if not module.startswith("transformers.models.") or not name.isidentifier():
        return None
    kind = getattr(transformers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


class Replay:
    """A pipeline that makes the commits of a journal again, for each graph of a model its own."""

    def __init__(
        self,
        graphs: Mapping[str, Sequence[Mapping[str, Any]]],
        known_to_fail: bool = False,
        options: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self.graphs, self.options = graphs, options
        self.on_failure = "keep" if known_to_fail else "raise"  # what was saved wrong on purpose is loaded as it was

    def __call__(self, gm: GraphModule) -> GraphModule:
        raise StoreError("a journal of several graphs needs the graph's name")

    def named(self, name: str, gm: GraphModule) -> GraphModule:
        """Make the commits of the graph ``name`` again on ``gm``."""
        return replay(gm, self.graphs.get(name, ()), self.options)


def saved_graphs(entry: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The commits of each graph in a journal, by the graph's name ("" where there is only one)."""
    return dict(entry["graphs"])


def undo_saved(directory: Path, what: str, rewrite: str | None = None, graph: str | None = None) -> list[str]:
    """
    Undo a transformation of a saved result (its signature, name or number), whole or one rewrite; save again.

    Of several with that name, the latest that has something to undo.  Returns a line for each graph that changed.
    Raises `UsageError` if nothing of it is in the history.
    """
    model = load(directory)
    named = graphs_of(model)
    if graph is not None and graph not in named:
        raise UsageError(f"there is no graph {graph!r}; the graphs are {', '.join(map(repr, named))}")
    asked = {name: gm for name, gm in named.items() if graph in (None, name)}
    lines = []
    for name, gm in asked.items():
        done = _undo_commit(gm, what) if rewrite is None else _undo_rewrite(gm, what, rewrite)
        if done is not None:
            lines.append(f"{name + ': ' if name else ''}undone: {done}")
    if not lines:
        raise UsageError(_nothing_to_undo(asked.values(), what, rewrite, directory))
    save(model, directory)
    return lines


def graphs_of(model: nn.Module) -> dict[str, GraphModule]:
    """The graph modules of what `load` gives, by name; "" for a single one."""
    return {"": model} if isinstance(model, GraphModule) else dict(model.__dict__["fxopt"].graphs)


def saved_patches(directory: Path) -> Iterator[tuple[str, Difference]]:
    """What each commit of a saved result changed, with the name of its graph; those that did nothing are left out."""
    for name, gm in graphs_of(load(directory)).items():
        for commit, difference in zip(commits(gm), of_commits(gm), strict=True):
            if commit.delta:
                yield name, difference


def saved_differences(a: Path, b: Path) -> dict[str, Difference]:
    """
    How the graphs of two saved results differ, by name.

    Raises `UsageError` where they have no graph in common.
    """
    left, right = graphs_of(load(a)), graphs_of(load(b))
    common = [name for name in left if name in right]
    if not common:
        named = " and ".join(", ".join(map(repr, found)) for found in (left, right))
        raise UsageError(f"{a} and {b} have no graph in common: {named}; give two results of one model")
    return {n: diff(left[n], right[n], f"{a} → {b}" + (f": {n}" if len(common) > 1 else "")) for n in common}


def _undo_commit(gm: GraphModule, what: str) -> str | None:
    """Undo the commit, and say which it was; None if there is none, or only some that did nothing."""
    found = [e for e in _entries(gm, what) if what == str(e.index) or e.commit.active()]
    if not found:
        return None
    entry = found[-1]
    idle = "" if entry.commit.active() else ", which did nothing"
    entry.reverse()
    return f"{entry.signature} (number {entry.index}{idle})"


def _undo_rewrite(gm: GraphModule, what: str, rewrite: str) -> str | None:
    found = [r for e in _entries(gm, what) for r in e.rewrites if rewrite in (r.part.id, r.id) and r.active]
    if not found:
        return None
    found[-1].reverse()
    return found[-1].id


def _entries(gm: GraphModule, what: str) -> list[Entry]:
    return [e for e in history(gm) if what in (e.signature, _bare(e.signature), str(e.index))]


def _bare(signature: str) -> str:
    return signature.partition("(")[0]


def _nothing_to_undo(gms: Iterable[GraphModule], what: str, rewrite: str | None, directory: Path) -> str:
    found = [e for gm in gms for e in _entries(gm, what)]
    if found and rewrite is not None:
        return f"{what} has no rewrite {rewrite} to undo; `fxopt log {directory} --rewrites` lists those that it has"
    if found:
        return f"{what} is in the history, but it did nothing, or was undone since: there is nothing to undo"
    spelt = str if "(" in what else _bare
    known = list(dict.fromkeys(spelt(c.signature) for gm in gms for c in commits(gm)))
    close = difflib.get_close_matches(what, known, n=2)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{what} is not in the history; {hint}`fxopt log {directory}` lists what is"


# --- the journal ----------------------------------------------------------------------------------------------------


def journal(gm: GraphModule, options: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """
    The history of ``gm`` as plain values, with a digest of the graph after each commit.

    ``options`` takes the tensors among the options of its transformations.
    """
    found = []
    trial, trained = share(gm), {id(t) for t in written(gm).values()}
    digests = []
    for count in reversed(range(len(commits(gm)))):
        digests.append(digest(trial))
        if lost := [path for path, t in written(trial).items() if id(t) not in trained]:
            after = commits(gm)[count + 1].signature
            raise StoreError(
                f"{', '.join(lost)} was written to before {after} was made, which cannot be made again from that; "
                f"undo {after} before saving"
            )
        checkout(trial, count, "discard")
    for commit, after in zip(commits(gm), reversed(digests), strict=True):
        if not commit.transformation.replayable and commit.delta:
            raise StoreError(f"{commit.signature} cannot be made again from the journal alone; undo it before saving")
        saved = catalogue.to_json(commit.transformation, options)  # type: ignore[arg-type]
        ids = [p.id for p in commit.parts]
        undone = sorted(commit.undone)
        found.append(saved | {"signature": commit.signature, "rewrites": ids, "undone": undone, "after": after})
    return found


def replay(
    gm: GraphModule, saved: Sequence[Mapping[str, Any]], options: Mapping[str, torch.Tensor] = MappingProxyType({})
) -> GraphModule:
    """Make the commits of a journal again on ``gm``, and check each against its digest."""
    for entry in saved:
        transformation = catalogue.from_json(entry, options)
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
    """Write ``value`` as JSON."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_journal(folder: Path, entry: dict[str, Any]) -> None:
    """Write the journal, with the hash of every file beside it, which tells an interrupted save from a whole one."""
    files = {p.name: file_hash(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != JOURNAL}
    versions = {"fxopt": fxopt.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    write_json(folder / JOURNAL, {"format": FORMAT, "versions": versions, "files": files} | entry)


def read_journal(folder: Path) -> dict[str, Any]:
    """The journal in ``folder``, after checking that it and the files it names belong together."""
    if not folder.is_dir():
        raise StoreError(f"{folder} is no folder; give one that fxopt.save or `fxopt optimize --save` wrote")
    if not (folder / JOURNAL).is_file():
        raise StoreError(f"{folder} has no {JOURNAL}; give a folder that fxopt.save or `fxopt optimize --save` wrote")
    entry = read_json(folder / JOURNAL)
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise StoreError(f"{folder / JOURNAL} is not of format {FORMAT}; it was saved by another version of fxopt")
    _check_fields(folder / JOURNAL, entry, _FIELDS)
    _check_fields(folder / JOURNAL, entry, _MODEL_FIELDS if entry["kind"] == "model" else {})
    for name, commits_of in entry["graphs"].items():
        _check_list(folder / JOURNAL, f"graphs[{name!r}]", commits_of, dict)
        for i, commit in enumerate(commits_of):
            _check_fields(folder / JOURNAL, commit, _COMMIT_FIELDS, f"graphs[{name!r}][{i}].")
    if entry["kind"] not in ("model", "graph") or (entry["kind"] == "graph" and [*entry["graphs"]] != [""]):
        raise StoreError(f"{folder / JOURNAL}: 'kind' is {entry['kind']!r}, which its graphs do not fit; save it again")
    for name, expected in entry["files"].items():
        if not (folder / name).is_file():
            raise StoreError(f"{folder} lacks {name}, which its journal names; save it again")
        if file_hash(folder / name) != expected:
            raise StoreError(f"{folder / name} is not the file that was saved with the journal; save it again")
    return entry


_FIELDS: dict[str, type | tuple[type]] = {"kind": str, "files": dict, "graphs": dict}
_MODEL_FIELDS: dict[str, type | tuple[type]] = {
    "class": str,
    "dtype": str,
    "inputs": dict,
    "order": (str,),
    "generation": bool,
    "dynamic": bool,
}
_COMMIT_FIELDS: dict[str, type | tuple[type]] = {
    "class": str,
    "options": dict,
    "signature": str,
    "rewrites": (str,),
    "undone": (str,),
    "after": str,
}


def _check_fields(
    path: Path, entry: Mapping[str, Any], fields: Mapping[str, type | tuple[type]], where: str = ""
) -> None:
    """Each field must be there and of its type; a tuple stands for a list of that type."""
    for key, kind in fields.items():
        if key not in entry:
            raise StoreError(f"{path} lacks {where + key!r}; the journal is damaged, save it again")
        if isinstance(kind, tuple):
            _check_list(path, where + key, entry[key], kind[0])
        elif not isinstance(entry[key], kind):
            _refuse(path, where + key, entry[key], kind.__name__)


def _check_list(path: Path, key: str, value: Any, kind: type) -> None:
    if not isinstance(value, list) or not all(isinstance(v, kind) for v in value):
        _refuse(path, key, value, f"a list of {kind.__name__}")


def _refuse(path: Path, key: str, value: Any, expected: str) -> NoReturn:
    raise StoreError(f"{path}: {key!r} is {value!r:.60}, expected {expected}; the journal is damaged, save it again")


def read_json(path: Path) -> Any:
    """The JSON value in ``path``; a StoreError says what is wrong with it."""
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
    """The tensors in ``path`` by name; a StoreError says what is wrong with it."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read ({error}); save it again") from error


def file_hash(path: Path) -> str:
    """The SHA-256 of the file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
