"""The graphs that a bisection asks about: a pipeline applied in part, down to single rewrites."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule

from fxopt.compose import Pipeline, adopt
from fxopt.delta import share
from fxopt.errors import FxoptError, TransformationError, UsageError
from fxopt.history import Commit, Rewrite, commits, history, undo_rewrites
from fxopt.search import Items
from fxopt.split import Part
from fxopt.transformation import Transformation


@dataclass(frozen=True)
class Stage:
    """A transformation of the pipeline that did something: where, and the graph after it."""

    index: int  # in the pipeline
    transformation: Transformation
    gm: GraphModule
    first: int  # the number of its first rewrite, counted from 1 over the whole pipeline
    parts: tuple[Part, ...]

    @property
    def last(self) -> int:
        return self.first + len(self.parts) - 1


class Unbuildable(Exception):
    """A rewrite does not exist where others were left out: the message says which and why."""


class Trials:
    """
    A pipeline run once over a copy, every graph on the way kept (they share their tensors), and parts of it made anew.

    Rewrites are numbered from 1 over the whole pipeline; a set of numbers is what of the pipeline is applied.  As long
    as whole transformations come first, the graph is one that the pipeline itself made; ``broken`` is the
    transformation that raised, if one did.
    """

    def __init__(self, original: GraphModule, transformations: Sequence[Transformation]) -> None:
        self.original = share(original)
        self.transformations = tuple(transformations)
        self.stages: list[Stage] = []
        self.broken: tuple[int, TransformationError] | None = None
        gm, first = share(original), 1
        for index, t in enumerate(self.transformations):
            try:
                t(gm)
            except TransformationError as error:
                self.broken = index, error
                return
            parts = commits(gm)[-1].parts
            if parts:
                self.stages.append(Stage(index, t, share(gm), first, parts))
                first += len(parts)

    @property
    def count(self) -> int:
        """How many rewrites there are."""
        return self.stages[-1].last if self.stages else 0

    def stage(self, number: int) -> Stage:
        """The stage that the rewrite of that number belongs to."""
        return next(s for s in self.stages if s.first <= number <= s.last)

    def part(self, number: int) -> Part:
        """The rewrite of that number."""
        stage = self.stage(number)
        return stage.parts[number - stage.first]

    def rewrite(self, number: int) -> Rewrite:
        """The rewrite of that number, bound to the graph right after its transformation."""
        stage = self.stage(number)
        return history(stage.gm)[-1].rewrites[number - stage.first]

    def build(self, items: Items) -> GraphModule:
        """
        A graph with those rewrites, and no others, applied; raises `Unbuildable` where one does not exist then.

        From the first transformation on that is applied in part only, later ones are applied anew, and what they do is
        recognised by what it changes.
        """
        held = [(s, frozenset(n for n in items if s.first <= n <= s.last)) for s in self.stages]
        whole = list(itertools.takewhile(lambda pair: len(pair[1]) == len(pair[0].parts), held))
        rest = [(s, some) for s, some in held[len(whole) :] if some]
        gm = share(whole[-1][0].gm if whole else self.original)
        if rest and rest[0][0] is held[len(whole)][0]:  # cut out of what the pipeline made
            stage, some = rest.pop(0)
            gm = share(stage.gm)
            _take_back(gm, [p.id for n, p in enumerate(stage.parts, stage.first) if n not in some])
        for stage, some in rest:
            self._again(gm, stage, some)
        return gm

    def _again(self, gm: GraphModule, stage: Stage, some: Items) -> None:
        try:
            stage.transformation(gm)
        except FxoptError as error:
            raise Unbuildable(f"{stage.transformation.signature} needs what was left out ({error})") from error
        fresh = commits(gm)[-1]
        kept: set[str] = set()
        for number in sorted(some):
            part = stage.parts[number - stage.first]
            alike = len(some) == len(stage.parts) == len(fresh.parts)
            found = _recognised(part, fresh, kept) or (fresh.parts[number - stage.first].id if alike else None)
            if found is None or found in kept:
                raise Unbuildable(f"without the rest there is no rewrite {part.id} of {stage.transformation.signature}")
            kept.add(found)
        _take_back(gm, [p.id for p in fresh.parts if p.id not in kept])


def _take_back(gm: GraphModule, ids: Sequence[str]) -> None:
    undo_rewrites(gm, len(commits(gm)) - 1, ids)


def _recognised(part: Part, commit: Commit, taken: set[str]) -> str | None:
    """The id of the rewrite in ``commit`` that is ``part``, by its id, or by what it found and changed."""
    free = [p for p in commit.parts if p.id not in taken]
    if any(p.id == part.id for p in free):
        return part.id
    sites = part.sites()
    common = {p.id: len(sites & p.sites()) / len(sites | p.sites()) for p in free if sites & p.sites()}
    return max(common, key=lambda id_: common[id_]) if common else None


def flat(pipeline: object) -> list[Transformation]:
    """The transformations of a pipeline, of a list of them, or a single one."""
    if isinstance(pipeline, Pipeline) or not isinstance(pipeline, (list, tuple)):
        pipeline = (pipeline,)
    return list(_flattened(pipeline))


def _flattened(given: Sequence[object]) -> Iterator[Transformation]:
    for one in given:
        t = adopt(one)
        if isinstance(t, Pipeline) and t.limit is not None:
            raise UsageError("bisect was given a pipeline with a limit; give the passes up to it, without the limit")
        if isinstance(t, Pipeline):
            yield from t.transformations
        else:
            yield t


def spans(items: Items) -> str:
    """Numbers as text, runs joined: ``1-30,45``."""
    found: list[str] = []
    for _, run in itertools.groupby(enumerate(sorted(items)), key=lambda pair: pair[1] - pair[0]):
        numbers = [n for _, n in run]
        found.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ",".join(found)
