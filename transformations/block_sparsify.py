"""Linear layers by name keep only some blocks of their weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils.weak import WeakIdKeyDictionary

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.delta import Delta, Ref, graphs
from fxopt.errors import Conflict, UsageError
from fxopt.history import Edited, commits, find
from fxopt.kernels import semi_structured
from fxopt.kernels.block_linear import to_dense
from fxopt.ops import Attr
from fxopt.pattern import Constant, Match, Miss
from fxopt.snapshot import graph_of, node_key, path_in
from fxopt.sparse.block_linear import BlockSparseLinear
from fxopt.sparse.block_patcher import call, evaluating
from fxopt.sparse.block_plan import Plan, Planner, Spec, check_all_matched, hook_of, left, matching, rows_of, specified
from fxopt.sparse.block_report import PAIRS, LayerReport, SparsifyReport
from fxopt.sparse.semi_structured import SemiStructuredLinear
from fxopt.sparse.sparsified_linear import SparsifiedLinear, holds
from fxopt.transformation import ReversibleTransformation, Site, erase, exact, exists, register, set_submodule
from fxopt.transformations._constants import path_of, unfit

Mode = Literal["zeros", "merge"]

_mode: ContextVar[Mode | None] = ContextVar("mode", default=None)


@dataclass(frozen=True, eq=False)
class BlockSparsify(ReversibleTransformation):
    """
    linear(x, w, b)  ->  block_linear(x, blocks of w, b)
    linear(x, w, b)  ->  semi_structured_linear(x, two of each four of w, b)

    Changes what is computed, except with "existing", which keeps every block that is not zero.  `patterns` says which
    layers and how: {pattern: density or Spec(density, block, select, rescale)}; a pattern is a regular expression that
    the whole path of a layer matches, or a predicate of the path and the weight.  Also ``addmm`` with a weight (in,
    out).  Layers with one weight are changed together and stay tied.  A block of "2:4" is two of every four weights.

    `guard`: "auto" leaves a layer dense that is timed to be no faster at one of `tokens` rows; "off" forces.  On a GPU
    whose sparse tensor cores take the layer (`fxopt.kernels.semi_structured`), "auto" times 2:4 too, where that drops
    no more than was asked for (a density up to 0.5 by "magnitude" or "activation"; a weight that is 2:4, with
    "existing"), and keeps the fastest: of what is faster at all of `tokens`, that with the best geometric mean.
    `inputs`: typical inputs of the graph module, for "activation", `rescale` and the errors that `plan` tells.
    """

    patterns: Any = ()
    inputs: Any = None
    guard: str = "auto"
    tokens: tuple[int, ...] = (128,)
    _planner: ClassVar[Planner]  # of the instance: it remembers what it timed, so that making it again is the same

    def __post_init__(self) -> None:
        found = specified(self.patterns)
        plain = tuple((p, s.density, s.block, s.select, s.rescale) for p, s in found)
        object.__setattr__(self, "patterns", plain)
        object.__setattr__(self, "tokens", tuple(self.tokens) if isinstance(self.tokens, list) else self.tokens)
        object.__setattr__(self, "_planner", Planner(self.guard, self.tokens))

    @property
    def _specs(self) -> tuple[tuple[Any, Spec], ...]:
        return specified(self.patterns)

    def __call__(
        self, graph_module: GraphModule, lint_and_recompile: bool = True, reverse: bool = False
    ) -> GraphModule:
        """Apply and commit; `UsageError`, and nothing changed, where a pattern matches no linear layer."""
        if not reverse and isinstance(graph_module, GraphModule):
            self._check(graph_module)
        return super().__call__(graph_module, lint_and_recompile, reverse)

    def transform(self, graph_module: GraphModule) -> None:
        for plan, group, _ in self._plans(graph_module):
            if isinstance(plan, Plan) and plan.kept:
                _apply(graph_module, group, plan.layer)
                _FACTORS[plan.layer.tensors[0]] = plan.factor

    def plan(self, gm: GraphModule) -> SparsifyReport:
        """What would become of each layer that a pattern names; nothing is changed."""
        self._check(gm)
        found: list[LayerReport] = []
        for inner in graphs(gm).values():
            for plan, group, spec in self._plans(inner):
                path, weight = group[0].path, group[0].matrix
                found.append(plan.report if isinstance(plan, Plan) else left(path, weight, spec, plan))
            for path, weight, reason in _unreadable(inner):
                index = matching(self._specs, [path], weight)
                if index is not None:
                    found.append(left(path, weight, self._specs[index][1], reason))
        return SparsifyReport(tuple(found))

    def settled(self, gm: GraphModule) -> BlockSparsify:
        """
        This transformation with what `guard` decides for ``gm`` written down: it does the same in every process, where
        timing anew might not, so a result that it made can be saved.
        """
        self._check(gm)
        found = [planned for inner in graphs(gm).values() for planned in self._plans(inner)]
        kept = {plan.path: (plan, spec) for plan, _, spec in found if isinstance(plan, Plan) and plan.kept}
        settled = {
            path: replace(spec, density=None, block=PAIRS) if plan.report.decision == PAIRS else spec
            for path, (plan, spec) in kept.items()
        }
        needed = any(s.rescale or (isinstance(s.select, str) and s.select == "activation") for s in settled.values())
        patterns = {_literally(path): spec for path, spec in settled.items()}
        return BlockSparsify(patterns, self.inputs if needed else None, "off", self.tokens)

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The linear layers that stay dense, each with the reason."""
        for inner in graphs(gm).values():
            taken: set[Node] = set()
            for plan, group, _ in self._plans(inner):
                taken.update(layer.node for layer in group)
                reason = plan if isinstance(plan, str) else plan.report.reason
                if reason:
                    yield Miss(group[0].node, reason)
            for node in inner.graph.nodes:
                layer = _layer(inner, node)
                if isinstance(layer, Miss):
                    yield layer
                elif layer is not None and node not in taken:
                    yield Miss(node, f"no pattern matches {layer.path}")

    @exact
    def reverse(self, graph_module: GraphModule, edited: Edited = "refuse", mode: Mode | None = None) -> GraphModule:
        """
        Leave ``graph_module`` as if the layers had never been made block-sparse, with the original weights.

        Where blocks were trained since, or written to in any way, `mode` says what the weight becomes: "zeros", the
        function of now, or "merge", the trained blocks among the original rest (``edited="discard"``: the original).
        Without a choice `Conflict` is raised and nothing changed.
        """
        if mode not in (None, "zeros", "merge"):
            raise UsageError(f"mode={mode!r} was given, expected 'zeros' or 'merge'")
        index = find(graph_module, self.signature)
        if index is not None:  # a write through .data leaves no version behind: now it does, and the engine sees it
            rescaled = any(spec.rescale for _, spec in self._specs)
            written = _written(graph_module, commits(graph_module)[index].active(), rescaled)
            torch.autograd.graph.increment_version(written)
        token = _mode.set(mode)
        try:
            return self._undo(graph_module, edited if mode is None else "carry")
        except Conflict as error:
            text, _, choice = str(error).partition("; say edited=")
            if not choice or mode is not None:
                raise
            hint = "mode='zeros' (the function of now), mode='merge' (among the original weights) or edited='discard'"
            raise Conflict(f"{text.partition('; BlockSparsify')[0]}; say {hint}") from error
        finally:
            _mode.reset(token)

    def carry(self, gm: GraphModule, rewrite: Delta) -> Mapping[str, Tensor] | None:
        """The weight with what was trained, as `reverse` was asked for; None where it was not."""
        mode = _mode.get()
        return None if mode is None else dict(_carried(gm, rewrite, mode))

    def _check(self, gm: GraphModule) -> None:
        used: list[int | None] = []
        paths: list[str] = []
        for inner in graphs(gm).values():
            for group in _groups(inner).values():
                names = _names(inner, group)
                used.append(matching(self._specs, names, group[0].matrix))
                paths += names
            for path, weight, _ in _unreadable(inner):  # `plan` and `misses` tell why they stay
                used.append(matching(self._specs, [path], weight))
                paths.append(path)
        check_all_matched(self._specs, used, list(dict.fromkeys(paths)))

    def _plans(self, gm: GraphModule) -> Iterator[tuple[Plan | str, list[_Layer], Spec]]:
        """The layers of one graph that a pattern names, grouped by weight: each group's plan or why it stays."""
        chosen: list[tuple[list[_Layer], Spec]] = []
        for group in _groups(gm).values():
            index = matching(self._specs, _names(gm, group), group[0].matrix)
            if index is not None:
                chosen.append((group, self._specs[index][1]))
        rows = {} if self.inputs is None or not chosen else _values(gm, [g[0].x for g, _ in chosen], self.inputs)
        for group, spec in chosen:
            first = group[0]
            reason = _shared(gm, group) or next(filter(None, (_unfit(gm, layer) for layer in group)), None)
            if reason is not None:
                yield reason, group, spec
                continue
            plan = self._planner.plan(first.path, first.matrix, first.held_bias, spec, rows.get(first.x))
            yield plan, group, spec


