"""The vocabulary: every operation that fxopt can read, declared once, with all its spellings.

The stub's signature is the operation's; parameters are named as torch names them.  An operation that is not here is
not rewritten.
"""

# ruff: noqa: A001, D103, E704
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxopt.kernels  # noqa: F401  (registers torch.ops.fxopt)
from fxopt.ops import op, spell

aten = torch.ops.aten
fused = torch.ops.fxopt


# --- helpers for declarations ---------------------------------------------------------------------------------------


def _pairs(*names: str, n: int = 2) -> Any:
    """Numbers as ``n``-tuples: stride=1 and stride=(1, 1) are one thing."""

    def normalize(arguments: dict[str, Any]) -> None:
        for name in names:
            value = arguments[name]
            if isinstance(value, int):
                arguments[name] = (value,) * n
            elif isinstance(value, tuple) and len(value) == 1:
                arguments[name] = value * n

    return normalize


def _shape(name: str) -> Any:
    def normalize(arguments: dict[str, Any]) -> None:
        if isinstance(arguments[name], int):
            arguments[name] = (arguments[name],)

    return normalize


def _training(arguments: Mapping[str, Any]) -> bool:
    return arguments["training"] is not False and arguments.get("p", 1.0) != 0.0


def _conv_attributes(module: Any) -> dict[str, Any] | str:
    if module.padding_mode != "zeros":
        return f"pads with padding_mode={module.padding_mode!r}"
    names = ("weight", "bias", "stride", "padding", "dilation", "groups")
    return {n: getattr(module, n) for n in names}


def _conv_transpose_attributes(module: Any) -> dict[str, Any] | str:
    if module.padding_mode != "zeros":
        return f"pads with padding_mode={module.padding_mode!r}"
    names = ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    return {n: getattr(module, n) for n in names}


def _batch_norm_attributes(module: Any) -> dict[str, Any] | str:
    training = module.training or module.running_mean is None
    if module.momentum is None and module.training:
        return "averages its statistics cumulatively"
    tensors = {n: getattr(module, n) for n in ("running_mean", "running_var", "weight", "bias")}
    return tensors | {"training": training, "momentum": module.momentum or 0.0, "eps": module.eps}


def _batch_norm_writes(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    return ("running_mean", "running_var") if arguments["training"] is not False else ()


# --- linear algebra -------------------------------------------------------------------------------------------------


def _build_linear(weight: torch.Tensor, bias: torch.Tensor | None = None, **_: Any) -> nn.Module:
    features, inputs = weight.shape
    module = nn.Linear(inputs, features, bias=bias is not None, device="meta")
    return _holding(module, weight=weight, bias=bias)


def _holding(module: nn.Module, **tensors: torch.Tensor | None) -> nn.Module:
    for name, tensor in tensors.items():
        if tensor is not None:
            module._parameters.pop(name, None)
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(name, tensor)
            else:
                module.register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.requires_grad))
    module.training = False
    return module


@op(nn.Linear, F.linear, aten.linear.default, build=_build_linear)
def linear(input, weight, bias=None): ...


@op(torch.addmm, "addmm", aten.addmm.default)
def addmm(input, mat1, mat2, beta=1, alpha=1): ...


@op(torch.matmul, operator.matmul, "matmul", aten.matmul.default)
def matmul(input, other): ...


@op(torch.mm, "mm", aten.mm.default)
def mm(input, mat2): ...


@op(torch.bmm, "bmm", aten.bmm.default)
def bmm(input, mat2): ...


def _conv_build(kind: Any, n: int) -> Any:
    def build(weight, bias=None, stride=1, padding=0, dilation=1, groups=1, **_):
        stride, dilation = ((v,) * n if isinstance(v, int) else v for v in (stride, dilation))
        padding = (padding,) * n if isinstance(padding, int) else padding
        features, inputs = weight.shape[0], weight.shape[1] * groups
        kernel = tuple(weight.shape[2:])
        module = kind(inputs, features, kernel, stride, padding, dilation, groups, bias is not None, device="meta")
        return _holding(module, weight=weight, bias=bias)

    return build


