"""What a linear layer and a convolution with an unstructured sparse weight have in common: values and their pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fxopt.errors import UsageError
from fxopt.kernels.unstructured_pattern import Pattern, is_pattern

_KEPT = ("row_start", "column")  # in the state dict; the view by columns follows from them


class SparseWeight(nn.Module):
    """
    A module whose weight is `values`, one parameter (values,), at places that int32 buffers tell.

    Gradients exist at these places only, so every optimizer trains the values alone and its state is as small. The
    state dict holds `values`, `row_start` and `column`; loading one with another pattern changes the pattern.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    row_start: Tensor
    column: Tensor
    column_start: Tensor
    row: Tensor
    place: Tensor

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        raise NotImplementedError

    def pattern_of(self, row_start: Tensor, column: Tensor) -> Pattern:
        """The whole pattern, from its view by rows."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """The weight with its zeros, of `weight_shape`; differentiable in `values`."""
        raise NotImplementedError

    def mask(self) -> Tensor:
        """Where the values stand: True in a boolean tensor of `weight_shape`."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """The same layer as torch has it."""
        raise NotImplementedError

    @property
    def weight(self) -> nn.Parameter:
        """The values, as in SparseProp; see `dense_weight`."""
        return self.values

    @property
    def sparsity(self) -> float:
        """The share of the weight's elements that are not held."""
        return 1 - self.values.numel() / max(1, torch.Size(self.weight_shape).numel())

    @property
    def pattern(self) -> Pattern:
        """Where the values stand."""
        return Pattern(self.row_start, self.column, self.column_start, self.row, self.place)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """Values, bias and pattern, as the operators take them."""
        own, held = self._parameters, self._buffers
        try:
            by_row, by_column = (held["row_start"], held["column"]), (held["column_start"], held["row"], held["place"])
            return own["values"], own["bias"], *by_row, *by_column
        except KeyError:  # parametrized, or a replica of DataParallel: as attributes, which Python looks up one by one
            return self.values, self.bias, *self.pattern

    def keep(self, kept: Tensor) -> Tensor:
        """
        Drop the values where `kept` is False: boolean, of the values' shape or of `weight_shape`; none can be added.

        `values` stays the same parameter, shorter, without its gradient. Returns the places (int64) of what is left in
        the former values, with which an optimizer's state is cut likewise. What holds the former size has to be made
        anew: `torch.nn.parallel.DistributedDataParallel` around the model (with a fixed pattern it trains as it is). A
        loss from before may be held, but its backward raises as after any write in place.
        """
        if kept.dtype != torch.bool or tuple(kept.shape) not in (tuple(self.values.shape), tuple(self.weight_shape)):
            shapes = f"{tuple(self.values.shape)} or {tuple(self.weight_shape)}"
            raise UsageError(
                f"a mask of {kept.dtype}, {tuple(kept.shape)}, was given; expected a boolean one of {shapes}"
            )
        if kept.shape != self.values.shape:
            kept = kept[self.mask()]
        left = kept.nonzero()[:, 0]
        before = torch.zeros(kept.numel() + 1, dtype=torch.int64, device=kept.device)
        before[1:] = kept.cumsum(0)
        start = before[self.row_start.long()].to(torch.int32)
        self._set_pattern(self.pattern_of(start, self.column[left]))
        self._resize(self.values.detach()[left].clone())
        return left

    def apply_further_mask(self, mask: Tensor) -> None:
        """SparseProp's name for `keep`."""
        self.keep(mask.bool())

    def _set(self, values: Tensor, pattern: Pattern, bias: Tensor | None, like: nn.Module) -> None:
        """Take over values and pattern; training flag and who is trained are those of `like`."""
        weight = like.weight
        assert isinstance(weight, Tensor)
        self.values = nn.Parameter(values, requires_grad=weight.requires_grad)
        held = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", held)
        self._set_pattern(pattern)
        self.train(like.training)

    def _hold(self, values: Tensor, bias: Tensor | None, pattern: Pattern) -> None:
        """Take over these very tensors."""
        for name, held in (("values", values), ("bias", bias)):
            if held is not None and not isinstance(held, nn.Parameter):
                held = nn.Parameter(held, requires_grad=held.requires_grad)
            self.register_parameter(name, held)
        self._set_pattern(pattern)

    def _set_pattern(self, pattern: Pattern) -> None:
        for name, tensor in pattern._asdict().items():
            self.register_buffer(name, tensor.contiguous(), persistent=name in _KEPT)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given: dict[str, Any] = {name: state_dict.get(prefix + name) for name in ("values", "bias", *_KEPT)}
        if any(given[name] is not None for name in ("values", *_KEPT)):
            assign = bool(local_metadata.get("assign_to_params_buffers", False))
            refusal = self._refusal(given, assign, strict)
            if refusal is not None:
                error_msgs.append(f"{prefix or 'the module'}: {refusal}")
                return
            self._make_room(given["values"], given["row_start"], given["column"], assign)
            for name in _KEPT:  # as int32, also where they are assigned
                state_dict[prefix + name] = getattr(self, name)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def _refusal(self, given: Mapping[str, Any], assign: bool, strict: bool) -> str | None:
        """Why this state cannot be loaded, in one line; asked before anything is changed, so that it is all or none."""
        values, bias, *kept = (given[name] for name in ("values", "bias", *_KEPT))
        if not all(isinstance(t, Tensor) for t in (values, *kept)):
            return "values without their pattern, or the reverse; expected values, row_start and column together"
        row_start, column = kept
        if any(t.is_meta for t in (values, *kept)) or (self.values.is_meta and not assign):
            return "the state or the layer is on the meta device, which holds no numbers; load them, or by assign=True"
        if strict and (bias is None) != (self.bias is None):
            return "a layer without a bias was given a state with one" if self.bias is None else "the state has no bias"
        if bias is not None and self.bias is not None and getattr(bias, "shape", None) != self.bias.shape:
            return f"a bias of shape {getattr(bias, 'shape', None)} was given; expected {self.weight_shape[:1]}"
        if not all(t.is_floating_point() for t in (values, bias) if t is not None):
            return f"values of {values.dtype} or their bias are no floating-point numbers"
        if any(t.is_floating_point() or t.is_complex() or t.dtype == torch.bool for t in kept):
            return f"row_start of {row_start.dtype} and column of {column.dtype} were given; expected int32"
        shape = torch.Size(self.weight_shape)
        sizes = (shape[0], shape[1:].numel(), getattr(self, "groups", 1))
        if values.shape != column.shape or not is_pattern(row_start, column, *sizes):
            shapes = f"row_start {tuple(row_start.shape)}, column {tuple(column.shape)}, values {tuple(values.shape)}"
            return f"{shapes} are no pattern of a weight {self.weight_shape}"
        return None

    def _make_room(self, values: Tensor, row_start: Tensor, column: Tensor, assign: bool) -> None:
        """Take over the pattern, copied, and let the parameter have the shape of `values`, which are yet to come."""
        device = values.device if assign else self.values.device
        own = (t.to(device, torch.int32, copy=True).contiguous() for t in (row_start, column))
        self._set_pattern(self.pattern_of(*own))
        if self.values.shape == values.shape:
            return
        room = self.values.detach().new_empty(values.shape)
        if assign:  # another parameter comes; the former keeps its values, for the graphs that hold it
            self.values = nn.Parameter(room, requires_grad=self.values.requires_grad)
        else:
            self._resize(room)

    def _resize(self, data: Tensor) -> None:
        """Let the parameter hold `data`, of another size; autograd is made to forget the former one."""
        self.values.grad = None
        # A loss that is still held keeps the node that gathers this parameter's gradient, which knows the old size, and
        # torch takes a new one only where the type changes.
        other = torch.float32 if data.dtype == torch.float64 else torch.float64
        self.values.data = data.new_empty(0, dtype=other)
        self.values.data = data
        # `.data` hides the change from autograd, which would hand the new values to a backward of the old pattern.
        torch.autograd.graph.increment_version(self.values)


