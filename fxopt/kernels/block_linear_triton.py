"""Triton."""

AVAILABLE = False
