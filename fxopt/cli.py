"""The command line: arguments only.  Exit codes: 0 done, 1 verification failed, 2 wrong usage."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
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

# Options that several commands share.
Model = Annotated[str, typer.Argument(help="A built-in name (see `fxopt models`), a local folder, or a hub name.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Passes = Annotated[
    str, typer.Option(help="default, or NAME,NAME(option=value),… (see `fxopt passes`); yours as FILE.py:NAME.")
]
NumRuns = Annotated[int, typer.Option(min=1, help="Most rounds timed for each comparison.")]
Warmup = Annotated[int, typer.Option(min=0, help="Rounds run before timing.")]
Text = Annotated[str | None, typer.Option(help="Input text, where the model has a tokenizer.")]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Sequence length in tokens; by default 128, or the most the model takes.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples in a batch.")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64; as the model has it.")]
RTol = Annotated[float | None, typer.Option(min=0, help="Relative tolerance of the verification.")]
ATol = Annotated[float | None, typer.Option(min=0, help="Absolute tolerance of the verification.")]
Benchmark = Annotated[bool, typer.Option(help="Time every step.")]
Context = Annotated[int, typer.Option(min=0, help="Unchanged lines around each change.")]


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
    model: Model,
    device: Device = "cpu",
    passes: Passes = "default",
    num_runs: NumRuns = 30,
    warmup: Warmup = 3,
    text: Text = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 1,
    dtype: DType = None,
    rtol: RTol = None,
    atol: ATol = None,
    benchmark: Benchmark = True,
    limit: Annotated[
        str | None, typer.Option(help="Stop early: PASS, or PASS:1-30 for its first 30 rewrites (see `fxopt bisect`).")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the result to this folder.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the table to this file.")] = None,
    report_: Annotated[Path | None, typer.Option("--report", help="Write a report to this file, as HTML.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the end-to-end rounds to this file, for Perfetto.")] = None,
) -> None:
    """Capture a model, run the passes, each verified and timed, and print the table."""
    from fxopt import catalogue, frontend
    from fxopt.report import check_writable

    _check_writable(save, json_)
    for option, path in (("--report", report_), ("--trace", trace)):
        if path is not None:
            check_writable(path, option)
    if trace is not None and not benchmark:
        raise UsageError("--trace writes what is timed, and --no-benchmark times nothing; leave one of them out")
    catalogue.parse(passes, device.partition(":")[0])  # a typo is said before the model is loaded
    with err.status(f"loading {model}"):
        loaded = frontend.load(model, device=device, dtype=dtype)
        inputs = frontend.inputs(loaded, model, text=text, max_length=max_length, batch_size=batch_size)
    result = frontend.optimize(
        loaded,
        inputs,
        model,
        passes,
        rtol,
        atol,
        benchmarked=benchmark,
        rounds=num_runs,
        warmup=warmup,
        limit=limit,
    )
    out.print(result)
    if json_ is not None:
        write_aside(json_, json.dumps(result.to_json(), indent=1) + "\n")
    if trace is not None and result.comparison is not None:
        result.comparison.chrome_trace(trace)
    if report_ is not None:
        result.report(report_)
        out.print(f"report in {report_}", highlight=False, markup=False)
    if save is not None:
        result.save(save)
        if not result.keeps_class:
            kind = type(loaded).__name__
            out.print(f"saved as a graph: fxopt.load gives a graph module, no {kind}", highlight=False)
        for failed in result.failed:  # whoever loads it should know
            out.print(f"saved with a failure in {failed}", style="red", highlight=False, markup=False)
        out.print(f"saved to {save}; `fxopt log {save}` shows its history", highlight=False)
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def bisect(
    model: Model,
    passes: Passes = "default",
    check: Annotated[str | None, typer.Option(help="What fails: outputs (the default), nan, crash or slower.")] = None,
    script: Annotated[
        str | None,
        typer.Option(
            help="A command that judges the graph in the folder $FXOPT_GRAPH (fxopt.load reads it): "
            "exit 0 good, 125 cannot tell, 1 to 127 bad, above abort."
        ),
    ] = None,
    rtol: RTol = None,
    atol: ATol = None,
    out_: Annotated[
        Path | None, typer.Option("--out", help="Keep the journal, the result and the reproducer in this folder.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the journal in --out.")] = False,
    repeat: Annotated[
        int, typer.Option(min=1, help="Ask so often of each graph: a check that says several things is flaky.")
    ] = 1,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the result to this file; - is stdout.")] = None,
    graph: Annotated[str | None, typer.Option(help="Only this graph: forward, prefill, decode, …")] = None,
    device: Device = "cpu",
    text: Text = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 1,
    dtype: DType = None,
) -> None:
    """Find the pass, and the one rewrite of it, that makes a model fail.  Exit codes: 0 found, 1 not, 2 wrong usage."""
    from fxopt import catalogue, frontend

    to_stdout = json_ is not None and str(json_) == "-"
    _check_writable(out_, None if to_stdout else json_, "--out")
    _check_question(check, script, rtol, atol)
    if resume and out_ is None:
        raise UsageError("--resume needs the folder of the run to resume; give --out DIR")
    told = err if to_stdout else out

    def say(line: str) -> None:
        told.print(line, highlight=False, markup=False, soft_wrap=True)

    catalogue.parse(passes, device.partition(":")[0])  # a typo is said before the model is loaded
    with err.status(f"loading {model}"):
        loaded = frontend.load(model, device=device, dtype=dtype)
        inputs = frontend.inputs(loaded, model, text=text, max_length=max_length, batch_size=batch_size)
    name, found = frontend.bisect(
        loaded, inputs, passes, check or "outputs", script, graph, rtol, atol, out_, resume, say, repeat
    )
    for line in found.lines(limits=False):
        say(line)
    given: dict[str, object] = {"--device": device, "--dtype": dtype, "--text": text, "--max-length": max_length}
    given |= {"--batch-size": batch_size, "--rtol": rtol, "--atol": atol}
    rerun = ["fxopt", "optimize", model, "--passes", passes]
    rerun += [str(v) for pair in given.items() for v in pair if pair[1] is not None]
    for what, limit in (("last good", found.last_good), ("first bad", found.first_bad)):
        if limit is not None:
            say(f"{what}: {shlex.join([*rerun, '--limit', limit])}")
    result = json.dumps({"model": model, "graph": name, **found.to_json()}, indent=1) + "\n"
    if out_ is not None:
        out_.mkdir(parents=True, exist_ok=True)
        write_aside(out_ / "result.json", result)
    if to_stdout:
        sys.stdout.write(result)
    elif json_ is not None:
        write_aside(json_, result)
    if found.found:
        place = None if out_ is None else out_ if name == "forward" else out_ / name.replace(" ", "-")
        say(f"reproduce: python {place / 'repro' / 'repro.py'}" if place else "give --out DIR to keep the reproducer")
    raise typer.Exit(0 if found.found else 1)


def _check_question(check: str | None, script: str | None, rtol: float | None, atol: float | None) -> None:
    """Refuse what the options of `bisect` ask for and nothing would answer."""
    from fxopt.checks import NAMES

    if script is not None and check is not None:
        raise UsageError(f"--check {check} was given beside --script; give one of them")
    if script is not None and not script.strip():
        raise UsageError("--script is empty; give a command that judges the graph in the folder $FXOPT_GRAPH")
    if check not in (None, *NAMES):
        raise UsageError(f"--check {check} is not known, expected one of {', '.join(NAMES)}")
    if (script is not None or check not in (None, "outputs")) and (rtol, atol) != (None, None):
        asked = "--script" if script is not None else f"--check {check}"
        raise UsageError(f"--rtol and --atol are for --check outputs, and {asked} does not use them; leave them out")


@app.command()
def report(
    model: Model,
    device: Device = "cpu",
    passes: Passes = "default",
    num_runs: NumRuns = 30,
    warmup: Warmup = 3,
    text: Text = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 1,
    dtype: DType = None,
    rtol: RTol = None,
    atol: ATol = None,
    benchmark: Benchmark = True,
    to: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("report.html"),
) -> None:
    """Do what `optimize` does, and write it up as one HTML file."""
    options: dict[str, Any] = {name: value for name, value in locals().items() if name != "to"}
    from fxopt.report import check_writable

    check_writable(to, "--out")
    optimize(**options, report_=to)


@app.command()
def sparsify(
    model: Model,
    pattern: Annotated[
        list[str] | None, typer.Option(help="Layers: a regular expression that a whole path matches; may be repeated.")
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="The share of blocks to keep, in (0, 1]: one, or one for each pattern.")
    ] = None,
    unstructured: Annotated[
        float | None,
        typer.Option(help="Instead of blocks: make this share of each weight zeros, wherever they are, such as 0.95."),
    ] = None,
    block: Annotated[str, typer.Option(help="Rows × columns of a block, such as 32x32; or 2:4.")] = "32x32",
    select: Annotated[
        str, typer.Option(help="magnitude, activation, balanced, existing (lossless), or random(SEED).")
    ] = "magnitude",
    rescale: Annotated[bool, typer.Option(help="Scale outputs to make up for what is left out.")] = False,
    guard: Annotated[str, typer.Option(help="auto leaves dense what is no faster; off forces.")] = "auto",
    tokens: Annotated[str, typer.Option(help="Numbers of rows to time a layer with, such as 1,128.")] = "128",
    device: Device = "cpu",
    num_runs: NumRuns = 30,
    warmup: Warmup = 3,
    text: Text = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 1,
    dtype: DType = None,
    benchmark: Benchmark = True,
    save: Annotated[Path | None, typer.Option(help="Write the result to this folder.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the tables to this file.")] = None,
) -> None:
    """Make weights sparse, and faster so: in blocks, layers by name, or with --unstructured anywhere."""
    from fxopt import frontend
    from fxopt import sparsify as sparsifying

    _check_writable(save, json_)
    if unstructured is not None:
        of_blocks = {"--density": density, "--block": block != "32x32", "--select": select != "magnitude"}
        of_blocks |= {"--rescale": rescale, "--tokens": tokens != "128"}
        if given := [option for option, said in of_blocks.items() if said]:
            raise UsageError(f"{given[0]} was given beside --unstructured; it is for blocks: give one of them")
    if unstructured is not None and not 0 <= unstructured <= 1:
        raise UsageError(f"--unstructured {unstructured} was given; expected a share from 0 to 1, such as 0.95")
    shape = block if block == "2:4" else _numbers(block, "x", "--block", "32x32")
    rows = _numbers(tokens, ",", "--tokens", "1,128")
    patterns = {}
    if unstructured is None:
        patterns = sparsifying.patterns_of(pattern or (), density or (), block=shape, select=select, rescale=rescale)
    with err.status(f"loading {model}"):
        loaded = frontend.load(model, device=device, dtype=dtype)
        inputs = frontend.inputs(loaded, model, text=text, max_length=max_length, batch_size=batch_size)
    if unstructured is not None:
        found = sparsifying.sparsify_unstructured(
            loaded, inputs, unstructured, pattern or (), guard, benchmark, num_runs, warmup
        )
    else:
        found = sparsifying.sparsify(loaded, inputs, patterns, guard, rows, benchmark, num_runs, warmup)
    if save is not None and len(found) > 1:
        raise UsageError(f"--save writes one graph, and {model} has {len(found)}; leave it out")
    for one in found:
        out.print(one)
        if one.summary:
            out.print(one.summary, highlight=False)
        if save is not None:
            one.save(save)
            out.print(
                f"saved to {save}; `fxopt log {save}` shows its history, `fxopt undo` takes it back", highlight=False
            )
    if json_ is not None:
        write_aside(json_, json.dumps([one.to_json() for one in found], indent=1) + "\n")


def _numbers(text: str, between: str, option: str, example: str) -> tuple[int, ...]:
    parts = text.replace("×", "x").split(between)
    if not all(part.strip().isdecimal() for part in parts):  # isdigit takes ², int does not
        raise UsageError(f"{option} {text} was given, expected numbers such as {example}")
    return tuple(map(int, parts))


@app.command()
def prune(
    what: Annotated[str, typer.Argument(metavar="MODEL | CONFIG.toml", help="A model, or a file that says it all.")],
    target: Annotated[
        float | None, typer.Option(help="Remove trees until this share of the parameters has gone (0 to 1).")
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Remove this many trees.")] = None,
    score: Annotated[str, typer.Option(help="default, greedy, block_influence, taylor, magnitude, …")] = "default",
    loss: Annotated[str, typer.Option(help="distance (from the dense outputs), loss or error_rate.")] = "distance",
    fit: Annotated[bool, typer.Option("--fit", help="Put a fitted linear layer in the place of each tree.")] = False,
    per_ms: Annotated[bool, typer.Option("--per-ms", help="Divide scores by the measured time saved.")] = False,
    types: Annotated[str, typer.Option(help="Kinds of trees, separated by commas.")] = "branch,block",
    exclude: Annotated[str, typer.Option(help="Words in module names to leave alone, separated by commas.")] = "",
    data: Annotated[str | None, typer.Option(help="A text file to calibrate and evaluate on.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Only print the trees.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Write the trees as an SVG to this file.")] = None,
    importances: Annotated[Path | None, typer.Option(help="Write the ranking to this CSV, and JSON beside it.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the result to this folder.")] = None,
    formats: Annotated[str, typer.Option(help="What to write: fxopt, pt2, onnx.")] = "fxopt",
    workers: Annotated[int, typer.Option(min=0, help="Processes to score in; 0 is this one.")] = 0,
    scratch: Annotated[
        Path | None, typer.Option(help="Keep what was scored in this folder: the same call goes on from it.")
    ] = None,
    evaluate: Annotated[bool, typer.Option(help="Measure on other data before and after.")] = True,
    device: Device = "cpu",
    max_length: MaxLength = None,
    batch_size: BatchSize = 2,
    seed: Annotated[int, typer.Option(help="Of the calibration data.")] = 0,
) -> None:
    """Take out of a model what it does not need: find its pruning trees, score them, remove the least important."""
    from fxopt.pruning import config as pruning

    said: dict[str, Any] = {"pruning_iterations": iterations, "target_sparsity": target, "score": score, "loss": loss}
    said |= {"fit": fit, "per_ms": per_ms, "types": _words(types), "exclude": _words(exclude), "data": data}
    said |= {"formats": _words(formats), "workers": workers, "evaluate": evaluate, "device": device, "seed": seed}
    said |= {"max_length": max_length, "batch_size": batch_size}
    said |= {"importances_save_path": None if importances is None else str(importances)}
    said |= {"pruned_model_save_dir": None if save is None else str(save)}
    said |= {"scratch_dir": None if scratch is None else str(scratch)}
    if list_ or picture is not None:
        _list_trees(what, picture, device, max_length, batch_size)
        return
    if what.endswith(".toml"):
        config = pruning.PruneConfig.read(what)
    else:
        config = pruning.PruneConfig.of({"model": what, **said}, "the command line")
    with Progress(*Progress.get_default_columns(), console=err, transient=True, disable=not err.is_terminal) as bar:
        scoring = bar.add_task("scoring", total=None)
        result = pruning.run(
            config,
            say=lambda line: err.print(line, highlight=False, markup=False),
            progress=lambda done, jobs: bar.update(scoring, completed=done, total=jobs),
        )
    out.print(result.pruned)
    for name, value in result.after.items():
        line = f"{name}: {result.before[name]:.4g} -> {value:.4g} on data that no score has seen"
        out.print(line, highlight=False, markup=False)
    for path in result.written:
        out.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


def _list_trees(model: str, picture: Path | None, device: str, max_length: int | None, batch_size: int) -> None:
    from fxopt import frontend
    from fxopt.pruning import trees
    from fxopt.pruning.config import captured

    if model.endswith(".toml"):
        raise UsageError(f"--list and --picture take a model, and {model} is a configuration; name the model")
    with err.status(f"loading {model}"):
        loaded = frontend.load(model, device=device, dtype=None)
        gm = captured(loaded, frontend.inputs(loaded, model, max_length=max_length, batch_size=batch_size))
    found = trees(gm)
    out.print(found)
    if picture is not None:
        write_aside(picture, found.picture())


def _words(text: str) -> tuple[str, ...]:
    return tuple(w.strip() for w in text.split(",") if w.strip())


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
    patch: Annotated[bool, typer.Option("--patch", "-p", help="Show what each commit changed.")] = False,
    context: Context = 1,
) -> None:
    """Show the history of a saved result."""
    from fxopt.store import read_journal, saved_graphs, saved_patches

    if patch:
        for name, difference in saved_patches(directory):
            if name:
                out.print(name, style="bold", highlight=False, markup=False)
            out.print(difference.rich(context), highlight=False)
        return

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
def diff(
    a: Annotated[Path, typer.Argument(help="A folder that `fxopt optimize --save` wrote.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    context: Context = 1,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Show two saved results side by side: what differs, and which transformation did it."""
    from fxopt.store import saved_differences

    _check_writable(None, json_)
    with err.status(f"loading {a} and {b}"):
        found = saved_differences(a, b)
    for difference in found.values():
        out.print(difference.rich(context), highlight=False)
    if json_ is not None:
        write_aside(json_, json.dumps({name: d.to_json() for name, d in found.items()}, indent=1) + "\n")


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


def _check_writable(save: Path | None, json_: Path | None, option: str = "--save") -> None:
    """Say so before the work is done, not after."""
    if save is not None and save.exists() and not save.is_dir():
        raise UsageError(f"{option} {save} is a file, expected a folder; give another path")
    if save is not None:
        try:  # permissions do not tell: root may write anywhere, and yet not into /proc
            place = next(p for p in (save.resolve(), *save.resolve().parents) if p.exists())
            os.rmdir(tempfile.mkdtemp(prefix=".saving-", dir=place))
        except OSError as error:
            raise UsageError(f"{option} {save} cannot be written: {error.strerror}; give another path") from error
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
