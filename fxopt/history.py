"""The history of a graph module: one commit per transformation, undone in any order, whole or in part.

The history is an immutable tuple of commits.  It stands in ``gm.meta``, which follows ``copy.deepcopy``, and in a plain
attribute, which follows pickling.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, overload

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxopt import delta as deltas
from fxopt.delta import MARKS, Delta, Part, Snapshot, Watch, diff, graphs, own, snapshot
from fxopt.errors import Conflict, FxoptError, IrreversibleEdit, TransformationError, UsageError

_KEY = "fxopt.history"
_ATTRIBUTE = "_fxopt_history"

Edited = Literal["refuse", "carry", "discard"]


class Recordable(Protocol):
    """What the history needs to know of a transformation."""

    replayable: bool

    @property
    def signature(self) -> str: ...

    def transform(self, graph_module: GraphModule) -> Any: ...

    def carry(self, gm: GraphModule, rewrite: Delta) -> Mapping[str, torch.Tensor] | None: ...


@dataclass(frozen=True)
class Commit:
    """One transformation and what it changed; ``undone`` are the ids of the rewrites taken back one by one."""

    transformation: Recordable
    delta: Delta
    undone: frozenset[str] = frozenset()

    @property
    def signature(self) -> str:
        return self.transformation.signature

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        return deltas.split(self.delta)

    def active(self) -> Delta:
        """What of the delta stands."""
        if not self.undone:
            return self.delta
        return _joined([p.delta for p in self.parts if p.id not in self.undone], self.delta)

    def __deepcopy__(self, memo: dict[int, Any]) -> Commit:
        import copy

        return Commit(self.transformation, copy.deepcopy(self.delta, memo), self.undone)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def _joined(parts: Sequence[Delta], whole: Delta) -> Delta:
    """The deltas of some parts of ``whole`` as one."""
    found = Delta(orders=whole.orders if parts else {}, entries=whole.entries if parts else {})
    for part in parts:
        found.nodes.update(part.nodes)
        found.metas.update(part.metas)
        found.slots.update(part.slots)
        found.attributes.update(part.attributes)
        found.codegens.update(part.codegens)
    return found


def commits(gm: GraphModule) -> tuple[Commit, ...]:
    """The commits of ``gm``, oldest first."""
    found: tuple[Commit, ...] | None = gm.meta.get(_KEY)
    return found if found is not None else gm.__dict__.get(_ATTRIBUTE, ())


def _store(gm: GraphModule, found: tuple[Commit, ...]) -> None:
    gm.meta[_KEY] = found
    gm.__dict__[_ATTRIBUTE] = found


@contextlib.contextmanager
def atomic(gm: GraphModule) -> Iterator[Snapshot]:
    """Run the body; if it raises, put ``gm`` and its history back as they were."""
    before, known = snapshot(gm), commits(gm)
    try:
        yield before
    except BaseException:
        made = commits(gm)
        deltas.apply(gm, diff(before, snapshot(gm)).inverse())
        _store(gm, known)
        _unmark_absent(gm, made)
        _recompile(gm)
        raise


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
    before = snapshot(gm)
    watch = Watch(before)
    try:
        with watch:
            for inner in graphs(gm).values():
                _transform(inner, transformation)
        if edited := watch.edited():
            raise IrreversibleEdit(
                f"{', '.join(edited)} was modified in place; assign a new parameter instead, so that it can be undone"
            )
        if lint_and_recompile:
            _lint(gm)
        delta = diff(before, snapshot(gm))
    except BaseException as error:
        watch.restore()
        deltas.apply(gm, diff(before, snapshot(gm)).inverse())
        _recompile(gm)
        if not isinstance(error, Exception):  # an interrupt
            raise
        ran = ", ".join(c.signature for c in commits(gm)) or "nothing"
        kind = type(error) if isinstance(error, TransformationError) else TransformationError
        text = str(error) if isinstance(error, FxoptError) else f"{type(error).__name__}: {error}"
        raise kind(f"{transformation.signature} failed after {ran}: {text}") from error
    if delta and lint_and_recompile:
        _recompile(gm, delta)
    _mark(gm, delta, transformation.signature)
    _store(gm, (*commits(gm), Commit(transformation, delta)))
    return gm


def _transform(gm: GraphModule, transformation: Recordable) -> None:
    result = transformation.transform(gm)
    if result is not None and result is not gm:
        raise TransformationError(
            f"transform returned {type(result).__name__} {result!r:.60}, expected the graph module it was given; "
            "edit the graph module in place"
        )


def _lint(gm: GraphModule) -> None:
    for inner in graphs(gm).values():
        inner.graph.lint()


def _recompile(gm: GraphModule, delta: Delta | None = None) -> None:
    touched = None if delta is None else {deltas.graph_of(k) for k in delta.nodes} | {*delta.orders, *delta.codegens}
    for path, inner in graphs(gm).items():
        if touched is None or path in touched:
            inner.recompile()


def _mark(gm: GraphModule, delta: Delta, signature: str) -> None:
    for node in deltas.touched_nodes(gm, delta):
        mark(node, signature)


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


def _unmark_absent(gm: GraphModule, former: Sequence[Commit]) -> None:
    """Take the marks back of those of the ``former`` commits whose signature stands in the history no more."""
    gone = {c.signature for c in former} - {c.signature for c in commits(gm)}
    for inner in graphs(gm).values() if gone else ():
        for node in inner.graph.nodes:
            for signature in gone.intersection(node.meta.get(MARKS, ())):
                unmark(node, signature)


# --- undo ---------------------------------------------------------------------------------------------------------


def find(gm: GraphModule, signature: str) -> int | None:
    """The index of the latest commit of ``signature``."""
    return next((i for i, c in reversed(list(enumerate(commits(gm)))) if c.signature == signature), None)


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
    found = commits(gm)
    with atomic(gm):
        _undo(gm, found, index, frozenset(p.id for p in found[index].parts), edited, drop=True)
        _unmark_absent(gm, found)
        _lint(gm)
    _recompile(gm)


def undo_rewrite(gm: GraphModule, index: int, part: str, edited: Edited = "refuse") -> None:
    """Undo one rewrite of commit ``index``, alone; the rest of the commit stays."""
    found = commits(gm)
    if part in found[index].undone:
        return
    with atomic(gm):
        _undo(gm, found, index, frozenset({part}), edited, drop=False)
        _lint(gm)
    _recompile(gm)


def redo_rewrite(gm: GraphModule, index: int, part: str) -> None:
    """Make one rewrite of commit ``index`` again that was undone alone."""
    found = commits(gm)
    commit = found[index]
    if part not in commit.undone:
        return
    again = dataclasses.replace(commit, undone=commit.undone - {part})
    with atomic(gm):
        later = found[index + 1 :]
        _take_back(gm, later, "refuse")
        _forward(gm, next(p for p in commit.parts if p.id == part).delta, f"rewrite {part} of {commit.signature}")
        _store(gm, (*found[:index], again))
        _mark(gm, again.active(), commit.signature)
        _replay(gm, later)
        _lint(gm)
    _recompile(gm)


def _undo(
    gm: GraphModule, found: tuple[Commit, ...], index: int, parts: frozenset[str], edited: Edited, drop: bool
) -> None:
    commit, earlier, later = found[index], found[:index], found[index + 1 :]
    left = () if drop else (dataclasses.replace(commit, undone=commit.undone | parts),)
    going = commit.active() if drop else _joined([p.delta for p in commit.parts if p.id in parts], commit.delta)
    later_changes = [c for c in later if c.active()]
    if not later_changes:
        _revert(gm, commit, going, edited)
        _store(gm, (*earlier, *left, *later))
        return
    stuck = [c for c in later_changes if not c.transformation.replayable or _trained(gm, c)]
    if not stuck:
        _take_back(gm, later, edited)
        _revert(gm, commit, going, edited)
        _store(gm, (*earlier, *left))
        _replay(gm, later)
        return
    if entangled := [c for c in later_changes if not _disjoint(going, c.active())]:
        why = "cannot be made again" if not entangled[-1].transformation.replayable else "lies over it"
        if trained := _trained(gm, entangled[-1]):
            why = f"made {', '.join(trained)}, edited since, and would lose the edit"
        raise Conflict(
            f"{commit.signature} cannot be undone: {entangled[-1].signature} {why}; undo {entangled[-1].signature} first"
        )
    _revert(gm, commit, going, edited)
    _store(gm, (*earlier, *left, *later))


def _trained(gm: GraphModule, commit: Commit) -> list[str]:
    return deltas.edited(commit.active().inverse(), snapshot(gm))


def _disjoint(a: Delta, b: Delta) -> bool:
    """Whether neither delta changed what the other changed, nor the existence of what it refers to."""
    return not (a.touched() & b.touched() or a.existence() & b.mentions() or a.mentions() & b.existence())


def _take_back(gm: GraphModule, later: Sequence[Commit], edited: Edited) -> None:
    for commit in reversed(later):
        _revert(gm, commit, commit.active(), edited)


def _replay(gm: GraphModule, later: Sequence[Commit]) -> None:
    for commit in later:
        run(gm, commit.transformation)
        fresh = commits(gm)[-1]
        _keep_identity(gm, commit.delta, fresh.delta)
        fresh = Commit(fresh.transformation, diff_rebased(fresh.delta, commit.delta, gm))
        undone = frozenset(p.id for p in fresh.parts if p.id in commit.undone)
        if undone:
            _revert(gm, fresh, _joined([p.delta for p in fresh.parts if p.id in undone], fresh.delta), "refuse")
        _store(gm, (*commits(gm)[:-1], dataclasses.replace(fresh, undone=undone)))


def _keep_identity(gm: GraphModule, old: Delta, new: Delta) -> None:
    """A tensor that is made again with the same content is the same object, so that optimizers stay attached."""
    for path, (_, slot) in new.slots.items():
        former = old.slots.get(path, (None, None))[1]
        if slot is None or former is None or not _equal_tensors(slot.value, former.value):
            continue
        deltas.put_slot(gm, path, dataclasses.replace(slot, value=former.value))


def _equal_tensors(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.is_mkldnn or b.is_mkldnn:
        return False
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and type(a) is type(b)
    return alike and a.stride() == b.stride() and a.requires_grad == b.requires_grad and torch.equal(a, b)


def diff_rebased(new: Delta, old: Delta, gm: GraphModule) -> Delta:
    """``new`` with the objects that `_keep_identity` put back in place of the new ones."""
    now = snapshot(gm)
    slots = {}
    for path, (before, after) in new.slots.items():
        held = now.slots.get(path)
        slots[path] = (before, held if after is not None and held is not None else after)
    return dataclasses.replace(new, slots=slots)


def _revert(gm: GraphModule, commit: Commit, going: Delta, edited: Edited) -> None:
    inverse = going.inverse()
    now = snapshot(gm)
    if problems := deltas.conflicts(gm, inverse, now):
        raise Conflict(
            f"{commit.signature} cannot be undone: {'; '.join(problems[:3])}, by an edit outside of fxopt; "
            "take that edit back first"
        )
    written = deltas.edited(inverse, now)
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
    deltas.apply(gm, inverse)
    for path, value in carried.items():
        deltas.replace_tensor(gm, path, value)


def _forward(gm: GraphModule, delta: Delta, what: str) -> None:
    if problems := deltas.conflicts(gm, delta):
        raise Conflict(f"{what} cannot be made again: {'; '.join(problems[:3])}")
    deltas.apply(gm, delta)


def source_line(trace: str) -> str:
    """The innermost line of a ``stack_trace`` that is not torch's own: ``file.py:12: the code``."""
    found = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', trace)
    own = [f for f in found if "/torch/" not in f[0]] or found
    if not own:
        return trace.strip().splitlines()[-1].strip()
    file, line, code = own[-1]
    return f"{file.rpartition('/')[2]}:{line}: {code.strip()}"


