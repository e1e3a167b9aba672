"""Input sets: copies keep what they share, drawn sets are ones that the callable could be given in earnest."""

import math
import random

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from fxopt.errors import UsageError
from fxopt.samples import clone_tensors, flatten, normal_form, sampler


def function(*args, **kwargs):
    return None


def drawing(inputs, captured_as=function, named_by=function):
    return sampler(normal_form(inputs, named_by), captured_as)


def drawn(inputs, count=8, seed=0, **options):
    draws = drawing(inputs, **options)
    return [draws.draw(number, seed) for number in range(count)]


# ------------------------------------------------------------------------------------------------ nests and copies


def test_flatten_names_every_leaf():
    class Cache:
        def __init__(self):
            self.keys, self.length, self.parent = [torch.ones(1)], 3, self

    parts = flatten({"a": (torch.ones(2), None), "b": Cache()}, "x")
    assert [p.path for p in parts if p.kind == "leaf"] == [
        "x['a'][0]", "x['a'][1]", "x['b'].keys[0]", "x['b'].length",
    ]  # fmt: skip
    immutable = torch.fx.immutable_collections.immutable_list([1])
    assert flatten(immutable, "x") == flatten([1], "x")


def test_copies_share_memory_as_the_originals_do():
    base = torch.arange(24.0)
    tensors = [base, base.view(4, 6).t(), base[3:9], base.as_strided((2, 3), (0, 2), 1), torch.zeros(0, 3)]
    for dtype in (None, torch.float64):
        copies = clone_tensors(tensors, dtype)
        for tensor in tensors:
            copied = copies[id(tensor)]
            assert torch.equal(copied.to(tensor.dtype), tensor) and copied.dtype == (dtype or tensor.dtype)
            assert tensor.numel() == 0 or copied.stride() == tensor.stride()
        copies[id(base)].fill_(7)
        assert all(bool((copies[id(t)] == 7).all()) for t in tensors)
        assert torch.equal(base, torch.arange(24.0))


def test_copies_of_what_is_no_plain_tensor():
    sparse, conjugate = torch.eye(3).to_sparse(), torch.randn(3, dtype=torch.complex64).conj()
    parameter, inference = nn.Parameter(torch.ones(3)), None
    with torch.inference_mode():
        inference = torch.ones(3)
    tensors = [sparse, conjugate, parameter, inference]
    copies = clone_tensors(tensors)
    assert torch.equal(copies[id(sparse)].to_dense(), torch.eye(3))
    assert torch.equal(copies[id(conjugate)], conjugate)
    assert not copies[id(parameter)].requires_grad
    copies[id(inference)].add_(1)
    assert torch.equal(inference, torch.ones(3))
    assert clone_tensors([conjugate], torch.float64)[id(conjugate)].dtype is torch.complex128


def test_normal_form():
    x = torch.ones(2)
    for inputs in (x, (x,), {"x": x}):
        (one,) = normal_form(inputs, lambda x: x)
        assert [name for name, _ in one.tensors()] == ["x"] and one.label == "given input set"
    first, second = normal_form([(x,), {"x": x}], lambda x: x)
    assert (first.label, second.label) == ("given input set 1 of 2", "given input set 2 of 2")
    assert normal_form((x,), torch.relu)[0].names == ("args[0]",)
    (one,) = normal_form((x, [x, {"k": x}]), lambda a, b: None)
    assert [name for name, _ in one.tensors()] == ["a", "b[0]", "b[1]['k']"]
    with pytest.raises(UsageError, match="not str"):
        normal_form("x", function)


# ------------------------------------------------------------------------------------------------------- the values


@given(st.integers(-50, 50), st.integers(0, 60), st.integers(0, 99))
def test_integers_stay_within_those_given(low, width, seed):
    ids = torch.randint(low, low + width + 1, (2, 7))
    low, high = int(ids.min()), int(ids.max())
    assume(not 0 <= low <= high <= 1)  # nothing but zeros and ones is taken for a mask, and padded with zeros
    for one in drawn({"ids": ids}, seed=seed):
        tensor = one.kwargs["ids"]
        assert tensor.dtype is torch.int64 and tensor.shape == (2, 7)
        assert bool((tensor >= low).all()) and bool((tensor <= high).all())


def test_places_stay_places():
    for ids in (torch.arange(7), torch.arange(3, 10).expand(2, 7)):
        assert all(torch.equal(one.kwargs["position"], ids) for one in drawn({"position": ids}))


