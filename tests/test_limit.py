"""A part of a pipeline, by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.errors import UsageError
from fxopt.limit import Limit, spelled
from fxopt.text import show
from fxopt.transformations import ChangeTrueDivToMulByInverse, EliminateDropout, FuseLinearGELU

X = (torch.randn(2, 8, generator=torch.Generator().manual_seed(0)),)
DROP, DIV, GELU = EliminateDropout(), ChangeTrueDivToMulByInverse(), FuseLinearGELU()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x):
        for layer in self.layers:
            x = F.dropout(layer(x), 0.1, False).tanh() / 3
        return x


@pytest.fixture
def gm():
    return fxopt.capture(Net().eval(), X)


@pytest.mark.parametrize(
    ("limit", "dropouts", "divisions"),
    (
        ("EliminateDropout", 0, 5),
        ("EliminateDropout()", 0, 5),
        ("EliminateDropout:0", 5, 5),
        ("EliminateDropout:1-3", 2, 5),
        ("EliminateDropout:2", 4, 5),
        ("EliminateDropout:1,3-4", 2, 5),
        ("EliminateDropout:1-100", 0, 5),
        ("ChangeTrueDivToMulByInverse:1-2", 0, 3),
        ("ChangeTrueDivToMulByInverse", 0, 0),
    ),
)
def test_what_stands(gm, limit, dropouts, divisions):
    result = fxopt.compose(DROP, DIV, GELU, limit=limit, verify=True, example_inputs=X).run(gm)
    text = show(gm)
    assert (text.count("dropout("), text.count("div(")) == (dropouts, divisions)
    assert result.rewrites == 10 - dropouts - divisions
    assert len(result.steps) == 1 + limit.startswith("Change")


def test_which_rewrites_stand_and_that_the_rest_can_be_made_again(gm):
    whole = fxopt.compose(DROP, inplace=False)(gm)
    fxopt.compose(DROP, DIV, limit="EliminateDropout:2-3")(gm)
    rewrites = fxopt.history(gm)[-1].rewrites
    assert [r.active for r in rewrites] == [False, True, True, False, False]
    for rewrite in rewrites:
        fxopt.history(gm)[-1].rewrites[rewrites.index(rewrite)].apply()
    assert show(gm) == show(whole)
    fxopt.history(gm).checkout(0)
    assert show(gm).count("dropout(") == 5


def test_one_of_several_of_one_name():
    assert Limit.parse("EliminateDropout#2:3", [DROP, DIV, DROP]) == Limit(2, ((3, 3),))
    assert Limit.parse("EliminateDropout#1", [DROP, DIV, DROP]) == Limit(0)
    assert spelled([DROP, DIV, DROP], 2, 4) == "EliminateDropout#2:1-4"
    assert spelled([DROP, DIV], 0) == "EliminateDropout" and spelled([DROP, DIV], 1, 0).endswith(":0")


@pytest.mark.parametrize("count", (None, 0, 1, 2, 30))
def test_what_is_spelled_is_read(count):
    read = Limit.parse(spelled([DROP, DIV, DROP], 2, count), [DROP, DIV, DROP])
    assert read.index == 2
    assert [n for n in range(1, 40) if read.keeps(n)] == list(range(1, 40 if count is None else count + 1))


@pytest.mark.parametrize(
    ("limit", "message"),
    (
        ("Fuse", "names no pass of the pipeline; .* NAME of: EliminateDropout, FuseLinearGELU"),
        ("FuseLinearGELU:x", "'x' says no numbers; write FuseLinearGELU:1-30, .*FuseLinearGELU:0 for none"),
        ("FuseLinearGELU:1-", "'1-' says no numbers"),
        ("FuseLinearGELU:", "'' says no numbers"),
        ("EliminateDropout#2:1,", "'1,' says no numbers; write EliminateDropout#2:1-30"),
        ("Other:1-", "names no pass"),
        ("", "names no pass"),
        ("EliminateDropout:1", "runs EliminateDropout 2 times; say which with EliminateDropout#1 to #2"),
        ("EliminateDropout#3", "2 times"),
    ),
)
def test_a_wrong_limit(limit, message):
    with pytest.raises(UsageError, match=message):
        fxopt.compose(DROP, GELU, DROP, limit=limit)


@pytest.mark.parametrize("numbers", ("99", "6", "1-3,99", "7-8"))
def test_a_rewrite_that_is_not_there(gm, numbers):
    before = gm.code
    asked = numbers.rpartition(",")[2]
    with pytest.raises(UsageError, match=rf"asks for rewrite {asked} of EliminateDropout\(\), which makes 5 rewrites"):
        fxopt.compose(DROP, limit=f"EliminateDropout:{numbers}")(gm)
    assert gm.code == before and not fxopt.history(gm)
    with pytest.raises(UsageError, match="which makes no rewrite here"):
        fxopt.compose(GELU, limit="FuseLinearGELU:1")(gm)


def test_none_of_them_is_said(gm):
    result = fxopt.compose(DROP, limit="EliminateDropout:0", verify=True, example_inputs=X).run(gm)
    assert result.steps[0].note == "none of its 5 rewrites, by the limit"


def test_an_inner_limit_is_refused():
    with pytest.raises(UsageError, match="give the limit to the outer compose"):
        fxopt.compose(fxopt.compose(DROP, limit="EliminateDropout"), DIV)
