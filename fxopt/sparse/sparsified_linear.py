"""What linear layers that keep a part of a dense weight have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fxopt.errors import UsageError
from fxopt.sparse.computed_weight import ComputedWeight


class SparsifiedLinear(nn.Module):
    """y = x @ weightᵀ + bias, the weight (out, in) being a part of that of the layer that it was made of."""

    TENSORS: ClassVar[tuple[str, ...]]  # what the weight is made of, the parameter first
    OPERATOR: ClassVar[Any]

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    fan_in_fan_out: bool = False
    """Whether the weight of the layer that it was made of is (in, out), as that of transformers' `Conv1D`."""

    def dense(self, values: Tensor | None = None) -> Tensor:
        """`values`, in the form of the layer's own parameter and by default these, as a matrix (out, in)."""
        raise NotImplementedError

    def operands(self, x: Any, bias: Any, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of `OPERATOR`; tensors or nodes of a graph, `tensors` as `TENSORS` names them."""
        raise NotImplementedError

    def scale(self, factor: Tensor) -> None:
        """Multiply each output by its `factor` (out,)."""
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the weight is made of, the parameter first."""
        return tuple(getattr(self, name) for name in self.TENSORS)

    def taken(self, weight: Tensor) -> Tensor:
        """What the layer keeps of a matrix (out, in), in the form of its own parameter."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """
        The weight (out, in) with its zeros; its elements are computed anew where they are read, differentiably.

        Assigned a matrix (out, in), the layer takes from it what it keeps, in place; `UsageError` if it is none. Writes
        to the weight raise `UsageError`, but writes to a part of it, such as `layer.weight[0].zero_()`, are lost.
        """
        values = self.tensors[0]
        if torch.compiler.is_compiling():  # leaves out by itself what nobody reads
            return self.dense(values)
        return ComputedWeight(lambda: self.dense(values), (self.out_features, self.in_features), values)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        wanted = (self.out_features, self.in_features)
        if not isinstance(value, Tensor) or tuple(value.shape) != wanted:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"weight was assigned {given}, expected a tensor {wanted}")
        values = self.tensors[0]
        if value.is_meta or values.is_meta:
            raise UsageError("weight was assigned on the meta device, where there is nothing to copy")
        with torch.no_grad():
            values.copy_(self.taken(value.detach().to(values.device)))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # a module would register a parameter, or refuse to
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def kept(self) -> Tensor:
        """Which elements of the weight there are, (out, in) bool."""
        return self.dense(torch.ones_like(self.tensors[0])) != 0

    def to_dense(self) -> nn.Linear:
        """
        A dense layer that computes the same, with a weight of its own and this layer's bias: a `torch.nn.Linear`, with
        a weight (out, in), also where the layer was made of a `Conv1D`.
        """
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.dense().detach().contiguous().clone()
        layer.weight = nn.Parameter(weight, requires_grad=self.tensors[0].requires_grad)
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

    def tied(self, bias: nn.Parameter | None) -> Self:
        """A layer on the same weight, with this bias."""
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__ | nn.Module().__dict__)  # hooks and the like are its own
        for name in self.TENSORS[1:]:
            new.register_buffer(name, getattr(self, name), name not in self._non_persistent_buffers_set)
        new.register_parameter(self.TENSORS[0], self._parameters[self.TENSORS[0]])
        new.register_parameter("bias", bias)
        return new.train(self.training)

    @torch.no_grad()
    def rescale(self, weight: Tensor, inputs: Tensor | None = None) -> Tensor:
        """
        Scale each output, so that it comes closest to that of the dense `weight` on `inputs` (by least squares), or,
        without inputs, so that its weights have the norm that they had. Returns the factors (out,).
        """
        wide = torch.promote_types(weight.dtype, torch.float32)  # sums of squares are beyond float16
        weight, kept = weight.to(wide), self.dense().to(wide)
        if inputs is None:
            factor = weight.norm(dim=1) / kept.norm(dim=1)
        else:
            x = inputs.reshape(-1, self.in_features).to(weight)
            wanted, found = x @ weight.t(), x @ kept.t()
            factor = (wanted * found).sum(0) / found.square().sum(0)
        factor = torch.where(factor.isfinite(), factor, torch.ones_like(factor))
        self.scale(factor)
        return factor

    @torch.no_grad()
    def made_of(self, weight: Tensor, factor: Tensor | None = None) -> bool:
        """
        Whether the layer holds what it was made with: `weight` (out, in) at the places that it keeps, times the
        `factor` of `rescale`, to the bit; in its own type and on its own device, if it was moved since.
        """
        now, kept = self.dense().detach(), self.kept
        return holds(now, kept, weight, factor)


def holds(now: Tensor, kept: Tensor, weight: Tensor, factor: Tensor | None) -> bool:
    """Whether `now` is `weight` (out, in) where `kept` is true, times `factor` (out,), and zero elsewhere, bitwise."""
    if now.is_meta or now.shape != weight.shape:
        return False
    made = weight.detach().to(now.device)
    if factor is not None:
        made = made.clone().mul_(factor.to(now.device).unsqueeze(1))
    made = torch.where(kept, made.to(now.dtype), torch.zeros_like(now))
    bits = _BITS[now.element_size()]  # NaN is itself, and 0.0 is not -0.0
    return torch.equal(made.view(bits), now.contiguous().view(bits))


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
