"""Pruning against Torch-Pruning: quality against latency, with the same data, time and seeds.

    python benchmarks/pruning.py run a 0 --out DIR      # train, prune both ways, tune; a seed each
    python benchmarks/pruning.py latency --out DIR      # interleaved, all variants of both tasks and all seeds
    python benchmarks/pruning.py summary --out DIR      # the tables and the picture
    python benchmarks/pruning.py all --out DIR          # three seeds of both tasks, latencies and summary, one by one
    python benchmarks/pruning.py families               # trees found, pruned, exported again and undone

Training and tuning are given seconds of processor time on one thread, so that they do not depend on what else runs.
All variants, Torch-Pruning's too, are captured, tuned and timed as graph modules.  Batch norms are in training mode
while a variant is tuned; before that, both ways are shown with the statistics they come with, and with statistics
estimated again on the calibration data.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
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
from fxopt.errors import TransformationError
from fxopt.pruning.calibration import cross_entropy
from fxopt.pruning.files import exported
from fxopt.transformations import EliminateNoOps

RATIOS = (0.15, 0.3, 0.45, 0.6, 0.75)
DENSE, PEER = "dense", "Torch-Pruning Taylor"
STEPS = {"a": (4, 8, 10, 12), "b": (2, 3, 4, 5, 6)}  # trees removed
BARE = {"a": (8, 12), "b": (3,)}  # of these, shown with nothing in the place of the trees too
CUT = {"a": ((8, 0.5),), "b": ((0, 0.3), (4, 0.3))}  # trees removed, then this share of the widths
STAGES = ("before", "estimated", "after")  # untuned, with batch statistics estimated again, tuned
EXPORTED = 4  # trees of a family whose removal is exported again
PLAIN = ("magnitude", "block_influence", "taylor")  # one-shot scores, shown untuned


def task_of(name: str) -> tasks.Task:
    """Task A or B."""
    return tasks.text_task() if name == "a" else tasks.digits_task()


def captured(task: tasks.Task, model: nn.Module) -> GraphModule:
    """The graph of a model in eval mode, for any batch size."""
    return model if isinstance(model, GraphModule) else capture(model.eval(), (task.train(2, 1)[0],))


def copied(gm: GraphModule) -> GraphModule:
    """A copy with parameters of its own."""
    return copy.deepcopy(share(gm))


def batch_norms(gm: GraphModule, training: bool, momentum: float | None = None) -> bool:
    """Let the batch norms of a captured graph use the batch's statistics, and keep them, or not; whether it has any."""
    found = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    for node in found:
        kept = node.args[6] if momentum is None else momentum
        node.args = (*node.args[:5], training, kept, *node.args[7:])
    gm.recompile()
    return bool(found)


def estimated(task: tasks.Task, gm: GraphModule, seed: int) -> GraphModule:
    """A copy whose batch norms have the mean statistics of the calibration batches."""
    twin = copied(gm)
    for i, (x, _) in enumerate(tasks.calibration(task, 3, seed)):
        batch_norms(twin, True, 1 / (i + 1))
        with torch.no_grad():
            twin(x)
    batch_norms(twin, False, 0.1)
    return twin


def tuned(task: tasks.Task, gm: GraphModule, seconds: float, seed: int) -> GraphModule:
    """A copy that was trained on for so many seconds of processor time."""
    twin = copied(gm)
    twin.requires_grad_(True)
    batch_norms(twin, True)
    tasks.train(task, twin, seconds, seed + 17, task.rate / 2)
    batch_norms(twin, False)
    return twin


def ours(
    task: tasks.Task, dense: GraphModule, seed: int, by: str, fit: bool, steps: Sequence[int], bare: Sequence[int] = ()
) -> dict[str, GraphModule]:
    """Trees removed one after another; a copy after each of the steps, of the ``bare`` ones without what was fitted."""
    gm, found = copied(dense), {}
    removed: list[str] = []
    for step in steps:
        left = step - len(removed)
        told = P.prune(gm, _data(task, seed), count_trees=left, by=by, loss=cross_entropy, kinds=("branch",), fit=fit)
        removed += told.removed
        found[f"fxopt {by}{' + fit' if fit else ''} {step}"] = copied(gm)
        if step in bare:
            found[f"fxopt {by}, bare {step}"] = copied(P.PruneTrees(tuple(removed))(copied(dense)))
    return found


