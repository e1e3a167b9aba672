"""Loss deltas as jobs for any `concurrent.futures.Executor`: the same numbers, bit for bit, wherever they are computed.

A job is a graph by file, the names of trees, and one batch by file.  A worker loads both once, and keeps the values of
the dense graph, so that a tree costs only what comes after it.  Finished jobs are in a journal: a run that was killed
goes on where it was.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from fxopt import serial, store
from fxopt.errors import FxoptError, UsageError
from fxopt.pruning.calibration import Batch, Calibration, Loss, distance, loss_of
from fxopt.pruning.patched import Prefix
from fxopt.pruning.scores import without
from fxopt.serial import decode, encode
from fxopt.transformations._trees import out_of_place
from fxopt.transformations.prune_trees import PruningTree

_CHUNK = 8  # trees in a job
_ALONE = threading.Lock()  # fake tensors and the number of threads are the whole process's
_IDLE = 60  # seconds that workers wait for the next round, in which they need not be started again
_LEFT = 3  # how often a pool that broke is made anew


@dataclass(frozen=True)
class Job:
    """What a worker is told; ``loss`` is a name, or ``module:function``."""

    graph: str
    batch: str
    trees: tuple[PruningTree, ...]
    loss: str

    @property
    def key(self) -> str:
        """The same for the same work: by content, not by where the files are."""
        said = [Path(self.graph).name]  # it is named by its content
        said += [Path(self.batch).name, *(t.id for t in self.trees), self.loss]
        return hashlib.sha256("\n".join(said).encode()).hexdigest()[:24]


def run(job: Job) -> list[float]:
    """The loss of the dense graph on the job's batch, and after it that without each of its trees."""
    with _ALONE:
        return _run(job)


def _run(job: Job) -> list[float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are in the order of one thread everywhere
    try:
        prefix = _prefix(job.graph, job.batch)
        loss = _loss(job.loss)
        found = [float(loss(prefix.output, prefix.batch, prefix.output))]
        for tree in job.trees:
            output = without(prefix, tree)
            found.append(float(loss(output, prefix.batch, prefix.output)))
        return found
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=2)
def _loaded(graph: str) -> GraphModule:
    if graph in _GIVEN:
        return _GIVEN[graph]
    gm = store.load(graph)
    assert isinstance(gm, GraphModule)
    return _fresh(gm)


def _fresh(gm: GraphModule) -> GraphModule:
    """A copy in memory of its own: how a product is summed may depend on where its operands begin."""
    with warnings.catch_warnings():  # torch's own, of how it copies the tree of a graph's inputs
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        return out_of_place(copy.deepcopy(gm))


@lru_cache(maxsize=1)
def _prefix(graph: str, batch: str) -> Prefix:
    return Prefix(_loaded(graph), read_batch(Path(batch)))


