import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Interpreter, symbolic_trace
from torch.utils._pytree import tree_leaves

from fxopt import models
from fxopt.capture import capture
from fxopt.errors import TransformationError, UsageError
from fxopt.history import history
from fxopt.inputs import example_inputs
from fxopt.pruning.config import captured as without_cache
from fxopt.shapes import propagate
from fxopt.transformations import PruneWidth
from fxopt.transformations._axes import Atom, Axes, index_map
from fxopt.transformations._trees import out_of_place
from fxopt.transformations.prune_width import axes, choose
from tests.transformations.test_prune_trees import Model, X, state

EXACT = ("bert-base", "t5-small", "vit-base", "resnet50")  # all of them computes in the dtype of the model


def tensors(value):
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def captured(name, dtype=torch.float32):
    gm, inputs = _captured(name, dtype)
    return copy.deepcopy(gm), inputs


@functools.cache
def _captured(name, dtype):
    model = models.build(f"{name}-tiny").to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in example_inputs(model, 2, 12).items()}
    return without_cache(model, inputs), inputs


class Masked(Interpreter):
    """
    The reference: all at full size, but every value's dropped units are zero, and norms see only the kept ones.

    Nothing of the cut is used here but which index of an axis belongs to which unit.
    """

    def __init__(self, gm, found, leaf, drop):
        super().__init__(gm)
        self.axes, self.leaf, self.drop = found, leaf, torch.as_tensor(drop)

    def kept(self, dim):
        known = all(isinstance(a, Atom) and isinstance(a.size, int) for a in dim)
        index = index_map(dim, self.leaf) if known else None
        return None if index is None else ~torch.isin(index, self.drop)

    def run_node(self, n):
        dims = self.axes.of.get(n)
        last = self.kept(dims[-1]) if isinstance(dims, list) and dims and isinstance(dims[-1], list) else None
        name = str(n.target)
        if last is not None and not last.all() and name.startswith("aten.layer_norm"):
            x, _, weight, bias, eps, *_ = self.fetch_args_kwargs_from_env(n)[0]
            value = torch.zeros_like(x)
            w, b = (None if t is None else t[last] for t in (weight, bias))
            value[..., last] = F.layer_norm(x[..., last], (int(last.sum()),), w, b, eps)
        elif (
            last is not None and not last.all() and name.startswith("aten.softmax")
        ):  # a dropped expert is never chosen
            x, *options = self.fetch_args_kwargs_from_env(n)[0]
            value = torch.softmax(x.masked_fill(~last, -torch.inf), *options)
        else:
            value = super().run_node(n)
            if name.startswith("aten.mean"):
                before = self.axes.of[n.args[0]][-1]
                there = self.kept(before)
                if there is not None and not there.all() and n.args[1] in ([-1], [len(self.axes.of[n.args[0]]) - 1]):
                    value = value * (len(there) / there.sum())
        return self.masked(value, dims)

    def masked(self, value, dims):
        if not isinstance(value, torch.Tensor) or not isinstance(dims, list) or not value.is_floating_point():
            return value
        for axis, dim in enumerate(dims):
            there = self.kept(dim) if dim and not isinstance(dim[0], list) else None
            if there is not None and not there.all():
                shape = [1] * value.dim()
                shape[axis] = -1
                value = torch.where(there.view(shape), value, torch.zeros((), dtype=value.dtype))
        return value


def difference(gm, inputs, axis, drop):
    """The largest difference of the pruned graph from the masked reference, over the largest value of that."""
    source = out_of_place(gm)
    found = Axes(source)
    leaf = next(c.leaf for c in found.classes() if c.id == axis.id)
    flat = list(inputs.values() if isinstance(inputs, dict) else inputs)
    with torch.no_grad():
        reference = tensors(Masked(source, found, leaf, drop).run(*flat, enable_io_processing=False))
        PruneWidth(drop=((axis.id, tuple(drop)),))(gm)
        got = tensors(gm(**inputs) if isinstance(inputs, dict) else gm(*inputs))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(reference, got, strict=True))


