"""Sparse layers: smaller and, where the kernels pay, faster than the dense ones that they stand for; trainable."""

from fxopt.kernels.unstructured_conv import SparseConv2d
from fxopt.kernels.unstructured_linear import SparseLinear
from fxopt.sparse.block_linear import BlockSparseLinear
from fxopt.sparse.block_optimizer import following
from fxopt.sparse.block_patcher import BlockSparseModelPatcher
from fxopt.sparse.block_plan import Spec
from fxopt.sparse.block_regrow import BlockRegrow
from fxopt.sparse.block_report import LayerReport, SparsifyReport
from fxopt.sparse.block_select import kept_blocks
from fxopt.sparse.dense import to_dense
from fxopt.sparse.measure import Layer, SwapReport
from fxopt.sparse.pruning import CubicSchedule, Pruner, magnitude_masks, n_m_mask
from fxopt.sparse.semi_structured import SemiStructuredLinear, kept_pairs
from fxopt.sparse.swap import sparsify_conv2d_auto, sparsify_if_faster, swap, swap_modules_with_sparse

__all__ = [
    "BlockRegrow",
    "BlockSparseLinear",
    "BlockSparseModelPatcher",
    "CubicSchedule",
    "Layer",
    "LayerReport",
    "Pruner",
    "SemiStructuredLinear",
    "SparseConv2d",
    "SparseLinear",
    "SparsifyReport",
    "Spec",
    "SwapReport",
    "following",
    "kept_blocks",
    "kept_pairs",
    "magnitude_masks",
    "n_m_mask",
    "sparsify_conv2d_auto",
    "sparsify_if_faster",
    "swap",
    "swap_modules_with_sparse",
    "to_dense",
]
