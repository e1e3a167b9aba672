"""Garbage collection while a large graph is edited."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_sparing = False  # somewhere in this process
_YOUNG = 50_000  # objects; CPython's own choice, 700, is made for programs that keep few


@contextlib.contextmanager
def sparing() -> Iterator[None]:
    """
    Run the body with fewer scans by the garbage collector, and none of what lived before it.

    A graph is many small objects in cycles, and CPython scans every object that lives whenever a quarter as many have
    been added: at 50,000 nodes that took a third of the time of a recorded pass. What the body itself makes is still
    collected. Where the process has frozen objects of its own (before a fork, say), or has turned the collector off,
    nothing is done.
    """
    global _sparing  # asked first: to count frozen objects is to walk them all
    if _sparing or not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    young, *older = gc.get_threshold()
    _sparing = True
    gc.freeze()
    gc.set_threshold(max(young, _YOUNG), *older)
    try:
        yield
    finally:
        _sparing = False
        gc.set_threshold(young, *older)
        gc.unfreeze()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Run the body, which makes no garbage to speak of, without the collector."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
