"""The ways there are to compute a sparse product: plain torch, the library through ctypes, and each instruction set."""

from __future__ import annotations

import pytest
import torch

from fxopt.kernels import block_linear, native, registration, unstructured

WAYS = ("torch", "ctypes", *native.ISAS)


def why_not(way: str) -> str | None:
    """Why this way cannot be taken here; None where it can."""
    if way == "torch":
        return None
    if native.library() is None:
        return f"needs the native library: {native.why_not()}"
    if way != "ctypes" and native.ISAS.index(way) > int(native.library().fxopt_best_isa()):
        return f"this CPU has no {way}"
    return None


def take(way: str, patch: pytest.MonkeyPatch) -> None:
    """From now on, compute this way; skip the test where it cannot be taken."""
    if (reason := why_not(way)) is not None:
        pytest.skip(reason)
    if way in ("torch", "ctypes"):
        patch.setattr(registration, "_are_plain", None)
        for name in ("_linear", "_linear_backward", "_conv2d", "_conv2d_backward"):
            patch.setattr(unstructured, name, None)
        for name in ("_direct", "_direct_gradient"):
            patch.setattr(block_linear, name, None)
    if way == "torch":
        patch.setattr(block_linear, "_product", None)
        for name in ("_run_linear", "_run_linear_backward", "_run_conv2d", "_run_conv2d_backward"):
            patch.setattr(unstructured, name, None)
    elif way != "ctypes":
        number = native.ISAS.index(way)
        pairs = number >= native.ISAS.index("avx512") and bool(native.library().fxopt_multiplies_bfloat16())
        patch.setattr(native, "call_context", lambda: (number, torch.get_num_threads()))
        patch.setattr(native, "multiplies_bfloat16", lambda: pairs)
