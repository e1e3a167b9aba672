"""Sparse layers: smaller and, where the kernels pay, faster than the dense ones that they stand for."""

from fxopt.sparse.block_linear import BlockSparseLinear
from fxopt.sparse.block_select import kept_blocks

__all__ = ["BlockSparseLinear", "kept_blocks"]
