import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.fx import symbolic_trace

from fxopt.history import history
from fxopt.inputs import example_inputs
from fxopt.text import show
from fxopt.transformation import clone
from fxopt.transformations.eliminate_dead_nodes import EliminateDeadNodes
from fxopt.transformations.eliminate_no_ops import EliminateNoOps
from tests.builtin import built_in, each
from tests.rewriting import rewrites, trace, unchanged

X = (torch.tensor([[1.5, -0.0, 1e-38], [0.0, 2e30, -3.25]]),)
N = (torch.tensor([[1, 2, 3], [4, 5, 6]]),)


class Net(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.compute, self.nothing = compute, nn.Identity()
        self.register_buffer("rows", torch.ones(64, 3))
        self.register_buffer("table", torch.tensor([[0.5, 1.0, 2.0], [3.0, 4.0, 5.0]]))

    def forward(self, x):
        return self.compute(self, x)


GONE = {
    "x - 0": lambda m, x: (x.cos() - 0).sin(),
    "x - 0.0": lambda m, x: (x.cos() - 0.0).sin(),
    "x + -0.0": lambda m, x: (x.cos() + -0.0).sin(),
    "x * 1": lambda m, x: (x.cos() * 1).sin(),
    "1.0 * x": lambda m, x: (1.0 * x.cos()).sin(),
    "x / 1": lambda m, x: (x.cos() / 1).sin(),
    "x ** 1": lambda m, x: (x.cos() ** 1).sin(),
    "-(-x)": lambda m, x: x.cos().neg().neg().sin(),
    "to its own dtype": lambda m, x: x.cos().to(torch.float32).sin(),
    "float of floats": lambda m, x: x.cos().float().sin(),
    "type_as": lambda m, x: x.cos().type_as(x).sin(),
    "x[:]": lambda m, x: x.cos()[:, :].sin(),
    "x[...]": lambda m, x: x.cos()[...].sin(),
    "narrow to all": lambda m, x: x.cos().narrow(1, 0, 3).sin(),
    "view of the same shape": lambda m, x: x.cos().view(2, 3).sin(),
    "reshape to the same shape": lambda m, x: x.cos().reshape(2, -1).sin(),
    "flatten of a flat tensor": lambda m, x: x.cos().flatten(1).sin(),
    "expand to the same shape": lambda m, x: x.cos().expand(2, 3).sin(),
    "repeat once": lambda m, x: x.cos().repeat(1, 1).sin(),
    "transpose twice": lambda m, x: x.cos().transpose(0, 1).transpose(-1, -2).sin(),
    "transpose and permute back": lambda m, x: x.cos().transpose(0, 1).permute(1, 0).sin(),
    "t twice": lambda m, x: x.cos().t().t().sin(),
    "permute in order": lambda m, x: x.cos().permute(0, -1).sin(),
    "squeeze of unsqueeze": lambda m, x: x.cos().unsqueeze(1).squeeze(1).sin(),
    "contiguous of contiguous": lambda m, x: x.cos().contiguous().sin(),
    "clone": lambda m, x: x.cos().clone().sin(),
    "copy": lambda m, x: x.cos().to(torch.float32, copy=True).sin(),
    "cat of one": lambda m, x: torch.cat([x.cos()]).sin(),
    "pad of nothing": lambda m, x: nn.functional.pad(x.cos(), (0, 0)).sin(),
    "identity": lambda m, x: m.nothing(x.cos()).sin(),
}


@pytest.mark.parametrize("name", GONE)
def test_what_changes_nothing_goes(name):
    after = "%0 = cos(x)\n%1 = sin(%0)\nreturn %1"
    model = Net(GONE[name])
    dialects = ("module", "function", "aten")
    if name in ("identity",):
        dialects = ("module",)  # the other tracers drop it themselves
    elif name in ("x[:]", "x[...]", "contiguous of contiguous", "cat of one", "pad of nothing"):
        after = None
        dialects = ("module",)
    rewrites(EliminateNoOps(asserts=True), model, X, after, dialects=dialects, rtol=0, atol=0)


def test_a_whole_slice_goes_from_an_exported_graph():
    after = {"aten": "%0 = cos(x)\n%1 = sin(%0)\nreturn %1"}
    model = Net(lambda m, x: torch.ops.aten.slice.Tensor(x.cos(), 1, 0, 2**63 - 1).sin())
    rewrites(EliminateNoOps(), model, X, after, dialects=("aten",), rtol=0, atol=0)


def test_a_view_of_a_view_is_one_view():
    def compute(m, x):
        return x.cos().view(3, 2).view(6).view(1, 6).sin()

    after = "%0 = cos(x)\n%1 = view(%0, [1, 6])\n%2 = sin(%1)\nreturn %2"
    rewrites(EliminateNoOps(), Net(compute), X, after, rtol=0, atol=0)


def test_a_view_that_others_read_stays_beside_the_view_of_it():
    def compute(m, x):
        y = x.cos().view(3, 2)
        return y.view(6).sin(), y.tan()

    for dialect in ("function", "aten"):
        gm = trace(Net(compute), X, dialect)
        expected = gm(*X)
        EliminateNoOps()(gm)
        views = [n for n in gm.graph.nodes if n.name.startswith("view")]
        assert len(views) == 2 and len({n.args[0] for n in views}) == 1
        assert all(map(torch.equal, gm(*X), expected))


def test_integers_lose_a_zero_and_a_one():
    after = "%0 = abs(x)\n%1 = neg(%0)\nreturn %1"
    rewrites(EliminateNoOps(), Net(lambda m, x: -(x.abs() + 0)), N, after)
    rewrites(EliminateNoOps(), Net(lambda m, x: -(x.abs() * 1)), N, after)


def test_a_chain_goes_in_one_run():
    after = "%0 = cos(x)\n%1 = sin(%0)\nreturn %1"
    rewrites(EliminateNoOps(), Net(lambda m, x: (x.cos().neg().neg().neg().neg() * 1 - 0).view(2, 3).sin()), X, after)


def test_the_sign_of_a_zero_can_be_given_up():
    after = "%0 = cos(x)\n%1 = sin(%0)\nreturn %1"
    rewrites(EliminateNoOps(signed_zeros=False), Net(lambda m, x: (x.cos() + 0.0).sin()), X, after)
    unchanged(EliminateNoOps(), Net(lambda m, x: (x.cos() + 0.0).sin()), X, r"makes 0\.0 of -0\.0")


NEAR = {
    "promotes": (lambda m, x: (x.abs() * 1.0).sin(), N, None),
    "divides integers": (lambda m, x: (x.abs() / 1).sin(), N, None),
    "rounds": (lambda m, x: torch.div(x.cos(), 1, rounding_mode="floor").sin(), X, None),
    "scaled zero": (lambda m, x: torch.sub(x.cos(), 0.0, alpha=float("inf")).sin(), X, None),
    "minus negative zero": (lambda m, x: (x.cos() - -0.0).sin(), X, None),
    "true is no number": (lambda m, x: (x.cos() * True).sin(), X, None),
    "broadcasts": (lambda m, x: x[0].cos().expand(2, 3).sin(), X, None),
    "casts": (lambda m, x: x.cos().double().sin(), X, None),
    "half a slice": (lambda m, x: x.cos()[:, 1:].sin(), X, None),
    "reversed": (lambda m, x: x.cos().flip(0).sin(), X, None),
    "another order": (lambda m, x: x.cos().transpose(0, 1).contiguous().sin(), X, None),
    "two different transposes": (lambda m, x: x.cos()[None].transpose(0, 1).transpose(1, 2).sin(), X, None),
    "neg of not": (lambda m, x: (-(~x.abs())).float().sin(), N, None),
    "a clone of the input is returned": (lambda m, x: x.clone(), X, "share memory with x"),
    "a view of a clone is returned": (lambda m, x: (x * 1).view(6), X, "share memory with x"),
    "a buffer's clone is returned": (lambda m, x: (x.sin(), m.table.clone()), X, "share memory with table"),
    "detach": (lambda m, x: x.detach().sin(), X, "may stop a gradient"),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_changes_something_stays(name):
    compute, inputs, reason = NEAR[name]
    dialects = ("function", "aten")
    if name == "detach":
        dialects = ("function",)  # under no_grad, export drops it
    elif name == "a buffer's clone is returned":
        dialects = ("aten",)  # symbolic_trace computes it
    unchanged(EliminateNoOps(), Net(compute), inputs, reason, dialects=dialects)


def test_two_outputs_do_not_come_to_share_memory():
    def compute(m, x):
        y = x.cos()
        return y, y.clone()

    unchanged(EliminateNoOps(), Net(compute), X, "two outputs would share memory")


def test_one_of_two_clones_of_one_value_that_are_returned_goes():
    def compute(m, x):
        y = x.cos()
        return y.clone(), y.clone()

    for dialect in ("function", "aten"):
        gm = trace(Net(compute), X, dialect)
        EliminateNoOps()(gm)
        assert len(history(gm)[-1].rewrites) == 1
        a, b = gm(*X)
        assert a.data_ptr() != b.data_ptr()


def test_a_copy_that_is_written_to_stays():
    def compute(m, x):
        y = x.clone()
        y.add_(1)
        return y * x

    unchanged(EliminateNoOps(), Net(compute), X, "written to in place", dialects=("function", "aten"))


def test_a_copy_of_what_is_written_to_stays():
    def compute(m, x):
        z = x.cos()
        y = z.clone()
        z.add_(1)
        return y * z

    unchanged(EliminateNoOps(), Net(compute), X, "written to in place", dialects=("function", "aten"))


def test_a_write_in_place_is_no_no_op():
    def compute(m, x):
        y = x.cos()
        y.mul_(1)
        return y.sin()

    unchanged(EliminateNoOps(), Net(compute), X, "in place", dialects=("function", "aten"))


def test_a_frozen_constant_needs_no_detach():
    def compute(m, x):
        return x + m.table.clone().detach_()

    after = "%0 = add(x, table)\nreturn %0"
    rewrites(EliminateNoOps(), Net(compute), X, after, dialects=("aten",), rtol=0, atol=0)


def test_where_the_shape_is_not_known_a_view_stays():
    gm = symbolic_trace(Net(lambda m, x: x.cos().view(2, 3).sin()))
    code, misses = gm.code, [m.reason for m in EliminateNoOps().misses(gm)]
    assert EliminateNoOps()(gm).code == code
    assert any("fxopt.propagate" in m for m in misses)


def test_a_dynamic_size_that_happens_to_fit_stays():
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    model = Net(lambda m, x: m.rows[: x.shape[0]] + x)
    unchanged(EliminateNoOps(), model, (torch.randn(32, 3),), None, dialects=("aten",), dynamic=dynamic)


def test_a_dynamic_size_that_always_fits_goes():
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    model = Net(lambda m, x: x.cos().view(x.shape[0], 3).expand(x.shape[0], -1)[:, :3].sin())
    gm = trace(model, (torch.randn(8, 3),), "aten", dynamic)
    EliminateNoOps()(gm)
    assert show(EliminateDeadNodes()(gm)) == "%0 = cos(x)\n%1 = sin(%0)\nreturn %1"
    assert gm(torch.randn(5, 3)).shape == (5, 3)


def test_export_s_checks_go_when_asked():
    model = Net(lambda m, x: x.cos().double().sin())
    after = "%0 = cos(x)\n%1 = to(%0, torch.float64)\n%2 = sin(%1)\nreturn %2"
    rewrites(EliminateNoOps(asserts=True), model, X, after, count=1, dialects=("aten",), rtol=0, atol=0)
    unchanged(EliminateNoOps(), model, X, r"asserts=True\) removes it", dialects=("aten",))


# What counting by hand in the captures of two layers gives: same-dtype casts of float32 norms, whole slices, copies of
# constants with their detach_, contiguous before a reshape that follows, and one assert for each cast.
@pytest.mark.parametrize("name", each("bert-base-tiny", "gpt2-tiny", "t5-small-tiny"))
def test_models_lose_their_no_ops_and_compute_the_same(name):
    model, _, gm = built_in(name)
    gm, inputs = clone(gm), example_inputs(model)
    code = gm.code
    asserts = sum("_assert_tensor_metadata" in str(n.target) for n in gm.graph.nodes)
    expected, before = gm(**inputs), len(gm.graph.nodes)
    EliminateNoOps(asserts=True)(gm)
    again = gm(**inputs)
    leaves = torch.utils._pytree.tree_leaves
    pairs = zip(leaves(expected), leaves(again), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
    assert before - len(gm.graph.nodes) > asserts
    assert not any("_assert_tensor_metadata" in str(n.target) for n in gm.graph.nodes)
    EliminateNoOps(asserts=True).reverse(gm)
    assert gm.code == code


STEPS = {
    "mul": lambda x: x * 1.0,
    "neg": lambda x: -x,
    "sub": lambda x: x - 0.0,
    "add": lambda x: x + 0.0,
    "t": lambda x: x.transpose(0, 1),
    "view": lambda x: x.contiguous().view(6).view(3, 2).view(2, 3),
    "reshape": lambda x: x.reshape(2, 3),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "slice": lambda x: x[:, 0:],
    "unsqueeze": lambda x: x.unsqueeze(0).squeeze(0),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=8), st.sampled_from(["function", "aten"]))
def test_any_chain_computes_the_same_bits(steps, dialect):
    def compute(m, x):
        y, kept = x.cos(), []
        for step in steps:
            y = STEPS[step](y)
            kept.append(y)
        return tuple(kept)

    gm = trace(Net(compute), X, dialect)
    code, expected = gm.code, gm(*X)
    EliminateNoOps(asserts=True)(gm)
    for a, b in zip(expected, gm(*X), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        assert torch.equal(torch.signbit(a), torch.signbit(b)) and torch.allclose(a, b, 0, 0, equal_nan=True)
    pointers = [[i for i, u in enumerate(r) if u.data_ptr() == t.data_ptr()] for r in (expected,) for t in r]
    after = gm(*X)
    assert pointers == [[i for i, u in enumerate(after) if u.data_ptr() == t.data_ptr()] for t in after]
    EliminateNoOps(asserts=True).reverse(gm)
    assert gm.code == code
