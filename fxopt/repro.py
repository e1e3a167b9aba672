"""A reproducer: a folder whose `repro.py` shows a failure again, with torch and fxopt alone."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule

import fxopt
from fxopt import catalogue, serial
from fxopt.checks import SLOWER, Against, Check, Failure, Slower, without_history
from fxopt.delta import graph_of, graphs, share, snapshot
from fxopt.difference import Difference, diff
from fxopt.errors import FxoptError, StoreError, TransformationError
from fxopt.reduce import Cut, reduce, shortest
from fxopt.report import report
from fxopt.samples import InputSet
from fxopt.transformation import Transformation

AGAIN = "the failure shows again"
_TIMEOUT = 600  # seconds for the fresh process

_HEAD = '''"""
$title

Needs torch and fxopt alone.  Exit code 1: the failure shows again; 0: it does not; 2: it could not be tried.
"""

import json
import sys
import traceback
from pathlib import Path

import fxopt
import fxopt.kernels  # registers the operators that a graph may call
import torch
from fxopt.serial import decode, from_json
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent


def graph(name):
    """A graph module: name.json with its tensors, those that both graphs read and its own."""
    tensors = load_file(HERE / "weights.safetensors") | load_file(HERE / f"{name}.safetensors")
    return from_json(json.loads((HERE / f"{name}.json").read_text()), tensors)

'''
_TAIL = """

if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 2
    sys.exit(code)
"""
_INPUTS = '''
def inputs():
    """The inputs in order, tensors (with the strides that they had) and numbers."""
    tensors, found = load_file(HERE / "inputs.safetensors"), []
    for entry in json.loads((HERE / "inputs.json").read_text()):
        value = tensors[entry["tensor"]] if "tensor" in entry else decode(entry["value"])
        if "stride" in entry:
            value = torch.empty_strided(value.shape, entry["stride"], dtype=value.dtype).copy_(value)
        found.append(value)
    return tuple(found)

'''
_COMPARE = '''
def main():
    """Hold the graph after the rewrite against the graph before it."""
    from fxopt.checks import failure_of

    before, after = graph("before"), graph("after")
    found = fxopt.verify(before, after, inputs(), n_drawn=0, rtol=$rtol, atol=$atol)
    failures = [failure_of(d) for d in found.outputs if not d.ok]
    again = [f for f in failures if f.kind == $kind]
    print(again[0].text if again else found.summary)
    print("$again" if again else "the failure does not show")
    return 1 if again else 0
'''
_TIME = '''
def main():
    """Time the graph after the rewrite against the graph before it."""
    before, after = graph("before"), graph("after")
    found = fxopt.benchmark(before, after, inputs(), memory=False)
    again = found.interval[0] > $threshold
    print(found.summary)
    print("$again" if again else "the failure does not show")
    return 1 if again else 0
'''
_PASS = '''
def main():
    """Apply the transformation to the graph on which it raised."""
    from fxopt.catalogue import from_json as transformation_from_json

    transformation = transformation_from_json(json.loads((HERE / "transformation.json").read_text()))
    try:
        transformation(graph("before"))
    except fxopt.errors.TransformationError as error:
        print(error)
        again = isinstance(error, fxopt.errors.IrreversibleEdit) or type(error.__cause__).__name__ == $kind
        print("$again" if again else "the failure does not show")
        return 1 if again else 0
    print("the failure does not show")
    return 0
'''
_SCRIPT = '''
def main():
    """Run the script that bisected, on the graph without the rewrite and on the graph with it."""
    import os
    import subprocess

    def run(graph):
        where = $folder if os.path.isdir($folder) else None
        environment = {**os.environ, "FXOPT_GRAPH": str(HERE / graph)}
        return subprocess.run($command, shell=True, env=environment, cwd=where).returncode

    if run("before") != 0:
        print("the script does not pass on the graph without the rewrite, so it tells nothing here")
        return 2
    code = run("after")
    again = 0 < code < 125
    print("$again" if again else "the failure does not show")
    return 1 if again else 0
'''


@dataclass(frozen=True)
class Repro:
    """
    A failure that can be shown again.

    ``size``: how many operations it has before and after.  ``confirmed``: whether a fresh process failed again;
    ``note`` says what it printed, or why there was none.
    """

    title: str
    facts: Mapping[str, Any]
    writers: tuple[Callable[[Path], None], ...] = field(repr=False)  # each adds its files
    size: tuple[int, int] = (0, 0)
    whole: bool = True
    confirmed: bool = False
    note: str = ""

    def save(self, directory: str | Path) -> Path:
        """Write the folder; what stands there under the same names is replaced once all is written."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
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


# ---------------------------------------------------------------------------------------------------- what goes into it


