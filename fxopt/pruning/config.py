"""A pruning run as a typed object or a TOML file, and what it does from the model's name to the saved result."""

from __future__ import annotations

import copy
import csv
import dataclasses
import difflib
import io
import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxopt import frontend
from fxopt.capture import capture
from fxopt.delta import share
from fxopt.errors import UsageError
from fxopt.inputs import example_inputs, fitting_length, load_tokenizer
from fxopt.pruning.calibration import LOSSES, Batch, Calibration, logits, mean_loss
from fxopt.pruning.files import FORMATS, save_pruned, write_text
from fxopt.pruning.loop import DEFAULT_KINDS, Pruned, prune
from fxopt.pruning.scores import SCORES

KINDS = ("branch", "operand", "block", "norm", "layer", "cat", "heads")


@dataclass(frozen=True)
class PruneConfig:
    """
    Everything that a run needs to know.

    ``model``: a built-in name, a folder, a hub name, or a module.  ``tokenizer``: a folder, by default the model's;
    ``data``: a text file to calibrate on and, the last tenth of it, to evaluate on; without it, random inputs.
    ``dummy_input``: one batch to capture with, by default made up.  One of ``target_sparsity`` (share of the
    parameters) and ``pruning_iterations`` (trees to remove) says when to stop.  ``score``: default, greedy, or a score.
    ``loss``: distance (from the dense outputs), loss (cross-entropy; of the next token in a language model) or
    error_rate.
    ``exclude``: words in module or parameter names that are not touched; ``types``: kinds of trees that are.
    ``workers``: processes to score in; ``scratch_dir``: a folder in which what was scored is kept, so that a run that
    was killed goes on.
    ``evaluate``: measure the loss before and after, on data that are not the calibration's, or ``lm_eval_tasks`` (names
    of tasks, or their .yaml files).
    """

    model: str | nn.Module
    device: str = "cpu"
    tokenizer: str | None = None
    data: str | None = None
    dummy_input: Any = None
    target_sparsity: float | None = None
    pruning_iterations: int | None = None
    score: str = "default"
    loss: str = "distance"
    per_ms: bool = False
    fit: bool = False
    exclude: tuple[str, ...] = ()
    types: tuple[str, ...] = DEFAULT_KINDS
    batches: int = 4
    batch_size: int = 2
    max_length: int | None = None
    seed: int = 0
    workers: int = 0
    scratch_dir: str | None = None
    importances_save_path: str | None = None
    pruned_model_save_dir: str | None = None
    formats: tuple[str, ...] = ("fxopt",)
    evaluate: bool = False
    eval_results_path: str | None = None
    lm_eval_tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, value := tuple(value))
            if isinstance(value, int) and not isinstance(value, bool) and field.name == "target_sparsity":
                object.__setattr__(self, field.name, value := float(value))
            if not _is_a(value, hints[field.name]):
                raise UsageError(f"{field.name} = {value!r} is no {_said(hints[field.name])}; change that field")
        self._check_values()

    def _check_values(self) -> None:
        goals = (self.target_sparsity, self.pruning_iterations)
        if all(g is None for g in goals) or all(g is not None for g in goals):
            raise UsageError("target_sparsity, pruning_iterations: give one of these two fields, to say when to stop")
        if self.target_sparsity is not None and not 0 < self.target_sparsity < 1:
            raise UsageError(f"target_sparsity = {self.target_sparsity} is no share; give a number between 0 and 1")
        for name in ("pruning_iterations", "batches", "batch_size", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} = {value} is too small; give at least 1")
        if self.workers < 0:
            raise UsageError(f"workers = {self.workers} is too small; give 0 for one process, or a number of processes")
        _one_of("score", self.score, ("default", "greedy", *SCORES))
        _one_of("loss", self.loss, tuple(LOSSES))
        for name, known in (("types", KINDS), ("formats", FORMATS)):
            for value in getattr(self, name):
                _one_of(name, value, known)
        if self.eval_results_path is not None and not self.evaluate:
            raise UsageError("eval_results_path is given, but evaluate is false; set evaluate = true, or leave it out")

    @staticmethod
    def read(path: str | Path) -> PruneConfig:
        """A TOML file of these fields; raises `UsageError` naming the field that is wrong."""
        place = Path(path)
        try:
            said = tomllib.loads(place.read_text())
        except OSError as error:
            raise UsageError(f"the configuration {place} cannot be read: {error.strerror}; give a TOML file") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"the configuration {place} is no TOML: {error}") from error
        return PruneConfig.of(said, str(place))

    @staticmethod
    def of(said: Mapping[str, Any], where: str = "the configuration") -> PruneConfig:
        """From plain values; the field names may be in capitals."""
        fields = {f.name for f in dataclasses.fields(PruneConfig)}
        values = {str(k).lower(): v for k, v in said.items()}
        for name in values:
            if name not in fields:
                close = difflib.get_close_matches(name, fields, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; the fields are {', '.join(sorted(fields))}"
                raise UsageError(f"{where}: {name} is no field{hint}")
        if "model" not in values:
            raise UsageError(f"{where}: the field model is missing; name a model")
        try:
            return PruneConfig(**values)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error


def _is_a(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(_is_a(value, k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, kind)


def _said(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "list of texts"
    if isinstance(kind, types.UnionType):
        return " or ".join(_said(k) for k in typing.get_args(kind) if k is not type(None))
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}.get(kind, "value of its kind")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name} = {value!r} is not known; give one of {', '.join(known)}")


@dataclass(frozen=True)
class Outcome:
    """What `run` did: the result of the loop, the losses on the evaluation data before and after, what was written."""

    config: PruneConfig
    pruned: Pruned
    before: dict[str, float]
    after: dict[str, float]
    written: tuple[Path, ...]


def run(
    config: PruneConfig,
    evaluate: Callable[[Any], float] | None = None,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """
    Load, capture, prune, evaluate and save as ``config`` says.

    ``evaluate``: any function of a graph module, in place of the built-in losses.  ``say`` is told of every tree that
    goes, ``progress`` of the jobs of a round that are done, and their number.
    """
    _check_paths(config)
    model = frontend.load(config.model, config.device, None) if isinstance(config.model, str) else config.model
    calibration, evaluation = _data(config, model)
    calibration.check_apart(evaluation)
    gm = captured(model, config.dummy_input if config.dummy_input is not None else calibration.batches[0].inputs)
    dense = share(gm)
    pruned = prune(
        gm,
        calibration,
        target_sparsity=config.target_sparsity,
        iterations=config.pruning_iterations,
        by=config.score,
        loss=LOSSES[config.loss],
        kinds=config.types,  # type: ignore[arg-type]
        exclude=config.exclude,
        fit=config.fit,
        per_ms=config.per_ms,
        seed=config.seed,
        workers=config.workers,
        directory=config.scratch_dir,
        evaluation=evaluation,
        say=say,
        progress=progress,
    )
    written: list[Path] = []
    if config.importances_save_path is not None:
        written += pruned.write(config.importances_save_path)
    before, after = {}, {}
    if config.evaluate:
        before, after = (_evaluated(config, g, dense, evaluation, evaluate) for g in (dense, gm))
        if config.eval_results_path is not None:
            written += _write_results(Path(config.eval_results_path), before, after, evaluation.hash)
    if config.pruned_model_save_dir is not None:
        written += save_pruned(gm, config.pruned_model_save_dir, calibration.batches[0], config.formats)
    return Outcome(config, pruned, before, after, tuple(written))


def captured(model: nn.Module, inputs: Any) -> GraphModule:
    """A capture without a cache of keys and values: as an output of the graph it would keep what makes it alive."""
    if isinstance(model, GraphModule):
        return model
    held: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    found = {id(c): c for c in held if getattr(c, "use_cache", False)}
    try:
        for settings in found.values():  # an encoder and a decoder have one of their own
            settings.use_cache = False
        return capture(model, inputs)
    finally:
        for settings in found.values():
            settings.use_cache = True


def _check_paths(config: PruneConfig) -> None:
    for name in ("importances_save_path", "eval_results_path"):
        said = getattr(config, name)
        if said is not None and (Path(said).is_dir() or not Path(said).resolve().parent.is_dir()):
            raise UsageError(f"{name} = {said!r} cannot be written: it is a folder, or its folder does not exist")
    folder = config.pruned_model_save_dir
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError(f"pruned_model_save_dir = {folder!r} is a file, expected a folder; give another path")
    if config.data is not None and not Path(config.data).is_file():
        raise UsageError(f"data = {config.data!r} is no file; give a text file")
    if config.lm_eval_tasks:
        _lm_eval()


def _data(config: PruneConfig, model: nn.Module) -> tuple[Calibration, Calibration]:
    length = config.max_length or fitting_length(model, 64)
    if config.data is not None:
        return _from_text(config, length)
    made = [example_inputs(model, config.batch_size, length, seed=config.seed + i) for i in range(config.batches * 2)]
    return Calibration.of(made[: config.batches], config.seed), Calibration.of(made[config.batches :], config.seed)


def _from_text(config: PruneConfig, length: int) -> tuple[Calibration, Calibration]:
    """Rows of ``length`` tokens: of the first nine tenths of the text, and of the last."""
    folder = config.tokenizer or (config.model if isinstance(config.model, str) else "")
    tokenizer = load_tokenizer(folder) if folder and Path(folder).is_dir() else None
    if tokenizer is None:
        raise UsageError(
            f"data = {config.data!r} needs a tokenizer, and there is none in {folder!r}; give the field tokenizer"
        )
    tokens = torch.tensor(tokenizer(Path(str(config.data)).read_text())["input_ids"])
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)
    cut, need = len(rows) * 9 // 10, config.batches * config.batch_size
    if cut < need or len(rows) - cut < 1:
        raise UsageError(
            f"data = {config.data!r} has {len(rows)} rows of {length} tokens, too few for {need} and a test"
        )
    order = torch.randperm(cut, generator=torch.Generator().manual_seed(config.seed))[:need]
    held = rows[cut:]
    first = [_tokens(rows[i]) for i in order.split(config.batch_size)]
    return Calibration(tuple(first), config.seed), Calibration(tuple(map(_tokens, held.split(config.batch_size))), 0)


def _tokens(rows: torch.Tensor) -> Batch:
    return Batch({"input_ids": rows, "attention_mask": torch.ones_like(rows)})


def _evaluated(
    config: PruneConfig,
    gm: GraphModule,
    dense: GraphModule,
    data: Calibration,
    own: Callable[[Any], float] | None,
) -> dict[str, float]:
    if own is not None:
        return {getattr(own, "__name__", "evaluation"): float(own(gm))}
    if config.lm_eval_tasks:
        return _lm_eval_results(config, gm)
    names = ["distance", "error_rate"]
    if config.loss == "loss":
        names.append("loss")
    found = {name: mean_loss(gm, data, LOSSES[name], dense) for name in names}
    if "loss" in found:
        found["perplexity"] = float(torch.tensor(found["loss"]).exp())
    return found


def _lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise UsageError(
            f"lm_eval_tasks needs the package lm_eval ({error}): pip install lm_eval; or leave the field out"
        ) from error
    return lm_eval


def _lm_eval_results(config: PruneConfig, gm: GraphModule) -> dict[str, float]:
    """The tasks' numbers by lm-eval's own Hugging Face adapter, the graph in the place of the model's forward."""
    from transformers.modeling_outputs import CausalLMOutput

    lm_eval = _lm_eval()
    given = frontend.load(config.model, config.device, None) if isinstance(config.model, str) else config.model
    model: Any = copy.copy(given)  # the given one keeps its forward

    def forward(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = gm(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        return CausalLMOutput(logits=logits(output))

    model.forward = forward
    tokenizer = config.tokenizer or (config.model if isinstance(config.model, str) else "")
    if not Path(tokenizer).is_dir():
        raise UsageError(
            f"lm_eval_tasks needs a tokenizer, and there is none in {tokenizer!r}; give the field tokenizer"
        )
    wrapped = lm_eval.models.huggingface.HFLM(
        pretrained=model, tokenizer=load_tokenizer(tokenizer), batch_size=config.batch_size, device=config.device
    )
    files = [Path(t) for t in config.lm_eval_tasks if t.endswith((".yaml", ".yml"))]
    manager = lm_eval.tasks.TaskManager(include_path=sorted({str(f.parent) for f in files}) or None)
    names = [_task_name(Path(t)) if t.endswith((".yaml", ".yml")) else t for t in config.lm_eval_tasks]
    if unknown := [n for n in names if n not in manager.all_tasks]:
        raise UsageError(f"lm_eval_tasks: {unknown[0]!r} is no task of lm_eval; give one of its tasks, or a .yaml file")
    results = lm_eval.simple_evaluate(model=wrapped, tasks=names, task_manager=manager)["results"]
    return {f"{t}/{n}": float(v) for t, found in results.items() for n, v in found.items() if isinstance(v, float)}


def _task_name(path: Path) -> str:
    """The name of a task that is a file."""
    found = re.search(r"^task:\s*['\"]?([^'\"#\s]+)", path.read_text(), re.MULTILINE) if path.is_file() else None
    if found is None:
        raise UsageError(f"lm_eval_tasks: {str(path)!r} is no file with a line 'task: NAME'; give a task of lm_eval")
    return found[1]


def _write_results(path: Path, before: dict[str, float], after: dict[str, float], data: str) -> list[Path]:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([("metric", "dense", "pruned"), *((n, before[n], after[n]) for n in after)])
    write_text(path, file.getvalue())
    write_text(path.with_suffix(".json"), json.dumps({"dense": before, "pruned": after, "data": data}, indent=1) + "\n")
    return [path, path.with_suffix(".json")]
