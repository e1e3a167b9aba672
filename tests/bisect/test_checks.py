"""What a bisection asks: a check of the caller's own, one that is flaky, a script."""

import sys

import pytest

import fxopt
from fxopt.checks import ByScript
from fxopt.delta import share
from fxopt.errors import FxoptError, UsageError
from fxopt.repro import run
from fxopt.verify import verify
from tests.bisect import captures
from tests.bisect.planted import Harmless, calls
from tests.bisect.wrong import NaN, Scale


def test_a_flaky_check_is_said():
    gm, inputs = captures.mlp()
    answers = iter((True, False, True, False, False, True, True, True))  # the original, all, 6, 9, 7; 7 alone; 7, 6
    found = fxopt.bisect(gm, [Harmless("tanh.default")], lambda g: next(answers), inputs)
    assert found.flaky and not found.found and "flaky" in found.summary and found.transformation is None


def test_a_check_asked_several_times_contradicts_itself():
    gm, inputs = captures.mlp()
    answers = iter((True, True, True, False, False, True))
    found = fxopt.bisect(gm, [Harmless("tanh.default")], lambda g: next(answers), inputs, repeat=3)
    assert found.flaky and not found.found and len(found.probes) == 2
    assert found.notes == ("the check gives several answers for the same graph: bad, bad, good (all)",)
    steady = fxopt.bisect(gm, [Scale(7, 1.1)], example_inputs=inputs, repeat=2, confirm=False)
    assert not steady.flaky and "tanh_7" in {*steady.rewrite.removed, *steady.rewrite.changed}


def test_a_check_that_is_flaky_in_the_fresh_process_alone(tmp_path):
    """Its answers never contradict each other while it bisects: it is asked of each graph once."""
    gm, inputs = captures.mlp()
    memory = str(tmp_path / "memory")

    def check(graph):
        from pathlib import Path

        if not Path(memory).exists():
            return not any(1.1 in n.args for n in graph.graph.nodes)
        count = int(Path(memory).read_text() or 0)
        Path(memory).write_text(str(count + 1))
        return count % 2 == 0

    def say(line):
        if "fresh process" in line:
            (tmp_path / "memory").touch()

    found = fxopt.bisect(gm, [Scale(7, 1.1)], check, inputs, say=say)
    assert found.flaky and not found.found and found.transformation is None, found
    assert "several answers for the same graph: good, bad (before)" in found.notes[-1]


@pytest.mark.parametrize("own", (False, True))
@pytest.mark.parametrize("at", (0, 5, 11))
def test_the_bound_holds_for_every_kind_of_check(own, at):
    gm, inputs = captures.mlp()
    steps = [Harmless("cat.default"), Harmless("mean.dim"), Scale(at, 1.1), Harmless("relu.default")]
    check = (lambda g: not any(1.1 in n.args for n in g.graph.nodes)) if own else "outputs"
    found = fxopt.bisect(gm, steps, check, inputs, confirm=False)
    assert found.transformation == steps[2] and not found.interacting
    assert len(found.probes) <= 2 + 4 + 3, found


def test_a_check_of_ones_own_may_raise_or_not_know():
    gm, _ = captures.mlp()

    def check(graph):
        names = [n.name for n in calls(graph, "cat.default")]
        if any(name.startswith("cat_default_4") for name in names):
            raise ValueError("oops")
        return None if any(name.startswith("cat_default_2") for name in names) else True

    found = fxopt.bisect(gm, [Harmless("cat.default")], check, confirm=False)
    assert found.failure.kind == "raised ValueError", found  # the skipped ones are left out
    assert found.rewrite.created == ("cat_default_4",) and "skip" in [p.verdict for p in found.probes]
    assert any("some graphs could not be judged" in n for n in found.notes)

    def by_name(graph):
        return not any(n.name == "cat_default_4" for n in graph.graph.nodes)

    found = fxopt.bisect(gm, [Harmless("cat.default")], by_name)
    assert found.rewrite.created == ("cat_default_4",) and found.found and found.repro.whole, found
    found = fxopt.bisect(gm, [Harmless("cat.default")], by_name, captures.mlp()[1], confirm=False)
    assert found.repro.size == (1, 1), found


@pytest.mark.slow
def test_a_check_that_no_other_process_can_ask():
    """It is asked again here, and the fresh process compares values; where these are equal, nothing is found."""
    gm, inputs = captures.mlp()
    asked = []

    def check(graph):
        asked.append(graph)
        return verify(gm, graph, inputs).ok

    found = fxopt.bisect(gm, [Harmless("cat.default"), Scale(7, 1.1)], check, inputs)
    assert found.found and found.repro.size[0] <= 2, found
    assert "which cannot be written as source): it was asked again here" in found.notes[-1]
    assert len(asked) == len(found.probes) + 4  # of both graphs twice

    names = {n.name for n in gm.graph.nodes}
    found = fxopt.bisect(
        gm, [Harmless("tanh.default")], lambda g: gm is None or {n.name for n in g.graph.nodes} >= names - {"tanh_5"}
    )
    assert not found.found and "without example_inputs there is nothing to run" in found.notes[0], found
    assert "put the check into a module" in found.notes[0]


LIMIT = 1e-3