@op(
    spell(nn.Conv1d, attributes=_conv_attributes),
    F.conv1d,
    aten.conv1d.default,
    aten.conv1d.padding,
    normalize=_pairs("stride", "padding", "dilation", n=1),
    build=_conv_build(nn.Conv1d, 1),
)
def conv1d(input, weight, bias=None, stride=(1,), padding=(0,), dilation=(1,), groups=1): ...


@op(
    spell(nn.Conv2d, attributes=_conv_attributes),
    F.conv2d,
    aten.conv2d.default,
    aten.conv2d.padding,
    normalize=_pairs("stride", "padding", "dilation"),
    build=_conv_build(nn.Conv2d, 2),
)
def conv2d(input, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1): ...


@op(
    spell(nn.Conv3d, attributes=_conv_attributes),
    F.conv3d,
    aten.conv3d.default,
    aten.conv3d.padding,
    normalize=_pairs("stride", "padding", "dilation", n=3),
    build=_conv_build(nn.Conv3d, 3),
)
def conv3d(input, weight, bias=None, stride=(1, 1, 1), padding=(0, 0, 0), dilation=(1, 1, 1), groups=1): ...


def _conv_transpose_build(kind: Any, n: int) -> Any:
    def build(weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, **_):
        inputs, features = weight.shape[0], weight.shape[1] * groups
        kernel = tuple(weight.shape[2:])
        said = (stride, padding, output_padding, groups, bias is not None, dilation)
        return _holding(kind(inputs, features, kernel, *said, device="meta"), weight=weight, bias=bias)

    return build


@op(
    spell(nn.ConvTranspose1d, attributes=_conv_transpose_attributes),
    F.conv_transpose1d,
    aten.conv_transpose1d.default,
    normalize=_pairs("stride", "padding", "output_padding", "dilation", n=1),
    build=_conv_transpose_build(nn.ConvTranspose1d, 1),
)
def conv_transpose1d(
    input, weight, bias=None, stride=(1,), padding=(0,), output_padding=(0,), groups=1, dilation=(1,)
): ...


@op(
    spell(nn.ConvTranspose2d, attributes=_conv_transpose_attributes),
    F.conv_transpose2d,
    aten.conv_transpose2d.input,
    normalize=_pairs("stride", "padding", "output_padding", "dilation"),
    build=_conv_transpose_build(nn.ConvTranspose2d, 2),
)
def conv_transpose2d(
    input, weight, bias=None, stride=(1, 1), padding=(0, 0), output_padding=(0, 0), groups=1, dilation=(1, 1)
): ...


@op(
    spell(nn.ConvTranspose3d, attributes=_conv_transpose_attributes),
    F.conv_transpose3d,
    aten.conv_transpose3d.input,
    normalize=_pairs("stride", "padding", "output_padding", "dilation", n=3),
    build=_conv_transpose_build(nn.ConvTranspose3d, 3),
)
def conv_transpose3d(
    input,
    weight,
    bias=None,
    stride=(1, 1, 1),
    padding=(0, 0, 0),
    output_padding=(0, 0, 0),
    groups=1,
    dilation=(1, 1, 1),
): ...


# --- normalisation --------------------------------------------------------------------------------------------------


@op(
    spell(nn.BatchNorm1d, attributes=_batch_norm_attributes),
    spell(nn.BatchNorm2d, attributes=_batch_norm_attributes),
    spell(nn.BatchNorm3d, attributes=_batch_norm_attributes),
    F.batch_norm,
    spell(aten.batch_norm.default, "input weight bias running_mean running_var training momentum eps _"),
    writes=_batch_norm_writes,
)
def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05): ...


