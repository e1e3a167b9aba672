"""`BlockSparsify` in the three dialects: by name, exact in reverse, tied layers, training, and what it refuses."""

import copy
import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import scipy.sparse
import torch
from torch import nn

import fxopt
from fxopt.errors import Conflict, UsageError
from fxopt.history import history
from fxopt.kernels.block_linear import block_view
from fxopt.kernels.semi_structured import to_dense
from fxopt.models import build
from fxopt.sparse import BlockRegrow, BlockSparseLinear, SemiStructuredLinear, Spec, block_plan, following, n_m_mask
from fxopt.sparse.block_report import Timing
from fxopt.text import show
from fxopt.transformations import BlockSparsify, EliminateDropout, MergeLinears
from tests.rewriting import DIALECTS, nodes, rewrites, state, trace


class Net(nn.Module):
    def __init__(self, bias=True, sizes=(48, 64, 40)):
        super().__init__()
        self.up, self.down = nn.Linear(*sizes[:2], bias=bias), nn.Linear(*sizes[1:], bias=bias)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Tied(nn.Module):
    """One weight under two biases, and one module called twice."""

    def __init__(self, size=48):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(size, size), nn.Linear(size, size, bias=False), nn.Linear(size, size)
        self.c.weight = self.b.weight

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h) + self.c(h) + self.b(torch.tanh(h)) + self.a(h)


class GPTBlock(nn.Module):
    """Weights (in, out), as those of GPT-2."""

    def __init__(self, size=48):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size, size)), nn.Parameter(torch.randn(size))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def force(patterns, **options):
    return BlockSparsify(patterns, guard="off", **options)


def X(rows=3, size=48):
    return (torch.randn(rows, size),)


EXISTING, PAIRS = Spec(block=(16, 16), select="existing"), Spec(block="2:4")
WIDE = (64, 128, 64)


@pytest.fixture
def gpu_times(monkeypatch):
    """Let 2:4 be there, as on a GPU, and what is timed twice as fast as dense; 2:4 as fast as is said."""

    def set_(speed):
        def timed(contenders, weight, tokens):
            speeds = {"dense": 1.0, "block-sparse": 2.0, "2:4": speed}
            return {n: {t: Timing(1e-4 / speeds[n], speeds[n]) for t in tokens} for n in contenders}

        monkeypatch.setattr(block_plan, "timed", timed)

    monkeypatch.setattr(block_plan, "accelerated", lambda weight: True)
    set_(3.0)
    return set_


@pytest.mark.parametrize("bias", (True, False))
def test_lossless_it_computes_the_same_and_is_undone_exactly(bias):
    model = Net(bias)
    with torch.no_grad():
        model.up.weight[:16, 16:] = 0
    up, down = (f"{p}.bias" if bias else "None" for p in ("up", "down"))
    functions = f"""
        %0 = block_linear(x, up.data, {up}, up.crow, up.col, up.index, 64)
        %1 = relu(%0)
        %2 = block_linear(%1, down.data, {down}, down.crow, down.col, down.index, 40)
        return %2
    """
    modules = """
        %0 = up(x)
        %1 = relu(%0)
        %2 = down(%1)
        return %2
    """
    after = {"module": modules, "function": functions, "aten": functions}
    found = rewrites(force({"up|down": EXISTING}), model, X(), after, count=2, atol=1e-5)
    assert type(found["module"].up) is BlockSparseLinear and found["module"].up.mask.sum() == 10
    assert found["aten"].up.data.shape == (10, 16, 16) and "up.index" not in found["aten"].state_dict()


def test_weights_in_out():
    rewrites(force({"weight": EXISTING}), GPTBlock(), X(), None, count=1, dialects=("function", "aten"), atol=1e-4)


def test_tied_layers_change_together():
    for dialect, gm in rewrites(force({"a|b": EXISTING}), Tied(), X(), None, count=2, atol=1e-4).items():
        data = [p for n, p in gm.named_parameters() if n.endswith("data")]
        assert len(data) == 2, dialect
        if dialect == "module":
            assert gm.b.data is gm.c.data and gm.c.bias is not None and gm.b.bias is None


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_rewrite_is_undone_alone(dialect):
    gm = trace(Net().eval(), X(), dialect)
    force({".*": 0.5})(gm)
    first = history(gm)[-1].rewrites[0]
    assert first.module_path == "up"
    first.reverse()
    text = show(gm)
    assert "down.data" in text or type(gm.down) is BlockSparseLinear
    assert gm.up.weight.shape == (64, 48)
    first.apply()
    assert not hasattr(gm.up, "weight") or isinstance(gm.up, BlockSparseLinear)


