"""Batch normalisation in inference is one affine map per channel, and so is part of the linear map beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.pattern import Constant, Number, OptionalConstant, Var
from fxopt.pattern import Tensor as AnyTensor
from fxopt.transformation import New, Rewrite, Site
from fxopt.transformations._constants import unfit

CONVOLUTIONS = (ops.conv1d, ops.conv2d, ops.conv3d)
TRANSPOSED = (ops.conv_transpose1d, ops.conv_transpose2d, ops.conv_transpose3d)
_DIMENSIONS = {ops.linear: 2} | {op: n for kinds in (CONVOLUTIONS, TRANSPOSED) for n, op in enumerate(kinds, start=3)}
_INSISTS: dict[type[nn.Module], int] = {
    nn.BatchNorm2d: 4,
    nn.BatchNorm3d: 5,
}  # the number of dimensions that a module takes, and no other


def after(*layers: mechanism.Op) -> list[Any]:
    """The patterns of a batch normalisation that follows one of ``layers``."""
    return [(_normalised(_layer(op, AnyTensor("x"))), {"op": op, "norm_first": False}) for op in layers]


def before(*layers: mechanism.Op) -> list[Any]:
    """The patterns of a batch normalisation that feeds one of ``layers``."""
    return [(_layer(op, _normalised(AnyTensor("x"))), {"op": op, "norm_first": True}) for op in layers]


def _layer(op: mechanism.Op, x: Any) -> Any:
    return op(x, Constant("w"), OptionalConstant("b"), **{n: Var(n) for n in op.parameters[3:]})


def _normalised(x: Any) -> Any:
    affine = OptionalConstant("gamma"), OptionalConstant("beta")
    return ops.batch_norm(
        x, Constant("mean"), Constant("var"), *affine, training=False, momentum=..., eps=Number("eps")
    )


@dataclass(frozen=True)
class BatchNormRewrite(Rewrite):
    """
    What all foldings of a batch normalisation share.

    With s = gamma / sqrt(var + eps) and t = beta - mean * s: after a layer, w becomes w * s per output channel, and b
    becomes b * s + t; before a layer, w becomes w * s per input channel, and b becomes b + w @ t, summed over the
    kernel.
    The arithmetic is done in float64 and rounded once.  Source: B. Jacob et al., Quantization and Training of Neural
    Networks for Efficient Integer-Arithmetic-Only Inference, 2018, section 3.2.
    """

    def check(self, at: Site, x: Node, **bindings: Any) -> str | None:
        fold = _Fold.of(at, **bindings)
        given = [v for v in (fold.w, fold.b, fold.mean, fold.var, fold.gamma, fold.beta) if v is not None]
        if reason := next((r for v in given if (r := unfit(at.gm, v)) is not None), None):
            return reason
        if fold.norm_first and fold.options.get("padding") != "valid" and any(fold.options.get("padding", ())):
            return f"{at.root} pads with zeros, which are not normalised"
        return _other_channels(fold, x) or _other_type(fold) or _not_finite(fold)

    def rewrite(self, at: Site, x: Node, **bindings: Any) -> Node:
        fold = _Fold.of(at, **bindings)
        weight, bias = self.parameters(at, **bindings)
        return at.emit(fold.op, x, weight, bias, **fold.options)

    @staticmethod
    def parameters(at: Site, **bindings: Any) -> tuple[New, New]:
        """The folded weight and bias, trained where an old one is."""
        fold = _Fold.of(at, **bindings)
        weight, bias = fold.folded()
        path = at.path(fold.w)
        bias_path = at.path(fold.b) if fold.b is not None else f"{path.rpartition('.')[0]}.bias".lstrip(".")
        if isinstance(old := fold.tensor(fold.w), nn.Parameter):
            trained = any(fold.tensor(v).requires_grad for v in (fold.b, fold.beta) if v is not None)
            weight, bias = nn.Parameter(weight, old.requires_grad), nn.Parameter(bias, trained)
        return New(weight, path), New(bias, bias_path)

    def concerns(self, gm: GraphModule, node: Node, op: mechanism.Op) -> bool:
        """The batch normalisations, and the layers after one."""
        return op is ops.batch_norm or any(_is_norm(gm, n) for n in node.all_input_nodes)


def _is_norm(gm: GraphModule, node: Node) -> bool:
    return mechanism.operation(gm, node)[0] is ops.batch_norm


@dataclass(frozen=True)
class _Fold:
    """A layer and the normalisation beside it, as a match bound them."""

    at: Site
    op: mechanism.Op
    norm_first: bool
    w: Any
    b: Any
    mean: Any
    var: Any
    gamma: Any
    beta: Any
    eps: float
    options: dict[str, Any]  # stride, padding and so on

    @staticmethod
    def of(at: Site, **bindings: Any) -> _Fold:
        own = {n: bindings.pop(n) for n in ("op", "norm_first", "w", "b", "mean", "var", "gamma", "beta", "eps")}
        return _Fold(at, options=bindings, **own)

    def tensor(self, x: Any) -> Tensor:
        """The parameter or buffer behind ``x``."""
        found = self.at.tensor(x)
        assert found is not None
        return found

    def folded(self) -> tuple[Tensor, Tensor]:
        """The new weight, in the old one's shape, type and order in memory, and the new bias."""
        weight, bias, mean, var, gamma, beta = (
            None if v is None else self.tensor(v).detach().double()
            for v in (self.w, self.b, self.mean, self.var, self.gamma, self.beta)
        )
        assert weight is not None and mean is not None and var is not None
        scale = (var + self.eps).rsqrt() * (1 if gamma is None else gamma)
        shift = (0 if beta is None else beta) - mean * scale
        if self.norm_first:
            reached = _per_channel(weight, shift, 1, self.options.get("groups", 1))
            bias = reached.flatten(1).sum(1) + (0 if bias is None else bias)
        else:
            bias = shift + (0 if bias is None else bias * scale)
        axis = 1 if self.norm_first or self.op in TRANSPOSED else 0
        weight = _per_channel(weight, scale, axis, self.options.get("groups", 1))
        dtype = self.tensor(self.w).dtype
        return weight.to(dtype), bias.to(dtype)


