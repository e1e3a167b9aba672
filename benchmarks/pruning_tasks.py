"""Two small tasks on which pruning is measured: models, data, training. Used by `benchmarks/pruning.py`."""

from __future__ import annotations

import glob
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT, VOCABULARY = 64, 128


class Attention(nn.Module):
    """Causal self-attention of four heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n1, self.attention, self.n2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.down(F.gelu(self.up(self.n2(x))))  # type: ignore[no-any-return]


class CharacterLM(nn.Module):
    """Eight blocks over bytes: (batch, time) -> (batch, time, 128)."""

    def __init__(self, width: int = 128, depth: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(h)))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.c2, self.b2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        changes = stride > 1 or inputs != outputs
        conv = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = conv if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.b2(self.c2(F.relu(self.b1(self.c1(x)))))
        return F.relu(y + self.shortcut(x))


class SmallResNet(nn.Module):
    """Nine basic blocks: (batch, 1, 12, 20) -> (batch, 100)."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96), depth: int = 3) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])
        blocks, inputs = [], widths[0]
        for i, width in enumerate(widths):
            for j in range(depth):
                blocks.append(Residual(inputs, width, 2 if i and not j else 1))
                inputs = width
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(inputs, 100)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(h.mean((2, 3)))  # type: ignore[no-any-return]


Batches = Callable[[int, int], tuple[Tensor, Tensor]]  # (batch size, seed) -> inputs and targets


@dataclass(frozen=True)
class Task:
    """A model and its data; calibration, training and validation do not overlap."""

    name: str
    model: Callable[[], nn.Module]
    train: Batches
    validate: tuple[tuple[Tensor, Tensor], ...]
    batch_size: int
    rate: float

    def loss(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy in nats."""
        scores = model(x)
        return F.cross_entropy(scores.reshape(-1, scores.shape[-1]), y.reshape(-1))

    def evaluate(self, model: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """The mean loss and the accuracy on the validation data."""
        loss = right = count = 0.0
        with torch.no_grad():
            for x, y in self.validate:
                scores = model(x).reshape(-1, VOCABULARY if self.name == "a" else 100)
                loss += float(F.cross_entropy(scores, y.reshape(-1))) * y.numel()
                right += float((scores.argmax(-1) == y.reshape(-1)).sum())
                count += y.numel()
        return loss / count, right / count


def text_task() -> Task:
    """Task A: the next byte of the Python standard library's own text; its last 5 % are the validation data."""
    names = sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))
    raw = b"\n".join(Path(n).read_bytes() for n in names)
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long().clamp(max=VOCABULARY - 1)
    cut = int(len(data) * 0.95)

    def batch(part: Tensor) -> Batches:
        def draw(rows: int, seed: int) -> tuple[Tensor, Tensor]:
            at = torch.randint(len(part) - CONTEXT - 1, (rows,), generator=torch.Generator().manual_seed(seed))
            found = torch.stack([part[i : i + CONTEXT + 1] for i in at])
            return found[:, :-1].contiguous(), found[:, 1:].contiguous()

        return draw

    held = batch(data[cut:])
    return Task("a", CharacterLM, batch(data[:cut]), tuple(held(64, 10_000 + i) for i in range(8)), 32, 2e-3)


def digits_task() -> Task:
    """Task B: two handwritten digits on one canvas, shifted and noisy; other digits in training and validation."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    cut = int(len(order) * 0.8)

    def batch(part: Tensor) -> Batches:
        def draw(rows: int, seed: int) -> tuple[Tensor, Tensor]:
            g = torch.Generator().manual_seed(seed)
            picked = part[torch.randint(len(part), (rows, 2), generator=g)]
            canvas = torch.zeros(rows, 1, 12, 20)
            down = torch.randint(5, (rows, 2), generator=g)
            across = torch.randint(3, (rows, 2), generator=g)
            for i in range(rows):
                for j in range(2):
                    top, left = int(down[i, j]), int(across[i, j]) + 10 * j
                    canvas[i, 0, top : top + 8, left : left + 8] += images[picked[i, j]]
            canvas += 0.35 * torch.randn(canvas.shape, generator=g)
            return canvas, labels[picked[:, 0]] * 10 + labels[picked[:, 1]]

        return draw

    held = batch(order[cut:])
    return Task("b", SmallResNet, batch(order[:cut]), tuple(held(128, 10_000 + i) for i in range(6)), 64, 3e-3)


def train(task: Task, model: Any, seconds: float, seed: int, rate: float) -> int:
    """AdamW with a cosine for so many seconds of processor time, whatever else runs; the steps made."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    start, steps = time.process_time(), 0
    while (share := (time.process_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (steps + 1) / 20) * (0.5 * (1 + math.cos(math.pi * share)) + 0.02)
        loss = task.loss(model, *task.train(task.batch_size, seed * 1_000_000 + steps))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        steps += 1
    return steps


def calibration(task: Task, batches: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the training data that are kept for scores and fits."""
    return (task.train(task.batch_size, 900_000_000 + seed * 1000 + i) for i in range(batches))
