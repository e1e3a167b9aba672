"""Normalisation and dropout."""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxopt.ops import op, spell

aten = torch.ops.aten


def _shape(name: str) -> Any:
    def normalize(arguments: dict[str, Any]) -> None:
        if isinstance(arguments[name], int):
            arguments[name] = (arguments[name],)

    return normalize


def _training(arguments: Mapping[str, Any]) -> bool:
    return arguments["training"] is not False and arguments.get("p", 1.0) != 0.0


def _batch_norm_attributes(module: Any) -> dict[str, Any] | str:
    training = module.training or module.running_mean is None
    if module.momentum is None and module.training:
        return "averages its statistics cumulatively"
    tensors = {n: getattr(module, n) for n in ("running_mean", "running_var", "weight", "bias")}
    return tensors | {"training": training, "momentum": module.momentum or 0.0, "eps": module.eps}


def _batch_norm_writes(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    return ("running_mean", "running_var") if arguments["training"] is not False else ()


@op(
    spell(nn.BatchNorm1d, attributes=_batch_norm_attributes),
    spell(nn.BatchNorm2d, attributes=_batch_norm_attributes),
    spell(nn.BatchNorm3d, attributes=_batch_norm_attributes),
    F.batch_norm,
    spell(
        aten.batch_norm.default,
        "input weight bias running_mean running_var training momentum eps _",
        must={"cudnn_enabled": (True, False)},
    ),
    writes=_batch_norm_writes,
)
def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05): ...


@op(
    nn.LayerNorm,
    F.layer_norm,
    spell(aten.layer_norm.default, "input normalized_shape weight bias eps _"),
    normalize=_shape("normalized_shape"),
)
def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-05): ...


@op(nn.RMSNorm, F.rms_norm, aten.rms_norm.default, normalize=_shape("normalized_shape"))
def rms_norm(input, normalized_shape, weight=None, eps=None): ...


@op(nn.GroupNorm, F.group_norm, spell(aten.group_norm.default, "input num_groups weight bias eps _"))
def group_norm(input, num_groups, weight=None, bias=None, eps=1e-05): ...


@op(
    spell(nn.Dropout, attributes=lambda m: {"p": m.p, "training": m.training, "inplace": m.inplace}),
    F.dropout,
    spell(torch.dropout, "input p! train=training!"),
    aten.dropout.default,
    inplace=(
        spell(torch.dropout_, "input p! train=training!", inplace=True),
        spell(aten.dropout_.default, inplace=True),
    ),
    random=_training,
    view=True,
)
def dropout(input, p=0.5, training=True, inplace=False): ...


@op(
    spell(torch.feature_dropout, "input p! train=training!"),
    spell(nn.Dropout1d, attributes=lambda m: {"p": m.p, "training": m.training, "inplace": m.inplace}),
    spell(nn.Dropout2d, attributes=lambda m: {"p": m.p, "training": m.training, "inplace": m.inplace}),
    spell(nn.Dropout3d, attributes=lambda m: {"p": m.p, "training": m.training, "inplace": m.inplace}),
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    aten.feature_dropout.default,
    inplace=(
        spell(torch.feature_dropout_, "input p! train=training!", inplace=True),
        spell(aten.feature_dropout_.default, inplace=True),
    ),
    random=_training,
    view=True,
)
def feature_dropout(input, p=0.5, training=True, inplace=False): ...


@op(
    spell(nn.AlphaDropout, attributes=lambda m: {"p": m.p, "training": m.training}),  # does not look at its inplace
    F.alpha_dropout,
    spell(torch.alpha_dropout, "input p! train=training!"),
    aten.alpha_dropout.default,
    inplace=(
        spell(torch.alpha_dropout_, "input p! train=training!", inplace=True),
        spell(aten.alpha_dropout_.default, inplace=True),
    ),
    random=_training,
    view=True,
)
def alpha_dropout(input, p=0.5, training=True, inplace=False): ...


@op(
    spell(nn.FeatureAlphaDropout, attributes=lambda m: {"p": m.p, "training": m.training}),
    F.feature_alpha_dropout,
    spell(torch.feature_alpha_dropout, "input p! train=training!"),
    aten.feature_alpha_dropout.default,
    inplace=(
        spell(torch.feature_alpha_dropout_, "input p! train=training!", inplace=True),
        spell(aten.feature_alpha_dropout_.default, inplace=True),
    ),
    random=_training,
    view=True,
)
def feature_alpha_dropout(input, p=0.5, training=True, inplace=False): ...
