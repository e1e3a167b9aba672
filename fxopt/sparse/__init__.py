"""Sparse layers: smaller and, where the kernels pay, faster than the dense ones that they stand for."""

from fxopt.sparse.block_linear import BlockSparseLinear
from fxopt.sparse.block_optimizer import following
from fxopt.sparse.block_patcher import BlockSparseModelPatcher
from fxopt.sparse.block_plan import Spec
from fxopt.sparse.block_regrow import BlockRegrow
from fxopt.sparse.block_report import LayerReport, SparsifyReport
from fxopt.sparse.block_select import kept_blocks

__all__ = [
    "BlockRegrow",
    "BlockSparseLinear",
    "BlockSparseModelPatcher",
    "LayerReport",
    "SparsifyReport",
    "Spec",
    "following",
    "kept_blocks",
]
