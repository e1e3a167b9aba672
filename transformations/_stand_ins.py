"""What can stand in the place of a pruning tree: a fitted layer, its neighbour, thinner ones, or channels it reads."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxopt import ops
from fxopt import vocabulary as words
from fxopt.errors import TransformationError
from fxopt.pattern import Match
from fxopt.transformation import New, Site
from fxopt.transformations._axes import Axes, index_map, leaves
from fxopt.transformations._constants import unfit
from fxopt.transformations._cut import cut
from fxopt.transformations._flow import is_check, signature
from fxopt.transformations._memory import value
from fxopt.transformations._restate import bury, restate
from fxopt.transformations._trees import features_axis

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
class Matching:
    """
    The channel of the value that a tree reads, for every channel of the value that it gives; -1 where there is none.

    ``channels`` (out,): each input channel at most once.  Made by `fxopt.pruning.match`.
    """

    tree: str
    channels: tuple[int, ...]

    def plain(self) -> tuple[str, tuple[int, ...]]:
        """As plain values."""
        return self.tree, self.channels


StandIn = Fit | Matching


def stand_in(saved: Sequence[Any]) -> StandIn:
    """What `plain` gave of either."""
    if len(saved) == 2:
        return Matching(str(saved[0]), tuple(int(c) for c in saved[1]))
    return Fit.of(saved)


def replacement(gm: GraphModule, keep: Node, exit: Node, given: StandIn) -> Node:
    """What is to be read in place of ``exit``, computed from ``keep``."""
    if not isinstance(value(keep), torch.Tensor) or not isinstance(value(exit), torch.Tensor):
        raise TransformationError(f"{given.tree}: the shapes at {exit} are not known; call fxopt.propagate")
    if isinstance(given, Fit):
        return _fitted(gm, keep, exit, given)
    axis = -3 if value(exit).dim() == 4 else -1
    return matched_channels(gm, keep, exit, axis, torch.tensor(given.channels))


# --- a fitted layer in its place ------------------------------------------------------------------------------------


def _fitted(gm: GraphModule, keep: Node, exit: Node, fit: Fit) -> Node:
    there, here = value(keep), value(exit)
    call = ops.read(gm, exit)
    site = Site(gm, Match(exit, "function" if call is None else call.dialect))
    path = _owner(gm, exit)
    weight, bias = (nn.Parameter(t.to(here.dtype).to(here.device)) for t in (fit.weight, fit.bias))
    if stride := stride_of(there, here):
        kernel = nn.Parameter(weight.detach()[:, :, None, None])
        new = (New(kernel, f"{path}.fitted.weight"), New(bias, f"{path}.fitted.bias"))
        return site.emit(words.conv2d, keep, *new, (stride, stride))
    new = (New(weight, f"{path}.fitted.weight"), New(bias, f"{path}.fitted.bias"))
    return site.emit(words.linear, keep, *new)


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
class Layer:
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


def read_layer(gm: GraphModule, node: Node) -> Layer | None:
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
    return Layer(node, x, weight.detach().T if matrix else weight.detach(), b, names, matrix)


def instead_of_layer(gm: GraphModule, keep: Node, exit: Node, unequal: Unequal, rank: float) -> Node | None:
    """What takes the place of a layer; None where the layer next to it took it in."""
    layer = read_layer(gm, exit)
    if layer is None:
        raise TransformationError(f"{exit} is no layer with parameters of its own, which could be replaced")
    if signature(keep) == signature(exit):
        return keep
    if unequal in ("auto", "fold"):
        if fold(gm, layer):
            return None
        if unequal == "fold":
            raise TransformationError(f"{exit}: no linear layer follows at once; say unequal='low_rank' or fit it")
    if unequal in ("auto", "low_rank"):
        return _low_rank(gm, layer, rank)
    return _selected(gm, layer, unequal)


def fold(gm: GraphModule, layer: Layer) -> bool:
    """Multiply the layer into the linear one that alone reads it: exact, and the layer is gone."""
    users = _readers(gm, layer.node)
    after = read_layer(gm, users[0]) if len(users) == 1 else None
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


def fold_around(gm: GraphModule, node: Node) -> None:
    """
    Make one of a linear layer and those right before and after it, where there is no more to compute then.

    Casts to the type that a value has, as normalisations leave between residual branches, are not in the way.
    """
    _fold_before(gm, node)
    while len(readers := _readers(gm, node)) == 1:
        node = readers[0]
        if not _same_value(gm, node):
            _fold_before(gm, node)
            return


def _fold_before(gm: GraphModule, node: Node) -> None:
    after = read_layer(gm, node)
    if after is None:
        return
    between, source = after.x, after.x
    while _same_value(gm, source) and len(_readers(gm, source)) == 1:
        source = source.all_input_nodes[0]
    before = read_layer(gm, source)
    if before is None or len(before.weight) != after.weight.shape[1]:
        return
    outer = len(after.weight) * before.weight.shape[1]
    if outer <= after.weight.numel() + before.weight.numel():
        if between is not source:
            node.replace_input_with(between, source)
            bury(gm, between)
        fold(gm, before)


def _readers(gm: GraphModule, node: Node) -> list[Node]:
    """Its users, but for export's checks of its type, which go with it."""
    return [u for u in node.users if not is_check(gm, u)]


def _same_value(gm: GraphModule, node: Node) -> bool:
    """Whether it gives what it is given: a cast to the type that the value has, or a copy of it."""
    call = ops.read(gm, node)
    if call is None or call.op not in (words.to, words.contiguous) or len(node.all_input_nodes) != 1:
        return False
    here, before = value(node), value(node.all_input_nodes[0])
    tensors = isinstance(here, torch.Tensor) and isinstance(before, torch.Tensor)
    return tensors and here.dtype == before.dtype and here.device == before.device


