"""The vocabulary: every operation that fxopt can read, declared once, with all its spellings.

The stub's signature is the operation's; parameters are named as torch names them.  An operation that is not here is
not rewritten.
"""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

import builtins
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

import fxopt.kernels  # noqa: F401  (registers torch.ops.fxopt)
from fxopt.kernels.unstructured_conv import SparseConv2d, pads
from fxopt.kernels.unstructured_linear import SparseLinear
from fxopt.kernels.unstructured_pattern import Pattern
from fxopt.ops import op, spell

aten = torch.ops.aten
fused = torch.ops.fxopt

_Said = tuple[tuple[Any, ...], Mapping[str, Any]]  # positional and keyword arguments of a call


# --- helpers for declarations ---------------------------------------------------------------------------------------


def _pairs(*names: str, n: int = 2) -> Any:
    """Numbers as ``n``-tuples: stride=1 and stride=(1, 1) are one thing."""

    def normalize(arguments: dict[str, Any]) -> None:
        for name in names:
            value = arguments[name]
            if name == "padding" and value == "valid":
                arguments[name] = (0,) * n
            elif isinstance(value, int):
                arguments[name] = (value,) * n
            elif isinstance(value, tuple) and len(value) == 1:
                arguments[name] = value * n

    return normalize


def _shape(name: str) -> Any:
    def normalize(arguments: dict[str, Any]) -> None:
        if isinstance(arguments[name], int):
            arguments[name] = (arguments[name],)

    return normalize


def _floats(*names: str) -> Any:
    """Numbers as floats: slope=1 and slope=1.0 are one thing."""

    def normalize(arguments: dict[str, Any]) -> None:
        for name in names:
            if isinstance(arguments[name], int) and not isinstance(arguments[name], bool):
                arguments[name] = float(arguments[name])

    return normalize


def _dims(arguments: dict[str, Any]) -> None:
    """dim=-1 and dim=(-1,) are one thing."""
    if isinstance(arguments["dim"], int):
        arguments["dim"] = (arguments["dim"],)


def _pooling(arguments: dict[str, Any]) -> None:
    """Pairs, and a stride that was not said is the kernel's size."""
    if not arguments["stride"]:
        arguments["stride"] = arguments["kernel_size"]
    _pairs(*(n for n in ("kernel_size", "stride", "padding", "dilation") if n in arguments))(arguments)


def _device(arguments: dict[str, Any]) -> None:
    if isinstance(arguments["device"], str):
        arguments["device"] = torch.device(arguments["device"])


def _sized(arguments: dict[str, Any]) -> None:
    _device(arguments)
    if isinstance(arguments["size"], int):
        arguments["size"] = (arguments["size"],)


def _always(arguments: Mapping[str, Any]) -> bool:
    return True


# What a factory function may be told without meaning anything.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "layout": (None, torch.strided),
    "pin_memory": (None, False),
    "requires_grad": (False,),
}
_PLAIN_LIKE = {**_PLAIN, "memory_format": (None, torch.preserve_format)}


def _with_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Said | None:
    """torch.min(x, y) of two tensors, not of a tensor and a dimension."""
    other = args[1] if len(args) > 1 else kwargs.get("other")
    return (args, kwargs) if isinstance(other, Node) else None