def loss_deltas(
    gm: GraphModule,
    wanted: Sequence[PruningTree],
    data: Calibration,
    loss: Loss | str = distance,
    executor: Executor | Callable[[], Executor] | None = None,
    workers: int = 0,
    directory: str | Path | None = None,
    say: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """
    The change of the mean of ``loss`` over ``data`` when each of the trees goes, by name.

    Serially where no ``executor`` is given and ``workers`` is 0; with ``workers``, in that many processes (loky).  An
    executor of your own, a Dask client's (``client.get_executor()``), has to see the files in ``directory``.  All give
    the same numbers, bit for bit.  With ``directory``, what is done is kept there, and a call with the same graph,
    trees and data goes on from it.  ``say`` is told how many jobs of how many are done.
    """
    if executor is not None and workers:
        raise UsageError(f"workers={workers} was given beside an executor; give one of them")
    with _folder(directory) as folder:
        alone = executor is None and not workers
        graph = _write_graph(gm, folder, named_only=alone)
        if alone:
            _GIVEN[graph] = _fresh(gm)
        names = [t.id for t in wanted]
        chunks = [tuple(wanted[i : i + _CHUNK]) for i in range(0, len(names), _CHUNK)] or [()]
        batches = [_write_batch(b, folder, f"{data.hash}-{i}") for i, b in enumerate(data.batches)]
        said = _loss_name(loss, alone)
        jobs = [Job(graph, b, c, said) for b in batches for c in chunks]
        results = _run_all(jobs, _Pool(executor, workers), _Journal(folder / "scores.jsonl"), say)
        _LOCAL.pop(said, None)
        _GIVEN.pop(graph, None)
        _prefix.cache_clear()
        _loaded.cache_clear()
    return _deltas(results, jobs, batches, names)


def _deltas(results: dict[Job, list[float]], jobs: list[Job], batches: list[str], names: list[str]) -> dict[str, float]:
    """Sums in one order, whatever order the jobs ended in."""
    total = dict.fromkeys(names, 0.0)
    for batch in batches:
        for job in jobs:
            if job.batch == batch:
                dense, *patched = results[job]
                for tree, value in zip(job.trees, patched, strict=True):
                    total[tree.id] += value - dense
    return {name: value / len(batches) for name, value in total.items()}


# --- where jobs run -------------------------------------------------------------------------------------------------


class _Pool:
    """An executor that is made anew when its workers were killed; or none."""

    def __init__(self, executor: Executor | Callable[[], Executor] | None, workers: int) -> None:
        self._make: Callable[[], Executor] | None = None
        self._stays = workers > 0
        if workers:
            self._make = lambda: _loky(workers)
        elif executor is not None and not isinstance(executor, Executor) and not hasattr(executor, "submit"):
            self._make = executor
        self._executor: Any = self._make() if self._make else executor
        self.left = _LEFT if self._make else 0

    @property
    def serial(self) -> bool:
        return self._executor is None

    def submit(self, job: Job) -> Future[list[float]]:
        found: Future[list[float]] = self._executor.submit(run, job)
        return found

    def renew(self, cause: BaseException) -> None:
        """Another executor in place of the broken one; raises where there is none, or too often."""
        if self._make is None or self.left == 0:
            raise FxoptError(
                f"the executor broke: {cause}; what was done is kept where a directory was given, so run it again"
            ) from cause
        self.left -= 1
        self._executor.shutdown(wait=False)
        self._executor = self._make()

    def close(self) -> None:
        if self._make is not None and self._executor is not None and not self._stays:
            self._executor.shutdown(wait=True)


def _loky(workers: int) -> Executor:
    try:
        import loky
    except ImportError as error:
        raise UsageError('scoring in several processes needs loky: pip install "fxopt[prune]"') from error
    made: Executor = loky.get_reusable_executor(max_workers=workers, timeout=_IDLE)
    return made


def _run_all(
    jobs: Sequence[Job], pool: _Pool, journal: _Journal, say: Callable[[int, int], None] | None
) -> dict[Job, list[float]]:
    keys = {job: job.key for job in jobs}
    done = {job: journal.known[key] for job, key in keys.items() if key in journal.known}
    waiting = deque(job for job in jobs if job not in done)

    def finish(job: Job, result: list[float]) -> None:
        done[job] = result
        journal.write(keys[job], result)
        if say is not None:
            say(len(done), len(jobs))

    try:
        if pool.serial:
            for job in waiting:
                finish(job, run(job))
            return done
        running: dict[Future[list[float]], Job] = {}
        while waiting or running:
            while waiting and len(running) < 64:
                job = waiting.popleft()
                try:
                    running[pool.submit(job)] = job
                except RuntimeError as error:  # the pool broke (BrokenExecutor) before it was asked
                    waiting.appendleft(job)
                    waiting.extend(running.values())
                    running.clear()
                    pool.renew(error)
            broken: BaseException | None = None
            for future in list(_completed(running)):
                job = running.pop(future)
                try:
                    finish(job, future.result())
                except (BrokenProcessPool, OSError) as error:
                    waiting.append(job)
                    broken = error
            if broken is not None:
                waiting.extend(running.values())
                running.clear()
                pool.renew(broken)
        return done
    finally:
        pool.close()


def _completed(running: dict[Future[list[float]], Job]) -> Iterator[Future[list[float]]]:
    if all(isinstance(f, Future) for f in running):
        yield from wait(running, return_when=FIRST_COMPLETED).done
        return
    yield from list(running)  # futures of another kind (Dask's): asked one after another


class _Journal:
    """Finished jobs by key, a line each, written as soon as they are done; a torn last line is left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.known: dict[str, list[float]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
                self.known[entry["job"]] = [float.fromhex(v) for v in entry["losses"]]
            except (ValueError, KeyError, TypeError):
                continue

    def write(self, key: str, losses: Sequence[float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"job": key, "losses": [v.hex() for v in losses]}) + "\n")
            file.flush()
            os.fsync(file.fileno())


# --- files ----------------------------------------------------------------------------------------------------------


@contextmanager
def _folder(directory: str | Path | None) -> Iterator[Path]:
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="fxopt-prune-") as name:
            yield Path(name)
        return
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"directory {folder} is a file, expected a folder; give another path")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def _write_graph(gm: GraphModule, folder: Path, named_only: bool) -> str:
    """Save the graph as it is, with no history, under a name made of its content; or only say the name."""
    graph, tensors = serial.to_json(gm)
    digest = hashlib.sha256(json.dumps(graph, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(
            name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    place = folder / f"graph-{digest.hexdigest()[:16]}"
    if not named_only and not place.exists():
        with tempfile.TemporaryDirectory(dir=folder, prefix=".graph-") as aside:
            store.save(serial.from_json(graph, tensors), Path(aside) / "graph")
            os.replace(Path(aside) / "graph", place)
    return str(place)


def _write_batch(batch: Batch, folder: Path, name: str) -> str:
    path = folder / f"batch-{name}.safetensors"
    inputs = dict(batch.inputs) if isinstance(batch.inputs, dict) else batch.inputs
    items = list(inputs.items()) if isinstance(inputs, dict) else list(enumerate(inputs))
    tensors = {f"input.{k}": v.contiguous() for k, v in items if isinstance(v, torch.Tensor)}
    if batch.target is not None:
        tensors["target"] = batch.target.contiguous()
    plain = [[k, encode(v, f"the input {k}")] for k, v in items if not isinstance(v, torch.Tensor)]
    said = {"keywords": isinstance(inputs, dict), "plain": plain, "names": [k for k, _ in items]}
    if not path.exists():
        store.write_tensors(path, tensors)
        path.with_suffix(".json").write_text(json.dumps(said))
    return str(path)


def read_batch(path: Path) -> Batch:
    """What was written of a batch."""
    tensors, said = store.read_tensors(path), json.loads(path.with_suffix(".json").read_text())
    plain = {k: decode(v) for k, v in said["plain"]}
    values = {k: tensors.get(f"input.{k}", plain.get(k)) for k in said["names"]}
    return Batch(values if said["keywords"] else tuple(values.values()), tensors.get("target"))


# --- losses by name -------------------------------------------------------------------------------------------------

_GIVEN: dict[str, GraphModule] = {}  # graphs that this process need not load
_LOCAL: dict[str, Loss] = {}  # a function that only this process knows


def _loss_name(loss: Loss | str, serial: bool) -> str:
    from fxopt.pruning.calibration import LOSSES

    if isinstance(loss, str):
        loss_of(loss)
        return loss
    named = next((n for n, known in LOSSES.items() if known is loss), None)
    if named is not None:
        return named
    module, name = getattr(loss, "__module__", ""), getattr(loss, "__qualname__", "")
    if serial:
        _LOCAL[f"local:{id(loss)}"] = loss
        return f"local:{id(loss)}"
    if not name.isidentifier() or module in ("__main__", ""):
        raise UsageError(
            f"the loss {name or loss!r} cannot be found by a worker; give a function at the top of an importable module"
        )
    return f"{module}:{name}"


def _loss(said: str) -> Loss:
    if said in _LOCAL:
        return _LOCAL[said]
    module, colon, name = said.partition(":")
    if not colon:
        return loss_of(said)
    import importlib

    found: Loss = getattr(importlib.import_module(module), name)
    return found
