"""Layers with sparse weights, faster than dense ones where they are sparse enough, and trainable."""

from fxopt.sparse.conv import SparseConv2d
from fxopt.sparse.linear import SparseLinear

__all__ = ["SparseConv2d", "SparseLinear"]