@pytest.mark.parametrize("bias", (True, False))
def test_the_fastest_is_kept_two_of_four_where_that_is_no_less_than_asked_for(bias, gpu_times):
    model = Net(bias, WIDE)
    with torch.no_grad():
        for layer in (model.up, model.down):
            layer.weight.mul_(n_m_mask(layer.weight, 2, 4))
    up, down = (f"{p}.bias" if bias else "None" for p in ("up", "down"))
    functions = f"""
        %0 = semi_structured_linear(x, up.values, {up}, up.metadata)
        %1 = relu(%0)
        %2 = semi_structured_linear(%1, down.values, {down}, down.metadata)
        return %2
    """
    modules = """
        %0 = up(x)
        %1 = relu(%0)
        %2 = down(%1)
        return %2
    """
    after = {"module": modules, "function": functions, "aten": functions}
    sparsify = BlockSparsify({"up|down": EXISTING})
    found = rewrites(sparsify, model, X(size=64), after, count=2, atol=1e-5)
    assert type(found["module"].up) is SemiStructuredLinear
    assert set(found["aten"].up.state_dict()) == {"values", "metadata", *(["bias"] if bias else [])}
    gpu_times(1.5)
    assert [x.decision for x in BlockSparsify({".*": EXISTING}).plan(trace(model, X(size=64), "aten"))] == [
        "block-sparse",
        "block-sparse",
    ]


def test_two_of_four_weights_in_out_and_tied():
    tied = Tied(64)
    with torch.no_grad():
        for layer in (tied.a, tied.b):
            layer.weight.mul_(n_m_mask(layer.weight, 2, 4))
    for dialect, gm in rewrites(force({"a|b": PAIRS}), tied, X(size=64), None, count=2, atol=1e-4).items():
        assert len([p for n, p in gm.named_parameters() if n.endswith("values")]) == 2, dialect
        if dialect == "module":
            assert gm.b.values is gm.c.values and gm.c.bias is not None and gm.b.bias is None
    block = GPTBlock(64)
    with torch.no_grad():
        block.weight.mul_(n_m_mask(block.weight.t(), 2, 4).t())
    rewrites(force({"weight": PAIRS}), block, X(size=64), None, count=1, dialects=("function", "aten"), atol=1e-4)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("mode", ("zeros", "merge"))
@pytest.mark.parametrize("model", (Net, Tied, GPTBlock))
@pytest.mark.parametrize("spec", ((0.4, (16, 16)), PAIRS), ids=("blocks", "pairs"))
def test_trained_the_caller_chooses(dialect, mode, model, spec):
    torch.manual_seed(0)
    if model is GPTBlock and dialect == "module":
        dialect = "function"
    made, x = (model(), X()) if spec is not PAIRS else (Net(sizes=WIDE) if model is Net else model(64), X(size=64))
    gm = trace(made.eval(), x, dialect)
    before, originals = state(gm), {k: v.clone() for k, v in gm.state_dict().items()}
    sparsify = force({".*": spec})
    sparsify(gm)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    gm(*x).square().mean().backward()
    optimizer.step()
    code, trained = gm.code, gm(*x)
    with pytest.raises(Conflict, match=r"edited since.*say mode='zeros'"):
        sparsify.reverse(gm)
    assert gm.code == code and torch.equal(gm(*x), trained)
    other = copy.deepcopy(gm)
    sparsify.reverse(gm, mode=mode)
    if mode == "zeros":
        torch.testing.assert_close(gm(*x), trained)
    assert [k for k, *_ in state(gm)] == [k for k, *_ in before]
    for name, value in gm.state_dict().items():
        if name.endswith("weight"):
            changed = value != originals[name]
            assert changed.any()
            share = float((value == 0).float().mean()) if mode == "zeros" else float((~changed).float().mean())
            assert 0.4 < share < 0.8
    sparsify.reverse(other, edited="discard")
    assert all(torch.equal(v, originals[k]) for k, v in other.state_dict().items() if k.endswith("weight"))
    with pytest.raises(UsageError, match="mode='x' was given"):
        sparsify.reverse(gm, mode="x")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_optimizer_and_regrowth_on_a_graph(dialect):
    gm, x = trace(Net().eval(), X(), dialect), X()
    sparsify = force({".*": (0.4, (16, 16))})
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)

    def step():
        optimizer.zero_grad()
        gm(*x).square().mean().backward()
        optimizer.step()

    step()
    with following(optimizer, gm):
        sparsify(gm)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in gm.parameters()} and all(len(optimizer.state[p]) for p in gm.parameters())
    BlockRegrow(gm, optimizer, fraction=0.3).step()
    step()
    trained = gm(*x)
    with following(optimizer, gm):
        sparsify.reverse(gm, mode="zeros")
    torch.testing.assert_close(gm(*x), trained)
    step()
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in gm.parameters()}


