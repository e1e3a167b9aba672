"""The README tells what is there."""

import re
from pathlib import Path

import pytest

from fxopt.catalogue import catalogue, default

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("name", catalogue())
def test_every_pass_is_in_the_table(name):
    assert f"| `{name}` |" in README


def test_the_default_pipeline_is_the_one_that_runs():
    (said,) = re.findall(r"The default pipeline on the CPU, in order: (.*)\.\n", README)
    assert said.split(", ") == list(dict.fromkeys(type(t).__name__ for t in default("cpu")))


@pytest.mark.parametrize("number", range(2))
def test_the_python_examples_run(number):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(blocks[number], "README.md", "exec"), names)
    if number == 0:
        assert [c.signature for c in names["fxopt"].history(names["gm"])] == ["MergeLinears()"]
    else:
        assert "DoubleNegation" in names
