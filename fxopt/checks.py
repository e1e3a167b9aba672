"""What a bisection asks of a graph: whether it fails, and whether it is the same failure."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import math
import os
import shlex
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.fx import GraphModule

from fxopt.benchmark import benchmark
from fxopt.errors import FxoptError, UsageError
from fxopt.measurement import Comparison
from fxopt.portable import digest
from fxopt.samples import InputSet, normal_form
from fxopt.search import Verdict
from fxopt.verify import Baseline, Difference

NAMES = ("outputs", "nan", "crash", "slower")
OTHERWISE = "fails otherwise"  # how the note begins of a graph with another failure than the one looked for
SLOWER = 1.05  # a ratio below this is no regression that a bisection could follow


@dataclass(frozen=True)
class Failure:
    """One way to fail: what kind, at which output, in one line; on which input set; the ratio of a slower one."""

    kind: str
    where: str = ""
    text: str = ""
    input_set: str = ""
    ratio: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The failure as plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Judgement:
    """What a check says of one graph: its failures, the worst first; `skip` says why it cannot be judged."""

    failures: tuple[Failure, ...] = ()
    text: str = ""
    skip: str = ""

    def verdict(self, wanted: Failure | None) -> tuple[Verdict, str]:
        """Good or bad, and why; only the failure ``wanted`` is bad, where there is one.

        Another failure elsewhere is not the one that is looked for.  Another failure at the same place, or one that
        left nothing to compare, may hide it: skip.
        """
        if self.skip:
            return "skip", self.skip
        if not self.failures:
            return "good", self.text
        worst = self.failures[0]
        if wanted is None:
            return "bad", worst.text
        for failure in self.failures:
            if (failure.kind, failure.where) == (wanted.kind, wanted.where):
                return "bad", failure.text
        hidden = any(f.where == wanted.where or not f.where for f in self.failures)
        return "skip" if hidden else "good", f"{OTHERWISE}: {worst.text}"


class Check(ABC):
    """A question asked of a graph; the same answer for the same graph, as far as that can be had."""

    name: str
    cases: tuple[InputSet, ...] = ()  # what it runs a graph on

    @abstractmethod
    def judge(self, gm: GraphModule) -> Judgement:
        """What of ``gm`` fails."""

    def remember(self, failure: Failure) -> None:  # noqa: B027 - few checks need it
        """Take note of the failure that is looked for."""

    def about(self) -> dict[str, Any]:
        """What tells this check from another, as plain values."""
        return {"check": self.name}


def make(
    check: str | Callable[[GraphModule], bool | None],
    original: GraphModule,
    inputs: Any,
    rtol: float | None = None,
    atol: float | None = None,
) -> Check:
    """The check of that name, or the one that a callable makes; raises `UsageError` for anything else."""
    if callable(check):
        return ByCall(check, original, inputs)
    if check not in NAMES:
        raise UsageError(f"check is {check!r}, expected one of {', '.join(NAMES)}, or a function gm -> bool | None")
    if inputs is None:
        raise UsageError(f"check={check!r} needs inputs to run the model on; give example_inputs=…")
    return Slower(original, inputs) if check == "slower" else Against(check, original, inputs, rtol, atol)


_KINDS = (  # by how a Difference's reason begins
    ("raised ", "raised"),
    ("has dtype", "dtype"),
    ("has shape", "shape"),
    ("has device", "device"),
    ("has layout", "layout"),
    ("has strides", "strides"),
    ("is not finite", "not finite"),
    ("differs", "values"),
    ("is written to", "written"),
    ("writes this buffer", "written"),
    ("does not write", "not written"),
)


def failure_of(difference: Difference) -> Failure:
    """A failed `Difference` as a failure."""
    reason = difference.reason
    kind = next((kind for start, kind in _KINDS if reason.startswith(start)), "structure")
    kind = "aliasing" if "shares memory" in reason else kind
    where = "" if kind in ("raised", "structure") else difference.name
    if kind == "raised":
        kind = f"raised {reason.removeprefix('raised ').partition(':')[0]}"
    return Failure(kind, where, str(difference), difference.input_set)


class Against(Check):
    """Held against what the original computes (`fxopt.verify`): all of it, only NaN and Inf, or only what raises."""

    def __init__(
        self,
        name: str,
        original: GraphModule,
        inputs: Any,
        rtol: float | None = None,
        atol: float | None = None,
        n_drawn: int = 4,
    ) -> None:
        self.name, self.rtol, self.atol = name, rtol, atol
        self.baseline = Baseline(original, inputs, rtol=rtol, atol=atol, n_drawn=n_drawn)
        self.cases = tuple(case.inputs for case in self.baseline.cases)

    def judge(self, gm: GraphModule) -> Judgement:
        with contextlib.redirect_stderr(io.StringIO()):  # torch.fx prints where a graph raises; the failure says it
            found = self.baseline.verify(gm)
        ranked = sorted(found.outputs, key=lambda d: (-d.severity, -d.max_abs))
        failures = tuple(failure_of(d) for d in ranked if not d.ok)
        if self.name == "outputs" or not failures:
            return Judgement(failures, found.summary)
        raised = tuple(f for f in failures if f.kind.startswith("raised"))
        if self.name == "crash":
            return Judgement(raised, "runs")
        if raised:
            return Judgement(skip=raised[0].text)
        return Judgement(tuple(f for f in failures if f.kind == "not finite"), "finite where the original is")

    def about(self) -> dict[str, Any]:
        return {"check": self.name, "rtol": self.rtol, "atol": self.atol}


class Slower(Check):
    """
    Timed against the original, in interleaved rounds (`fxopt.benchmark`).

    Whatever is nearer to the slow result than to the original is slow: above the square root of its ratio.
    """

    name = "slower"
    _ROUNDS = (30, 60, 120)  # as long as the interval spans the threshold

    def __init__(self, original: GraphModule, inputs: Any) -> None:
        self.original, self.inputs, self.threshold = original, inputs, SLOWER
        self.cases = tuple(normal_form(inputs, original))

    def judge(self, gm: GraphModule) -> Judgement:
        for rounds in self._ROUNDS:
            found = self._compare(gm, rounds)
            low, high = found.interval
            if low > self.threshold:
                text = f"{found.ratio:.2f} × the original's latency"
                return Judgement((Failure("slower", "latency", text, ratio=found.ratio),))
            if high <= self.threshold:
                return Judgement(text=f"{found.ratio:.2f} × the original's latency")
        return Judgement(
            skip=f"{found.ratio:.2f} [{low:.2f}, {high:.2f}] × the original's latency cannot be told apart"
        )

    def _compare(self, gm: GraphModule, rounds: int) -> Comparison:
        return benchmark(self.original, gm, self.inputs, rounds=rounds, memory=False, precision=0.02, max_time=5.0)

    def remember(self, failure: Failure) -> None:
        self.threshold = max(SLOWER, math.sqrt(failure.ratio))


class ByCall(Check):
    """A function of a graph module: True is good, False is bad, None cannot be judged; an exception is a failure."""

    name = "callable"

    def __init__(
        self, function: Callable[[GraphModule], bool | None], original: GraphModule, inputs: Any = None
    ) -> None:
        self.function = function
        self.cases = () if inputs is None else tuple(normal_form(inputs, original))

    def judge(self, gm: GraphModule) -> Judgement:
        return self.judge_on(gm)

    def judge_on(self, gm: GraphModule, case: InputSet | None = None) -> Judgement:
        """The same of a part of the graph; a function has its own inputs."""
        try:
            said = self.function(copy.deepcopy(gm))  # it may do what it likes to its graph, gm.double() too
            good = None if said is None else bool(said)
        except Exception as error:  # noqa: BLE001 - the check is anybody's code, and to raise is to fail
            first = (str(error).splitlines() or [""])[0]
            return Judgement((Failure(f"raised {type(error).__name__}", "", f"{type(error).__name__}: {first}"),))
        if good is None:
            return Judgement(skip="the check cannot judge it")
        return Judgement() if good else Judgement((Failure("check", "check", "the check says no"),))

    def about(self) -> dict[str, Any]:
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return {"check": name, "code of the check": digest(self.function)}


GRAPH = "FXOPT_GRAPH"  # the variable that names the folder with the graph


class ByScript(Check):
    """
    A command with git-bisect's exit codes: 0 good, 125 cannot be judged, any other up to 127 bad, above that abort.

    It finds the graph in the folder that ``$FXOPT_GRAPH`` names, for `fxopt.load`, and beside it inputs.safetensors,
    the example inputs that are tensors, by name.
    """

    name = "script"

    def __init__(self, command: str, original: GraphModule, inputs: Any) -> None:
        self.command = command
        self.cases = tuple(normal_form(inputs, original))

    def judge(self, gm: GraphModule) -> Judgement:
        return self.judge_on(gm, self.cases[0])

    def judge_on(self, gm: GraphModule, case: InputSet) -> Judgement:
        """The same of a part of the graph, with its inputs."""
        with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
            write_graph(gm, Path(folder), case)
            done = subprocess.run(
                self.command,
                shell=True,
                env={**os.environ, GRAPH: folder},
                capture_output=True,
                text=True,
                errors="replace",
            )
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        text = f"exit code {done.returncode}" + (f": {said[-1]}" if said else "")
        if done.returncode == 0:
            return Judgement(text=text)
        if done.returncode == 125:
            return Judgement(skip=text)
        if not 0 < done.returncode < 128:
            raise FxoptError(f"the script ended with {text}; 128 and above, and a signal, abort the bisection")
        return Judgement((Failure("script", "script", text),))

    def about(self) -> dict[str, Any]:
        return {"check": self.name, "script": self.command, "files of the script": self._files()}

    def _files(self) -> str:
        """A text that is another one where a file is that the command names."""
        try:
            words = shlex.split(self.command)
        except ValueError:  # quotes that only the shell understands
            words = self.command.split()
        found = [Path(word).read_bytes() for word in words if Path(word).is_file()]
        return hashlib.sha256(b"".join(found)).hexdigest()[:16] if found else ""


def write_graph(gm: GraphModule, folder: Path, inputs: InputSet) -> None:
    """Write ``gm`` as it is, without its history, for `fxopt.load`; and the inputs that are tensors."""
    from fxopt.store import save  # it imports transformers, which only this needs

    save(without_history(gm), folder)
    tensors = {name: t.contiguous().clone() for name, t in inputs.tensors() if t.layout is torch.strided}
    save_file(tensors, folder / "inputs.safetensors")


def without_history(gm: GraphModule) -> GraphModule:
    """A copy of ``gm``, on the same tensors, that was never transformed."""
    from fxopt.delta import share

    plain = share(gm)
    for key in [k for k in plain.meta if str(k).startswith("fxopt.") and k != "fxopt.capture"]:
        del plain.meta[key]
    return plain


def inputs_of(case: InputSet) -> Mapping[str, Any] | tuple[Any, ...]:
    """An input set as a caller gives it."""
    return case.args if case.args else dict(case.kwargs)