@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([torch.int64, torch.int32, torch.bool, torch.float32]),
    st.integers(0, 99),
)
def test_masks_stay_masks(batch, length, dtype, seed):
    mask = torch.ones(batch, length).to(dtype)
    sets = drawn({"ids": torch.ones(batch, length, dtype=torch.int64) * 5, "attention_mask": mask}, seed=seed)
    for number, one in enumerate(sets):
        got = one.kwargs["attention_mask"]
        assert got.dtype is dtype and set(got.unique().tolist()) <= {0, 1} and bool(got.bool().any(-1).all())
        side = got.bool().int() if number % 4 != 1 else got.bool().int().flip(-1)
        assert bool((side.diff(dim=-1) <= 0).all())  # ones, then zeros
        if number % 4 == 2:
            assert bool(got.bool().all())
        elif length > 1 and batch == 1:
            assert not bool(got.bool().all())
        elif batch > 1:
            assert bool(got.bool().all(-1).any())


def test_masks_of_one_size_are_padded_alike():
    ones = torch.ones(3, 9, dtype=torch.int64)
    for one in drawn({"attention_mask": ones, "global_mask": ones.bool()}):
        assert torch.equal(one.kwargs["attention_mask"].bool(), one.kwargs["global_mask"])


@pytest.mark.parametrize("off", [-math.inf, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("causal", [True, False])
def test_additive_masks(off, causal):
    allowed = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed.index_fill(3, torch.tensor([5]), False)
    mask = torch.zeros(2, 1, 6, 6).masked_fill(~allowed, off)
    padded = 0
    for one in drawn({"mask": mask}):
        got = one.kwargs["mask"]
        assert set(got.unique().tolist()) <= {0.0, off} and bool((got == 0).any(-1).all())
        padded += bool((got[..., 0] == off).any() or (got[..., -1, -2] == off).any())
        if causal:
            assert bool((got[..., torch.ones(6, 6, dtype=torch.bool).triu(1)] == off).all())
    assert padded


def test_token_types_are_no_mask_of_ones():
    zeros = torch.zeros(2, 5, dtype=torch.int64)
    assert all(torch.equal(one.kwargs["token_type_ids"], zeros) for one in drawn({"token_type_ids": zeros}))


def test_floats_keep_their_domain():
    positive = torch.rand(4, 50) + 0.5
    for one in drawn({"x": positive}):
        assert bool((one.kwargs["x"] >= positive.min()).all()) and bool((one.kwargs["x"] <= positive.max()).all())
    for constant in (3.0, -2.0):
        for one in drawn({"x": torch.full((9,), constant)}):
            assert bool((one.kwargs["x"].sign() == math.copysign(1, constant)).all()) and one.kwargs["x"].std() > 0
    spread = [float(one.kwargs["x"].std()) for one in drawn({"x": torch.randn(1000)}, 4)]
    assert spread == pytest.approx([1, 0.01, 1, 8], rel=0.2)
    assert all(bool(one.kwargs["x"].any()) for one in drawn({"x": torch.zeros(4)}))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.uint8]
)
def test_dtypes_and_strides_are_kept(dtype):
    x = torch.randn(2, 3, 4, 4).to(dtype).to(memory_format=torch.channels_last)
    for one in drawn((x, x.transpose(1, 3))):
        assert one.args[0].dtype is dtype and one.args[0].is_contiguous(memory_format=torch.channels_last)
        assert one.args[1].shape == (2, 4, 4, 3) and one.args[1].stride() == x.transpose(1, 3).stride()


def test_what_cannot_be_drawn_stays_as_given():
    sparse = torch.eye(3).to_sparse()
    for one in drawn({"x": sparse, "n": 3, "empty": torch.zeros(0, 2), "flag": True, "none": None}):
        assert torch.equal(one.kwargs["x"].to_dense(), torch.eye(3)) and one.kwargs["empty"].shape == (0, 2)
        assert (one.kwargs["n"], one.kwargs["flag"], one.kwargs["none"]) == (3, True, None)


def test_one_object_stays_one_object_and_caches_are_drawn_into():
    class Cache:
        def __init__(self, keys):
            self.keys = keys

    x = torch.randn(2, 3)
    for one in drawn({"x": x, "again": [x], "cache": Cache(x * 2)}):
        assert one.kwargs["x"] is one.kwargs["again"][0]
        assert isinstance(one.kwargs["cache"], Cache) and not torch.equal(one.kwargs["cache"].keys, x * 2)


