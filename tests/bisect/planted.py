"""Bugs of the kinds that compilers have, each planted in one of many places where a pass rewrites rightly."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.transformation import Transformation
from tests.bisect import captures

aten = torch.ops.aten


@dataclass(frozen=True)
class Bug:
    graph: Callable[[], Any]
    sites: Callable[[Any], list[Any]]  # of a graph module: the nodes that are rewritten
    wrong: Callable[[Any, Any], Any]
    right: Callable[[Any, Any], Any] | None = None  # the node anew
    at: int = 3
    kind: str = "values"
    check: str = "outputs"
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Any = None  # instead of those of the capture
    hint: str = ""
    size: int = 8  # the reproducer has at most that many operations on either side


@dataclass(frozen=True)
class Plant(Transformation):
    """Rewrites every site, the one of number ``at`` wrongly."""

    bug: str
    at: int

    def transform(self, graph_module):
        bug = BUGS[self.bug]
        for i, node in enumerate(bug.sites(graph_module)):
            (bug.wrong if i == self.at else bug.right or swap)(graph_module, node)


@dataclass(frozen=True)
class Harmless(Transformation):
    """Makes every call of an operator anew."""

    target: str

    def transform(self, graph_module):
        for node in calls(graph_module, self.target):
            swap(graph_module, node)


def calls(gm, *targets):
    return [n for n in gm.graph.nodes if n.op == "call_function" and str(n.target) in {f"aten.{t}" for t in targets}]


def swap(gm, node, *args, target=None, **kwargs):
    """The node anew: with other arguments, where given, or another target."""
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(target or node.target, args or node.args, kwargs or node.kwargs)
    new.meta.update({k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack", "stack_trace")})
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return new


def add(gm, node, target, *args, **kwargs):
    with gm.graph.inserting_before(node):
        return gm.graph.call_function(target, args, kwargs)


def put(gm, node, new):
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def after(gm, node, target, *args):
    """The node anew, and ``target`` of it in its place."""
    again = add(gm, node, node.target, *node.args, **node.kwargs)
    put(gm, node, add(gm, node, target, again, *args))


def linears(part):
    """The linear layers whose weight's path ends so."""
    return lambda gm: [n for n in calls(gm, "linear.default") if str(n.args[1].target).endswith(f"{part}.weight")]


def edited(**changes):
    """Edits positional arguments of the node where it stands."""

    def edit(gm, node):
        args = list(node.args)
        for place, value in changes.items():
            args[int(place[1:])] = value
        node.args = tuple(args)

    return edit


def said(**kwargs):
    """Sets keyword arguments of the node where it stands."""

    def say(gm, node):
        node.kwargs = {**node.kwargs, **kwargs}

    return say


# --------------------------------------------------------------------------------------------------------------- wrong


def transposed(gm, node):
    x, w, *b = node.args
    swap(gm, node, x, add(gm, node, aten.t.default, w), *b)


def addmm_transposed(gm, node):
    b, x, w = node.args
    swap(gm, node, b, x, add(gm, node, aten.t.default, w))


def heads_swapped(gm, node):
    q, k, *rest = node.args
    swap(gm, node, k, q, *rest)


def in_bfloat16(gm, node):
    x = add(gm, node, aten.to.dtype, node.args[0], torch.bfloat16)
    short = add(gm, node, aten.to.dtype, x, torch.float32)
    swap(gm, node, short, *node.args[1:])


def long_sequences(gm, node):
    size = add(gm, node, aten.sym_size.int, node.args[0], 1)
    factor = add(gm, node, operator.add, add(gm, node, operator.floordiv, size, 14), 1)
    again = add(gm, node, node.target, *node.args, **node.kwargs)
    put(gm, node, add(gm, node, aten.mul.Tensor, again, factor))


def fixed_sizes(gm, node):
    swap(gm, node, node.args[0], [2, 10, *node.args[1][2:]])


def much_work(gm, node):
    big = add(gm, node, aten.ones.default, [1500, 1500])
    mean = add(gm, node, aten.mean.default, add(gm, node, aten.mm.default, big, big))
    again = add(gm, node, node.target, *node.args, **node.kwargs)
    put(gm, node, add(gm, node, aten.add.Tensor, again, add(gm, node, aten.mul.Tensor, mean, 0.0)))


def part_of(start, stop):
    def read(gm, node):
        put(gm, node, add(gm, node, aten.slice.Tensor, node.args[0].args[0], 2, start, stop))

    return read


def keys_of_splits(gm):
    return [n for n in gm.graph.nodes if n.target is operator.getitem and n.args[1] == 1 and n.args[0].args[1] == 32]


