"""Taking one pruning tree out of a graph."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxopt import ops
from fxopt import vocabulary as words
from fxopt.errors import TransformationError, UsageError
from fxopt.pattern import Match
from fxopt.transformation import New, Site
from fxopt.transformations._axes import Axes
from fxopt.transformations._constants import unfit
from fxopt.transformations._cut import cut
from fxopt.transformations._flow import Flow
from fxopt.transformations._heads import attentions
from fxopt.transformations._joins import join
from fxopt.transformations._memory import Memory, value
from fxopt.transformations._restate import bury, refresh, restate
from fxopt.transformations._trees import features_axis, kept_operand

Unequal = Literal["auto", "fold", "low_rank", "match", "pad"]
UNEQUAL = ("auto", "fold", "low_rank", "match", "pad")


@dataclass(frozen=True)
class Fit:
    """
    A linear layer to stand in a tree's place, from the value that it reads to the value that it gave.

    ``weight`` (out, in) and ``bias`` (out,), float32; for images it mixes channels, with a stride where the tree has
    one.  Made by `fxopt.pruning.fit`.
    """

    tree: str
    weight: torch.Tensor
    bias: torch.Tensor

    def plain(self) -> tuple[str, int, int, str]:
        """As plain values: tree, out, in, and the numbers in base64."""
        numbers = torch.cat([self.weight.float().flatten(), self.bias.float()]).numpy().tobytes()
        return self.tree, *self.weight.shape, base64.b64encode(numbers).decode()

    @staticmethod
    def of(saved: Sequence[Any]) -> Fit:
        """What `plain` gave."""
        tree, features, inputs, text = saved
        numbers = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
        weight, bias = numbers.split((features * inputs, features))
        return Fit(tree, weight.reshape(features, inputs), bias)


@dataclass(frozen=True)
class Ends:
    """Where a tree begins and ends in a graph as it is now; ``keep`` is read in place of ``exit``."""

    keep: Node | None
    exit: Node
    what: Literal["replace", "layer", "cat", "heads"]
    index: int = 0
    part: str = ""  # the operand of a concatenation that goes


def find(gm: GraphModule, name: str, flow: Flow | None = None) -> Ends | str:
    """The ends of the tree called ``name``, or why it is not there."""
    nodes = {n.name: n for n in gm.graph.nodes}
    first, dots, last = name.partition("..")
    if dots:
        return _find_region(gm, nodes.get(first), nodes.get(last), name, flow)
    parsed = re.fullmatch(r"(\w+)(?:([:#])(\d+))?", name)
    if parsed is None:
        return f"{name!r} is no name of a pruning tree; expected first..exit, exit:operand, layer or attention#group"
    exit, mark, number = nodes.get(parsed[1]), parsed[2], int(parsed[3] or 0)
    if exit is None:
        return f"{name}: there is no node {parsed[1]}"
    call = ops.read(gm, exit)
    if mark == "#":
        attention = call is not None and call.op is words.scaled_dot_product_attention
        return Ends(None, exit, "heads", number) if attention else f"{name}: {exit} is no attention that is there"
    if mark == ":" and call is not None and call.op is words.cat:
        parts = call.arguments["tensors"]
        if number >= len(parts):
            return f"{name}: {exit} joins {len(parts)} tensors"
        return Ends(None, exit, "cat", number, parts[number].name)
    if mark == ":":
        kept = kept_operand(gm, exit, number)
        return Ends(kept, exit, "replace") if isinstance(kept, Node) else f"{name}: {exit} has no operand to drop there"
    entry = None if call is None else call.arguments.get("mat1", call.arguments.get("input"))
    return Ends(entry, exit, "layer") if isinstance(entry, Node) else f"{name}: {exit} is no layer"


def _find_region(gm: GraphModule, first: Node | None, exit: Node | None, name: str, flow: Flow | None) -> Ends | str:
    if first is None or exit is None:
        return f"{name}: its nodes are not there"
    flow = flow or Flow(gm)
    for entry in flow.preds.get(first, ()):
        region = flow.region(entry, exit)
        if region is not None and first in region.nodes:
            return Ends(entry, exit, "replace")
    return f"{name}: what lies between is no region with one entry and one exit any more"


def remove(gm: GraphModule, name: str, part: str, fit: Fit | None, unequal: Unequal, rank: float) -> None:
    """
    Take the tree called ``name`` out of ``gm``, which has no writes in place; raises `TransformationError`.

    ``part``: of a concatenation, the operand that its number meant at first.
    """
    ends = find(gm, name)
    if isinstance(ends, str):
        raise TransformationError(f"{ends}; print fxopt.pruning.trees(gm) to see what is there")
    if fit is not None and ends.keep is not None:
        replacement = _fitted(gm, ends, fit)
    elif ends.what == "heads":
        cut_groups(gm, {ends.exit.name: [ends.index]})
        return
    elif ends.what == "cat":
        _drop_from_cat(gm, ends.exit, part)
        return
    elif ends.what == "layer":
        layer_replacement = _layer(gm, ends, unequal, rank)
        if layer_replacement is None:
            return
        replacement = layer_replacement
    else:
        assert ends.keep is not None
        replacement = ends.keep
    _replace(gm, ends.exit, replacement)


def _replace(gm: GraphModule, exit: Node, replacement: Node) -> None:
    memory = Memory(gm)
    for node in (exit, replacement):
        if node in memory.position and memory.last_write(node) > memory.position[node]:
            raise TransformationError(f"{node} is written to in place after it was computed; MakeOutOfPlace may help")
    joins = [u for u in exit.users if _is_cat(gm, u)]
    exit.replace_all_uses_with(replacement, delete_user_cb=lambda user: user is not replacement)
    bury(gm, exit)
    for node in joins:
        if not node._erased:
            _sum_columns(gm, node)


def _is_cat(gm: GraphModule, node: Node) -> bool:
    call = ops.read(gm, node)
    return call is not None and call.op is words.cat


# --- a fitted layer in its place ------------------------------------------------------------------------------------


def _fitted(gm: GraphModule, ends: Ends, fit: Fit) -> Node:
    assert ends.keep is not None
    there, here = value(ends.keep), value(ends.exit)
    if not isinstance(there, torch.Tensor) or not isinstance(here, torch.Tensor):
        raise TransformationError(f"{fit.tree}: the shapes at {ends.exit} are not known; call fxopt.propagate")
    call = ops.read(gm, ends.exit)
    site = Site(gm, Match(ends.exit, "function" if call is None else call.dialect))
    path = _owner(gm, ends.exit)
    weight, bias = (nn.Parameter(t.to(here.dtype).to(here.device)) for t in (fit.weight, fit.bias))
    if stride := stride_of(there, here):
        kernel = nn.Parameter(weight.detach()[:, :, None, None])
        new = (New(kernel, f"{path}.fitted.weight"), New(bias, f"{path}.fitted.bias"))
        return site.emit(words.conv2d, ends.keep, *new, (stride, stride))
    new = (New(weight, f"{path}.fitted.weight"), New(bias, f"{path}.fitted.bias"))
    return site.emit(words.linear, ends.keep, *new)


def stride_of(there: torch.Tensor, here: torch.Tensor) -> int:
    """The stride of a 1×1 convolution from one image to another; 0 where these are no images."""
    if there.dim() != 4 or here.dim() != 4:
        return 0
    with torch.no_grad():
        for stride in (1, 2, 4, 8):
            strided = there[:, :, ::stride, ::stride]
            if [str(n) for n in strided.shape[2:]] == [str(n) for n in here.shape[2:]]:
                return stride
            if all(_hint(a) == _hint(b) for a, b in zip(strided.shape[2:], here.shape[2:], strict=True)):
                return stride
    return 0


def _hint(size: Any) -> int:
    from torch.fx.experimental.symbolic_shapes import optimization_hint

    return int(optimization_hint(size))


def _owner(gm: GraphModule, exit: Node) -> str:
    """The module to which a new layer at ``exit`` belongs: that of the first parameter found before it."""
    seen, waiting = {exit}, [exit]
    while waiting:
        node = waiting.pop(0)
        if node.op == "call_module":
            return str(node.target)
        for source in node.all_input_nodes:
            if source.op == "get_attr" and isinstance(ops.constant(gm, source), nn.Parameter):
                return str(source.target).rpartition(".")[0] or "pruned"
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return "pruned"


# --- a layer of unequal dimensions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    node: Node
    x: Node
    weight: torch.Tensor  # (out, in, *kernel)
    bias: torch.Tensor | None
    names: Mapping[str, str]  # weight and bias -> the argument of the operation
    transposed: bool

    def restated(self, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The arguments that make the layer compute with other parameters."""
        found = {self.names["weight"]: weight.T if self.transposed else weight}
        return found if bias is None else found | {self.names["bias"]: bias}


