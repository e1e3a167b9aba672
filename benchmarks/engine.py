"""What recording costs: a whole transformation against `lint` + `recompile` on the same graph, for growing graphs.

    python benchmarks/engine.py [--sizes 1000 10000 100000] [--repeats 3] [--only NAME] [--profile] [--json FILE]

Two graphs (traced from a module; built by hand of functions) and three passes (one in plain torch.fx by a user, one of
the catalogue, one that finds nothing) are timed. The aim: at most 3 × lint + recompile, growing linearly. Each number
is the least of the repeats, each on a fresh graph.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx import Graph, GraphModule

from fxopt.transformation import ReversibleTransformation, Transformation
from fxopt.transformations import EliminateDropout

AIM = 3.0
BLOCK = 5  # nodes in a block of either graph


class Net(nn.Module):
    """Linear layers with activations: of every five nodes one is a dropout, one a ReLU, one a quotient."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear in self.linears:
            y = torch.relu(linear(x))
            x = x + self.dropout(y) / 2.0
        return x


def traced(nodes: int) -> GraphModule:
    return torch.fx.symbolic_trace(Net(nodes // BLOCK).eval())


def built(nodes: int) -> GraphModule:
    graph = Graph()
    x = graph.placeholder("x")
    for _ in range(nodes // BLOCK):
        y = graph.call_function(torch.relu, (graph.call_function(torch.sin, (x,)),))
        y = graph.call_function(torch.nn.functional.dropout, (y,), {"p": 0.1, "training": False})
        x = graph.call_function(torch.add, (x, graph.call_function(torch.div, (y, 2.0))))
    graph.output(x)
    return GraphModule(nn.Module(), graph)


class ClampForRelu(ReversibleTransformation):
    """A user's pass: plain torch.fx, a new node for one in five."""

    preserves_computation = True

    def transform(self, graph_module: GraphModule) -> GraphModule:
        for node in list(graph_module.graph.nodes):
            if node.target is torch.relu:
                with graph_module.graph.inserting_after(node):
                    new = graph_module.graph.call_function(torch.clamp_min, (node.args[0], 0))
                node.replace_all_uses_with(new)
                graph_module.graph.erase_node(node)
        return graph_module


class FindNothing(ReversibleTransformation):
    """Looks at every node and changes none: what is left is the recording."""

    preserves_computation = True

    def transform(self, graph_module: GraphModule) -> GraphModule:
        assert not [node for node in graph_module.graph.nodes if node.target is torch.tan]
        return graph_module


@dataclass(frozen=True)
class Timing:
    """Seconds, the least of the repeats."""

    graph: str
    nodes: int
    name: str
    rewrites: int
    yardstick: float  # lint and recompile of the graph before the pass
    forward: float
    reverse: float

    @property
    def ratio(self) -> float:
        return self.forward / self.yardstick


def seconds(action: Callable[[], object]) -> float:
    gc.collect()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def lint_and_recompile(gm: GraphModule) -> None:
    gm.graph.lint()
    gm.recompile()


def measure(graph: str, make: Callable[[int], GraphModule], size: int, t: Transformation, repeats: int) -> Timing:
    best = [float("inf")] * 3
    for _ in range(repeats):
        gm = make(size)
        nodes = len(gm.graph.nodes)
        code = gm.code
        took = [seconds(lambda gm=gm: lint_and_recompile(gm)), seconds(lambda gm=gm: t(gm))]
        rewrites = sum(t.transformed(node) for node in gm.graph.nodes)
        took.append(seconds(lambda gm=gm: t(gm, reverse=True)))
        if gm.code != code:
            raise SystemExit(f"{t.signature} was not undone exactly on the {graph} graph of {nodes} nodes")
        best = [min(a, b) for a, b in zip(best, took, strict=True)]
    return Timing(graph, nodes, t.signature, rewrites, *best)


def measurements(sizes: list[int], repeats: int, only: str) -> Iterator[Timing]:
    for graph, make in (("traced", traced), ("built", built)):
        for t in (ClampForRelu(), EliminateDropout(), FindNothing()):
            if only not in f"{graph} {t.signature}":
                continue
            for size in sizes:
                yield measure(graph, make, size, t, repeats if size <= 10_000 else 1)


def show(found: list[Timing]) -> Table:
    table = Table(title=f"aim: ratio at most {AIM:g}, the same time a node at every size", title_justify="left")
    for column in ("graph", "pass", "nodes", "changed", "lint + recompile", "pass", "ratio", "µs a node", "undo"):
        table.add_column(column, justify="left" if column in ("graph",) else "right")
    for t in found:
        each = f"{t.forward / t.nodes * 1e6:.1f}"
        times = (f"{t.yardstick:.3f} s", f"{t.forward:.3f} s", f"{t.ratio:.2f}", each, f"{t.reverse:.3f} s")
        style = "red" if t.ratio > AIM else None
        table.add_row(t.graph, t.name, f"{t.nodes:,}", f"{t.rewrites:,}", *times, style=style)
    return table


def hot_spots(size: int) -> None:
    for t in (ClampForRelu(), EliminateDropout()):
        gm, profile = traced(size), cProfile.Profile()
        profile.runcall(t, gm)
        print(f"\n{t.signature} on {len(gm.graph.nodes):,} nodes traced from a module, by own time")
        pstats.Stats(profile).sort_stats("tottime").print_stats(18)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3, help="up to 10,000 nodes; larger graphs are measured once")
    parser.add_argument("--only", default="", help="only graph and pass whose names hold this, such as 'built Clamp'")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes, at the middle size")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    found = list(measurements(options.sizes, options.repeats, options.only))
    Console().print(show(found))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(t) | {"ratio": t.ratio} for t in found], indent=1) + "\n")
    if options.profile:
        hot_spots(sorted(options.sizes)[len(options.sizes) // 2])


if __name__ == "__main__":
    main()