@dataclass(frozen=True)
class _Layer:
    """A node that is x @ matrixᵀ + bias."""

    node: Node
    x: Node
    weight: Any
    bias: Any
    matrix: Tensor  # (out, in), a view of the weight
    held_bias: nn.Parameter | None
    transposed: bool  # the weight is (in, out)
    dialect: mechanism.Dialect

    @property
    def path(self) -> str:
        """The path of the layer: that of its weight, without its name."""
        return path_of(self.weight).removesuffix(".weight")


def _layer(gm: GraphModule, node: Node) -> _Layer | Miss | None:
    """The layer that ``node`` is, why it cannot be read as one, or None where it is none."""
    kinds = (ops.linear, ops.addmm)
    found = mechanism.read(gm, node)
    if found is None or found.op not in kinds:
        doubt = mechanism.unread(gm, node)
        return Miss(node, doubt[1]) if doubt is not None and doubt[0] is ops.linear else None
    a = found.arguments
    turned = found.op is ops.addmm
    x, weight, bias = (a["mat1"], a["mat2"], a["input"]) if turned else (a["input"], a["weight"], a["bias"])
    held = mechanism.constant(gm, weight)
    if held is None or held.dim() != 2 or not isinstance(x, Node):
        return None if turned else Miss(node, f"the weight of {node} is no parameter or buffer of two dimensions")
    if turned and (a["beta"] != 1 or a["alpha"] != 1):
        return Miss(node, f"{node} is scaled by beta={a['beta']} and alpha={a['alpha']}")
    held_bias = mechanism.constant(gm, bias)
    own_bias = held_bias if isinstance(held_bias, nn.Parameter) else None
    return _Layer(node, x, weight, bias, held.t() if turned else held, own_bias, turned, found.dialect)


