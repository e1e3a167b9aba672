"""The loop: find the trees, score them, take some out, and look again."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch.fx import GraphModule

from fxopt.errors import UsageError
from fxopt.history import commits, history
from fxopt.pruning.calibration import Calibration, Loss, distance, mean_loss
from fxopt.pruning.files import write_text
from fxopt.pruning.fitting import can_fit, fits, saved_by_fit
from fxopt.pruning.jobs import loss_deltas
from fxopt.pruning.scores import SCORES, score
from fxopt.text import to_html, to_text
from fxopt.transformations.prune_trees import Kind, PruneTrees, PruningTree, Trees, trees

DEFAULT_KINDS: tuple[Kind, ...] = ("branch", "block")
COLUMNS = ("rank", "pruning_tree", "kind", "root", "num_parameters", "importance", "pruned")

Evaluate = Callable[[GraphModule], float]


@dataclass(frozen=True)
class Iteration:
    """One round: all trees with their scores, the ones that went, and the loss after it (nan where none is known)."""

    trees: Trees
    scores: dict[str, float]
    removed: tuple[str, ...]
    parameters: int
    loss: float = math.nan

    def rows(self) -> list[tuple[Any, ...]]:
        """The ranking, least important first, as in `COLUMNS`."""
        known = [t for t in self.trees if t.id in self.scores]
        order = sorted(known, key=lambda t: (math.isnan(self.scores[t.id]), self.scores[t.id]))
        return [
            (i + 1, t.id, t.kind, t.root or "", t.elements, self.scores[t.id], t.id in self.removed)
            for i, t in enumerate(order)
        ]

    def to_csv(self) -> str:
        """The ranking as CSV."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *self.rows()])
        return file.getvalue()

    def to_json(self) -> dict[str, Any]:
        """The ranking as plain values."""
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in self.rows()]
        for row in rows:
            row["importance"] = None if math.isnan(row["importance"]) else row["importance"]
        loss = None if math.isnan(self.loss) else self.loss
        return {"trees": rows, "removed": list(self.removed), "parameters": self.parameters, "loss": loss}


@dataclass(frozen=True)
class Pruned:
    """What `prune` did; ``gm`` is the graph module that was given, and each removal a commit of its history."""

    gm: GraphModule = field(repr=False)
    dense_parameters: int
    iterations: tuple[Iteration, ...]
    dense_loss: float = math.nan
    data: str = ""  # the hash of the calibration data
    note: str = ""  # why less was removed than was asked for

    @property
    def removed(self) -> tuple[str, ...]:
        """The names of the trees that went, in that order."""
        return tuple(name for i in self.iterations for name in i.removed)

    @property
    def parameters(self) -> int:
        """What is left."""
        return count(self.gm)

    @property
    def sparsity(self) -> float:
        """The share of the parameters that went."""
        return 1 - self.parameters / self.dense_parameters

    def restore(self, tree: str | PruningTree) -> GraphModule:
        """Put one tree back, exactly; the others stay out."""
        return restore(self.gm, tree)

    def write(self, path: str | Path) -> list[Path]:
        """The ranking of each iteration as CSV, numbered where there are several, and as JSON beside it."""
        place, written = Path(path), []
        for i, iteration in enumerate(self.iterations):
            here = place if len(self.iterations) == 1 else place.with_stem(f"{place.stem}_{i}")
            write_text(here, iteration.to_csv())
            write_text(here.with_suffix(".json"), json.dumps(iteration.to_json(), indent=1) + "\n")
            written += [here, here.with_suffix(".json")]
        return written

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "dense_parameters": self.dense_parameters,
            "parameters": self.parameters,
            "sparsity": self.sparsity,
            "dense_loss": None if math.isnan(self.dense_loss) else self.dense_loss,
            "calibration": self.data,
            "removed": list(self.removed),
            "note": self.note,
            "iterations": [i.to_json() for i in self.iterations],
        }

    def __repr__(self) -> str:
        return to_text(self)

    def __rich__(self) -> Table:
        said = f"{len(self.removed)} trees removed, {self.dense_parameters:,} -> {self.parameters:,} parameters"
        said = f"{said} ({self.sparsity:.1%} fewer)" if self.removed else "no tree was removed"
        title = Text(f"{said}: {self.note}" if self.note else said)
        table = Table("", "tree", "kind", "module", "parameters", "score", "loss after", title=title)
        number = 0
        for iteration in self.iterations:
            by = {t.id: t for t in iteration.trees}
            for name in iteration.removed:
                number += 1
                t, last = by[name], name == iteration.removed[-1]
                loss = f"{iteration.loss:.4g}" if last and not math.isnan(iteration.loss) else ""
                given = iteration.scores.get(name, math.nan)
                row = (str(number), name, t.kind, t.module, f"{t.elements:,}", f"{given:.4g}", loss)
                table.add_row(*map(Text, row))
        return table

    def _repr_html_(self) -> str:
        return to_html(self)