@pytest.mark.parametrize("dialect", DIALECTS)
@hypothesis.settings(max_examples=12, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    sizes=st.lists(st.integers(1, 70), min_size=2, max_size=4),
    density=st.floats(0.01, 1),
    block=st.sampled_from(((16, 16), (32, 16), (8, 24))),
    select=st.sampled_from(("magnitude", "balanced", "random(5)", "activation", "existing")),
    rescale=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_the_masked_model_and_comes_back(dialect, sizes, density, block, select, rescale, seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b, bias=bool(seed % 2)) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh()))).eval()
    x = (torch.randn(5, sizes[0]),)
    gm = trace(model, x, dialect)
    before, code, listed, wanted = state(gm), gm.code, nodes(gm), gm(*x)
    sparsify = force({"[0-9]+": Spec(density, block, select, rescale)}, inputs=x)
    sparsify(gm)
    dense = copy.deepcopy(model).double()
    for i, layer in enumerate(layers):
        made = BlockSparseLinear.from_dense(
            layer, density, select=select, block_shape=block, inputs=_inputs(model, 2 * i, x), rescale=rescale
        )
        dense[2 * i].weight = nn.Parameter(made.weight.detach().double())
    torch.testing.assert_close(gm(*x).double(), dense(x[0].double()), rtol=1e-4, atol=1e-5)
    sparsify.reverse(gm)
    assert state(gm) == before and gm.code == code and nodes(gm) == listed and torch.equal(gm(*x), wanted)


def _inputs(model, index, x):
    with torch.no_grad():
        return model[:index](*x)


@pytest.mark.parametrize("name", ("bert-base-tiny", "gpt2-tiny", "llama-small-tiny"))
def test_on_a_captured_model(name):
    model = build(name).eval()
    given = {"input_ids": torch.arange(5, 37).reshape(2, 16)}
    if name != "bert-base-tiny":
        given["use_cache"] = False
    gm = fxopt.capture(model, given)
    before, wanted = state(gm), gm(**given)
    sparsify = force({".*(fc|dense|proj).*": (0.5, (16, 16), "activation")}, inputs=given)
    plan = sparsify.plan(gm)
    assert len(plan) >= 4 and all(x.error is not None for x in plan)
    EliminateDropout()(gm)
    sparsify(gm)
    MergeLinears()(gm)
    found = [n for n in gm.graph.nodes if n.target is torch.ops.fxopt.block_linear.default]
    assert len(found) == len(plan) and all(tuple(n.meta["val"].shape)[-1] == n.args[6] for n in found)
    gm(**given)
    sparsify.reverse(gm)
    MergeLinears().reverse(gm)
    EliminateDropout().reverse(gm)
    assert state(gm) == before
    for a, b in zip(_tensors(gm(**given)), _tensors(wanted), strict=True):
        assert torch.equal(a, b)


def _tensors(value):
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def test_the_guard_leaves_dense_what_is_no_faster_and_says_so():
    gm = trace(Net().eval(), X(), "aten")
    sparsify = BlockSparsify({"up": 1.0}, tokens=(8,))
    code = gm.code
    sparsify(gm)
    assert gm.code == code and not history(gm)[-1].rewrites
    reasons = {m.node.name: m.reason for m in sparsify.misses(gm)}
    assert any("no faster block-sparse" in r and "at 8 tokens" in r for r in reasons.values())
    assert any(r == "no pattern matches down" for r in reasons.values())
    assert sparsify.settled(gm).patterns == ()