# --- the view that users hold --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewrite:
    """One independent rewrite of a commit: undone and made again alone."""

    gm: GraphModule
    index: int  # of the commit
    part: Part

    @property
    def id(self) -> str:
        return f"{commits(self.gm)[self.index].signature}@{self.part.id}"

    @property
    def module_path(self) -> str:
        """The innermost module of the model's source that all its nodes come from."""
        return self.part.module_path

    @property
    def active(self) -> bool:
        return self.part.id not in commits(self.gm)[self.index].undone

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
        """The line of the model's source that the removed or changed nodes come from."""
        for key in (*self.removed, *self.changed, *self.created):
            for meta in self.part.delta.metas.get(key, (None, None)):
                if trace := (meta or {}).get("stack_trace"):
                    return source_line(str(trace))
        return None

    def reverse(self, edited: Edited = "refuse") -> None:
        """Undo this rewrite alone."""
        undo_rewrite(self.gm, self.index, self.part.id, edited)

    def apply(self) -> None:
        """Make this rewrite again after it was undone alone."""
        redo_rewrite(self.gm, self.index, self.part.id)

    def __repr__(self) -> str:
        state = "" if self.active else ", undone"
        counts = f"-{len(self.removed)} +{len(self.created)} ~{len(self.changed)} nodes"
        return f"<rewrite {self.part.id}: {counts}{state}>"


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
        return tuple(Rewrite(self.gm, self.index, p) for p in self.commit.parts)

    def reverse(self, edited: Edited = "refuse") -> None:
        """Leave the graph module as if this commit had never been made."""
        if self.index >= len(commits(self.gm)) or commits(self.gm)[self.index] is not self.commit:
            raise UsageError(f"{self.signature} is not where it was in the history; ask fxopt.history(gm) again")
        undo(self.gm, self.index, edited)

    def __repr__(self) -> str:
        parts, undone = len(self.commit.parts), len(self.commit.undone)
        did = f"{parts} rewrite{'s' * (parts != 1)}" if parts else "did nothing"
        return f"<commit {self.index}: {self.signature}, {did}{f', {undone} undone' if undone else ''}>"


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
        with atomic(self.gm):
            found = commits(self.gm)
            _take_back(self.gm, found[count:], "refuse")
            _store(self.gm, found[:count])
            _unmark_absent(self.gm, found)
        _recompile(self.gm)
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
                str(entry.index), entry.signature, f"{len(entry.commit.parts)}{undone}", f"-{dead} +{born}", f"-{gone} +{made}"
            )
        return table

    def _repr_html_(self) -> str:
        return to_html(self)


def to_html(renderable: Any) -> str:
    """What rich would print, as HTML for a notebook."""
    import io

    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=120)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format="<pre style='font-family:monospace;line-height:1.25'>{code}</pre>")


def history(gm: nn.Module) -> History:
    """The history of ``gm``; empty if no transformation was applied to it."""
    if not isinstance(gm, GraphModule):
        raise UsageError(f"history of a {type(gm).__name__}, expected a torch.fx.GraphModule; capture the model first")
    return History(gm)


