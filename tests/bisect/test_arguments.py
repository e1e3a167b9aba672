"""What a bisection is given: wrong arguments, and the journal of an earlier one."""

import json

import pytest
import torch

import fxopt
from fxopt.bisect import JOURNAL
from fxopt.errors import UsageError
from fxopt.transformations import EliminateDropout, FuseLinearReLU
from fxopt.verify import verify
from tests.bisect import captures
from tests.bisect.planted import Harmless, calls
from tests.bisect.wrong import (
    Block,
    Scale,
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"check": "output"}, "check is 'output', expected one of outputs, nan, crash, slower"),
        ({"example_inputs": None}, "give example_inputs"),
        ({"resume": True}, "give directory"),
        ({"example_inputs": 3}, "an input set is a tuple, a dict"),
        ({"example_inputs": []}, "empty list"),
        ({"example_inputs": (torch.randn(3, 3),)}, "the original itself fails on the given input set"),
        ({"example_inputs": {"y": torch.randn(6, 16)}}, "given input set of example_inputs .y.: .*it takes x"),
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


@pytest.mark.parametrize(
    ("inputs", "message"),
    (
        ((torch.randn(3, 3),), "does not run on the example_inputs"),  # it has no shapes yet: run to get them
        ({"y": torch.randn(4, 8)}, "cannot be called with the given input set of example_inputs .y.: missing"),
        ((torch.randn(4, 8), 1), "of example_inputs .2 positional.: too many positional arguments"),
        ({"x": torch.randn(4, 8), "y": 1}, "of example_inputs .x, y.: got an unexpected keyword argument 'y'"),
        ([(torch.randn(4, 8),), ()], "given input set 2 of 2 of example_inputs .nothing.: missing"),
    ),
)
@pytest.mark.parametrize("check", ("outputs", lambda graph: True))
def test_inputs_that_a_traced_graph_does_not_take(check, inputs, message):
    """Refused in one line, also where the check never calls the graph with them."""
    gm = torch.fx.symbolic_trace(Block())
    with pytest.raises(UsageError, match=rf"the graph .*{message}.*; it takes x$") as raised:
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

    told = []
    whole = fxopt.bisect(gm, steps, check, inputs, directory=tmp_path, resume=True, confirm=False, say=told.append)
    assert told[0] == f"{tmp_path / JOURNAL} is not there: nothing to resume, it begins anew"
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
