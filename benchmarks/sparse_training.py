"""
Training with sparse layers against training the same masked dense ones: the same losses, in how much less time?

    .venv/bin/python benchmarks/sparse_training.py [resnet] [transformer] [noise] [--epochs 3] [--steps 24]
                                                   [--twins 3] [--threads 1]

A ResNet-18-shaped network at 95 % uniform sparsity on scikit-learn's digits, upscaled to 64×64; a transformer of 4
layers at 90 % on the text of installed documentation, character by character. All models start from the same weights
and see the same batches, a step of one after a step of the other; dense weights are masked after each step. Layers are
swapped where `fxopt.sparse.swap` measures a gain.

How far the weights are off a run in float64 after four steps tells the rounding of both. Twins show what "the same
losses" can mean: the masked dense model again, its weights off by a rounding error. Prints the mean loss of each epoch,
and that on data left out, of the twins the least and the most; and the ratio of the time of an epoch.

Rounding grows fast where batch norms see few images, so one run cannot tell a difference: `noise` makes eight short
ones of the ResNet, on images of 32×32 with every layer sparse, and prints the mean difference of the loss with its
standard error.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.models import build
from fxopt.sparse import Pruner, SparseConv2d, SparseLinear, swap


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "what", nargs="*", metavar="resnet|transformer|noise", default=["resnet", "transformer", "noise"]
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="of an epoch")
    parser.add_argument("--twins", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for what in chosen.what:
        if what == "noise":
            noise()
            continue
        torch.manual_seed(0)
        model, batches, left_out, sparsity = {"resnet": digits, "transformer": text}[what](chosen.steps)
        size = sum(p.numel() for p in model.parameters())
        print(f"{what}: {size / 1e6:.1f} M parameters, {sparsity:.0%} sparse, {len(batches)} steps an epoch")
        for line in train(model, batches, left_out, sparsity, chosen.epochs, chosen.twins):
            print(line, flush=True)


class Classifier(nn.Module):
    """ResNet-18 of transformers on images (batch, 3, side, side) -> (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = build("resnet18")
        self.head = nn.Linear(self.body.config.num_labels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(pixel_values=x).logits)


class CharacterModel(nn.Module):
    """A causal transformer over bytes (batch, length) -> (batch, length, 128)."""

    def __init__(self, width: int = 512, layers: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(128, width), nn.Parameter(torch.randn(128, width) * 0.02)
        self.blocks = nn.ModuleList(CausalBlock(width) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 128)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x) + self.place[: x.shape[1]]
        for block in self.blocks:
            y = block(y)
        return self.out(self.norm(y))


class CausalBlock(nn.Module):
    """Attention and feed-forward of one layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.merge = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        heads = [p(y).unflatten(-1, (8, -1)).transpose(1, 2) for p in (self.query, self.key, self.value)]
        x = x + self.merge(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


Batches = list[tuple[Tensor, Tensor]]
Task = tuple[nn.Module, Batches, Batches, float]  # with the batches to train on, those left out, and the sparsity


def digits(steps: int, side: int = 64, batch: int = 16) -> Task:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16 - 0.3
    images = F.interpolate(images, size=(side, side), mode="bilinear").expand(-1, 3, -1, -1)
    images = images + 0.05 * torch.randn(images.shape)  # else maxima of pooling are ties, which rounding decides
    labels = torch.tensor(found.target)
    batches = [(images[i].contiguous(), labels[i]) for i in torch.randperm(len(labels)).split(batch)]
    return Classifier(), batches[:steps], batches[-17:-1], 0.95


def text(steps: int, length: int = 128, batch: int = 4) -> Task:
    words = "\n".join(str(d.metadata.get_payload()) for d in importlib.metadata.distributions())
    stream = torch.tensor(list(words.encode("ascii", "ignore")), dtype=torch.long)
    cut = len(stream) * 9 // 10  # what follows is left out
    starts = (
        torch.randint(0, cut - length - 1, (steps, batch)),
        torch.randint(cut, len(stream) - length - 1, (8, batch)),
    )
    windows = [[torch.stack([stream[s : s + length + 1] for s in row]) for row in found.tolist()] for found in starts]
    batches, left_out = ([(w[:, :-1], w[:, 1:]) for w in found] for found in windows)
    return CharacterModel(), batches, left_out, 0.9


def train(
    model: nn.Module, batches: Batches, left_out: Batches, sparsity: float, epochs: int, twins: int
) -> Iterator[str]:
    layers = inner_layers(model)
    Pruner(model, sparsity, layers=layers)
    sparse, report = swap(model.train(), batches[0][0], min_sparsity=sparsity - 0.02)
    yield f"{len(report.swapped)} of {len(layers)} pruned layers are sparse"
    yield drift(model, sparse, layers, batches)
    models = [copy.deepcopy(model), sparse, *(rounded(model) for _ in range(twins))]
    optimizers = [optimizer_of(m, layers) for m in models]
    yield f"epoch  {HEADS}   epoch, dense / sparse   step, median"
    for epoch in range(epochs):
        losses: list[list[float]] = [[] for _ in models]
        seconds: list[list[float]] = [[] for _ in models]
        for x, y in batches:
            for i, (m, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                start = time.perf_counter()
                losses[i].append(step(m, optimizer, x, y))
                seconds[i].append(time.perf_counter() - start)
        dense, fast = seconds[:2]
        median = statistics.median(a / b for a, b in zip(dense, fast, strict=True))
        told = cells([statistics.fmean(found) for found in losses])
        yield f"{epoch:>5}  {told}   {sum(dense) / sum(fast):>21.2f}   {median:>12.2f}"
    yield f" left out: {cells([evaluated(m, left_out) for m in models])[4:]}"


def noise(seeds: int = 8, steps: int = 30, last: int = 15) -> None:
    found: list[list[float]] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, batches, _, sparsity = digits(steps, side=32)
        layers = inner_layers(model)
        Pruner(model, sparsity, layers=layers)
        sparse, _ = swap(model.train(), batches[0][0], min_sparsity=sparsity - 0.02, measure=False)
        models = [copy.deepcopy(model), sparse, rounded(model)]
        optimizers = [optimizer_of(m, layers) for m in models]
        losses = [[step(m, o, x, y) for m, o in zip(models, optimizers, strict=True)] for x, y in batches]
        found.append([statistics.fmean(loss) for loss in zip(*losses[-last:], strict=True)])
    print(f"resnet at 32×32, {seeds} runs of {steps} steps, mean loss of the last {last}, less that of masked dense")
    for kind, i in (("sparse", 1), ("twin", 2)):
        less = [losses[i] - losses[0] for losses in found]
        print(f"{kind}: {statistics.fmean(less):+.4f} ± {statistics.stdev(less) / len(less) ** 0.5:.4f}", flush=True)


def inner_layers(model: nn.Module) -> list[str]:
    """All that can be sparse but the first and the last."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][1:-1]


def optimizer_of(model: nn.Module, layers: Sequence[str]) -> torch.optim.Optimizer:
    """Keeps the zeros; of a sparse model, those of the layers that stayed dense."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    Pruner(model, "existing", layers=layers).attach(optimizer)
    return optimizer


def drift(model: nn.Module, sparse: nn.Module, layers: Sequence[str], batches: Batches) -> str:
    """How far rounding takes the weights in the first steps, relative to a run in float64."""
    exact, *others = copy.deepcopy(model).double(), copy.deepcopy(model), copy.deepcopy(sparse)
    for m in (exact, *others):
        optimizer = optimizer_of(m, layers)
        for x, y in batches[:STEPS]:
            step(m, optimizer, x.double() if m is exact and x.is_floating_point() else x, y)
    truth = weights(exact, layers)
    off = [float((weights(m, layers) - truth).norm() / truth.norm()) for m in others]
    return (
        f"weights after {len(batches[:4])} steps, off those of float64: masked dense {off[0]:.1e}, sparse {off[1]:.1e}"
    )


def weights(model: nn.Module, layers: Sequence[str]) -> Tensor:
    found = (model.get_submodule(name) for name in layers)
    dense = (m.dense_weight() if isinstance(m, SparseLinear | SparseConv2d) else m.weight for m in found)
    return torch.cat([w.detach().double().flatten() for w in dense])


STEPS = 4  # until chaos has the say
HEADS = f"{'masked dense':>12}  {'sparse':>8}  {'dense twins':>17}"


def cells(losses: Sequence[float]) -> str:
    dense, sparse, *twins = losses
    spread = f"{min(twins):.4f} to {max(twins):.4f}" if twins else ""
    return f"{dense:>12.4f}  {sparse:>8.4f}  {spread:>17}"


def rounded(model: nn.Module) -> nn.Module:
    """A copy whose weights are off by a rounding error, zeros excepted."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1 + torch.finfo(p.dtype).eps * torch.randint(-1, 2, p.shape))
    return twin


@torch.no_grad()
def evaluated(model: nn.Module, batches: Batches) -> float:
    model.eval()
    found = [float(F.cross_entropy(model(x).flatten(0, -2), y.flatten())) for x, y in batches]
    model.train()
    return statistics.fmean(found)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
    loss.backward()
    optimizer.step()
    return float(loss.detach())


if __name__ == "__main__":
    main()
