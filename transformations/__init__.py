"""The catalogue: every transformation of fxopt, by name."""

if __name__ != "fxopt.transformations":
    raise ImportError(f"{__name__!r} is not importable by that name; write `import fxopt.transformations`")

from fxopt.compose import compose
from fxopt.transformation import ReversibleTransformation, Rewrite, Transformation
from fxopt.transformations.block_sparsify import BlockSparsify
from fxopt.transformations.change_truediv_to_mul_by_inverse import ChangeTrueDivToMulByInverse
from fxopt.transformations.eliminate_common_subexpressions import EliminateCommonSubexpressions
from fxopt.transformations.eliminate_dead_nodes import EliminateDeadNodes
from fxopt.transformations.eliminate_dropout import EliminateDropout
from fxopt.transformations.eliminate_no_ops import EliminateNoOps
from fxopt.transformations.fold_attention_scale import FoldAttentionScale
from fxopt.transformations.fold_batch_norm import FoldBatchNorm
from fxopt.transformations.fold_constants import FoldConstants
from fxopt.transformations.fold_layer_norm_affine import FoldLayerNormAffine
from fxopt.transformations.fuse_add_layer_norm import FuseAddLayerNorm
from fxopt.transformations.fuse_attention import FuseAttention
from fxopt.transformations.fuse_batch_norm1d_in_linear import FuseBatchNorm1dInLinear
from fxopt.transformations.fuse_batch_norm2d_in_conv2d import FuseBatchNorm2dInConv2d
from fxopt.transformations.fuse_bias_in_linear import FuseBiasInLinear
from fxopt.transformations.fuse_conv_bn_relu import FuseConvBNReLU
from fxopt.transformations.fuse_conv_relu import FuseConvReLU
from fxopt.transformations.fuse_layer_norm_linear_layer_norm import FuseLayerNormLinearLayerNorm
from fxopt.transformations.fuse_linear_gelu import FuseLinearGELU
from fxopt.transformations.fuse_linear_relu import FuseLinearReLU
from fxopt.transformations.fuse_rms_norm import FuseRMSNorm
from fxopt.transformations.fuse_swiglu import FuseSwiGLU
from fxopt.transformations.fuse_tanh_gelu import FuseTanhGELU
from fxopt.transformations.make_out_of_place import MakeOutOfPlace
from fxopt.transformations.merge_gate_up import MergeGateUp
from fxopt.transformations.merge_linears import MergeLinears
from fxopt.transformations.pack_weights import PackWeights
from fxopt.transformations.prune_trees import PruneTrees
from fxopt.transformations.prune_width import PruneWidth
from fxopt.transformations.reorder_nodes import ReorderNodes
from fxopt.transformations.sparsify_weights import SparsifyWeights
from fxopt.transformations.swap_sparse import SwapSparse

__all__ = [
    "BlockSparsify",
    "ChangeTrueDivToMulByInverse",
    "EliminateCommonSubexpressions",
    "EliminateDeadNodes",
    "EliminateDropout",
    "EliminateNoOps",
    "FoldAttentionScale",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldLayerNormAffine",
    "FuseAddLayerNorm",
    "FuseAttention",
    "FuseBatchNorm1dInLinear",
    "FuseBatchNorm2dInConv2d",
    "FuseBiasInLinear",
    "FuseConvBNReLU",
    "FuseConvReLU",
    "FuseLayerNormLinearLayerNorm",
    "FuseLinearGELU",
    "FuseLinearReLU",
    "FuseRMSNorm",
    "FuseSwiGLU",
    "FuseTanhGELU",
    "MakeOutOfPlace",
    "MergeGateUp",
    "MergeLinears",
    "PackWeights",
    "PruneTrees",
    "PruneWidth",
    "ReorderNodes",
    "ReversibleTransformation",
    "Rewrite",
    "SparsifyWeights",
    "SwapSparse",
    "Transformation",
    "compose",
]
