"""What declarations of operations have in common: how arguments are brought to one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Said = tuple[tuple[Any, ...], Mapping[str, Any]]  # positional and keyword arguments of a call


def pairs(*names: str, n: int = 2) -> Any:
    """Numbers as ``n``-tuples: stride=1 and stride=(1, 1) are one thing."""

    def normalize(arguments: dict[str, Any]) -> None:
        for name in names:
            value = arguments[name]
            if name == "padding" and value == "valid":
                arguments[name] = (0,) * n
            elif isinstance(value, int):
                arguments[name] = (value,) * n
            elif isinstance(value, tuple) and len(value) == 1:
                arguments[name] = value * n

    return normalize


def floats(*names: str) -> Any:
    """Numbers as floats: slope=1 and slope=1.0 are one thing."""

    def normalize(arguments: dict[str, Any]) -> None:
        for name in names:
            if isinstance(arguments[name], int) and not isinstance(arguments[name], bool):
                arguments[name] = float(arguments[name])

    return normalize


def device(arguments: dict[str, Any]) -> None:
    """A device's name as the device."""
    if isinstance(arguments["device"], str):
        arguments["device"] = torch.device(arguments["device"])
