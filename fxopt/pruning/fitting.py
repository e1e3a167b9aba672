"""What stands in the place of trees: linear layers fitted to what they compute, or the channels most alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxopt.errors import UsageError
from fxopt.pruning.calibration import Calibration
from fxopt.pruning.patched import Values
from fxopt.transformations._memory import fixed, value
from fxopt.transformations._stand_ins import assigned, stride_of
from fxopt.transformations._trees import out_of_place
from fxopt.transformations.prune_trees import Fit, Matching, PruningTree


def fit(gm: GraphModule, tree: PruningTree, data: Calibration, ridge: float = 1e-2) -> Fit:
    """
    The linear layer, with bias, that comes nearest to ``tree`` on ``data``: least squares with a ridge penalty.

    Of a tree whose input and output have one size, the penalty is on the difference from the identity, else on the
    weight; ``ridge`` is relative to the mean square of the inputs.  In float64.  For images (batch, channels, height,
    width) it mixes channels; for all else the last axis.
    """
    return fits(gm, [tree], data, ridge)[0]


def fits(gm: GraphModule, trees: Sequence[PruningTree], data: Calibration, ridge: float = 1e-2) -> list[Fit]:
    """`fit` for several trees of one graph, each as if it alone went; in one run over the data."""
    return [s.solve(t.id, ridge) for s, t in zip(_moments(gm, trees, data), trees, strict=True)]


def can_fit(tree: PruningTree) -> bool:
    """Whether a linear layer can stand in for ``tree``."""
    return tree.kind not in ("heads", "cat") and not tree.graph


def saved_by_fit(gm: GraphModule, tree: PruningTree) -> int:
    """The parameters that are saved when a fitted linear layer stands in for ``tree``; all of it where none can."""
    if not can_fit(tree):
        return tree.elements
    by = {n.name: value(n) for n in gm.graph.nodes if n.name in (tree.entry, tree.exit)}
    axis = 1 if by[tree.exit].dim() == 4 else -1
    inputs, outputs = (fixed(by[name].shape[axis]) for name in (tree.entry, tree.exit))
    return 0 if inputs is None or outputs is None else tree.elements - (inputs + 1) * outputs


def match(gm: GraphModule, tree: PruningTree, data: Calibration) -> Matching:
    """
    For every channel that ``tree`` gives the channel that it reads with which it is most correlated on ``data``.

    Each is used once, and the sum of the correlations is the largest; where it gives more channels than it reads, the
    others have none.  ``PruneTrees((tree,), fits=(match(gm, tree, data),))`` prunes the difference, and the rest is the
    identity.
    """
    (sums,) = _moments(gm, [tree], data)
    found = sums.correlation()
    return Matching(tree.id, tuple(assigned(found.T).tolist()))


def _moments(gm: GraphModule, trees: Sequence[PruningTree], data: Calibration) -> list[_Sums]:
    """Of what goes into each of ``trees`` and what comes out."""
    wrong = next((t for t in trees if not can_fit(t)), None)
    if wrong is not None:
        raise UsageError(f"{wrong.id} is a tree of kind {wrong.kind}, which nothing can stand in for; leave it out")
    source = out_of_place(gm)
    sums: dict[str, _Sums] = {}
    wanted = {n for t in trees for n in (t.entry, t.exit)}
    for batch in data.batches:
        runner = Values(source, wanted)
        with torch.no_grad():
            runner.run_batch(batch)
        for tree in trees:
            x, y = _rows(runner.found[tree.entry], runner.found[tree.exit], tree)
            sums.setdefault(tree.id, _Sums(x.shape[1], y.shape[1])).add(x, y)
    return [sums[t.id] for t in trees]


def _rows(x: Tensor, y: Tensor, tree: PruningTree) -> tuple[Tensor, Tensor]:
    if not (stride := stride_of(x, y)):
        if x.shape[:-1] != y.shape[:-1]:
            raise UsageError(f"{tree.id} goes from {tuple(x.shape)} to {tuple(y.shape)}, which no linear layer does")
        return x.reshape(-1, x.shape[-1]).double(), y.reshape(-1, y.shape[-1]).double()
    x = x[:, :, ::stride, ::stride]
    return x.movedim(1, -1).reshape(-1, x.shape[1]).double(), y.movedim(1, -1).reshape(-1, y.shape[1]).double()


class _Sums:
    """The moments that least squares needs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.count = 0
        self.x, self.y = torch.zeros(inputs, dtype=torch.float64), torch.zeros(outputs, dtype=torch.float64)
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.yy = torch.zeros(outputs, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        self.count += len(x)
        self.x += x.sum(0).cpu()
        self.y += y.sum(0).cpu()
        self.xx += (x.T @ x).cpu()
        self.xy += (x.T @ y).cpu()
        self.yy += y.square().sum(0).cpu()

    def correlation(self) -> Tensor:
        """Of every input with every output (Pearson); 0 of one that does not vary."""
        n = self.count
        xx = self.xx.diagonal() / n - (self.x / n) ** 2
        yy = self.yy / n - (self.y / n) ** 2
        xy = self.xy / n - torch.outer(self.x, self.y) / n**2
        scale = torch.outer(xx.clamp(min=0).sqrt(), yy.clamp(min=0).sqrt())
        return torch.where(scale > 1e-12, xy / scale.clamp(min=1e-12), torch.zeros((), dtype=xy.dtype))

    def solve(self, tree: str, ridge: float) -> Fit:
        n = self.count
        xx = self.xx / n - torch.outer(self.x, self.x) / n**2
        xy = self.xy / n - torch.outer(self.x, self.y) / n**2
        penalty = ridge * xx.diagonal().mean().clamp(min=1e-12)
        prior = torch.eye(len(self.x), dtype=torch.float64) if xx.shape == xy.shape else torch.zeros_like(xy)
        penalised = xx + penalty * torch.eye(len(self.x), dtype=torch.float64)
        weight = torch.linalg.solve(penalised, xy + penalty * prior)
        bias = self.y / n - self.x / n @ weight
        return Fit(tree, weight.T.float().contiguous(), bias.float())