def _unreadable(gm: GraphModule) -> Iterator[tuple[str, Tensor, str]]:
    """The path and weight (out, in) of each `torch.nn.Linear` whose calls cannot be read as a layer, and why not."""
    seen: set[str] = set()
    for node in gm.graph.nodes:
        path, layer = str(node.target), _layer(gm, node)
        module = mechanism.submodule(gm, path) if node.op == "call_module" else None
        if isinstance(layer, Miss) and type(module) is nn.Linear and path not in seen:
            seen.add(path)
            yield path, module.weight, layer.reason


def _groups(gm: GraphModule) -> dict[int, list[_Layer]]:
    """The layers of a graph by the weight that they have."""
    found: dict[int, list[_Layer]] = {}
    for node in gm.graph.nodes:
        layer = _layer(gm, node)
        if isinstance(layer, _Layer):
            found.setdefault(id(mechanism.constant(gm, layer.weight)), []).append(layer)
    return found


def _names(gm: GraphModule, group: Sequence[_Layer]) -> list[str]:
    """Every path under which the layer's weight is registered."""
    weight = mechanism.constant(gm, group[0].weight)
    tied = [p for p, t in gm.named_parameters(remove_duplicate=False) if t is weight]
    return list(dict.fromkeys([layer.path for layer in group] + [p.removesuffix(".weight") for p in tied]))


def _unfit(gm: GraphModule, layer: _Layer) -> str | None:
    """Why a layer cannot be made block-sparse; None if it can."""
    if reason := unfit(gm, layer.weight):
        return reason
    held = mechanism.constant(gm, layer.weight)
    if held is not None and (hook := hook_of(None, held)):
        return f"{layer.path} has {hook}, which would be lost; remove that first"
    bias = mechanism.constant(gm, layer.bias)
    if layer.bias is not None and not Constant("").accepts(layer.bias):
        return f"the bias of {layer.node} is computed, expected a parameter or buffer"
    if bias is not None and (bias.shape != layer.matrix.shape[:1] or bias.dtype != layer.matrix.dtype):
        return f"the bias of {layer.node} is no vector of its size and type"
    return None


