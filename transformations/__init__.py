"""The catalogue: every transformation of fxopt, by name."""

if __name__ != "fxopt.transformations":
    raise ImportError(f"{__name__!r} is not importable by that name; write `import fxopt.transformations`")

from fxopt.compose import compose
from fxopt.transformation import ReversibleTransformation, Rewrite, Transformation
from fxopt.transformations.change_truediv_to_mul_by_inverse import ChangeTrueDivToMulByInverse
from fxopt.transformations.eliminate_common_subexpressions import EliminateCommonSubexpressions
from fxopt.transformations.eliminate_dead_nodes import EliminateDeadNodes
from fxopt.transformations.eliminate_dropout import EliminateDropout
from fxopt.transformations.fold_constants import FoldConstants
from fxopt.transformations.pack_weights import PackWeights

__all__ = [
    "ChangeTrueDivToMulByInverse",
    "EliminateCommonSubexpressions",
    "EliminateDeadNodes",
    "EliminateDropout",
    "FoldConstants",
    "PackWeights",
    "ReversibleTransformation",
    "Rewrite",
    "Transformation",
    "compose",
]
