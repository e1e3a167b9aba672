"""Batch normalisations with a history, beside the layers into which they are folded."""

import pytest
import torch
from torch import nn

NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Modules do not look at the number of dimensions, which no tracer can follow."""
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        monkeypatch.setattr(kind, "_check_input_dim", lambda self, x: None)


def norm(features, dimensions, affine=True, dtype=torch.float32, **kwargs):
    """A normalisation in inference, with statistics and weights that are not those of a fresh one."""
    made = NORMS[dimensions](features, affine=affine, **kwargs)
    with torch.no_grad():
        if made.running_mean is not None:
            made.running_mean.normal_()
            made.running_var.uniform_(0.3, 3.0)
        if affine:
            made.weight.normal_()
            made.bias.normal_()
    return made.eval().to(dtype)


class Pair(nn.Module):
    """Two modules in a row, called as they stand in the lists of parameters."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.names = tuple(modules)

    def forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return x
