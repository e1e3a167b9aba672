"""Run by test_block_linear_triton.py in a process of its own: the Triton kernels under Triton's interpreter."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import itertools

import torch

from fxopt.kernels import block_linear_triton as kernels
from fxopt.kernels.block_linear import _Blocks, from_dense, to_dense, transposed_index

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def main(shapes, many) -> None:
    assert kernels.AVAILABLE and kernels.INTERPRETED
    count = 0
    for (block, dtype, tokens), seed in zip(
        itertools.product(shapes, TOLERANCE, (1, 37, 70) if many else (37,)), itertools.count(), strict=False
    ):
        check(block, dtype, tokens, edges=seed % 3, seed=seed)
        count += 1
    check((16, 16), torch.float32, 1100, edges=1, seed=99, processors=8)  # the tokens are split
    print(f"{count + 1} cases hold")


def check(block, dtype, tokens, edges, seed, processors=None):
    torch.manual_seed(seed)
    (bo, bi), (rows, columns) = block, (3, 4)
    out, inputs = rows * bo - 3 * edges, columns * bi - 5 * edges
    mask = torch.rand(rows, columns) < 0.5
    mask[1], mask[0, 0] = False, True  # an empty row, and never nothing
    row, col = mask.nonzero(as_tuple=True)
    crow = torch.zeros(rows + 1, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    index = transposed_index(crow, col.int(), columns)
    data = from_dense(torch.randn(out, inputs), row, col, block).to(dtype)
    x, g, bias = (torch.randn(s).to(dtype) for s in ((tokens, inputs), (tokens, out), (out,)))
    kept = mask.repeat_interleave(bo, 0).repeat_interleave(bi, 1)[:out, :inputs]
    blocks = _Blocks(data, crow, col.int(), index, False)
    dense = to_dense(data, row, col, (rows, columns))[:out, :inputs].double()
    if processors is not None:
        kernels._processors = lambda device: processors
        assert kernels.split(data.shape[0], tokens, processors) > 1
    close(kernels.product(x, blocks, bias, out), x.double() @ dense.t() + bias.double(), dtype)
    close(kernels.product(x, blocks, None, out), x.double() @ dense.t(), dtype)
    close(kernels.product(g, _Blocks(data, crow, col.int(), index, True), None, inputs), g.double() @ dense, dtype)
    wanted = from_dense((g.double().t() @ x.double()) * kept, row, col, block)
    close(kernels.gradient(g, x, blocks), wanted, dtype)


def close(found, wanted, dtype):
    assert found.dtype == dtype and found.shape == wanted.shape
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error < TOLERANCE[dtype], (dtype, wanted.shape, float(error))


if sys.argv[1] == "some":
    main(((16, 16), (32, 16)), False)
else:
    main(((32, 32), (64, 64), (128, 128), (32, 64)), True)
