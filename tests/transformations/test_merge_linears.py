import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxopt.errors import Conflict
from fxopt.history import history
from fxopt.transformations.merge_linears import MergeLinears, _names
from tests.rewriting import rewrites, trace, unchanged
from tests.transformations.modules import fn

T = MergeLinears()
X = (torch.randn(2, 3, 8),)


class Attention(nn.Module):
    """Three projections of one input, and what is usually done with them."""

    def __init__(self, bias=True, groups=2):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8, bias), nn.Linear(8, 4 * groups // 2, bias)
        self.value, self.out = nn.Linear(8, 4 * groups // 2, bias), nn.Linear(8, 8)
        self.groups = groups

    def forward(self, x):
        b, s, _ = x.shape
        q = self.query(x).view(b, s, 2, 4).transpose(1, 2)
        k = self.key(x).view(b, s, self.groups // 2, 4).transpose(1, 2)
        v = self.value(x).view(b, s, self.groups // 2, 4).transpose(1, 2)
        y = F.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v
        return self.out(y.transpose(1, 2).reshape(b, s, 8))


class Nested(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.attn = inner

    def forward(self, x):
        return self.attn(x)


def heads(*layers, then=None):
    """Layers of one input, each result used by itself."""
    children = {f"l{i}": layer for i, layer in enumerate(layers)}

    def forward(m, x):
        return [(then or torch.exp)(getattr(m, name)(x)) for name in children]

    return fn(forward, **children)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [2, 4])
def test_attention(bias, groups):
    model = Nested(Attention(bias, groups))
    found = rewrites(T, model, X, None, count=1)
    for dialect, gm in found.items():
        name = "attn.query_key_value"
        shapes = {n: tuple(p.shape) for n, p in gm.named_parameters()}
        size = 8 + 2 * 4 * groups // 2
        wanted = {f"{name}.weight": (size, 8)} | ({f"{name}.bias": (size,)} if bias else {})
        assert shapes == wanted | {"attn.out.weight": (8, 8), "attn.out.bias": (8,)}
        if dialect == "module":
            assert type(gm.attn.query_key_value) is nn.Linear
            assert not hasattr(gm.attn, "query") and not hasattr(gm.attn, "value")


def test_as_text():
    after = """
        %0 = linear(x, l0_l1_l2.weight, l0_l1_l2.bias)
        %1 = split(%0, [3, 1, 2], -1)
        %2 = getitem(%1, 0)
        %3 = exp(%2)
        %4 = getitem(%1, 1)
        %5 = exp(%4)
        %6 = getitem(%1, 2)
        %7 = exp(%6)
        return [%3, %5, %7]
    """
    rewrites(T, heads(nn.Linear(8, 3), nn.Linear(8, 1), nn.Linear(8, 2)), X, after, count=1)


def test_some_with_bias():
    model = heads(nn.Linear(8, 3, bias=False), nn.Linear(8, 2))
    for gm in rewrites(T, model, X, None, count=1).values():
        assert torch.equal(gm.l0_l1.bias, torch.cat([torch.zeros(3), model.l1.bias]))


@pytest.mark.parametrize("bias", ["all", "some", "none"])
def test_addmm(bias):
    def forward(m, x):
        a = torch.mm(x, m.v) if bias != "all" else torch.addmm(m.a, x, m.v)
        b = torch.mm(x, m.w) if bias == "none" else torch.addmm(m.b, x, m.w)
        return a.relu(), b.relu()

    tensors = {"v": (8, 3), "w": (8, 2), "a": (3,), "b": (2,)}
    model = fn(forward, **{n: nn.Parameter(torch.randn(s)) for n, s in tensors.items()})
    product = "mm(x, v_w)" if bias == "none" else "addmm(v_w_bias, x, v_w)"
    after = f"""
        %0 = {product}
        %1 = split(%0, [3, 2], -1)
        %2 = getitem(%1, 0)
        %3 = getitem(%1, 1)
        %4 = relu(%2)
        %5 = relu(%3)
        return [%4, %5]
    """
    rewrites(T, model, (torch.randn(5, 8),), after, count=1)


def test_keywords_and_root_level():
    model = fn(
        lambda m, x: (F.linear(x, weight=m.v, bias=m.a).exp(), F.linear(input=x, weight=m.w).exp()),
        v=nn.Parameter(torch.randn(3, 8)), w=nn.Parameter(torch.randn(2, 8)), a=nn.Parameter(torch.randn(3)),
    )  # fmt: skip
    for gm in rewrites(T, model, X, None, count=1).values():
        assert set(gm.state_dict()) == {"v_w", "v_w_bias"}


@pytest.mark.parametrize("count", [2, 5, 12])
def test_any_number(count):
    rewrites(T, heads(*(nn.Linear(8, 1 + i % 3) for i in range(count))), X, None, count=1)


def test_names():
    assert _names(["a.q.weight", "a.k.weight"]) == ("a.q_k.weight", "a.q_k.bias")
    assert _names(["h.a.q.weight", "h.b.k.weight"])[0] == "h.a_q_b_k.weight"
    assert _names(["v", "w"]) == ("v_w", "v_w_bias")
    assert _names([f"e.{i}.weight" for i in range(9)])[0] == "e.0_to_8.weight"


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 5e-2), (torch.float64, 1e-12)])
def test_types(dtype, tolerance):
    model = Attention().to(dtype)
    for gm in rewrites(T, model, (X[0].to(dtype),), None, count=1, rtol=tolerance, atol=tolerance).values():
        assert {p.dtype for p in gm.parameters()} == {dtype}


def test_one_group_after_another():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Attention(), Attention()

        def forward(self, x):
            return self.second(self.first(x) + x)

    rewrites(T, Two(), X, None, count=2)


def test_groups_by_type_of_weight():
    model = heads(*(nn.Linear(8, 2) for _ in range(4)))
    for layer in (model.l1, model.l3):
        layer.requires_grad_(False)
    for gm in rewrites(T, model, X, None, count=2).values():
        assert {n: p.requires_grad for n, p in gm.named_parameters()} == {
            "l0_l2.weight": True, "l0_l2.bias": True, "l1_l3.weight": False, "l1_l3.bias": False,
        }  # fmt: skip


def test_a_dynamic_batch():
    model = Attention()
    dynamic = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    gm = rewrites(T, model, X, None, count=1, dialects=("aten",), dynamic=dynamic)["aten"]
    other = torch.randn(5, 7, 8)
    torch.testing.assert_close(gm(other), model(other))


def test_values_know_their_new_strides():
    gm = trace(Attention(), X, "aten")
    T(gm)
    ran = {}

    class Run(torch.fx.Interpreter):
        def run_node(self, n):
            ran[n] = super().run_node(n)
            return ran[n]

    Run(gm).run(*X)
    for node, real in ran.items():
        if isinstance(real, torch.Tensor) and "val" in node.meta:
            assert (real.shape, real.stride()) == (node.meta["val"].shape, node.meta["val"].stride()), node
        if isinstance(real, tuple | list) and node.op == "call_function" and "val" in node.meta:
            assert [r.stride() for r in real] == [v.stride() for v in node.meta["val"]]


def test_the_graph_finds_its_nodes():
    gm = trace(Attention(), X, "module")
    T(gm)
    assert [n.target for n in gm.graph.find_nodes(op="call_module")] == ["query_key_value", "out"]


def test_empty_input():
    rewrites(T, heads(nn.Linear(8, 3), nn.Linear(8, 2)), (torch.randn(0, 8),), None, count=1)


def test_nothing_known_is_enough_without_views():
    gm = torch.fx.symbolic_trace(heads(nn.Linear(8, 3), nn.Linear(8, 2), then=lambda y: y.reshape(-1)))
    T(gm)
    assert len(history(gm)[0].rewrites) == 1


# --- near-misses ----------------------------------------------------------------------------------------------------


def test_one_layer_alone():
    gm = trace(nn.Sequential(nn.Linear(8, 3)), X, "module")
    assert not list(T.misses(gm)) and not history(T(gm))[0].rewrites


def test_a_write_to_the_input_between():
    def forward(m, x):
        y = x.exp()
        a = m.a(y).relu()
        y.add_(1)
        return a, m.b(y).relu()

    model = fn(forward, a=nn.Linear(8, 3), b=nn.Linear(8, 2))
    unchanged(T, model, X, "written to between them", dialects=("module", "function"))
    unchanged(T, model, X, None, dialects=("aten",))  # there, what was written to is another input


def test_a_write_to_a_result():
    def forward(m, x):
        return m.a(x).add_(1), m.b(x).relu()

    unchanged(T, fn(forward, a=nn.Linear(8, 3), b=nn.Linear(8, 2)), X, "may be written to in place")


def test_a_view_that_needs_one_piece_of_memory():
    unchanged(T, heads(nn.Linear(8, 4), nn.Linear(8, 4), then=lambda y: y.view(-1)), X, "part of a larger tensor")


def test_what_asks_for_strides():
    then = lambda y: y.as_strided((2,), (1,))  # noqa: E731
    unchanged(T, heads(nn.Linear(8, 4), nn.Linear(8, 4), then=then), X, "where its input lies in memory")


def test_a_tied_weight():
    model = heads(nn.Linear(8, 4), nn.Linear(8, 4))
    model.l1.weight = model.l0.weight
    unchanged(T, model, X, "is read by .* too")


def test_a_module_called_twice():
    model = fn(lambda m, x: (m.a(x).relu(), m.b(x).relu(), m.a(x + 1)), a=nn.Linear(8, 3), b=nn.Linear(8, 2))
    unchanged(T, model, X, "is read by .* too")


def test_a_weight_used_elsewhere():
    model = fn(lambda m, x: (m.a(x).relu(), m.b(x).relu(), m.a.weight.sum()), a=nn.Linear(8, 3), b=nn.Linear(8, 2))
    unchanged(T, model, X, "is read by .* too")


def test_the_others_are_merged_all_the_same():
    model = heads(nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4))
    model.l2.register_forward_hook(lambda m, args, out: out * 2)
    gm = trace(model, X, "module")
    assert any("has hooks" in m.reason for m in T.misses(gm))
    T(gm)
    assert [n.target for n in gm.graph.find_nodes(op="call_module")] == ["l0_l1", "l2"]


