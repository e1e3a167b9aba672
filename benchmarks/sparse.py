"""
Unstructured sparsity: fxopt's layers against dense ones, torch's CSR tensors and SparseProp, forward and backward.

    .venv/bin/python benchmarks/sparse.py [linear] [conv] [layers] [step] [--threads 1,2] [--rounds 7]
                                          [--sparsity 0.8,0.9,0.95,0.98] [--tokens 128,512,2048] [--no-sparseprop]

Prints how often faster than dense each is: medians of the ratios over rounds of dense and it in turn, in one process,
so that no third one has its data in the caches between them; at the end of each table the medians by sparsity. `linear`
and `conv` time one layer, by its module, forward and then the gradients of input, weight and bias; `layers` the same of
every layer of the steps below, each shape once; `step` a whole training step's forward and backward of ResNet-18 and of
two transformer blocks, every layer sparse, and of ResNet-18 with its first convolution and its classifier left dense,
as many who prune leave them; no other layer is left out for being slow.
The activations are in torch's own layout, the allocator keeps its memory between rounds, as in a process that trains.

SparseProp is built once into an environment of its own under build/ (`pip install sparseprop`, which needs a compiler
and a package registry); where that fails, a line says so and its columns stay empty. Set ATEN_CPU_CAPABILITY=avx2 and
MKL_ENABLE_INSTRUCTIONS=AVX2 and ONEDNN_MAX_CPU_ISA=AVX2 to compare as on a CPU without AVX-512.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import statistics
import subprocess
import sys
import time
import venv
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.kernels import native
from fxopt.models import build
from fxopt.sparse import SparseConv2d, SparseLinear, swap

ENVIRONMENT = Path("build", "sparseprop")
CONVOLUTIONS = (  # channels in, out, kernel, side
    (128, 128, 3, 28),
    (128, 128, 3, 14),
    (256, 256, 3, 14),
    (256, 1024, 1, 14),
)
LINEARS = ((768, 3072), (3072, 768))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="*", help=f"of {', '.join(TABLES)}; all by default")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sparsity", default="0.8,0.9,0.95,0.98")
    parser.add_argument("--tokens", default="128,512,2048")
    parser.add_argument("--no-sparseprop", action="store_true")
    chosen = parser.parse_args()
    if unknown := [what for what in chosen.what if what not in TABLES]:
        parser.error(f"there is no {unknown[0]}; give some of {', '.join(TABLES)}")
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
    torch.manual_seed(0)
    keep_memory()
    peer = None if chosen.no_sparseprop else sparseprop()
    print(f"{native.isa()}, torch {torch.backends.cpu.get_cpu_capability()}, times as fast as dense")
    threads = [int(t) for t in chosen.threads.split(",")]
    sparsities = [float(s) for s in chosen.sparsity.split(",")]
    for what in chosen.what or TABLES:
        start = time.perf_counter()
        table(TABLES[what](sparsities, [int(t) for t in chosen.tokens.split(",")], peer), chosen.rounds, threads)
        print(f"{what}: {(time.perf_counter() - start) / 60:.1f} minutes\n", flush=True)


def table(cases: Iterator[Case], rounds: int, threads: Sequence[int]) -> None:
    print(f"{'':42} threads {'forward':>8} {'SparseProp':>10} {'CSR':>6} {'backward':>9} {'SparseProp':>10}")
    found: dict[tuple[str, int], list[list[float | None]]] = {}
    for label, sparsity, forwards, backwards in cases:
        ahead, back = ratios(forwards, rounds, threads), ratios(backwards, rounds, threads)
        for t in threads:
            cells = [ahead[t].get(kind) for kind in ("fxopt", "sparseprop", "csr")]
            cells += [back[t].get(kind) for kind in ("fxopt", "sparseprop")]
            row(f"{label}, {sparsity:.0%}", t, cells)
            found.setdefault((f"{sparsity:.0%}", t), []).append(cells)
    for (sparsity, t), rows in sorted(found.items()):
        columns = [[c for c in column if c] for column in zip(*rows, strict=True)]
        row(f"median at {sparsity}", t, [statistics.median(c) if c else None for c in columns])


def row(label: str, threads: int, cells: Sequence[float | None]) -> None:
    shown = [f"{c:.2f}" if c else "" for c in cells]
    print(
        f"{label:42} {threads:>7} {shown[0]:>8} {shown[1]:>10} {shown[2]:>6} {shown[3]:>9} {shown[4]:>10}", flush=True
    )


Runs = dict[str, Callable[[], object]]
Case = tuple[str, float, Runs, Runs]


def linears(sparsities: Sequence[float], tokens: Sequence[int], peer: object) -> Iterator[Case]:
    for inputs, outputs in LINEARS:
        for rows in tokens:
            for sparsity in sparsities:
                dense = thinned(nn.Linear(inputs, outputs), sparsity)
                layers: dict[str, nn.Module] = {"dense": dense, "fxopt": SparseLinear.from_dense(dense)}
                if peer is not None:
                    layers["sparseprop"] = peer.SparseLinear.from_dense(dense)  # type: ignore[attr-defined]
                x = torch.randn(rows, inputs)
                forwards, backwards = runs(layers, x)
                csr = dense.weight.detach().to_sparse_csr()
                forwards["csr"] = lambda csr=csr, x=x, b=dense.bias: (csr @ x.t()).t() + b.detach()
                yield f"linear {inputs}→{outputs}, {rows}", sparsity, forwards, backwards


def convolutions(sparsities: Sequence[float], tokens: Sequence[int], peer: object) -> Iterator[Case]:
    for channels, outputs, kernel, side in CONVOLUTIONS:
        for sparsity in sparsities:
            dense = thinned(nn.Conv2d(channels, outputs, kernel, padding=kernel // 2), sparsity)
            x = torch.randn(32, channels, side, side)
            layers: dict[str, nn.Module] = {"dense": dense, "fxopt": SparseConv2d.from_dense(dense)}
            if peer is not None:
                layers["sparseprop"] = best_convolution(peer, dense, x)
            forwards, backwards = runs(layers, x)
            yield f"conv {kernel}×{kernel} {channels}→{outputs} at {side}²", sparsity, forwards, backwards


def layers_of_steps(sparsities: Sequence[float], tokens: Sequence[int], peer: object) -> Iterator[Case]:
    for _, make, given, pruned in MODELS[1:]:
        seen: dict[str, tuple[nn.Module, Tensor]] = {}
        model = make()
        with watching(model, (nn.Linear, nn.Conv2d)) as inputs:
            model(**given)
        for n, m in [(n, m) for n, m in model.named_modules() if n in inputs][pruned]:
            seen.setdefault(f"{described(m)}, {'×'.join(map(str, inputs[n].shape))}", (m, inputs[n]))
        for label, (layer, x) in seen.items():
            for sparsity in sparsities:
                dense = thinned(copy.deepcopy(layer), sparsity)
                kinds: dict[str, nn.Module] = {"dense": dense}
                kinds["fxopt"] = (SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d).from_dense(dense)
                if peer is not None:
                    kinds["sparseprop"] = of_peer(peer, dense, x)
                yield label, sparsity, *runs(kinds, x)


def described(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return f"linear {layer.in_features}→{layer.out_features}"
    stride = "" if layer.stride == (1, 1) else f"/{layer.stride[0]}"
    return f"conv {'×'.join(map(str, layer.kernel_size))}{stride} {layer.in_channels}→{layer.out_channels}"


@contextlib.contextmanager
def watching(model: nn.Module, kinds: tuple[type, ...]) -> Iterator[dict[str, Tensor]]:
    """The input that each layer of `kinds` is given inside, by name."""
    seen: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _m, args, n=n: seen.__setitem__(n, args[0].detach()))
        for n, m in model.named_modules()
        if isinstance(m, kinds)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def best_convolution(peer: object, dense: nn.Conv2d, x: Tensor) -> nn.Module:
    """The faster of SparseProp's two, as its `sparsify_conv2d_auto` finds it."""
    both = [peer.SparseConv2d.from_dense(dense, vectorizing_over_on=flag) for flag in (False, True)]  # type: ignore[attr-defined]

    def seconds(layer: nn.Module) -> float:
        forwards, backwards = runs({"it": layer}, x)
        best = []
        for _ in range(3):
            start = time.perf_counter()
            forwards["it"]()
            backwards["it"]()
            best.append(time.perf_counter() - start)
        return min(best)

    return min(both, key=seconds)


