"""Activations."""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fxopt.ops import op, spell
from fxopt.vocabulary import declaring as say

aten = torch.ops.aten


@op(nn.GELU, F.gelu, aten.gelu.default, inplace=(aten.gelu_.default,))
def gelu(input, *, approximate="none"): ...


@op(nn.ReLU, F.relu, torch.relu, "relu", aten.relu.default, inplace=(torch.relu_, "relu_", aten.relu_.default))
def relu(input, inplace=False): ...


@op(nn.ReLU6, F.relu6, aten.relu6.default, inplace=(aten.relu6_.default,))
def relu6(input, inplace=False): ...


@op(nn.SiLU, F.silu, aten.silu.default, inplace=(aten.silu_.default,))
def silu(input, inplace=False): ...


@op(nn.Mish, F.mish, aten.mish.default, inplace=(aten.mish_.default,))
def mish(input, inplace=False): ...


@op(nn.Hardswish, F.hardswish, aten.hardswish.default, inplace=(aten.hardswish_.default,))
def hardswish(input, inplace=False): ...


@op(nn.Hardsigmoid, F.hardsigmoid, aten.hardsigmoid.default, inplace=(aten.hardsigmoid_.default,))
def hardsigmoid(input, inplace=False): ...


@op(
    nn.Hardtanh,
    F.hardtanh,
    aten.hardtanh.default,
    inplace=(aten.hardtanh_.default,),
    normalize=say.floats("min_val", "max_val"),
)
def hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False): ...


@op(nn.LeakyReLU, F.leaky_relu, aten.leaky_relu.default, inplace=(aten.leaky_relu_.default,))
def leaky_relu(input, negative_slope=0.01, inplace=False): ...


@op(
    nn.ELU,
    F.elu,
    spell(aten.elu.default, "input alpha _ _", must={"scale": (1, 1.0), "input_scale": (1, 1.0)}),
    normalize=say.floats("alpha"),
)
def elu(input, alpha=1.0, inplace=False): ...


@op(nn.Softplus, F.softplus, aten.softplus.default, normalize=say.floats("beta", "threshold"))
def softplus(input, beta=1.0, threshold=20.0): ...


@op(nn.Tanh, torch.tanh, F.tanh, "tanh", aten.tanh.default, inplace=(torch.tanh_, "tanh_", aten.tanh_.default))
def tanh(input): ...


@op(
    nn.Sigmoid,
    torch.sigmoid,
    F.sigmoid,
    torch.special.expit,
    "sigmoid",
    aten.sigmoid.default,
    aten.special_expit.default,
    inplace=("sigmoid_", aten.sigmoid_.default),
)
def sigmoid(input): ...


@op(nn.GLU, F.glu, aten.glu.default)
def glu(input, dim=-1): ...


@op(
    spell(nn.Softmax, attributes=lambda m: {"dim": m.dim}),
    spell(F.softmax, "input dim _ dtype"),
    spell(torch.softmax, "input dim dtype"),
    "softmax",
    aten.softmax.int,
    spell(aten._softmax.default, "input dim _", must={"half_to_float": (False,)}),
)
def softmax(input, dim=None, dtype=None): ...


@op(
    spell(nn.LogSoftmax, attributes=lambda m: {"dim": m.dim}),
    spell(F.log_softmax, "input dim _ dtype"),
    spell(torch.log_softmax, "input dim dtype"),
    "log_softmax",
    aten.log_softmax.int,
    spell(aten._log_softmax.default, "input dim _", must={"half_to_float": (False,)}),
)
def log_softmax(input, dim=None, dtype=None): ...
