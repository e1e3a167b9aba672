"""Run by test_block_linear_triton.py in a process of its own: the Triton kernels, compiled for GPUs not here."""

import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from fxopt.kernels import block_linear_triton as kernels

POINTERS = {"X", "W", "Y", "BIAS", "G", "D"}
INDICES = {"CROW", "COL", "PLACE", "ROW"}


def main(capability: int, dtype: str, side: int, turned: bool) -> None:
    product = {"K": side, "N": side, "BT": 128, "KT": min(side, 64), "HAS_PLACE": turned, "HAS_BIAS": not turned}
    gradient = {"K": side, "N": side, "BT": 64}
    for kernel, constants in ((kernels.product_kernel, product), (kernels.gradient_kernel, gradient)):
        constants |= {"PRECISION": "ieee", "UPCAST": False}
        signature = {name: kind(name, dtype) for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
        made = compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={}),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True},
        )
        print(kernel.__name__, capability, dtype, side, len(made.asm["cubin"]) > 0)


def kind(name: str, dtype: str) -> str:
    return f"*{dtype}" if name in POINTERS else "*i32" if name in INDICES else "i32"


main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True")
