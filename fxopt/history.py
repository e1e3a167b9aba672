"""The history of a graph module: one commit per transformation, undone in any order, whole or in part."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from rich.text import Text
from torch import nn
from torch.fx import GraphModule, Node

from fxopt import patch
from fxopt.delta import MARKS, Delta, diff, kept_meta
from fxopt.errors import Conflict, FxoptError, IrreversibleEdit, TransformationError, UsageError
from fxopt.garbage import sparing
from fxopt.log import Commit, Recordable, commits, foreign, install, kept, put_back, repoint, store
from fxopt.origin import source_of
from fxopt.snapshot import Snapshot, graph_of, graphs, node_key, slot_of, snapshot
from fxopt.split import Part, joined, whole
from fxopt.text import to_html, to_text
from fxopt.watch import Watch, own

if TYPE_CHECKING:
    from fxopt.difference import Difference

__all__ = [
    "Commit",
    "Edited",
    "Recordable",
    "atomic",
    "commits",
    "find",
    "history",
    "run",
    "to_html",
    "to_text",
    "undo",
    "undo_rewrite",
    "undo_rewrites",
]

Edited = Literal["refuse", "carry", "discard"]
Change = Callable[[Snapshot], tuple[Commit, ...]]  # edits the graph module given as it is; what is left of the commit


@contextlib.contextmanager
def atomic(gm: GraphModule, now: Snapshot | None = None) -> Iterator[Snapshot]:
    """Run the body; if it raises, put ``gm``, which is as ``now`` says, and its history back as they were."""
    before, known = now or snapshot(gm), kept(gm)
    try:
        yield before
    except BaseException:
        _restore(gm, before)
        put_back(gm, known)
        raise


def _restore(gm: GraphModule, before: Snapshot) -> None:
    """Bring ``gm`` back to ``before``, whatever was done to it since."""
    for path, inner in before.modules.items():  # also one that was taken out of it
        if inner.graph is not (graph := before.graph(path)):
            inner.graph = graph
        patch.name_again(graph, before.names)
        if graphs(gm).get(path) is not inner:
            _restore_detached(before, path, inner)
    patch.apply(gm, diff(before, snapshot(gm)).inverse(), before)
    _recompile(gm)


def _restore_detached(before: Snapshot, path: str, inner: GraphModule) -> None:
    patch.apply(inner, diff(before.within(path), snapshot(inner)).inverse())
    inner.recompile()


@sparing()
def run(gm: GraphModule, transformation: Recordable, lint_and_recompile: bool = True) -> GraphModule:
    """
    Apply ``transformation`` to ``gm`` and every graph module inside it, and commit the difference.

    Raises `TransformationError` (with the cause chained) if it fails, `IrreversibleEdit` if it wrote to a parameter or
    buffer in place; ``gm`` is then as it was before.
    """
    if not isinstance(gm, GraphModule):
        raise UsageError(
            f"{transformation.signature} was given a {type(gm).__name__}, expected a torch.fx.GraphModule; "
            "make one with fxopt.capture(model, example_inputs) or torch.fx.symbolic_trace(model)"
        )
    own(gm)
    install(gm)
    before = snapshot(gm)
    between = foreign(gm, before)
    watch = Watch(before)
    try:
        with watch:
            _transform_all(gm, transformation)
        if edited := watch.edited():
            raise IrreversibleEdit(
                f"{', '.join(edited)} was modified in place; assign a new parameter instead, so that it can be undone"
            )
        watch.forget_writes()
        watch.forget_gradients()
        own(gm)  # the modules that it brought along
        install(gm)
        if lint_and_recompile:
            _lint(gm)
        after = snapshot(gm)
        delta = diff(before, after)
        _settle_detached(gm, before, after)
        if delta and lint_and_recompile:
            _recompile(gm, delta)
    except BaseException as error:
        watch.restore()
        _restore(gm, before)
        if not isinstance(error, Exception):  # an interrupt
            raise
        ran = ", ".join(c.signature for c in commits(gm)) or "nothing"
        kind = type(error) if isinstance(error, TransformationError) else TransformationError
        text = str(error) if isinstance(error, FxoptError) else f"{type(error).__name__}: {error}"
        text = next(iter(text.splitlines()), "")  # the rest is in the cause
        raise kind(f"{transformation.signature} failed after {ran}: {text}") from error
    _mark(gm, delta, before, after, transformation.signature)
    store(gm, (*commits(gm), Commit(transformation, delta, foreign=between)), after)
    return gm


def _transform_all(gm: GraphModule, transformation: Recordable) -> None:
    for path, inner in graphs(gm).items():
        if graphs(gm).get(path) is not inner:  # it took this one out of the graph module
            continue
        if path and getattr(transformation, "root_only", False):
            continue
        result = transformation.transform(inner)
        if result is not None and result is not inner:
            # a module's repr is a line for each of its modules
            what = "another graph module" if isinstance(result, GraphModule) else f"a {type(result).__name__}"
            raise TransformationError(
                f"transform returned {what}, expected the graph module it was given; edit the graph module in place"
            )


def _settle_detached(gm: GraphModule, before: Snapshot, after: Snapshot) -> None:
    """A graph module that was taken out is kept as it was; what was done to it before has no effect any more."""
    there = set(map(id, after.modules.values()))
    for path, inner in before.modules.items():
        if after.modules.get(path) is inner:
            continue
        if id(inner) not in there:
            _restore_detached(before, path, inner)
        elif diff(before.within(path), snapshot(inner)):
            raise IrreversibleEdit(f"the graph module {path} was moved and edited; do one at a time")


def _lint(gm: GraphModule) -> None:
    for inner in graphs(gm).values():
        inner.graph.lint()


def _recompile(gm: GraphModule, delta: Delta | None = None) -> None:
    touched = None if delta is None else {graph_of(k) for k in delta.nodes} | {*delta.orders, *delta.codegens}
    for path, inner in graphs(gm).items():
        if touched is None or path in touched:
            inner.recompile()


def _mark(gm: GraphModule, delta: Delta, before: Snapshot, after: Snapshot, signature: str) -> None:
    """Note ``signature`` on what ``delta`` created or changed; the notes are part of the difference."""
    for key, node in patch.touched_nodes(gm, delta):
        mark(node, signature)
        after.metas[key] = node.meta.copy()
        old = delta.metas[key][0] if key in delta.metas else before.metas.get(key)
        delta.metas[key] = (old and kept_meta(old, before), kept_meta(node.meta, after))


def mark(node: Node, signature: str) -> None:
    """Note on ``node`` that the transformation of ``signature`` created or changed it."""
    marks = node.meta.get(MARKS, ())
    if signature not in marks:
        node.meta[MARKS] = (*marks, signature)


def unmark(node: Node, signature: str) -> None:
    """Take the note back."""
    marks = tuple(s for s in node.meta.get(MARKS, ()) if s != signature)
    if marks:
        node.meta[MARKS] = marks
    else:
        node.meta.pop(MARKS, None)


# --- undo ---------------------------------------------------------------------------------------------------------


def find(gm: GraphModule, signature: str) -> int | None:
    """The index of the latest commit of ``signature``."""
    return next((i for i, c in reversed(list(enumerate(commits(gm)))) if c.signature == signature), None)


@sparing()
def undo(gm: GraphModule, index: int, edited: Edited = "refuse") -> None:
    """
    Leave ``gm`` as if commit ``index`` had never been made.

    Later commits are taken back, and made again on the graph without it.  Where one of them cannot be made again (it
    needs data or chance), the commit is undone in place if the two do not touch each other.  Edits made outside of
    fxopt are kept.

    ``edited`` says what to do with parameters that the commit made and that were written to since (by training, say):
    "refuse", "carry" the edit back into the original ones where the transformation can, or "discard" it.

    Raises `Conflict`, before anything is changed, if an edit of somebody else would be lost.
    """
    commit = commits(gm)[index]

    def take_back(now: Snapshot) -> tuple[Commit, ...]:
        _revert(gm, commit, commit.active(), edited, now)
        return ()

    _rebase(gm, index, take_back, commit.active())


def undo_rewrite(gm: GraphModule, index: int, part: str, edited: Edited = "refuse") -> None:
    """Undo one rewrite of commit ``index``, alone; the rest of the commit stays."""
    undo_rewrites(gm, index, (part,), edited)


@sparing()
def undo_rewrites(gm: GraphModule, index: int, parts: Collection[str], edited: Edited = "refuse") -> None:
    """Undo those rewrites of commit ``index`` whose ids are given, at once; the rest of the commit stays."""
    commit = commits(gm)[index]
    ids = frozenset(parts) - commit.undone
    if not ids:
        return
    going = joined([p.delta for p in commit.parts if p.id in ids], commit.delta)

    def take_back(now: Snapshot) -> tuple[Commit, ...]:
        _revert(gm, commit, going, edited, now)
        return (dataclasses.replace(commits(gm)[index], undone=commit.undone | ids),)

    _rebase(gm, index, take_back, going)


@sparing()
def redo_rewrite(gm: GraphModule, index: int, part: str) -> None:
    """Make one rewrite of commit ``index`` again that was undone alone."""
    commit = commits(gm)[index]
    if part not in commit.undone:
        return
    coming = joined([p.delta for p in commit.parts if p.id == part], commit.delta)
    left = commit.undone - {part}

    def make_again(now: Snapshot) -> tuple[Commit, ...]:
        _put_on(
            gm, coming if left else whole(coming, commit.delta), f"rewrite {part} of {commit.signature}", upon=False
        )
        return (dataclasses.replace(commit, undone=left),)

    _rebase(gm, index, make_again, coming)


@sparing()
def checkout(gm: GraphModule, count: int, edited: Edited = "refuse") -> None:
    """Undo all but the first ``count`` commits; edits made outside of fxopt are kept.  ``edited``: see `undo`."""
    with atomic(gm) as now:
        edits = foreign(gm, now)
        _take_off(gm, count, edits, edited)
        found = commits(gm)  # what was carried back may be in them
        store(gm, found[:count], snapshot(gm))
        for edit in (*(d for c in found[count:] for d in c.foreign), *edits):
            _put_on(gm, edit, "an edit outside of fxopt", known=now)
        _lint(gm)
    _recompile(gm)


def _rebase(gm: GraphModule, index: int, change: Change, going: Delta) -> None:
    """Let ``change`` do its work on ``gm`` as it was after commit ``index``, and make what lies over it again."""
    found, now = commits(gm), snapshot(gm)
    later, edits = found[index + 1 :], foreign(gm, now)
    apart = all(_disjoint(going, d) for c in later for d in (*c.foreign, c.active())) and all(
        _disjoint(going, d) for d in edits
    )
    stuck = [c for c in later if c.active() and (not c.transformation.replayable or _trained(c, now))]
    if stuck and not apart:
        raise Conflict(_why_stuck(found[index], going, stuck, now))
    try:
        with atomic(gm, now):
            make = _in_place if stuck else _replay
            make(gm, index, change, edits, now)
            _lint(gm)
    except Conflict:
        if stuck or not apart:
            raise
        with atomic(gm, now):  # an edit outside of fxopt lies over a later commit, but not over this one
            _in_place(gm, index, change, edits, now)
            _lint(gm)
    _recompile(gm, None if later or edits or found[index].foreign else going)


def _replay(gm: GraphModule, index: int, change: Change, edits: tuple[Delta, ...], now: Snapshot) -> None:
    commit, later = commits(gm)[index], commits(gm)[index + 1 :]
    _take_off(gm, index + 1, edits)
    before = snapshot(gm) if later or edits else now
    left = change(before)
    mine = () if left else commits(gm)[index].foreign  # as they are where an edit was carried into them
    _take_back(gm, mine)
    store(gm, (*commits(gm)[:index], *left), after := snapshot(gm))
    for edit in mine:
        _put_on(gm, edit, f"an edit outside of fxopt, before {commit.signature},", known=now)
    moved = diff(before, snapshot(gm) if mine else after).existence() if later or edits else set()
    for c in later:
        for edit in c.foreign:
            _put_on(gm, edit, f"an edit outside of fxopt, before {c.signature},", moved, now)
        _again(gm, c, moved)
    for edit in edits:
        _put_on(gm, edit, "an edit outside of fxopt", moved, now)


def _in_place(gm: GraphModule, index: int, change: Change, edits: tuple[Delta, ...], before: Snapshot) -> None:
    commit = commits(gm)[index]
    left = change(before)
    later = commits(gm)[index + 1 :]
    if not left:
        over = [d for c in later for d in c.deltas()] + list(edits)
        over = patch.without(gm, commit.delta, diff(before, snapshot(gm)), over)
        later, edits = _dealt(later, over)
    mine = () if left else commits(gm)[index].foreign  # as they are where an edit was carried into them
    if later:
        later = (dataclasses.replace(later[0], foreign=(*mine, *later[0].foreign)), *later[1:])
    else:
        edits = (*mine, *edits)
    store(gm, (*commits(gm)[:index], *left, *later), snapshot(gm), edits)


def _dealt(later: tuple[Commit, ...], over: list[Delta]) -> tuple[tuple[Commit, ...], tuple[Delta, ...]]:
    """``later`` with the deltas ``over``, which go to its commits in order, and those that are left over."""
    rest, found = iter(over), []
    for c in later:
        between = tuple(next(rest) for _ in c.foreign)
        found.append(dataclasses.replace(c, foreign=between, delta=next(rest)))
    return tuple(found), tuple(rest)


def _take_off(gm: GraphModule, count: int, edits: Sequence[Delta], edited: Edited = "refuse") -> None:
    """Take back ``edits``, and under them all commits but the first ``count``."""
    _take_back(gm, edits)
    for index in reversed(range(count, len(commits(gm)))):
        commit = commits(gm)[index]  # as it is when its turn comes: one above may have carried an edit into it
        _revert(gm, commit, commit.active(), edited)
        _take_back(gm, commits(gm)[index].foreign)


def _take_back(gm: GraphModule, edits: Sequence[Delta]) -> None:
    for edit in reversed(edits):
        _put_on(gm, edit.inverse(), "the graph module without an edit outside of fxopt")


def _put_on(
    gm: GraphModule,
    delta: Delta,
    what: str,
    moved: Set[str] = frozenset(),
    known: Snapshot | None = None,
    upon: bool = True,
) -> None:
    problems = [f"{k} is not what it was" for k in sorted(delta.mentions() & moved)]
    if problems := problems or patch.conflicts(gm, delta):
        raise Conflict(f"{what} cannot be made again: {'; '.join(problems[:3])}; take back what builds on it first")
    patch.apply(gm, patch.onto(gm, delta, moved) if upon else delta, known, upon)


def _again(gm: GraphModule, commit: Commit, moved: set[str]) -> None:
    """Make ``commit`` again; adds to ``moved`` the names that stand for another node now."""
    _recompile(gm)
    run(gm, commit.transformation)
    fresh = _same_tensors(gm, commit, commits(gm)[-1])
    sites = [p.sites() for p in commit.parts if p.id in commit.undone] if commit.undone else []
    undone = [p for p in fresh.parts if p.id in commit.undone or any(s & p.sites() for s in sites)] if sites else []
    if undone:
        _revert(gm, fresh, joined([p.delta for p in undone], fresh.delta), "refuse")
        fresh = dataclasses.replace(fresh, undone=frozenset(p.id for p in undone))
        store(gm, (*commits(gm)[:-1], fresh), snapshot(gm))
    old, new = commit.delta.nodes, fresh.delta.nodes
    for key in {**old, **new}:
        (a, b), (x, y) = old.get(key, (None, None)), new.get(key, (None, None))
        if (a is None and b is not None) or (x is None and y is not None):
            reads = y.refs() if y is not None else ()
            if b is None or not b.same(y) or any(node_key(graph_of(key), r) in moved for r in reads):
                moved.add(key)


def _same_tensors(gm: GraphModule, old: Commit, new: Commit) -> Commit:
    """A tensor that is made again with the same content is the same object, so that optimizers stay attached."""
    slots = dict(new.delta.slots)
    for path, (before, slot) in new.delta.slots.items():
        former = old.delta.slots.get(path, (None, None))[1]
        if slot is not None and former is not None and _equal_tensors(slot.value, former.value):
            slots[path] = (before, dataclasses.replace(slot_of(slot.kind, former.value), persistent=slot.persistent))
            patch.put_slot(gm, path, dataclasses.replace(slot, value=former.value))
    new = dataclasses.replace(new, delta=dataclasses.replace(new.delta, slots=slots))
    store(gm, (*commits(gm)[:-1], new), snapshot(gm))
    return new


def _equal_tensors(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.is_mkldnn or b.is_mkldnn:
        return False
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and type(a) is type(b)
    return alike and a.stride() == b.stride() and a.requires_grad == b.requires_grad and torch.equal(a, b)


def _revert(gm: GraphModule, commit: Commit, going: Delta, edited: Edited, now: Snapshot | None = None) -> None:
    inverse = going.inverse()
    now = now or snapshot(gm)
    if problems := patch.conflicts(gm, inverse, now):
        raise Conflict(
            f"{commit.signature} cannot be undone: {'; '.join(problems[:3])}, by an edit outside of fxopt; "
            "take that edit back first"
        )
    written = patch.edited(inverse, now)
    carried: Mapping[str, torch.Tensor] = {}
    if written and edited != "discard":
        values = commit.transformation.carry(gm, going) if edited == "carry" else None
        if values is None:
            cannot = f"; {commit.signature} cannot carry an edit back" if edited == "carry" else ""
            raise Conflict(
                f"{commit.signature} made {', '.join(written)}, edited since, and undoing would lose the edit{cannot}; "
                'say edited="carry" or edited="discard"'
            )
        carried = values
    patch.apply(gm, inverse)
    for path, value in carried.items():
        if (replaced := patch.replace_tensor(gm, path, value)) is not None:
            repoint(gm, *replaced)


def _trained(commit: Commit, now: Snapshot) -> list[str]:
    return patch.edited(commit.active().inverse(), now)


def written(gm: GraphModule) -> dict[str, torch.Tensor]:
    """The parameters and buffers that commits made and that were written to since (by training, say), by path."""
    now = snapshot(gm)
    return {path: now.slots[path].value for commit in commits(gm) for path in _trained(commit, now)}


def _disjoint(a: Delta, b: Delta) -> bool:
    """Whether neither delta changed what the other changed, nor the existence of what it refers to."""
    return not (a.touched() & b.touched() or a.existence() & b.mentions() or a.mentions() & b.existence())


def _why_stuck(commit: Commit, going: Delta, stuck: Sequence[Commit], now: Snapshot) -> str:
    culprit = next((c for c in reversed(stuck) if not _disjoint(going, c.active())), stuck[-1])
    why = "cannot be made again" if not culprit.transformation.replayable else "lies over it"
    if trained := _trained(culprit, now):
        why = f"made {', '.join(trained)}, edited since, and would lose the edit"
    return f"{commit.signature} cannot be undone: {culprit.signature} {why}; undo {culprit.signature} first"


# --- the view that users hold --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewrite:
    """One independent rewrite of a commit: undone and made again alone."""

    gm: GraphModule
    index: int  # of the commit
    part: Part
    signature: str

    @property
    def id(self) -> str:
        return f"{self.signature}@{self.part.id}"

    @property
    def commit(self) -> Commit:
        """The commit that it is of; raises `UsageError` where the history has changed since this was asked for."""
        found = commits(self.gm)[self.index : self.index + 1]
        if not found or found[0].signature != self.signature or all(p.id != self.part.id for p in found[0].parts):
            raise UsageError(f"{self.id} is not where it was in the history; ask fxopt.history(gm) again")
        return found[0]

    @property
    def module_path(self) -> str:
        """The innermost module of the model's source that all its nodes come from."""
        return self.part.module_path

    @property
    def active(self) -> bool:
        return self.part.id not in self.commit.undone

    @property
    def created(self) -> tuple[str, ...]:
        return tuple(k for k, (a, _) in self.part.delta.nodes.items() if a is None)

    @property
    def removed(self) -> tuple[str, ...]:
        return tuple(k for k, (_, b) in self.part.delta.nodes.items() if b is None)

    @property
    def changed(self) -> tuple[str, ...]:
        return tuple(k for k, (a, b) in self.part.delta.nodes.items() if a is not None and b is not None)

    @property
    def source(self) -> str | None:
        """The line of the model's source that the removed or changed nodes come from; None where nothing tells."""
        for key in (*self.removed, *self.changed, *self.created):
            records = self.part.delta.nodes[key]
            root = self._root if "::" not in key else ""
            for record, meta in zip(records, self.part.delta.metas.get(key, (None, None)), strict=True):
                if record is not None and (found := source_of(meta or {}, record.op, record.target, root)):
                    return found
        return self._source_of_operands() or self._source_of_readers()

    @property
    def _root(self) -> str:
        """The name of the class that was traced; "" where the nodes know their lines themselves."""
        recorded = any("stack_trace" in n.meta for n in self.gm.graph.nodes)
        return "" if recorded else type(self.gm).__name__

    def _source_of_operands(self) -> str | None:
        """Where it only added operations: the line of what they read."""
        nodes = {n.name: n for n in self.gm.graph.nodes}
        for key in self.created if not self.removed else ():
            record = self.part.delta.nodes[key][1]
            for name in record.refs() if record is not None and "::" not in key else ():
                n = nodes.get(name)
                if n is not None and (found := source_of(n.meta, n.op, n.target, self._root)):
                    return found
        return None

    def _source_of_readers(self) -> str | None:
        """Where only tensors changed: the line that reads one of them."""
        paths = () if self.part.delta.nodes else (*self.part.delta.slots, *(m for m, _ in self.part.delta.attributes))
        for node in self.gm.graph.nodes:
            if node.op not in ("get_attr", "call_module"):
                continue
            if any(p == node.target or p.startswith(f"{node.target}.") for p in paths):
                readers = [node] if node.op == "call_module" else list(node.users)
                found = (source_of(n.meta, n.op, n.target, self._root) for n in readers)
                return next(filter(None, found), None)
        return None

    def reverse(self, edited: Edited = "refuse") -> None:
        """Undo this rewrite alone."""
        if self.active:
            undo_rewrite(self.gm, self.index, self.part.id, edited)

    def diff(self) -> Difference:
        """What it changed, side by side; empty where it is undone."""
        whole = Entry(self.gm, self.index, self.commit).diff()
        return whole.only(self.id, {*self.part.delta.nodes, *self.part.delta.metas}, set(self.part.delta.slots))

    def apply(self) -> None:
        """Make this rewrite again after it was undone alone."""
        if not self.active:
            redo_rewrite(self.gm, self.index, self.part.id)

    def __repr__(self) -> str:
        touched = f"{self._counts} nodes" if self.part.delta.nodes else self.summary
        return f"<rewrite {self.part.id}: {touched}{'' if self.active else ', undone'}>"

    @property
    def summary(self) -> str:
        """What it changed, in numbers: ``nodes: 2 removed, 1 created; tensors: 1 changed``."""
        nodes = ((self.removed, "removed"), (self.created, "created"), (self.changed, "changed"))
        found = [("nodes", ", ".join(f"{len(names)} {what}" for names, what in nodes if names))]
        pairs = self.part.delta.tensors().values()
        tensors = (
            (sum(b is None for _, b in pairs), "removed"),
            (sum(a is None for a, _ in pairs), "created"),
            (sum(a is not None and b is not None for a, b in pairs), "changed"),
        )
        found.append(("tensors", ", ".join(f"{count} {what}" for count, what in tensors if count)))
        others = {p for p, (a, b) in self.part.delta.slots.items() if "module" in {s.kind for s in (a, b) if s}}
        others |= {path for path, _ in self.part.delta.attributes}
        found.append(("modules", f"{len(others)} changed" if others else ""))
        told = "; ".join(f"{what}: {said}" for what, said in found if said)
        return told or "nodes: none, only their order"

    @property
    def _counts(self) -> str:
        return f"-{len(self.removed)} +{len(self.created)} ~{len(self.changed)}"

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("", "nodes", title=Text(self.id + ("" if self.active else " (undone)")), title_justify="left")
        for name in ("removed", "created", "changed"):
            if nodes := getattr(self, name):
                table.add_row(name, ", ".join(nodes))
        if tensors := self.part.delta.tensors():
            table.add_row("tensors", ", ".join(tensors))
        if self.source:
            table.add_row("source", Text(self.source))
        return table

    def _repr_html_(self) -> str:
        return to_html(self)


