"""Training on the non-zeros alone is training a masked dense model: in one process, and in several."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fxopt.sparse import Pruner, SparseConv2d, SparseLinear, swap

SGD: Callable[..., Any] = torch.optim.SGD


class Net(nn.Module):
    """A residual network, small: every kind of layer that a ResNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.first, self.second = nn.Conv2d(12, 24, 3, 2, 1), nn.Conv2d(24, 24, 3, padding="same", groups=2)
        self.short, self.head = nn.Conv2d(12, 24, 1, 2), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = self.short(x) + self.second(F.relu(self.first(x)))
        return self.head(y.mean((2, 3)))


class Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.query, self.key, self.value, self.merge = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = (p(y).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.query, self.key, self.value))
        x = x + self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


def convolutional() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    return Net(), [(torch.randn(8, 2, 9, 7), torch.randint(5, (8,))) for _ in range(6)]


def transformer() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(16, 5))
    return model, [(torch.randn(4, 6, 16), torch.randint(5, (4, 6))) for _ in range(6)]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def trained(model: nn.Module, batches: list[tuple[Tensor, Tensor]], make: Callable[..., Any]) -> list[float]:
    """The losses of a step on each batch; zeros of dense weights stay zeros."""
    optimizer, losses = make(model.parameters()), []
    Pruner(model, "existing").attach(optimizer)
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


OPTIMIZERS = {
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("make", [convolutional, transformer])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_the_losses_and_weights_of_a_masked_dense_model(make, optimizer, dtype, tolerance):
    """float64 is the portable path on both sides; float32 the kernels, held against float64."""
    model, batches = make()
    Pruner(model, 0.9)
    sparse, report = swap(model, batches[0][0], min_sparsity=0.8, measure=False)
    assert len(report.swapped) == len(report.layers)
    sparse, dense = sparse.to(dtype), copy.deepcopy(model).double()
    found = trained(sparse, [(x.to(dtype), y) for x, y in batches], OPTIMIZERS[optimizer])
    expected = trained(dense, [(x.double(), y) for x, y in batches], OPTIMIZERS[optimizer])
    assert abs(expected[0] - expected[-1]) > 1e-3, "nothing was trained"
    assert found == pytest.approx(expected, rel=tolerance)
    names = dict(dense.named_modules())
    layers = [(n, m) for n, m in sparse.named_modules() if isinstance(m, SparseLinear | SparseConv2d)]
    for name, layer in layers:
        weight = names[name].weight
        torch.testing.assert_close(layer.dense_weight().double(), weight, rtol=0, atol=10 * tolerance)
        assert torch.equal(layer.mask() | (weight == 0), torch.ones_like(weight, dtype=torch.bool))


def parallel(rank: int, folder: str, processes: int) -> None:
    """One of `processes` processes that train together; the first saves the parameters."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    try:
        model, batches = sparse_net()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(rank)  # DistributedDataParallel begins with the parameters of the first
        halves = [(x.chunk(processes)[rank], y.chunk(processes)[rank]) for x, y in batches]
        trained(DistributedDataParallel(model), halves, OPTIMIZERS["momentum"])
        Pruner(model, 0.95)  # shorter values: what holds their former size is made anew
        trained(DistributedDataParallel(model), halves, OPTIMIZERS["momentum"])
        torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def sparse_net() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model, batches = convolutional()
    model.norm = nn.GroupNorm(3, 12)  # a batch norm would see half of the batch
    Pruner(model, 0.9)
    return swap(model, batches[0][0], min_sparsity=0.8, measure=False)[0], batches


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path):
    torch.multiprocessing.spawn(parallel, (str(tmp_path), 2), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model, batches = sparse_net()
    trained(model, batches, OPTIMIZERS["momentum"])
    Pruner(model, 0.95)
    start = copy.deepcopy(model.state_dict())
    trained(model, batches, OPTIMIZERS["momentum"])
    for key, expected in model.state_dict().items():
        assert torch.equal(found[0][key], found[1][key]), key
        torch.testing.assert_close(found[0][key], expected, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert not torch.equal(start["first.values"], found[0]["first.values"])
