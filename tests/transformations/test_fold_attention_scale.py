import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from fxopt.errors import Conflict
from fxopt.history import history
from fxopt.transformations.fold_attention_scale import FoldAttentionScale
from tests.rewriting import rewrites, trace, unchanged
from tests.transformations import eager

X = (torch.randn(2, 5, 8),)


class Attention(nn.Module):
    """Two heads of width 4 over (2, 5, 8)."""

    def __init__(self, scores, bias=True):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8, bias=bias), nn.Linear(8, 8), nn.Linear(8, 8)
        self.scores = scores
        self.register_buffer("cos", torch.rand(5, 4))
        self.register_buffer("mask", torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) > 0, -1e9))

    def heads(self, x):
        return x.view(2, 5, 2, 4).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.heads(p(x)) if p is not self.q else p(x) for p in (self.q, self.k, self.v))
        return self.scores(self, q, k, v)


def after_the_projection(m, q, k, v):
    q = m.heads(q * 0.3)
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def of_the_scores(m, q, k, v):
    scores = m.heads(q) @ k.transpose(-2, -1) * 0.3
    return scores.softmax(-1) @ v


def divided(m, q, k, v):
    scores = m.heads(q) @ k.transpose(-2, -1) / 3.0 + m.mask
    return scores.softmax(-1) @ v


def rotated(m, q, k, v):
    q = m.heads(q)
    halves = torch.cat((-q[..., 2:], q[..., :2]), -1)
    q = q * m.cos + halves * (1 - m.cos)
    return ((q @ k.transpose(-2, -1)) * 0.3).softmax(-1) @ v


def by_the_fused_operator(m, q, k, v):
    return F.scaled_dot_product_attention(m.heads(q), k, v)


@pytest.mark.parametrize("scores", [after_the_projection, of_the_scores, divided, rotated])
@pytest.mark.parametrize("bias", [True, False])
def test_the_scale_goes_into_the_projection(scores, bias):
    model = Attention(scores, bias)
    weight = model.q.weight.detach()
    for dialect, gm in rewrites(FoldAttentionScale(), model, X, None, count=1).items():
        factor = 1 / 3.0 if scores is divided else 0.3
        path = next(n for n, _ in gm.named_parameters() if n.startswith("q") and n.endswith("weight"))
        torch.testing.assert_close(dict(gm.named_parameters())[path], weight * factor)
        arguments = [a for n in gm.graph.nodes for a in n.args if isinstance(a, float)]
        assert not {0.3, 3.0}.intersection(arguments), dialect


def test_the_text():
    rewrites(
        FoldAttentionScale(),
        Attention(after_the_projection),
        X,
        """
        %0 = linear(x, q.weight, q.bias)
        %1 = linear(x, k.weight, k.bias)
        %2 = view(%1, [2, 5, 2, 4])
        %3 = transpose(%2, 1, 2)
        %4 = linear(x, v.weight, v.bias)
        %5 = view(%4, [2, 5, 2, 4])
        %6 = transpose(%5, 1, 2)
        %7 = view(%0, [2, 5, 2, 4])
        %8 = transpose(%7, 1, 2)
        %9 = scaled_dot_product_attention(%8, %3, %6, scale=1.0)
        return %9
        """,
    )


def test_the_scale_of_the_fused_operator_when_asked():
    model = Attention(by_the_fused_operator)
    found = rewrites(FoldAttentionScale(fused=True), model, X, None, count=1)
    assert all("scale = 1.0" in gm.code for gm in found.values())
    for gm in found.values():
        assert all(gm(*X).isfinite().flatten())
    unchanged(FoldAttentionScale(), model, X, r"fused=True\) folds it")


