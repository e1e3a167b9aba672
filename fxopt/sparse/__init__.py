"""Layers with sparse weights, faster than dense ones where they are sparse enough, and trainable."""

from fxopt.kernels.unstructured_conv import SparseConv2d
from fxopt.kernels.unstructured_linear import SparseLinear
from fxopt.sparse.measure import Layer, SwapReport
from fxopt.sparse.pruning import CubicSchedule, Pruner, magnitude_masks, n_m_mask
from fxopt.sparse.swap import sparsify_conv2d_auto, sparsify_if_faster, swap, swap_modules_with_sparse

__all__ = [
    "CubicSchedule",
    "Layer",
    "Pruner",
    "SparseConv2d",
    "SparseLinear",
    "SwapReport",
    "magnitude_masks",
    "n_m_mask",
    "sparsify_conv2d_auto",
    "sparsify_if_faster",
    "swap",
    "swap_modules_with_sparse",
]
