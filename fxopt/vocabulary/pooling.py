"""Pooling and padding."""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxopt.ops import op, spell
from fxopt.vocabulary import declaring as say

aten = torch.ops.aten


def _pooling(arguments: dict[str, Any]) -> None:
    """Pairs, and a stride that was not said is the kernel's size."""
    if not arguments["stride"]:
        arguments["stride"] = arguments["kernel_size"]
    say.pairs(*(n for n in ("kernel_size", "stride", "padding", "dilation") if n in arguments))(arguments)


def _max_pool_attributes(module: Any) -> dict[str, Any] | str:
    if module.return_indices:
        return "returns indices too"
    return {n: getattr(module, n) for n in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")}


@op(
    spell(nn.MaxPool2d, attributes=_max_pool_attributes),
    # torch picks the function by `return_indices`, which every traced call says
    spell(
        F.max_pool2d,
        "input kernel_size! stride padding dilation ceil_mode return_indices=_",
        must={"return_indices": (False,)},
    ),
    torch.max_pool2d,
    spell(aten.max_pool2d.default, translate={"stride": ((), None)}),
    normalize=_pooling,
)
def max_pool2d(input, kernel_size, stride=None, padding=(0, 0), dilation=(1, 1), ceil_mode=False): ...


@op(
    nn.AvgPool2d,
    F.avg_pool2d,
    spell(aten.avg_pool2d.default, translate={"stride": ((), None)}),
    normalize=_pooling,
)
def avg_pool2d(
    input,
    kernel_size,
    stride=None,
    padding=(0, 0),
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
): ...


@op(
    nn.AdaptiveAvgPool2d,
    F.adaptive_avg_pool2d,
    aten.adaptive_avg_pool2d.default,
    normalize=say.pairs("output_size"),
)
def adaptive_avg_pool2d(input, output_size): ...


def _padding_value(arguments: dict[str, Any]) -> None:
    if arguments["mode"] == "constant" and arguments["value"] is None:
        arguments["value"] = 0.0
    say.floats("value")(arguments)


@op(
    F.pad,
    aten.pad.default,
    spell(aten.constant_pad_nd.default, "input pad value", mode="constant"),
    normalize=_padding_value,
)
def pad(input, pad, mode="constant", value=None): ...