def test_settled_it_is_saved_and_loaded(tmp_path):
    gm, x = fxopt.capture(Net().eval(), X()), X()
    force({"up": 0.5, "do.*": 0.25}).settled(gm)(gm)
    assert history(gm)[-1].signature.startswith(r"BlockSparsify(patterns=(('up', 0.5, (32, 32), 'magnitude', False),")
    fxopt.save(gm, tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved")
    assert torch.equal(again(*x), gm(*x))
    history(again).undo(0)
    assert "block_linear" not in again.code


def test_settled_by_what_was_planned_not_by_matching_again():
    gm, asked = fxopt.capture(Net().eval(), X()), []

    def wide(path, weight):
        asked.append(path)
        return weight.shape == (64, 48)

    sparsify = force({wide: 0.5, lambda path, w: w.numel() > 2000: Spec(0.25, (16, 16), rescale=True)})
    assert [x.path for x in sparsify.plan(gm).changed] == ["up", "down"]
    settled = sparsify.settled(gm)
    assert settled.patterns == (
        ("up", 0.5, (32, 32), "magnitude", False),
        ("down", 0.25, (16, 16), "magnitude", True),
    )
    asked.clear()
    settled(gm)
    assert not asked and {n for n, _ in gm.named_parameters() if "data" in n} == {"up.data", "down.data"}


@pytest.mark.parametrize(
    "spec", ((0.25, (16, 16), "magnitude", False), (0.5, (16, 16), "activation", True)), ids=("plain", "calibrated")
)
def test_two_of_four_settled_is_saved_and_loaded(spec, gpu_times, tmp_path, monkeypatch):
    gm, x = fxopt.capture(Net(sizes=WIDE).eval(), X(size=64)), X(size=64)
    settled = BlockSparsify({"up": spec, "down": 0.75}, inputs=x).settled(gm)
    assert settled.patterns == (("up", None, "2:4", *spec[2:]), ("down", 0.75, (32, 32), "magnitude", False))
    settled(gm)
    assert gm.up.values.shape == (128, 32) and gm.down.data.dim() == 3
    fxopt.save(gm, tmp_path / "saved")
    monkeypatch.undo()  # loaded where no GPU is
    again = fxopt.load(tmp_path / "saved")
    assert torch.equal(again(*x), gm(*x))
    history(again).undo(0)
    assert "semi_structured_linear" not in again.code


def test_why_neither_is_taken_is_said(gpu_times, monkeypatch):
    slow = {"dense": 1.0, "block-sparse": 0.5, "2:4": 0.75}
    monkeypatch.setattr(
        block_plan, "timed", lambda c, w, tokens: {n: {t: Timing(1e-4 / slow[n], slow[n]) for t in tokens} for n in c}
    )
    gm = trace(Net(sizes=WIDE).eval(), X(size=64), "aten")
    sparsify, code = BlockSparsify({"up": 0.25}, tokens=(8,)), gm.code
    sparsify(gm)
    assert gm.code == code
    reasons = {m.reason for m in sparsify.misses(gm)}
    assert "no faster block-sparse (0.50 × at 8 tokens) or 2:4 (0.75 × at 8 tokens)" in reasons


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_optimizer_follows_two_of_four_on_a_graph(dialect):
    gm, x = trace(Net(sizes=WIDE).eval(), X(size=64), dialect), X(size=64)
    sparsify, optimizer = force({".*": PAIRS}), torch.optim.AdamW(gm.parameters(), lr=1e-2)

    def step():
        optimizer.zero_grad()
        gm(*x).square().mean().backward()
        optimizer.step()

    step()
    moments = optimizer.state[gm.up.weight]["exp_avg"].clone()
    with following(optimizer, gm):
        sparsify(gm)
    values, metadata = gm.up.values, gm.up.metadata
    kept = to_dense(torch.ones_like(values), metadata) != 0
    assert torch.equal(to_dense(optimizer.state[values]["exp_avg"], metadata), moments * kept)
    step()
    with following(optimizer, gm):
        sparsify.reverse(gm, mode="zeros")
    assert gm.up.weight[~kept].eq(0).all() and optimizer.state[gm.up.weight]["exp_avg"][kept].ne(0).any()
    step()
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in gm.parameters()}