def _no_dtype(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Said | None:
    """x.view(2, 3), not x.view(torch.int32)."""
    said = [*args[1:], *kwargs.values()]
    return None if builtins.any(isinstance(v, torch.dtype | str) for v in said) else (args, kwargs)


def _to(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Said | None:
    """x.to(dtype), x.to(device), x.to(device, dtype), each with what may follow it; by keyword."""
    names = ["device", "dtype", "non_blocking", "copy"]
    if len(args) > 1 and (isinstance(args[1], torch.dtype) or _asks(args[1], "dtype")):
        names.remove("device")
    elif len(args) > 1 and not (isinstance(args[1], torch.device | str | int) or _asks(args[1], "device")):
        return None
    if "other" in kwargs or len(args) > len(names) + 1:
        return None
    return args[:1], {**dict(zip(names, args[1:], strict=False)), **kwargs}


def _typed(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Said | None:
    """x.type(torch.int32), not x.type()."""
    dtype = args[1] if len(args) == 2 else kwargs.get("dtype")
    return (args[:1], {"dtype": dtype}) if isinstance(dtype, torch.dtype) and len(args) + len(kwargs) == 2 else None


def _moved(arguments: dict[str, Any]) -> None:
    _device(arguments)
    _preserving(arguments)


def _preserving(arguments: dict[str, Any]) -> None:
    if arguments["memory_format"] is torch.preserve_format:
        arguments["memory_format"] = None


def _to_other(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Said | None:
    """x.to(y)."""
    other = args[1] if len(args) > 1 else kwargs.get("other")
    asked = _asks(other, "dtype") or _asks(other, "device")
    return (args, kwargs) if isinstance(other, Node) and not asked else None


def _asks(value: Any, name: str) -> bool:
    """Whether ``value`` is y.dtype or y.device of another tensor."""
    return isinstance(value, Node) and value.target is getattr and value.args[1:] == (name,)


def _arange(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Said | None:
    """arange(end), arange(start, end), arange(start, end, step); by keyword."""
    names = ["end"] if len(args) == 1 else ["start", "end", "step"]
    if len(args) > len(names):
        return None
    return (), {**dict(zip(names, args, strict=False)), **kwargs}


def _slice_bounds(arguments: dict[str, Any]) -> None:
    """From the beginning is from 0; to the largest integer, as export says, is to the end."""
    if arguments["start"] is None:
        arguments["start"] = 0
    if isinstance(arguments["end"], int) and arguments["end"] >= 2**63 - 1:
        arguments["end"] = None


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
    spell(
        aten.batch_norm.default,
        "input weight bias running_mean running_var training momentum eps _",
        must={"cudnn_enabled": (True, False)},
    ),
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
    spell(nn.Dropout, attributes=lambda m: {"p": m.p, "training": m.training, "inplace": m.inplace}),
    F.dropout,
    spell(torch.dropout, "input p! train=training!"),
    aten.dropout.default,
    inplace=(
        spell(torch.dropout_, "input p! train=training!", inplace=True),
        spell(aten.dropout_.default, inplace=True),
    ),
    random=_training,
    view=True,
)
def dropout(input, p=0.5, training=True, inplace=False): ...


@op(
    spell(torch.feature_dropout, "input p! train=training!"),
    spell(nn.Dropout1d, attributes=lambda m: {"p": m.p, "training": m.training, "inplace": m.inplace}),
    spell(nn.Dropout2d, attributes=lambda m: {"p": m.p, "training": m.training, "inplace": m.inplace}),
    spell(nn.Dropout3d, attributes=lambda m: {"p": m.p, "training": m.training, "inplace": m.inplace}),
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    aten.feature_dropout.default,
    inplace=(
        spell(torch.feature_dropout_, "input p! train=training!", inplace=True),
        spell(aten.feature_dropout_.default, inplace=True),
    ),
    random=_training,
    view=True,
)
def feature_dropout(input, p=0.5, training=True, inplace=False): ...


@op(
    spell(nn.AlphaDropout, attributes=lambda m: {"p": m.p, "training": m.training}),  # does not look at its inplace
    F.alpha_dropout,
    spell(torch.alpha_dropout, "input p! train=training!"),
    aten.alpha_dropout.default,
    inplace=(
        spell(torch.alpha_dropout_, "input p! train=training!", inplace=True),
        spell(aten.alpha_dropout_.default, inplace=True),
    ),
    random=_training,
    view=True,
)
def alpha_dropout(input, p=0.5, training=True, inplace=False): ...


@op(
    spell(nn.FeatureAlphaDropout, attributes=lambda m: {"p": m.p, "training": m.training}),
    F.feature_alpha_dropout,
    spell(torch.feature_alpha_dropout, "input p! train=training!"),
    aten.feature_alpha_dropout.default,
    inplace=(
        spell(torch.feature_alpha_dropout_, "input p! train=training!", inplace=True),
        spell(aten.feature_alpha_dropout_.default, inplace=True),
    ),
    random=_training,
    view=True,
)
def feature_alpha_dropout(input, p=0.5, training=True, inplace=False): ...


# --- activations ----------------------------------------------------------------------------------------------------


@op(nn.GELU, F.gelu, aten.gelu.default, inplace=(aten.gelu_.default,))
def gelu(input, *, approximate="none"): ...


@op(nn.ReLU, F.relu, torch.relu, "relu", aten.relu.default, inplace=(torch.relu_, "relu_", aten.relu_.default))
def relu(input, inplace=False): ...


@op(nn.ReLU6, F.relu6, aten.relu6.default, inplace=(aten.relu6_.default,))
def relu6(input, inplace=False): ...


@op(nn.SiLU, F.silu, aten.silu.default, inplace=(aten.silu_.default,))
def silu(input, inplace=False): ...


@op(nn.Mish, F.mish, aten.mish.default, inplace=(aten.mish_.default,))
def mish(input, inplace=False): ...


@op(nn.Hardswish, F.hardswish, aten.hardswish.default, inplace=(aten.hardswish_.default,))
def hardswish(input, inplace=False): ...


@op(nn.Hardsigmoid, F.hardsigmoid, aten.hardsigmoid.default, inplace=(aten.hardsigmoid_.default,))
def hardsigmoid(input, inplace=False): ...


@op(
    nn.Hardtanh,
    F.hardtanh,
    aten.hardtanh.default,
    inplace=(aten.hardtanh_.default,),
    normalize=_floats("min_val", "max_val"),
)
def hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False): ...


@op(nn.LeakyReLU, F.leaky_relu, aten.leaky_relu.default, inplace=(aten.leaky_relu_.default,))
def leaky_relu(input, negative_slope=0.01, inplace=False): ...


@op(
    nn.ELU,
    F.elu,
    spell(aten.elu.default, "input alpha _ _", must={"scale": (1, 1.0), "input_scale": (1, 1.0)}),
    normalize=_floats("alpha"),
)
def elu(input, alpha=1.0, inplace=False): ...


@op(nn.Softplus, F.softplus, aten.softplus.default, normalize=_floats("beta", "threshold"))
def softplus(input, beta=1.0, threshold=20.0): ...


@op(nn.Tanh, torch.tanh, F.tanh, "tanh", aten.tanh.default, inplace=(torch.tanh_, "tanh_", aten.tanh_.default))
def tanh(input): ...


@op(
    nn.Sigmoid,
    torch.sigmoid,
    F.sigmoid,
    torch.special.expit,
    "sigmoid",
    aten.sigmoid.default,
    aten.special_expit.default,
    inplace=("sigmoid_", aten.sigmoid_.default),
)
def sigmoid(input): ...


@op(nn.GLU, F.glu, aten.glu.default)
def glu(input, dim=-1): ...


@op(
    spell(nn.Softmax, attributes=lambda m: {"dim": m.dim}),
    spell(F.softmax, "input dim _ dtype"),
    spell(torch.softmax, "input dim dtype"),
    "softmax",
    aten.softmax.int,
    spell(aten._softmax.default, "input dim _", must={"half_to_float": (False,)}),
)
def softmax(input, dim=None, dtype=None): ...


@op(
    spell(nn.LogSoftmax, attributes=lambda m: {"dim": m.dim}),
    spell(F.log_softmax, "input dim _ dtype"),
    spell(torch.log_softmax, "input dim dtype"),
    "log_softmax",
    aten.log_softmax.int,
    spell(aten._log_softmax.default, "input dim _", must={"half_to_float": (False,)}),
)
def log_softmax(input, dim=None, dtype=None): ...


# --- attention and embedding ----------------------------------------------------------------------------------------


@op(
    F.scaled_dot_product_attention,
    aten.scaled_dot_product_attention.default,
    random=lambda arguments: arguments["dropout_p"] != 0,
)
def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
): ...


@op(
    nn.Embedding,
    F.embedding,
    spell(
        aten.embedding.default,
        "weight input padding_idx scale_grad_by_freq sparse",
        translate={"padding_idx": (-1, None)},
    ),
    writes=lambda arguments: () if arguments["max_norm"] is None else ("weight",),
)
def embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
): ...


@op(F.one_hot, aten.one_hot.default)
def one_hot(input, num_classes=-1): ...


# --- pooling and padding --------------------------------------------------------------------------------------------


def _max_pool_attributes(module: Any) -> dict[str, Any] | str:
    if module.return_indices:
        return "returns indices too"
    return {n: getattr(module, n) for n in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")}


@op(
    spell(nn.MaxPool2d, attributes=_max_pool_attributes),
    # torch picks the function by `return_indices`, which every traced call says
    spell(
        F.max_pool2d,
        "input kernel_size! stride padding dilation ceil_mode return_indices=_",
        must={"return_indices": (False,)},
    ),
    torch.max_pool2d,
    spell(aten.max_pool2d.default, translate={"stride": ((), None)}),
    normalize=_pooling,
)
def max_pool2d(input, kernel_size, stride=None, padding=(0, 0), dilation=(1, 1), ceil_mode=False): ...


@op(
    nn.AvgPool2d,
    F.avg_pool2d,
    spell(aten.avg_pool2d.default, translate={"stride": ((), None)}),
    normalize=_pooling,
)
def avg_pool2d(
    input,
    kernel_size,
    stride=None,
    padding=(0, 0),
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
): ...


@op(
    nn.AdaptiveAvgPool2d,
    F.adaptive_avg_pool2d,
    aten.adaptive_avg_pool2d.default,
    normalize=_pairs("output_size"),
)
def adaptive_avg_pool2d(input, output_size): ...


def _padding_value(arguments: dict[str, Any]) -> None:
    if arguments["mode"] == "constant" and arguments["value"] is None:
        arguments["value"] = 0.0
    _floats("value")(arguments)


@op(
    F.pad,
    aten.pad.default,
    spell(aten.constant_pad_nd.default, "input pad value", mode="constant"),
    normalize=_padding_value,
)
def pad(input, pad, mode="constant", value=None): ...


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
def add(input, other, *, alpha=1): ...


@op(
    operator.sub,
    torch.sub,
    torch.subtract,
    "sub",
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.subtract.Tensor,
    aten.subtract.Scalar,
    spell(aten.rsub.Scalar, "other input alpha"),
    spell(aten.rsub.Tensor, "other input alpha"),
    inplace=(operator.isub, "sub_", aten.sub_.Tensor, aten.sub_.Scalar),
)
def sub(input, other, *, alpha=1): ...


@op(
    operator.mul,
    torch.mul,
    torch.multiply,
    "mul",
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.multiply.Tensor,
    aten.multiply.Scalar,
    inplace=(operator.imul, "mul_", aten.mul_.Tensor, aten.mul_.Scalar),
    commutative=True,
)
def mul(input, other): ...


@op(
    operator.truediv,
    torch.div,
    torch.divide,
    spell(torch.true_divide, "input other"),
    "div",
    "divide",
    spell("true_divide", "input other"),
    aten.div.Tensor,
    aten.div.Scalar,
    aten.div.Tensor_mode,
    aten.div.Scalar_mode,
    aten.true_divide.Tensor,
    aten.true_divide.Scalar,
    aten.divide.Tensor,
    aten.divide.Scalar,
    aten.divide.Tensor_mode,
    aten.divide.Scalar_mode,
    inplace=(operator.itruediv, "div_", aten.div_.Tensor, aten.div_.Scalar, aten.div_.Tensor_mode),
)
def div(input, other, *, rounding_mode=None): ...


@op(
    operator.floordiv,
    torch.floor_divide,
    "floor_divide",
    aten.floor_divide.default,
    aten.floor_divide.Scalar,
    inplace=(operator.ifloordiv, "floor_divide_"),
)
def floor_divide(input, other): ...


@op(
    operator.mod,
    torch.remainder,
    "remainder",
    aten.remainder.Tensor,
    aten.remainder.Scalar,
    aten.remainder.Scalar_Tensor,
    inplace=(operator.imod, "remainder_"),
)
def remainder(input, other): ...


@op(
    operator.pow,
    torch.pow,
    "pow",
    aten.pow.Tensor_Scalar,
    aten.pow.Scalar,
    aten.pow.Tensor_Tensor,
    spell(torch.square, "input", exponent=2),
    spell("square", "input", exponent=2),
    spell(aten.square.default, "input", exponent=2),
    inplace=(operator.ipow, "pow_", aten.pow_.Scalar, aten.pow_.Tensor),
)
def pow(input, exponent): ...


@op(
    operator.neg,
    torch.neg,
    torch.negative,
    "neg",
    "negative",
    aten.neg.default,
    aten.negative.default,
    inplace=("neg_", aten.neg_.default),
)
def neg(input): ...


@op(
    operator.abs,
    torch.abs,
    torch.absolute,
    "abs",
    "absolute",
    aten.abs.default,
    aten.absolute.default,
    inplace=("abs_", aten.abs_.default),
)
def abs(input): ...


@op(torch.sqrt, "sqrt", aten.sqrt.default, inplace=("sqrt_", aten.sqrt_.default))
def sqrt(input): ...


@op(torch.rsqrt, "rsqrt", aten.rsqrt.default, inplace=("rsqrt_", aten.rsqrt_.default))
def rsqrt(input): ...


@op(torch.reciprocal, "reciprocal", aten.reciprocal.default, inplace=("reciprocal_", aten.reciprocal_.default))
def reciprocal(input): ...


@op(torch.exp, "exp", aten.exp.default, inplace=(torch.exp_, "exp_", aten.exp_.default))
def exp(input): ...


@op(torch.log, "log", aten.log.default, inplace=("log_", aten.log_.default))
def log(input): ...


@op(torch.cos, "cos", aten.cos.default, inplace=("cos_", aten.cos_.default))
def cos(input): ...


@op(torch.sin, "sin", aten.sin.default, inplace=("sin_", aten.sin_.default))
def sin(input): ...


@op(torch.erf, "erf", aten.erf.default, inplace=("erf_", aten.erf_.default))
def erf(input): ...


@op(torch.floor, "floor", aten.floor.default, inplace=("floor_", aten.floor_.default))
def floor(input): ...


@op(torch.ceil, "ceil", aten.ceil.default, inplace=("ceil_", aten.ceil_.default))
def ceil(input): ...


@op(
    torch.clamp,
    torch.clip,
    "clamp",
    "clip",
    aten.clamp.default,
    aten.clamp.Tensor,
    aten.clip.default,
    aten.clip.Tensor,
    spell(torch.clamp_min, "input min"),
    spell("clamp_min", "input min"),
    spell(aten.clamp_min.default, "input min"),
    spell(torch.clamp_max, "input max"),
    spell("clamp_max", "input max"),
    spell(aten.clamp_max.default, "input max"),
    inplace=("clamp_", aten.clamp_.default),
)
def clamp(input, min=None, max=None): ...


@op(
    torch.minimum,
    spell(torch.min, arrange=_with_tensor),
    "minimum",
    spell("min", arrange=_with_tensor),
    aten.minimum.default,
    aten.min.other,
    commutative=True,
)
def minimum(input, other): ...


@op(
    torch.maximum,
    spell(torch.max, arrange=_with_tensor),
    "maximum",
    spell("max", arrange=_with_tensor),
    aten.maximum.default,
    aten.max.other,
    commutative=True,
)
def maximum(input, other): ...


# --- comparison, logic and choice -----------------------------------------------------------------------------------


@op(operator.eq, torch.eq, "eq", aten.eq.Scalar, aten.eq.Tensor, commutative=True)
def eq(input, other): ...


@op(
    operator.ne,
    torch.ne,
    torch.not_equal,
    "ne",
    aten.ne.Scalar,
    aten.ne.Tensor,
    aten.not_equal.Scalar,
    aten.not_equal.Tensor,
    commutative=True,
)
def ne(input, other): ...


@op(operator.lt, torch.lt, torch.less, "lt", aten.lt.Scalar, aten.lt.Tensor, aten.less.Scalar, aten.less.Tensor)
def lt(input, other): ...


@op(
    operator.le,
    torch.le,
    torch.less_equal,
    "le",
    aten.le.Scalar,
    aten.le.Tensor,
    aten.less_equal.Scalar,
    aten.less_equal.Tensor,
)
def le(input, other): ...


@op(
    operator.gt, torch.gt, torch.greater, "gt", aten.gt.Scalar, aten.gt.Tensor, aten.greater.Scalar, aten.greater.Tensor
)
def gt(input, other): ...


@op(
    operator.ge,
    torch.ge,
    torch.greater_equal,
    "ge",
    aten.ge.Scalar,
    aten.ge.Tensor,
    aten.greater_equal.Scalar,
    aten.greater_equal.Tensor,
)
def ge(input, other): ...


@op(
    operator.and_,
    torch.bitwise_and,
    "bitwise_and",
    aten.bitwise_and.Tensor,
    aten.bitwise_and.Scalar,
    aten.__and__.Tensor,
    aten.__and__.Scalar,
    inplace=(operator.iand, "bitwise_and_"),
    commutative=True,
)
def bitwise_and(input, other): ...


@op(
    operator.or_,
    torch.bitwise_or,
    "bitwise_or",
    aten.bitwise_or.Tensor,
    aten.bitwise_or.Scalar,
    aten.__or__.Tensor,
    aten.__or__.Scalar,
    inplace=(operator.ior, "bitwise_or_"),
    commutative=True,
)
def bitwise_or(input, other): ...


@op(
    operator.xor,
    torch.bitwise_xor,
    "bitwise_xor",
    aten.bitwise_xor.Tensor,
    aten.bitwise_xor.Scalar,
    inplace=(operator.ixor, "bitwise_xor_"),
    commutative=True,
)
def bitwise_xor(input, other): ...


@op(operator.invert, torch.bitwise_not, "bitwise_not", aten.bitwise_not.default, inplace=("bitwise_not_",))
def bitwise_not(input): ...


@op(torch.logical_and, "logical_and", aten.logical_and.default, commutative=True)
def logical_and(input, other): ...


@op(torch.logical_or, "logical_or", aten.logical_or.default, commutative=True)
def logical_or(input, other): ...


@op(torch.logical_not, "logical_not", aten.logical_not.default)
def logical_not(input): ...


@op(torch.isnan, "isnan", aten.isnan.default)
def isnan(input): ...


@op(torch.isinf, "isinf", aten.isinf.default)
def isinf(input): ...


@op(torch.isfinite, "isfinite", aten.isfinite.default)
def isfinite(input): ...


@op(
    torch.where,
    spell("where", "input condition other"),
    aten.where.Scalar,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.where.self,
)
def where(condition, input, other): ...


@op(
    torch.masked_fill,
    "masked_fill",
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    inplace=("masked_fill_", aten.masked_fill_.Scalar, aten.masked_fill_.Tensor),
)
def masked_fill(input, mask, value): ...


@op(torch.tril, "tril", aten.tril.default)
def tril(input, diagonal=0): ...


@op(torch.triu, "triu", aten.triu.default)
def triu(input, diagonal=0): ...


# --- reductions -----------------------------------------------------------------------------------------------------


@op(
    torch.sum,
    "sum",
    spell(aten.sum.default, "input dtype"),
    aten.sum.dim_IntList,
    normalize=_dims,
)
def sum(input, dim=None, keepdim=False, *, dtype=None): ...


@op(
    torch.mean,
    "mean",
    spell(aten.mean.default, "input dtype"),
    aten.mean.dim,
    normalize=_dims,
)
def mean(input, dim=None, keepdim=False, *, dtype=None): ...


@op(torch.amax, "amax", aten.amax.default, normalize=_dims)
def amax(input, dim=(), keepdim=False): ...


@op(torch.amin, "amin", aten.amin.default, normalize=_dims)
def amin(input, dim=(), keepdim=False): ...


@op(
    torch.any,
    "any",
    spell(aten.any.default, "input"),
    aten.any.dims,
    aten.any.dim,
    normalize=_dims,
)
def any(input, dim=None, keepdim=False): ...


@op(
    torch.all,
    "all",
    spell(aten.all.default, "input"),
    aten.all.dims,
    aten.all.dim,
    normalize=_dims,
)
def all(input, dim=None, keepdim=False): ...


@op(torch.argmax, "argmax", aten.argmax.default)
def argmax(input, dim=None, keepdim=False): ...


@op(torch.argmin, "argmin", aten.argmin.default)
def argmin(input, dim=None, keepdim=False): ...


@op(torch.cumsum, "cumsum", aten.cumsum.default)
def cumsum(input, dim, *, dtype=None): ...


@op(torch.topk, "topk", aten.topk.default)
def topk(input, k, dim=-1, largest=True, sorted=True): ...


@op(
    spell(torch.sort, "input dim descending"),
    spell("sort", "input dim descending"),
    spell(aten.sort.default, "input dim descending"),
    spell(aten.sort.stable, "input stable dim descending", translate={"stable": (None, False)}),
)
def sort(input, dim=-1, descending=False, *, stable=False): ...


@op(torch.histc, "histc", aten.histc.default)
def histc(input, bins=100, min=0, max=0): ...


# --- shapes ---------------------------------------------------------------------------------------------------------


@op(spell("view", arrange=_no_dtype), aten.view.default, view=True)
def view(input, size): ...


@op(torch.reshape, "reshape", aten.reshape.default, aten._unsafe_view.default, view=True)
def reshape(input, shape): ...


@op(nn.Flatten, torch.flatten, "flatten", aten.flatten.using_ints, view=True)
def flatten(input, start_dim=0, end_dim=-1): ...


@op(
    spell(nn.Unflatten, attributes=lambda m: {"dim": m.dim, "sizes": m.unflattened_size}),
    torch.unflatten,
    "unflatten",
    aten.unflatten.int,
    view=True,
)
def unflatten(input, dim, sizes): ...


@op(torch.squeeze, "squeeze", spell(aten.squeeze.default, "input"), aten.squeeze.dims, aten.squeeze.dim, view=True)
def squeeze(input, dim=None): ...


@op(torch.unsqueeze, "unsqueeze", aten.unsqueeze.default, view=True)
def unsqueeze(input, dim): ...


@op(
    torch.transpose,
    torch.swapaxes,
    torch.swapdims,
    "transpose",
    "swapaxes",
    "swapdims",
    aten.transpose.int,
    aten.swapaxes.default,
    aten.swapdims.default,
    view=True,
)
def transpose(input, dim0, dim1): ...


@op(torch.t, "t", aten.t.default, view=True)
def t(input): ...


@op(torch.permute, "permute", aten.permute.default, view=True)
def permute(input, dims): ...


@op(
    torch.movedim,
    torch.moveaxis,
    "movedim",
    "moveaxis",
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
    view=True,
)
def movedim(input, source, destination): ...


@op(
    torch.broadcast_to,
    "expand",
    "broadcast_to",
    spell(aten.expand.default, "input size _"),
    aten.broadcast_to.default,
    view=True,
)
def expand(input, size): ...


@op("expand_as", aten.expand_as.default, view=True)
def expand_as(input, other): ...


@op("repeat", aten.repeat.default)
def repeat(input, repeats): ...


@op(
    torch.repeat_interleave,
    spell("repeat_interleave", variadic=""),
    aten.repeat_interleave.self_int,
    aten.repeat_interleave.self_Tensor,
)
def repeat_interleave(input, repeats, dim=None, *, output_size=None): ...


@op(spell("size", "input dim"), aten.sym_size.int)
def size(input, dim=None): ...


@op(torch.numel, "numel", "nelement", aten.sym_numel.default)
def numel(input): ...


@op(builtins.getattr, view=True)
def attribute(input, name): ...


# --- selecting and joining ------------------------------------------------------------------------------------------


@op(operator.getitem, view=True)
def getitem(input, index): ...


@op(torch.select, "select", aten.select.int, view=True)
def select(input, dim, index): ...


@op(aten.slice.Tensor, view=True, normalize=_slice_bounds)
def slice(input, dim=0, start=0, end=None, step=1): ...


@op(torch.narrow, "narrow", aten.narrow.default, view=True)
def narrow(input, dim, start, length): ...


@op(aten.index.Tensor)
def index(input, indices): ...


@op(torch.index_select, "index_select", aten.index_select.default)
def index_select(input, dim, index): ...


@op(
    torch.index_put,
    "index_put",
    aten.index_put.default,
    inplace=("index_put_", aten.index_put_.default),
)
def index_put(input, indices, values, accumulate=False): ...


@op(torch.index_add, "index_add", aten.index_add.default, inplace=("index_add_", aten.index_add_.default))
def index_add(input, dim, index, source, *, alpha=1): ...


@op(torch.gather, "gather", aten.gather.default)
def gather(input, dim, index, *, sparse_grad=False): ...


@op(
    torch.scatter_add,
    "scatter_add",
    aten.scatter_add.default,
    inplace=("scatter_add_", aten.scatter_add_.default),
)
def scatter_add(input, dim, index, src): ...


@op(torch.cat, torch.concat, torch.concatenate, aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(tensors, dim=0): ...


@op(torch.stack, aten.stack.default)
def stack(tensors, dim=0): ...


@op(
    spell(torch.split, "input split_size dim"),
    "split",
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    view=True,
)
def split(input, split_size, dim=0): ...


@op(torch.chunk, "chunk", aten.chunk.default, view=True)
def chunk(input, chunks, dim=0): ...


@op(torch.unbind, "unbind", aten.unbind.int, view=True)
def unbind(input, dim=0): ...


@op(torch.flip, "flip", aten.flip.default)
def flip(input, dims): ...


@op(torch.roll, spell("roll", variadic=""), aten.roll.default, normalize=_pairs("shifts", "dims", n=1))
def roll(input, shifts, dims=()): ...


# --- dtypes, devices and memory -------------------------------------------------------------------------------------

_TO_MUST = {"layout": (None, torch.strided), "pin_memory": (None, False)}


@op(
    spell("to", "input dtype device non_blocking copy memory_format", arrange=_to),
    spell(aten.to.dtype, "input dtype non_blocking copy memory_format"),
    spell(aten.to.device, "input device dtype non_blocking copy memory_format"),
    spell(aten.to.dtype_layout, "input dtype _ device _ non_blocking copy memory_format", must=_TO_MUST),
    spell("type", "input dtype", arrange=_typed),
    spell("float", "input", dtype=torch.float32),
    spell("double", "input", dtype=torch.float64),
    spell("half", "input", dtype=torch.float16),
    spell("bfloat16", "input", dtype=torch.bfloat16),
    spell("int", "input", dtype=torch.int32),
    spell("long", "input", dtype=torch.int64),
    spell("bool", "input", dtype=torch.bool),
    view=True,
    normalize=_moved,
)
def to(input, *, dtype=None, device=None, non_blocking=False, copy=False, memory_format=None): ...


@op(spell("to", "input other non_blocking copy memory_format", arrange=_to_other), aten.to.other, view=True)
def to_other(input, other, non_blocking=False, copy=False, *, memory_format=None): ...


@op("type_as", aten.type_as.default, view=True)
def type_as(input, other): ...


@op(
    spell("contiguous"),
    spell(aten.contiguous.default, translate={"memory_format": (0, torch.contiguous_format)}),
    view=True,
)
def contiguous(input, *, memory_format=torch.contiguous_format): ...


@op(torch.clone, "clone", aten.clone.default, normalize=_preserving)
def clone(input, *, memory_format=None): ...


@op(torch.detach, "detach", aten.detach.default, inplace=(torch.detach_, "detach_", aten.detach_.default), view=True)
def detach(input): ...


@op(aten.lift_fresh_copy.default)
def lift_fresh_copy(input): ...


@op(nn.Identity, aten.alias.default, view=True)
def identity(input): ...


@op("copy_", inplace=(aten.copy_.default,))
def copy(input, src, non_blocking=False): ...


@op(aten.fill.Scalar, aten.fill.Tensor, inplace=("fill_", aten.fill_.Scalar, aten.fill_.Tensor))
def fill(input, value): ...


@op(spell(aten._assert_tensor_metadata.default, "input size stride dtype device layout"), effect=True)
def assert_tensor_metadata(input, size=None, stride=None, dtype=None, *, device=None, layout=None): ...


# --- new tensors ----------------------------------------------------------------------------------------------------

_FACTORY = "size dtype _ device _"
_LIKE = "input dtype _ device _ _"


@op(
    spell(torch.arange, "start end step dtype device", arrange=_arange, must=_PLAIN),
    spell(aten.arange.default, "end dtype _ device _", must=_PLAIN),
    spell(aten.arange.start, "start end dtype _ device _", must=_PLAIN),
    spell(aten.arange.start_step, "start end step dtype _ device _", must=_PLAIN),
    normalize=_device,
)
def arange(end, start=0, step=1, *, dtype=None, device=None): ...


@op(
    spell(torch.zeros, variadic="size", must=_PLAIN), spell(aten.zeros.default, _FACTORY, must=_PLAIN), normalize=_sized
)
def zeros(size, *, dtype=None, device=None): ...


@op(spell(torch.ones, variadic="size", must=_PLAIN), spell(aten.ones.default, _FACTORY, must=_PLAIN), normalize=_sized)
def ones(size, *, dtype=None, device=None): ...


@op(
    spell(torch.empty, variadic="size", must=_PLAIN_LIKE | {"memory_format": (None, torch.contiguous_format)}),
    spell(aten.empty.memory_format, f"{_FACTORY} _", must={**_PLAIN, "memory_format": (None, torch.contiguous_format)}),
    normalize=_sized,
)
def empty(size, *, dtype=None, device=None): ...


@op(
    spell(torch.full, must=_PLAIN),
    spell(aten.full.default, "size fill_value dtype _ device _", must=_PLAIN),
    normalize=_sized,
)
def full(size, fill_value, *, dtype=None, device=None): ...


@op(
    spell(torch.zeros_like, must=_PLAIN_LIKE),
    spell(aten.zeros_like.default, _LIKE, must=_PLAIN_LIKE),
    normalize=_device,
)
def zeros_like(input, *, dtype=None, device=None): ...


@op(
    spell(torch.ones_like, must=_PLAIN_LIKE),
    spell(aten.ones_like.default, _LIKE, must=_PLAIN_LIKE),
    normalize=_device,
)
def ones_like(input, *, dtype=None, device=None): ...


@op(
    spell(torch.empty_like, must=_PLAIN_LIKE),
    spell(aten.empty_like.default, _LIKE, must=_PLAIN_LIKE),
    normalize=_device,
)
def empty_like(input, *, dtype=None, device=None): ...


@op(
    spell(torch.full_like, must=_PLAIN_LIKE),
    spell(aten.full_like.default, "input fill_value dtype _ device _ _", must=_PLAIN_LIKE),
    normalize=_device,
)
def full_like(input, fill_value, *, dtype=None, device=None): ...


@op(
    spell("new_zeros", must=_PLAIN),
    spell(aten.new_zeros.default, f"input {_FACTORY}", must=_PLAIN),
    normalize=_sized,
)
def new_zeros(input, size, *, dtype=None, device=None): ...


@op(
    spell("new_ones", must=_PLAIN),
    spell(aten.new_ones.default, f"input {_FACTORY}", must=_PLAIN),
    normalize=_sized,
)
def new_ones(input, size, *, dtype=None, device=None): ...


@op(
    spell("new_full", must=_PLAIN, variadic=""),
    spell(aten.new_full.default, "input size fill_value dtype _ device _", must=_PLAIN),
    normalize=_sized,
)
def new_full(input, size, fill_value, *, dtype=None, device=None): ...


@op(
    spell(torch.rand, variadic="size", must=_PLAIN),
    spell(aten.rand.default, _FACTORY, must=_PLAIN),
    random=_always,
    normalize=_sized,
)
def rand(size, *, dtype=None, device=None): ...


@op(
    spell(torch.randn, variadic="size", must=_PLAIN),
    spell(aten.randn.default, _FACTORY, must=_PLAIN),
    random=_always,
    normalize=_sized,
)
def randn(size, *, dtype=None, device=None): ...


@op(
    spell(torch.rand_like, must=_PLAIN_LIKE),
    spell(aten.rand_like.default, _LIKE, must=_PLAIN_LIKE),
    random=_always,
    normalize=_device,
)
def rand_like(input, *, dtype=None, device=None): ...


@op(
    spell(torch.randn_like, must=_PLAIN_LIKE),
    spell(aten.randn_like.default, _LIKE, must=_PLAIN_LIKE),
    random=_always,
    normalize=_device,
)
def randn_like(input, *, dtype=None, device=None): ...


# --- fused operators ------------------------------------------------------------------------------------------------


@op(fused.add_layer_norm.default)
def add_layer_norm(x, residual, normalized_shape, weight=None, bias=None, eps=1e-05): ...


@op(fused.add_layer_norm_sum.default)
def add_layer_norm_sum(x, residual, normalized_shape, weight=None, bias=None, eps=1e-05): ...


@op(fused.rms_norm.default)
def fused_rms_norm(x, weight=None, eps=1e-06, cast_before_weight=True): ...


@op(fused.swiglu.default)
def swiglu(gate, up): ...


@op(fused.swiglu_packed.default)
def swiglu_packed(gate_up): ...


@op(fused.linear_relu.default)
def linear_relu(x, weight, bias=None): ...


@op(fused.linear_gelu.default)
def linear_gelu(x, weight, bias=None, approximate="none"): ...


@op(fused.conv_relu.default)
def conv_relu(x, weight, bias, stride, padding, dilation, groups): ...


@op(fused.layer_norm_linear_layer_norm.default)
def layer_norm_linear_layer_norm(
    x,
    normalized_shape1,
    norm_weight1,
    norm_bias1,
    eps1,
    weight,
    bias,
    normalized_shape2,
    norm_weight2,
    norm_bias2,
    eps2,
): ...


@op(fused.block_linear.default)
def block_linear(x, data, bias, crow, col, index, features, transposed=False): ...


@op(fused.packed_linear.default)
def packed_linear(x, weight, bias=None, activation="none", transposed=False, min_rows=0, max_rows=0): ...


@op(fused.packed_conv2d.default)
def packed_conv2d(x, weight, bias, other, stride, padding, dilation, groups, activation): ...


def _build_sparse_linear(values, bias, row_start, column, column_start, row, place) -> nn.Module:
    return SparseLinear.from_pattern(values, bias, Pattern(row_start, column, column_start, row, place)).eval()


@op(SparseLinear, fused.sparse_linear.default, build=_build_sparse_linear)
def sparse_linear(x, values, bias, row_start, column, column_start, row, place): ...


def _sparse_conv2d_attributes(module: Any) -> dict[str, Any] | str:
    if module.padding_mode != "zeros":
        return f"pads with padding_mode={module.padding_mode!r}"
    tensors = {"values": module.values, "bias": module.bias, **module.pattern._asdict()}
    window = {n: getattr(module, n) for n in ("kernel_size", "stride", "dilation", "groups")}
    return {**tensors, **window, "padding": pads(module.padding, module.kernel_size, module.dilation)}


def _build_sparse_conv2d(values, bias, row_start, column, column_start, row, place, **window) -> nn.Module:
    return SparseConv2d.from_pattern(
        values, bias, Pattern(row_start, column, column_start, row, place), **window
    ).eval()


@op(
    spell(SparseConv2d, attributes=_sparse_conv2d_attributes),
    fused.sparse_conv2d.default,
    build=_build_sparse_conv2d,
)
def sparse_conv2d(
    x, values, bias, row_start, column, column_start, row, place, kernel_size, stride, padding, dilation, groups
): ...
