"""
The native library: kernels in C++ behind plain C functions, called through ctypes.

It is built by `pip install` where there is a C++ compiler, and is simply not there where there is none: then `library`
returns None, `why_not` says so, and every operator that has a kernel here runs its torch code. It links to neither
torch nor Python, so no version of either breaks it; it shares torch's OpenMP threads, as torch is imported first and
its libgomp is the one that is found.

The layers' kernels are there a second time, as functions of an extension module in the same file that take the tensors
themselves (`direct`, module.cpp): with a tenth of the time of a call, and only for what needs no preparation.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Callable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import FxoptError, UsageError

ISAS = ("portable", "avx2", "avx512", "amx")
"""
The instruction sets for which the kernels are compiled, as the library numbers them; AVX2 includes FMA. What is not
compiled for AMX, a unit for products of matrices beside AVX-512, runs as on AVX-512.
"""

_NUMBERS = {name: number for number, name in enumerate(ISAS)}

POINTER, INT64, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
"""The types of arguments: a tensor's address (or None), a size, a flag or a count of threads, a number."""

_CAPABILITIES = {"AVX2": "avx2", "AVX512": "amx"}  # torch's names; anything else is the portable code


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None where it was not built, does not load, or FXOPT_NATIVE=0 turns it off."""
    return _load()[0]


def why_not() -> str | None:
    """Why there is no native library here, in one line; None where there is one."""
    return _load()[1]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("FXOPT_NATIVE", "") == "0":
        return None, "FXOPT_NATIVE=0 turns the native kernels off; unset it to have them"
    folder = Path(__file__).parent
    found = [folder / f"_kernels{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((p for p in found if p.exists()), None)
    if path is None:
        return None, "the native kernels were not built; install a C++ compiler (g++ or clang++), then fxopt again"
    try:
        return ctypes.CDLL(os.fspath(path)), None
    except OSError as error:
        return None, f"the native kernels do not load ({error}); install fxopt again on this machine"


@functools.cache
def isa() -> str:
    """
    The instruction set whose kernels run: the best that the CPU has and torch uses, or what FXOPT_ISA asks for.

    torch's choice counts, so that ATEN_CPU_CAPABILITY=avx2 holds here too. Raises `UsageError` when FXOPT_ISA names
    none, or one that this CPU does not have.
    """
    loaded = library()
    if loaded is None:
        return "none"
    best = int(loaded.fxopt_best_isa())
    asked = os.environ.get("FXOPT_ISA", "")
    if not asked:
        return ISAS[min(best, ISAS.index(_CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), "portable")))]
    if asked not in ISAS[: best + 1]:
        raise UsageError(
            f"FXOPT_ISA={asked!r} was given; this CPU has {', '.join(ISAS[: best + 1])}; name one of these"
        )
    return asked


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether there are kernels that multiply bfloat16 as it is: this CPU's AVX-512 can, and FXOPT_ISA lets it."""
    loaded = library()
    return loaded is not None and ISAS.index(isa()) >= ISAS.index("avx512") and bool(loaded.fxopt_multiplies_bfloat16())


def function(name: str, arguments: Sequence[Any], optional: bool = False, returns: Any = None) -> Any:
    """
    The C function ``name`` with ``arguments`` of the types above; None where there is no library, or where it is
    ``optional`` and the compiler did not know its instructions.

    It releases the GIL while it runs. `FxoptError` if the library that is there has no such function: it is older than
    the Python code.
    """
    loaded = library()
    if loaded is None:
        return None
    try:
        found = getattr(loaded, name)
    except AttributeError:
        if optional:
            return None
        raise FxoptError(f"the native library has no {name}: it is out of date; install fxopt again") from None
    found.argtypes, found.restype = list(arguments), returns
    return found


@functools.cache
def _connected() -> Any:
    """The extension module, shown how to read torch's tensors; None where there is no library or torch is too old."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # since torch 2.10
    if library() is None or exchange is None:
        return None
    module = importlib.import_module(f"{__name__}._kernels")
    if not hasattr(module, "connect"):
        raise FxoptError("the native library takes no tensors: it is out of date; install fxopt again")
    tensors = Tensor, torch.nn.Parameter, exchange
    new = torch.empty, {"dtype": torch.float32}
    return module if module.connect(*tensors, *new, torch.strided, Tensor.is_neg) else None


def direct(name: str) -> Callable[..., Any] | None:
    """
    The function ``name`` of module.cpp, which is called with `call_context` and then what the operator is given.

    It returns None where it does not take these arguments as they are, and then nothing is done. None instead of it
    where there is no library, or torch is older than DLPack's exchange API.
    """
    module = _connected()
    return None if module is None else getattr(module, name)


def address(tensor: Tensor | None) -> int | None:
    """
    Where a contiguous tensor's elements begin, for a `POINTER` argument; None stays None.

    `UsageError` where they are not there: the storage was made smaller, as sharding does to free a parameter.
    """
    if tensor is None:
        return None
    end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    if (held := tensor.untyped_storage().nbytes()) < end and tensor.numel():
        raise UsageError(
            f"a tensor of shape {tuple(tensor.shape)} was given whose storage has {held} bytes; expected {end}: "
            "it was freed, gather or load it first"
        )
    return tensor.data_ptr()


def call_context() -> tuple[int, int]:
    """The last two arguments of every kernel: the number of the instruction set, and torch's number of threads."""
    return number_of_isa(), torch.get_num_threads()


def number_of_isa() -> int:
    """The number of the instruction set, as the library counts them."""
    return _NUMBERS[isa()]