@pytest.mark.parametrize("given", [X(), [X(), X()]], ids=["one", "several"])
@pytest.mark.parametrize("spec", [(0.5, (16, 16), "activation"), (0.5, (16, 16), "magnitude", True)])
def test_what_calibration_chose_is_saved_and_loaded(spec, given, tmp_path):
    gm, x = fxopt.capture(Net().eval(), X()), X()
    force({"up|down": spec}, inputs=given).settled(gm)(gm)
    fxopt.save(gm, tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved")
    assert torch.equal(again(*x), gm(*x)) and history(again)[0].signature == history(gm)[0].signature
    fxopt.save(again, tmp_path / "saved")
    assert torch.equal(fxopt.load(tmp_path / "saved")(*x), gm(*x))
    history(again).undo(0)
    assert "block_linear" not in again.code


@pytest.mark.parametrize("density", (None, 0.5))
@pytest.mark.parametrize("kind", ("torch", "numpy", "list", "csr", "bsr"))
def test_a_mask_is_saved_and_loaded(kind, density, tmp_path):
    gm, x = fxopt.capture(Net().eval(), X()), X()
    weight = next(p for n, p in gm.named_parameters() if n == "up.weight").detach()
    mask = weight.abs() > weight.abs().quantile(0.999)
    numbers = mask.float().numpy()
    forms = {"torch": mask, "numpy": mask.numpy(), "list": mask.tolist()}
    forms |= {"csr": scipy.sparse.csr_array(numbers), "bsr": scipy.sparse.bsr_array(numbers, blocksize=(16, 16))}
    force({"up": Spec(density, (16, 16), forms[kind])}).settled(gm)(gm)
    kept = history(gm)[0].transformation.patterns[0][3]  # scipy's blocks are kept whole, zeros in them too
    of_blocks, wanted = (block_view(m.float(), (16, 16)).amax((2, 3)) for m in (kept, mask))
    assert 0 < gm.up.data.shape[0] < 12 and kept.dtype is torch.bool and torch.equal(of_blocks, wanted)
    fxopt.save(gm, tmp_path / "saved")
    assert torch.equal(fxopt.load(tmp_path / "saved")(*x), gm(*x))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("options", "copied"), (({}, False), ({}, True), ({"rescale": True}, False)), ids=("plain", "copied", "rescaled")
)
@pytest.mark.parametrize("block", ((16, 16), "2:4"), ids=("blocks", "pairs"))
def test_an_edit_that_no_version_tells_is_an_edit(dialect, options, block, copied):
    gm, x = trace(Net(sizes=WIDE).eval(), X(size=64), dialect), X(size=64)
    before, sparsify = state(gm), force({".*": Spec(0.5, block, **options)})
    sparsify(gm)
    sparsify.reverse(gm)
    assert state(gm) == before
    sparsify(gm)
    if copied:
        gm = copy.deepcopy(gm)
    name = "up.data" if block != "2:4" else "up.values"
    gm.get_parameter(name).data.mul_(3.0)
    trained = gm(*x)
    with pytest.raises(Conflict, match=rf"made {name}, edited since.*say mode='zeros'"):
        sparsify.reverse(gm)
    assert torch.equal(gm(*x), trained)
    sparsify.reverse(gm, mode="zeros")
    torch.testing.assert_close(gm(*x), trained)


@pytest.mark.parametrize("mode", ("zeros", "merge"))
def test_a_converted_graph_gets_converted_weights(mode):
    gm, sparsify = trace(Net().eval(), X(), "aten"), force({".*": (0.5, (16, 16))})
    original = gm.up.weight.detach().bfloat16()
    sparsify(gm)
    gm.to(torch.bfloat16)
    with pytest.raises(Conflict, match="say mode='zeros'"):
        sparsify.reverse(gm)
    sparsify.reverse(gm, mode=mode)
    assert gm.up.weight.dtype is gm.down.weight.dtype is torch.bfloat16
    assert mode == "zeros" or torch.equal(gm.up.weight, original)


class Named(nn.Module):
    """A layer among whose own buffers are the names of blocks."""

    def __init__(self, *names):
        super().__init__()
        self.fc = nn.Linear(64, 64, bias=False)
        for name in names:
            self.fc.register_buffer(name, torch.randperm(64))
        self.names = names

    def forward(self, x):
        y = nn.functional.linear(x, self.fc.weight)
        for name in self.names:
            y = y[:, getattr(self.fc, name)]
        return y