def _read_layer(gm: GraphModule, node: Node) -> _Layer | None:
    call = ops.read(gm, node)
    if call is None or features_axis(call) is None:
        return None
    a, matrix = call.arguments, call.op in (words.addmm, words.mm)
    names = {"weight": "mat2", "bias": "input"} if matrix else {"weight": "weight", "bias": "bias"}
    held, x = a[names["weight"]], a["mat1"] if call.op is words.addmm else a["input"]
    weight = ops.constant(gm, held)
    bias = None if call.op is words.mm else a[names["bias"]]
    b = ops.constant(gm, bias)
    if weight is None or unfit(gm, held) or (bias is not None and b is None) or not isinstance(x, Node):
        return None
    if call.op is words.addmm and (a["beta"] != 1 or a["alpha"] != 1):
        return None
    return _Layer(node, x, weight.detach().T if matrix else weight.detach(), b, names, matrix)


def _layer(gm: GraphModule, ends: Ends, unequal: Unequal, rank: float) -> Node | None:
    """What takes the place of a layer; None where the layer next to it took it in."""
    layer = _read_layer(gm, ends.exit)
    if layer is None:
        raise TransformationError(f"{ends.exit} is no layer with parameters of its own, which could be replaced")
    assert ends.keep is not None
    if _same_size(ends.keep, ends.exit):
        return ends.keep
    if unequal in ("auto", "fold"):
        if _fold(gm, layer):
            return None
        if unequal == "fold":
            raise TransformationError(f"{ends.exit}: no linear layer follows at once; say unequal='low_rank' or fit it")
    if unequal in ("auto", "low_rank"):
        return _low_rank(gm, layer, rank)
    return _selected(gm, layer, unequal)