def new_buffer(gm, node, value):
    name = f"kept_{node.name}"
    gm.register_buffer(name, value)
    with gm.graph.inserting_before(node):
        read = gm.graph.get_attr(name)
    node.args = (*node.args[:3], read, *node.args[4:])


def held(gm, node):
    return gm.get_buffer(str(node.target)) if "running" in str(node.target) else gm.get_parameter(str(node.target))


def folded(spread):
    """conv, then batch_norm, as one conv."""

    def fold(gm, node):
        conv, w, b, mean, var = node.args[:5]
        weight, bias, mean, var = (held(gm, n).detach() for n in (w, b, mean, var))
        factor = weight * torch.rsqrt(var + node.args[7]) if spread else weight
        kernel = held(gm, conv.args[1]).detach() * factor[:, None, None, None]
        gm.register_parameter(f"kernel_{node.name}", torch.nn.Parameter(kernel))
        gm.register_parameter(f"shift_{node.name}", torch.nn.Parameter(bias - mean * factor))
        with gm.graph.inserting_before(node):
            read = [gm.graph.get_attr(f"{part}_{node.name}") for part in ("kernel", "shift")]
        put(gm, node, add(gm, node, aten.conv2d.default, conv.args[0], *read, *conv.args[3:]))
        gm.graph.erase_node(conv)

    return fold


def after_convs(gm):
    return [n for n in calls(gm, "batch_norm.default") if {str(u.target) for u in n.users} == {"aten.relu.default"}]


def flipped(gm, node):
    kernel = add(gm, node, aten.flip.default, node.args[1], [2, 3])
    swap(gm, node, node.args[0], kernel, *node.args[2:])


def squares(gm):
    """Convolutions with kernels of 3 by 3 and stride 1."""
    return [n for n in calls(gm, "conv2d.default") if n.args[3:5] in (([1, 1], [1, 1]), (((1, 1)), (1, 1)))]


def dilated(gm, node):
    x, w, b, stride, _ = node.args[:5]
    swap(gm, node, x, w, b, stride, [2, 2], [2, 2])


def no_op(gm, node):
    put(gm, node, node.args[0])


def overflowing(gm, node):
    e = add(gm, node, aten.exp.default, node.args[0])
    total = add(gm, node, aten.sum.dim_IntList, e, [-1], True)
    put(gm, node, add(gm, node, aten.log.default, add(gm, node, aten.div.Tensor, e, total)))


def erased(gm, node):
    gm.graph.erase_node(node)


def writes(name):
    return lambda gm: [n for n in calls(gm, "add_.Tensor") if n.args[0].op == "get_attr"]


def inner_relus(gm):
    """Those with one user: the others are added to what they feed, so that they are one rewrite."""
    return [n for n in calls(gm, "relu.default") if len(n.users) == 1]


def raising(gm, node):
    raise IndexError(f"{node.name} has no argument 9")


def inner_residuals(gm):
    """Every second addition of two values of one width: those that do not read each other."""
    found = [n for n in calls(gm, "add.Tensor") if "layer_norm" in {str(u.target).split(".")[1] for u in n.users}]
    return found[1::2]


LARGE = [
    (torch.randn(6, 16, generator=torch.Generator().manual_seed(1)),),
    (900 * torch.randn(6, 16, generator=torch.Generator().manual_seed(2)),),
]
SDPA = "scaled_dot_product_attention.default"


def op(*names):
    return lambda gm: calls(gm, *names)


def constant(target, value):
    return lambda gm: [n for n in calls(gm, target) if n.args[1] == value]


def other(place, value):
    """The node anew, with one argument another."""

    def change(gm, node):
        args = list(node.args)
        args[place] = value
        swap(gm, node, *args)

    return change


def kept(**kwargs):
    """The node anew, with other keyword arguments."""
    return lambda gm, node: swap(gm, node, **{**node.kwargs, **kwargs})