@pytest.mark.parametrize("names", (("index",), ("data", "weight_blocks"), ("crow", "col", "values", "metadata")))
@pytest.mark.parametrize("spec", ((0.5, (16, 16)), PAIRS), ids=("blocks", "pairs"))
def test_names_that_are_taken(names, spec):
    gm, x = trace(Named(*names).eval(), X(size=64), "function"), X(size=64)
    before, sparsify = state(gm), force({"fc": spec})
    sparsify(gm)
    assert all(torch.equal(b, gm.get_buffer(n)) for n, b in gm.named_buffers() if n.rpartition(".")[2] in names)
    with torch.no_grad():
        next(p for n, p in gm.named_parameters()).mul_(2.0)
    trained = gm(*x)
    sparsify.reverse(gm, mode="zeros")
    torch.testing.assert_close(gm(*x), trained)
    assert [k for k, *_ in state(gm)] == [k for k, *_ in before]


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 48), nn.Linear(48, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_weight_that_is_an_embedding_too_stays(dialect):
    gm = trace(Embedded().eval(), (torch.arange(7),), dialect)
    code, sparsify = gm.code, force({"head|embedding": 0.5})
    sparsify(gm)
    assert gm.code == code and any("needs it dense" in m.reason for m in sparsify.misses(gm))


@pytest.mark.parametrize(
    ("patterns", "message"),
    (
        ({"nothing": 0.5}, "the pattern 'nothing' matches no linear layer; a pattern matches a whole path"),
        ({"up": 0.5, "u.": 0.5}, "an earlier pattern takes them"),
        ({"up": 1.5}, "density=1.5 was given"),
        ({"up": (0.5, (16, 16), "activation")}, 'up: select="activation" needs inputs'),
        ({"up": Spec(select=torch.ones(7, 7))}, r"up: a mask of shape \(7, 7\) was given"),
        ({"up": PAIRS}, r"up: a weight of shape \(64, 48\) was given, expected multiples of 32 and 64 for 2:4"),
        ({"up": Spec(select=[[True], [True]])}, r"up: a mask of shape \(2, 1\) was given"),
        (["up"], "expected a regular expression|was given, expected"),
    ),
)
def test_bad_input_leaves_the_graph_alone(patterns, message):
    gm = trace(Net().eval(), X(), "aten")
    code, before = gm.code, state(gm)
    with pytest.raises(fxopt.errors.FxoptError, match=message) as caught:
        force(patterns)(gm)
    assert "\n" not in str(caught.value) and gm.code == code and state(gm) == before


def test_calibration_leaves_no_trace():
    model = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 64), nn.Dropout()).train()
    gm, x = torch.fx.symbolic_trace(model), torch.randn(8, 64) + 3
    before, content = state(gm), {k: v.clone() for k, v in gm.state_dict().items()}
    versions, chance = [t._version for t in gm.state_dict().values()], torch.get_rng_state()
    sparsify = force({"1": (0.5, (32, 32), "activation")}, inputs=x)
    report = sparsify.plan(gm)
    assert state(gm) == before and [t._version for t in gm.state_dict().values()] == versions
    assert all(torch.equal(v, content[k]) for k, v in gm.state_dict().items())
    assert all(m.training for m in gm.modules()) and torch.equal(torch.get_rng_state(), chance)
    with torch.no_grad():
        seen = copy.deepcopy(model).eval()[0](x)
    assert report["1"].error == pytest.approx(block_plan.output_error(model[1].weight, _made(model[1], seen), seen))
    sparsify(gm)
    assert type(getattr(gm, "1")) is BlockSparseLinear and gm(x).isfinite().all()


def _made(linear, inputs):
    return BlockSparseLinear.from_dense(linear, 0.5, select="activation", inputs=inputs)


@pytest.mark.parametrize(
    ("attach", "reason"),
    (
        (lambda m: m.register_forward_hook(lambda *a: None), "up has hooks"),
        (lambda m: m.weight.register_hook(lambda g: g), "up has hooks on its weight, which would be lost"),
    ),
)
def test_what_would_be_lost_is_a_reason_to_stay(attach, reason):
    model = Net().eval()
    attach(model.up)
    gm = torch.fx.symbolic_trace(model)
    sparsify, code = force({"up": 0.5}), gm.code
    report = sparsify.plan(gm)
    assert not report.changed and reason in report["up"].reason and "nothing was changed" in report.summary
    assert any(reason in m.reason for m in sparsify.misses(gm))
    sparsify(gm)
    assert gm.code == code and type(gm.up) is nn.Linear
