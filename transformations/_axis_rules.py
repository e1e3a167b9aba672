"""What each operation of the vocabulary does to axes: which of its operands' axes are one, and which its result has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt import ops
from fxopt import vocabulary as words
from fxopt.transformations import _axes
from fxopt.transformations._axes import Atom, Axes, Dim, Dims, block, factors, find, fresh, regroup, same, size_of, tag
from fxopt.transformations._memory import value

Rule = Callable[[Axes, Node, dict[str, Any]], Any]  # the result's dims; None: as its value is, blocked
RULES: dict[ops.Op, Rule] = {}


def apply(axes: Axes, node: Node, weighted: bool) -> Any:
    """The axes of the value of ``node``; makes axes one as the operation asks for."""
    if node.op == "get_attr":
        return axes.parameter(node) if isinstance(ops.constant(axes.gm, node), Tensor) else None
    if node.op == "placeholder":
        return _unknown(node, "an input of the graph has it")
    if node.op == "output":
        for source in node.all_input_nodes:
            _block_all(axes.of.get(source), "the output has it")
        return None
    call = axes.calls[node]
    if not weighted:
        return _mask(axes, node, call)
    held = value(node)
    if str(node.target) in _GROUPED and (product := _grouped_product(axes, node)) is not None:
        return product
    rule = RULES.get(call.op) if call is not None else None
    if call is not None and rule is not None and not call.inplace:
        found = rule(axes, node, call.arguments)
        if found is not None:
            _follow_numbers(axes, node, call)
            return found
    if held is None or isinstance(held, Tensor | tuple | list):
        axes.unknown[node.name] = str(call.op if call is not None else node.target)
    why = f"{call.op if call is not None else node.target} has it"
    for source in node.all_input_nodes:
        _block_all(axes.of.get(source), why)
    for path in _module_parameters(axes, node):
        _block_all(axes.parameter(ops.Attr(path)), why)
    return _unknown(node, why)


_SAME_NUMBERS = (words.view, words.reshape, words.flatten, words.to, words.contiguous)


def _follow_numbers(axes: Axes, node: Node, call: ops.Call) -> None:
    """Values that are numbers of units stay that in another shape or dtype."""
    source = call.arguments.get("input")
    if not isinstance(source, Node) or source not in axes.numbers:
        return
    # of what topk and sort give, the second are numbers from topk, the first from sort
    second = (made := axes.calls.get(source)) is not None and made.op is words.topk
    if call.op in _SAME_NUMBERS or (call.op is words.getitem and call.arguments["index"] == int(second)):
        axes.numbers[node] = axes.numbers[source]


def _mask(axes: Axes, node: Node, call: ops.Call | None) -> Any:
    """
    Of masks and positions no parameter has the axes; but one that is made of zeros for every head has the heads'.

    So their axes are followed as far as they are pointwise.
    """
    pointwise = call is not None and not call.inplace and RULES.get(call.op) in (_unary, _broadcast)
    if call is not None and pointwise and isinstance(value(node), Tensor):
        operands = [axes.parameter(x) for x in call.arguments.values() if isinstance(x, Node | ops.Attr)]
        shape = _shape(node)
        if all(d is not None and len(d) <= len(shape) for d in operands):
            return RULES[call.op](axes, node, call.arguments)
    return _unknown(node, "")


def _module_parameters(axes: Axes, node: Node) -> list[str]:
    module = ops.submodule(axes.gm, str(node.target)) if node.op == "call_module" else None
    return [] if module is None else [f"{node.target}.{name}" for name, _ in module.named_parameters()]


def _unknown(node: Node, why: str) -> Any:
    held = value(node)
    if isinstance(held, Tensor):
        return [fresh(n, why) for n in held.shape]
    if isinstance(held, tuple | list):
        return [[fresh(n, why) for n in t.shape] if isinstance(t, Tensor) else None for t in held]
    return None


def _block_all(found: Any, why: str) -> None:
    for d in found or ():
        if isinstance(d, Atom):
            block((d,), why)
        else:
            _block_all(d, why)


def _rule(*operations: ops.Op) -> Callable[[Rule], Rule]:
    def declare(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(operations, rule))
        return rule

    return declare


def _shape(node: Node) -> list[Any]:
    held = value(node)
    return [_axes.expression(n) for n in held.shape] if isinstance(held, Tensor) else []


# --- pointwise ------------------------------------------------------------------------------------------------------


@_rule(
    *(words.gelu, words.relu, words.relu6, words.silu, words.mish, words.hardswish, words.hardsigmoid, words.hardtanh),
    *(words.leaky_relu, words.elu, words.softplus, words.tanh, words.sigmoid, words.neg, words.abs, words.sqrt),
    *(words.rsqrt, words.reciprocal, words.exp, words.log, words.cos, words.sin, words.erf, words.floor, words.ceil),
    *(words.to, words.to_other, words.type_as, words.contiguous, words.clone, words.detach, words.lift_fresh_copy),
    *(words.identity, words.dropout, words.isnan, words.isinf, words.isfinite, words.logical_not, words.bitwise_not),
    *(words.zeros_like, words.ones_like, words.full_like, words.empty_like),
)
def _unary(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    return axes.parameter(a["input"])


@_rule(
    *(words.add, words.sub, words.mul, words.div, words.pow, words.minimum, words.maximum, words.clamp),
    *(words.eq, words.ne, words.lt, words.le, words.gt, words.ge, words.where, words.masked_fill),
    *(words.logical_and, words.logical_or, words.bitwise_and, words.bitwise_or, words.swiglu, words.floor_divide),
)
def _broadcast(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    operands = [axes.parameter(x) for x in a.values() if isinstance(x, Node | ops.Attr)]
    tensors = [d for d in operands if d is not None]
    if tensors and not isinstance(value(node), Tensor):
        return None  # how it is stretched is not known
    return broadcast(tensors, _shape(node))


def broadcast(operands: list[Dims], shape: list[Any]) -> Dims:
    """The axes of a result to which operands are stretched."""
    found: Dims = []
    for k in range(1, len(shape) + 1):
        wide = [d[-k] for d in operands if len(d) >= k and not same(size_of(d[-k]), 1)]
        for other in wide[1:]:
            _axes.unify(wide[0], other)
        found.insert(0, wide[0] if wide else [Atom(1)])
    return found


# --- linear layers and convolutions -----------------------------------------------------------------------------------


@_rule(words.linear)
def _linear(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    return _product(axes, a["input"], a["weight"], a["bias"], transposed=False)


@_rule(words.addmm)
def _addmm(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    return _product(axes, a["mat1"], a["mat2"], a["input"], transposed=True)


@_rule(words.mm)
def _mm(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    return _product(axes, a["input"], a["mat2"], None, transposed=True)


def _product(axes: Axes, x: Any, w: Any, b: Any, transposed: bool) -> Any:
    rows, weight, bias = axes.parameter(x), axes.parameter(w), axes.parameter(b)
    if not rows or weight is None or len(weight) != 2:
        return None
    features, inputs = (weight[1], weight[0]) if transposed else (weight[0], weight[1])
    _axes.unify(rows[-1], inputs)
    if bias is not None and bias and not same(size_of(bias[-1]), 1):
        _axes.unify(bias[-1], features)
    return [*rows[:-1], features]


@_rule(words.matmul, words.bmm)
def _matmul(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    left, right = axes.parameter(a["input"]), axes.parameter(a.get("other", a.get("mat2")))
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    _axes.unify(left[-1], right[-2])
    batch = broadcast([left[:-2], right[:-2]], _shape(node)[:-2])
    return [*batch, left[-2], right[-1]]


_GROUPED = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")


def _grouped_product(axes: Axes, node: Node) -> Any:
    """Rows (rows, in), sorted by expert, times the weights of the experts (experts, in, out)."""
    rows, weight = axes.parameter(node.args[0]), axes.parameter(node.args[1])
    if rows is None or weight is None or len(rows) != 2 or len(weight) != 3 or len(node.args) > 3:
        return None
    _axes.unify(rows[-1], weight[-2])
    ends = axes.parameter(node.args[2]) if len(node.args) > 2 else None
    if ends is not None and len(ends) == 1 and "experts" in find(ends[0][0]).tags:
        _axes.unify(weight[0], ends[0])
    else:
        block(weight[0], "an expert is chosen by its number")
    for dim in weight[1:]:
        tag(dim, "hidden")
    return [rows[0], weight[-1]]


@_rule(words.conv1d, words.conv2d, words.conv3d)
def _convolution(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x, weight, bias = axes.parameter(a["input"]), axes.parameter(a["weight"]), axes.parameter(a["bias"])
    if x is None or weight is None:
        return None
    spatial = len(weight) - 2
    channels = x[-1 - spatial]
    if a["groups"] == 1:
        _axes.unify(channels, weight[1])
    elif same(size_of(weight[1]), 1) and same(size_of(weight[0]), a["groups"]):
        _axes.unify(channels, weight[0])  # depthwise
    else:
        block((*channels, *weight[0], *weight[1]), "a convolution in groups has it")
    if bias is not None:
        _axes.unify(bias[0], weight[0])
    for dim in weight[2:]:
        block(dim, "it is a kernel's size")
    return [*x[: -1 - spatial], weight[0], *(fresh(n, "it is a place in an image") for n in _shape(node)[-spatial:])]


@_rule(words.embedding)
def _embedding(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    names = list(a)
    weight = axes.parameter(a["weight"])
    index = axes.parameter(a["input"] if "input" in names else a["indices"])
    if weight is None or index is None:
        return None
    block(weight[0], "an embedding is looked up by it")
    return [*index, weight[1]]


@_rule(words.index)
def _index(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    """Rows picked by one tensor of numbers: the other axes are as they were."""
    x, picks = axes.parameter(a["input"]), [i for i in a["indices"] if i is not None]
    held = value(picks[0]) if len(picks) == 1 and isinstance(picks[0], Node) else None
    if x is None or not isinstance(held, Tensor) or held.dtype == torch.bool:
        return None
    at = next(k for k, i in enumerate(a["indices"]) if i is not None)
    block(x[at], "it is picked from by number")
    return [*x[:at], *(fresh(n, "it is picked by number") for n in held.shape), *x[at + 1 :]]


# --- normalisation and attention ------------------------------------------------------------------------------------


@_rule(words.batch_norm)
def _batch_norm(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x = axes.parameter(a["input"])
    if x is None or len(x) < 2:
        return None
    for name in ("running_mean", "running_var", "weight", "bias"):
        if (own := axes.parameter(a[name])) is not None:
            _axes.unify(own[0], x[1])
    return x


@_rule(words.layer_norm, words.rms_norm, words.fused_rms_norm)
def _layer_norm(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x = axes.parameter(a["x"] if "x" in a else a["input"])
    if not x or len(a.get("normalized_shape", (0,))) != 1:
        return None
    for name in ("weight", "bias"):
        if (own := axes.parameter(a.get(name))) is not None:
            _axes.unify(own[-1], x[-1])
    tag(x[-1], "norm")
    return x


@_rule(words.scaled_dot_product_attention)
def _attention(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    names = list(a)
    q, k, v = (axes.parameter(a[n]) for n in names[:3])
    if q is None or k is None or v is None or len(q) < 3:
        return None
    for x, y in zip(k[:-2], v[:-2], strict=True):
        _axes.unify(x, y)
    for x, y in zip(q[:-3], k[:-3], strict=True):
        _axes.unify(x, y)
    heads, groups = size_of(q[-3]), size_of(k[-3])
    if same(heads, groups):
        _axes.unify(q[-3], k[-3])
    elif isinstance(heads, int) and isinstance(groups, int) and heads % groups == 0:
        _axes.unify(q[-3], [*k[-3], Atom(heads // groups)])
    _axes.unify(q[-1], k[-1])
    _axes.unify(k[-2], v[-2])
    if a.get("scale") is None:
        block(q[-1], "attention is scaled by its size")
    mask = axes.parameter(a.get("attn_mask"))
    if mask is not None:
        broadcast([[*q[:-1], k[-2]], mask], [*_sizes(q[:-1]), size_of(k[-2])])
    for dim in (q[-3], k[-3]):
        tag(dim, "heads")
    for dim in (q[-1], v[-1]):
        tag(dim, "head_dim")
    axes.attentions.append((node, k[-3]))
    return [*q[:-1], v[-1]]


def _sizes(dims: Dims) -> list[Any]:
    return [size_of(d) for d in dims]


@_rule(words.softmax, words.log_softmax)
def _softmax(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x = axes.parameter(a["input"])
    if x is None or a["dim"] is None:
        return None
    if not _chosen_from(axes, node):
        block(x[a["dim"]], "a softmax sums over it")
    return x


def _chosen_from(axes: Axes, node: Node) -> bool:
    """Whether the probabilities only say which experts a token goes to: without an expert, it goes to the others."""
    readers = [u for u in node.users if (c := axes.calls.get(u)) is None or c.op is not words.assert_tensor_metadata]
    calls = [axes.calls.get(u) for u in readers]
    if len(calls) != 1 or calls[0] is None:
        return False
    if calls[0].op is words.to:
        return _chosen_from(axes, readers[0])
    return calls[0].op is words.topk and calls[0].arguments["largest"]


# --- experts: the best few of an axis, by number ----------------------------------------------------------------------


@_rule(words.topk)
def _topk(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x, k = axes.parameter(a["input"]), a["k"]
    source = axes.calls.get(a["input"])
    if x is None or not isinstance(k, int) or not a["largest"] or source is None or source.op is not words.softmax:
        return None
    dim = x[a["dim"]]
    if not isinstance(size_of(dim), int):
        return None
    tag(dim, "experts")
    axes.least.append((dim, k))
    axes.numbers[node] = dim
    return _unknown(node, "they are the best of an axis")


@_rule(words.sort)
def _sort(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x = axes.parameter(a["input"])
    if x is None or a["input"] not in axes.numbers:
        return None
    axes.numbers[node] = axes.numbers[a["input"]]
    return [x, x]


@_rule(words.histc)
def _histogram(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    """How often each unit was chosen: one bin for each."""
    dim = axes.numbers.get(a["input"])
    if dim is None or len(dim) != 1 or (a["bins"], a["min"], a["max"]) != (size_of(dim), 0, size_of(dim) - 1):
        return None
    return [dim]


@_rule(words.cumsum)
def _cumulated(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    """Up to a unit that is never chosen there are as many as up to the one before it."""
    x = axes.parameter(a["input"])
    if x is None or axes.calls[a["input"]] is None or axes.calls[a["input"]].op is not words.histc:  # type: ignore[union-attr]
        return None
    return x


@_rule(words.mean, words.sum)
def _reduce(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x = axes.parameter(a["input"])
    if not x or a["dim"] is None:
        return None
    dims = a["dim"] if isinstance(a["dim"], tuple) else (a["dim"],)
    gone = {d % len(x) for d in dims}
    for d in gone:
        tag(x[d], "norm")
    return [[Atom(1)] if i in gone else d for i, d in enumerate(x) if a["keepdim"] or i not in gone]


@_rule(words.max_pool2d, words.avg_pool2d, words.adaptive_avg_pool2d)
def _pool(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x = axes.parameter(a["input"])
    return None if x is None else [*x[:-2], *(fresh(n, "it is a place in an image") for n in _shape(node)[-2:])]


# --- views ----------------------------------------------------------------------------------------------------------


@_rule(words.view, words.reshape, words.flatten, words.unflatten, words.squeeze)
def _view(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x, held = axes.parameter(a["input"]), value(node)
    return regroup(x, _shape(node)) if x is not None and isinstance(held, Tensor) else None


@_rule(words.transpose)
def _transpose(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x = list(axes.parameter(a["input"]) or ())
    if not x:
        return None
    i, j = a["dim0"], a["dim1"]
    x[i], x[j] = x[j], x[i]
    return x


@_rule(words.t)
def _t(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x = axes.parameter(a["input"])
    return None if x is None else x[::-1]


@_rule(words.permute)
def _permute(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x = axes.parameter(a["input"])
    return None if x is None else [x[i] for i in a["dims"]]


@_rule(words.unsqueeze)
def _unsqueeze(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x = list(axes.parameter(a["input"]) or ())
    if not x and axes.parameter(a["input"]) is None:
        return None
    x.insert(a["dim"] if a["dim"] >= 0 else len(x) + 1 + a["dim"], [Atom(1)])
    return x


@_rule(words.expand)
def _expand(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x, shape = axes.parameter(a["input"]), _shape(node)
    if x is None:
        return None
    padded = [[Atom(1)]] * (len(shape) - len(x)) + x
    return [d if same(size_of(d), n) else fresh(n) for d, n in zip(padded, shape, strict=True)]


@_rule(words.select)
def _select(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x = axes.parameter(a["input"])
    if x is None:
        return None
    gone = a["dim"] % len(x)
    block(x[gone], "it is selected from by number")
    return [d for i, d in enumerate(x) if i != gone]


@_rule(words.slice, words.narrow)
def _slice(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x, shape = axes.parameter(a["input"]), _shape(node)
    if x is None:
        return None
    axis = a["dim"] % len(x)
    if same(shape[axis], size_of(x[axis])):
        return x
    block(x[axis], "it is sliced by number")
    return [*x[:axis], fresh(shape[axis], "it is sliced by number"), *x[axis + 1 :]]


# --- joining and splitting ------------------------------------------------------------------------------------------


@_rule(words.cat)
def _cat(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    joined = [x for x in a["tensors"] if not _is_nothing(x)]
    parts = [axes.parameter(x) for x in joined if isinstance(x, Node)]
    known = [p for p in parts if p is not None]
    if not known or len(known) != len(joined) or any(len(p) != len(known[0]) for p in known):
        return None
    if len(known) == 1:
        return known[0]
    axis = a["dim"] % len(known[0])
    found = [list(d) for d in known[0]]
    for part in known[1:]:
        for i in range(len(found)):
            if i != axis:
                _axes.unify(found[i], part[i])
    if not all(isinstance(size_of(p[axis]), int) for p in known):
        return [*found[:axis], fresh(_shape(node)[axis], "it is joined of unknown sizes"), *found[axis + 1 :]]
    whole = Atom(size_of([Atom(sum(int(size_of(p[axis])) for p in known))]))
    whole.kind = "segments"
    whole.kids = [_one(p[axis]) for p in known]
    found[axis] = [whole]
    return found


def _is_nothing(x: Any) -> bool:
    """Whether it is a tensor of shape (0,), which joins anything: an empty cache of keys and values begins as one."""
    held = value(x) if isinstance(x, Node) else x
    return isinstance(held, Tensor) and held.dim() == 1 and same(_axes.expression(held.shape[0]), 0)


def _one(dim: Dim) -> Atom:
    """An axis as one atom."""
    parts = factors(dim)
    if len(parts) == 1:
        return parts[0]
    product = Atom(size_of(dim))
    product.kind, product.kids = "product", parts
    return product


@_rule(words.split, words.chunk)
def _split(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x, held = axes.parameter(a["input"]), value(node)
    if x is None or not isinstance(held, tuple | list):
        return None
    axis = a["dim"] % len(x)
    sizes = [_axes.expression(t.shape[axis]) for t in held]
    parts = [find(p) for p in factors(x[axis]) if not same(find(p).size, 1)]
    whole = parts[0] if len(parts) == 1 else None
    if whole is not None and whole.kind is None and isinstance(whole.size, int):
        kids = _axes._refine(whole, "segments", sizes)
    elif whole is not None and whole.kind == "segments" and [find(k).size for k in whole.kids] == sizes:
        kids = whole.kids
    else:
        block(x[axis], "it is split where its factors do not end")
        kids = [Atom(n, "it is split where its factors do not end") for n in sizes]
    return [[*x[:axis], [kid], *x[axis + 1 :]] for kid in kids]


@_rule(words.unbind)
def _unbind(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x, held = axes.parameter(a["input"]), value(node)
    if x is None or not isinstance(held, tuple | list):
        return None
    axis = a["dim"] % len(x)
    block(x[axis], "it is taken apart")
    return [[*x[:axis], *x[axis + 1 :]] for _ in held]


@_rule(words.getitem)
def _getitem(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    x, index = axes.of.get(a["input"]), a["index"]
    if isinstance(x, list) and isinstance(index, int) and isinstance(value(a["input"]), tuple | list):
        return x[index]
    return None


@_rule(words.size, words.numel, words.attribute)
def _size(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    return []


@_rule(words.assert_tensor_metadata)
def _check(axes: Axes, node: Node, a: dict[str, Any]) -> Any:
    said = any(a[n] is not None for n in ("size", "stride"))
    return None if said else []


def is_symbol(x: Any) -> bool:
    """Whether a size is not known as a number."""
    return not isinstance(x, int) or isinstance(x, torch.SymInt)
