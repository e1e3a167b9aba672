"""Every object that answers a question prints as a table in a terminal, and shows as HTML in a notebook."""

import json

import pytest
import torch
from rich.console import Console
from torch import nn

import fxopt
from fxopt import frontend
from fxopt.benchmark import benchmark, benchmark_many, measure
from fxopt.errors import UsageError
from fxopt.transformations import EliminateDropout


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(4, 4), nn.Dropout()

    def forward(self, x):
        return torch.relu(self.drop(self.layer(x)))


X = (torch.randn(2, 4),)
FAST = {"rounds": 6, "warmup": 1, "min_time": 0}


def shown(thing):
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(thing)
    return captured.get()


@pytest.fixture(scope="module")
def answers():
    net = Net().eval()
    gm = fxopt.capture(net, X)
    pipeline = fxopt.compose(EliminateDropout(), verify=True, benchmark=True, example_inputs=X, rounds=6, show=False)
    result = pipeline.run(gm)
    entry = fxopt.history(gm)[0]
    optimized = fxopt.optimize(Net().eval(), EliminateDropout(), {"x": X[0]})
    model = frontend.load("mlp-tiny", "cpu", None)
    inputs = frontend.inputs(model, "mlp-tiny")
    report = frontend.optimize(model, inputs, "mlp-tiny", "EliminateDropout", benchmarked=False)
    return {
        "Result": (result, "EliminateDropout"),
        "Step": (result.steps[0], "EliminateDropout"),
        "Verification": (result.verification, "verified on"),
        "Difference of outputs": (result.verification.outputs[0], "tolerance"),
        "History": (fxopt.history(gm), "EliminateDropout"),
        "Entry": (entry, "1 rewrite"),
        "Rewrite": (entry.rewrites[0], "EliminateDropout()@"),
        "Difference": (entry.diff(), "dropout"),
        "CaptureReport": (fxopt.capture_report(gm), "captured whole"),
        "Measurement": (measure(net, X, **FAST), "latency"),
        "Comparison": (result.total, "before"),
        "Comparisons": (benchmark_many({"a": net, "b": gm}, X, **FAST), "verdict"),
        "Optimized": (optimized.fxopt, "whole"),
        "Report": (report, "end to end"),
    }


KINDS = ["Result", "Step", "Verification", "History", "Entry", "Rewrite", "Difference", "CaptureReport", "Measurement"]
KINDS += ["Comparison", "Comparisons", "Optimized", "Report"]


@pytest.mark.parametrize("kind", [*KINDS, "Difference of outputs"])
def test_prints_and_shows(answers, kind):
    thing, expected = answers[kind]
    assert type(thing).__name__ == kind.partition(" ")[0]
    assert expected in shown(thing)
    page = thing._repr_html_()
    assert expected.split()[0] in page and page.lstrip().startswith("<")


def test_all_are_asked(answers):
    assert set(answers) == {*KINDS, "Difference of outputs"}


def test_source_lines_are_no_markup():
    class Marked(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, False) + {"[/bold]": 1}["[/bold]"]

    gm = fxopt.capture(Marked(), X)
    EliminateDropout()(gm)
    entry = fxopt.history(gm)[0]
    assert "[/bold]" in shown(entry) and "[/bold]" in shown(entry.rewrites[0])


def test_a_trace_holds_every_round(tmp_path):
    found = benchmark(Net().eval(), Net().eval(), X, **FAST)
    path = found.chrome_trace(tmp_path / "trace.json")
    trace = json.loads(path.read_text())
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert sorted(names.values()) == ["after", "before"]
    for measured in (found.a, found.b):
        mine = [e for e in spans if names[e["tid"]] == measured.name]
        assert [e["args"]["seconds a call"] for e in mine] == list(measured.latencies)
        assert [e["dur"] for e in mine] == pytest.approx([t * measured.calls * 1e6 for t in measured.latencies])
        assert [e["args"]["round"] for e in mine] == list(range(len(measured.latencies)))
    spans.sort(key=lambda e: e["ts"])
    ends = [e["ts"] + e["dur"] for e in spans]
    assert all(end <= following["ts"] for end, following in zip(ends, spans[1:], strict=False)), "one at a time"
    ratios = [e["args"]["ratio"] for e in trace["traceEvents"] if e["ph"] == "C"]
    assert ratios == list(found.ratios)
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_traces_of_one_and_of_many(tmp_path):
    one = measure(Net().eval(), X, **FAST).chrome_trace(tmp_path / "one.json")
    many = benchmark_many({"a": Net(), "b": Net(), "c": Net()}, X, **FAST).chrome_trace(tmp_path / "many.json")
    tracks = [{e["tid"] for e in json.loads(p.read_text())["traceEvents"] if e["ph"] == "X"} for p in (one, many)]
    assert tracks == [{1}, {1, 2, 3}]


def test_a_trace_that_cannot_be_written(tmp_path):
    found = measure(Net().eval(), X, **FAST)
    for path in (tmp_path, tmp_path / "no" / "trace.json"):
        with pytest.raises(UsageError, match="a trace cannot be written to"):
            found.chrome_trace(path)
