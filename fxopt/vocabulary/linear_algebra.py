"""Linear algebra and convolutions."""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxopt.ops import op, spell
from fxopt.vocabulary import declaring as say

aten = torch.ops.aten


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
def addmm(input, mat1, mat2, *, beta=1, alpha=1): ...


@op(torch.matmul, operator.matmul, "matmul", aten.matmul.default)
def matmul(input, other): ...


@op(torch.mm, "mm", aten.mm.default)
def mm(input, mat2): ...


@op(torch.bmm, "bmm", aten.bmm.default)
def bmm(input, mat2): ...


@op(torch.baddbmm, "baddbmm", aten.baddbmm.default)
def baddbmm(input, batch1, batch2, *, beta=1, alpha=1): ...


@op(spell(torch.einsum, variadic="operands"), spell(aten.einsum.default, "equation operands _"))
def einsum(equation, operands): ...


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
    normalize=say.pairs("stride", "padding", "dilation", n=1),
    build=_conv_build(nn.Conv1d, 1),
)
def conv1d(input, weight, bias=None, stride=(1,), padding=(0,), dilation=(1,), groups=1): ...


@op(
    spell(nn.Conv2d, attributes=_conv_attributes),
    F.conv2d,
    aten.conv2d.default,
    aten.conv2d.padding,
    normalize=say.pairs("stride", "padding", "dilation"),
    build=_conv_build(nn.Conv2d, 2),
)
def conv2d(input, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1): ...


@op(
    spell(nn.Conv3d, attributes=_conv_attributes),
    F.conv3d,
    aten.conv3d.default,
    aten.conv3d.padding,
    normalize=say.pairs("stride", "padding", "dilation", n=3),
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
    normalize=say.pairs("stride", "padding", "output_padding", "dilation", n=1),
    build=_conv_transpose_build(nn.ConvTranspose1d, 1),
)
def conv_transpose1d(
    input, weight, bias=None, stride=(1,), padding=(0,), output_padding=(0,), groups=1, dilation=(1,)
): ...


@op(
    spell(nn.ConvTranspose2d, attributes=_conv_transpose_attributes),
    F.conv_transpose2d,
    aten.conv_transpose2d.input,
    normalize=say.pairs("stride", "padding", "output_padding", "dilation"),
    build=_conv_transpose_build(nn.ConvTranspose2d, 2),
)
def conv_transpose2d(
    input, weight, bias=None, stride=(1, 1), padding=(0, 0), output_padding=(0, 0), groups=1, dilation=(1, 1)
): ...


@op(
    spell(nn.ConvTranspose3d, attributes=_conv_transpose_attributes),
    F.conv_transpose3d,
    aten.conv_transpose3d.input,
    normalize=say.pairs("stride", "padding", "output_padding", "dilation", n=3),
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