def test_drawing_is_by_the_seed_alone():
    inputs = {"x": torch.randn(3, 4), "ids": torch.randint(9, (3, 4))}
    states = torch.get_rng_state(), random.getstate()
    one, same, other = drawn(inputs, seed=1), drawn(inputs, seed=1), drawn(inputs, seed=2)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    for a, b, c in zip(one, same, other, strict=True):
        assert torch.equal(a.kwargs["x"], b.kwargs["x"]) and a.label == b.label
        assert not torch.equal(a.kwargs["x"], c.kwargs["x"])


# -------------------------------------------------------------------------------------------------------- the sizes


def export(model, args, dynamic_shapes):
    return torch.export.export(model, args, dynamic_shapes=dynamic_shapes).module()


class Two(nn.Module):
    def forward(self, x, pair):
        return x.sum(0) + pair["y"].sum(0), pair["z"][::2] + x.sum()


def test_sizes_follow_the_symbols_of_the_graph():
    batch, length = torch.export.Dim("batch", min=2, max=11), torch.export.Dim("length", min=1, max=100)
    args = torch.randn(4, 3), {"y": torch.randn(4, 3), "z": torch.randn(20)}
    gm = export(Two(), args, {"x": {0: batch}, "pair": {"y": {0: batch}, "z": {0: 2 * length}}})
    sizes = set()
    for one in drawn(args, 40, captured_as=gm, named_by=gm):
        x, pair = one.args
        assert x.shape[0] == pair["y"].shape[0] and x.shape[1] == 3
        assert 2 <= x.shape[0] <= 8 and pair["z"].shape[0] % 2 == 0
        gm(*one.args)
        sizes.add(x.shape[0])
    assert sizes >= {2, 4, 8} and len(sizes) > 4
    draws = drawing(args, gm, gm)
    assert all(draws.draw(n, 0, resize=False).args[0].shape == (4, 3) for n in range(8))


def test_keywords_and_positions_find_the_same_placeholders():
    batch = torch.export.Dim("batch", min=1, max=64)
    args = torch.randn(4, 3), {"y": torch.randn(4, 3), "z": torch.randn(6)}
    gm = export(Two(), args, {"x": {0: batch}, "pair": {"y": {0: batch}, "z": None}})
    by_name = {"pair": args[1], "x": args[0]}
    shapes = [one.kwargs["x"].shape for one in drawn(by_name, captured_as=gm, named_by=gm)]
    assert shapes == [one.args[0].shape for one in drawn(args, captured_as=gm, named_by=gm)] and len(set(shapes)) > 2


def test_integers_that_stand_for_a_size_follow_it():
    class Repeats(nn.Module):
        def forward(self, x, n):
            return x.repeat(n)

    dynamic = torch.export.Dim.DYNAMIC
    gm = export(Repeats(), (torch.randn(3), 5), {"x": {0: dynamic}, "n": dynamic})
    ns = {one.args[1] for one in drawn((torch.randn(3), 5), captured_as=gm, named_by=gm)}
    assert len(ns) > 2 and all(type(n) is int for n in ns)


def test_places_end_where_a_smaller_size_ends():
    inputs = [{"x": torch.randn(n, 2), "index": torch.arange(n).flip(0)} for n in (4, 12)]
    for one in drawn(inputs, 40):
        assert int(one.kwargs["index"].max()) < one.kwargs["x"].shape[0]


def test_sizes_seen_in_several_sets_vary_together_within_what_was_seen():
    inputs = [{"x": torch.randn(n, 5), "y": torch.randn(n), "z": torch.randn(m, n)} for n, m in ((3, 2), (9, 8))]
    seen = set()
    for one in drawn(inputs, 40):
        x, y, z = (one.kwargs[name] for name in "xyz")
        assert x.shape == (y.shape[0], 5) and z.shape[1] == y.shape[0]
        assert 3 <= y.shape[0] <= 9 and 2 <= z.shape[0] <= 8
        seen.add(y.shape[0])
    assert len(seen) > 4
    assert not drawing(inputs[0]).dynamic


def test_labels_say_what_was_drawn():
    inputs = {"ids": torch.randint(9, (2, 4)) + 2, "attention_mask": torch.ones(2, 4), "t": torch.tensor(1.5)}
    first, second, third, _ = drawn(inputs, 4)
    assert first.label == "drawn input set 1 (ids 2×4, attention_mask 2×4 right-padded mask, t scalar)"
    assert "left-padded mask" in second.label and "full mask" in third.label and first.origin == "drawn"
