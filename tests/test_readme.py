"""The README tells what is there."""

import re
from pathlib import Path

import pytest
import torch

from fxopt.catalogue import catalogue, default, summary

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("name", catalogue())
def test_every_pass_is_in_the_table(name):
    assert f"| `{name}` |" in README


@pytest.mark.parametrize(("name", "kind"), catalogue().items())
def test_the_table_says_how_exact_a_pass_is_as_its_docstring_does(name, kind):
    (row,) = re.findall(rf"^\| `{name}` \| .* \| (.*) \|$", README, re.MULTILINE)
    assert f"{summary(kind).replace('``', '`').rstrip('.')}. ".startswith(f"{row}. ")


def test_the_table_tells_of_rows_that_are_masked_in_whole():
    (row,) = re.findall(r"^\| `FuseAttention` \|.*$", README, re.MULTILINE)
    assert "A row masked with -inf in whole is 0 afterwards" in row and "where eager gives NaN" in row


def test_what_needs_shapes_is_given_them_as_the_readme_says():
    from torch import nn
    from torch.fx import symbolic_trace

    import fxopt
    from fxopt.transformations import FuseBatchNorm1dInLinear

    model, inputs = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).eval(), (torch.randn(3, 8),)
    assert "`fxopt.propagate(gm, inputs)`" in README
    bare, told, asked = (symbolic_trace(model) for _ in range(3))
    fxopt.propagate(told, inputs)
    fxopt.compose(FuseBatchNorm1dInLinear(), example_inputs=inputs)(asked)
    for gm, rewrites in ((bare, 0), (told, 1)):
        FuseBatchNorm1dInLinear()(gm)
        assert len(fxopt.history(gm)[-1].rewrites) == rewrites
    assert len(fxopt.history(asked)[-1].rewrites) == 1


def test_the_default_pipeline_is_the_one_that_runs():
    (said,) = re.findall(r"The default pipeline on the CPU, in order: (.*)\.\n", README)
    assert said.split(", ") == [type(t).__name__ for t in default("cpu")]


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_python_examples_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(EXAMPLES[number], "README.md", "exec"), names)
    if number == 0:
        assert [c.signature for c in names["fxopt"].history(names["gm"])] == ["MergeLinears()"]
    elif "found" in names:
        assert names["found"].found and names["found"].hints == ("gelu approximate 'none' → 'tanh'",)
    elif "sparsify" in names:
        assert not names["fxopt"].history(names["gm"]) and names["layer"].density == 0.25
    elif "Pruner" in names:
        assert [layer.name for layer in names["report"].layers] == ["0", "2"]
    else:
        assert "DoubleNegation" in names