@pytest.mark.parametrize(
    ("name", "dtype", "bound"),
    (
        ("gpt2", torch.float64, 1e-12),
        ("llama-small", torch.float64, 1e-6),  # its norms compute in float32 whatever the model's dtype is
        ("resnet18", torch.float32, 3e-6),
        *(pytest.param(n, torch.float64, 1e-12, marks=pytest.mark.slow) for n in ("resnet18", *EXACT)),
        pytest.param("qwen3-small", torch.float64, 1e-6, marks=pytest.mark.slow),
        *(pytest.param(n, torch.float32, 3e-6, marks=pytest.mark.slow) for n in ("gpt2", "llama-small", *EXACT)),
        pytest.param("mixtral", torch.float32, 3e-6, marks=pytest.mark.slow),  # its experts have no float64
    ),
    ids=str,
)
def test_every_class_equals_the_masked_reference_and_is_undone(name, dtype, bound):
    gm, inputs = captured(name, dtype)
    before, known, seen = state(gm), axes(gm), set()
    assert known
    for axis in known:
        signature = axis.kind, axis.size, len(axis.members)
        if signature in seen:  # the next layer's: the same again
            continue
        seen.add(signature)
        assert difference(gm, inputs, axis, range(0, axis.size, 2)) < bound, axis
        history(gm).undo(0)
        assert state(gm) == before


@functools.cache
def _small():
    return capture(Model(1).double(), (X.double(),))


@settings(max_examples=15)
@given(st.data())
def test_any_units_of_any_class(data):
    gm = copy.deepcopy(_small())
    axis = data.draw(st.sampled_from(axes(gm)))
    drop = data.draw(st.sets(st.integers(0, axis.size - 1), max_size=axis.size - 1).map(sorted))
    if drop:
        assert difference(gm, (X.double(),), axis, drop) < 1e-12


