"""The catalogue: every transformation of fxopt, by name."""

if __name__ != "fxopt.transformations":
    raise ImportError(f"{__name__!r} is not importable by that name; write `import fxopt.transformations`")

from fxopt.transformation import ReversibleTransformation, Rewrite, Transformation
from fxopt.transformations.change_truediv_to_mul_by_inverse import ChangeTrueDivToMulByInverse
from fxopt.transformations.eliminate_dropout import EliminateDropout

__all__ = [
    "ChangeTrueDivToMulByInverse",
    "EliminateDropout",
    "ReversibleTransformation",
    "Rewrite",
    "Transformation",
]