def _shared(gm: GraphModule, group: Sequence[_Layer]) -> str | None:
    """Why layers of one weight stay: what else reads it."""
    weight, mine = mechanism.constant(gm, group[0].weight), {layer.node for layer in group}
    if len({(layer.transposed, layer.dialect == "module") for layer in group}) > 1:
        return f"{group[0].path} is read both as a module and as a parameter, or both ways round"
    for node in gm.graph.nodes:
        if node.op == "get_attr" and mechanism.constant(gm, node) is weight:
            others = set(node.users) - mine
        elif node.op == "call_module" and node not in mine:
            module = mechanism.submodule(gm, str(node.target))
            others = {node} if module is not None and any(p is weight for p in module.parameters()) else set()
        else:
            continue
        if others:
            return f"its weight is read by {min(others)} too, which needs it dense"
    return None


def _apply(gm: GraphModule, group: Sequence[_Layer], layer: SparsifiedLinear) -> None:
    if group[0].dialect == "module":
        _apply_modules(gm, group, layer)
        return
    owner = _owner(gm, path_of(group[0].weight), layer.TENSORS)
    paths = [f"{owner}.{name}" for name in layer.TENSORS]
    for name, path in zip(layer.TENSORS, paths, strict=True):
        register(gm, path, getattr(layer, name), persistent=name not in layer._non_persistent_buffers_set)
    for one in group:  # the node stays, so that layers which follow each other are rewrites of their own
        site, node = _site(gm, one), one.node
        with gm.graph.inserting_before(node):
            tensors = [site.read(Attr(path)) for path in paths]
        node.op, node.target = "call_function", layer.OPERATOR
        node.args, node.kwargs = layer.operands(one.x, one.bias, tensors), {}
        if isinstance(one.weight, Node) and not one.weight.users:
            erase(gm, [one.weight])


def _owner(gm: GraphModule, weight: str, names: Sequence[str]) -> str:
    """The path of the module to hold `names`: that of the weight's, or one beside it where such a name is taken."""
    beside = (f"{weight}_blocks{f'_{i}' if i else ''}" for i in itertools.count())
    for owner in itertools.chain([weight.removesuffix(".weight")] * weight.endswith(".weight"), beside):
        free = mechanism.submodule(gm, owner) is not None or not exists(gm, owner)
        if free and not any(exists(gm, f"{owner}.{name}") for name in names):
            return owner
    raise AssertionError("no free name")


def _site(gm: GraphModule, layer: _Layer) -> Site:
    return Site(gm, Match(layer.node, layer.dialect, [layer.node]))


def _apply_modules(gm: GraphModule, group: Sequence[_Layer], layer: SparsifiedLinear) -> None:
    """Modules stay modules, at the same paths; those that are one module stay one."""
    done: dict[int, SparsifiedLinear] = {}
    for one in group:
        path = str(one.node.target)
        module = mechanism.submodule(gm, path)
        assert module is not None
        if not isinstance(module, SparsifiedLinear):
            new = done.setdefault(id(module), layer.tied(one.held_bias).train(module.training))
            for tied in [p for p, m in gm.named_modules(remove_duplicate=False) if m is module]:
                set_submodule(gm, tied, new)


@dataclass(frozen=True)
class _Made:
    """What took the place of a weight, and of which."""

    weight: str  # its path
    turned: bool  # the weight was (in, out)
    tensors: tuple[str, ...]  # the paths of what `SparsifiedLinear.TENSORS` names

    def now(self, gm: GraphModule) -> tuple[Tensor, ...]:
        """The tensors, those that are still there."""
        found = (mechanism.constant(gm, Attr(path)) for path in self.tensors)
        return tuple(t for t in found if t is not None)


def _made(rewrite: Delta) -> Iterator[_Made]:
    """What a rewrite made, by the nodes and the modules that it changed."""
    for path, (_, slot) in rewrite.slots.items():
        if slot is not None and isinstance(slot.value, SparsifiedLinear):
            yield _Made(f"{path}.weight", False, tuple(f"{path}.{name}" for name in slot.value.TENSORS))
    seen: set[str] = set()
    for key, (before, after) in rewrite.nodes.items():
        if before is None or after is None or after.target not in _OPERATORS:
            continue
        tensors = tuple(_read(rewrite, key, (after.args[1], *after.args[3:])))
        gone = (p for p in _read(rewrite, key, map(Ref, sorted(before.refs()))) if _vanished(rewrite, p))
        weight = next((p for p in gone if p is not None), None)
        if weight is not None and tensors[0] not in seen:  # of tied layers the first stands for all
            seen.add(tensors[0])
            yield _Made(weight, "addmm" in str(before.target), tensors)


