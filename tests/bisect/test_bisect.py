"""What a bisection says and does beside finding one wrong rewrite."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

import fxopt
from fxopt import frontend
from fxopt.bisect import JOURNAL
from fxopt.checks import ByScript
from fxopt.delta import share
from fxopt.errors import FxoptError, UsageError
from fxopt.models import build
from fxopt.repro import run
from fxopt.transformation import Transformation
from fxopt.transformations import EliminateDropout, FuseLinearReLU
from fxopt.verify import verify
from tests.bisect import captures
from tests.bisect.planted import Harmless, Plant, calls, put, swap

aten = torch.ops.aten


@dataclass(frozen=True)
class Unclamp(Transformation):
    """Removes the clamps of those numbers, and makes the others anew: of the two of a layer, one is enough."""

    numbers: tuple[int, ...]
    of: tuple[int, ...] = tuple(range(24))

    def transform(self, graph_module):
        for i, node in enumerate(calls(graph_module, "clamp.default")):
            if i in self.numbers:
                put(graph_module, node, node.args[0])
            elif i in self.of:
                swap(graph_module, node)


@dataclass(frozen=True)
class UnclampNamed(Transformation):
    name: str

    def transform(self, graph_module):
        (node,) = (n for n in graph_module.graph.nodes if n.name == self.name)
        put(graph_module, node, node.args[0])


@dataclass(frozen=True)
class Scale(Transformation):
    """Multiplies the output of the tanh of number ``at`` by ``by``."""

    at: int
    by: float

    def transform(self, graph_module):
        for i, node in enumerate(calls(graph_module, "tanh.default")):
            again = swap(graph_module, node)
            if i == self.at:
                with graph_module.graph.inserting_after(again):
                    scaled = graph_module.graph.call_function(aten.mul.Tensor, (again, self.by))
                again.replace_all_uses_with(scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled)


@dataclass(frozen=True)
class Unscale(Transformation):
    by: float

    def transform(self, graph_module):
        for node in calls(graph_module, "mul.Tensor"):
            if node.args[1] == self.by:
                put(graph_module, node, node.args[0])


def test_two_that_fail_only_together_in_one_pass():
    gm, inputs = captures.mlp()
    found = fxopt.bisect(gm, [EliminateDropout(), Harmless("cat.default"), Unclamp((8, 9))], example_inputs=inputs)
    assert found.found, found
    names = [n.name for n in calls(gm, "clamp.default")]
    assert [set(r.removed) & set(names) for r in found.interacting] == [{names[8]}, {names[9]}]
    assert found.rewrite == found.interacting[-1] and "fail only together" in found.summary
    assert found.repro.size[0] <= 12


@pytest.mark.slow
def test_two_that_fail_only_together_in_two_passes():
    gm, inputs = captures.mlp()
    names = [n.name for n in calls(gm, "clamp.default")]
    first, second = Unclamp((14,), tuple(range(0, 24, 2))), UnclampNamed(names[15])
    found = fxopt.bisect(gm, [first, Harmless("cat.default"), second], example_inputs=inputs)
    assert found.found and found.transformation is second, found
    assert [r.signature for r in found.interacting] == [first.signature, second.signature]
    assert names[14] in found.interacting[0].removed and names[15] in found.interacting[1].removed


def test_three_that_fail_only_together():
    gm, _ = captures.mlp()
    wanted = {3, 11, 20}
    original = [n.name for n in calls(gm, "clamp.default")]

    def check(graph):
        standing = {n.name for n in calls(graph, "clamp.default")}
        return not all(original[i] not in standing for i in wanted)

    found = fxopt.bisect(gm, [Harmless("relu.default"), Unclamp(())], check, confirm=False)
    assert [set(r.removed) & set(original) for r in found.interacting] == [{original[i]} for i in sorted(wanted)]
    assert not found.found and found.reproduced


@pytest.mark.slow
def test_a_rewrite_that_needs_an_earlier_pass_is_guilty_alone():
    """The guilty pass finds nothing to do without the one before it, and the number of probes stays within bounds."""
    gm, inputs = captures.mlp()

    @dataclass(frozen=True)
    class Wrong(Transformation):
        def transform(self, graph_module):
            for i, node in enumerate(calls(graph_module, "sigmoid.default")):
                x, minus = node.args[0], 2.0 if i != 5 else 2.1
                with graph_module.graph.inserting_before(node):
                    half = graph_module.graph.call_function(aten.mul.Tensor, (x, minus / 2))
                swap(graph_module, node, half)

    @dataclass(frozen=True)
    class ToSigmoid(Transformation):
        def transform(self, graph_module):
            for node in calls(graph_module, "tanh.default"):
                graph = graph_module.graph
                with graph.inserting_before(node):
                    twice = graph.call_function(aten.mul.Tensor, (node.args[0], 2.0))
                    s = graph.call_function(aten.sigmoid.default, (twice,))
                    new = graph.call_function(aten.sub.Tensor, (graph.call_function(aten.mul.Tensor, (s, 2.0)), 1.0))
                put(graph_module, node, new)

    found = fxopt.bisect(gm, [ToSigmoid(), Wrong()], example_inputs=inputs)
    assert found.found and found.transformation == Wrong() and not found.interacting, found
    assert len(found.probes) <= 1 + 4 + 3
    assert any("mul" in h for h in found.hints) or found.hints == ()


def test_no_failure_is_not_reproduced():
    gm, inputs = captures.mlp()
    found = fxopt.bisect(gm, [Harmless("tanh.default")], example_inputs=inputs)
    assert not found.reproduced and not found.found and len(found.probes) == 2
    assert found.summary == "not reproduced: all 12 rewrites together are good"
    nothing = fxopt.bisect(gm, [EliminateDropout()], example_inputs=inputs)
    assert not nothing.reproduced and "all 0 rewrites" in nothing.summary


def test_the_same_failure_counts():
    """The other output fails from the first pass on, and worse in the whole: only the worst one is followed."""
    gm, inputs = captures.mlp()
    found = fxopt.bisect(
        gm,
        [Scale(3, 1.001), Harmless("relu.default"), Plant("dtype of an output", 0), Harmless("cat.default")],
        example_inputs=inputs,
    )
    assert found.failure.kind == "dtype" and found.failure.where == "output[1]"
    assert found.transformation == Plant("dtype of an output", 0)
    assert any("fails otherwise: output[0]" in p.note and p.verdict == "good" for p in found.probes)


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


def test_what_hides_a_failure_is_said():
    gm, inputs = captures.mlp()
    steps = [Harmless("cat.default"), Scale(7, 2.0), Harmless("relu.default"), Unscale(2.0), Harmless("mean.dim")]
    found = fxopt.bisect(gm, steps, example_inputs=inputs)
    assert not found.reproduced and not found.found and found.transformation is None
    assert found.notes == ("not monotonic: with limit='Scale' it fails, and what comes later hides that",)
    again = fxopt.bisect(gm, steps[:3], example_inputs=inputs, confirm=False)
    assert again.transformation == steps[1]


def test_skipped_probes_leave_suspects():
    gm, inputs = captures.mlp()

    def check(graph):
        anew = sum(n.name.startswith("tanh_default") for n in calls(graph, "tanh.default"))
        return None if 3 < anew < 7 else anew <= 3

    found = fxopt.bisect(gm, [Harmless("cat.default"), Harmless("tanh.default")], check, inputs)
    assert found.rewrite is None and found.transformation == Harmless("tanh.default") and not found.found
    assert [r.id for r in found.suspects] == [r.id for r in _rewrites(gm, "tanh.default")[3:7]]
    assert found.last_good == "Harmless#2:1-3" and found.first_bad == "Harmless#2:1-7"
    assert "could not be told apart" in found.summary


def _rewrites(gm, target):
    twin = share(gm)
    Harmless("cat.default")(twin)
    Harmless(target)(twin)
    return fxopt.history(twin)[-1].rewrites


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
    assert run(folder).stdout.splitlines() == ["the check says bad", "the failure shows again"]
    (folder / "after.json").write_text((folder / "before.json").read_text())
    (folder / "after.safetensors").write_bytes((folder / "before.safetensors").read_bytes())
    assert run(folder).returncode == 0


def test_the_original_has_to_pass():
    gm, inputs = captures.mlp()
    with pytest.raises(UsageError, match="the original fails the check itself: the check says no"):
        fxopt.bisect(gm, [Harmless("tanh.default")], lambda g: False, inputs)
    with pytest.raises(UsageError, match="the original cannot be judged"):
        fxopt.bisect(gm, [Harmless("tanh.default")], lambda g: None, inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"check": "output"}, "check is 'output', expected one of outputs, nan, crash, slower"),
        ({"example_inputs": None}, "give example_inputs"),
        ({"resume": True}, "give directory"),
        ({"example_inputs": 3}, "an input set is a tuple, a dict"),
        ({"example_inputs": []}, "empty list"),
        ({"example_inputs": (torch.randn(3, 3),)}, "the original itself fails on the given input set"),
        ({"example_inputs": {"y": torch.randn(6, 16)}}, "the original itself fails"),
        ({"rtol": "x"}, "rtol is 'x', expected a number"),
        ({"rtol": -1}, "rtol is -1, expected a number"),
        ({"atol": float("nan")}, "atol is nan"),
        ({"directory": __file__}, "was given the folder .* which cannot be made"),
        ({"directory": 3}, "was given the folder 3, which cannot be made"),
        ({"repeat": 0}, "repeat=0, expected how often"),
    ),
)
def test_wrong_arguments(arguments, message):
    gm, inputs = captures.mlp()
    with pytest.raises(UsageError, match=message):
        fxopt.bisect(gm, [Harmless("tanh.default")], **{"example_inputs": inputs, **arguments})


@pytest.mark.parametrize("inputs", ((torch.randn(3, 3),), {"y": torch.randn(4, 8)}))
@pytest.mark.parametrize("check", ("outputs", lambda graph: True))
def test_inputs_that_a_traced_graph_does_not_take(check, inputs):
    """It has no shapes yet, and is run to get them."""
    gm = torch.fx.symbolic_trace(Block())
    with pytest.raises(UsageError, match=r"the graph does not run on the example_inputs .*it takes x") as raised:
        fxopt.bisect(gm, [FuseLinearReLU()], check, inputs)
    assert "\n" not in str(raised.value)


def test_a_limit_is_not_dropped():
    gm, inputs = captures.mlp()
    steps = fxopt.compose(EliminateDropout(), Harmless("tanh.default"), limit="EliminateDropout")
    with pytest.raises(UsageError, match="a pipeline with a limit; give the passes up to it"):
        fxopt.bisect(gm, steps, example_inputs=inputs)


def test_a_model_needs_inputs():
    with pytest.raises(UsageError, match="bisect needs example_inputs to capture a model"):
        fxopt.bisect(torch.nn.Linear(2, 2), [FuseLinearReLU()], lambda g: True)
    with pytest.raises(UsageError, match="expected a module"):
        fxopt.bisect(print, [FuseLinearReLU()])


def test_it_goes_on_from_its_journal(tmp_path):
    gm, inputs = captures.mlp()
    steps = [Harmless("cat.default"), Scale(7, 1.1)]
    asked = []

    def check(graph):
        asked.append(graph)
        return verify(gm, graph, inputs).ok

    whole = fxopt.bisect(gm, steps, check, inputs, directory=tmp_path, confirm=False)
    count = len(asked)
    lines = (tmp_path / JOURNAL).read_text().splitlines()
    count -= 4  # what is asked for the reproducer is no probe
    assert len(lines) == count + 1 and json.loads(lines[0])["pipeline"] == [s.signature for s in steps]
    (tmp_path / JOURNAL).write_text("\n".join(lines[:4]) + "\n")
    again = fxopt.bisect(gm, steps, check, inputs, directory=tmp_path, resume=True, confirm=False)
    assert len(asked) == 2 * (count + 4) - 3
    assert again.rewrite.id == whole.rewrite.id and [p.resumed for p in again.probes] == [True] * 3 + [False] * (
        count - 3
    )
    with pytest.raises(UsageError, match="is of another bisection"):
        fxopt.bisect(gm, steps[1:], check, inputs, directory=tmp_path, resume=True)
    with pytest.raises(UsageError, match="its check, code of the check differs"):
        fxopt.bisect(gm, steps, lambda g: True, inputs, directory=tmp_path, resume=True)
    assert {p.name for p in tmp_path.iterdir()} == {JOURNAL}


@pytest.mark.parametrize("edited", ("check", "pass"))
def test_a_journal_is_of_the_code_that_answered(tmp_path, edited):
    """The same names with other code are another bisection; the same code is not."""
    gm, inputs = captures.mlp()

    def bisect(by, resume, limit=0.5):
        def check(graph):
            return sum(1.1 in n.args for n in calls(graph, "mul.Tensor")) < limit

        class Named(Scale):
            def transform(self, graph_module):
                Scale(7, by).transform(graph_module)

        return fxopt.bisect(gm, [Named(7, 1.1)], check, inputs, directory=tmp_path, resume=resume, confirm=False)

    whole = bisect(1.1, resume=False)
    again = bisect(1.1, resume=True)
    assert all(p.resumed for p in again.probes) and again.rewrite.id == whole.rewrite.id
    with pytest.raises(UsageError, match=f"its code of the {edited}"):
        bisect(1.1 if edited == "check" else 1.2, resume=True, limit=0.7 if edited == "check" else 0.5)


def test_a_script_s_files_are_part_of_it(tmp_path):
    gm, inputs = captures.mlp()
    script = tmp_path / "judge.sh"
    script.write_text("exit 0")
    before = ByScript(f"sh {script}", gm, inputs).about()
    assert ByScript(f"sh {script}", gm, inputs).about() == before
    script.write_text("exit 1")
    assert ByScript(f"sh {script}", gm, inputs).about() != before


def test_the_result_is_shown_and_read(tmp_path):
    gm, inputs = captures.mlp()
    told = []
    found = fxopt.bisect(gm, [Scale(7, 1.1), Harmless("cat.default")], example_inputs=inputs, say=told.append)
    assert found.found and found.summary.startswith("found: Scale(at=7, by=1.1)@")
    assert told[0].startswith("probe 1: the original: good") and told[1].startswith("probe 2: all: bad, output[")
    text = repr(found)
    assert "last good: limit='Scale:1-7'" in text and "first bad: limit='Scale:1-8'" in text
    html = found._repr_html_()
    assert html.startswith("<pre") and "Scale(at=7, by=1.1)" in html
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["found"] and plain["rewrite"]["id"] == found.rewrite.id and plain["repro"]["confirmed"]

    folder = found.repro.save(tmp_path / "repro")
    assert not list(folder.glob("*.pt")) and not list(folder.glob("*.pkl"))
    assert {p.suffix for p in folder.iterdir()} == {".py", ".json", ".safetensors", ".html"}
    assert json.loads((folder / "repro.json").read_text())["rewrite"]["id"] == found.rewrite.id
    done = run(folder)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "the failure shows again"
    (folder / "after.json").write_text((folder / "before.json").read_text())  # mended
    (folder / "after.safetensors").write_bytes((folder / "before.safetensors").read_bytes())
    assert run(folder).returncode == 0
    (folder / "inputs.json").unlink()
    assert run(folder).returncode == 2


def test_the_limits_lead_to_the_last_good_and_the_first_bad():
    gm, inputs = captures.mlp()
    steps = [Harmless("cat.default"), Scale(7, 1.1), Harmless("relu.default")]
    found = fxopt.bisect(gm, steps, example_inputs=inputs, confirm=False)
    good, bad = (fxopt.compose(*steps, limit=limit, inplace=False)(gm) for limit in (found.last_good, found.first_bad))
    assert verify(gm, good, inputs).ok and not verify(gm, bad, inputs).ok


def test_a_pass_that_writes_in_place_is_the_culprit():
    """It stands in no module: the reproducer has its source."""
    gm, inputs = captures.mlp()

    class Writes(Transformation):
        def transform(self, graph_module):
            with torch.no_grad():
                next(graph_module.parameters()).mul_(2)

    before = next(gm.parameters()).clone()
    found = fxopt.bisect(gm, [Harmless("cat.default"), Writes()], example_inputs=inputs)
    assert found.transformation.signature.endswith("Writes()") and found.rewrite is None and found.found, found
    assert torch.equal(next(gm.parameters()), before)


def test_a_pass_that_raises(tmp_path):
    """What comes before it is judged; the folder has a report; `fxopt.report` writes the bisection up."""
    gm, inputs = captures.mlp()

    def raises(graph_module):
        raise KeyError(calls(graph_module, "tanh.default")[0].name)

    found = fxopt.bisect(gm, [Harmless("cat.default"), raises, Scale(7, 1.1)], example_inputs=inputs)
    assert found.found and found.last_good == "Harmless" and found.first_bad == "raises", found
    assert [(p.what, p.verdict) for p in found.probes] == [("the original", "good"), ("all before raises", "good")]
    folder = found.repro.save(tmp_path / "repro")
    assert "KeyError" in (folder / "report.html").read_text() and "def raises" in (folder / "bisected.py").read_text()
    assert "KeyError" in fxopt.report(found, tmp_path / "all.html").read_text()

    late = fxopt.bisect(gm, [Scale(7, 1.1), raises], example_inputs=inputs, confirm=False)
    assert late.transformation.signature.endswith("raises") and late.last_good is None and not late.found
    assert "what comes before it is not good either: output[" in late.notes[0]
    assert late.notes[0].endswith("bisect the passes before raises")


class NaN(Transformation):
    """NaN where Scale has changed the values already: the same output, another failure."""

    def transform(self, graph_module):
        for i, node in enumerate(calls(graph_module, "tanh.default")):
            if i == 9:
                swap(graph_module, node, node.args[0], target=aten.acosh.default)


def test_two_defects_at_one_output():
    """The first hides the second wherever both could be looked for in order: the suspects are asked without it."""
    gm, inputs = captures.mlp()
    steps = [Harmless("cat.default"), Scale(3, 1.5), Harmless("relu.default"), NaN()]
    found = fxopt.bisect(gm, steps, example_inputs=inputs, confirm=False)
    assert found.failure.kind == "not finite" and not found.repro.whole, found
    assert found.transformation is steps[3] and not found.interacting and not found.suspects
    assert found.last_good == "Scale:1-3" and found.first_bad == "NaN:1"
    assert "something else is wrong too: with limit='Scale:" in found.notes[0]
    assert "bisect the passes up to there" in found.notes[0]
    assert len(found.probes) <= 22  # of 37 rewrites, most of which cannot be judged in order


class Shifted(Transformation):
    """Another weight in the place of one: no node changes."""

    def transform(self, graph_module):
        layer = graph_module.get_submodule("layers.5")
        layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.1)


def test_a_rewrite_of_nothing_but_a_weight():
    gm, inputs = captures.mlp()
    found = fxopt.bisect(gm, [Harmless("cat.default"), Shifted()], example_inputs=inputs)
    assert found.found and found.rewrite.summary == "tensors: 1 changed" and found.repro.size == (1, 1), found
    assert found.rewrite.source.endswith("h = F.relu(layer(x)) * gain")
    assert "tensors: 1 changed" in repr(found) and "tensors: 1 changed" in repr(found.rewrite)


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


def test_the_reproducer_runs_from_anywhere(tmp_path):
    gm, inputs = captures.mlp()
    found = fxopt.bisect(gm, [Plant("wrong axis", 7)], example_inputs=inputs)
    found.repro.save(tmp_path / "a" / "b")
    root = str(captures.__file__).rpartition("/tests/")[0]
    done = subprocess.run(
        [sys.executable, "b/repro.py"],
        cwd=tmp_path / "a",
        env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)

    def forward(self, x):
        return x + torch.nn.functional.relu(self.fc(self.norm(x)))


class Branches(torch.nn.Module):
    """Cannot be captured whole: its own code stays as the frame around two graphs."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Sequential(*(Block() for _ in range(4)))
        self.b = torch.nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x):
        y = self.a(x)
        return y if y.sum().item() > 1e9 else self.b(y)