def _same_size(a: Node, b: Node) -> bool:
    from fxopt.transformations._flow import signature

    return signature(a) == signature(b)


def _fold(gm: GraphModule, layer: _Layer) -> bool:
    """Multiply the layer into the linear one that alone reads it: exact, and the layer is gone."""
    users = list(layer.node.users)
    after = _read_layer(gm, users[0]) if len(users) == 1 else None
    pointwise = all(n == 1 for n in layer.weight.shape[2:])
    if after is None or after.x is not layer.node or not pointwise or layer.weight.dim() != after.weight.dim():
        return False
    call, following = ops.read(gm, layer.node), ops.read(gm, after.node)
    assert call is not None
    assert following is not None
    if layer.weight.dim() > 2 and not (_plain_convolution(call) and all(n == 1 for n in after.weight.shape[2:])):
        return False
    if layer.weight.dim() > 2 and following.arguments["groups"] != 1:
        return False
    if layer.bias is not None and after.bias is None:
        return False  # there is no place for what its bias becomes
    first, second = layer.weight.flatten(1).double(), after.weight.flatten(1).double()
    weight = (second @ first).to(after.weight.dtype).reshape(-1, layer.weight.shape[1], *after.weight.shape[2:])
    bias = None if layer.bias is None or after.bias is None else second @ layer.bias.double() + after.bias.double()
    restate(gm, after.node, after.restated(weight, None if bias is None else bias.to(after.weight.dtype)))
    after.node.replace_input_with(layer.node, layer.x)
    bury(gm, layer.node)
    return True


