"""Which weights to keep, by magnitude; at once, or gradually while a model trains."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxopt.errors import UsageError
from fxopt.kernels.unstructured_weight import SparseWeight
from fxopt.sparse.dense_layers import SPARSE_NODE, Dense, prunable

Scope = Literal["uniform", "global"]


@dataclass(frozen=True)
class CubicSchedule:
    """
    The sparsity at each step: from `initial` at step `begin` to `final` at step `end`, fast at first and then slower.

    final + (initial - final) · (1 - (step - begin) / (end - begin))³, as in M. Zhu and S. Gupta, To prune, or not to
    prune, 2017 (arXiv:1710.01878). Nothing is pruned before `begin`, and only every `every` steps, and at `end`.
    """

    final: float
    end: int
    begin: int = 0
    initial: float = 0.0
    every: int = 1

    def __post_init__(self) -> None:
        check_share("final", self.final)
        check_share("initial", self.initial)
        for name in ("begin", "end", "every"):
            if not isinstance(getattr(self, name), int):
                raise UsageError(f"{name}={getattr(self, name)!r} was given; expected a number of steps")
        if not 0 <= self.begin < self.end or self.every < 1 or self.initial > self.final:
            raise UsageError(f"{self} was given; expected 0 <= begin < end, every >= 1 and initial <= final")

    def at(self, step: int) -> float:
        """The sparsity to have after `step` steps."""
        left = 1 - (min(max(step, self.begin), self.end) - self.begin) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * left**3 if step >= self.begin else 0.0

    def due(self, step: int) -> bool:
        """Whether to prune after `step` steps."""
        return self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end)


def magnitude_masks(
    weights: Mapping[str, Tensor],
    sparsity: float | None = None,
    threshold: float | None = None,
    scope: Scope = "uniform",
) -> dict[str, Tensor]:
    """
    What to keep of each weight (any shape): a boolean tensor of its shape, by name.

    Either `sparsity`, the share to drop, those of least magnitude, in each weight ("uniform") or over all of them
    ("global"), exactly that many to the nearest; or `threshold`: what is not larger is dropped. Of equals, later go.
    """
    if (sparsity is None) == (threshold is None):
        raise UsageError(f"sparsity={sparsity} and threshold={threshold} were given; expected one of them")
    if scope not in ("uniform", "global"):
        raise UsageError(f"scope={scope!r} was given; expected 'uniform' or 'global'")
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise UsageError(f"{name} has elements that are NaN or infinite; expected finite numbers: mend it first")
    if threshold is not None:
        check_magnitude(threshold)
        return {name: w.detach().abs() > threshold for name, w in weights.items()}
    assert sparsity is not None
    check_share("sparsity", sparsity)
    if scope == "uniform":
        return {name: _largest(w.detach().abs().flatten(), sparsity).view(w.shape) for name, w in weights.items()}
    if not weights:
        return {}
    sizes = [w.numel() for w in weights.values()]
    together = _largest(torch.cat([w.detach().abs().flatten().double() for w in weights.values()]), sparsity)
    return {n: m.view(w.shape) for (n, w), m in zip(weights.items(), together.split(sizes), strict=True)}


def dropped(size: int, sparsity: float) -> int:
    """How many of `size` elements are zeros at that sparsity, for whoever prunes to it and whoever asks for it."""
    return round(sparsity * size)


def _largest(magnitudes: Tensor, sparsity: float) -> Tensor:
    kept = magnitudes.numel() - dropped(magnitudes.numel(), sparsity)
    mask = torch.zeros_like(magnitudes, dtype=torch.bool)
    mask[torch.sort(magnitudes, descending=True, stable=True).indices[:kept]] = True
    return mask


def n_m_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """
    The `n` largest of every `m` consecutive inputs: boolean, of the shape of `weight` (out, in) or (out, in, *kernel).

    The pattern of N:M sparsity (2:4 is that of NVIDIA's sparse tensor cores), along the input channels.
    """
    if weight.dim() < 2 or not 0 <= n <= m or m < 1 or weight.shape[1] % m != 0:
        given = f"{n}:{m} of a weight of shape {tuple(weight.shape)}"
        raise UsageError(f"{given} was asked for; expected 0 <= N <= M, and M to divide the second dimension")
    last = weight.detach().abs().movedim(1, -1)
    groups = last.reshape(-1, m)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(1, torch.sort(groups, dim=1, descending=True, stable=True).indices[:, :n], True)
    return mask.view(last.shape).movedim(-1, 1)


def parse_n_m(pattern: str) -> tuple[int, int] | None:
    """(2, 4) of "2:4"; None of "unstructured"."""
    if pattern == "unstructured":
        return None
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if found is None or not 0 < int(found[1]) <= int(found[2]):
        raise UsageError(f"pattern={pattern!r} was given; expected 'unstructured' or N:M such as '2:4'")
    return int(found[1]), int(found[2])


def check_share(name: str, value: float) -> None:
    """`UsageError` unless `value` is from 0 to 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise UsageError(f"{name}={value} was given; expected a share from 0 to 1, such as 0.95")


def check_magnitude(threshold: float) -> None:
    """`UsageError` unless `threshold` is 0 or more."""
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not threshold >= 0:
        raise UsageError(f"threshold={threshold} was given; expected a magnitude, 0 or more")


def check_regex(name: str, value: str) -> None:
    """`UsageError` unless `value` is a regular expression."""
    if not isinstance(value, str):
        raise UsageError(f"{name}={value!r} was given; expected a regular expression, such as '.*'")
    try:
        re.compile(value)
    except re.error as error:
        raise UsageError(f"{name}={value!r} is no regular expression: {error}") from None


class Pruner:
    """
    Keeps a model's weights sparse while it trains: call `step` after each step of the optimizer, or `attach` it.

    `sparsity` is a number (pruned now, and the pattern stays), a `CubicSchedule` (pruned gradually), or "existing" (the
    zeros that are there stay). `scope`: the same share of every layer, or over all of them; `pattern` "2:4" keeps the 2
    largest of every 4 inputs instead, and takes no sparsity. Sparse layers are pruned too: their pattern shrinks in
    place, the parameter stays the same object, and `optimizer`'s state for it is cut likewise (that of LBFGS, which is
    one vector of all parameters, begins anew).

    Layers: every Linear, Conv2d and Conv1D of transformers, or those that `layers` names; in a graph module the weights
    of linear nodes and convolutions. `left_out` tells, by name, which of them cannot be pruned and why.

    Zeros never grow back: those that are there at the start stay, even beyond what the schedule asks for, except in a
    weight of nothing but zeros, which was made so to be trained. To go on from a checkpoint:

        torch.save({"model": model.state_dict(), "pruner": pruner.state_dict()}, "last.pt")
        last = torch.load("last.pt")
        model.load_state_dict(last["model"])
        pruner = Pruner(model, CubicSchedule(0.9, 1000))  # as before
        pruner.load_state_dict(last["pruner"])
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | CubicSchedule | Literal["existing"] | None = None,
        scope: Scope = "uniform",
        pattern: str = "unstructured",
        layers: Sequence[str] | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        self._n_m = parse_n_m(pattern)
        if (self._n_m is None) == (sparsity is None):
            raise UsageError(
                f"pattern={pattern!r} and sparsity={sparsity} were given; expected a sparsity or N:M, not both"
            )
        if isinstance(sparsity, str) and sparsity != "existing":
            raise UsageError(f"sparsity={sparsity!r} was given; expected a share, a CubicSchedule or 'existing'")
        if isinstance(sparsity, int | float):
            check_share("sparsity", sparsity)
        if scope not in ("uniform", "global"):
            raise UsageError(f"scope={scope!r} was given; expected 'uniform' or 'global'")
        self._scope, self._sparsity, self.optimizer = scope, sparsity, optimizer
        self._layers, self.left_out = _layers(model, layers, None if self._n_m is None else self._n_m[1])
        settled = sparsity == "existing" and SPARSE_NODE in self.left_out.values()  # then there is nothing to do
        if not self._layers and not settled:
            reasons = "".join(f" ({n or 'the model'}: {reason})" for n, reason in list(self.left_out.items())[:1])
            raise UsageError(f"no layer of this {type(model).__name__} can be pruned{reasons}; see Pruner's docstring")
        self.steps = 0
        dense = {n: w for n, w in self._weights().items() if isinstance(self._layers[n], Dense)}
        existing = sparsity == "existing"
        self._masks = {n: w != 0 for n, w in dense.items() if not bool(w.all()) and (existing or bool(w.any()))}
        if isinstance(sparsity, CubicSchedule):
            if sparsity.due(0):
                self._choose(sparsity.at(0))
        elif sparsity != "existing":
            self._choose(sparsity)
        self.apply()

    @property
    def sparsity(self) -> float:
        """The share of zeros in all of its layers together."""
        total = kept = 0
        for layer in self._layers.values():
            if isinstance(layer, SparseWeight):
                total, kept = total + torch.Size(layer.weight_shape).numel(), kept + layer.values.numel()
            else:
                total, kept = total + layer.weight.numel(), kept + int(layer.weight.count_nonzero())
        return 1 - kept / max(1, total)

    def step(self) -> None:
        """After a step of the optimizer: prune if the schedule says so, and put back the zeros."""
        self.steps += 1
        self.apply()
        if isinstance(self._sparsity, CubicSchedule) and self._sparsity.due(self.steps):
            self._choose(self._sparsity.at(self.steps))
            self.apply()

    def attach(self, optimizer: Optimizer) -> Any:
        """Do `step` after every step of `optimizer`; returns torch's handle, whose ``remove()`` ends that."""
        self.optimizer = optimizer
        return optimizer.register_step_post_hook(lambda *_: self.step())

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on: the steps made, and boolean masks of dense weights by layer."""
        return {"steps": self.steps, "masks": dict(self._masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; sparse layers hold their pattern themselves."""
        if not isinstance(state, Mapping) or state.keys() != {"steps", "masks"}:
            raise UsageError(f"a {type(state).__name__} was given; expected what Pruner.state_dict() returned")
        weights, masks = self._weights(), {}
        for name, mask in state["masks"].items():
            if name not in weights or mask.shape != weights[name].shape:
                shape = tuple(weights[name].shape) if name in weights else "no such layer"
                raise UsageError(f"the mask of {name!r} is {tuple(mask.shape)}, here is {shape}; give the same model")
            if isinstance(self._layers[name], Dense):
                masks[name] = mask.to(weights[name].device)
        self.steps = state["steps"]
        self._masks |= masks
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Put the zeros back into dense layers; a sparse one has nothing there."""
        for name, mask in self._masks.items():
            self._layers[name].weight.mul_(mask)  # in place: the parameter, and what is tied to it, stay what they are

    def _weights(self) -> dict[str, Tensor]:
        return {
            name: (layer.dense_weight() if isinstance(layer, SparseWeight) else layer.weight).detach()
            for name, layer in self._layers.items()
        }

    def _choose(self, sparsity: float | None) -> None:
        weights = self._weights()
        if self._n_m is not None:
            masks = {name: n_m_mask(w, *self._n_m) for name, w in weights.items()}
        else:
            masks = magnitude_masks(weights, sparsity, scope=self._scope)
        for name, layer in self._layers.items():
            if isinstance(layer, SparseWeight):
                self._shrink(layer, masks[name])
            else:
                self._masks[name] = masks[name] & self._masks.get(name, masks[name])

    def _shrink(self, layer: SparseWeight, mask: Tensor) -> None:
        kept = mask[layer.mask()]
        if bool(kept.all()):
            return
        before = layer.values.shape
        left = layer.keep(kept)
        if isinstance(self.optimizer, torch.optim.LBFGS):
            # its history is of vectors over all parameters, and so is the number of elements that it remembers
            self.optimizer.state[self.optimizer._params[0]].clear()
            self.optimizer._numel_cache = None
        state = {} if self.optimizer is None else self.optimizer.state.get(layer.values, {})
        for key, held in state.items():
            if isinstance(held, Tensor) and held.shape == before:
                state[key] = held[left].clone()


def _layers(
    model: nn.Module, names: Sequence[str] | None, divisor: int | None
) -> tuple[dict[str, Dense | SparseWeight], dict[str, str]]:
    """The layers to prune, and why others are left out; one that is named has to be among the first."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"a {type(model).__name__} was given; expected a torch.nn.Module")
    if isinstance(names, str):
        raise UsageError(f"layers={names!r} was given; expected a list of names, such as [{names!r}]")
    layers, left = prunable(model)
    for name, layer in list(layers.items()):
        shape = layer.weight_shape if isinstance(layer, SparseWeight) else layer.weight.shape
        if divisor is not None and shape[1] % divisor != 0:
            left[name] = f"it has {shape[1]} inputs, which {divisor} does not divide"
            del layers[name]
    if names is None:
        return layers, left
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = {}
    for name in names:
        own = _own(name, modules, layers)
        if own in left:
            raise UsageError(f"layers names {name!r}, which cannot be pruned: {left[own]}; leave it out")
        if own not in layers:
            found = f"a {type(modules[name]).__name__}" if name in modules else "nothing"
            raise UsageError(f"layers names {name!r}, which is {found}; expected a Linear, a Conv2d or a sparse one")
        chosen[own] = layers[own]
    return chosen, {}


def _own(name: str, modules: Mapping[str, nn.Module], layers: Mapping[str, Dense | SparseWeight]) -> str:
    """The name under which the layer called `name` is listed: that of the first with its module or its weight."""
    if name in layers or name not in modules:
        return name
    weight = modules[name]._parameters.get("weight")
    for other, layer in layers.items():
        same = layer if isinstance(layer, SparseWeight) else layer.owner._parameters[layer.attribute]
        if same is modules[name] or (weight is not None and same is weight):
            return other
    return next(n for n, module in modules.items() if module is modules[name])