@op(
    nn.LayerNorm,
    F.layer_norm,
    spell(aten.layer_norm.default, "input normalized_shape weight bias eps _"),
    normalize=_shape("normalized_shape"),
)
def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-05): ...


@op(nn.RMSNorm, F.rms_norm, aten.rms_norm.default, normalize=_shape("normalized_shape"))
def rms_norm(input, normalized_shape, weight=None, eps=None): ...


@op(nn.GroupNorm, F.group_norm, spell(aten.group_norm.default, "input num_groups weight bias eps _"))
def group_norm(input, num_groups, weight=None, bias=None, eps=1e-05): ...


@op(
    spell(nn.Dropout, attributes=lambda m: {"p": m.p, "training": m.training, "inplace": m.inplace}),  # type: ignore[arg-type,return-value]
    F.dropout,
    spell(torch.dropout, "input p training"),
    aten.dropout.default,
    inplace=(spell(torch.dropout_, "input p training", inplace=True), spell(aten.dropout_.default, inplace=True)),
    random=_training,
    view=True,
)
def dropout(input, p=0.5, training=True, inplace=False): ...


# --- activations ----------------------------------------------------------------------------------------------------


@op(nn.GELU, F.gelu, aten.gelu.default, inplace=(aten.gelu_.default,))
def gelu(input, approximate="none"): ...


@op(nn.ReLU, F.relu, torch.relu, "relu", aten.relu.default, inplace=(torch.relu_, "relu_", aten.relu_.default))
def relu(input, inplace=False): ...


@op(nn.SiLU, F.silu, aten.silu.default, inplace=(aten.silu_.default,))
def silu(input, inplace=False): ...


@op(nn.Tanh, torch.tanh, F.tanh, "tanh", aten.tanh.default, inplace=(torch.tanh_, "tanh_", aten.tanh_.default))
def tanh(input): ...


@op(nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", aten.sigmoid.default, inplace=("sigmoid_", aten.sigmoid_.default))
def sigmoid(input): ...


@op(
    spell(nn.Softmax, attributes=lambda m: {"dim": m.dim}),  # type: ignore[arg-type,return-value]
    spell(F.softmax, "input dim _ dtype"),
    spell(torch.softmax, "input dim dtype"),
    "softmax",
    aten.softmax.int,
    spell(aten._softmax.default, "input dim _"),
)
def softmax(input, dim=None, dtype=None): ...


# --- arithmetic -----------------------------------------------------------------------------------------------------


@op(
    operator.add,
    torch.add,
    "add",
    aten.add.Tensor,
    aten.add.Scalar,
    inplace=(operator.iadd, "add_", aten.add_.Tensor, aten.add_.Scalar),
    commutative=True,
)
def add(input, other, alpha=1): ...


@op(
    operator.sub,
    torch.sub,
    torch.subtract,
    "sub",
    aten.sub.Tensor,
    aten.sub.Scalar,
    inplace=(operator.isub, "sub_", aten.sub_.Tensor, aten.sub_.Scalar),
)
def sub(input, other, alpha=1): ...


@op(
    operator.mul,
    torch.mul,
    torch.multiply,
    "mul",
    aten.mul.Tensor,
    aten.mul.Scalar,
    inplace=(operator.imul, "mul_", aten.mul_.Tensor, aten.mul_.Scalar),
    commutative=True,
)
def mul(input, other): ...


@op(
    operator.truediv,
    torch.div,
    torch.true_divide,
    torch.divide,
    "div",
    "true_divide",
    "divide",
    aten.div.Tensor,
    aten.div.Scalar,
    aten.div.Tensor_mode,
    aten.div.Scalar_mode,
    aten.true_divide.Tensor,
    inplace=(operator.itruediv, "div_", aten.div_.Tensor, aten.div_.Scalar),
)
def div(input, other, rounding_mode=None): ...


@op(operator.neg, torch.neg, "neg", aten.neg.default, inplace=("neg_", aten.neg_.default))
def neg(input): ...