@dataclass(frozen=True)
class Entry:
    """A commit, bound to its graph module."""

    gm: GraphModule
    index: int
    commit: Commit

    @property
    def transformation(self) -> Any:
        return self.commit.transformation

    @property
    def signature(self) -> str:
        return self.commit.signature

    @property
    def delta(self) -> Delta:
        return self.commit.delta

    @property
    def rewrites(self) -> tuple[Rewrite, ...]:
        return tuple(Rewrite(self.gm, self.index, p, self.signature) for p in self.commit.parts)

    def reverse(self, edited: Edited = "refuse") -> None:
        """Leave the graph module as if this commit had never been made."""
        self._check()
        undo(self.gm, self.index, edited)

    def _check(self) -> None:
        if self.index >= len(commits(self.gm)) or commits(self.gm)[self.index] is not self.commit:
            raise UsageError(f"{self.signature} is not where it was in the history; ask fxopt.history(gm) again")

    def diff(self) -> Difference:
        """What it changed, side by side; without what was undone of it."""
        from fxopt.difference import of_commit

        self._check()
        return of_commit(self.gm, self.index)

    def __repr__(self) -> str:
        parts, undone = len(self.commit.parts), len(self.commit.undone)
        did = f"{parts} rewrite{'s' * (parts != 1)}" if parts else "did nothing"
        return f"<commit {self.index}: {self.signature}, {did}{f', {undone} undone' if undone else ''}>"

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("rewrite", "nodes", "source", title=Text(repr(self)[1:-1]), title_justify="left")
        for rewrite in self.rewrites:
            touched = rewrite._counts if rewrite.part.delta.nodes else rewrite.summary
            said = (rewrite.part.id, touched, rewrite.source or "")
            table.add_row(*map(Text, said), style=None if rewrite.active else "dim strike")
        return table

    def _repr_html_(self) -> str:
        return to_html(self)