bert, gpt2, resnet, mlp = captures.bert, captures.gpt2, captures.resnet, captures.mlp
BUGS = {
    "tanh for erf": Bug(
        bert, op("gelu.default"), said(approximate="tanh"), said(approximate="none"),
        hint="gelu approximate 'none' → 'tanh'", options={"rtol": 0, "atol": 1e-5},
    ),
    "wrong epsilon": Bug(
        bert, op("layer_norm.default"), edited(_4=1e-2), edited(_5=True), at=5,
        hint="layer_norm eps 1e-12 → 0.01",
    ),
    "dropped bias": Bug(
        bert, linears("intermediate.dense"), lambda gm, n: swap(gm, n, *n.args[:2]), hint="linear bias"
    ),
    "transposed weight": Bug(bert, linears("attention.output.dense"), transposed),
    "swapped Q and K": Bug(bert, op(SDPA), heads_swapped, hint="query, key"),
    "missing scale": Bug(bert, op(SDPA), kept(scale=1.0), hint="scale"),
    "mask lost, for a padded batch only": Bug(bert, op(SDPA), lambda gm, n: swap(gm, n, *n.args[:3], scale=None)),
    "dtype lost on the way": Bug(bert, linears("intermediate.dense"), in_bfloat16, at=6),
    "wrong for long sequences only": Bug(bert, linears("intermediate.dense"), long_sequences, at=1),
    "crash for other sizes only": Bug(
        bert, op("view.default"), fixed_sizes, at=11, check="crash", kind="raised RuntimeError"
    ),
    "slow only": Bug(bert, op("gelu.default"), much_work, check="slower", kind="slower", size=12),
    "raises in the pass": Bug(bert, op("gelu.default"), raising, kind="raised IndexError", size=70),
    "wrong exponent": Bug(gpt2, op("pow.Tensor_Scalar"), edited(_1=2.0), swap, hint="3.0 → 2.0"),
    "truncated constant": Bug(gpt2, constant("mul.Tensor", 0.044715), other(1, 0.04), hint="0.044715 → 0.04"),
    "factor lost": Bug(gpt2, constant("mul.Tensor", 0.5), other(1, 1.0)),
    "causal mask lost": Bug(gpt2, op(SDPA), lambda gm, n: swap(gm, n, *n.args[:3], scale=n.kwargs.get("scale"))),
    "split off by one": Bug(gpt2, keys_of_splits, part_of(33, 65), part_of(32, 64)),
    "merged projections read in another order": Bug(gpt2, keys_of_splits, part_of(0, 32), part_of(32, 64)),
    "transposed weight of a Conv1D": Bug(
        gpt2, lambda gm: [n for n in calls(gm, "addmm.default") if "attn.c_proj" in str(n.args[2].target)],
        addmm_transposed,
    ),
    "positions off by one": Bug(gpt2, constant("add.Tensor", 0), other(1, 1), at=0, size=16),
    "residual scaled": Bug(gpt2, inner_residuals, said(alpha=0.5), said(alpha=1), at=2, hint="add alpha"),
    "dropout left on": Bug(gpt2, op("tanh.default"), lambda gm, n: after(gm, n, aten.mul.Tensor, 1.1), at=4),
    "epsilon of a batch norm": Bug(resnet, op("batch_norm.default"), edited(_7=0.1), edited(_8=False), at=7),
    "stale buffer": Bug(
        resnet, op("batch_norm.default"), lambda gm, n: new_buffer(gm, n, torch.zeros_like(held(gm, n.args[3]))),
        lambda gm, n: new_buffer(gm, n, held(gm, n.args[3]).clone()), at=5,
    ),
    "folded without the variance": Bug(resnet, after_convs, folded(False), folded(True), at=6, size=2),
    "flipped kernel": Bug(resnet, op("conv2d.default"), flipped, at=8),
    "dilated kernel": Bug(resnet, squares, dilated, at=4),
    "clipped activation": Bug(
        resnet, inner_relus, lambda gm, n: swap(gm, n, n.args[0], 0.0, 1.0, target=aten.hardtanh.default),
        at=2, size=12,
    ),
    "activation lost": Bug(resnet, inner_relus, no_op, at=4, size=12),
    "wrong axis": Bug(mlp, op("log_softmax.int"), other(1, 0), at=7, hint="log_softmax dim -1 → 0"),
    "broadcasting": Bug(mlp, op("mean.dim"), other(1, [0]), at=9),
    "split of other sizes": Bug(mlp, op("split_with_sizes.default"), edited(_1=[4, 4, 8]), swap, at=3),
    "parts in another order": Bug(mlp, op("cat.default"), lambda gm, n: swap(gm, n, n.args[0][::-1], -1), at=8),
    "dead write removed": Bug(mlp, op("fill_.Scalar", "fill_.Tensor"), erased, at=6, size=10),
    "write to a buffer lost": Bug(mlp, writes("calls"), erased, at=1, kind="not written"),
    "in place on a shared value": Bug(
        mlp, op("tanh.default"), lambda gm, n: swap(gm, n, target=aten.tanh_.default), at=5, size=12
    ),
    "input written to": Bug(
        mlp, op("linear.default"), lambda gm, n: swap(gm, n, add(gm, n, aten.mul_.Tensor, n.args[0], 1.5), *n.args[1:]),
        at=0, kind="written", size=10**6,
    ),
    "dtype of an output": Bug(
        mlp, op("argmax.default"), lambda gm, n: after(gm, n, aten.to.dtype, torch.int32), at=0, kind="dtype"
    ),
    "NaN for large values only": Bug(
        mlp, op("log_softmax.int"), overflowing, at=6, check="nan", kind="not finite", inputs=LARGE
    ),
}  # fmt: skip