def steps(sparsities: Sequence[float], tokens: Sequence[int], peer: object) -> Iterator[Case]:
    for name, make, x, pruned in MODELS:
        for sparsity in sparsities:
            model = make()
            for layer in [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][pruned]:
                thinned(layer, sparsity)
            models = {"dense": model, "fxopt": swap(model, x, min_sparsity=sparsity - 0.01, measure=False)[0]}
            if peer is not None:
                models["sparseprop"] = with_peer(model, peer, sparsity - 0.01, x)
            yield f"{name}: a step", sparsity, {kind: whole(m, x) for kind, m in models.items()}, {}


class Block(nn.Module):
    """A transformer block of width 768 with 12 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(768), nn.LayerNorm(768)
        self.query, self.key, self.value, self.out = (nn.Linear(768, 768) for _ in range(4))
        self.up, self.down = nn.Linear(768, 3072), nn.Linear(3072, 768)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        heads = [p(y).unflatten(-1, (12, 64)).transpose(1, 2) for p in (self.query, self.key, self.value)]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


def blocks() -> nn.Module:
    return nn.Sequential(Block(), Block())


def with_peer(model: nn.Module, peer: object, min_sparsity: float, x: dict[str, Tensor]) -> nn.Module:
    """Every sparse layer by SparseProp, none left out: for convolutions its faster kernel on the layer's own input."""
    with watching(model, (nn.Conv2d, nn.Linear)) as seen:
        model(**x)
    result = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear | nn.Conv2d) or (layer.weight == 0).float().mean() < min_sparsity:
            continue
        owner, _, last = name.rpartition(".")
        new = of_peer(peer, layer, seen[name])
        setattr(result.get_submodule(owner), last, new)
    return result


