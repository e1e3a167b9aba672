"""What a bisection says and does beside finding one wrong rewrite."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch

import fxopt
from fxopt import frontend
from fxopt.delta import share
from fxopt.errors import UsageError
from fxopt.models import build
from fxopt.transformation import Transformation
from fxopt.transformations import EliminateDropout
from fxopt.verify import verify
from tests.bisect import captures
from tests.bisect.fresh import rerun
from tests.bisect.planted import Harmless, Plant, calls, put, swap
from tests.bisect.wrong import (
    Abs,
    Block,
    Branches,
    FasterGELU,
    NaN,
    Norms,
    Scale,
    Shifted,
    Unclamp,
    UnclampNamed,
    Unscale,
)

aten = torch.ops.aten


def test_two_that_fail_only_together_in_one_pass():
    gm, inputs = captures.mlp()
    steps = [EliminateDropout(), Harmless("cat.default"), Unclamp((8, 9))]
    found = fxopt.bisect(gm, steps, example_inputs=inputs, confirm=False)
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
        confirm=False,
    )
    assert found.failure.kind == "dtype" and found.failure.where == "output[1]"
    assert found.transformation == Plant("dtype of an output", 0)
    assert any("fails otherwise: output[0]" in p.note and p.verdict == "good" for p in found.probes)


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


def test_the_result_is_shown_and_read(tmp_path):
    """And its folder runs from anywhere: the failure shows, or not, or something is missing."""
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

    folder = found.repro.save(tmp_path / "a" / "repro")
    assert not list(folder.glob("*.pt")) and not list(folder.glob("*.pkl"))
    assert {p.suffix for p in folder.iterdir()} == {".py", ".json", ".safetensors", ".html"}
    assert json.loads((folder / "repro.json").read_text())["rewrite"]["id"] == found.rewrite.id
    for name in ("mended", "lacking"):
        shutil.copytree(folder, folder.parent / name)
    for suffix in ("json", "safetensors"):
        shutil.copyfile(folder / f"before.{suffix}", folder.parent / "mended" / f"after.{suffix}")
    (folder.parent / "lacking" / "inputs.json").unlink()
    shown, mended, lacking = rerun("repro", "mended", "lacking", cwd=folder.parent)
    assert shown[0] == 1 and shown[1][-1] == "the failure shows again", shown
    assert mended[0] == 0 and lacking[0] == 2, (mended, lacking)


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


def test_a_rewrite_of_nothing_but_a_weight():
    gm, inputs = captures.mlp()
    found = fxopt.bisect(gm, [Harmless("cat.default"), Shifted()], example_inputs=inputs)
    assert found.found and found.rewrite.summary == "tensors: 1 changed" and found.repro.size == (1, 1), found
    assert found.rewrite.source.endswith("h = F.relu(layer(x)) * gain")
    assert "tensors: 1 changed" in repr(found) and "tensors: 1 changed" in repr(found.rewrite)


def test_a_rewrite_of_an_inner_graph_is_named_and_shown():
    torch.manual_seed(0)
    inputs = (torch.randn(4, 8),)
    gm = fxopt.capture(Branches().eval(), inputs)
    found = fxopt.bisect(gm, [Abs()], example_inputs=inputs)
    assert found.found, found
    assert found.rewrite.module_path.endswith("2") and found.repro.size == (1, 1)


def test_modules_in_a_traced_graph():
    torch.manual_seed(0)
    gm = torch.fx.symbolic_trace(torch.nn.Sequential(*(Block() for _ in range(8))).eval())
    found = fxopt.bisect(gm, [Norms()], example_inputs=(torch.randn(4, 8),))
    assert found.found and found.rewrite.module_path == "5.norm", found
    assert found.hints[0] == "layer_norm eps 1e-05 → 0.1" and found.repro.size == (1, 1)
    assert found.rewrite.source.endswith("return x + torch.nn.functional.relu(self.fc(self.norm(x)))")


def test_what_fails_by_hand_is_kept_saved_and_loaded(tmp_path):
    """`fxopt optimize --limit FIRST_BAD --save`: not quietly saved without the pass that fails."""
    model = build("bert-base-tiny")
    inputs = {"input_ids": torch.arange(12).reshape(2, 6) + 5, "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    passes = f"{FasterGELU.__module__}:FasterGELU"
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