@dataclass(frozen=True)
class Abs(Transformation):
    """relu(x) -> abs(x) for the third relu of every graph: a bug."""

    def transform(self, graph_module):
        for i, node in enumerate(calls(graph_module, "relu.default")):
            node.target = torch.abs if i == 2 else torch.relu


def test_a_rewrite_of_an_inner_graph_is_named_and_shown():
    torch.manual_seed(0)
    inputs = (torch.randn(4, 8),)
    gm = fxopt.capture(Branches().eval(), inputs)
    found = fxopt.bisect(gm, [Abs()], example_inputs=inputs)
    assert found.found, found
    assert found.rewrite.module_path.endswith("2") and found.repro.size == (1, 1)


@dataclass(frozen=True)
class Norms(Transformation):
    """Replaces the module of every layer norm, the sixth by one with another epsilon: a bug."""

    def transform(self, graph_module):
        for i, node in enumerate(n for n in graph_module.graph.nodes if str(n.target).endswith("norm")):
            old = graph_module.get_submodule(node.target)
            new = torch.nn.LayerNorm(8, eps=0.1 if i == 5 else 1e-5).eval()
            new.weight, new.bias = old.weight, old.bias
            graph_module.add_submodule(f"{node.target}_new", new)
            node.target = f"{node.target}_new"


