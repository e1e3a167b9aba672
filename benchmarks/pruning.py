"""Pruning against Torch-Pruning: quality against latency, with the same data, time and seeds.

    python benchmarks/pruning.py run a 0 --out DIR      # train, prune both ways, tune; a seed each
    python benchmarks/pruning.py latency --out DIR      # interleaved, all variants of both tasks
    python benchmarks/pruning.py summary --out DIR      # the tables and the picture
    python benchmarks/pruning.py families               # trees found, pruned, exported again and undone

Training and tuning are given seconds of processor time on one thread, so that they do not depend on what else runs.
All variants, Torch-Pruning's too, are captured, tuned and timed as graph modules. Batch norms keep their statistics in
tuning.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import pruning_tasks as tasks
import torch
from torch import nn
from torch.fx import GraphModule

import fxopt.pruning as P
from fxopt.benchmark import benchmark_many
from fxopt.capture import capture
from fxopt.delta import share
from fxopt.pruning.calibration import cross_entropy
from fxopt.transformations import EliminateNoOps

RATIOS = (0.15, 0.3, 0.45, 0.6)
DENSE = "dense"
STEPS = {"a": (2, 4, 6, 8), "b": (1, 2, 3, 4)}


def task_of(name: str) -> tasks.Task:
    """Task A or B."""
    return tasks.text_task() if name == "a" else tasks.digits_task()


def captured(task: tasks.Task, model: nn.Module) -> GraphModule:
    """The graph of a model in eval mode, for any batch size."""
    return model if isinstance(model, GraphModule) else capture(model.eval(), (task.train(2, 1)[0],))


def copied(gm: GraphModule) -> GraphModule:
    """A copy with parameters of its own."""
    return copy.deepcopy(share(gm))


def ours(task: tasks.Task, dense: GraphModule, seed: int, by: str, fit: bool) -> dict[str, GraphModule]:
    """Trees removed one after another; a copy after each of the task's steps."""
    gm, found = copied(dense), {}
    data = P.Calibration(tuple(P.Batch((x,), y) for x, y in tasks.calibration(task, 3, seed)), seed)
    done = 0
    for step in STEPS[task.name]:
        P.prune(gm, data, count_trees=step - done, by=by, loss=cross_entropy, kinds=("branch",), fit=fit)
        done = step
        found[f"fxopt {by}{' + fit' if fit else ''} {step}"] = copied(gm)
    return found


def torch_pruning(task: tasks.Task, model: nn.Module, seed: int) -> dict[str, nn.Module]:
    """Torch-Pruning's structured pruning of all widths by its Taylor importance, at several ratios."""
    import torch_pruning as tp

    found = {}
    for ratio in RATIOS:
        pruned = copy.deepcopy(model).eval()
        heads = {m: b.attention.heads for b in getattr(pruned, "blocks", ()) if hasattr(b, "attention")
                 for m in (b.attention.q, b.attention.k, b.attention.v)}  # fmt: skip
        x, y = next(iter(tasks.calibration(task, 1, seed)))
        pruner = tp.pruner.MetaPruner(
            pruned,
            x[:2],
            importance=tp.importance.GroupTaylorImportance(),
            pruning_ratio=ratio,
            ignored_layers=[pruned.head],
            num_heads=heads,
            round_to=4 if task.name == "a" else 1,
        )
        for x, y in tasks.calibration(task, 4, seed):
            task.loss(pruned, x, y).backward()
        pruner.step()
        pruned.zero_grad()
        found[f"Torch-Pruning Taylor {ratio:.0%}"] = pruned
    return found


