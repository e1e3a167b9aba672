"""Two graphs that compute something different, cut down to the smallest part that still does.

Both graphs are run once on the failing inputs, every value on the way kept.  A part begins where the graphs begin to
differ, takes what flows in there as its inputs, and ends at the first value that fails by itself in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only

from fxopt.delta import Ref, Snapshot, share, snapshot
from fxopt.isolation import own_copies, quiet
from fxopt.samples import InputSet
from fxopt.search import Verdict, halve
from fxopt.snapshot import Record

Pair = tuple[str | None, str | None]  # a value of the graph before, and the one that takes its place after
Fails = Callable[[GraphModule, GraphModule, tuple[Any, ...]], bool]
GUARDS = "_guards_fn"  # torch.export's check of the input shapes; it computes nothing
_KEPT = ("nn_module_stack", "stack_trace")


@dataclass(frozen=True)
class Cut:
    """A part of two graphs: each takes ``inputs`` positionally and returns a tuple."""

    before: GraphModule
    after: GraphModule
    inputs: tuple[Any, ...]
    names: tuple[str, ...]  # of the inputs: the nodes whose values they are
    whole: bool = False

    @property
    def nodes(self) -> tuple[int, int]:
        """How many operations each has."""
        before, after = (sum(n.op.startswith("call_") for n in gm.graph.nodes) for gm in (self.before, self.after))
        return before, after


def reduce(
    before: GraphModule,
    after: GraphModule,
    case: InputSet,
    fails: Fails,
    by: Literal["values", "ends", "both"] = "values",
    most: int = 24,
    whole: bool = True,
) -> Cut | None:
    """
    The smallest part of ``before`` and ``after``, as `_Scene.candidates` orders them, for which ``fails`` holds.

    ``by``: where a part may end; "values" where the two first differ in value, then later; "ends" at all the ends of
    what was rewritten, where the failure is no value; "both" there first.  At most ``most`` are tried, and last all of
    both graphs, if ``whole``; None if not even that fails.
    """
    scene = _Scene(Trace.of(before, case), Trace.of(after, case))
    ends = [scene.replaced()] if by != "values" else []
    values = [[p] for p in scene.candidates()] if by != "ends" else []
    cuts = [scene.cut(scene.effects(), returned=False)] if by == "values" else []
    for cut in itertools.chain(cuts, map(scene.cut, [*ends, *_spread(values, most - len(ends))])):
        if cut is not None and fails(cut.before, cut.after, cut.inputs):
            return cut
    everything = scene.whole() if whole else None
    return everything if everything and fails(everything.before, everything.after, everything.inputs) else None


def shortest(gm: GraphModule, fails: Callable[[GraphModule], bool]) -> GraphModule:
    """The shortest run of operations of ``gm`` for which ``fails`` holds, by halving from either end; else ``gm``."""
    names = [n.name for n in gm.graph.nodes if n.op.startswith("call_") and n.target != GUARDS]

    def asked(first: int, last: int) -> Verdict:
        return "bad" if fails(_run_of(gm, names[first:last])) else "good"

    if not names or asked(0, len(names)) == "good":
        return gm
    last = halve(0, len(names), lambda k: asked(0, k))[1]
    left = halve(0, last, lambda k: asked(last - k, last))[1]
    return _run_of(gm, names[last - left : last])


def _run_of(gm: GraphModule, names: Sequence[str]) -> GraphModule:
    region = set(names)
    nodes = [n for n in gm.graph.nodes if n.name in region]
    inputs = dict.fromkeys(i.name for n in nodes for i in n.all_input_nodes if i.name not in region | _state(gm))
    outputs = [n.name for n in nodes if not n.users or any(u.name not in region for u in n.users)]
    part = _part(gm, region, list(inputs), outputs)
    source = {n.name: n for n in gm.graph.nodes}
    for node in part.graph.nodes:  # a transformation may look at shapes; those with symbols mean nothing without theirs
        val = source[node.name].meta.get("val") if node.op == "placeholder" else None
        if isinstance(val, Tensor) and all(isinstance(size, int) for size in val.shape):
            node.meta["val"] = val
    return part


def _state(gm: GraphModule) -> set[str]:
    return {n.name for n in gm.graph.nodes if n.op == "get_attr"}


def _spread(found: list[list[Pair]], most: int) -> list[list[Pair]]:
    """The first of many, then fewer and fewer, and the last."""
    places, place, step = [], 0, 1
    while place < len(found):
        places.append(place)
        if len(places) > most // 2:
            step = max(1, (len(found) - place) // (most // 2))
        place += step
    if found and places[-1] != len(found) - 1:
        places.append(len(found) - 1)
    return [found[i] for i in places]


# ---------------------------------------------------------------------------------------------------------------- a run


@dataclass
class Trace:
    """What one run of a graph made of its inputs: values by node, and what each depends on, through memory too."""

    gm: GraphModule
    values: dict[str, Any] = field(default_factory=dict)
    feeds: dict[str, set[str]] = field(default_factory=dict)  # the nodes that a node depends on
    storages: dict[str, set[int]] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)  # storages that some node wrote to
    writers: list[str] = field(default_factory=list)
    raised: str | None = None  # the node that did

    @classmethod
    def of(cls, gm: GraphModule, case: InputSet) -> Trace:
        """Run ``gm`` on a copy of the inputs; nothing that it writes stays."""
        trace = cls(share(gm))
        given = _leaves(trace.gm, case.clone())
        with quiet(0, [t for t in given if isinstance(t, Tensor)]), own_copies(trace.gm), torch.no_grad():
            runner = _Runner(trace)
            try:
                runner.run(*given, enable_io_processing=False)
            except Exception:
                if trace.raised is None:
                    raise
        return trace


class _Runner(Interpreter):
    def __init__(self, trace: Trace) -> None:
        super().__init__(trace.gm, garbage_collect_values=True)
        self.extra_traceback = False
        self._trace = trace
        self._last: dict[int, str] = {}  # the last node that wrote to a storage
        self._seen: dict[int, StorageWeakRef] = {}  # as long as they are held, no new storage takes the place of one

    def run_node(self, n: Node) -> Any:
        trace, name = self._trace, n.name
        read = [self.env[i] for i in n.all_input_nodes if i in self.env]
        tensors = [t for t in tree_leaves(read) if isinstance(t, Tensor)]
        memory = {id(t): self._storage(t) for t in tensors}
        trace.feeds[name] = {i.name for i in n.all_input_nodes}
        trace.feeds[name] |= {self._last[s] for s in memory.values() if s in self._last}
        versions = [_version(t) for t in tensors]
        try:
            result = super().run_node(n)
        except Exception:
            trace.raised = name
            raise
        for tensor, version in zip(tensors, versions, strict=True):
            if _version(tensor) != version and (storage := memory[id(tensor)]):
                self._last[storage] = name
                trace.written.add(storage)
                if name not in trace.writers:
                    trace.writers.append(name)
        if n.op != "output":
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            trace.storages[name] = {s for t in made if (s := self._storage(t))}
            trace.values[name] = result if n.op == "get_attr" else _copied(result)
        return result

    def _storage(self, tensor: Tensor) -> int:
        """A number for the tensor's memory: not its address, which the next tensor may get once this one is freed."""
        if tensor.layout is not torch.strided or tensor.is_mkldnn or tensor.device.type == "meta":
            return 0
        held = StorageWeakRef(tensor.untyped_storage())
        self._seen.setdefault(held.cdata, held)
        return int(held.cdata)


