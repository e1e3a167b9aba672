"""How much each tree matters: the scores, lowest first to go."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxopt.delta import graphs, share
from fxopt.errors import UsageError
from fxopt.pruning.calibration import Batch, Calibration, Loss, distance
from fxopt.pruning.patched import Prefix, Values
from fxopt.transformations._axes import Axes, AxisClass, index_map
from fxopt.transformations._heads import attentions
from fxopt.transformations._trees import out_of_place
from fxopt.transformations.prune_trees import PruningTree

# Scores that need no run of the graph, one run, a gradient, and one run for each tree.
WEIGHT_SCORES = ("magnitude", "magnitude_mean", "magnitude_normalized", "random")
RUN_SCORES = ("block_influence", "angular")
SCORES = (*WEIGHT_SCORES, *RUN_SCORES, "taylor", "loss_delta")
_AT_REST = 1e-9  # a distance below which the output is the reference, and the gradient rounding errors


def score(
    gm: GraphModule,
    trees: Sequence[PruningTree],
    by: str = "block_influence",
    data: Calibration | None = None,
    loss: Loss = distance,
    seed: int = 0,
    per_ms: bool = False,
) -> dict[str, float]:
    """
    A score for each of ``trees``, by name; the lower, the less it matters.

    ``magnitude``: the sum of squares of its parameters (the seed's criterion, which favours small trees);
    ``magnitude_mean``: over their number; ``magnitude_normalized``: each parameter's over its own mean square in the
    graph.  ``random``: by ``seed``.  ``block_influence``: 1 - the cosine of what goes in and what comes out, mean over
    tokens or places (ShortGPT, Men et al., 2024); ``angular``: the angle over pi (Gromov et al., 2024).  ``taylor``:
    the first-order change of ``loss`` when the output becomes the input, else the sum of |weight x gradient| squared
    (Molchanov et al., 2017).  ``loss_delta``: the change of ``loss`` when the tree goes.  ``per_ms`` divides by the
    measured milliseconds that the tree takes.

    block_influence and angular are not defined (nan) for trees that change the size.  Raises `UsageError` where data
    are missing.
    """
    if by not in SCORES:
        raise UsageError(f"score {by!r} is not known; give one of {', '.join(SCORES)}")
    if by not in WEIGHT_SCORES and data is None:
        raise UsageError(f"the score {by} needs calibration data; give data=Calibration.of([…])")
    groups = [t for t in trees if t.kind == "heads"]
    if by in WEIGHT_SCORES:
        found = {t.id: _WEIGHTED[by](gm, t, seed) for t in trees}
        if groups and by != "random":
            found |= _of_groups(gm, groups, by)
    elif by in RUN_SCORES:
        assert data is not None
        found = _of_values(gm, trees, data, angular=by == "angular")
    elif by == "taylor":
        assert data is not None
        found = _taylor(gm, trees, data, loss)
    else:
        from fxopt.pruning.jobs import loss_deltas

        assert data is not None
        found = loss_deltas(gm, trees, data, loss)
    if not per_ms:
        return found
    if data is None:
        raise UsageError("milliseconds are measured on calibration data; give data=Calibration.of([…])")
    saved = milliseconds(gm, trees, data.batches[0])
    # a negative score is a gain, and stays first: dividing keeps its sign
    return {name: value / max(saved[name], 1e-6) for name, value in found.items()}


# --- from weights alone ---------------------------------------------------------------------------------------------


def _parameters(gm: GraphModule, tree: PruningTree) -> list[Tensor]:
    known = dict(gm.named_parameters(remove_duplicate=False))
    prefix = f"{tree.graph}." if tree.graph else ""
    return [known[prefix + name].detach() for name in tree.parameters]


def _share(gm: GraphModule, tree: PruningTree) -> float:
    """The share of its parameters that goes with a tree; less than 1 for attention groups."""
    total = sum(t.numel() for t in _parameters(gm, tree))
    return tree.elements / total if total else 0.0


def _magnitude(gm: GraphModule, tree: PruningTree, seed: int) -> float:
    return _share(gm, tree) * sum(float(t.double().square().sum()) for t in _parameters(gm, tree))


def _magnitude_mean(gm: GraphModule, tree: PruningTree, seed: int) -> float:
    return _magnitude(gm, tree, seed) / max(tree.elements, 1)


def _magnitude_normalized(gm: GraphModule, tree: PruningTree, seed: int) -> float:
    kinds: dict[str, list[float]] = {}
    for name, p in gm.named_parameters():
        kinds.setdefault(name.rpartition(".")[2] + str(p.dim()), []).append(float(p.detach().double().square().mean()))
    total = 0.0
    for name, t in zip(tree.parameters, _parameters(gm, tree), strict=True):
        usual = kinds.get(name.rpartition(".")[2] + str(t.dim()), [1.0])
        total += float(t.double().square().sum()) / max(sum(usual) / len(usual), 1e-30)
    return total * _share(gm, tree) / max(tree.elements, 1)


def _random(gm: GraphModule, tree: PruningTree, seed: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed} {tree.id}".encode()).digest()[:7], "big") / 256**7


_WEIGHTED: Mapping[str, Callable[[GraphModule, PruningTree, int], float]] = {
    "magnitude": _magnitude,
    "magnitude_mean": _magnitude_mean,
    "magnitude_normalized": _magnitude_normalized,
    "random": _random,
}


def _of_groups(gm: GraphModule, trees: Sequence[PruningTree], by: str) -> dict[str, float]:
    """The same of key/value groups: of what each has in its parameters, not of its share in all."""
    found = {}
    for path, inner in graphs(gm).items():
        mine = [t for t in trees if t.graph == path]
        squares = unit_sums(inner, lambda t: t.detach().double().square()) if mine else {}
        for tree in mine:
            total = float(squares[_node_of(tree)][int(tree.id.rpartition("#")[2])])
            if by == "magnitude_mean":
                total /= max(tree.elements, 1)
            elif by == "magnitude_normalized":
                all_units = squares[_node_of(tree)]
                total /= max(float(all_units.mean()), 1e-30)
            found[tree.id] = total
    return found


def _node_of(tree: PruningTree) -> str:
    return tree.exit


def unit_sums(gm: GraphModule, of: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """By attention: for each key/value group, the sum of ``of(parameter)`` over what the group has of it."""
    source = out_of_place(gm)
    axes = Axes(source)
    found = {}
    for attention in attentions(axes):
        found[attention.node.name] = sum_by_unit(axes, attention.axis, of)
    return found


def sum_by_unit(axes: Axes, axis: AxisClass, of: Callable[[Tensor], Tensor | None]) -> Tensor:
    """For each unit of a class of axes, the sum of ``of(parameter)`` over what it has of it: (units,) float64."""
    total = torch.zeros(axis.size, dtype=torch.float64)
    for path, dims, tensor in axes.parameters.values():
        for number, dim in enumerate(dims):
            if (path, number) not in axis.members or not isinstance(tensor, nn.Parameter):
                continue
            values, index = of(tensor), index_map(dim, axis.leaf)
            if values is None or index is None:
                continue
            others = [i for i in range(values.dim()) if i != number]
            line = (values.sum(others) if others else values).double().cpu()
            total.index_add_(0, index[index >= 0], line[index >= 0])
    return total


# --- from values ----------------------------------------------------------------------------------------------------


def _of_values(gm: GraphModule, trees: Sequence[PruningTree], data: Calibration, angular: bool) -> dict[str, float]:
    source = out_of_place(gm)
    total: dict[str, float] = {t.id: 0.0 for t in trees}
    for batch in data.batches:
        runner = Values(source, {n for t in trees for n in (t.entry, t.exit) if not t.graph})
        with torch.no_grad():
            runner.run_batch(batch)
        for tree in trees:
            x, y = runner.found.get(tree.entry), runner.found.get(tree.exit)
            if x is None or y is None or x.shape != y.shape or tree.kind in ("heads", "cat", "layer"):
                total[tree.id] = math.nan
                continue
            axis = 1 if x.dim() == 4 else -1
            cosine = F.cosine_similarity(x.double(), y.double(), dim=axis).clamp(-1, 1)
            value = cosine.arccos().mean() / math.pi if angular else (1 - cosine).mean()
            total[tree.id] += float(value)
    return {name: value / len(data.batches) for name, value in total.items()}


def _taylor(gm: GraphModule, trees: Sequence[PruningTree], data: Calibration, loss: Loss) -> dict[str, float]:
    source = _differentiable(out_of_place(gm))
    total: dict[str, float] = {t.id: 0.0 for t in trees}
    parameters = dict(source.named_parameters(remove_duplicate=False))
    wanted = {n for t in trees for n in (t.entry, t.exit) if not t.graph}
    for batch in data.batches:
        _taylor_batch(source, trees, batch, loss, wanted, parameters, total)
    return {name: abs(value) / len(data.batches) for name, value in total.items()}


def _differentiable(gm: GraphModule) -> GraphModule:
    """A copy in the same memory whose parameters, tied ones too, are its own and all take gradients."""
    twin = share(gm)
    own: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_floating_point():
                module._parameters[name] = own.setdefault(id(p), nn.Parameter(p.detach()))
    return twin


def _taylor_batch(
    gm: GraphModule,
    trees: Sequence[PruningTree],
    batch: Batch,
    loss: Loss,
    wanted: set[str],
    parameters: Mapping[str, nn.Parameter],
    total: dict[str, float],
) -> None:
    runner = Values(gm, wanted, gradients=True)
    with torch.enable_grad():
        output = runner.run_batch(batch)
        reference: object = output
        if loss is distance and float(distance(output, batch, output).detach()) < _AT_REST:
            batch, reference = Batch(batch.inputs), _perturbed(output)
        value = loss(output, batch, reference)
        unique = list({id(p): p for p in parameters.values()}.values())
        values = [v for v in runner.found.values() if v.requires_grad]
        gradients = torch.autograd.grad(value, [*values, *unique], allow_unused=True)
    of_value = {id(v): g for v, g in zip(values, gradients, strict=False)}
    of_weight = {id(p): g for p, g in zip(unique, gradients[len(values) :], strict=True)}
    groups: dict[str, Tensor] = {}
    if any(t.kind == "heads" for t in trees):
        groups = unit_sums(gm, lambda p: _weight_times_gradient(p, of_weight.get(id(p))))
    for tree in trees:
        if tree.kind == "heads" and not tree.graph:
            total[tree.id] += abs(float(groups[tree.exit][int(tree.id.rpartition("#")[2])]))
            continue
        x, y = runner.found.get(tree.entry), runner.found.get(tree.exit)
        g = None if y is None else of_value.get(id(y))
        if x is not None and y is not None and g is not None and x.shape == y.shape and x is not y:
            total[tree.id] += float(((x - y).detach().double() * g.double()).sum())
            continue
        prefix = f"{tree.graph}." if tree.graph else ""
        held = [parameters[prefix + n] for n in tree.parameters]
        parts = [(p.detach().double() * w.double()).abs().sum() for p in held if (w := of_weight[id(p)]) is not None]
        total[tree.id] += float(sum(parts, torch.zeros((), dtype=torch.float64))) * _share_of(held, tree)


def _weight_times_gradient(p: Tensor, g: Tensor | None) -> Tensor | None:
    return None if g is None else p.detach().double() * g.double()


def _share_of(held: Sequence[Tensor], tree: PruningTree) -> float:
    return tree.elements / max(sum(t.numel() for t in held), 1)


def _perturbed(output: object) -> object:
    """A reference that is off, for a loss whose gradient vanishes at the dense output itself."""
    from torch.utils._pytree import tree_map_only

    generator = torch.Generator().manual_seed(0)

    def shift(t: Tensor) -> Tensor:
        noise = torch.randn(t.shape, generator=generator).to(t)
        return t.detach() + noise * t.detach().std() if t.is_floating_point() else t

    return tree_map_only(Tensor, shift, output)


# --- time -----------------------------------------------------------------------------------------------------------


def milliseconds(gm: GraphModule, trees: Sequence[PruningTree], batch: Batch, repeats: int = 5) -> dict[str, float]:
    """The milliseconds that the operations of each tree take, measured one by one: the least of ``repeats`` runs."""
    best: dict[str, float] = {}
    for _ in range(repeats + 1):
        timer = _Timer(gm)
        with torch.no_grad():
            timer.run_batch(batch)
        for name, seconds in timer.seconds.items():
            best[name] = min(best.get(name, math.inf), seconds)
    readers = {t.exit: _of_group(gm, t) for t in trees if t.kind == "heads" and not t.graph}
    found = {}
    for tree in trees:
        if tree.kind == "heads":
            nodes, share = readers.get(tree.exit, ()), _share(gm, tree)
            found[tree.id] = 1e3 * share * sum(best.get(n, 0.0) for n in nodes)
        else:
            found[tree.id] = 1e3 * sum(best.get(n, 0.0) for n in tree.operations)
    return found


def _of_group(gm: GraphModule, tree: PruningTree) -> list[str]:
    """The layers and the attention that have a group's heads."""
    paths = set(tree.parameters)
    readers = [u.name for n in gm.graph.find_nodes(op="get_attr") if n.target in paths for u in n.users]
    return [*readers, tree.exit]


class _Timer(Values):
    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, set())
        self.seconds: dict[str, float] = {}

    def run_node(self, n: Node) -> object:
        start = time.perf_counter()
        value = Interpreter.run_node(self, n)
        if isinstance(value, Tensor) and value.is_cuda:
            torch.cuda.synchronize(value.device)
        self.seconds[n.name] = time.perf_counter() - start
        return value


def without(prefix: Prefix, tree: PruningTree) -> object:
    """What the graph of ``prefix`` gives without ``tree``."""
    from fxopt.pruning.patched import edited, is_patch

    if is_patch(tree):
        return prefix.without(tree)
    with torch.no_grad():
        return prefix.batch.call(edited(prefix.gm, tree))