class TestClasses:
    def test_grouped_queries_go_with_their_keys_and_values(self):
        gm, _ = captured("llama-small")
        groups = next(c for c in axes(gm) if c.kind == "heads")
        names = {p.rpartition("self_attn.")[2] for p, _ in groups.members}
        assert groups.size == 2 and names == {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"}

    def test_the_decoders_heads_too(self):
        found = [c for c in axes(captured("t5-small")[0]) if c.kind == "heads"]
        mixed = [c for c in found if all("EncDecAttention" in p for p, _ in c.members)]
        shared = [c for c in found if any("relative_attention_bias" in p for p, _ in c.members)]
        assert len(mixed) == 1 and len(shared) == 2  # all read one mask of zeros for each head; one bias in each stack
        assert any("decoder" in p for p, _ in shared[1].members)

    def test_the_hidden_units_of_experts_go_in_all_of_them(self):
        found = [c for c in axes(captured("mixtral")[0]) if c.kind == "features"]
        names = [{p.rpartition(".")[2] for p, _ in c.members} for c in found]
        assert names == [{"gate_up_proj", "down_proj"}] * 2

    def test_experts_go_one_by_one_and_enough_of_them_stay(self):
        gm, inputs = captured("mixtral")
        found = [c for c in axes(gm) if c.kind == "experts"]
        assert [(c.size, c.least, len(c.members)) for c in found] == [(4, 2, 3)] * 2
        before = state(gm)
        for drop in ((1,), (0, 3)):
            assert difference(gm, inputs, found[0], drop) < 3e-6
            assert gm.get_parameter("model.layers.0.mlp.experts.down_proj").shape[0] == 4 - len(drop)
            history(gm).undo(0)
            assert state(gm) == before
        with pytest.raises(TransformationError, match="keep at least 2"):
            PruneWidth(drop=((found[0].id, (0, 1, 2)),))(gm)
        PruneWidth(0.9, kinds="experts")(gm)
        assert gm.get_parameter("model.layers.1.mlp.gate.weight").shape[0] == 2

    def test_fused_projections_are_cut_in_all_three_parts(self):
        gm, _inputs = captured("gpt2")
        heads = next(c for c in axes(gm) if c.kind == "heads")
        PruneWidth(drop=((heads.id, (1, 2)),))(gm)
        weight = gm.get_parameter("transformer.h.0.attn.c_attn.weight")
        dense = models.build("gpt2-tiny").transformer.h[0].attn.c_attn.weight
        kept = [
            i for part in range(3) for head in (0, 3) for i in range(part * 32 + head * 8, part * 32 + head * 8 + 8)
        ]
        assert torch.equal(weight, dense[:, kept])

    def test_tied_parameters_stay_tied(self):
        gm, inputs = captured("gpt2")
        width = next(c for c in axes(gm) if c.kind == "width")
        PruneWidth(drop=((width.id, (0, 5)),))(gm)
        assert gm.transformer.wte.weight is gm.lm_head.weight and gm.lm_head.weight.shape == (99, 30)
        gm(**inputs)

    def test_an_unknown_operation_blocks_its_axes_and_is_told(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

            def forward(self, x):
                return self.c(torch.relu(self.b(torch.cumsum(self.a(x), -1))))

        gm = capture(Net(), (torch.randn(2, 4),))
        assert [c.id for c in axes(gm)] == ["b.weight:0"]
        assert any("cumsum" in str(m) for m in PruneWidth().misses(gm))

    def test_the_outputs_and_inputs_are_never_cut(self):
        gm, _ = captured("bert-base")
        assert not any(c.kind == "width" for c in axes(gm))  # the hidden states are what it gives

    def test_modules_tell_their_new_sizes(self):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Conv2d(8, 5, 1),
        ).eval()
        x = torch.randn(2, 3, 6, 6)
        gm = propagate(symbolic_trace(model), (x,))
        (axis,) = axes(gm)
        PruneWidth(drop=((axis.id, (1, 3, 4)),))(gm)
        first, norm, depthwise, last = (gm.get_submodule(n) for n in ("0", "1", "3", "4"))
        assert (first.out_channels, norm.num_features, depthwise.groups, last.in_channels) == (5, 5, 5, 5)
        keep = [0, 2, 5, 6, 7]
        y = F.relu(model[1](model[0](x)))[:, keep]
        y = F.conv2d(y, model[3].weight[keep], model[3].bias[keep], groups=5)
        torch.testing.assert_close(gm(x), F.conv2d(y, model[4].weight[:, keep], model[4].bias))
        assert model[0].out_channels == 8 and model[0].weight.shape[0] == 8


class TestChoice:
    def test_ratio_and_rounding(self):
        gm = capture(Model(2), (X,))
        PruneWidth(0.5, kinds=("features",), round_to=5)(gm)
        assert gm.get_parameter("blocks.0.up.weight").shape == (10, 8)
        history(gm).undo(0)
        PruneWidth(0.5, kinds=("features",))(gm)
        assert gm.get_parameter("blocks.0.up.weight").shape == (6, 8)

    def test_what_has_the_least_norm_goes(self):
        model = Model(1)
        with torch.no_grad():
            for i in (2, 7):
                model.blocks[0].up.weight[i] *= 1e-3
                model.blocks[0].gate.weight[i] *= 1e-3
                model.blocks[0].down.weight[:, i] *= 1e-3
        gm = capture(model, (X,))
        PruneWidth(2 / 12, kinds=("features",))(gm)
        kept = [i for i in range(12) if i not in (2, 7)]
        assert torch.equal(gm.get_parameter("blocks.0.up.weight"), model.blocks[0].up.weight[kept])

    def test_globally_the_least_layer_gives_most(self):
        gm = capture(Model(2), (X,))
        known = [c for c in axes(gm) if c.kind == "features"]
        scores = {c.id: torch.arange(c.size).double() + 100 * i for i, c in enumerate(known)}
        going = choose(known, scores, 0.25, "global")
        assert list(going) == [known[0].id] and len(going[known[0].id]) == 6

    @pytest.mark.parametrize(
        ("options", "said"),
        (
            ({"ratio": 1.0}, "ratio"),
            ({"kinds": ("x",)}, "kind"),
            ({"round_to": 0}, "round_to"),
            ({"scope": "x"}, "scope"),
        ),
    )
    def test_wrong_options_are_one_line(self, options, said):
        with pytest.raises(UsageError, match=said) as caught:
            PruneWidth(**options)
        assert "\n" not in str(caught.value)

    def test_wrong_classes_and_units_change_nothing(self):
        gm = capture(Model(1), (X,))
        before, axis = state(gm), axes(gm)[0]
        for drop in ((("no.class:0", (1,)),), ((axis.id, (axis.size,)),), ((axis.id, tuple(range(axis.size))),)):
            with pytest.raises(TransformationError):
                PruneWidth(drop=drop)(gm)
            assert state(gm) == before


def test_a_copy_is_undone_on_its_own():
    gm = capture(Model(1), (X,))
    expected = gm(X)
    PruneWidth()(gm)
    twin = copy.deepcopy(gm)
    PruneWidth().reverse(twin)
    assert torch.equal(twin(X), expected) and not torch.equal(gm(X), expected)


def test_without_shapes_nothing_is_cut_and_a_miss_says_so():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return F.linear(F.silu(self.up(x)) * self.gate(x), self.down.weight)

    gm = symbolic_trace(Gated())
    PruneWidth()(gm)
    assert not history(gm)[0].rewrites
    assert {miss.node.name for miss in PruneWidth().misses(gm)} >= {"up", "gate", "linear"}
