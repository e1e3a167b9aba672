"""Fewer garbage collections while a graph is edited, and all as before afterwards."""

import gc
import weakref

import pytest
import torch

from fxopt.errors import TransformationError
from fxopt.garbage import sparing
from fxopt.transformation import ReversibleTransformation


def state() -> tuple[object, ...]:
    return gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()


def test_nested_and_left_by_an_error() -> None:
    before = state()
    with pytest.raises(KeyError), sparing():
        assert gc.get_freeze_count() > 0
        with sparing():
            raise KeyError
        raise AssertionError
    assert state() == before


def test_what_the_body_makes_is_collected() -> None:
    class Ring:
        pass

    with sparing():
        ring = Ring()
        ring.itself = ring
        gone = weakref.ref(ring)
        del ring
        gc.collect()
        assert gone() is None


def test_a_process_that_froze_objects_keeps_them_so() -> None:
    gc.freeze()
    try:
        before = state()
        with sparing():
            assert state() == before
        assert state() == before
    finally:
        gc.unfreeze()


def test_passes_leave_the_collector_as_it_was() -> None:
    class Fails(ReversibleTransformation):
        def transform(self, graph_module: torch.fx.GraphModule) -> None:
            self.frozen = gc.get_freeze_count()
            raise ValueError("on purpose")

    before, fails = state(), Fails()
    with pytest.raises(TransformationError):
        fails(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)))
    assert fails.frozen > 0 and state() == before
