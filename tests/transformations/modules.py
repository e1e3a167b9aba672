"""Small modules to rewrite."""

import inspect

from torch import nn


def fn(f, /, **children):
    """A module that computes ``f``, with ``children``: modules, parameters and buffers, given first as a namespace."""
    names = list(inspect.signature(f).parameters)
    if children:
        names = names[1:]
        forwards = (lambda s, a: f(s, a), lambda s, a, b: f(s, a, b), lambda s, a, b, c: f(s, a, b, c))
    else:
        forwards = (lambda s, a: f(a), lambda s, a, b: f(a, b), lambda s, a, b, c: f(a, b, c))
    forward = forwards[len(names) - 1]
    forward.__code__ = forward.__code__.replace(co_varnames=("self", *names))  # inputs are called as in f
    module = type("Fn", (nn.Module,), {"forward": forward})()
    for name, child in children.items():
        if isinstance(child, nn.Module | nn.Parameter) or not hasattr(child, "shape"):
            setattr(module, name, child)
        else:
            module.register_buffer(name, child)
    return module