class History(Sequence[Entry]):
    """The commits of a graph module, oldest first."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm

    def _entries(self) -> list[Entry]:
        return [Entry(self.gm, i, c) for i, c in enumerate(commits(self.gm))]

    @overload
    def __getitem__(self, index: int) -> Entry: ...

    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...

    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        return self._entries()[index]

    def __len__(self) -> int:
        return len(commits(self.gm))

    def checkout(self, count: int) -> GraphModule:
        """Undo all but the first ``count`` commits."""
        if not 0 <= count <= len(self):
            raise UsageError(f"checkout({count}) of a history of {len(self)} commits; give 0 to {len(self)}")
        checkout(self.gm, count)
        return self.gm

    def undo(self, what: int | str | Recordable, edited: Edited = "refuse") -> GraphModule:
        """Undo one commit, by its index, its signature or its transformation."""
        if isinstance(what, int):
            index: int | None = range(len(self))[what] if -len(self) <= what < len(self) else None
        else:
            index = find(self.gm, what if isinstance(what, str) else what.signature)
        if index is None:
            known = ", ".join(c.signature for c in commits(self.gm)) or "nothing"
            raise UsageError(f"{what} is not in the history, which holds {known}")
        undo(self.gm, index, edited)
        return self.gm

    def __repr__(self) -> str:
        return "\n".join(map(repr, self._entries())) or "<empty history>"

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("#", "transformation", "rewrites", "nodes", "parameters", title="history")
        for entry in self._entries():
            nodes = entry.commit.delta.nodes.values()
            born, dead = sum(a is None for a, _ in nodes), sum(b is None for _, b in nodes)
            tensors = entry.commit.delta.tensors().values()
            made, gone = sum(b is not None for _, b in tensors), sum(a is not None for a, _ in tensors)
            undone = f" ({len(entry.commit.undone)} undone)" if entry.commit.undone else ""
            table.add_row(
                str(entry.index),
                Text(entry.signature),
                f"{len(entry.commit.parts)}{undone}",
                f"-{dead} +{born}",
                f"-{gone} +{made}",
            )
        return table

    def _repr_html_(self) -> str:
        return to_html(self)


def history(gm: nn.Module) -> History:
    """The history of ``gm``; empty if no transformation was applied to it."""
    if not isinstance(gm, GraphModule):
        raise UsageError(f"history of a {type(gm).__name__}, expected a torch.fx.GraphModule; capture the model first")
    return History(gm)
