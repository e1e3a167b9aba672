"""
How a fused operator becomes `torch.ops.fxopt.NAME`: one reference, one kernel, one schema.

The *reference* is the operator's definition in plain torch. Its signature is the schema, it is what runs where there is
something to differentiate (so gradients, double gradients and forward-mode derivatives are torch's own, at the cost and
memory of the operators that were fused), and run on fake tensors it gives the shapes. The *kernel* computes the same
without gradients, and may be faster.

Registered low-level, not by `torch.library.custom_op`: per call, at 8×8 float32 on the CPU, linear and gelu as two ATen
overloads cost 27 µs, this 33, the same with a second dispatch below autograd 43, `custom_op` 61 (and 95 when
differentiating). Hence plain tensors go from the autograd key straight to the kernel; anything that records the call
(fake tensors, subclasses, dispatch modes: export, AOTAutograd) is dispatched once more, and so sees one node. Where
AOTAutograd differentiates, it sees the reference's operators, which the compiler can then fuse forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._library.autograd import Info, make_autograd_impl
from torch._ops import OpOverload
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter

from fxopt.kernels import native

_library = torch.library.Library("fxopt", "FRAGMENT")


_are_plain = native.direct("are_plain")


def is_watched() -> bool:
    """Whether anybody traces, transforms, casts or profiles what is called now, or sees it in a mode."""
    if torch.compiler.is_dynamo_compiling():  # first: what follows is not for Dynamo to trace
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    if torch._C._is_any_autocast_enabled() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return profiler._is_profiler_enabled


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """
    Whether a call with these is seen by the kernel and by autograd alone: nobody watches, and they are what they say,
    neither of a subclass nor batched, sparse, negated lazily, or all zeros.

    Then the dispatcher can be passed by, whose time is felt most when what it touches is not in the caches: right after
    a large product. Where there is no native library it is not passed by.
    """
    return _are_plain is not None and not is_watched() and _are_plain(*tensors)


def register(reference: Callable[..., Any], kernel: Callable[..., Any]) -> OpOverload[..., Any]:
    """
    Make `torch.ops.fxopt.NAME`, named after the reference, and return its overload.

    `kernel` has the parameters and defaults of `reference`, and returns fresh tensors of the same shapes, strides and
    dtypes on every device. It is never asked for gradients, nor called under autocast, where the reference runs.
    """
    name = reference.__name__
    _library.define(name + torch.library.infer_schema(reference, mutates_args=()))
    overload: OpOverload[..., Any] = getattr(torch.ops.fxopt, name).default
    tensors = tuple(i for i, a in enumerate(overload._schema.arguments) if "Tensor" in str(a.type))

    def below_autograd(*arguments: Any) -> Any:
        if torch._C._is_any_autocast_enabled():
            return reference(*arguments)
        return kernel(*arguments)

    def with_autograd(*arguments: Any) -> Any:
        # Every call passes here: one plain loop, as generator expressions would double the cost of the whole dispatch.
        grad = torch.is_grad_enabled()
        plain = torch._C._len_torch_dispatch_stack() == 0
        for i in tensors:
            argument = arguments[i] if i < len(arguments) else None  # defaults at the end are left out
            if argument is None:
                continue
            kind = type(argument)
            if kind is not Tensor and kind is not Parameter:
                plain = False
            if grad and argument.requires_grad:
                return reference(*arguments)
        if forward_ad._current_level >= 0 or torch._C._is_any_autocast_enabled():
            return reference(*arguments)
        if plain:
            return kernel(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments)

    _library.impl(name, below_autograd, "CompositeExplicitAutograd")
    _library.impl(name, with_autograd, "Autograd")
    torch.library.register_fake(f"fxopt::{name}", reference, lib=_library)
    return overload


def differentiable(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    keep: Callable[..., None],
    backward: Callable[..., Any],
    reference: Callable[..., Any] | None = None,
    direct: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """
    Make `torch.ops.fxopt.NAME` of a kernel with a backward of its own, and return what calls it (`differentiate`).

    `kernel` gives the schema, and returns fresh contiguous tensors; `fake` gives their shapes. For `keep`, `backward`,
    `reference` and `direct` see `differentiate`. Under autocast, floating tensors are cast as for a linear layer.
    """
    _library.define(name + torch.library.infer_schema(kernel, mutates_args=()))
    overload: OpOverload[..., Any] = getattr(torch.ops.fxopt, name).default
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxopt::{name}", fake, lib=_library)
    call = differentiate(_library, overload, kernel, keep, backward, reference, direct)
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(name, _autocast(overload, device_type), key)
    return call


def differentiate(
    library: torch.library.Library,
    overload: OpOverload[..., Any],
    kernel: Callable[..., Any],
    keep: Callable[..., None],
    backward: Callable[..., Any],
    reference: Callable[..., Any] | None = None,
    direct: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """
    Give an operator its backward, as `torch.library.register_autograd` does, and return a function that calls it: by
    the dispatcher, or at once where the kernel and autograd are all that the call is for (`is_plain`).

    `keep(ctx, inputs, output)` and `backward(ctx, *gradients)` are those of `register_autograd`; a backward made of
    operators that are differentiable themselves can be differentiated again. `reference`, the same in plain torch, runs
    under forward-mode differentiation and under `torch.func`: an `autograd.Function` refuses `torch.func.grad`, and
    gives `torch.func.jvp` zeros. A function of its own for the plain case saves time where autograd records.

    `direct` is the kernel for what a layer mostly gives it, and returns None for all else (`native.direct`): where
    nothing is recorded it is called first, as it looks at its tensors itself.
    """
    tensors = tuple(i for i, a in enumerate(overload._schema.arguments) if "Tensor" in str(a.type))
    recorded = make_autograd_impl(overload, Info(backward, keep))

    def forward(ctx: Any, *arguments: Any) -> Any:
        result = kernel(*arguments)
        if isinstance(result, Tensor) and result._is_view():  # of what nobody has: else it could not be written to
            result = result.detach()
        keep(ctx, arguments, result)
        return result

    # Named before it is made: its node in the graph of autograd, and so errors and profiles, has the name of then.
    plain = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    Recorded: Any = type(f"fxopt_{overload._schema.name.rpartition('::')[2]}", (torch.autograd.Function,), plain)
    record = super(torch.autograd.Function, Recorded).apply  # past what looks for transforms, which `is_watched` does

    def eager(arguments: tuple[Any, ...]) -> Any:
        if torch.is_grad_enabled():
            for i in tensors:
                argument = arguments[i] if i < len(arguments) else None  # defaults at the end are left out
                if argument is not None and argument.requires_grad:
                    return record(*arguments)
        return kernel(*arguments)

    def with_autograd(keyset: Any, *arguments: Any) -> Any:
        if reference is not None and (forward_ad._current_level >= 0 or peek_interpreter_stack() is not None):
            return reference(*arguments)
        if is_plain([arguments[i] for i in tensors if i < len(arguments)]):
            return eager(arguments)
        return recorded(keyset, *arguments)

    def call(*arguments: Any) -> Any:
        if _are_plain is None or is_watched():
            return overload(*arguments)
        if direct is not None and not torch.is_grad_enabled():
            result = direct(*native.call_context(), *arguments)
            if result is not None:
                return result
        if _are_plain(*[arguments[i] for i in tensors if i < len(arguments)]):
            return eager(arguments)
        return overload(*arguments)

    library.impl(overload._schema.name.rpartition("::")[2], with_autograd, "Autograd", with_keyset=True)
    return call


def _autocast(overload: OpOverload[..., Any], device_type: str) -> Callable[..., Any]:
    off = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)

    def cast(*arguments: Any) -> Any:
        to = torch.get_autocast_dtype(device_type)
        floating = (isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 for a in arguments)
        with torch._C._ExcludeDispatchKeyGuard(off):
            return overload(*(a.to(to) if f else a for a, f in zip(arguments, floating, strict=True)))

    return cast
