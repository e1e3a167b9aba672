"""Which units of a width matter: scores for `PruneWidth` that need data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxopt import ops
from fxopt import vocabulary as words
from fxopt.errors import UsageError
from fxopt.pruning.calibration import Calibration, Loss, distance
from fxopt.pruning.patched import Values
from fxopt.pruning.scores import _perturbed, sum_by_unit
from fxopt.transformations._axes import Axes, AxisClass, index_map
from fxopt.transformations._trees import out_of_place
from fxopt.transformations.prune_width import PruneWidth, choose, magnitude

WIDTH_SCORES = ("magnitude", "random", "taylor", "fisher", "wanda")


def width_scores(
    gm: GraphModule,
    by: str = "taylor",
    data: Calibration | None = None,
    loss: Loss = distance,
    kinds: Sequence[str] = ("heads", "features", "channels"),
    seed: int = 0,
) -> dict[str, Tensor]:
    """
    For each class of axes the score of each of its units, (units,) float64; the lower, the less it matters.

    ``magnitude``: the norm of its parameters; ``random``: by ``seed``; ``taylor``: |sum of weight x gradient|
    (Molchanov et al., 2019); ``fisher``: its mean square over batches; ``wanda``: |weight| x the norm of the input,
    over the layers that read it (Sun et al., 2023).  Raises `UsageError` where data are missing.
    """
    if by not in WIDTH_SCORES:
        raise UsageError(f"width score {by!r} is not known; give one of {', '.join(WIDTH_SCORES)}")
    if by not in ("magnitude", "random") and data is None:
        raise UsageError(f"the score {by} needs calibration data; give data=Calibration.of([…])")
    source = out_of_place(gm)
    axes = Axes(source)
    classes = [c for c in axes.classes() if c.kind in kinds]
    if by == "magnitude":
        return {c.id: magnitude(axes, c) for c in classes}
    if by == "random":
        generator = torch.Generator().manual_seed(seed)
        return {c.id: torch.rand(c.size, generator=generator, dtype=torch.float64) for c in classes}
    assert data is not None
    if by == "wanda":
        return _wanda(source, axes, classes, data)
    return _by_gradient(source, axes, classes, data, loss, squared=by == "fisher")


def prune_width(
    gm: GraphModule,
    ratio: float,
    by: str = "taylor",
    data: Calibration | None = None,
    loss: Loss = distance,
    kinds: Sequence[str] = ("heads", "features", "channels"),
    scope: str = "layer",
    round_to: int = 1,
) -> PruneWidth:
    """The transformation that cuts ``ratio`` of the units, those with the lowest scores; apply it with a call."""
    scores = width_scores(gm, by, data, loss, kinds)
    classes = [c for c in Axes(out_of_place(gm)).classes() if c.id in scores]
    if scope == "global":  # scores of different layers are compared: each over its mean
        scores = {n: s / s.mean().clamp(min=1e-30) for n, s in scores.items()}
    return PruneWidth(drop=tuple(choose(classes, scores, ratio, scope, round_to).items()))


def _by_gradient(
    gm: GraphModule, axes: Axes, classes: Sequence[AxisClass], data: Calibration, loss: Loss, squared: bool
) -> dict[str, Tensor]:
    parameters = list({id(p): p for p in gm.parameters() if p.is_floating_point()}.values())
    frozen = [p.requires_grad for p in parameters]
    total = {c.id: torch.zeros(c.size, dtype=torch.float64) for c in classes}
    try:
        for p in parameters:
            p.requires_grad_(True)
        for batch in data.batches:
            runner = Values(gm, set())
            with torch.enable_grad():
                output = runner.run_batch(batch)
                reference = _perturbed(output) if loss is distance else output
                gradients = torch.autograd.grad(loss(output, batch, reference), parameters, allow_unused=True)
            held = {id(p): g for p, g in zip(parameters, gradients, strict=True)}
            for c in classes:
                line = sum_by_unit(axes, c, lambda p: _product(p, held.get(id(p))))  # noqa: B023
                total[c.id] += line.square() if squared else line.abs()
    finally:
        for p, flag in zip(parameters, frozen, strict=True):
            p.requires_grad_(flag)
    return {name: value / len(data.batches) for name, value in total.items()}


def _product(p: Tensor, g: Tensor | None) -> Tensor | None:
    return None if g is None else p.detach().double() * g.double()


_READS: Mapping[ops.Op, tuple[str, str, int, int]] = {  # input, weight, its input axis, the axis of the features
    words.linear: ("input", "weight", 1, -1),
    words.addmm: ("mat1", "mat2", 0, -1),
    words.mm: ("input", "mat2", 0, -1),
    words.conv1d: ("input", "weight", 1, 1),
    words.conv2d: ("input", "weight", 1, 1),
    words.conv3d: ("input", "weight", 1, 1),
}


def _wanda(gm: GraphModule, axes: Axes, classes: Sequence[AxisClass], data: Calibration) -> dict[str, Tensor]:
    readers = [(n, call) for n, call in axes.calls.items() if call is not None and call.op in _READS]
    wanted = {call.arguments[_READS[call.op][0]].name for _, call in readers}
    squares: dict[str, Tensor] = {}
    for batch in data.batches:
        runner = Values(gm, wanted)
        with torch.no_grad():
            runner.run_batch(batch)
        for node, call in readers:
            name, _, _, axis = _READS[call.op]
            x = runner.found[call.arguments[name].name].double()
            line = x.movedim(axis, -1).reshape(-1, x.shape[axis]).square().sum(0).cpu()
            squares[node.name] = squares.get(node.name, torch.zeros_like(line)) + line
    total = {c.id: torch.zeros(c.size, dtype=torch.float64) for c in classes}
    for node, call in readers:
        _, weight, axis, _ = _READS[call.op]
        held, dims = ops.constant(gm, call.arguments[weight]), axes.parameter(call.arguments[weight])
        if not isinstance(held, nn.Parameter) or dims is None or held.shape[axis] != len(squares[node.name]):
            continue
        others = [i for i in range(held.dim()) if i != axis]
        line = held.detach().double().abs().sum(others).cpu() * squares[node.name].sqrt()
        for c in classes:
            index = index_map(dims[axis], c.leaf)
            if index is not None and bool((index >= 0).any()):
                total[c.id].index_add_(0, index[index >= 0], line[index >= 0])
    return total