def prune(
    gm: GraphModule,
    data: Calibration | None = None,
    *,
    target_sparsity: float | None = None,
    count_trees: int | None = None,
    iterations: int | None = None,
    by: str = "default",
    loss: Loss = distance,
    kinds: Sequence[Kind] = DEFAULT_KINDS,
    exclude: Sequence[str] = (),
    fit: bool = False,
    per_ms: bool = False,
    seed: int = 0,
    workers: int = 0,
    executor: Executor | None = None,
    directory: str | Path | None = None,
    evaluation: Calibration | None = None,
    say: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pruned:
    """
    Take trees out of ``gm``, each as a commit that can be undone alone.

    Each round enumerates the trees again, scores them and removes the least important, until ``target_sparsity`` of the
    parameters or ``count_trees`` trees have gone, or for ``iterations`` rounds of one tree.  ``by``: "default" keeps
    the third that block influence and Taylor rank lowest and takes, of these, the tree whose removal costs least
    ``loss``, measured anew in every round (greedy); "greedy" measures all; or any score of `fxopt.pruning.score`, once
    at the start for all that go (one-shot).  ``fit`` puts a fitted linear layer in the place of each
    that has more parameters than that (but heads and operands of concatenations go as they are).  ``kinds`` and
    ``exclude`` (words in module or parameter names) choose the trees.  ``evaluation`` must share no row with ``data``.
    Losses are measured in ``workers`` processes or on any ``executor``; with ``directory``, what was measured is kept
    there, and the same call goes on from it after it was killed.  ``progress`` is told how many jobs of the round, of
    how many, are done.
    """
    _check(gm, target_sparsity, count_trees, iterations, by, data, evaluation)
    before, given = count(gm), data
    if data is not None and loss is distance:  # from the graph as it is now, however much of it goes
        data = data.with_outputs(gm)
    dense = mean_loss(gm, data, loss) if data is not None else math.nan
    found: list[Iteration] = []
    note = ""
    options = _Options(
        by, loss, tuple(kinds), tuple(exclude), fit, per_ms, seed, workers, executor, directory, progress
    )
    goal = _Goal(before, target_sparsity, count_trees if count_trees is not None else iterations)
    reference = gm if data is None else _dense_copy(gm)
    while not goal.reached(gm, found):
        iteration = _round(gm, data, options, goal, found, reference)
        if iteration is None:
            note = _why_none(gm, options)
            if say is not None:
                say(note)
            break
        found.append(iteration)
        if say is not None:
            say(f"{', '.join(iteration.removed)}: {iteration.parameters:,} parameters, loss {iteration.loss:.4g}")
    return Pruned(gm, before, tuple(found), dense, "" if given is None else given.hash, note)


def restore(gm: GraphModule, tree: str | PruningTree) -> GraphModule:
    """
    Put one pruned tree back, whenever it went; later removals are made again without it.

    Of a `PruneTrees` of several trees the others stay out.  Raises `UsageError` if it was not removed.
    """
    name = str(tree)
    for index, commit in reversed(list(enumerate(commits(gm)))):
        made = commit.transformation
        if not isinstance(made, PruneTrees) or name not in made.trees:
            continue
        history(gm).undo(index)
        others = tuple(t for t in made.trees if t != name)
        if others:
            kept = tuple(f for f in made.fits if f[0] != name)
            PruneTrees(others, kept, made.unequal, made.rank)(gm)
        return gm
    gone = [str(t) for c in commits(gm) if isinstance(c.transformation, PruneTrees) for t in c.transformation.trees]
    raise UsageError(f"{name} was not pruned; what was: {', '.join(gone) or 'nothing'}")


def count(gm: GraphModule) -> int:
    """The elements of all parameters, tied ones once."""
    return sum(p.numel() for p in gm.parameters())


@dataclass(frozen=True)
class _Options:
    by: str
    loss: Loss
    kinds: tuple[Kind, ...]
    exclude: tuple[str, ...]
    fit: bool
    per_ms: bool
    seed: int
    workers: int
    executor: Executor | None
    directory: str | Path | None
    progress: Callable[[int, int], None] | None


@dataclass(frozen=True)
class _Goal:
    dense: int
    sparsity: float | None
    trees: int | None

    def reached(self, gm: GraphModule, found: Sequence[Iteration]) -> bool:
        if self.sparsity is not None:
            return 1 - count(gm) / self.dense >= self.sparsity
        return sum(len(i.removed) for i in found) >= (self.trees or 0)


def _round(
    gm: GraphModule,
    data: Calibration | None,
    o: _Options,
    goal: _Goal,
    found: Sequence[Iteration],
    dense: GraphModule,
) -> Iteration | None:
    known = trees(gm).of_kind(*o.kinds).without(o.exclude)
    if o.fit:  # what was fitted before is a tree too, and would be replaced by its like
        known = Trees(tuple(t for t in known if saved_by_fit(gm, t) > 0), known.nodes, known.name, known.scores)
    if not len(known):
        return None
    if o.by in ("default", "greedy"):
        scores = _greedy(gm, known, data, o)
        best = min(scores, key=lambda n: scores[n])
        going = [known[best]]
    elif found:  # one-shot: the ranking of the first round goes on
        scores = {t.id: found[0].scores[t.id] for t in known if t.id in found[0].scores}
        going = _least(known, scores)
    else:
        scores = score(gm, known, o.by, data, o.loss, o.seed, o.per_ms)
        going = _least(known, scores)
    if not going:
        return None
    replaced = fits(gm, [t for t in going if can_fit(t)], data) if o.fit and data is not None else []
    PruneTrees(tuple(going), tuple(replaced))(gm)
    loss = mean_loss(gm, data, o.loss, dense) if data is not None else math.nan
    return Iteration(known, scores, tuple(t.id for t in going), count(gm), loss)


def _why_none(gm: GraphModule, o: _Options) -> str:
    """Why no tree is left to go, for one who asked for more."""
    known = trees(gm)
    mine = known.of_kind(*o.kinds)
    if not len(mine):
        return f"of the {len(known)} trees that are there, none is of kind {' or '.join(o.kinds)}; name other kinds"
    left = mine.without(o.exclude)
    if not len(left):
        return f"all {len(mine)} trees of these kinds are excluded"
    if o.fit and all(saved_by_fit(gm, t) <= 0 for t in left):
        return f"a fitted layer would be no smaller than any of the {len(left)} trees that are left"
    return f"the score {o.by} is not defined for the {len(left)} trees that are left; choose another"


def _least(known: Trees, scores: dict[str, float]) -> list[PruningTree]:
    """The tree to go next: the least important whose score is defined."""
    order = sorted((t for t in known if not math.isnan(scores.get(t.id, math.nan))), key=lambda t: scores[t.id])
    return order[:1]


def _greedy(gm: GraphModule, known: Trees, data: Calibration | None, o: _Options) -> dict[str, float]:
    """The loss delta of the trees that are asked: all of them, or the third that the cheap scores rank lowest."""
    assert data is not None
    asked = list(known)
    if o.by == "default" and len(asked) > 6:
        influence = score(gm, known, "block_influence", data, o.loss)
        taylor = score(gm, known, "taylor", data, o.loss)
        places = _rank(influence), _rank(taylor)
        third = max(6, -(-len(asked) // 3))
        asked = sorted(asked, key=lambda t: min(p[t.id] for p in places))[:third]
    found = loss_deltas(gm, asked, data, o.loss, o.executor, o.workers, o.directory, o.progress)
    if not o.per_ms:
        return found
    from fxopt.pruning.scores import milliseconds

    saved = milliseconds(gm, asked, data.batches[0])
    return {n: v / max(saved[n], 1e-6) for n, v in found.items()}


def _rank(scores: dict[str, float]) -> dict[str, int]:
    order = sorted(scores, key=lambda n: (math.isnan(scores[n]), scores[n]))
    return {name: i for i, name in enumerate(order)}


def _dense_copy(gm: GraphModule) -> GraphModule:
    from fxopt.delta import share

    return share(gm)


def _check(
    gm: GraphModule,
    sparsity: float | None,
    trees_to_go: int | None,
    iterations: int | None,
    by: str,
    data: Calibration | None,
    evaluation: Calibration | None,
) -> None:
    goals = [g for g in (sparsity, trees_to_go, iterations) if g is not None]
    if len(goals) != 1:
        raise UsageError("give one of target_sparsity, count_trees and iterations, so that it is clear when to stop")
    if sparsity is not None and not 0 < sparsity < 1:
        raise UsageError(f"target_sparsity={sparsity} is no share of the parameters; give a number between 0 and 1")
    if by not in ("default", "greedy", *SCORES):
        raise UsageError(f"by={by!r} is not known; give default, greedy or one of {', '.join(SCORES)}")
    if by in ("default", "greedy") and data is None:
        raise UsageError(f"by={by!r} measures the loss; give calibration data, or by='magnitude'")
    if data is not None and evaluation is not None:
        data.check_apart(evaluation)