def of_peer(peer: object, layer: nn.Module, x: Tensor) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return peer.SparseLinear.from_dense(layer)  # type: ignore[attr-defined]
    return best_convolution(peer, layer, x)


def runs(layers: dict[str, nn.Module], x: Tensor) -> tuple[Runs, Runs]:
    """The forward of each layer without gradients; and the gradients alone, of the input and all parameters."""
    forwards, backwards = {}, {}
    for kind, layer in layers.items():
        forwards[kind] = lambda layer=layer: without_gradients(layer, x)
        given = x.clone().requires_grad_()
        y = layer(given)
        gradient = torch.randn_like(y)
        wanted = [given, *layer.parameters()]
        backwards[kind] = lambda y=y, w=wanted, g=gradient: torch.autograd.grad(y, w, g, retain_graph=True)
    return forwards, backwards


@torch.no_grad()
def without_gradients(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def whole(model: nn.Module, x: dict[str, Tensor]) -> Callable[[], object]:
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> object:
        found = model(**x)
        y = next(t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor))
        return torch.autograd.grad(y.square().mean(), parameters, allow_unused=True)

    return run


def ratios(calls: Runs, rounds: int, threads: Sequence[int]) -> dict[int, dict[str, float]]:
    """By number of threads, the median over the rounds of dense over each, each in rounds of its own with dense."""
    found: dict[int, dict[str, float]] = {t: {} for t in threads}
    for kind in calls:
        if kind != "dense":
            for t, ratio in in_turn({"dense": calls["dense"], kind: calls[kind]}, rounds, threads).items():
                found[t][kind] = ratio[kind]
    return found


def in_turn(calls: Runs, rounds: int, threads: Sequence[int]) -> dict[int, dict[str, float]]:
    """By number of threads, the median over the rounds of dense over each."""
    seconds: dict[int, list[dict[str, float]]] = {t: [] for t in threads}
    for i in range(rounds + 2):
        for t in threads:
            torch.set_num_threads(t)
            one = {}
            for kind, call in calls.items():
                start = time.perf_counter()
                call()
                one[kind] = time.perf_counter() - start
            if i >= 2:  # the first two warm up
                seconds[t].append(one)
    return {t: {k: statistics.median(s["dense"] / s[k] for s in found) for k in calls} for t, found in seconds.items()}


def thinned(layer: nn.Module, sparsity: float) -> nn.Module:
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) >= sparsity)
    return layer


def keep_memory() -> None:
    """Ask glibc to keep freed memory: else every large result is faulted in anew, on all sides alike."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def sparseprop() -> object | None:
    """SparseProp's modules, from an environment of its own; None, and a line, where it cannot be built."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "built").exists():
        print("building SparseProp …", flush=True)
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        own = ENVIRONMENT / "lib" / version / "site-packages"
        (own / "benchmark.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")  # torch, as here
        install = [str(python), "-m", "pip", "install", "-q", "--no-deps"]
        for packages in (
            ["pybind11", "scipy", "wheel", "setuptools<81"],
            ["--no-build-isolation", "sparseprop==0.1.14"],
        ):
            done = subprocess.run([*install, *packages], capture_output=True, text=True)
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                print(f"SparseProp is left out: it does not build here ({reason})")
                return None
        (ENVIRONMENT / "built").touch()
    sys.path.append(str(next((ENVIRONMENT / "lib").glob("python*/site-packages"))))
    import sparseprop.modules

    return sparseprop.modules


IMAGES = {"pixel_values": torch.randn(8, 3, 224, 224)}
ALL, INNER = slice(None), slice(1, -1)
MODELS = (  # name, how it is made, its inputs, which of its layers are pruned
    ("ResNet-18, 8 × 224²", lambda: build("resnet18").train(), IMAGES, ALL),
    ("ResNet-18, ends dense", lambda: build("resnet18").train(), IMAGES, INNER),
    ("2 transformer blocks, 4 × 128", blocks, {"input": torch.randn(4, 128, 768)}, ALL),
)
TABLES = {"linear": linears, "conv": convolutions, "layers": layers_of_steps, "step": steps}


if __name__ == "__main__":
    main()
