"""Triton."""
AVAILABLE = False