def test_the_others_are_merged_where_one_cannot_be_a_part():
    model = fn(
        lambda m, x: (m.a(x).view(-1), m.b(x).exp(), m.c(x).exp()),
        a=nn.Linear(8, 3), b=nn.Linear(8, 2), c=nn.Linear(8, 1),
    )  # fmt: skip
    for gm in rewrites(T, model, X, None, count=1).values():
        assert {n.rpartition(".")[0] for n, _ in gm.named_parameters()} == {"a", "b_c"}


@pytest.mark.parametrize("change,reason", [
    (lambda m: m.l0.requires_grad_(False), "whether they are trained"),
    (lambda m: m.l0.weight.requires_grad_(False), "whether they are trained"),
])  # fmt: skip
def test_what_differs(change, reason):
    model = heads(nn.Linear(8, 4), nn.Linear(8, 4))
    change(model)
    unchanged(T, model, X, reason)


def test_a_subclass():
    class Mine(nn.Linear):
        pass

    model = heads(Mine(8, 4), nn.Linear(8, 4))

    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, nn.Linear)

    gm = torch.fx.GraphModule(model, Leaf().trace(model))
    reasons = [m.reason for m in T.misses(gm)]
    assert any("subclass of Linear" in r for r in reasons) and any("stays" in r for r in reasons)
    assert not history(T(gm))[0].rewrites