def _copied(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach().clone() if t.layout is torch.strided else t, value)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _leaves(gm: GraphModule, case: InputSet) -> list[Any]:
    """The values of the placeholders: the graph's own calling convention takes the inputs apart."""
    taker = share(gm)
    placeholders = [n for n in taker.graph.nodes if n.op == "placeholder"]
    for node in reversed(list(taker.graph.nodes)):
        if node.op != "placeholder":
            taker.graph.erase_node(node)
    taker.graph.output(tuple(placeholders))
    info = getattr(taker.graph._codegen, "pytree_info", None)
    if info is not None:
        taker.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(info.orig_args, info.in_spec, None)))
    taker.recompile()
    return list(case.call(taker))


# ---------------------------------------------------------------------------------------------------- where they differ


class _Scene:
    """Both runs, and the nodes whose values may differ between them."""

    def __init__(self, old: Trace, new: Trace) -> None:
        self.old, self.new = old, new
        self._before, self._after = snapshot(old.gm), snapshot(new.gm)
        self.changed = [*_changed(self._before, self._after), *_changed(self._after, self._before)]
        self.open = _downstream(old, self.changed) | _downstream(new, self.changed)
        for trace in (old, new):  # what shares memory with something that is written to has to be made inside
            inside = {s for name in self.open for s in trace.storages.get(name, ()) if s in trace.written}
            for name in trace.writers:
                if name in self.open:
                    inside |= {s for f in trace.feeds[name] for s in trace.storages.get(f, ()) if s in trace.written}
            nodes = {n.name: n for n in trace.gm.graph.nodes}
            self.open |= {
                name
                for name, held in trace.storages.items()
                if held & inside and nodes[name].op not in ("placeholder", "get_attr")
            }

    def replaced(self) -> list[Pair]:
        """What unchanged operations read in another place after: the ends of what was rewritten."""
        found: list[Pair] = []
        for key in self.changed:
            a, b = self._before.record(key), self._after.record(key)
            if a is not None and b is not None and (a.op, a.target) == (b.op, b.target) and "::" not in key:
                found += [p for p in _other_reads(a, b) if p not in found]
        return found

    def candidates(self) -> list[Pair]:
        """Values that take each other's place and differ, the first in the graph first."""
        state = {n.name for n in self.new.gm.graph.nodes if n.op == "get_attr"}  # what reads it shows more
        common = [(n, n) for n in self.old.values if n in self.open and n in self.new.values and n not in state]
        ends = [p for p in zip(_results(self.old.gm), _results(self.new.gm), strict=False) if p[0] in self.open]
        pairs: list[Pair] = list(dict.fromkeys([*self.replaced(), *common, *ends]))
        place = {name: i for i, name in enumerate(self.new.feeds)}
        if self.new.raised is not None:
            return [(None, self.new.raised)]
        pairs.sort(key=lambda p: place.get(str(p[1]), 0))
        return [p for p in pairs if self._differ(*p)]

    def _differ(self, a: str | None, b: str | None) -> bool:
        if a not in self.old.values or b not in self.new.values:
            return False
        return not _alike(self.old.values[a], self.new.values[b])

    def effects(self) -> list[Pair]:
        """The rewritten operations that write to memory: what they leave there may be all that differs."""
        found: list[Pair] = [(n, None) for n in self.old.writers if n in self.changed]
        return found + [(None, n) for n in self.new.writers if n in self.changed]

    def cut(self, ends: Sequence[Pair], returned: bool = True) -> Cut | None:
        """
        What lies between the first differences and those ends, which it returns if ``returned``.

        None without an end, and where an input was never computed, or is no tensor or number.
        """
        if not ends:
            return None
        last = [p[0] for p in ends if p[0] is not None], [p[1] for p in ends if p[1] is not None]
        if returned and not last[0]:  # it raises after: what stood there before
            last = [n for n in self.changed if n in self._before.raw and n != "output"], last[1]
        direct = [n for out in last for n in out if n not in self.open] if returned else []
        values = self.old.values | {k: v for k, v in self.new.values.items() if k not in self.old.values}
        inside = self.open
        while True:
            regions = _region(self.old, last[0], inside), _region(self.new, last[1], inside)
            names = list(dict.fromkeys([*direct, *_inputs(self.old, regions[0]), *_inputs(self.new, regions[1])]))
            lists = {n for n in names if n in values and not _can_be_input(values[n])}  # they are made inside
            if not lists - inside:
                break
            inside = inside | lists
        if any(n not in values or not _can_be_input(values[n]) for n in names):
            return None
        made = [
            _part(trace.gm, region, names, out if returned else [])
            for trace, region, out in zip((self.old, self.new), regions, last, strict=True)
        ]
        return Cut(made[0], made[1], tuple(values[n] for n in names), tuple(names))

    def whole(self) -> Cut:
        """All of both graphs, from their inputs to their results."""
        names = [n.name for n in self.old.gm.graph.nodes if n.op == "placeholder"]
        made = []
        for trace in (self.old, self.new):
            inner = {n.name for n in trace.gm.graph.nodes if n.op not in ("placeholder", "output")}
            inner -= {n.name for n in trace.gm.graph.nodes if n.target == GUARDS}
            made.append(_part(trace.gm, inner, names, _results(trace.gm)))
        return Cut(made[0], made[1], tuple(self.old.values[n] for n in names), tuple(names), whole=True)