def test_modules_in_a_traced_graph():
    torch.manual_seed(0)
    gm = torch.fx.symbolic_trace(torch.nn.Sequential(*(Block() for _ in range(8))).eval())
    found = fxopt.bisect(gm, [Norms()], example_inputs=(torch.randn(4, 8),))
    assert found.found and found.rewrite.module_path == "5.norm", found
    assert found.hints[0] == "layer_norm eps 1e-05 → 0.1" and found.repro.size == (1, 1)
    assert found.rewrite.source.endswith("return x + torch.nn.functional.relu(self.fc(self.norm(x)))")


def faster_gelu(graph_module):
    for node in calls(graph_module, "gelu.default"):
        node.kwargs = {"approximate": "tanh"}


@dataclass(frozen=True)
class FasterGELU(Transformation):
    """An approximation, which the tolerance below does not allow."""

    def transform(self, graph_module):
        faster_gelu(graph_module)


def test_what_fails_by_hand_is_kept_saved_and_loaded(tmp_path):
    """`fxopt optimize --limit FIRST_BAD --save`: not quietly saved without the pass that fails."""
    model = build("bert-base-tiny")
    inputs = {"input_ids": torch.arange(12).reshape(2, 6) + 5, "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    passes = f"{__name__}:FasterGELU"
    found = frontend.optimize(model, inputs, passes=passes, rtol=0, atol=1e-7, benchmarked=False, limit="FasterGELU:1")
    assert not found.ok and found.failed == ("forward: FasterGELU() was kept, though it fails",)
    assert [s.kept for s in found.results["forward"].steps] == [True]
    found.save(tmp_path)
    loaded = fxopt.load(tmp_path)
    assert fxopt.history(loaded.fxopt.graphs["forward"])[0].signature == "FasterGELU()"
    with pytest.raises(UsageError, match=r"asks for rewrite 9 of FasterGELU\(\), which makes 2 in forward"):
        frontend.optimize(model, inputs, passes=passes, benchmarked=False, limit="FasterGELU:9")
    left_out = frontend.optimize(model, inputs, passes=passes, rtol=0, atol=1e-7, benchmarked=False)
    assert "was left out: undone: " in left_out.failed[0]