def test_a_computed_weight():
    model = fn(lambda m, x, w: (F.linear(x, w).exp(), m.a(x).exp()), a=nn.Linear(8, 3))
    unchanged(T, model, (*X, torch.randn(2, 8)), "is computed")


def test_a_scaled_product():
    model = fn(
        lambda m, x: (torch.addmm(m.a, x, m.v, beta=2), torch.addmm(m.a, x, m.w)),
        v=torch.randn(8, 3), w=torch.randn(8, 3), a=torch.randn(3),
    )  # fmt: skip
    unchanged(T, model, (torch.randn(5, 8),), "scaled by beta=2")


def test_weights_on_meta():
    gm = trace(heads(nn.Linear(8, 3), nn.Linear(8, 2)), X, "aten")
    gm.l0.weight = nn.Parameter(gm.l0.weight.to("meta"))
    assert any("meta" in m.reason for m in T.misses(gm))
    assert not history(T(gm))[0].rewrites


def test_unknown_shapes():
    gm = torch.fx.symbolic_trace(Attention())
    assert any("call fxopt.propagate" in m.reason for m in T.misses(gm))
    assert not history(T(gm))[0].rewrites


def test_a_module_that_nobody_can_read_sees_one_piece_of_memory():
    class Opaque(nn.Module):
        def forward(self, x):
            return x.view(-1)

    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, nn.Linear | Opaque)

    model = fn(lambda m, x: (m.o(m.a(x)), m.b(x).exp()), a=nn.Linear(8, 3), b=nn.Linear(8, 2), o=Opaque())
    gm = torch.fx.GraphModule(model, Leaf().trace(model))
    assert any("may be written to in place" in m.reason for m in T.misses(gm))
    assert not history(T(gm))[0].rewrites


