"""What stands in no module, written so that another process can import it."""

import functools
import importlib.util
import math
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from fxopt.portable import NotPortable, digest, portable
from fxopt.transformation import Transformation
from fxopt.transformations import EliminateDropout

aten = torch.ops.aten
FACTOR = 3


def written(thing, folder):
    """The same from a module that was written anew."""
    found = portable(thing)
    path = folder / "bisected.py"
    path.write_text(found.text)
    if found.tensors:
        save_file(dict(found.tensors), folder / "bisected.safetensors")
    spec = importlib.util.spec_from_file_location(f"bisected_{folder.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, found.name)


def test_a_function_in_a_function(tmp_path):
    weight, nested = torch.arange(6.0).reshape(2, 3).t(), {"a": (1, 2.5, [None, "x"]), "t": [torch.ones(2)], 3: {4}}
    far = {"inf": math.inf, "type": torch.float16}

    def helper(x):
        return x * FACTOR

    def check(x, *, extra=2):
        y = [helper(v) for v in nested["t"]]
        return y[0] + weight[0, 1] + nested["a"][1] + extra, far, aten.relu.default(-x), max(nested[3])

    again = written(check, tmp_path)
    assert again.__code__ is not check.__code__
    for got, expected in zip(again(torch.ones(2)), check(torch.ones(2)), strict=True):
        assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected


def test_a_class_with_its_base(tmp_path):
    class Base(Transformation):
        def double(self):
            return 2 * self.number

    @dataclass(frozen=True)
    class Mine(Base):
        number: int = 1

        def transform(self, graph_module):
            return math.sqrt(self.double()) * FACTOR

    again = written(Mine, tmp_path)
    assert again(8).transform(None) == 12.0 and again(8) == again(8) and issubclass(again, Transformation)


def test_one_of_several_lambdas_on_a_line(tmp_path):
    outer, inner = (lambda x: lambda y: x + y), lambda z: -z
    assert written(inner, tmp_path)(3) == -3
    assert written(outer(4), tmp_path)(3) == 7


def test_what_can_be_imported_stays_where_it_is():
    assert str(portable(EliminateDropout)) == f"{EliminateDropout.__module__}:EliminateDropout"
    assert not portable(EliminateDropout).text


def test_a_file_of_ones_own_is_taken_along(tmp_path, monkeypatch):
    (tmp_path / "of_my_own.py").write_text("def check(gm):\n    return True\n")
    monkeypatch.syspath_prepend(tmp_path)
    import of_my_own

    found = portable(of_my_own.check)
    assert str(found) == "of_my_own:check" and found.copied == (tmp_path / "of_my_own.py",)
    nested = portable(lambda gm: of_my_own.check(gm))
    assert nested.copied == found.copied and "import of_my_own as of_my_own" in nested.text
    sys.modules.pop("of_my_own")


@pytest.mark.parametrize(
    ("thing", "why"),
    (
        (functools.partial(max, 1), "a partial is no class or function"),
        (eval("lambda gm: gm"), "the source of <lambda> is not known"),
        ((lambda model: lambda gm: model)(torch.nn.Linear(1, 1)), "refers to model, a Linear, which cannot be written"),
    ),
)
def test_what_cannot_be_taken_along(thing, why):
    with pytest.raises(NotPortable, match=why):
        portable(thing)


def test_a_digest_tells_code_apart():
    def made(limit, tensor=None):
        def check(gm):
            return gm is tensor or limit

        return check

    def other(limit, tensor=None):
        def check(gm):
            return gm is tensor and limit

        return check

    t = torch.ones(2)
    assert digest(made(1, t)) == digest(made(1, t.clone()))
    found = {digest(f) for f in (made(1, t), made(2, t), made(1, 2 * t), other(1, t))}
    assert len(found) == 4
    assert digest(functools.partial(made, 1)) != digest(functools.partial(made, 2))
    assert digest(EliminateDropout) == digest(EliminateDropout)
