"""Computation-graph pruning: find what a model does not need, in any graph; take it out; put it back."""

from fxopt.pruning.calibration import Batch, Calibration, cross_entropy, distance, error_rate, mean_loss
from fxopt.pruning.files import save_pruned
from fxopt.pruning.fitting import fit, fits, match
from fxopt.pruning.jobs import loss_deltas
from fxopt.pruning.loop import Iteration, Pruned, prune, restore
from fxopt.pruning.scores import SCORES, milliseconds, score
from fxopt.pruning.width import WIDTH_SCORES, prune_width, width_scores
from fxopt.transformations.prune_trees import Fit, Matching, PruneTrees, PruningTree, Trees, trees
from fxopt.transformations.prune_width import AxisClass, PruneWidth, axes

__all__ = [
    "SCORES",
    "WIDTH_SCORES",
    "AxisClass",
    "Batch",
    "Calibration",
    "Fit",
    "Iteration",
    "Matching",
    "PruneTrees",
    "PruneWidth",
    "Pruned",
    "PruningTree",
    "Trees",
    "axes",
    "cross_entropy",
    "distance",
    "error_rate",
    "fit",
    "fits",
    "loss_deltas",
    "match",
    "mean_loss",
    "milliseconds",
    "prune",
    "prune_width",
    "restore",
    "save_pruned",
    "score",
    "trees",
    "width_scores",
]