def mask_of(weight: Tensor, name: str = "the weight") -> Tensor:
    """Where `weight` is not zero; `UsageError` where it cannot be held sparsely: another dtype, NaN or infinite."""
    if weight.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"{name} is {weight.dtype}; expected float32 or float64: cast it with .float()")
    if weight.is_meta:
        raise UsageError(f"{name} is on the meta device, which holds no numbers; load it first")
    if not bool(torch.isfinite(weight).all()):
        raise UsageError(f"{name} has elements that are NaN or infinite; expected finite numbers: mend it first")
    return weight != 0


def check_tensors(layer: str, weight: Tensor, bias: Tensor | None, axes: Sequence[str]) -> None:
    """`UsageError` unless `weight` has these axes and the bias, if there is one, goes with it."""
    if weight.dim() != len(axes) or (bias is not None and bias.shape != weight.shape[:1]):
        given = f"a weight of shape {tuple(weight.shape)}"
        given += "" if bias is None else f", a bias of {tuple(bias.shape)}"
        raise UsageError(f"{layer} was given {given}; expected ({', '.join(axes)}) and ({axes[0]},)")
    if bias is not None and (bias.dtype != weight.dtype or bias.device != weight.device):
        given = f"a bias of {bias.dtype} on {bias.device} beside a weight of {weight.dtype} on {weight.device}"
        raise UsageError(f"{layer} was given {given}; expected the same of both: cast or move the bias")


def check_initialized(layer: nn.Module) -> None:
    """`UsageError` for a lazy layer that has not seen an input yet."""
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
        raise UsageError(f"a {type(layer).__name__} was given whose weight has no shape yet; run it once first")