# --- training, and numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["module", "function", "aten"])
@pytest.mark.parametrize("bias", [True, False])
def test_training_is_carried_back(dialect, bias):
    model = Nested(Attention(bias))
    gm = trace(model, X, dialect)
    names = list(gm.state_dict())
    T(gm)
    optimizer = torch.optim.SGD(gm.parameters(), 0.1)
    gm(*X).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        expected = gm(*X)
    merged = gm.attn.query_key_value.weight.detach().clone()
    with pytest.raises(Conflict):
        T.reverse(gm)
    T.reverse(gm, "carry")
    assert list(gm.state_dict()) == names
    assert torch.equal(torch.cat([gm.attn.query.weight, gm.attn.key.weight, gm.attn.value.weight]), merged)
    torch.testing.assert_close(gm(*X), expected)


def test_training_of_addmm_is_carried_back():
    tensors = {"v": (8, 3), "w": (8, 2), "a": (3,), "b": (2,)}
    model = fn(
        lambda m, x: (torch.addmm(m.a, x, m.v).exp(), torch.addmm(m.b, x, m.w).exp()),
        **{n: nn.Parameter(torch.randn(s)) for n, s in tensors.items()},
    )
    gm = trace(model, (torch.randn(5, 8),), "aten")
    T(gm)
    with torch.no_grad():
        gm.v_w.copy_(torch.arange(40.0).view(8, 5))
        gm.v_w_bias.copy_(torch.arange(5.0))
    T.reverse(gm, "carry")
    assert torch.equal(torch.cat([gm.v, gm.w], 1), torch.arange(40.0).view(8, 5))
    assert gm.a.tolist() == [0, 1, 2] and gm.b.tolist() == [3, 4]


def test_a_bias_that_was_never_there_cannot_be_carried_back():
    gm = trace(heads(nn.Linear(8, 3, bias=False), nn.Linear(8, 2)), X, "module")
    T(gm)
    with torch.no_grad():
        gm.l0_l1.bias.fill_(1.0)
    with pytest.raises(Conflict, match="cannot carry"):
        T.reverse(gm, "carry")


def test_gradients():
    model = Attention()
    gm = trace(model, X, "function")
    wanted = torch.autograd.grad(gm(*X).sum(), [gm.query.weight, gm.key.weight, gm.value.weight])
    T(gm)
    (got,) = torch.autograd.grad(gm(*X).sum(), [gm.query_key_value.weight])
    torch.testing.assert_close(got, torch.cat(wanted))


@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=2, max_size=5),
    rows=st.sampled_from([(3,), (2, 3), (1,), (0, 2)]),
    then=st.sampled_from([torch.exp, lambda y: y.transpose(0, -1), lambda y: y[..., None], lambda y: y.flatten()]),
    chained=st.booleans(),
    dialect=st.sampled_from(["module", "function"]),
)
def test_computes_the_same(seed, sizes, rows, then, chained, dialect):
    torch.manual_seed(seed)
    children = {f"l{i}": nn.Linear(4, n, bias=b) for i, (n, b) in enumerate(sizes)}

    def forward(m, x):
        found = [then(getattr(m, name)(x)) for name in children]
        y = x + found[0].sum() if chained else x
        return [*found, *(m.get_submodule(n)(y) for n in ("c", "d"))]

    model = fn(forward, c=nn.Linear(4, 2), d=nn.Linear(4, 3), **children).double()
    x = (torch.randn(*rows, 4, dtype=torch.float64),)
    gm = trace(model, x, dialect)
    before, code = gm(*x), gm.code
    T(gm)
    assert len(history(gm)[0].rewrites) == 1 + chained
    for a, b in zip(gm(*x), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    T(gm, reverse=True)
    assert gm.code == code and all(map(torch.equal, gm(*x), before))