def of_rewrite(
    before: GraphModule,
    after: GraphModule,
    check: Check,
    failure: Failure,
    title: str,
    facts: Mapping[str, Any],
    tolerances: tuple[float | None, float | None] = (None, None),
) -> Repro | str:
    """
    A reproducer from the graphs without and with the guilty rewrites, cut down; or why there is none.

    For a check of the caller's own it shows what differs in value on the example inputs, if anything does.
    """
    case = next((c for c in check.cases if c.label == failure.input_set), check.cases[0] if check.cases else None)
    if case is None:
        return "without example_inputs there is nothing to run before and after on"
    before, after, case = _inside(before, after, case)
    own = not isinstance(check, Against | Slower)
    if own:
        failure = _difference(before, after, case, tolerances) or failure
        if failure.kind in ("check", "script") or failure.kind.startswith("raised"):
            return "the check is your own, and before and after compute the same on the example inputs"
    timed = isinstance(check, Slower)

    def fails(a: GraphModule, b: GraphModule, inputs: tuple[Any, ...]) -> bool:
        return _fails_alike(a, b, inputs, failure, tolerances)

    cut = reduce(before, after, case, fails, timed)
    if cut is None:
        return "before and after, run alone on the inputs that failed, do not differ in the same way"
    if timed:
        threshold = max(SLOWER, min(2.0, math.sqrt(_ratio(cut))))
        script = Template(_TIME).substitute(again=AGAIN, threshold=repr(round(threshold, 3)))
    else:
        script = Template(_COMPARE).substitute(
            again=AGAIN, rtol=repr(tolerances[0]), atol=repr(tolerances[1]), kind=repr(failure.kind)
        )
    writers = (
        lambda folder: _write_graphs(folder, {"before": cut.before, "after": cut.after}),
        lambda folder: _write_inputs(folder, cut),
        lambda folder: _write_script(folder, title, _INPUTS + script),
        lambda folder: _write_report(folder, title, diff(cut.before, cut.after)),
    )
    return Repro(title, facts, writers, cut.nodes, cut.whole)


def _write_report(folder: Path, title: str, difference: Difference) -> None:
    report(difference, folder / "report.html", title=title)


def _inside(before: GraphModule, after: GraphModule, case: InputSet) -> tuple[GraphModule, GraphModule, InputSet]:
    """The inner graph module in which alone the two differ, if there is one, with the inputs of its first call."""
    a, b = snapshot(before), snapshot(after)
    records = ((key, a.record(key), b.record(key)) for key in {**a.raw, **b.raw})
    paths = {graph_of(key) for key, old, new in records if old is None or not old.same(new)}
    if len(paths) != 1 or "" in paths:
        return before, after, case
    path, calls = next(iter(paths)), []
    twin = share(before)
    twin.get_submodule(path).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        case.clone().call(twin)
    if not calls:
        return before, after, case
    args, kwargs = calls[0]
    inner = InputSet(tuple(args), dict(kwargs), case.label, names=tuple(f"args[{i}]" for i in range(len(args)))).clone()
    old, new = (graphs(gm)[path] for gm in (before, after))
    return old, new, inner


def _difference(
    before: GraphModule, after: GraphModule, case: InputSet, tolerances: tuple[float | None, float | None]
) -> Failure | None:
    found = Against("outputs", before, case, *tolerances, n_drawn=0).judge(after)
    return found.failures[0] if found.failures else None


def _fails_alike(
    before: GraphModule,
    after: GraphModule,
    inputs: tuple[Any, ...],
    failure: Failure,
    tolerances: tuple[float | None, float | None],
) -> bool:
    try:
        if failure.kind == "slower":
            found = Slower(before, inputs).judge(after)
        else:
            found = Against("outputs", before, inputs, *tolerances, n_drawn=0).judge(after)
    except FxoptError:  # the part before the rewrite does not run alone
        return False
    return any(f.kind == failure.kind for f in found.failures)


def _ratio(cut: Cut) -> float:
    found = Slower(cut.before, cut.inputs).judge(cut.after)
    return found.failures[0].ratio if found.failures else 1.0


def of_pass(
    before: GraphModule, transformation: Transformation, error: BaseException, title: str, facts: Mapping[str, Any]
) -> Repro | str:
    """A reproducer of a transformation that raises; or why there is none."""
    try:
        saved = catalogue.to_json(transformation)
    except StoreError:
        return (
            f"{transformation.signature} has options that are no plain values, or is a function; it cannot be written"
        )
    source = _source(transformation)
    if isinstance(source, str):
        return source
    kind = type(error.__cause__).__name__
    before = shortest(without_history(before), functools.partial(_raises, transformation, error))
    writers: tuple[Callable[[Path], None], ...] = (
        lambda folder: _write_graphs(folder, {"before": before}),
        lambda folder: write_json(folder / "transformation.json", saved),
        lambda folder: _copy_files(folder, source),
        lambda folder: _write_script(folder, title, Template(_PASS).substitute(again=AGAIN, kind=repr(kind))),
    )
    size = sum(n.op.startswith("call_") for n in before.graph.nodes)
    return Repro(title, facts, writers, (size, size))


