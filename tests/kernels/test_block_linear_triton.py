"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for three generations of GPUs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed here")


def run(script, *arguments):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")))
    }
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@needs_triton
@pytest.mark.parametrize("which", ("some", pytest.param("all", marks=pytest.mark.slow)))
def test_interpreted_they_are_the_dense_product(which):
    assert "cases hold" in run("interpreted_block_linear.py", which)


@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "side", "turned"),
    (
        pytest.param(90, "bf16", 32, True, marks=pytest.mark.slow),
        *(pytest.param(c, "bf16", 64, False, marks=pytest.mark.slow) for c in (80, 90, 100)),
        *(pytest.param(c, "fp16", 128, True, marks=pytest.mark.slow) for c in (80, 90, 100)),
        pytest.param(80, "fp32", 32, False, marks=pytest.mark.slow),
    ),
)
def test_they_compile(capability, dtype, side, turned):
    assert run("compiled_block_linear.py", capability, dtype, side, turned).count("True") >= 2
