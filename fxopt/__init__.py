"""Git for model graphs: verified, timed and reversible transformations of torch.fx graph modules."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Several functions bear the name of their module (fxopt.capture is a function, `from fxopt.capture import …` reads the
# module).  The modules are imported first, so that a later import cannot put one of them in a function's place.
from fxopt.benchmark import benchmark, benchmark_many
from fxopt.bisect import bisect
from fxopt.bisection import Bisection
from fxopt.capture import capture, capture_report
from fxopt.compose import Pipeline, Result, compose, repeat
from fxopt.difference import Difference, diff
from fxopt.errors import FxoptError
from fxopt.history import History, history
from fxopt.measurement import Comparison
from fxopt.pattern import Miss
from fxopt.report import report
from fxopt.shapes import propagate
from fxopt.text import show
from fxopt.transformation import ReversibleTransformation, Rewrite, Transformation
from fxopt.verify import Verification, verify

if TYPE_CHECKING:
    from fxopt.huggingface import dynamo_backend, optimize
    from fxopt.jupyter import step_through
    from fxopt.store import load, save

_LAZY = {  # what needs transformers, or the whole catalogue
    "optimize": "fxopt.huggingface",
    "dynamo_backend": "fxopt.huggingface",
    "save": "fxopt.store",
    "load": "fxopt.store",
    "step_through": "fxopt.jupyter",
}

__all__ = [
    "Bisection",
    "Comparison",
    "Difference",
    "FxoptError",
    "History",
    "Miss",
    "Pipeline",
    "Result",
    "ReversibleTransformation",
    "Rewrite",
    "Transformation",
    "Verification",
    "__version__",
    "benchmark",
    "benchmark_many",
    "bisect",
    "capture",
    "capture_report",
    "compose",
    "diff",
    "dynamo_backend",
    "history",
    "load",
    "optimize",
    "propagate",
    "repeat",
    "report",
    "save",
    "show",
    "step_through",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fxopt' has no attribute {name!r}")
