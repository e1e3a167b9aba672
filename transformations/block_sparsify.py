"""Linear layers by name keep only some blocks of their weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxopt import ops as mechanism
from fxopt import vocabulary as ops
from fxopt.delta import Delta, graphs
from fxopt.errors import Conflict, UsageError
from fxopt.history import Edited
from fxopt.kernels import semi_structured
from fxopt.kernels.block_linear import to_dense
from fxopt.ops import Attr
from fxopt.pattern import Constant, Match, Miss
from fxopt.snapshot import graph_of, node_key, path_in
from fxopt.sparse.block_patcher import call
from fxopt.sparse.block_plan import Plan, Planner, Spec, check_all_matched, matching, rows_of, specified
from fxopt.sparse.block_report import PAIRS, SparsifyReport
from fxopt.sparse.sparsified_linear import SparsifiedLinear
from fxopt.transformation import ReversibleTransformation, Site, erase, exact, register, set_submodule
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

    def plan(self, gm: GraphModule) -> SparsifyReport:
        """What would become of each layer that a pattern names; nothing is changed."""
        self._check(gm)
        found = [plan for inner in graphs(gm).values() for plan, *_ in self._plans(inner)]
        return SparsifyReport(tuple(plan.report for plan in found if isinstance(plan, Plan)))

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

        Where blocks were trained since, `mode` says what the weight becomes: "zeros", the function of now, or "merge",
        the trained blocks among the original rest (``edited="discard"``: the original).  Without a choice `Conflict` is
        raised and nothing changed.
        """
        if mode not in (None, "zeros", "merge"):
            raise UsageError(f"mode={mode!r} was given, expected 'zeros' or 'merge'")
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
    base = path_of(group[0].weight)
    owner = base.removesuffix(".weight") if base.endswith(".weight") else f"{base}_blocks"
    first = _site(gm, group[0])
    paths = [first.free(f"{owner}.{name}".lstrip(".")) for name in layer.TENSORS]
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


def _carried(gm: GraphModule, rewrite: Delta, mode: Mode) -> Iterator[tuple[str, Tensor]]:
    """The original weights' paths with their new values."""
    turned = set(_read_turned(rewrite))
    tensors = rewrite.tensors()
    gone = {p: a for p, (a, b) in tensors.items() if b is None and isinstance(a, Tensor) and a.dim() == 2}
    for path, (former, made) in tensors.items():
        owner = path.rpartition(".")[0]
        weights = [p for p in gone if owner in (p.removesuffix(".weight"), f"{p}_blocks")]
        if former is not None or not isinstance(made, nn.Parameter) or not weights:
            continue
        old = weights[0]
        value = _edited(gm, path, gone[old].t() if old in turned else gone[old], mode)
        yield old, (value.t() if old in turned else value).contiguous()


def _read_turned(rewrite: Delta) -> Iterator[str]:
    """The paths of weights (in, out)."""
    for key, (before, _) in rewrite.nodes.items():
        for name in () if before is None or "addmm" not in str(before.target) else before.refs():
            read = rewrite.nodes.get(node_key(graph_of(key), name), (None, None))[0]
            if read is not None and read.op == "get_attr":
                yield path_in(graph_of(key), str(read.target))


@torch.no_grad()
def _edited(gm: GraphModule, path: str, weight: Tensor, mode: Mode) -> Tensor:
    """What `weight` (out, in) is by what is at ``path``: zero elsewhere, or as it was."""
    now, kept = _whole(gm, path)
    rows, columns = weight.shape
    now, kept = now[:rows, :columns], kept[:rows, :columns]
    return now if mode == "zeros" else torch.where(kept != 0, now, weight.detach())


def _whole(gm: GraphModule, path: str) -> tuple[Tensor, Tensor]:
    """The weight whose parameter is at ``path``, and ones where it has elements; with the padding of its blocks."""
    if path.rpartition(".")[2].startswith("values"):
        values, metadata = (_sibling(gm, path, "values", name) for name in ("values", "metadata"))
        return semi_structured.to_dense(values, metadata), semi_structured.to_dense(torch.ones_like(values), metadata)
    data, crow, col, index = (_sibling(gm, path, "data", name) for name in ("data", "crow", "col", "index"))
    grid, row = (crow.numel() - 1, index.numel() - 3 * data.shape[0] - 1), index[: data.shape[0]]
    return to_dense(data, row, col, grid), to_dense(torch.ones_like(data), row, col, grid)


def _sibling(gm: GraphModule, path: str, first: str, name: str) -> Tensor:
    """What stands beside `first`, under the same suffix."""
    owner, _, last = path.rpartition(".")
    found = mechanism.constant(gm, Attr(f"{owner}.{last.replace(first, name, 1)}".lstrip(".")))
    assert found is not None
    return found


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
    with torch.no_grad():
        for one in inputs if isinstance(inputs, list) else [inputs]:
            for node, value in zip(nodes, call(probe, one), strict=True):
                held[node].append(rows_of(value))
    return {node: rows_of(torch.cat(parts)) for node, parts in held.items()}


def _literally(path: str) -> str:
    """A pattern that matches this path alone."""
    return "".join(f"\\{c}" if not (c.isalnum() or c == "_") else c for c in path)
