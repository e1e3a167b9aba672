"""Calibration data, and the losses that say how much a pruned graph has lost on it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fxopt.errors import UsageError

Inputs = tuple[Any, ...] | Mapping[str, Any]
# A loss takes a graph's output, the batch, and the dense graph's output for it; it gives a scalar, the mean over rows.
Loss = Callable[[Any, "Batch", Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """The inputs of one call (a tuple is positional, a mapping keywords), and what is to come out, if that is known."""

    inputs: Inputs
    target: Tensor | None = None

    def call(self, function: Callable[..., Any]) -> Any:
        """Call ``function`` with these inputs."""
        return function(**self.inputs) if isinstance(self.inputs, Mapping) else function(*self.inputs)

    def values(self) -> list[Any]:
        """The inputs, in order."""
        return list(self.inputs.values()) if isinstance(self.inputs, Mapping) else list(self.inputs)


@dataclass(frozen=True)
class Calibration:
    """
    Batches for scoring and fitting, with the seed that they were drawn by.

    ``hash`` is the content's; a result records it, so that a score can be traced to its data.
    """

    batches: tuple[Batch, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.batches:
            raise UsageError("a calibration of no batches was given; give at least one")

    @staticmethod
    def of(batches: Sequence[Any], seed: int = 0) -> Calibration:
        """From batches, or from inputs with no target: tuples (or single tensors), and mappings."""
        return Calibration(tuple(map(_batch, batches)), seed)

    @functools.cached_property
    def hash(self) -> str:
        """Of the content of all batches: 12 hexadecimal digits."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for tensor in (*batch.values(), batch.target):
                digest.update(_content(tensor))
        return digest.hexdigest()[:12]

    def rows(self) -> set[bytes]:
        """A hash of every row of the inputs and its target."""
        found = set()
        for batch in self.batches:
            tensors = [t for t in (*batch.values(), batch.target) if isinstance(t, Tensor) and t.dim() > 0]
            for i in range(min((len(t) for t in tensors), default=0)):
                found.add(hashlib.sha256(b"".join(_content(t[i]) for t in tensors)).digest())
        return found

    def with_outputs(self, gm: Callable[..., Any]) -> Calibration:
        """The same inputs; the targets are what ``gm`` gives for them."""
        with torch.no_grad():
            made = [Batch(b.inputs, logits(b.call(gm)).detach().clone()) for b in self.batches]
        return Calibration(tuple(made), self.seed)

    def check_apart(self, evaluation: Calibration) -> None:
        """Refuse data for the evaluation that the calibration holds too."""
        shared = len(self.rows() & evaluation.rows())
        if shared:
            raise UsageError(
                f"{shared} rows of the evaluation are in the calibration data too; split the data before you batch it"
            )


def _batch(given: Any) -> Batch:
    if isinstance(given, Batch):
        return given
    if isinstance(given, Tensor):
        return Batch((given,))
    if isinstance(given, tuple | Mapping):
        return Batch(given)
    raise UsageError(f"a batch is a {type(given).__name__}; give a tensor, a tuple, a mapping or a fxopt.pruning.Batch")


def _content(value: Any) -> bytes:
    if not isinstance(value, Tensor):
        return repr(value).encode()
    held = value.detach().cpu().contiguous()
    return f"{tuple(held.shape)}{held.dtype}".encode() + held.reshape(-1).view(torch.uint8).numpy().tobytes()


# --- losses -----------------------------------------------------------------------------------------------------------


def logits(output: Any) -> Tensor:
    """The first float tensor of what a model gives: the logits, for models that name them."""
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"]  # type: ignore[no-any-return]
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits  # type: ignore[no-any-return]
    found = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()), None)
    if found is None:
        raise UsageError("the graph gives no float tensor that a loss could be taken of; give a loss of your own")
    return found


def distance(output: Any, batch: Batch, reference: Any) -> Tensor:
    """
    How far the output is from the dense one, squared and over its variance: what there is without labels.

    The dense one is the batch's target where that holds floats.
    """
    known = batch.target is not None and batch.target.is_floating_point()
    ours, dense = logits(output).float(), (batch.target if known else logits(reference)).float()  # type: ignore[union-attr]
    return (ours - dense).square().mean() / dense.var(correction=0).clamp(min=1e-12)


def cross_entropy(output: Any, batch: Batch, reference: Any) -> Tensor:
    """In nats, against class numbers: one a row, one a token, or where no target is given the next token."""
    scores = logits(output)
    target = batch.target
    if target is None:
        tokens = next(t for t in batch.values() if isinstance(t, Tensor) and not t.is_floating_point())
        scores, target = scores[:, :-1], tokens[:, 1:]
    return F.cross_entropy(scores.reshape(-1, scores.shape[-1]).float(), target.reshape(-1))


def error_rate(output: Any, batch: Batch, reference: Any) -> Tensor:
    """One minus the accuracy; without a target, against what the dense graph says."""
    said = logits(output).argmax(-1)
    meant = logits(reference).argmax(-1) if batch.target is None else batch.target
    return (said != meant).float().mean()


LOSSES: dict[str, Loss] = {"distance": distance, "loss": cross_entropy, "error_rate": error_rate}


def loss_of(named: str | Loss) -> Loss:
    """A loss by its name, or as it is."""
    if callable(named):
        return named
    if named not in LOSSES:
        raise UsageError(f"loss {named!r} is not known; give one of {', '.join(LOSSES)}, or a function")
    return LOSSES[named]


def mean_loss(gm: GraphModule, data: Calibration, loss: Loss, dense: Callable[..., Any] | None = None) -> float:
    """The mean of ``loss`` over the batches of ``data``; the reference is what ``dense`` gives, by default ``gm``."""
    total = 0.0
    with torch.no_grad():
        for batch in data.batches:
            total += float(loss(batch.call(gm), batch, batch.call(dense or gm)))
    return total / len(data.batches)
