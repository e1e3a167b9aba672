"""
Does a fused operator pay? Each against the ATen calls it replaces, interleaved in one process.

    .venv/bin/python benchmarks/kernels.py [--device cpu] [--threads 2] [--rounds 41] [--only NAME]

Prints time(fused) / time(replaced) per case: the median over the rounds and its 95 % interval, below 1 where fusing is
faster. Both sides are the calls that an exported graph's generated code makes, so dispatch from Python is counted.
`fxopt.kernels.PAYS` is filled from what this prints.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import fxopt.kernels

aten = torch.ops.aten
fused = torch.ops.fxopt


@dataclass(frozen=True)
class Case:
    """One operator on one size: two functions that compute the same."""

    operator: str
    label: str
    replaced: Callable[[], object]
    fused: Callable[[], object]


def linear_cases(rand: Callable[..., torch.Tensor]) -> Iterator[Case]:
    for rows, inputs, outputs in ((1, 64, 64), (128, 64, 64), (1, 768, 3072), (8, 768, 3072), (128, 768, 3072)):
        x, w, b = rand(rows, inputs), rand(outputs, inputs), rand(outputs)
        label = f"{rows}×{inputs}→{outputs}"
        yield Case(
            "linear_gelu",
            label,
            lambda x=x, w=w, b=b: aten.gelu.default(aten.linear.default(x, w, b)),
            lambda x=x, w=w, b=b: fused.linear_gelu.default(x, w, b),
        )
        yield Case(
            "linear_relu",
            label,
            lambda x=x, w=w, b=b: aten.relu.default(aten.linear.default(x, w, b)),
            lambda x=x, w=w, b=b: fused.linear_relu.default(x, w, b),
        )


def convolution_cases(rand: Callable[..., torch.Tensor]) -> Iterator[Case]:
    for inputs, outputs, size, kernel, stride in (
        (8, 8, 10, 3, 1),
        (64, 64, 56, 3, 1),
        (3, 64, 224, 7, 2),
        (64, 256, 56, 1, 1),
    ):
        x, w, b = rand(1, inputs, size, size), rand(outputs, inputs, kernel, kernel), rand(outputs)
        s, p, d = [stride, stride], [kernel // 2, kernel // 2], [1, 1]
        yield Case(
            "conv_relu",
            f"{inputs}→{outputs} {kernel}×{kernel} at {size}²",
            lambda x=x, w=w, b=b, s=s, p=p: aten.relu.default(aten.conv2d.default(x, w, b, s, p)),
            lambda x=x, w=w, b=b, s=s, p=p, d=d: fused.conv_relu.default(x, w, b, s, p, d, 1),
        )


def norm_cases(rand: Callable[..., torch.Tensor]) -> Iterator[Case]:
    for rows, n in ((1, 64), (1, 768), (128, 768), (512, 1024)):
        x, r, w, b, m = rand(1, rows, n), rand(1, rows, n), rand(n), rand(n), rand(n, n)
        label = f"{rows}×{n}"
        yield Case(
            "add_layer_norm",
            label,
            lambda x=x, r=r, w=w, b=b, n=n: aten.layer_norm.default(aten.add.Tensor(x, r), [n], w, b),
            lambda x=x, r=r, w=w, b=b, n=n: fused.add_layer_norm.default(x, r, [n], w, b),
        )

        def add_then_norm(x=x, r=r, w=w, b=b, n=n):
            total = aten.add.Tensor(x, r)
            return aten.layer_norm.default(total, [n], w, b), total

        yield Case(
            "add_layer_norm_sum",
            label,
            add_then_norm,
            lambda x=x, r=r, w=w, b=b, n=n: fused.add_layer_norm_sum.default(x, r, [n], w, b),
        )

        def norm_linear_norm(x=x, w=w, b=b, m=m, n=n):
            inner = aten.linear.default(aten.layer_norm.default(x, [n], w, b), m, b)
            return aten.layer_norm.default(inner, [n], w, b)

        yield Case(
            "layer_norm_linear_layer_norm",
            label,
            norm_linear_norm,
            lambda x=x, w=w, b=b, m=m, n=n: fused.layer_norm_linear_layer_norm.default(
                x, [n], w, b, 1e-5, m, b, [n], w, b, 1e-5
            ),
        )

        def llama_norm(x=x, w=w):
            wide = aten.to.dtype(x, torch.float32)
            mean = aten.mean.dim(aten.pow.Tensor_Scalar(wide, 2), [-1], True)
            scaled = aten.mul.Tensor(wide, aten.rsqrt.default(aten.add.Tensor(mean, 1e-6)))
            return aten.mul.Tensor(w, aten.to.dtype(scaled, x.dtype))

        yield Case("rms_norm", label, llama_norm, lambda x=x, w=w: fused.rms_norm.default(x, w))


def gating_cases(rand: Callable[..., torch.Tensor]) -> Iterator[Case]:
    for rows, n in ((1, 64), (1, 2816), (128, 2816), (512, 2816)):
        gate, up, both = rand(1, rows, n), rand(1, rows, n), rand(1, rows, 2 * n)
        label = f"{rows}×{n}"
        yield Case(
            "swiglu",
            label,
            lambda gate=gate, up=up: aten.mul.Tensor(aten.silu.default(gate), up),
            lambda gate=gate, up=up: fused.swiglu.default(gate, up),
        )

        def chunk_then_gate(both=both):
            gate, up = aten.chunk.default(both, 2, -1)
            return aten.mul.Tensor(aten.silu.default(gate), up)

        yield Case("swiglu_packed", label, chunk_then_gate, lambda both=both: fused.swiglu_packed.default(both))


def measure(case: Case, rounds: int, wait: Callable[[], None]) -> tuple[float, float, float, float]:
    """Microseconds of the replaced calls; median ratio and its 95 % interval, by order statistics."""

    def seconds(function: Callable[[], object], calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        return time.perf_counter() - start

    once = min(seconds(case.replaced, 3) + seconds(case.fused, 3) for _ in range(5)) / 6
    calls = max(2, min(1000, round(0.01 / once)))
    ratios, base = [], []
    for turn in range(rounds):
        first, second = (case.replaced, case.fused) if turn % 2 == 0 else (case.fused, case.replaced)
        times = {first: seconds(first, calls), second: seconds(second, calls)}
        ratios.append(times[case.fused] / times[case.replaced])
        base.append(times[case.replaced] / calls * 1e6)
    ratios.sort()
    reach = round(0.98 * rounds**0.5)
    middle = rounds // 2
    return (
        statistics.median(base),
        ratios[middle],
        ratios[max(0, middle - reach)],
        ratios[min(rounds - 1, middle + reach)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--only", help="one operator's name")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    print(f"{'operator':30} {'size':22} {'replaced, µs':>12}   fused / replaced (95 %)    recorded as paying")
    with torch.no_grad():
        for cases in (linear_cases, convolution_cases, norm_cases, gating_cases):
            for case in cases(rand):
                if options.only not in (None, case.operator):
                    continue
                base, ratio, low, high = measure(case, options.rounds, wait)
                pays = "yes" if fxopt.kernels.pays(case.operator, device.type) else "no"
                interval = f"{ratio:.2f} ({low:.2f}–{high:.2f})"
                print(f"{case.operator:30} {case.label:22} {base:12.1f}   {interval:26} {pays}", flush=True)


if __name__ == "__main__":
    main()
