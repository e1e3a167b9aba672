"""
Does a block-sparse layer pay? Against dense, torch's own block-sparse format, and a dense layer under a mask.

    .venv/bin/python benchmarks/block_sparse.py [--threads 2] [--tokens 1,128,512,2048] [--block 32] [--rounds 15]
        [--device cpu] [--dtype float32] [--quick] [--no-model]

Prints how many times as fast as dense each is: the median of the ratios over rounds of dense and it in turn, so that no
third one has its data in the caches between them; the allocator keeps its memory between rounds, as in a process that
trains. Forward without gradients; then forward with both backward products; then a whole BERT with its feed-forward
layers sparse.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sparse import keep_memory  # benchmarks/sparse.py
from torch import nn

from fxopt.kernels import native
from fxopt.models import build
from fxopt.sparse import BlockSparseLinear, BlockSparseModelPatcher


def ratios(contenders: dict[str, Callable[[], object]], rounds: int, seconds: float, sync: bool) -> dict[str, float]:
    """The median of time(first) / time(each), each in rounds of its own with the first."""
    first, *others = contenders
    pairs = [{first: contenders[first], name: contenders[name]} for name in others]
    return {n: r for pair in pairs for n, r in in_turn(pair, rounds, seconds, sync).items()}


def in_turn(contenders: dict[str, Callable[[], object]], rounds: int, seconds: float, sync: bool) -> dict[str, float]:
    """The median of time(first) / time(each) over the rounds."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(), run()
    begin = time.perf_counter()
    while len(found[next(iter(found))]) < 5 or (
        time.perf_counter() - begin < seconds and len(found[next(iter(found))]) < rounds
    ):
        for name, run in contenders.items():
            if sync:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if sync:
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - start)
    dense = next(iter(found.values()))
    return {n: statistics.median(a / b for a, b in zip(dense, t, strict=True)) for n, t in found.items()}


def layer(inputs: int, outputs: int, density: float, tokens: int, arguments: argparse.Namespace) -> None:
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    dense = nn.Linear(inputs, outputs, device=device, dtype=dtype)
    sparse = BlockSparseLinear.from_dense(dense, density, select="random", block_shape=(arguments.block,) * 2)
    kept = sparse.mask.repeat_interleave(arguments.block, 0).repeat_interleave(arguments.block, 1).to(dtype)
    x = torch.randn(tokens, inputs, device=device, dtype=dtype)
    contenders: dict[str, Callable[[], object]] = {"dense": lambda: dense(x), "block-sparse": lambda: sparse(x)}
    if device == "cpu" and dtype == torch.float32:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own notice that the format is in beta
            bsr = sparse.weight.detach().to_sparse_bsr((arguments.block,) * 2)
        contenders["torch BSR"] = lambda: F.linear(x, bsr)
    sync = device == "cuda"
    with torch.no_grad():
        forward = ratios(contenders, arguments.rounds, arguments.seconds, sync)
    trained = x.clone().requires_grad_()
    g = torch.randn(tokens, outputs, device=device, dtype=dtype)

    def train(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        def step() -> None:
            trained.grad = None
            for p in (*dense.parameters(), *sparse.parameters()):
                p.grad = None
            function(trained).backward(g)

        return step

    steps = {
        "dense": train(dense),
        "block-sparse": train(sparse),
        "masked dense": train(lambda x: F.linear(x, dense.weight * kept, dense.bias)),
    }
    both = ratios(steps, arguments.rounds, arguments.seconds, sync)
    bsr_ratio = f"{forward['torch BSR']:9.2f}" if "torch BSR" in forward else " " * 9
    print(
        f"{inputs:5}→{outputs:<5} {tokens:6} {density:8.2f} {forward['block-sparse']:9.2f} {bsr_ratio}"
        f" {both['block-sparse']:9.2f} {both['masked dense']:9.2f}",
        flush=True,
    )


def model(arguments: argparse.Namespace) -> None:
    """A BERT, its feed-forward layers at each density."""
    print("\nbert-base, batch 1 × 128 tokens, feed-forward layers block-sparse, forward")
    ids = {"input_ids": torch.randint(5, 1000, (1, 128), device=arguments.device)}
    dense = build("bert-base").eval().to(arguments.device)
    contenders: dict[str, Callable[[], object]] = {"dense": lambda: dense(**ids)}
    for density in (0.5, 0.25, 0.1):
        sparse = build("bert-base").eval().to(arguments.device)
        patcher = BlockSparseModelPatcher(guard="off")
        patcher.add_pattern(r"encoder\.layer\.[0-9]+\.(intermediate|output)\.dense", density)
        patcher.patch_model(sparse)
        contenders[f"{density}"] = lambda sparse=sparse: sparse(**ids)  # type: ignore[misc]
    with torch.no_grad():
        for name, ratio in ratios(contenders, arguments.rounds, 20, arguments.device == "cuda").items():
            print(f"  {name:6} {ratio:5.2f} ×")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", default="1,128,512,2048")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.5, help="for one row, at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--no-model", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep_memory()
    print(f"{arguments.device}, {arguments.dtype}, {arguments.threads} threads, kernels: {native.isa()}; times as fast")
    print(f"{'layer':>11} {'tokens':>6} {'density':>8} {'forward':>9} {'torch BSR':>9} {'training':>9} {'masked':>9}")
    shapes = ((768, 3072),) if arguments.quick else ((768, 3072), (3072, 768))
    for inputs, outputs in shapes:
        for tokens in map(int, arguments.tokens.split(",")):
            for density in (0.5, 0.25, 0.1):
                layer(inputs, outputs, density, tokens, arguments)
    if not arguments.no_model:
        model(arguments)


if __name__ == "__main__":
    main()