def test_a_power_of_two_is_exact():
    def scores(m, q, k, v):
        return (m.heads(q) @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v

    rewrites(FoldAttentionScale(), Attention(scores), X, None, count=1, rtol=0, atol=0)


def test_the_original_is_found_again_in_a_trained_weight():
    model = Attention(of_the_scores)
    gm = trace(model.eval(), X, "aten")
    code = gm.code
    FoldAttentionScale()(gm)
    with torch.no_grad():
        gm.get_parameter("q.weight").mul_(2)
    trained = gm(*X)
    with pytest.raises(Conflict):
        FoldAttentionScale().reverse(gm)
    FoldAttentionScale().reverse(gm, "carry")
    assert gm.code == code
    torch.testing.assert_close(gm.get_parameter("q.weight"), model.q.weight * 2)
    torch.testing.assert_close(gm(*X), trained)


def used_twice(m, q, k, v):
    return ((m.heads(q) @ k.transpose(-2, -1)) * 0.3).softmax(-1) @ v + m.heads(q).sum()


def normalised(m, q, k, v):
    return ((F.layer_norm(m.heads(q), (4,)) @ k.transpose(-2, -1)) * 0.3).softmax(-1) @ v


def squared(m, q, k, v):
    q = m.heads(q)
    return ((q * q) @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


def shifted(m, q, k, v):
    return ((m.heads(q) + 1.0) @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


def added(m, q, k, v):
    return ((m.heads(q) + k) @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


def scores_read_twice(m, q, k, v):
    scores = m.heads(q) @ k.transpose(-2, -1)
    return (scores * 0.3).softmax(-1) @ v + scores.mean()


def written(m, q, k, v):
    scores = m.heads(q) @ k.transpose(-2, -1)
    return scores.mul_(0.3).softmax(-1) @ v


def computed_weight(m, q, k, v):
    q = F.linear(k.transpose(1, 2).reshape(2, 5, 8), m.q.weight * 2.0)
    return ((m.heads(q) @ k.transpose(-2, -1)) * 0.3).softmax(-1) @ v


NEAR = {
    used_twice: "reads (q|linear|view|transpose).* too",
    normalised: "layer_norm is not proportional",
    squared: "is no multiple",
    shifted: "1.0 is no multiple of a projection",
    added: "a sum of several projections",
    scores_read_twice: "reads matmul.* too",
    written: "in place",
    computed_weight: "no parameter",
}


@pytest.mark.parametrize("scores", NEAR, ids=lambda f: f.__name__)
def test_near_misses(scores):
    dialects = ("function", "aten") if scores in (written, computed_weight) else ("module", "function", "aten")
    unchanged(FoldAttentionScale(), Attention(scores), X, NEAR[scores], dialects=dialects)


def test_what_is_no_attention_is_none_of_its_business():
    def scores(m, q, k, v):
        return m.heads(q * 0.3).relu() @ k.transpose(-2, -1), (m.heads(q) @ k.transpose(-2, -1)) * 0.3

    for dialect in ("module", "function", "aten"):
        gm = trace(Attention(scores), X, dialect)
        assert not list(FoldAttentionScale().misses(gm))
        FoldAttentionScale()(gm)
        assert not history(gm)[-1].rewrites


def test_a_weight_that_is_read_elsewhere_stays():
    model = Attention(of_the_scores)
    model.k.weight = model.q.weight
    unchanged(FoldAttentionScale(), model, X, r"q.weight is (k.weight too|read elsewhere too)|k.weight is q.weight too")


def test_a_projection_called_twice_stays():
    def scores(m, q, k, v):
        k = m.heads(m.q(v.transpose(1, 2).reshape(2, 5, 8)))
        return (m.heads(q) @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v

    unchanged(FoldAttentionScale(), Attention(scores), X, "read elsewhere too")


def test_weights_that_would_leave_their_type_s_range_stay():
    def scores(m, q, k, v):
        return ((m.heads(q) @ k.transpose(-2, -1)) * 1e6).softmax(-1) @ v

    model = Attention(scores).half()
    unchanged(FoldAttentionScale(), model, (X[0].half(),), "leaves the range of torch.float16")


def test_weights_without_values_stay():
    model = Attention(of_the_scores)
    gm = trace(model, X, "function")
    gm.q.weight = nn.Parameter(torch.empty(8, 8, device="meta"))
    assert any("meta device" in m.reason for m in FoldAttentionScale().misses(gm))
    FoldAttentionScale()(gm)
    assert not history(gm)[-1].rewrites


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = Attention(of_the_scores).to(dtype)
    rewrites(FoldAttentionScale(), model, (X[0].to(dtype),), None, count=1, rtol=2e-2, atol=2e-2)


def whisper():
    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99, max_source_positions=16, num_mel_bins=8,
        use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.randint(3, 99, (2, 4))}
    return WhisperForConditionalGeneration(config), inputs


# One scale in each attention. GPT-2 has one addmm for query, key and value, and what splits it is read by all three;
# T5 does not scale; Whisper scales its queries: 2 in the encoder, 2 × 2 in the decoder.
@pytest.mark.parametrize(
    ("make", "count"), [(eager.bert, 2), (eager.llama, 2), (eager.vit, 2), (eager.gpt2, 0), (eager.t5, 0), (whisper, 6)]
)
def test_in_models(make, count):
    gm, inputs = eager.captured(make)
    code = gm.code
    with torch.no_grad():
        expected = gm(**inputs)
        FoldAttentionScale()(gm)
        assert len(history(gm)[-1].rewrites) == count
        found = gm(**inputs)
    for a, b in zip(_leaves(expected), _leaves(found), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    if make is eager.gpt2:
        assert sum("reads" in m.reason for m in FoldAttentionScale().misses(gm)) == 2
    FoldAttentionScale().reverse(gm)
    assert gm.code == code


def _leaves(value):
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]


@settings(max_examples=30)
@given(
    st.floats(-8, 8).filter(lambda s: abs(s) > 1e-3),
    st.sampled_from([after_the_projection, of_the_scores, rotated]),
    st.sampled_from(["module", "function", "aten"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_scale_computes_the_same(scale, scores, dialect, bias, seed):
    torch.manual_seed(seed)
    model = Attention(scores, bias).double().eval()
    x = (torch.randn(2, 5, 8, dtype=torch.float64),)
    gm = trace(model, x, dialect)
    for node in gm.graph.nodes:
        node.args = tuple(scale if isinstance(a, float) and a == 0.3 else a for a in node.args)
    gm.recompile()
    expected, code = gm(*x), gm.code
    FoldAttentionScale()(gm)
    assert len(history(gm)[-1].rewrites) == (scale != 1)  # which scales nothing
    torch.testing.assert_close(gm(*x), expected, rtol=1e-9, atol=1e-12)
    FoldAttentionScale().reverse(gm)
    assert gm.code == code and torch.equal(gm(*x), expected)