def _changed(here: Snapshot, there: Snapshot) -> Iterator[str]:
    """The nodes that are otherwise, or not at all, in the other graph; or that read another tensor there."""
    differing = {p for p, s in here.slots.items() if s.kind != "module" and not s.entry_same(there.slots.get(p))}
    for key in here.raw:
        record, other = here.record(key), there.record(key)
        assert record is not None
        if "::" in key or record.target == GUARDS:
            continue
        target = str(record.target)
        state = record.op in ("get_attr", "call_module") and any(
            p == target or p.startswith(f"{target}.") for p in differing
        )
        inner = record.op == "call_module" and _inner_differs(here, there, target)
        if state or inner or not record.same(other):
            yield key


def _inner_differs(here: Snapshot, there: Snapshot, path: str) -> bool:
    keys = [k for k in {**here.raw, **there.raw} if k.startswith((f"{path}::", f"{path}."))]
    for key in keys:
        record = here.record(key)
        if record is None or not record.same(there.record(key)):
            return True
    held = [k for k in {**here.attributes, **there.attributes} if k[0] == path or k[0].startswith(f"{path}.")]
    for k in held:
        value = here.attributes.get(k)
        if value is None or not value.same(there.attributes.get(k)):
            return True
    return False


def _downstream(trace: Trace, changed: list[str]) -> set[str]:
    found = set(changed)
    for name, feeds in trace.feeds.items():  # in order
        if feeds & found:
            found.add(name)
    return found