def _plain_convolution(call: ops.Call) -> bool:
    a = call.arguments
    plain = {"stride": 1, "dilation": 1, "padding": 0}
    return a["groups"] == 1 and all(set(a[n]) == {said} for n, said in plain.items())


def _low_rank(gm: GraphModule, layer: _Layer, rank: float) -> Node:
    """Two thin layers: the best approximation of that rank (Eckart and Young, 1936)."""
    matrix = layer.weight.flatten(1)
    features, inputs = matrix.shape
    kept = max(1, int(rank * features * inputs / (features + inputs)))
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    dtype = layer.weight.dtype
    thin = (s[:kept, None] * v[:kept]).to(dtype).reshape(kept, *layer.weight.shape[1:])
    wide = u[:, :kept].to(dtype).reshape(features, kept, *([1] * (layer.weight.dim() - 2)))
    call = ops.read(gm, layer.node)
    assert call is not None
    site = Site(gm, Match(layer.node, call.dialect))
    path = _owner(gm, layer.node)
    first = New(nn.Parameter(thin), f"{path}.low_rank.0.weight")
    second = New(nn.Parameter(wide), f"{path}.low_rank.1.weight")
    bias = None if layer.bias is None else New(nn.Parameter(layer.bias.detach().clone()), f"{path}.low_rank.1.bias")
    if layer.weight.dim() == 2:
        return site.emit(words.linear, site.emit(words.linear, layer.x, first), second, bias)
    a = call.arguments
    if a["groups"] != 1:
        raise TransformationError(f"{layer.node} is a convolution in groups, which has no low rank; fit it")
    options = {n: a[n] for n in ("stride", "padding", "dilation")}
    return site.emit(call.op, site.emit(call.op, layer.x, first, **options), second, bias)


def _selected(gm: GraphModule, layer: _Layer, unequal: Unequal) -> Node:
    """The channels of the input that stand for those of the output: by position, or by the weights that join them."""
    call = ops.read(gm, layer.node)
    there, here = value(layer.x), value(layer.node)
    axis = features_axis(call)
    assert call is not None
    assert axis is not None
    features, inputs = layer.weight.shape[:2]
    if layer.weight.dim() > 2 and (there.dim() != here.dim() or _strided(call)):
        raise TransformationError(f"{layer.node} changes the size of the image; fit it, or say unequal='low_rank'")
    order = torch.arange(min(features, inputs)) if unequal == "pad" else matched(layer.weight, min(features, inputs))
    site = Site(gm, Match(layer.node, call.dialect if call.dialect != "module" else "function"))
    index = torch.full((features,), -1)
    index[: len(order)] = order if unequal == "pad" else -1
    if unequal == "match":
        index = order
    chosen = index.clamp(min=0)
    picked = site.emit(
        words.index_select, layer.x, there.dim() + axis, New(chosen, f"{_owner(gm, layer.node)}.selected")
    )
    if bool((index >= 0).all()):
        return picked
    mask = (index >= 0).to(layer.weight.dtype).reshape(-1, *([1] * (-1 - axis)))
    return site.emit(words.mul, picked, New(mask, f"{_owner(gm, layer.node)}.selected_mask"))


def matched(weight: torch.Tensor, count: int) -> torch.Tensor:
    """
    For every output channel the input channel that it is most alike, each used once; -1 for those that are left.

    The correlation of an output with white inputs is its normalised weight; solved as an assignment.
    """
    from scipy.optimize import linear_sum_assignment

    strength = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    alike = (strength / strength.norm(dim=1, keepdim=True).clamp(min=1e-12)).double()
    rows, columns = linear_sum_assignment(-alike.numpy())
    index = torch.full((len(weight),), -1)
    index[torch.as_tensor(rows[:count])] = torch.as_tensor(columns[:count])
    return index


def _strided(call: ops.Call) -> bool:
    return any(n != 1 for n in call.arguments["stride"])


# --- concatenations and heads -----------------------------------------------------------------------------------------


