"""Every operation of the vocabulary, in every spelling: read, written again in each dialect, run, and compared."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from fxopt import ops, vocabulary
from fxopt.ops import VOCABULARY, Attr, Op
from fxopt.sparse import BlockSparseLinear, SemiStructuredLinear, SparseConv2d, SparseLinear
from fxopt.text import show
from tests.builtin import TINY, built_in, each
from tests.rewriting import trace

OPS = {name: o for name, o in vars(vocabulary).items() if isinstance(o, Op)}


def f(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def positive(*sizes):
    return f(*sizes).abs() + 0.5


def ints(*sizes, high=4):
    return torch.randint(0, high, sizes, generator=torch.Generator().manual_seed(len(sizes)))


def bools(*sizes):
    return f(*sizes) > 0


X, Y, N, B = f(2, 3, 4), f(2, 3, 4) + 1, ints(2, 3), bools(2, 3, 4)
NORM = {"weight": f(4), "bias": f(4)}
F32, F64, CPU = torch.float32, torch.float64, torch.device("cpu")
UNARY = """relu relu6 silu mish hardswish hardsigmoid tanh sigmoid neg abs exp cos sin erf floor ceil isnan isinf
    isfinite contiguous detach lift_fresh_copy identity numel clone zeros_like ones_like empty_like rand_like
    randn_like logical_not glu softplus hardtanh elu leaky_relu squeeze flatten tril triu""".split()  # noqa: SIM905
DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")

# The operation's arguments, by name; together the examples of an operation exercise each of its spellings.
EXAMPLES = {
    **{name: [{"input": X}] for name in UNARY},
    **{name: [{"input": X, "other": Y}, {"input": X, "other": 0.5}] for name in COMPARISONS},
    **{name: [{"input": X, "other": Y}] for name in ("minimum", "maximum", "matmul_same")},
    **{name: [{"input": N, "other": N + 1}, {"input": N, "other": 3}] for name in
       ("bitwise_and", "bitwise_or", "bitwise_xor")},
    **{name: [{"input": B, "other": ~B}] for name in ("logical_and", "logical_or")},
    **{name: [{"input": positive(2, 3)}] for name in ("sqrt", "rsqrt", "reciprocal", "log")},
    **{name: [{"input": X}, {"input": X, "dim": (1,)}, {"input": X, "dim": (0, -1), "keepdim": True}] for name in
       ("sum", "mean", "amax", "amin")},
    **{name: [{"input": B}, {"input": B, "dim": (1,)}, {"input": B, "dim": 1}, {"input": B, "dim": (0, 2)}] for name in
       ("any", "all")},
    **{name: [{"input": X, "dim": 1}] for name in ("unbind", "unsqueeze", "size", "argmax", "argmin")},
    "linear": [{"input": X, "weight": f(5, 4), "bias": f(5)}, {"input": X, "weight": f(5, 4)}],
    "addmm": [{"input": f(5), "mat1": f(3, 4), "mat2": f(4, 5)},
              {"input": f(5), "mat1": f(3, 4), "mat2": f(4, 5), "beta": 2, "alpha": 3}],
    "baddbmm": [{"input": f(2, 3, 5), "batch1": X, "batch2": f(2, 4, 5), "alpha": 0.5}],
    "matmul": [{"input": X, "other": f(4, 5)}],
    "mm": [{"input": f(3, 4), "mat2": f(4, 5)}],
    "bmm": [{"input": X, "mat2": f(2, 4, 5)}],
    "einsum": [{"equation": "bij,bkj->bik", "operands": (X, Y)}],
    "conv1d": [{"input": f(2, 3, 9), "weight": f(4, 3, 3), "bias": f(4), "stride": (2,), "padding": (1,)},
               {"input": f(2, 3, 9), "weight": f(4, 3, 3), "padding": "same"}],
    "conv2d": [{"input": f(2, 4, 9, 9), "weight": f(4, 2, 3, 3), "stride": (2, 1), "groups": 2},
               {"input": f(2, 2, 9, 9), "weight": f(4, 2, 3, 3), "bias": f(4), "padding": "valid"}],
    "conv3d": [{"input": f(1, 2, 5, 5, 5), "weight": f(4, 2, 3, 3, 3), "dilation": (2, 1, 2)},
               {"input": f(1, 2, 5, 5, 5), "weight": f(4, 2, 3, 3, 3), "padding": "same"}],
    "conv_transpose1d": [{"input": f(2, 3, 9), "weight": f(3, 4, 3), "bias": f(4), "stride": (2,)}],
    "conv_transpose2d": [{"input": f(2, 4, 5, 5), "weight": f(4, 2, 3, 3), "groups": 2, "dilation": (2, 2)}],
    "conv_transpose3d": [{"input": f(1, 2, 3, 3, 3), "weight": f(2, 2, 3, 3, 3), "output_padding": (1, 1, 1),
                          "stride": (2, 2, 2)}],
    "batch_norm": [{"input": f(3, 4, 5), "running_mean": f(4), "running_var": positive(4), "eps": 1e-3, **NORM},
                   {"input": f(3, 4), "running_mean": f(4), "running_var": positive(4), "training": True, **NORM}],
    "layer_norm": [{"input": X, "normalized_shape": (4,), **NORM, "eps": 1e-6},
                   {"input": X, "normalized_shape": (3, 4)}],
    "rms_norm": [{"input": X, "normalized_shape": (4,), "weight": f(4), "eps": 1e-6}],
    "group_norm": [{"input": f(2, 4, 5), "num_groups": 2, **NORM}],
    **{name: [{"input": X, "p": 0.3, "training": True}, {"input": X, "p": 0.3, "training": False}] for name in
       DROPOUTS},
    "gelu": [{"input": X}, {"input": X, "approximate": "tanh"}],
    "softmax": [{"input": X, "dim": -1}, {"input": X, "dim": 1, "dtype": F64}],
    "log_softmax": [{"input": X, "dim": -1}, {"input": X, "dim": 1, "dtype": F64}],
    "scaled_dot_product_attention": [
        {"query": f(2, 4, 3, 8), "key": f(2, 2, 5, 8), "value": f(2, 2, 5, 8), "attn_mask": f(3, 5),
         "enable_gqa": True},
        {"query": f(2, 4, 3, 8), "key": f(2, 4, 3, 8), "value": f(2, 4, 3, 8), "is_causal": True, "scale": 0.5}],
    "embedding": [{"input": N, "weight": f(4, 5)}, {"input": N, "weight": f(4, 5), "padding_idx": 2}],
    "one_hot": [{"input": N}, {"input": N, "num_classes": 7}],
    "max_pool2d": [{"input": f(2, 3, 9, 9), "kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1)}],
    "avg_pool2d": [{"input": f(2, 3, 9, 9), "kernel_size": (3, 3), "stride": (3, 3), "count_include_pad": False}],
    "adaptive_avg_pool2d": [{"input": f(2, 3, 9, 9), "output_size": (2, 1)}],
    "pad": [{"input": X, "pad": (1, 2), "value": 3.0}, {"input": X, "pad": (1, 2), "mode": "reflect"}],
    "add": [{"input": X, "other": Y}, {"input": X, "other": 2}, {"input": X, "other": Y, "alpha": 2}],
    "sub": [{"input": X, "other": Y}, {"input": X, "other": 2.5}, {"input": 2.5, "other": X}],
    "mul": [{"input": X, "other": Y}, {"input": X, "other": 0.1}],
    "div": [{"input": X, "other": Y}, {"input": X, "other": 0.3}, {"input": X, "other": Y, "rounding_mode": "floor"},
            {"input": X, "other": 3, "rounding_mode": "trunc"}],
    "floor_divide": [{"input": N, "other": N + 1}, {"input": N, "other": 2}],
    "remainder": [{"input": N, "other": N + 1}, {"input": N, "other": 3}, {"input": 7, "other": N + 1}],
    "pow": [{"input": X, "exponent": 2}, {"input": positive(2, 3), "exponent": f(2, 3)},
            {"input": 10000.0, "exponent": f(3)}],
    "clamp": [{"input": X, "min": -0.5, "max": 0.5}, {"input": X, "min": Y}, {"input": X, "min": 0.1},
              {"input": X, "max": 0.1}],
    "where": [{"condition": B, "input": X, "other": Y}, {"condition": B, "input": X, "other": -1.0},
              {"condition": B, "input": 1.0, "other": X}, {"condition": B, "input": 1.0, "other": 2.0}],
    "masked_fill": [{"input": X, "mask": B, "value": -9.0}, {"input": X, "mask": B, "value": torch.tensor(3.0)}],
    "bitwise_not": [{"input": N}],
    "cumsum": [{"input": X, "dim": 1}, {"input": N, "dim": -1, "dtype": F32}],
    "topk": [{"input": X, "k": 2}, {"input": X, "k": 2, "dim": 1, "largest": False}],
    "sort": [{"input": X}, {"input": N, "dim": 0, "stable": True, "descending": True}],
    "histc": [{"input": X, "bins": 4, "min": -1, "max": 1}],
    "view": [{"input": X, "size": (6, -1)}],
    "reshape": [{"input": X, "shape": (4, 6)}],
    "unflatten": [{"input": X, "dim": -1, "sizes": (2, 2)}],
    "squeeze": [{"input": f(1, 3, 1)}, {"input": f(1, 3, 1), "dim": 0}, {"input": f(1, 3, 1), "dim": (0, 2)}],
    "transpose": [{"input": X, "dim0": 0, "dim1": -1}],
    "t": [{"input": f(2, 3)}],
    "permute": [{"input": X, "dims": (2, 0, 1)}],
    "movedim": [{"input": X, "source": 0, "destination": 2}, {"input": X, "source": (0, 1), "destination": (1, 2)}],
    "expand": [{"input": f(3, 1), "size": (2, -1, 4)}],
    "expand_as": [{"input": f(3, 1), "other": X}],
    "repeat": [{"input": f(2, 3), "repeats": (2, 1, 2)}],
    "repeat_interleave": [{"input": X, "repeats": 2, "dim": 1},
                          {"input": X, "repeats": torch.tensor([1, 2, 3]), "dim": 1}],
    "attribute": [{"input": X, "name": "mT"}],
    "getitem": [{"input": X, "index": 1}, {"input": X, "index": (slice(None), None, slice(1, 3), -1)},
                {"input": X, "index": (..., N.clamp(max=3))}],
    "select": [{"input": X, "dim": 1, "index": -1}],
    "slice": [{"input": X, "dim": 1, "start": 1, "end": 3}, {"input": X, "dim": 2, "step": 2}],
    "narrow": [{"input": X, "dim": 1, "start": 1, "length": 2}],
    "index": [{"input": X, "indices": (None, torch.tensor([2, 0]))}],
    "index_select": [{"input": X, "dim": 1, "index": torch.tensor([2, 0])}],
    "index_put": [{"input": f(4), "indices": (torch.tensor([1, 1]),), "values": f(2), "accumulate": True}],
    "index_add": [{"input": f(4, 2), "dim": 0, "index": torch.tensor([1, 1]), "source": f(2, 2), "alpha": 2}],
    "gather": [{"input": f(2, 3), "dim": 1, "index": torch.tensor([[0, 2], [1, 1]])}],
    "scatter_add": [{"input": f(2, 3), "dim": 1, "index": torch.tensor([[0, 2], [1, 1]]), "src": f(2, 2)}],
    "cat": [{"tensors": (X, Y), "dim": -1}],
    "stack": [{"tensors": (X, Y), "dim": 1}],
    "split": [{"input": X, "split_size": 3, "dim": 2}, {"input": X, "split_size": (1, 2), "dim": 1}],
    "chunk": [{"input": X, "chunks": 2, "dim": -1}],
    "flip": [{"input": X, "dims": (0, 2)}],
    "roll": [{"input": X, "shifts": (1,), "dims": (1,)}],
    "to": [{"input": X, "dtype": F64, "copy": True}, {"input": X, "dtype": F64},
           {"input": X, "device": CPU, "dtype": F64},
           {"input": X, "device": CPU}, *({"input": X, "dtype": d} for d in (F32, torch.float16, torch.bfloat16,
                                                                              torch.int32, torch.int64, torch.bool))],
    "to_other": [{"input": X, "other": N}],
    "type_as": [{"input": X, "other": N}],
    "contiguous": [{"input": X.mT}, {"input": f(2, 3, 4, 4), "memory_format": torch.channels_last}],
    "copy": [{"input": X, "src": Y}],
    "fill": [{"input": X, "value": 3.0}, {"input": X, "value": torch.tensor(2.0)}],
    "assert_tensor_metadata": [{"input": X, "dtype": F32, "device": CPU}],
    "arange": [{"end": 5}, {"end": 5, "start": 2, "dtype": F32}, {"end": 5, "start": 1, "step": 2, "device": CPU}],
    **{name: [{"size": (2, 3), "dtype": F64}] for name in ("zeros", "ones", "empty", "rand", "randn")},
    "full": [{"size": (2, 3), "fill_value": 2.5}],
    "full_like": [{"input": X, "fill_value": 2.5}],
    "new_zeros": [{"input": X, "size": (2, 3)}],
    "new_ones": [{"input": X, "size": (), "dtype": torch.bool}],
    "new_full": [{"input": X, "size": (2, 3), "fill_value": 7}],
    "add_layer_norm": [{"x": X, "residual": Y, "normalized_shape": (4,), **NORM}],
    "add_layer_norm_sum": [{"x": X, "residual": Y, "normalized_shape": (4,), **NORM}],
    "fused_rms_norm": [{"x": X, "weight": f(4), "eps": 1e-5}],
    "swiglu": [{"gate": X, "up": Y}],
    "swiglu_packed": [{"gate_up": X}],
    "linear_relu": [{"x": X, "weight": f(5, 4), "bias": f(5)}],
    "linear_gelu": [{"x": X, "weight": f(5, 4), "bias": f(5), "approximate": "tanh"}],
    "conv_relu": [{"x": f(2, 3, 9), "weight": f(4, 3, 3), "bias": None, "stride": (1,), "padding": (1,),
                   "dilation": (1,), "groups": 1}],
    "packed_linear": [{"x": X, "weight": f(5, 4), "bias": f(5), "activation": "relu"}],
    "packed_conv2d": [{"x": f(2, 3, 9, 9), "weight": f(4, 3, 3, 3), "bias": f(4), "other": None, "stride": (1, 1),
                       "padding": (1, 1), "dilation": (1, 1), "groups": 1, "activation": "relu"}],
    "layer_norm_linear_layer_norm": [{"x": X, "normalized_shape1": (4,), "norm_weight1": f(4), "norm_bias1": f(4),
                                      "eps1": 1e-5, "weight": f(5, 4), "bias": None, "normalized_shape2": (5,),
                                      "norm_weight2": f(5), "norm_bias2": None, "eps2": 1e-6}],
}  # fmt: skip
EXAMPLES.pop("matmul_same")


def some_zeros(layer):
    with torch.no_grad():
        layer.weight.mul_(torch.arange(layer.weight.numel()).reshape(layer.weight.shape) % 3 > 0)
    return layer.eval()


BLOCKS = BlockSparseLinear.from_dense(nn.Linear(32, 16), 0.5, block_shape=(16, 16)).eval()
PAIRS = SemiStructuredLinear.from_dense(nn.Linear(64, 32)).eval()
LINEAR = SparseLinear.from_dense(some_zeros(nn.Linear(4, 5)))
CONVOLUTION = SparseConv2d.from_dense(some_zeros(nn.Conv2d(4, 6, 3, padding=1, groups=2)))
EXAMPLES |= {
    "block_linear": [{"x": f(3, 32), "data": BLOCKS.data.detach(), "bias": f(16), "crow": BLOCKS.crow,
                      "col": BLOCKS.col, "index": BLOCKS.index, "features": 16}],
    "semi_structured_linear": [{"x": f(3, 64), "values": PAIRS.values.detach(), "bias": f(32),
                                "metadata": PAIRS.metadata}],
    "sparse_linear": [{"x": X, "values": LINEAR.values.detach(), "bias": f(5), **LINEAR.pattern._asdict()}],
    "sparse_conv2d": [{"x": f(2, 4, 7, 7), "values": CONVOLUTION.values.detach(), "bias": f(6),
                       **CONVOLUTION.pattern._asdict(), "kernel_size": (3, 3), "stride": (1, 1),
                       "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 2}],
}  # fmt: skip
# Whatever was in memory; and masks that the spellings of 1, 2 and 3 dimensions draw each in its own order
TENSORLESS_VALUES = ("empty", "empty_like", "feature_dropout", "feature_alpha_dropout")


def graph_of(example):
    """A graph with a placeholder for each tensor of ``example``; the example with those, and the tensors."""
    graph, tensors = Graph(), []

    def hold(value):
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(f"x{len(tensors)}")
        node.meta["val"] = value
        tensors.append(value)
        return node

    return graph, tree_map(hold, example), tensors


def run(graph, node, tensors):
    graph.output(node)
    graph.lint()
    torch.manual_seed(0)
    return GraphModule({}, graph), GraphModule({}, graph)(*(t.clone() for t in tensors))


def agree(a, b, name):
    a, b = tree_leaves(a), tree_leaves(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if not isinstance(x, torch.Tensor):
            assert x == y
            continue
        assert x.dtype == y.dtype and x.shape == y.shape
        if name not in TENSORLESS_VALUES:
            assert torch.equal(x, y) or torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)


def spelled(meaning, example):
    """Each spelling that can say ``example``, as its target and the call it makes of it."""
    for spelling in meaning.spellings:
        graph, arguments, tensors = graph_of(example)
        full = meaning.defaults | arguments
        if spelling.dialect == "module" or not ops._says(spelling, meaning, full) or not ops._fits(spelling, full):
            continue
        args, kwargs = spelling.say({n: v for n, v in full.items() if v is not ops.REQUIRED})
        if isinstance(spelling.target, str):
            node = graph.call_method(spelling.target, args, kwargs)
        else:
            node = graph.call_function(spelling.target, args, kwargs)
        yield spelling, graph, node, tensors


def by_value(arguments, tensors):
    """The arguments with the number of the placeholder in place of a node, for comparison."""
    return {n: tree_map(lambda v: str(v) if isinstance(v, Node) else v, v) for n, v in arguments.items()}


@pytest.mark.filterwarnings("ignore:dropout[23]d. Received")  # of a shape that only its siblings take
@pytest.mark.parametrize("name", OPS)
def test_each_spelling_is_read_and_written_again(name):
    meaning = OPS[name]
    exercised = set()
    for example in EXAMPLES[name]:
        expected, text, read_as = None, None, None
        for spelling, graph, node, tensors in spelled(meaning, example):
            exercised.add(spelling.target)
            gm, result = run(graph, node, tensors)
            node = next(n for n in gm.graph.nodes if n.op in ("call_function", "call_method"))
            call = ops.read(gm, node)
            assert call is not None and call.op is meaning, (spelling.target, ops.unread(gm, node))
            does_nothing = name in DROPOUTS and not call.arguments["training"]
            assert call.inplace == (spelling.inplace and not does_nothing)
            if expected is None:
                expected, read_as = result, by_value(call.arguments, tensors)
            agree(result, expected, name)
            assert by_value(call.arguments, tensors) == read_as, spelling.target
            for dialect in ("module", "function", "aten"):
                again, _, _ = graph_of(example)
                copied = {n: tree_map(lambda v, g=again: _same_node(g, v), v) for n, v in call.arguments.items()}
                gm2, result2 = run(again, meaning.emit(again, dialect, **copied), tensors)
                agree(result2, expected, name)
                text = text or show(gm2)
                assert show(gm2) == text, dialect
                if not spelling.inplace:
                    assert show(gm) == text, spelling.target
    declared = {s.target for s in meaning.spellings if s.dialect != "module"}
    assert exercised == declared, f"no example exercises {declared - exercised}"


def _same_node(graph, value):
    return next(n for n in graph.nodes if n.name == value.name) if isinstance(value, Node) else value


aten = torch.ops.aten


def test_a_softmax_that_changes_the_dtype_is_not_read():
    for target, meaning in ((aten._softmax.default, "softmax"), (aten._log_softmax.default, "log_softmax")):
        graph = Graph()
        node = graph.call_function(target, (graph.placeholder("x"), -1, True))
        graph.output(node)
        gm = GraphModule({}, graph)
        assert ops.read(gm, node) is None and ops.unread(gm, node)[0] is OPS[meaning]


# A module of each class that spells an operation, and its inputs.
MODULES = [
    (nn.Linear(4, 5), X),
    (nn.Linear(4, 5, bias=False), X),
    (nn.Conv1d(3, 4, 3, stride=2, padding=1), f(2, 3, 9)),
    (nn.Conv2d(4, 6, 3, groups=2, padding="same"), f(2, 4, 9, 9)),
    (nn.Conv3d(2, 4, 3, dilation=2, bias=False), f(1, 2, 5, 5, 5)),
    (nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), f(2, 3, 9)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), f(2, 4, 5, 5)),
    (nn.ConvTranspose3d(2, 4, 3, dilation=2), f(1, 2, 5, 5, 5)),
    (nn.BatchNorm1d(3), f(2, 3, 4)),
    (nn.BatchNorm2d(3, affine=False), f(2, 3, 4, 4)),
    (nn.BatchNorm3d(3, track_running_stats=False), f(2, 3, 4, 4, 4)),
    (nn.LayerNorm((3, 4), eps=1e-3), X),
    (nn.LayerNorm(4, elementwise_affine=False), X),
    (nn.RMSNorm(4, eps=1e-3), X),
    (nn.GroupNorm(2, 4), f(2, 4, 5)),
    (nn.Dropout(0.3), X),
    (nn.Dropout1d(0.3), X),
    (nn.Dropout2d(0.3), f(2, 3, 4, 4)),
    (nn.Dropout3d(0.3), f(2, 3, 2, 2, 2)),
    (nn.AlphaDropout(0.3), X),
    (nn.FeatureAlphaDropout(0.3), X),
    (nn.GELU("tanh"), X),
    (nn.ReLU(), X),
    (nn.ReLU6(), X),
    (nn.SiLU(), X),
    (nn.Mish(), X),
    (nn.Hardswish(), X),
    (nn.Hardsigmoid(), X),
    (nn.Hardtanh(-2, 1), X),
    (nn.LeakyReLU(0.2), X),
    (nn.ELU(2), X),
    (nn.Softplus(2), X),
    (nn.Tanh(), X),
    (nn.Sigmoid(), X),
    (nn.GLU(2), X),
    (nn.Softmax(1), X),
    (nn.LogSoftmax(1), X),
    (nn.Embedding(4, 5, padding_idx=-1), N),
    (nn.MaxPool2d(3, 2, 1, ceil_mode=True), f(2, 3, 9, 9)),
    (nn.MaxPool2d(2), f(2, 3, 9, 9)),
    (nn.AvgPool2d(3, padding=1, count_include_pad=False), f(2, 3, 9, 9)),
    (nn.AdaptiveAvgPool2d(2), f(2, 3, 9, 9)),
    (nn.Flatten(), X),
    (nn.Unflatten(-1, (2, 2)), X),
    (nn.Identity(), X),
]


class Root(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)


@pytest.mark.parametrize(("module", "x"), MODULES, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "")
def test_a_module_is_read_and_written_as_functions(module, x):
    gm = trace(Root(module.eval()), (x,), "module")
    node = next(n for n in gm.graph.nodes if n.op == "call_module")
    call, text, expected = ops.read(gm, node), show(gm), module(x)
    assert call is not None and call.dialect == "module"
    for dialect in ("function", "aten"):
        again = trace(Root(module), (x,), "module")
        old = next(n for n in again.graph.nodes if n.op == "call_module")
        with again.graph.inserting_before(old):
            values = {n: _in_graph(again.graph, v) for n, v in call.arguments.items()}
            old.replace_all_uses_with(call.op.emit(again.graph, dialect, **values))
        again.graph.erase_node(old)
        again.recompile()
        assert torch.equal(again(x), expected)
        assert show(again) == text, dialect


def _in_graph(graph, value):
    return graph.get_attr(value.path) if isinstance(value, Attr) else _same_node(graph, value)


def test_every_module_class_is_exercised():
    # fxopt's own layers are traced through; tests/transformations/test_swap_sparse.py calls them as modules
    own = {SparseLinear, SparseConv2d}
    assert {t for t in VOCABULARY if inspect.isclass(t)} == {type(m) for m, _ in MODULES} | own


@pytest.mark.parametrize("name", OPS)
def test_defaults_are_those_of_torch(name):
    meaning = OPS[name]
    for spelling in meaning.spellings:
        if not isinstance(spelling.target, OpOverload):
            continue
        for parameter, own_default in spelling.positions:
            if parameter in (None, "inplace") or own_default is ops.REQUIRED:
                continue
            own_value, value = spelling.translate.get(parameter, (ops.REQUIRED, None))
            implied = value if ops._same(own_default, own_value) else own_default
            filled = {n: "unsaid" if d is ops.REQUIRED else d for n, d in meaning.defaults.items()}
            declared, said = dict(filled), {**filled, parameter: implied}
            for arguments in (declared, said):
                if meaning.normalize is not None:
                    meaning.normalize(arguments)
            assert declared[parameter] == said[parameter], (spelling.target, parameter, declared, said)


def test_every_operation_has_an_example():
    assert set(OPS) == set(EXAMPLES)


@pytest.mark.parametrize("name", each(*TINY))
def test_captures_of_the_built_in_models_are_in_the_vocabulary(name):
    gm = built_in(name).gm
    calls = ("call_function", "call_method", "call_module")
    nodes = [n for n in gm.graph.nodes if n.op in calls and n.target != "_guards_fn"]
    unknown = {str(n.target): ops.unread(gm, n) for n in nodes if ops.read(gm, n) is None}
    assert nodes and not {t for t in unknown if "grouped_mm" not in t}, unknown


class Words(nn.Module):
    """What one says in different words, in functions and methods."""

    def forward(self, x, mask):
        y = x.to(torch.float64).float() + x.type(torch.float32) * 2
        y = torch.where(mask, y, -1.0).masked_fill(~mask, 0.5)
        a, b = y.chunk(2, dim=-1)
        y = torch.cat((a, b), -1).transpose(1, 2).reshape(2, -1)
        return (2 - y).softmax(-1).sum(-1, keepdim=True), y.mean(), y.view(-1, 4).permute(1, 0).unsqueeze(0)


def test_the_same_program_reads_the_same_in_functions_and_aten():
    inputs = (f(2, 3, 4), bools(2, 3, 4))
    texts = [show(trace(Words(), inputs, dialect)).splitlines() for dialect in ("function", "aten")]
    said, exported = ([line for line in lines if not line.startswith("_ =")] for lines in texts)  # export's asserts
    assert said == exported


def test_what_the_arguments_mean_decides_between_two_operations():
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    said = {
        "to": graph.call_method("to", (x, torch.float64)),
        "to_other": graph.call_method("to", (x, y)),
        "minimum": graph.call_function(torch.min, (x, y)),
        "view": graph.call_method("view", (x, 2, -1)),
    }
    unsaid = [
        graph.call_function(torch.min, (x, 1)),
        graph.call_function(torch.max, (x,)),
        graph.call_method("view", (x, torch.int32)),
        graph.call_method("type", (x,)),
        graph.call_function(torch.zeros, (2, 3), {"requires_grad": True}),
        graph.call_function(torch.where, (x,)),
        graph.call_function(torch.add, (x,)),
    ]
    graph.output(())
    gm = GraphModule({}, graph)
    for name, node in said.items():
        assert ops.read(gm, node).op is OPS[name]
    for node in unsaid:
        assert ops.read(gm, node) is None
        assert "arguments outside the vocabulary" in ops.unread(gm, node)[1]


def test_a_device_asked_of_another_tensor_is_a_device():
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    device = graph.call_function(getattr, (y, "device"))
    moved = graph.call_method("to", (x, device))
    graph.output(moved)
    gm = GraphModule({}, graph)
    assert ops.read(gm, moved).op is vocabulary.to and ops.read(gm, moved).arguments["device"] is device


def test_a_target_cannot_mean_two_operations():
    with pytest.raises(ValueError, match="already spells 'relu'"):

        @ops.op(torch.relu)
        def other(input): ...


def test_a_spelling_cannot_name_what_the_operation_has_not():
    with pytest.raises(ValueError, match="has no parameter 'colour'"):

        @ops.op(ops.spell(torch.special.i0, "input colour"))
        def i0(input): ...


def test_what_no_spelling_says_cannot_be_written():
    with pytest.raises(TypeError, match="identity has no function"):
        declared = ops.Op("identity", inspect.signature(lambda input: None))
        declared.emit(Graph(), "function", 1)


@pytest.mark.parametrize("p", (0.4, 1.0))
@pytest.mark.parametrize(
    "functional, module, sizes",
    (
        (F.dropout1d, nn.Dropout1d, (2, 8, 5)),
        (F.dropout2d, nn.Dropout2d, (2, 8, 5, 4)),
        (F.dropout3d, nn.Dropout3d, (2, 8, 5, 4, 3)),
        (F.feature_alpha_dropout, nn.FeatureAlphaDropout, (2, 8, 5, 4)),
    ),
    ids=lambda v: getattr(v, "__name__", None),
)
def test_feature_dropouts_drop_the_same_channels_in_every_spelling(functional, module, sizes, p):
    x = f(*sizes)
    op = vocabulary.feature_alpha_dropout if "alpha" in functional.__name__ else vocabulary.feature_dropout

    def drawn(make):
        torch.manual_seed(3)
        return make(x.clone())

    expected = drawn(lambda v: functional(v, p, True))
    kept = (expected.flatten(2) == expected.flatten(2)[..., :1]).all(-1)  # a dropped channel holds one value
    assert kept.any() and (p == 1.0 or not kept.all())
    found = [drawn(module(p).train())]
    for spelling in (
        s for s in op.spellings if s.dialect != "module" and s.target not in FOR_OTHER_SIZES - {functional}
    ):
        args, kwargs = spelling.say({"input": x, "p": p, "training": True, "inplace": spelling.inplace})
        found.append(drawn(lambda v, s=spelling, a=args, k=kwargs: s.target(v, *a[1:], **k)))
    assert len(found) >= 5
    for y in found:
        assert torch.equal(y, expected)


FOR_OTHER_SIZES = {F.dropout1d, F.dropout2d, F.dropout3d}


def test_a_traced_pooling_says_which_function_it_is():
    class Pools(nn.Module):
        def forward(self, x):
            return F.max_pool2d(x, 2), F.max_pool2d(x, 2, return_indices=True)

    gm = torch.fx.symbolic_trace(Pools())
    first, second = (n for n in gm.graph.nodes if n.op == "call_function")
    assert ops.read(gm, first).op is vocabulary.max_pool2d
    assert ops.read(gm, second) is None
    x = f(1, 2, 6, 6)
    assert torch.equal(gm(x)[0], F.max_pool2d(x, 2))
