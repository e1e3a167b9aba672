"""The command line: arguments only.  Exit codes: 0 done, 1 verification failed, 2 wrong usage."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fxopt.errors import FxoptError, UsageError, VerificationError

app = typer.Typer(
    name="fxopt",
    help="Git for model graphs: verified, timed and reversible transformations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_WIDE = None if sys.stdout.isatty() else 120  # a table in a pipe or a file need not fit a terminal
out, err = Console(width=_WIDE), Console(stderr=True)


def main() -> None:
    """Run the command line; an error of fxopt is one line and exit code 2 (1 where a verification failed)."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would run through the tables
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app(standalone_mode=True)
    except VerificationError as error:
        err.print(f"fxopt: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except FxoptError as error:
        err.print(f"fxopt: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("fxopt: interrupted; nothing was written")
        sys.exit(130)


@app.command()
def optimize(
    model: Annotated[str, typer.Argument(help="A built-in name (see `fxopt models`), a local folder, or a hub name.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    passes: Annotated[
        str, typer.Option(help="default, or NAME,NAME(option=value),… (see `fxopt passes`).")
    ] = "default",
    num_runs: Annotated[int, typer.Option(min=1, help="Most rounds timed for each comparison.")] = 30,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds run before timing.")] = 3,
    text: Annotated[str | None, typer.Option(help="Input text, where the model has a tokenizer.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Sequence length in tokens; by default 128, or the most the model takes.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or float64; as the model has it.")
    ] = None,
    rtol: Annotated[float | None, typer.Option(min=0, help="Relative tolerance of the verification.")] = None,
    atol: Annotated[float | None, typer.Option(min=0, help="Absolute tolerance of the verification.")] = None,
    benchmark: Annotated[bool, typer.Option(help="Time every step.")] = True,
    save: Annotated[Path | None, typer.Option(help="Write the result to this folder.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the table to this file.")] = None,
) -> None:
    """Capture a model, run the passes, each verified and timed, and print the table."""
    from fxopt import frontend

    _check_writable(save, json_)
    with err.status(f"loading {model}"):
        loaded = frontend.load(model, device=device, dtype=dtype)
        inputs = frontend.inputs(loaded, model, text=text, max_length=max_length, batch_size=batch_size)
    result = frontend.optimize(
        loaded, inputs, model, passes, rtol, atol, benchmarked=benchmark, rounds=num_runs, warmup=warmup
    )
    out.print(result)
    if json_ is not None:
        write_aside(json_, json.dumps(result.to_json(), indent=1) + "\n")
    if save is not None:
        result.save(save)
        if not result.keeps_class:
            kind = type(loaded).__name__
            out.print(f"saved as a graph: fxopt.load gives a graph module, no {kind}", highlight=False)
        out.print(f"saved to {save}; `fxopt log {save}` shows its history", highlight=False)
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def models() -> None:
    """List the built-in models: configurations with random weights, offline."""
    from fxopt.models import describe

    table = Table("name", "family", "parameters", "what it is")
    for d in describe():
        table.add_row(d.name, d.family, f"{d.parameters / 1e6:.1f} M", d.summary)
    out.print(table)


@app.command()
def passes() -> None:
    """List the catalogue of passes with their equations."""
    from rich.markup import escape

    from fxopt.catalogue import catalogue, equation, summary

    table = Table("pass", "equation", "", show_lines=True)
    for name, kind in catalogue().items():
        table.add_row(name, escape(equation(kind)), escape(summary(kind)))
    out.print(table)


@app.command()
def log(
    directory: Annotated[Path, typer.Argument(help="A folder that `fxopt optimize --save` wrote.")],
    rewrites: Annotated[bool, typer.Option(help="List every rewrite.")] = False,
) -> None:
    """Show the history of a saved result."""
    from fxopt.store import read_journal, saved_graphs

    for name, entries in saved_graphs(read_journal(directory)).items():
        table = Table("#", "transformation", "rewrites", "undone", title=name or None, title_justify="left")
        for i, entry in enumerate(entries):
            ids = entry["rewrites"]
            table.add_row(
                str(i), entry["signature"], str(len(ids)) if ids else "did nothing", str(len(entry["undone"]) or "")
            )
            for rewrite in ids if rewrites else ():
                table.add_row("", f"  {rewrite}", "", "undone" if rewrite in entry["undone"] else "", style="dim")
        out.print(table)


@app.command()
def undo(
    directory: Annotated[Path, typer.Argument(help="A folder that `fxopt optimize --save` wrote.")],
    what: Annotated[
        str, typer.Argument(help="The signature or the name of a transformation, or its number in the log.")
    ],
    rewrite: Annotated[
        str | None, typer.Option(help="Undo this one rewrite of it (see `fxopt log --rewrites`).")
    ] = None,
    graph: Annotated[str | None, typer.Option(help="Only in this graph, where the result has several.")] = None,
) -> None:
    """Undo one transformation of a saved result, whole or one rewrite, and save again."""
    from fxopt.store import undo_saved

    for line in undo_saved(directory, what, rewrite, graph):
        out.print(line, highlight=False, markup=False)


def _check_writable(save: Path | None, json_: Path | None) -> None:
    """Say so before the work is done, not after."""
    if save is not None and save.exists() and not save.is_dir():
        raise UsageError(f"--save {save} is a file, expected a folder; give another path")
    if json_ is not None and (json_.is_dir() or not json_.resolve().parent.is_dir()):
        raise UsageError(
            f"--json {json_} cannot be written: it is a folder or its folder does not exist; give a file name"
        )


def write_aside(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step: whoever interrupts leaves the old file."""
    handle, name = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