def _region(trace: Trace, ends: list[str], inside: set[str]) -> set[str]:
    """What of ``inside`` those ends depend on."""
    found = {n for n in ends if n in inside}
    waiting = list(found)
    while waiting:
        for name in trace.feeds.get(waiting.pop(), ()):
            if name in inside and name not in found:
                found.add(name)
                waiting.append(name)
    return found


def _other_reads(a: Record, b: Record) -> Iterator[Pair]:
    yield from _pairs((a.args, a.kwargs), (b.args, b.kwargs))


def _pairs(a: Any, b: Any) -> Iterator[Pair]:
    if isinstance(a, Ref) and isinstance(b, Ref):
        if a.name != b.name:
            yield a.name, b.name
    elif isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b):
        for x, y in zip(a, b, strict=True):
            yield from _pairs(x, y)
    elif isinstance(a, dict) and isinstance(b, dict):
        for k in a.keys() & b.keys():
            yield from _pairs(a[k], b[k])


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.dtype, a.shape, a.layout, a.device) != (b.dtype, b.shape, b.layout, b.device):
            return False
        if a.layout is not torch.strided:
            return torch.equal(a.to_dense(), b.to_dense())
        same = (a == b) | ((a != a) & (b != b))
        return a.stride() == b.stride() and bool(same.all())
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_alike, a, b))
    return type(a) is type(b) and bool(a == b)


def _results(gm: GraphModule) -> list[str]:
    return [n.name for n in gm.graph.output_node().all_input_nodes]


# --------------------------------------------------------------------------------------------------------- a part of it


def _can_be_input(value: Any) -> bool:
    plain = isinstance(value, bool | int | float | None)
    return plain or (isinstance(value, Tensor) and value.layout is torch.strided and not value.is_mkldnn)


def _inputs(trace: Trace, region: set[str]) -> list[str]:
    nodes = {n.name: n for n in trace.gm.graph.nodes}
    found = [i for name in trace.feeds if name in region for i in nodes[name].all_input_nodes]
    return list(dict.fromkeys(i.name for i in found if i.name not in region and i.op != "get_attr"))


def _part(gm: GraphModule, region: set[str], inputs: list[str], outputs: list[str]) -> GraphModule:
    """A graph module with the nodes of ``region`` in their order, and the tensors and modules that they read."""
    graph = Graph()
    source = {n.name: n for n in gm.graph.nodes}
    made: dict[Node, Node] = {}
    for name in inputs:
        node = graph.placeholder(name)
        if name in source:
            made[source[name]] = node
            node.meta.update({k: v for k, v in source[name].meta.items() if k in _KEPT})
    read = {i for name in region for i in source[name].all_input_nodes} if region else set()
    for node in gm.graph.nodes:
        state = node.op == "get_attr" and (node in read or node.name in region)
        if (state or node.name in region) and node not in made and node.op != "placeholder":
            made[node] = graph.node_copy(node, lambda n: made[n])
            made[node].meta.pop("fxopt", None)
    graph.output(tuple(made[source[n]] for n in outputs if source[n] in made))
    part = GraphModule(gm, graph)
    part.training = gm.training
    return part
