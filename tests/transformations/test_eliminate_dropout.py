import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.transformations.eliminate_dropout import EliminateDropout
from tests.rewriting import rewrites, unchanged

X = (torch.randn(2, 8),)


class Net(nn.Module):
    def __init__(self, p=0.1, inplace=False):
        super().__init__()
        self.drop, self.fc = nn.Dropout(p, inplace), nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.drop(x.relu()))


def test_a_dropout_outside_of_training_goes():
    rewrites(EliminateDropout(), Net(), X, "%0 = relu(x)\n%1 = linear(%0, fc.weight, fc.bias)\nreturn %1", rtol=0, atol=0)


def test_a_dropout_in_training_stays():
    unchanged(EliminateDropout(), Net(0.5), X, "expected False, found True", training=True, dialects=("module", "aten"))
