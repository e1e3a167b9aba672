"""
Fused operators: `torch.ops.fxopt.*`, registered when this package is imported, each with a reference in plain torch.

Every one is a single node to `torch.fx`, `torch.export` and `torch.compile`, has fake tensors and gradients, and runs
on any device and floating dtype; `PAYS` says where it is faster than the operators it replaces.
"""

from fxopt.kernels import block_linear as block_linear  # registers; the layers that use it are timed one by one
from fxopt.kernels.convolution import conv_relu
from fxopt.kernels.gating import swiglu, swiglu_packed
from fxopt.kernels.linear import linear_gelu, linear_relu
from fxopt.kernels.normalization import add_layer_norm, add_layer_norm_sum, layer_norm_linear_layer_norm, rms_norm
from fxopt.kernels.packed import packed_conv2d as packed_conv2d  # PackWeights knows where these two pay
from fxopt.kernels.packed import packed_linear as packed_linear
from fxopt.kernels.semi_structured import semi_structured_linear as semi_structured_linear  # as block_linear
from fxopt.kernels.unstructured import sparse_conv2d as sparse_conv2d  # SwapSparse measures whether these two pay
from fxopt.kernels.unstructured import sparse_linear as sparse_linear

# Device types on which an operator is at least as fast as what it replaces at the sizes of real models, and faster at
# some. Ratios by `benchmarks/kernels.py`, float32, 2 threads, 128 rows and more unless said. Below about 20 µs of work
# every operator loses 3 to 6 µs of dispatch. No entry for a device means: not measured there, or nothing gained.
PAYS: dict[str, frozenset[str]] = {
    "add_layer_norm": frozenset(),  # cpu 1.00 to 1.17: the sum is written and read again all the same
    "add_layer_norm_sum": frozenset(),  # cpu 1.00 to 1.2
    "conv_relu": frozenset({"cpu"}),  # 0.96 to 1.00 on the layers of ResNet
    "layer_norm_linear_layer_norm": frozenset(),  # cpu 0.99 to 1.02, 1.2 at one row
    "linear_gelu": frozenset({"cpu"}),  # 0.6 to 0.75 up to 16 rows, 1.00 at 128
    "linear_relu": frozenset({"cpu"}),  # the same
    "rms_norm": frozenset({"cpu"}),  # 0.8 to 0.95, at one row 0.94 to 0.97
    "swiglu": frozenset({"cpu"}),  # 0.92 to 0.95; one row of 2816 loses 3 µs
    "swiglu_packed": frozenset({"cpu"}),  # 0.93 to 0.95; one row of 2816 loses 3 µs
}


def pays(name: str, device_type: str) -> bool:
    """Whether the operator called `name` is worth having on "cpu", "cuda", …; KeyError for an unknown name."""
    return device_type in PAYS[name]


__all__ = [
    "PAYS",
    "add_layer_norm",
    "add_layer_norm_sum",
    "conv_relu",
    "layer_norm_linear_layer_norm",
    "linear_gelu",
    "linear_relu",
    "pays",
    "rms_norm",
    "swiglu",
    "swiglu_packed",
]