def _data(task: tasks.Task, seed: int) -> P.Calibration:
    return P.Calibration(tuple(P.Batch((x,), y) for x, y in tasks.calibration(task, 3, seed)), seed)


def cut(task: tasks.Task, gm: GraphModule, seed: int, ratio: float) -> GraphModule:
    """A copy with so much less of every width but the residual one, by the same Taylor score as Torch-Pruning's."""
    twin = copied(gm)
    P.prune_width(twin, ratio, "taylor", _data(task, seed), cross_entropy, round_to=4)(twin)
    return copied(twin)


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
            round_to=4,
        )
        for x, y in tasks.calibration(task, 3, seed):
            task.loss(pruned, x, y).backward()
        pruner.step()
        pruned.zero_grad()
        found[f"{PEER} {ratio:.0%}"] = pruned
    return found


def trained(task: tasks.Task, seed: int, seconds: float, out: Path) -> nn.Module:
    """The dense model; kept in ``out``, so that it is trained once."""
    kept = out / f"dense-{task.name}-{seed}-{seconds:.0f}.pt"
    torch.manual_seed(seed)
    model = task.model()
    if kept.exists():
        model.load_state_dict(torch.load(kept))
        return model.eval()
    tasks.train(task, model.train(), seconds, seed, task.rate)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), kept)
    return model.eval()


def run(name: str, seed: int, out: Path, training: float, tuning: float) -> None:
    """One seed of one task: everything but the latencies."""
    torch.set_num_threads(1)
    task = task_of(name)
    model = trained(task, seed, training, out)
    dense = captured(task, model)
    print(f"task {name} seed {seed}: dense {task.evaluate(dense)[0]:.4f}", flush=True)
    start = time.process_time()
    variants: dict[str, Any] = {DENSE: copied(dense)}
    variants |= ours(task, dense, seed, "greedy", True, STEPS[name], BARE[name])
    scored = time.process_time() - start
    for step, ratio in CUT[name]:
        base = variants.get(f"fxopt greedy + fit {step}", variants[DENSE])
        variants[f"fxopt greedy + fit {step}, width {1 - ratio:.0%}"] = cut(task, base, seed, ratio)
    plain: dict[str, Any] = {}
    for by in PLAIN if seed == 0 else ():
        plain |= {n: task.evaluate(g) for n, g in ours(task, dense, seed, by, False, STEPS[name]).items()}
    variants |= torch_pruning(task, model, seed)
    rows, graphs = [], {}
    for label, variant in variants.items():
        gm = graphs[label] = copied(captured(task, variant))
        row: dict[str, Any] = {
            "name": label,
            "before": task.evaluate(gm),
            "parameters": sum(p.numel() for p in gm.parameters()),
        }
        row["estimated"] = task.evaluate(estimated(task, gm, seed)) if batch_norms(gm, False) else row["before"]
        row["after"] = task.evaluate(tuned(task, gm, tuning, seed))
        rows.append(row)
        print(f"  {label:32s} " + "  ".join(f"{row[k][0]:.4f} {row[k][1]:.3f}" for k in STAGES), flush=True)
    told = {"task": name, "seed": seed, "trained_s": training, "tuned_s": tuning, "scored_s": scored, "rows": rows}
    told["untuned"] = plain
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}-{seed}.json").write_text(json.dumps(told, indent=1))
    for i, gm in enumerate(graphs.values()):
        P.save_pruned(gm, out / "graphs" / f"{name}-{seed}-{i}", P.Batch((task.train(2, 1)[0],)), ("pt2",))
    (out / "graphs" / f"{name}-{seed}.json").write_text(json.dumps(list(graphs)))