def _plain_convolution(call: ops.Call) -> bool:
    a = call.arguments
    plain = {"stride": 1, "dilation": 1, "padding": 0}
    return a["groups"] == 1 and all(set(a[n]) == {said} for n, said in plain.items())


def _low_rank(gm: GraphModule, layer: Layer, rank: float) -> Node:
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


def _selected(gm: GraphModule, layer: Layer, unequal: Unequal) -> Node:
    """The channels of the input that stand for those of the output: by position, or by the weights that join them."""
    call = ops.read(gm, layer.node)
    there, here = value(layer.x), value(layer.node)
    axis = features_axis(call)
    assert call is not None
    assert axis is not None
    if layer.weight.dim() > 2 and (there.dim() != here.dim() or _strided(call)):
        raise TransformationError(f"{layer.node} changes the size of the image; fit it, or say unequal='low_rank'")
    if unequal == "match":
        return matched_channels(gm, layer.x, layer.node, axis, matched(layer.weight))
    index = torch.arange(layer.weight.shape[0])
    index[layer.weight.shape[1] :] = -1
    return _picked(gm, layer.x, layer.node, axis, index)


# --- channels of the input, as they are -----------------------------------------------------------------------------


def matched_channels(gm: GraphModule, keep: Node, exit: Node, axis: int, index: torch.Tensor) -> Node:
    """
    The channels of ``keep`` that stand for those of ``exit``.

    The difference is pruned first where it can be: the channels that no other is matched with are cut out of the wider
    of both, in everything that has them.  What is left is the identity, up to the order of the channels.
    """
    there, here = value(keep), value(exit)
    inputs, features = there.shape[axis], here.shape[axis]
    if [str(n) for n in _beside(there, axis)] != [str(n) for n in _beside(here, axis)]:
        raise TransformationError(f"{exit} changes more than the channels of {keep}; fit it, or say unequal='low_rank'")
    if len(index) != features or bool((index >= inputs).any()):
        raise TransformationError(f"{exit}: {len(index)} channels were matched, and it gives {features} of {inputs}")
    used = index[index >= 0]
    if len(used.unique()) < len(used):
        raise TransformationError(f"{exit}: a channel of {keep} is matched twice; each may be once")
    without = (index < 0).nonzero()[:, 0]
    if len(without) and _cut_channels(gm, exit, axis, without.tolist()):
        index = used
    unused = torch.ones(int(inputs), dtype=torch.bool)
    unused[used] = False
    if not len(without) and bool(unused.any()) and _cut_channels(gm, keep, axis, unused.nonzero()[:, 0].tolist()):
        index = ((~unused).cumsum(0) - 1)[index]
    if index.tolist() == list(range(int(value(keep).shape[axis]))):
        return keep
    return _picked(gm, keep, exit, axis, index)


def _beside(x: torch.Tensor, axis: int) -> list[Any]:
    """The sizes of the other axes."""
    return [n for i, n in enumerate(x.shape) if i != x.dim() + axis]


def _cut_channels(gm: GraphModule, node: Node, axis: int, gone: Sequence[int]) -> bool:
    """Cut channels out of a value and of all that has them; False where something (an output, a norm) holds them."""
    axes = Axes(gm)
    dims = axes.of.get(node)
    if not isinstance(dims, list) or not isinstance(dims[axis], list):
        return False
    inside = {id(leaf): leaf for atom in dims[axis] for leaf in leaves(atom)}
    for found in axes.classes():
        if id(found.leaf) in inside and found.kind in ("features", "channels"):
            index = index_map(dims[axis], found.leaf)
            if index is not None and index.tolist() == list(range(found.size)):
                cut(gm, axes, [(found.leaf, gone)])
                return True
    return False


def _picked(gm: GraphModule, keep: Node, exit: Node, axis: int, index: torch.Tensor) -> Node:
    """Channels of ``keep`` in another order; zeros where ``index`` is negative."""
    there, call = value(keep), ops.read(gm, exit)
    dialect = "function" if call is None or call.dialect == "module" else call.dialect
    site, path = Site(gm, Match(exit, dialect)), _owner(gm, exit)
    new = New(index.clamp(min=0).to(there.device), f"{path}.selected")
    picked = site.emit(words.index_select, keep, there.dim() + axis, new)
    if bool((index >= 0).all()):
        return picked
    mask = (index >= 0).to(there).reshape(-1, *([1] * (-1 - axis)))
    return site.emit(words.mul, picked, New(mask, f"{path}.selected_mask"))


def matched(weight: torch.Tensor) -> torch.Tensor:
    """
    For every output channel the input channel that it is most alike by a layer's weights (out, in, …); -1 if none.

    The correlation of an output with white inputs is its normalised weight.
    """
    strength = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    return assigned(strength / strength.norm(dim=1, keepdim=True).clamp(min=1e-12))


def assigned(alike: torch.Tensor) -> torch.Tensor:
    """
    For every row the column that it goes with, each used once, the sum of ``alike`` (rows, columns) the largest.

    -1 for rows that are left over.  Solved as an assignment (Kuhn, 1955).
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-alike.double().cpu().numpy())
    index = torch.full((len(alike),), -1)
    index[torch.as_tensor(rows)] = torch.as_tensor(columns)
    return index


def _strided(call: ops.Call) -> bool:
    return any(n != 1 for n in call.arguments["stride"])
