"""What near-misses of several fusions have in common."""

import pytest
import torch
from torch import nn

from tests.rewriting import trace


class Odd(nn.Parameter):
    """A parameter of a type that fused operators do not know."""


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def hooked(module):
    module.register_forward_hook(lambda m, a, out: out + 1)
    return module


def refuses_odd_parameters(transformation, model, inputs, path):
    """Assert that a parameter of another type at ``path`` is a miss that names it."""
    gm = trace(model.eval(), inputs, "function")
    owner, _, name = path.rpartition(".")
    module = gm.get_submodule(owner)
    setattr(module, name, Odd(getattr(module, name).detach()))
    code = gm.code
    reasons = [m.reason for m in transformation.misses(gm)]
    assert f"{path} is a Odd of layout torch.strided, expected a plain tensor" in reasons
    transformation(gm)
    assert gm.code == code


def same_gradients(transformation, model, inputs):
    """Assert that training through the result gives the parameters the same gradients."""
    model.eval()
    model(*inputs).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    gm = trace(model, inputs, "function")
    transformation(gm)
    gm(*inputs).square().sum().backward()
    assert expected
    for name, parameter in gm.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def cases(*given):
    """Near-misses as parameters of a test, by name."""
    return pytest.mark.parametrize(
        ("model", "inputs", "reason", "options"),
        [(m, i, r, o[0] if o else {}) for _, m, i, r, *o in given],
        ids=[g[0] for g in given],
    )