def latency(out: Path, rounds: int) -> None:
    """Every variant against its dense model, in the same rounds, two rows of input, one thread."""
    torch.set_num_threads(1)
    for listed in sorted((out / "graphs").glob("*-*.json")):
        name, seed = listed.stem.split("-")
        task, graphs = task_of(name), {}
        for i, label in enumerate(json.loads(listed.read_text())):
            program = torch.export.load(out / "graphs" / f"{name}-{seed}-{i}" / "model.pt2")
            graphs[label] = EliminateNoOps(asserts=True)(program.module())
        x = task.train(2, 1)[0]
        timed = benchmark_many(graphs, (x,), rounds=rounds, max_time=60.0, memory=False, precision=0.0)
        found = {DENSE: [1e3 * timed.baseline.median, 1.0]}
        for comparison in timed:
            found[comparison.b.name] = [1e3 * comparison.b.median, comparison.ratio]
        (out / f"latency-{name}-{seed}.json").write_text(json.dumps(found, indent=1))
        print(name, seed, json.dumps(found, indent=1), flush=True)


def summary(out: Path) -> None:
    """The tables, mean over seeds, and the curves as HTML."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    page = make_subplots(rows=1, cols=2, subplot_titles=("Task A: character model", "Task B: two digits"))
    everything = {}
    for column, name in enumerate(("a", "b"), 1):
        rows = everything[name] = means(out, name)
        curves: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            family = row["name"].partition(", width")[0].rpartition(" ")[0]
            family += " and width" * (", width" in row["name"])
            curves.setdefault(family or DENSE, []).append(row)
        for label, points in curves.items():
            points.sort(key=lambda r: r["ratio"])
            for stage, dash in (("estimated", "dot"), ("after", "solid")):
                line = go.Scatter(x=[r["ratio"] for r in points], y=[r[stage][0] for r in points],
                                  text=[r["name"] for r in points], line={"dash": dash}, mode="lines+markers",
                                  name=f"{label}, {'untuned' if dash == 'dot' else 'tuned'}")  # fmt: skip
                page.add_trace(line, row=1, col=column)
    page.update_xaxes(title_text="latency over dense (batch 2, one thread)")
    page.update_yaxes(title_text="validation loss, nats")
    page.write_html(out / "pruning.html", include_plotlyjs="cdn")
    (out / "summary.json").write_text(json.dumps(everything, indent=1))


def means(out: Path, name: str) -> list[dict[str, Any]]:
    """The table of one task, printed; the mean over seeds of every variant."""
    runs = [json.loads(p.read_text()) for p in sorted(out.glob(f"{name}-*.json"))]
    runs = [r for r in runs if (out / f"latency-{name}-{r['seed']}.json").exists()]
    if not runs:
        return []
    times = [json.loads((out / f"latency-{name}-{r['seed']}.json").read_text()) for r in runs]
    first = runs[0]
    scored = statistics.mean(r["scored_s"] for r in runs)
    print(f"\ntask {name}: {len(runs)} seeds, trained {first['trained_s']:.0f} s, tuned {first['tuned_s']:.0f} s each,")
    print(f"greedy + fit scored for {scored:.0f} s (once for all its points)\n")
    again = any(r["estimated"] != r["before"] for r in first["rows"])
    columns = ["latency over dense", "loss, untuned", *(["statistics again"] if again else []), "tuned", "±"]
    columns += ["accuracy, untuned", "tuned"]
    print(f"| variant | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    rows: list[dict[str, Any]] = []
    for i, row in enumerate(first["rows"]):
        same = [run["rows"][i] for run in runs]
        assert all(r["name"] == row["name"] for r in same)
        made = {"name": row["name"], "ratio": statistics.mean(t[row["name"]][1] for t in times)}
        made |= {k: [statistics.mean(r[k][j] for r in same) for j in (0, 1)] for k in STAGES}
        made["spread"] = statistics.stdev(r["after"][0] for r in same) if len(same) > 1 else 0.0
        rows.append(made)
        said = [f"{made['before'][0]:.3f}", *([f"{made['estimated'][0]:.3f}"] if again else [])]
        said += [f"{made['after'][0]:.3f}", f"{made['spread']:.3f}" if len(same) > 1 else "one seed"]
        said += [f"{made['estimated'][1]:.3f}", f"{made['after'][1]:.3f}"]
        print(f"| {row['name']} | {made['ratio']:.3f} | {' | '.join(said)} |")
    print("\none-shot, untuned, nothing in their place, seed 0:")
    for variant, (loss, _) in first["untuned"].items():
        print(f"| {variant} | {loss:.3f} |")
    print("\nagainst each point of Torch-Pruning, the best of fxopt's that takes no longer:")
    for row in (r for r in rows if r["name"].startswith(PEER)):
        for stage in STAGES:
            faster = [r for r in rows if r["name"].startswith("fxopt") and r["ratio"] <= row["ratio"]]
            best = min(faster, key=lambda r: r[stage][0], default=None)
            found = "none is as fast" if best is None else f"{best[stage][0]:.3f} ({best['name']}, {best['ratio']:.3f})"
            print(f"{row['name']} at {row['ratio']:.3f}, {stage}: {row[stage][0]:.3f}; {found}")
    return rows


def families(wanted: Sequence[str]) -> None:
    """The built-in models, very small: what is found; each tree pruned, run and undone, some of them exported again."""
    from fxopt import models
    from fxopt.inputs import example_inputs
    from fxopt.pruning.config import captured as without_cache

    print("| model | nodes | trees | axis classes | ms | pruned | exported again | undone |")
    print("|---|---|---|---|---|---|---|---|")
    tiny = [n for n in models.names() if n.removesuffix(models.TINY) in models.names() and n.endswith(models.TINY)]
    for name in [f"{n}{models.TINY}" for n in wanted] or tiny:
        model = models.build(name)
        inputs = example_inputs(model, 2, 12)
        gm = without_cache(model, inputs)
        start = time.perf_counter()
        found = P.trees(gm)
        spent = 1e3 * (time.perf_counter() - start)
        done = back = again = tried = 0
        for i, tree in enumerate(found):
            before = _identity(gm)
            try:
                transformation = P.PruneTrees((tree,))
                transformation(gm)
                gm(**inputs) if isinstance(inputs, dict) else gm(*inputs)
            except TransformationError as error:
                print(f"{name}: {tree}: {error}", file=sys.stderr)
                continue
            done += 1
            if i % max(1, -(-len(found) // EXPORTED)) == 0:
                tried += 1
                program = exported(gm, P.Batch(inputs))
                again += not set(tree.parameters if tree.kind != "heads" else ()) & set(program.state_dict)
            transformation.reverse(gm)
            back += _identity(gm) == before
        print(f"| {name} | {len(gm.graph.nodes)} | {len(found)} | {len(P.axes(gm))} | {spent:.0f} | "
              f"{done}/{len(found)} | {again}/{tried} | {back}/{done} |", flush=True)  # fmt: skip


def _identity(gm: GraphModule) -> Any:
    """The code, and the very tensors."""
    return gm.code, [(name, id(tensor)) for name, tensor in gm.state_dict(keep_vars=True).items()]


def main() -> None:
    """Arguments."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "latency", "summary", "all", "families"))
    parser.add_argument("task", nargs="?", choices=("a", "b"), default="a")
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--models", nargs="+", default=(), help="families: these alone, as bert-base")
    parser.add_argument("--out", type=Path, default=Path("pruning-results"))
    parser.add_argument("--train", type=float, default=110.0)
    parser.add_argument("--tune", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=60)
    a = parser.parse_args()
    if a.what == "run":
        run(a.task, a.seed, a.out, a.train, a.tune)
    elif a.what == "all":
        for seed, name in itertools.product(range(3), ("a", "b")):
            if not (a.out / f"{name}-{seed}.json").exists():
                run(name, seed, a.out, a.train, a.tune)
        latency(a.out, a.rounds)
        summary(a.out)
    elif a.what == "latency":
        latency(a.out, a.rounds)
    elif a.what == "summary":
        summary(a.out)
    else:
        families(a.models)


if __name__ == "__main__":
    main()
