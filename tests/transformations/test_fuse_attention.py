import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

from fxopt.history import history
from fxopt.shapes import propagate
from fxopt.transformations.fuse_attention import FuseAttention
from tests.rewriting import rewrites, unchanged
from tests.transformations import eager


def inputs(dtype=torch.float32, mask=torch.float32, shape=(2, 3, 5, 8)):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=g, dtype=dtype) for _ in range(3))
    if mask is torch.bool:
        return q, k, v, torch.rand(2, 1, 5, 5, generator=g) > 0.7
    return q, k, v, torch.randn(2, 1, 5, 5, generator=g).to(mask)


class Attention(nn.Module):
    """softmax((q @ k.T * s) + mask) @ v, with its parts to be overridden."""

    def scores(self, q, k):
        return torch.matmul(q, k.transpose(-1, -2)) * 0.25

    def masked(self, scores, mask):
        return scores + mask

    def probabilities(self, scores):
        return F.softmax(scores, dim=-1)

    def forward(self, q, k, v, mask):
        p = self.probabilities(self.masked(self.scores(q, k), mask))
        return torch.matmul(F.dropout(p, 0.1, self.training), v)


AFTER = "%0 = scaled_dot_product_attention(q, k, v, {mask}scale=0.25)\nreturn %0"


def fused(model, given=None, after=None, **options):
    return rewrites(FuseAttention(), model, given or inputs(), after, count=1, rtol=1e-4, atol=1e-5, **options)


def test_the_written_out_form():
    rewritten = fused(Attention())
    for gm in rewritten.values():
        assert "softmax" not in gm.code and "scaled_dot_product_attention" in gm.code


class Division(Attention):
    def scores(self, q, k):
        return torch.matmul(q, k.transpose(2, 3)) / math.sqrt(8)


class NoScale(Attention):
    def scores(self, q, k):
        return q @ k.transpose(-1, -2)


class NoMask(Attention):
    def masked(self, scores, mask):
        return scores


class Float32(Attention):
    narrow = torch.float32

    def probabilities(self, scores):
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(self.narrow)


class BFloat16(Float32):
    narrow = torch.bfloat16


class T5(Attention):
    def probabilities(self, scores):
        return F.softmax(scores.float(), dim=-1).type_as(scores)


class KeysTransposedElsewhere(Attention):
    def scores(self, q, k):
        return torch.matmul(q, k.permute(0, 1, 3, 2)) * 0.25


class Biased(Attention):
    def masked(self, scores, mask):
        return scores + mask[:1, :, :1] + mask


@pytest.mark.parametrize("kind", (Biased, Division, NoScale, NoMask, Float32, T5, KeysTransposedElsewhere))
def test_variants(kind):
    fused(kind())


class Filled(Attention):
    value = torch.finfo(torch.float32).min

    def masked(self, scores, mask):
        return scores.masked_fill(mask, self.value)


class Where(Filled):
    def masked(self, scores, mask):
        return torch.where(mask, scores, self.value)


@pytest.mark.parametrize("kind", (Filled, Where))
def test_boolean_masks(kind):
    fused(kind(), inputs(mask=torch.bool))


@pytest.mark.parametrize("kind", (Filled, Where))
def test_rows_that_are_hidden_in_full(kind):
    q, k, v, mask = inputs(mask=torch.bool)
    mask[:, :, 1] = kind is Filled
    fused(kind(), (q, k, v, mask))


@pytest.mark.parametrize("kind", (Attention, BFloat16))
def test_bfloat16(kind):
    rewrites(FuseAttention(), kind(), inputs(torch.bfloat16, torch.bfloat16), None, count=1, rtol=3e-2, atol=3e-2)


class OtherDimension(Attention):
    def probabilities(self, scores):
        return F.softmax(scores, dim=1)


class ScoresReturned(Attention):
    def forward(self, q, k, v, mask):
        p = self.probabilities(self.masked(self.scores(q, k), mask))
        return torch.matmul(p, v), p


class SmallFill(Filled):
    value = -100.0


class InfiniteFill(Filled):
    value = -math.inf


class Broadcast(Attention):
    def forward(self, q, k, v, mask):
        return super().forward(q, k[:, :1], v, mask)


class Dropped(Attention):
    def probabilities(self, scores):
        return F.dropout(F.softmax(scores, dim=-1), 0.5, True)


class MaskOfMoreDimensions(Attention):
    def masked(self, scores, mask):
        return (scores + mask[None])[0]


class BiasOfFiveDimensions(Attention):
    def masked(self, scores, mask):
        return (scores + mask[None] + mask)[0]


class BiasOfAnotherType(Attention):
    def masked(self, scores, mask):
        return scores + (mask > 0) + mask


def test_near_misses():
    fuse = FuseAttention()
    unchanged(fuse, OtherDimension(), inputs(), "the softmax is over dimension 1")
    unchanged(fuse, ScoresReturned(), inputs(), "has other users")
    unchanged(fuse, SmallFill(), inputs(mask=torch.bool), "not large enough")
    unchanged(fuse, InfiniteFill(), inputs(mask=torch.bool), "are NaN, and would be 0")
    unchanged(fuse, Broadcast(), inputs(), "it broadcasts")
    unchanged(fuse, Dropped(), inputs(), None)
    unchanged(fuse, MaskOfMoreDimensions(), inputs(), None)
    unchanged(fuse, BiasOfFiveDimensions(), inputs(), None)
    unchanged(fuse, BiasOfAnotherType(), inputs(), "its mask is torch.bool, expected torch.float32")
    unchanged(fuse, Attention(), (*inputs(mask=torch.float64)[:3], torch.zeros(5, 5, dtype=torch.long)), "its mask is")


def test_unknown_shapes_are_a_miss():
    gm = torch.fx.symbolic_trace(Attention().eval())
    assert any("call fxopt.propagate" in m.reason for m in FuseAttention().misses(gm))
    FuseAttention()(gm)
    assert not history(gm)[-1].rewrites


@settings(max_examples=30)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31)
)
def test_the_same_as_eager_in_any_shape(batch, heads, rows, columns, size, seed):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, rows, size, generator=g, dtype=torch.double)
    k, v = (torch.randn(batch, heads, columns, size, generator=g, dtype=torch.double) for _ in range(2))
    mask = torch.randn(batch, 1, 1, columns, generator=g, dtype=torch.double)
    model = Attention().eval()
    gm = propagate(torch.fx.symbolic_trace(model), (q, k, v, mask))
    FuseAttention()(gm)
    assert len(history(gm)[-1].rewrites) == 1
    torch.testing.assert_close(gm(q, k, v, mask), model(q, k, v, mask), rtol=1e-9, atol=1e-9)


# One in each layer; T5 has two layers of self-attention, and two of self- and cross-attention.
@pytest.mark.parametrize(
    ("make", "count"),
    [(eager.bert, 2), (eager.gpt2, 2), (eager.llama, 2), (eager.qwen3, 2), (eager.t5, 6), (eager.vit, 2)],
)
def test_in_models(make, count):
    gm, given = eager.captured(make)
    code = gm.code
    with torch.no_grad():
        expected = gm(**given)
        FuseAttention()(gm)
        found = gm(**given)
    assert len(history(gm)[-1].rewrites) == count and gm.code.count("scaled_dot_product_attention.default(") == count
    assert "softmax" not in gm.code
    for a, b in zip(tree_leaves(expected), tree_leaves(found), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    FuseAttention().reverse(gm)
    assert gm.code == code
