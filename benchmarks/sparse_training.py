"""
Training with sparse layers against training the same masked dense ones: the same losses, in how much less time?

    .venv/bin/python benchmarks/sparse_training.py [resnet] [transformer] [--epochs 3] [--threads 2]

A ResNet-18-shaped network at 95 % uniform sparsity on scikit-learn's digits, upscaled to 64×64; a transformer of 4
layers at 90 % on the text of installed documentation, character by character. Both models start from the same weights
and see the same batches, a step of one after a step of the other; dense weights are masked after each step. Layers are
swapped where `fxopt.sparse.swap` measures a gain. Prints the losses of both and the ratio of the time of an epoch.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.models import build
from fxopt.sparse import Pruner, swap


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="*", default=["resnet", "transformer"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for what in chosen.what:
        torch.manual_seed(0)
        model, batches, sparsity = {"resnet": digits, "transformer": text}[what]()
        print(f"{what}, {sparsity:.0%} sparse, {len(batches)} steps an epoch")
        for line in train(model, batches, sparsity, chosen.epochs):
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


def digits(steps: int = 8, side: int = 64, batch: int = 16) -> tuple[nn.Module, Batches, float]:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16 - 0.3
    images = F.interpolate(images, size=(side, side), mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels))[: steps * batch].split(batch)
    return Classifier(), [(images[i].contiguous(), labels[i]) for i in order], 0.95


def text(steps: int = 20, length: int = 128, batch: int = 8) -> tuple[nn.Module, Batches, float]:
    words = "\n".join(str(d.metadata.get_payload()) for d in importlib.metadata.distributions())
    stream = torch.tensor(list(words.encode("ascii", "ignore")), dtype=torch.long)
    starts = torch.randint(0, len(stream) - length - 1, (steps, batch))
    windows = [torch.stack([stream[s : s + length + 1] for s in row]) for row in starts.tolist()]
    return CharacterModel(), [(w[:, :-1], w[:, 1:]) for w in windows], 0.9


def train(model: nn.Module, batches: Batches, sparsity: float, epochs: int) -> Iterator[str]:
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][1:-1]
    Pruner(model, sparsity, layers=layers)
    sparse, report = swap(model.train(), batches[0][0], min_sparsity=sparsity - 0.02)
    yield f"{len(report.swapped)} of {len(layers)} pruned layers are sparse"
    dense = copy.deepcopy(model)
    pruner = Pruner(dense, "existing", layers=layers)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in (dense, sparse)]
    pruner.attach(optimizers[0])
    yield "epoch  loss masked dense  loss sparse  time of an epoch, dense / sparse"
    for epoch in range(epochs):
        seconds, losses = [0.0, 0.0], [0.0, 0.0]
        for x, y in batches:
            for i, (m, optimizer) in enumerate(zip((dense, sparse), optimizers, strict=True)):
                start = time.perf_counter()
                losses[i] += step(m, optimizer, x, y) / len(batches)
                seconds[i] += time.perf_counter() - start
        yield f"{epoch:>5}  {losses[0]:>17.4f}  {losses[1]:>11.4f}  {seconds[0] / seconds[1]:.2f}"


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
    loss.backward()
    optimizer.step()
    return float(loss.detach())


if __name__ == "__main__":
    main()
