"""Stepping through a history in a notebook: `step_through`."""

from fxopt.jupyter.stepper import Position, Stepper
from fxopt.jupyter.widget import step_through

__all__ = ["Position", "Stepper", "step_through"]
