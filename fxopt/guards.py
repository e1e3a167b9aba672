"""The conditions on input sizes that torch.export puts before a graph, as a module that can be copied and pickled."""

from __future__ import annotations

import ast
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils import _pytree as pytree


class Guards(nn.Module):
    """
    Asserts conditions on its inputs, which are those of the graph.

    ``conditions`` are pairs: an expression over ``args``, and the same over the inputs' names, for the error.  torch's
    own module holds a function without its source, which pickle refuses.
    """

    def __init__(self, conditions: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.conditions = tuple(conditions)
        self._is_impure = True  # nobody uses what it returns: fx is to keep the call all the same
        self._check = _function(self.conditions)

    def forward(self, *args: Any) -> None:
        """AssertionError "Guard failed: …" where a condition does not hold."""
        self._check(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_check"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._check = _function(self.conditions)


def _function(conditions: Sequence[tuple[str, str]]) -> Callable[..., None]:
    lines = [f'  torch._assert({actual}, "Guard failed: {said}")\n' for actual, said in conditions]
    namespace: dict[str, Any] = {**SYMPY_INTERP, "torch": torch, "math": math, "inf": math.inf}
    exec(f"def check(*args):\n{''.join(lines)}  return\n", namespace)
    check: Callable[..., None] = torch._dynamo.dont_skip_tracing(namespace["check"])
    return check


def _from_code(guards_code: Sequence[str], paths: Sequence[Any]) -> Guards:
    """What torch makes of its guards, as `Guards`; as `torch.export._unlift._convert_guards_code_to_fn`."""
    conditions = []
    for code in guards_code:
        actual = said = code
        for i, path in enumerate(paths):
            source = "L" + pytree.keystr(path)
            actual = actual.replace(source, f"args[{i}]")
            said = said.replace(source, path[0].key + pytree.keystr(path[1:]))
        conditions.append((actual, ast.unparse(ast.parse(said.replace("\n", ""), mode="eval"))))
    return Guards(conditions)


@contextlib.contextmanager
def picklable() -> Iterator[None]:
    """Let ``ExportedProgram.module()`` make `Guards` in the body; a torch that does it otherwise is left alone."""
    from torch.export import _unlift  # it brings all of Dynamo, a second that only a capture need take

    if not hasattr(_unlift, "_convert_guards_code_to_fn"):
        yield
        return
    with mock.patch.object(_unlift, "_convert_guards_code_to_fn", _from_code):
        yield