def test_a_check_is_asked_in_the_fresh_process(tmp_path):
    """With what it refers to, down to the tensors around it; the folder tells of a mended graph too."""
    gm, (x,) = captures.mlp()
    expected = gm(x)[0].detach()

    def check(graph):
        return bool((graph(x)[0] - expected).abs().max() < LIMIT)

    found = fxopt.bisect(gm, [Harmless("cat.default"), Scale(7, 1.1)], check, (x,))
    assert found.found and found.repro.whole and not found.notes, found
    folder = found.repro.save(tmp_path / "repro")
    assert {"bisected.py", "bisected.safetensors", "report.html"} <= {p.name for p in folder.iterdir()}
    text = (folder / "bisected.py").read_text()
    assert "LIMIT = 0.001" in text and "expected = TENSORS['expected']" in text
    (folder / "after.json").write_text((folder / "before.json").read_text())
    (folder / "after.safetensors").write_bytes((folder / "before.safetensors").read_bytes())
    done = run(folder)
    assert done.returncode == 0 and done.stdout.splitlines() == ["the check says good", "the failure does not show"]


def test_the_original_has_to_pass():
    gm, inputs = captures.mlp()
    with pytest.raises(UsageError, match="the original fails the check itself: the check says no"):
        fxopt.bisect(gm, [Harmless("tanh.default")], lambda g: False, inputs)
    with pytest.raises(UsageError, match="the original cannot be judged"):
        fxopt.bisect(gm, [Harmless("tanh.default")], lambda g: None, inputs)


def test_a_script_s_files_are_part_of_it(tmp_path):
    gm, inputs = captures.mlp()
    script = tmp_path / "judge.sh"
    script.write_text("exit 0")
    before = ByScript(f"sh {script}", gm, inputs).about()
    assert ByScript(f"sh {script}", gm, inputs).about() == before
    script.write_text("exit 1")
    assert ByScript(f"sh {script}", gm, inputs).about() != before


SCRIPT = """
import os, sys
from pathlib import Path
from safetensors.torch import load_file
import fxopt
gm = fxopt.load(os.environ["FXOPT_GRAPH"])
(x,) = load_file(Path(os.environ["FXOPT_GRAPH"]) / "inputs.safetensors").values()
tanh = [n for n in gm.graph.nodes if "tanh.default" in str(n.target)]
scaled = [n for n in tanh if any(u.args[1:] == (1.1,) for u in n.users)]
print("scaled:", len(scaled), tuple(gm(x)[0].shape))
sys.exit(1 if scaled else 0)
"""


@pytest.mark.parametrize(("code", "verdict"), ((0, "good"), (1, "bad"), (124, "bad"), (125, "skip"), (127, "bad")))
def test_a_script_has_the_exit_codes_of_git_bisect(code, verdict):
    gm, inputs = captures.mlp()
    told, note = ByScript(f"echo so; exit {code}", gm, inputs).judge(gm).verdict(None)
    assert (told, note) == (verdict, f"exit code {code}: so")


@pytest.mark.parametrize(("command", "code"), (("exit 128", 128), ("exit 255", 255), ("kill -9 $$", -9)))
def test_a_script_can_abort(command, code):
    gm, inputs = captures.mlp()
    with pytest.raises(FxoptError, match=f"the script ended with exit code {code}"):
        ByScript(command, gm, inputs).judge(gm)


def test_a_script_loads_the_graph_and_the_inputs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(captures.__file__).rpartition("/tests/")[0])
    gm, inputs = captures.mlp()
    (tmp_path / "judge.py").write_text(SCRIPT)
    wrong = share(gm)
    Scale(2, 1.1)(wrong)
    told, note = ByScript(f"{sys.executable} {tmp_path / 'judge.py'}", gm, inputs).judge(wrong).verdict(None)
    assert told == "bad" and note == "exit code 1: scaled: 1 (6, 16)"


def test_a_bisection_by_script_is_confirmed_by_it():
    gm, inputs = captures.mlp()
    command = "! grep -q 1.1 $FXOPT_GRAPH/graph.json"
    found = fxopt.bisect(gm, [Harmless("cat.default"), Scale(4, 1.1)], ByScript(command, gm, inputs), inputs)
    assert found.found and found.transformation == Scale(4, 1.1), found
    assert "tanh_4" in {*found.rewrite.removed, *found.rewrite.changed}
    assert found.repro.size == (1, 2) and not found.repro.whole  # it says the same of the smallest part


GENERAL = """
import os, sys
from pathlib import Path
from safetensors.torch import load_file
import fxopt
folder = Path(os.environ["FXOPT_GRAPH"])
gm = fxopt.load(folder)
results = gm(**load_file(folder / "inputs.safetensors"))
sys.exit(any(r.isnan().any().item() for r in results if r.is_floating_point()))
"""


@pytest.mark.slow
def test_a_script_s_reproducer_is_cut_too(tmp_path, monkeypatch):
    """Where the script takes any graph with its inputs, the smallest part of which it says the same."""
    monkeypatch.setenv("PYTHONPATH", str(captures.__file__).rpartition("/tests/")[0])
    gm, inputs = captures.mlp()
    (tmp_path / "judge.py").write_text(GENERAL)
    command = f"{sys.executable} {tmp_path / 'judge.py'}"
    found = fxopt.bisect(gm, [NaN()], ByScript(command, gm, inputs), inputs)
    assert found.found and found.repro.size == (1, 1) and not found.repro.whole, found
    assert (found.repro.save(tmp_path / "repro") / "report.html").exists()
