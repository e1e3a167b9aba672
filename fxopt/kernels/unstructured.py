"""
Linear layers and 2-d convolutions on a weight of which most elements are zero, wherever they are; trainable.

`torch.ops.fxopt.sparse_linear` and `sparse_conv2d` take the non-zero values as one tensor and where they stand as int32
tensors: by rows for the forward, and by columns for the backward, over the same values (`Pattern`). Their gradients are
operators too (`…_backward`), with gradients of their own.

float32 on the CPU runs in the native library, the idea that of SparseProp (M. Nikdan, T. Pegolotti, E. Iofinova,
E. Kurtic, D. Alistarh, ICML 2023, arXiv:2302.04852): the backward costs as many products as the weight has values. One
load of the activations serves dX and dW, and every sum is made in an order that rests on the sizes alone, so results
are the same bit for bit for any number of threads. Everything else (float64, other devices, no library) runs on the
dense weight: right, and no faster. Other dtypes are refused; under autocast it computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.errors import UsageError
from fxopt.kernels import native
from fxopt.kernels.registration import differentiate
from fxopt.kernels.unstructured_pattern import dense, rows_of
from fxopt.kernels.unstructured_window import Window, gradients_like

_library = torch.library.Library("fxopt", "FRAGMENT")

_INPUT, _VALUES, _BIAS = 1, 2, 4  # `Wanted` of unstructured.h
_DTYPES = (torch.float32, torch.float64)


# --- linear ----------------------------------------------------------------------------------------------------------

_P, _L, _I = native.POINTER, native.INT64, native.INT
_run_linear = native.function("fxopt_sparse_linear", [_P] * 6 + [_L] * 4 + [_I] * 2, returns=_I)
_run_linear_backward = native.function("fxopt_sparse_linear_backward", [_P] * 9 + [_L] * 4 + [_I] * 3, returns=_I)
_run_conv2d = native.function("fxopt_sparse_conv2d", [_P] * 7 + [_L] + [_I] * 2, returns=_I)
_run_conv2d_backward = native.function("fxopt_sparse_conv2d_backward", [_P] * 10 + [_L] + [_I] * 3, returns=_I)

# The same for tensors as a layer mostly gives them; else None.
_linear, _linear_backward = native.direct("sparse_linear"), native.direct("sparse_linear_backward")
_conv2d, _conv2d_backward = native.direct("sparse_conv2d"), native.direct("sparse_conv2d_backward")


def sparse_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_start: Tensor,
    column: Tensor,
    column_start: Tensor,
    row: Tensor,
    place: Tensor,
) -> Tensor:
    """
    x @ weightᵀ + bias: x (…, inputs), bias (outputs,) -> (…, outputs), float32 or float64; the weight as a `Pattern`.

    Raises `UsageError` for other dtypes and for shapes that do not fit. What the indices say is not looked at, but for
    where they end: that is for who makes the pattern.
    """
    if _linear is not None:
        ready = _linear(*native.call_context(), x, values, bias, row_start, column, column_start, row, place)
        if ready is not None:
            return ready  # type: ignore[no-any-return]
    inputs, outputs = column_start.numel() - 1, row_start.numel() - 1
    _check("sparse_linear", x, values, bias, row_start, column, column_start, row, place)
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise UsageError(f"sparse_linear was given an input of shape {tuple(x.shape)}; expected (..., {inputs})")
    rows = x.shape[:-1].numel()
    run = _run_linear if rows and inputs and outputs and _is_native(x) else None
    if run is None:
        _check_rows("sparse_linear", row_start, values)
        return F.linear(x, dense(values, row_start, column, inputs), bias)
    y = x.new_empty(rows, outputs)
    held = (x.contiguous(), row_start, column, values.contiguous(), _contiguous(bias), y)
    sizes = values.numel(), rows, inputs, outputs
    if run(*map(native.address, held), *sizes, *native.call_context()):
        _refuse("sparse_linear", values.numel())
    return y.view(*x.shape[:-1], outputs)


def _linear_reference(
    x: Tensor, values: Tensor, bias: Any, row_start: Tensor, column: Tensor, column_start: Tensor, *by_column: Tensor
) -> Tensor:
    """The same in plain torch, on the dense weight."""
    _check("sparse_linear", x, values, bias, row_start, column, column_start, *by_column)
    return F.linear(x, dense(values, row_start, column, column_start.numel() - 1), bias)


def _sparse_linear_like(x: Tensor, values: Tensor, bias: Any, row_start: Tensor, *other: Tensor) -> Tensor:
    _check("sparse_linear", x, values, bias, row_start, *other)
    return x.new_empty(*x.shape[:-1], row_start.shape[0] - 1)


def sparse_linear_backward(
    gradient: Tensor,
    x: Tensor,
    values: Tensor,
    row_start: Tensor,
    column: Tensor,
    column_start: Tensor,
    row: Tensor,
    place: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `sparse_linear` by x, values and bias, from that by its result; empty where not `wanted`."""
    pattern = row_start, column, column_start, row, place
    if _linear_backward is not None:
        ready = _linear_backward(*native.call_context(), gradient, x, values, *pattern, wanted)
        if ready is not None:
            return ready  # type: ignore[no-any-return]
    _check("sparse_linear_backward", x, values, None, *pattern)
    inputs, outputs, rows = column_start.numel() - 1, row_start.numel() - 1, x.shape[:-1].numel()
    if x.shape[-1:] != (inputs,) or gradient.shape != (*x.shape[:-1], outputs):
        shapes = f"an input of shape {tuple(x.shape)} and a gradient of {tuple(gradient.shape)}"
        raise UsageError(f"sparse_linear_backward was given {shapes}; expected (..., {inputs}) and (..., {outputs})")
    run = _run_linear_backward if rows and inputs and outputs and _is_native(x, gradient) else None
    dx, dw, db = gradients_like(x, values, outputs, wanted)
    if run is None:
        x2, g2 = x.reshape(rows, inputs), gradient.reshape(rows, outputs)
        if wanted[0]:
            dx = (g2 @ dense(values, row_start, column, inputs)).view(x.shape)
        if wanted[1]:
            dw = (g2.t() @ x2)[rows_of(row_start), column.long()]
        return dx, dw, g2.sum(0) if wanted[2] else db
    held = (x.contiguous(), gradient.contiguous(), column_start, row, place, values.contiguous(), dx, dw, db)
    count = values.shape[0]
    sizes = count, rows, inputs, outputs, _bits(wanted)
    if run(*map(native.address, held), *sizes, *native.call_context()):
        _refuse("sparse_linear_backward", count)
    return dx, dw, db


