"""Training where the blocks are, too: weak blocks move to other places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fxopt.errors import UsageError
from fxopt.kernels.block_linear import block_gradient, transposed_index
from fxopt.sparse.block_linear import BlockSparseLinear
from fxopt.sparse.block_optimizer import operands

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

Grow = Literal["random", "gradient"]


@dataclass(frozen=True)
class Moved:
    """What one step did to one layer."""

    path: str
    moved: int
    blocks: int


@dataclass(frozen=True)
class _Layer:
    """The tensors of one block-sparse weight."""

    path: str
    data: nn.Parameter
    crow: Tensor
    col: Tensor
    index: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        return self.crow.numel() - 1, self.index.numel() - 3 * self.data.shape[0] - 1

    @property
    def flat(self) -> Tensor:
        """The number of each block's place, row by row; int64 on the CPU."""
        row = self.index[: self.data.shape[0]].cpu().long()
        return row * self.grid[1] + self.col.cpu().long()


class BlockRegrow:
    """
    Drops the weakest blocks of a model's block-sparse layers and grows as many in other places, in place.

        regrow = BlockRegrow(model, optimizer, fraction=0.1, grow="gradient")
        ...
        with regrow.scoring():  # every so many steps; "random" needs no scoring
            loss(model(x)).backward()
        regrow.step()

    The weakest have the smallest norm. New blocks begin at zero, at random places ("random": Mocanu et al., 2018, by
    blocks), or where the gradient is largest among `candidates` times as many random places ("gradient", as RigL, Evci
    et al., 2020). Their optimizer state begins at zero too, for any optimizer whose state has one entry a block in its
    first dimension; the state of the others goes with them. The number of blocks, the parameters and their memory stay
    the same, so optimizers, CUDA graphs and compiled code go on. `seed` makes the choice repeatable. At least one
    block of a layer moves, and never all: one that has a single block keeps it.

    Processes that train one model together move the same blocks: the gradients are summed over `process_group`, and
    its first process chooses where there is chance. By default that is the group of the `DistributedDataParallel` in
    `model`, or else torch's default one, if there is any; where its processes have other weights each (tensor or
    pipeline parallelism), give the group of those that have the same. All of them have to call `scoring` and `step`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        fraction: float = 0.1,
        grow: Grow = "random",
        candidates: float = 4.0,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if not 0 < fraction < 1:
            raise UsageError(f"fraction={fraction!r} was given, expected a number between 0 and 1: the share to move")
        if grow not in ("random", "gradient"):
            raise UsageError(f"grow={grow!r} was given, expected 'random' or 'gradient'")
        if candidates < 1:
            raise UsageError(f"candidates={candidates!r} was given, expected at least 1: as many as are grown")
        found = _layers(model)
        self._layers = list(found.values())
        if not found:
            raise UsageError("the model has no block-sparse layer; make some with BlockSparsify or from_dense")
        self._modules = [m for m in model.modules() if isinstance(m, BlockSparseLinear)]
        read = {id(data) for m in model.modules() if isinstance(m, GraphModule) for data, *_ in _weights(m)}
        if grow == "gradient" and (lost := [x.path for i, x in found.items() if i in read]):
            raise UsageError(
                f"{lost[0]} is no BlockSparseLinear module, whose gradient could be seen; use grow='random'"
            )
        self._optimizer, self._fraction, self._grow, self._candidates = optimizer, fraction, grow, candidates
        wrapped = (m.process_group for m in model.modules() if isinstance(m, DistributedDataParallel))
        self._process_group = process_group or next(wrapped, None)
        self._generator = torch.Generator().manual_seed(seed)
        self._scores: dict[int, tuple[Tensor, Tensor]] = {}  # of a layer's data: places, their summed gradients

    def step(self) -> tuple[Moved, ...]:
        """Move the weakest blocks; what was moved, for each layer. `UsageError` without the scores that it needs."""
        if self._grow == "gradient" and not self._scores:
            raise UsageError("no gradient was seen; run a forward and a backward inside `with regrow.scoring():`")
        done = tuple(self._move(layer) for layer in self._layers)
        self._scores.clear()
        return done

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Look at the gradients that candidate blocks would have, in the forward and backward of the body."""
        self._scores.clear()
        handles = []
        for layer in self._layers if self._grow == "gradient" else ():
            _, free = self._weak_and_free(layer)
            places = free[: int(self._candidates * self._count(layer, free))].sort().values
            if places.numel():
                wide = torch.promote_types(layer.data.dtype, torch.float32)  # half precision would lose small terms
                zeros = torch.zeros(places.numel(), *layer.data.shape[1:], dtype=wide, device=layer.data.device)
                self._scores[id(layer.data)] = (places, zeros)
                hook = self._watch(layer, places, zeros)
                tied = [m for m in self._modules if m.data is layer.data]  # the gradient is the sum of theirs
                handles += [m.register_forward_hook(hook, with_kwargs=True) for m in tied]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, layer: _Layer, places: Tensor, total: Tensor) -> Any:
        """A forward hook that adds up the gradients of the blocks at `places`."""
        rows, columns = layer.grid
        crow = torch.zeros(rows + 1, dtype=torch.int32)
        crow[1:] = torch.bincount(places // columns, minlength=rows).cumsum(0)
        col = (places % columns).int()
        where = [t.to(layer.data.device) for t in (crow, col, transposed_index(crow, col, columns))]

        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], y: Tensor) -> None:
            x = (*arguments, *keywords.values())[0].detach()

            def add(g: Tensor) -> None:
                total.add_(block_gradient(g, x.to(g.dtype), total.to(g.dtype), *where))

            if y.requires_grad:
                y.register_hook(add)

        return hook

    def _count(self, layer: _Layer, free: Tensor) -> int:
        blocks = layer.data.shape[0]
        return min(max(1, int(self._fraction * blocks)), blocks - 1, free.numel()) if blocks else 0

    def _weak_and_free(self, layer: _Layer) -> tuple[Tensor, Tensor]:
        """The blocks from the weakest on, and the places without a block in random order."""
        norms = layer.data.detach().float().flatten(1).norm(dim=1).cpu()
        empty = torch.ones(layer.grid[0] * layer.grid[1], dtype=torch.bool)
        empty[layer.flat] = False
        free = empty.nonzero()[:, 0]
        free = free[torch.randperm(free.numel(), generator=self._generator)]
        return self._agreed(layer, norms.argsort(stable=True)), self._agreed(layer, free)

    @property
    def _replicas(self) -> ProcessGroup | None:
        """The processes that train this model together; None where it is this one alone."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = self._process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def _agreed(self, layer: _Layer, chosen: Tensor) -> Tensor:
        """What the first of the processes chose: the seeds may differ, and the norms by their last bits."""
        if (group := self._replicas) is None:
            return chosen
        shared = chosen.to(layer.data.device)  # what a group can send depends on the device
        dist.broadcast(shared, group=group, group_src=0)
        return shared.cpu()

    def _move(self, layer: _Layer) -> Moved:
        weak, free = self._weak_and_free(layer)
        if id(layer.data) in self._scores:
            places, total = self._scores[id(layer.data)]
            if (group := self._replicas) is not None:
                dist.all_reduce(total, group=group)
            free = places[total.flatten(1).norm(dim=1).cpu().argsort(descending=True, stable=True)]
        count = self._count(layer, free)
        if count:
            places = layer.flat
            places[weak[:count]] = free[:count]
            source = torch.arange(places.numel())
            source[weak[:count]] = -1
            order = places.argsort()
            self._put(layer, places[order], source[order])
        return Moved(layer.path, count, layer.data.shape[0])

    @torch.no_grad()
    def _put(self, layer: _Layer, places: Tensor, source: Tensor) -> None:
        """Let the blocks stand at `places`, in order; block i is what block source[i] was, or new where that is -1."""
        rows, columns = layer.grid
        crow = torch.zeros(rows + 1, dtype=torch.int32)
        crow[1:] = torch.bincount(places // columns, minlength=rows).cumsum(0)
        col = (places % columns).int()
        layer.crow.copy_(crow)
        layer.col.copy_(col)
        layer.index.copy_(transposed_index(crow, col, columns))
        state = {} if self._optimizer is None else self._optimizer.state.get(layer.data, {})
        for held in (layer.data, layer.data.grad, *state.values()):
            if isinstance(held, Tensor) and held.dim() > 0 and held.shape[0] == source.numel():
                at = source.to(held.device)
                moved = held[at.clamp(min=0)]
                moved[at < 0] = 0
                held.copy_(moved)


def _layers(model: nn.Module) -> dict[int, _Layer]:
    """Every block-sparse weight once, by its id: what modules have, and what nodes of graphs read."""
    names, found = {id(p): name for name, p in model.named_parameters()}, {}
    for module in model.modules():
        for data, crow, col, index in _weights(module):
            if isinstance(data, nn.Parameter) and id(data) in names:
                found[id(data)] = _Layer(names[id(data)].rpartition(".")[0], data, crow, col, index)
    return found


def _weights(module: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """The tensors of each block-sparse weight that `module` itself multiplies with."""
    if isinstance(module, BlockSparseLinear):
        yield module.tensors
    if isinstance(module, GraphModule):
        read = (operands(module, node, BlockSparseLinear) for node in module.graph.nodes)
        yield from (tensors for tensors in read if tensors is not None)