def run(name: str, seed: int, out: Path, trained: float, tuned: float) -> None:
    """One seed of one task: everything but the latencies, which do not depend on the seed."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task, model = task_of(name), None
    model = task.model()
    steps = tasks.train(task, model.train(), trained, seed, task.rate)
    dense = captured(task, model)
    print(f"task {name} seed {seed}: {steps} steps, dense {task.evaluate(dense)[0]:.4f}", flush=True)
    start = time.process_time()
    variants: dict[str, Any] = {DENSE: copied(dense)}
    variants |= ours(task, dense, seed, "greedy", fit=True)
    scored = time.process_time() - start
    plain = {}
    for by in ("greedy", "block_influence", "magnitude") if seed == 0 else ():
        plain |= {n: task.evaluate(g) for n, g in ours(task, dense, seed, by, fit=False).items()}
    variants |= torch_pruning(task, model, seed)
    rows = []
    for label, variant in variants.items():
        before = task.evaluate(variant)
        graph = copied(captured(task, variant))
        graph.requires_grad_(True)
        tasks.train(task, graph, tuned, seed + 17, task.rate / 4)
        after = task.evaluate(graph)
        count = sum(p.numel() for p in graph.parameters())
        rows.append({"name": label, "before": before, "after": after, "parameters": count})
        print(
            f"  {label:32s} {before[0]:.4f} -> {after[0]:.4f}  accuracy {before[1]:.3f} -> {after[1]:.3f}", flush=True
        )
    told = {"task": name, "seed": seed, "trained_s": trained, "tuned_s": tuned, "scored_s": scored, "rows": rows}
    told["untuned"] = plain
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}-{seed}.json").write_text(json.dumps(told, indent=1))
    if seed == 0:
        graphs = {n: captured(task, v) for n, v in variants.items()}
        for i, gm in enumerate(graphs.values()):
            P.save_pruned(gm, out / "graphs" / f"{name}-{i}", P.Batch((task.train(2, 1)[0],)), ("pt2",))
        (out / "graphs" / f"{name}.json").write_text(json.dumps(list(graphs)))


def latency(out: Path, rounds: int) -> None:
    """Every variant of seed 0 of both tasks against dense, in the same rounds, one row of input, one thread."""
    torch.set_num_threads(1)
    for name in ("a", "b"):
        listed = out / "graphs" / f"{name}.json"
        if not listed.exists():
            continue
        task, names = task_of(name), json.loads(listed.read_text())
        graphs = {}
        for i, label in enumerate(names):
            program = torch.export.load(out / "graphs" / f"{name}-{i}" / "model.pt2")
            graphs[label] = EliminateNoOps(asserts=True)(program.module())
        x = task.train(2, 1)[0]
        timed = benchmark_many(graphs, (x,), rounds=rounds, max_time=30.0, memory=False, precision=0.0)
        base = timed.baseline.median
        found = {DENSE: [1e3 * base, 1.0]}
        for comparison in timed:
            found[comparison.after.name] = [1e3 * comparison.after.median, comparison.ratio]
        (out / f"latency-{name}.json").write_text(json.dumps(found, indent=1))
        print(name, json.dumps(found, indent=1))


def summary(out: Path) -> None:
    """The tables, mean over seeds, and the curve as HTML."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    page = make_subplots(rows=1, cols=2, subplot_titles=("Task A: character model", "Task B: two digits"))
    for column, name in enumerate(("a", "b"), 1):
        runs = [json.loads(p.read_text()) for p in sorted(out.glob(f"{name}-*.json"))]
        place = out / f"latency-{name}.json"
        if not runs or not place.exists():
            continue
        times = json.loads(place.read_text())
        print(
            f"\ntask {name}: {len(runs)} seeds, trained {runs[0]['trained_s']:.0f} s, tuned {runs[0]['tuned_s']:.0f} s"
        )
        print("| variant | latency / dense | ms | loss before | loss after | accuracy before | after |")
        print("|---|---|---|---|---|---|---|")
        curves: dict[str, list[tuple[float, float, float, str]]] = {}
        for row in runs[0]["rows"]:
            same = [next(r for r in run["rows"] if r["name"] == row["name"]) for run in runs]
            before, after = ([statistics.mean(r[k][i] for r in same) for i in (0, 1)] for k in ("before", "after"))
            spread = statistics.stdev(r["after"][0] for r in same) if len(same) > 1 else 0.0
            ms, ratio = times[row["name"]]
            print(f"| {row['name']} | {ratio:.3f} | {ms:.2f} | {before[0]:.3f} | {after[0]:.3f} ± {spread:.3f} | "
                  f"{before[1]:.3f} | {after[1]:.3f} |")  # fmt: skip
            curves.setdefault(row["name"].rpartition(" ")[0] or "dense", []).append(
                (ms, before[0], after[0], row["name"])
            )
        untuned = {n: statistics.mean(run["untuned"][n][0] for run in runs[:1]) for n in runs[0]["untuned"]}
        print("seed 0, untuned:", ", ".join(f"{n} {v:.3f}" for n, v in untuned.items()))
        for label, points in curves.items():
            points.sort()
            for i, what in ((1, "before tuning"), (2, "after")):
                line = go.Scatter(x=[p[0] for p in points], y=[p[i] for p in points], text=[p[3] for p in points],
                                  name=f"{label}, {what}", line={"dash": "dot" if i == 1 else "solid"},
                                  mode="lines+markers")  # fmt: skip
                page.add_trace(line, row=1, col=column)
    page.update_xaxes(title_text="latency, ms (batch 2, one thread)")
    page.update_yaxes(title_text="validation loss, nats")
    page.write_html(out / "pruning.html", include_plotlyjs="cdn")


def families() -> None:
    """Every family of the built-in models, very small: what is found; each tree pruned, exported again and undone."""
    from fxopt import models
    from fxopt.inputs import example_inputs
    from fxopt.pruning.config import captured as without_cache
    from fxopt.pruning.files import exported

    print("| model | nodes | trees | axis classes | ms | pruned | exported again | undone |")
    print("|---|---|---|---|---|---|---|---|")
    for name in (n for n in models.names() if n.endswith(models.TINY)):
        model = models.build(name)
        inputs = example_inputs(model, 2, 16)
        gm = without_cache(model, inputs)
        start = time.perf_counter()
        found = P.trees(gm)
        spent = 1e3 * (time.perf_counter() - start)
        code, done, again, back = gm.code, 0, 0, 0
        for i, tree in enumerate(found):
            transformation = P.PruneTrees((tree,))
            transformation(gm)
            gm(**inputs)
            done += 1
            if i % 8 == 0:
                again += len(exported(gm, P.Batch(inputs)).graph.nodes) > 0
            transformation.reverse(gm)
            back += gm.code == code
        classes, tried = len(P.axes(gm)), -(-len(found) // 8)
        print(f"| {name} | {len(gm.graph.nodes)} | {len(found)} | {classes} | {spent:.0f} | {done}/{len(found)} | "
              f"{again}/{tried} | {back}/{len(found)} |", flush=True)  # fmt: skip


def main() -> None:
    """Arguments."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "latency", "summary", "families"))
    parser.add_argument("task", nargs="?", choices=("a", "b"), default="a")
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("pruning-results"))
    parser.add_argument("--train", type=float, default=60.0)
    parser.add_argument("--tune", type=float, default=7.0)
    parser.add_argument("--rounds", type=int, default=60)
    a = parser.parse_args()
    if a.what == "run":
        run(a.task, a.seed, a.out, a.train, a.tune)
    elif a.what == "latency":
        latency(a.out, a.rounds)
    elif a.what == "summary":
        summary(a.out)
    else:
        families()


if __name__ == "__main__":
    main()
