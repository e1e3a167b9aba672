"""The built-in models at their smallest, each captured once for all that is asked of its graph."""

import functools
from typing import NamedTuple

import pytest
from torch import nn
from torch.fx import GraphModule

from fxopt import models
from fxopt.capture import capture
from fxopt.inputs import example_inputs

# `whisper-tiny` is what OpenAI calls one of full size.
TINY = [name for name in models.names() if name.endswith(models.TINY) and name != "whisper-tiny"]


def each(*names):
    """What a test of each model is parametrised with: all tests of one model run in one worker, which captures it."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


class BuiltIn(NamedTuple):
    model: nn.Module
    before: object  # the model's fingerprint, before it was captured
    gm: GraphModule


def fingerprint(model):
    """What a capture must leave as it is: flags, tensors and their versions, hooks, the config."""
    config = model.config.to_dict() if hasattr(model, "config") else None
    modules = [(path, id(m), m.training, sorted(vars(m)), len(m._forward_hooks)) for path, m in model.named_modules()]
    tensors = [(k, id(v), v._version, v.requires_grad) for k, v in model.state_dict(keep_vars=True).items()]
    return modules, tensors, config


@functools.cache
def built_in(name):
    """The model, and its capture, which nobody edits."""
    model = models.build(name)
    before = fingerprint(model)
    return BuiltIn(model, before, capture(model, example_inputs(model, 1, 10)))