def _raises(transformation: Transformation, expected: BaseException, part: GraphModule) -> bool:
    """Whether ``transformation`` raises likewise on ``part``, as it is after being written and read."""
    try:
        again = serial.from_json(*serial.to_json(part))
    except (StoreError, RuntimeError, TypeError, ValueError):  # it cannot be written, or its shapes do not fit together
        return False
    try:
        transformation(again)
    except TransformationError as error:
        return type(error) is type(expected) and type(error.__cause__) is type(expected.__cause__)
    return False


def _source(transformation: Transformation) -> list[Path] | str:
    """The file to put beside the reproducer, so that the class can be imported from there; or why it cannot be."""
    kind = type(transformation)
    if "<locals>" in kind.__qualname__ or kind.__module__ == "__main__":
        return f"{kind.__qualname__} cannot be imported in another process; put it into a module"
    if kind.__module__.partition(".")[0] == "fxopt" or "." in kind.__module__:
        return []
    try:
        return [Path(inspect.getfile(kind))]
    except (TypeError, OSError):  # built in, or made without a file
        return f"the file of {kind.__qualname__} is not there any more"


def of_script(
    before: GraphModule, after: GraphModule, case: InputSet, command: str, title: str, facts: Mapping[str, Any]
) -> Repro:
    """A reproducer of what a script says of a graph: the graph without the rewrite and with it, and the command."""
    from fxopt.checks import write_graph

    body = Template(_SCRIPT).substitute(again=AGAIN, command=repr(command), folder=repr(os.getcwd()))
    writers = (
        lambda folder: write_graph(before, folder / "before", case),
        lambda folder: write_graph(after, folder / "after", case),
        lambda folder: _write_script(folder, title, body),
        lambda folder: _write_report(folder, title, diff(before, after)),
    )
    size = sum(n.op.startswith("call_") for n in after.graph.nodes)
    return Repro(title, facts, writers, (size, size))


# ---------------------------------------------------------------------------------------------------------------- files


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def _copy_files(folder: Path, files: Sequence[Path]) -> None:
    for path in files:
        shutil.copyfile(path, folder / path.name)


def _write_script(folder: Path, title: str, body: str) -> None:
    plain = title.replace("\\", "\\\\").replace('"""', "'''")
    (folder / "repro.py").write_text(Template(_HEAD).substitute(title=plain) + body + _TAIL)


def _write_graphs(folder: Path, graphs: Mapping[str, GraphModule]) -> None:
    """Each graph as JSON; the tensors that all of them hold at the same path once, the others beside each."""
    written = {name: serial.to_json(gm) for name, gm in graphs.items()}
    for name, (graph, _) in written.items():
        write_json(folder / f"{name}.json", graph)
    first = next(iter(written.values()))[1]
    shared = {p: t for p, t in first.items() if all(_same(t, tensors.get(p)) for _, tensors in written.values())}
    _write_tensors(folder / "weights.safetensors", shared)
    for name, (_, tensors) in written.items():
        _write_tensors(folder / f"{name}.safetensors", {p: t for p, t in tensors.items() if p not in shared})


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and (a.data_ptr(), a.shape, a.stride(), a.dtype) == (
        b.data_ptr(),
        b.shape,
        b.stride(),
        b.dtype,
    )


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Those that share memory are written as copies; safetensors has no views."""
    if packed := [p for p, t in tensors.items() if t.layout is not torch.strided]:
        raise StoreError(f"{packed[0]} is {tensors[packed[0]].layout}, which safetensors cannot hold")
    save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()}, path)


def _write_inputs(folder: Path, cut: Cut) -> None:
    tensors = {f"{i}": v for i, v in enumerate(cut.inputs) if isinstance(v, Tensor)}
    _write_tensors(folder / "inputs.safetensors", tensors)
    listed: list[dict[str, Any]] = []
    for i, (name, value) in enumerate(zip(cut.names, cut.inputs, strict=True)):
        if isinstance(value, Tensor):
            stride = {} if value.is_contiguous() or 0 in value.stride() else {"stride": list(value.stride())}
            listed.append({"name": name, "tensor": str(i), **stride})
        else:
            listed.append({"name": name, "value": serial.encode(value, f"the input {name}")})
    write_json(folder / "inputs.json", listed)