def _per_channel(weight: Tensor, factors: Tensor, axis: int, groups: int) -> Tensor:
    """
    ``weight`` times one factor per channel.

    The channels are those of dimension 0, or those of dimension 1 in each of the ``groups`` into which dimension 0
    falls: (groups * m, n, ...) has groups * n of them.
    """
    kernel = (1,) * (weight.dim() - 2)
    if axis == 0:
        return weight * factors.view(-1, 1, *kernel)
    grouped: Tensor = weight.unflatten(0, (groups, -1))
    return (grouped * factors.view(groups, 1, -1, *kernel)).flatten(0, 1)


def _other_channels(fold: _Fold, x: Node) -> str | None:
    """Why dimension 1, which a normalisation takes for the channels, may be another than the layer's."""
    layer = next(n for n in fold.at.match.nodes if mechanism.operation(fold.at.gm, n)[0] is fold.op)
    norm = next(n for n in fold.at.match.nodes if _is_norm(fold.at.gm, n))
    between, wanted = (x if fold.norm_first else layer), _DIMENSIONS[fold.op]
    value = fold.at.value(between)
    if value is not None and value.dim() == wanted:
        return None
    if value is not None:
        return (
            f"{between} has {value.dim()} dimensions, expected {wanted}: else {norm} normalises no channels of {layer}"
        )
    module = mechanism.submodule(fold.at.gm, str(norm.target)) if norm.op == "call_module" else None
    if module is not None and _INSISTS.get(type(module)) == wanted:
        return None
    return f"whether {between} has {wanted} dimensions is not known; call fxopt.propagate(gm, inputs)"


def _other_type(fold: _Fold) -> str | None:
    """Why the values are of another type than the weight, as under autocast."""
    dtype = fold.tensor(fold.w).dtype
    if not dtype.is_floating_point:
        return f"{fold.at.path(fold.w)} is of {dtype}, expected a floating-point type"
    values = {n: v for n in fold.at.match.nodes if (v := fold.at.value(n)) is not None}
    return next(
        (f"{n} is of {v.dtype}, and its weight of {dtype}" for n, v in values.items() if v.dtype != dtype), None
    )


def _not_finite(fold: _Fold) -> str | None:
    if all(bool(v.isfinite().all()) for v in fold.folded()):
        return None
    return f"the folded weight or bias would not be finite in {fold.tensor(fold.w).dtype}"