def _drop_from_cat(gm: GraphModule, node: Node, part: str) -> None:
    found = join(gm, node)
    if isinstance(found, str):
        raise TransformationError(f"{part} cannot be dropped from {node}: {found}, so its columns cannot go")
    index = [p.name for p in found.parts].index(part)
    starts = [sum(found.sizes[:i]) for i in range(len(found.parts))]
    kept = [torch.arange(s, s + n) for i, (s, n) in enumerate(zip(starts, found.sizes, strict=True)) if i != index]
    columns = torch.cat(kept)
    for consumer in found.consumers:
        layer = _read_layer(gm, consumer)
        if layer is None:
            raise TransformationError(f"{consumer} reads {node} with a weight that cannot be sliced")
        restate(gm, consumer, layer.restated(layer.weight.index_select(1, columns), None))
    for norm in found.norms:
        call = ops.read(gm, norm)
        assert call is not None
        held = {n: ops.constant(gm, call.arguments[n]) for n in ("weight", "bias", "running_mean", "running_var")}
        restate(gm, norm, {n: t.detach()[columns] for n, t in held.items() if t is not None})
    dropped = found.parts[index]
    _rejoin(gm, node, [p for i, p in enumerate(found.parts) if i != index])
    if not dropped.users:
        bury(gm, dropped)


def _rejoin(gm: GraphModule, node: Node, parts: Sequence[Node]) -> None:
    """Let a concatenation join ``parts``, where its readers are ready for them; of one part, nothing is left of it."""
    changed = [node]
    if len(parts) == 1:
        changed = list(node.users)
        node.replace_all_uses_with(parts[0])
        bury(gm, node)
    else:
        restate(gm, node, {"tensors": tuple(parts)})
    _refresh_after(gm, changed)


def _sum_columns(gm: GraphModule, node: Node) -> None:
    """Of a tensor that is joined with itself, let the consumer add up its columns and read it once."""
    found = join(gm, node)
    if isinstance(found, str) or len(set(found.parts)) == len(found.parts) or found.norms:
        return
    layers = [_read_layer(gm, c) for c in found.consumers]
    if any(layer is None for layer in layers):
        return
    once = list(dict.fromkeys(found.parts))
    for layer in layers:
        assert layer is not None
        pieces = layer.weight.split(found.sizes, 1)
        summed = [sum(p for p, part in zip(pieces, found.parts, strict=True) if part is one) for one in once]
        restate(gm, layer.node, layer.restated(torch.cat([torch.as_tensor(s) for s in summed], 1), None))
    _rejoin(gm, node, once)


def _refresh_after(gm: GraphModule, nodes: Sequence[Node]) -> None:
    """Work the values out again of ``nodes`` and all that depends on them."""
    changed, found = {n for n in nodes if not n._erased}, []
    for node in gm.graph.nodes:
        if (node in changed or any(n in changed for n in node.all_input_nodes)) and node.op != "output":
            changed.add(node)
            found.append(node)
    refresh(gm, found)


def cut_groups(gm: GraphModule, groups: Mapping[str, Sequence[int]]) -> None:
    """Cut the key/value groups of each attention, by the name of its node, with the heads that read them."""
    for name, gone in groups.items():
        axes = Axes(gm)
        found = {a.node.name: a for a in attentions(axes)}
        if name not in found:
            raise TransformationError(f"{name}: its heads cannot be cut; fxopt.pruning.axes(gm) says why")
        axis = found[name].axis
        wrong = [g for g in gone if not 0 <= g < axis.size]
        if wrong or len(set(gone)) >= axis.size:
            raise TransformationError(
                f"{name} has {axis.size} groups, {len(set(gone))} of them to go; one has to stay, or drop the branch"
            )
        cut(gm, axes, [(axis.leaf, list(gone))])


def check_unequal(unequal: str) -> None:
    """Refuse a way that does not exist."""
    if unequal not in UNEQUAL:
        raise UsageError(f"unequal={unequal!r} is not known; give one of {', '.join(UNEQUAL)}")