_OPERATORS = (BlockSparseLinear.OPERATOR, SemiStructuredLinear.OPERATOR)
# Parameters that were made -> by what they were rescaled, or None. Those of copies of a graph module are not in it.
_FACTORS: Any = WeakIdKeyDictionary()


def _read(rewrite: Delta, key: str, arguments: Iterable[Any]) -> Iterator[str]:
    """The paths that those of the arguments of the node `key` read which the rewrite made or took out."""
    for argument in arguments:
        name = node_key(graph_of(key), argument.name) if isinstance(argument, Ref) else ""
        for record in rewrite.nodes.get(name, ()):
            if record is not None and record.op == "get_attr":
                yield path_in(graph_of(key), str(record.target))


def _vanished(rewrite: Delta, path: str) -> bool:
    """Whether a matrix stood at `path` before, and nothing does after."""
    before, after = rewrite.tensors().get(path, (None, None))
    return before is not None and before.dim() == 2 and after is None


def _carried(gm: GraphModule, rewrite: Delta, mode: Mode) -> Iterator[tuple[str, Tensor]]:
    """The original weights' paths with their new values."""
    for made in _made(rewrite):
        former = rewrite.tensors()[made.weight][0]
        assert former is not None
        value = _edited(made.now(gm), former.t() if made.turned else former, mode)
        yield made.weight, (value.t() if made.turned else value).contiguous()


@torch.no_grad()
def _written(gm: GraphModule, rewrite: Delta, rescaled: bool) -> list[Tensor]:
    """
    The parameters that a rewrite made and that hold other values since, though their versions do not say so.

    Where some were `rescaled`, of a copy of a graph module nothing but the versions can tell.
    """
    found: dict[int, Tensor] = {}
    for made in _made(rewrite):
        former, slot = rewrite.slots[made.weight][0], rewrite.slots[made.tensors[0]][1]
        now = made.now(gm)
        known = former is not None and slot is not None and len(now) == len(made.tensors) and now[0] is slot.value
        if not known or (rescaled and now[0] not in _FACTORS):
            continue
        assert former is not None and slot is not None
        weight = former.value.t() if made.turned else former.value
        if former.edited() or slot.edited() or now[0].is_inference():  # the versions say so, or there are none
            continue
        if not holds(*_whole(now, weight), weight, _FACTORS.get(now[0])):
            found[id(now[0])] = now[0]
    return list(found.values())


@torch.no_grad()
def _edited(tensors: Sequence[Tensor], weight: Tensor, mode: Mode) -> Tensor:
    """What `weight` (out, in) is by what took its place: zero elsewhere, or as it was; in the type of now."""
    now, kept = _whole(tensors, weight)
    return now if mode == "zeros" else torch.where(kept, now, weight.detach().to(now))


def _whole(tensors: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the tensors of a layer make, of the shape of `weight` (out, in), and where it has elements."""
    ones = torch.ones_like(tensors[0])
    if len(tensors) == len(SemiStructuredLinear.TENSORS):
        values, metadata = tensors
        return semi_structured.to_dense(values, metadata), semi_structured.to_dense(ones, metadata) != 0
    data, crow, col, index = tensors
    grid, row = (crow.numel() - 1, index.numel() - 3 * data.shape[0] - 1), index[: data.shape[0]]
    rows, columns = weight.shape
    whole, kept = (to_dense(blocks, row, col, grid)[:rows, :columns] for blocks in (data, ones))
    return whole, kept != 0


def _values(gm: GraphModule, nodes: Sequence[Node], inputs: Any) -> dict[Node, Tensor]:
    """At most some thousand rows of what each of ``nodes`` is on ``inputs``."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.graph_copy(gm.graph, copies)
    graph.output(tuple(copies[n] for n in nodes))
    codegen = copy.copy(gm.graph._codegen)
    if hasattr(codegen, "pytree_info"):
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=None)
    graph.set_codegen(codegen)
    probe = GraphModule(gm, graph)
    held: dict[Node, list[Tensor]] = {n: [] for n in nodes}
    with evaluating(probe):
        for one in inputs if isinstance(inputs, list) else [inputs]:
            for node, value in zip(nodes, call(probe, one), strict=True):
                held[node].append(rows_of(value))
    return {node: rows_of(torch.cat(parts)) for node, parts in held.items()}


def _literally(path: str) -> str:
    """A pattern that matches this path alone."""
    return "".join(f"\\{c}" if not (c.isalnum() or c == "_") else c for c in path)
