"""Bugs of the kinds that compilers have: each is named exactly, and each reproducer fails again."""

import math

import pytest
import torch

import fxopt
from fxopt.delta import share
from fxopt.transformations import EliminateDeadNodes, EliminateDropout
from tests.bisect.fresh import rerun
from tests.bisect.planted import BUGS, Harmless, Plant

# One worker makes all reproducers, and runs them.
pytestmark = pytest.mark.xdist_group("planted")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where each reproducer is, by bug."""
    return {name: tmp_path_factory.mktemp("repro") / "repro" for name in BUGS}


def pipeline(bug, name):
    return [
        EliminateDropout(),
        Harmless("transpose.int"),
        Harmless("cat.default"),
        Plant(name, bug.at),
        Harmless("linear.default"),
        EliminateDeadNodes(),
    ]


FAST = (  # the others take minutes together; the README and `test_cli` have "tanh for erf", `test_bisect` what raises
    "mask lost, for a padded batch only",
    "crash for other sizes only",
    "split of other sizes",
    "stale buffer",
    "folded without the variance",
    "dead write removed",
    "write to a buffer lost",
    "in place on a shared value",
    "dtype of an output",
    "NaN for large values only",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in BUGS])
def test_the_guilty_rewrite_is_named(name, folders):
    bug = BUGS[name]
    gm, inputs = bug.graph()
    inputs = inputs if bug.inputs is None else bug.inputs
    steps = pipeline(bug, name)
    code, keys = gm.code, {k: id(v) for k, v in gm.state_dict(keep_vars=True).items()}

    found = fxopt.bisect(gm, fxopt.compose(*steps), bug.check, inputs, confirm=False, **bug.options)

    assert gm.code == code and not fxopt.history(gm)
    assert {k: id(v) for k, v in gm.state_dict(keep_vars=True).items()} == keys
    assert found.failure.kind == bug.kind, found
    assert found.transformation is steps[3] and not found.interacting and not found.flaky, found
    if bug.kind == "raised IndexError":
        assert found.rewrite is None
    else:
        before = share(gm)
        for step in steps[:3]:
            step(before)
        sites = [n.name for n in bug.sites(before)]
        touched = {*found.rewrite.removed, *found.rewrite.changed}
        assert touched & set(sites) == {sites[bug.at]}, found
        stages, rewrites = len(steps), _rewrites(gm, steps)
        assert len(found.probes) <= math.ceil(math.log2(stages)) + math.ceil(math.log2(max(rewrites, 1))) + 3, found
    assert any(bug.hint in h for h in found.hints) or not bug.hint, found.hints
    assert found.repro is not None, found.notes
    assert max(found.repro.size) <= bug.size, found.repro.size
    found.repro.save(folders[name])


def _rewrites(gm, steps):
    gm = share(gm)
    for step in steps[:4]:
        step(gm)
    return len(fxopt.history(gm)[-1].rewrites)


def test_every_reproducer_fails_again(folders):
    made = {name: folder for name, folder in folders.items() if folder.exists()}
    assert made, "run the tests that make the reproducers too"
    codes = {name: code for name, (code, _) in zip(made, rerun(*made.values()), strict=True)}
    assert codes == dict.fromkeys(made, 1)


def test_there_are_enough_of_them():
    assert len(BUGS) >= 30
    assert {bug.graph.__name__ for bug in BUGS.values()} == {"bert", "gpt2", "resnet", "mlp"}
    assert torch.get_num_threads() == 1