def _sparse_linear_backward_like(
    gradient: Tensor, x: Tensor, values: Tensor, row_start: Tensor, *pattern_and_wanted: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return gradients_like(x, values, row_start.shape[0] - 1, pattern_and_wanted[-1])


# --- convolution -----------------------------------------------------------------------------------------------------


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_start: Tensor,
    column: Tensor,
    column_start: Tensor,
    row: Tensor,
    place: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """
    conv2d(x, weight, bias): x (batch, channels, height, width) or without a batch, float32 or float64.

    The weight is a `Pattern`; `padding`, with zeros, is (top, bottom, left, right). The result is contiguous whatever
    the layout of x. Raises `UsageError` for other dtypes and for shapes that do not fit; for the indices see
    `sparse_linear`.
    """
    pattern, options = (row_start, column, column_start, row, place), (kernel_size, stride, padding, dilation, groups)
    if _conv2d is not None:
        ready = _conv2d(*native.call_context(), x, values, bias, *pattern, *options)
        if ready is not None:
            return ready  # type: ignore[no-any-return]
    _check("sparse_conv2d", x, values, bias, *pattern)
    window = Window.of(x, row_start, column_start, *options)
    images = x.reshape(x.shape[:-3].numel(), *x.shape[-3:]).contiguous()
    run = _run_conv2d if window.fits() and _is_native(x) else None
    if run is None:
        _check_rows("sparse_conv2d", row_start, values)
        weight = window.weight(values, row_start, column, groups)
        y = F.conv2d(window.pad(images), weight, bias, stride, 0, dilation, groups)
        return y.contiguous().view(window.result(x))
    y = x.new_empty(*window.result(x))
    held = (images, row_start, column, values.contiguous(), _contiguous(bias), y)
    if y.numel():
        sizes = window.shape(images.shape[0]), values.numel()
        if run(*map(native.address, held), *sizes, *native.call_context()):
            _refuse("sparse_conv2d", values.numel())
    return y


def _conv2d_reference(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_start: Tensor,
    column: Tensor,
    column_start: Tensor,
    row: Tensor,
    place: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The same in plain torch, on the dense weight."""
    _check("sparse_conv2d", x, values, bias, row_start, column, column_start, row, place)
    window = Window.of(x, row_start, column_start, kernel_size, stride, padding, dilation, groups)
    return F.conv2d(window.pad(x), window.weight(values, row_start, column, groups), bias, stride, 0, dilation, groups)


def _sparse_conv2d_like(
    x: Tensor,
    values: Tensor,
    bias: Any,
    row_start: Tensor,
    column: Tensor,
    column_start: Tensor,
    row: Tensor,
    place: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    _check("sparse_conv2d", x, values, bias, row_start, column, column_start, row, place)
    window = Window.of(x, row_start, column_start, kernel_size, stride, padding, dilation, groups)
    return x.new_empty(window.result(x))


def sparse_conv2d_backward(
    gradient: Tensor,
    x: Tensor,
    values: Tensor,
    row_start: Tensor,
    column: Tensor,
    column_start: Tensor,
    row: Tensor,
    place: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `sparse_conv2d` by x, values and bias, from that by its result; empty where not `wanted`."""
    pattern, options = (row_start, column, column_start, row, place), (kernel_size, stride, padding, dilation, groups)
    if _conv2d_backward is not None:
        ready = _conv2d_backward(*native.call_context(), gradient, x, values, *pattern, *options, wanted)
        if ready is not None:
            return ready  # type: ignore[no-any-return]
    _check("sparse_conv2d_backward", x, values, None, *pattern)
    window = Window.of(x, row_start, column_start, *options)
    images = x.reshape(x.shape[:-3].numel(), *x.shape[-3:]).contiguous()
    g = gradient.reshape(images.shape[0], window.outputs, *window.out).contiguous()
    run = _run_conv2d_backward if window.fits() and _is_native(x, gradient) else None
    if run is None:
        return window.backward(g, x, images, values, row_start, column, groups, wanted)
    dx, dw, db = gradients_like(x, values, window.outputs, wanted)
    if not g.numel():
        return dx.zero_(), dw.zero_(), db.zero_()
    held = (images, g, column_start, row, place, values.contiguous(), dx, dw, db)
    sizes = window.shape(images.shape[0]), values.numel(), _bits(wanted)
    if run(*map(native.address, held), *sizes, *native.call_context()):
        _refuse("sparse_conv2d_backward", values.numel())
    return dx, dw, db


def _sparse_conv2d_backward_like(
    gradient: Tensor, x: Tensor, values: Tensor, row_start: Tensor, *pattern_and_wanted: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return gradients_like(x, values, row_start.shape[0] - 1, pattern_and_wanted[-1])


# --- what both need --------------------------------------------------------------------------------------------------


def _check(name: str, x: Tensor, values: Tensor, bias: Tensor | None, *pattern: Tensor) -> None:
    """Refuse what the C functions would take for something else."""
    dtype, device = x.dtype, x.device
    row_start, column, _, row, place = pattern
    if dtype not in _DTYPES or values.dtype != dtype or (bias is not None and bias.dtype != dtype):
        given = f"an input of {dtype} and values of {values.dtype}"
        given += "" if bias is None or bias.dtype == values.dtype else f", a bias of {bias.dtype}"
        raise UsageError(f"{name} was given {given}; expected float32 for all, or float64 for all: cast one of them")
    if values.device != device or (bias is not None and bias.device != device):
        places = {str(t.device) for t in (x, values, bias) if t is not None}
        raise UsageError(
            f"{name} was given tensors on {' and '.join(sorted(places))}; expected one device: move one of them"
        )
    shape = values.shape
    if shape != column.shape or shape != row.shape or shape != place.shape:
        given = f"values of shape {tuple(shape)}, column {tuple(column.shape)}, row {tuple(row.shape)}"
        raise UsageError(f"{name} was given {given}, place {tuple(place.shape)}; expected one shape, as in the pattern")
    if bias is not None and (bias.dim() != 1 or bias.numel() != row_start.numel() - 1):
        expected = (row_start.numel() - 1,)
        raise UsageError(f"{name} was given a bias of shape {tuple(bias.shape)}; expected {expected}, one for each row")
    for index in pattern:
        if index.dtype != torch.int32 or index.device != device or not index.is_contiguous() or index.dim() != 1:
            laid = ("" if index.dim() == 1 else f", {index.dim()}-d") + ("" if index.is_contiguous() else ", with gaps")
            raise UsageError(
                f"{name} was given a pattern of {index.dtype} on {index.device}{laid}; "
                f"expected contiguous int32 on {device}: make the layer anew, or load its state again"
            )
    if min(pattern[0].numel(), pattern[2].numel()) == 0:
        raise UsageError(f"{name} was given a pattern without a first row or column; make the layer anew")


def _is_native(*tensors: Tensor) -> bool:
    """Whether these are for the C functions; else torch has to do."""
    return all(t.dtype == torch.float32 and t.is_cpu and t.layout is torch.strided for t in tensors)


def _check_rows(name: str, row_start: Tensor, values: Tensor) -> None:
    """What the native kernels look at themselves; not on a GPU, which would have to be waited for."""
    if row_start.is_cpu and int(row_start[-1]) != values.numel():
        _refuse(name, values.numel())


def _refuse(name: str, values: int) -> NoReturn:
    raise UsageError(
        f"{name} was given a pattern whose rows or columns do not end at its {values} values; "
        "make the layer anew, or load its state again"
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _bits(wanted: Sequence[bool]) -> int:
    return wanted[0] * _INPUT + wanted[1] * _VALUES + wanted[2] * _BIAS


# --- registration ----------------------------------------------------------------------------------------------------


def _register(
    forward: Any, like: Any, backward: Any, backward_like: Any, reference: Any, direct: Any, direct_backward: Any
) -> Callable[..., Any]:
    """
    Two operators: the product, and its gradients. Each is linear in its arguments, and so differentiable by both.
    Returns what calls the first (`differentiate`).
    """
    for function, fake in ((forward, like), (backward, backward_like)):
        name = function.__name__
        _library.define(name + torch.library.infer_schema(function, mutates_args=()))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxopt::{name}", fake, lib=_library)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, values, _, *rest = inputs
        ctx.save_for_backward(x, values, *rest[:5])
        ctx.window = tuple(rest[5:])

    def gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, values, *pattern = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        dx, dw, db = gradients_of(gradient, x, values, *pattern, *ctx.window, wanted)
        found = dx if wanted[0] else None, dw if wanted[1] else None, db if wanted[2] else None
        return (*found, *(None,) * (len(pattern) + len(ctx.window)))

    def keep_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        gradient, x, values, *rest = inputs
        ctx.save_for_backward(gradient, x, values, *rest[:5])
        ctx.window, ctx.wanted = tuple(rest[5:-1]), rest[-1]

    def second(ctx: Any, by_dx: Tensor, by_dw: Tensor, by_db: Tensor) -> tuple[Any, ...]:
        gradient, x, values, *pattern = ctx.saved_tensors
        rest = (*pattern, *ctx.window)
        to_gradient = to_x = to_values = None
        if ctx.wanted[0]:
            to_gradient = apply(by_dx, values, None, *rest)
            to_values = gradients_of(gradient, by_dx, values, *rest, [False, True, False])[1]
        if ctx.wanted[1]:
            product = apply(x, by_dw, None, *rest)
            to_gradient = product if to_gradient is None else to_gradient + product
            to_x = gradients_of(gradient, x, by_dw, *rest, [True, False, False])[0]
        if ctx.wanted[2]:
            shape = (-1, 1, 1) if ctx.window else (-1,)
            spread = by_db.view(shape).expand(gradient.shape)
            to_gradient = spread if to_gradient is None else to_gradient + spread
        return to_gradient, to_x, to_values, *(None,) * (len(rest) + 1)

    operator, its_backward = (getattr(torch.ops.fxopt, f.__name__).default for f in (forward, backward))
    apply = differentiate(_library, operator, forward, keep, gradients, reference, direct)
    gradients_of = differentiate(_library, its_backward, backward, keep_all, second, None, direct_backward)
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(f"fxopt::{forward.__name__}", device, torch.float32, lib=_library)
    return apply


multiply = _register(
    sparse_linear,
    _sparse_linear_like,
    sparse_linear_backward,
    _sparse_linear_backward_like,
    _linear_reference,
    _linear,
    _linear_backward,
)
convolve = _register(
    sparse_conv2d,
    _sparse_conv2d_like,
    sparse_conv2d_backward,
    _sparse_conv2d_backward_like,
    _conv2d_reference,
    _conv2d,
    _conv2d_backward,
)
