"""Optimised models are still themselves: the same class, the same tokens, the same files; fallbacks are counted."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

import fxopt
from fxopt import models
from fxopt.errors import CaptureError, UsageError, VerificationError
from fxopt.history import history
from fxopt.huggingface import dynamo_backend, optimize
from fxopt.inputs import example_inputs
from fxopt.reuse import reused, reusing

# One worker, so that no model is captured by both.
pytestmark = pytest.mark.xdist_group("huggingface")

GENERATIVE = (
    "gpt2-tiny",
    "opt-125m-tiny",
    "llama-small-tiny",
    "qwen3-small-tiny",
    "t5-small-tiny",
    "whisper-tiny-tiny",
)
OTHERS = ("bert-base-tiny", "vit-base-tiny", "resnet18-tiny")


@pytest.fixture(scope="module")
def optimized():
    """An optimised model by name, made once."""
    made = {}

    def get(name):
        if name not in made:
            model = models.build(name)
            made[name] = model, optimize(model, pipeline=None)
        state = made[name][1].fxopt
        state.calls.clear()
        state.fallbacks.clear()
        return made[name]

    return get


def prompt(model, batch_size, length):
    inputs = example_inputs(model, batch_size, length, seed=length)
    inputs.pop("decoder_input_ids", None)
    if model.config.is_encoder_decoder:
        return inputs
    return {name: value.flip(1) for name, value in inputs.items()}


# OPT is built as GPT-2 is, and Qwen3 as Llama.
LIKE_OTHERS = ("opt-125m-tiny", "qwen3-small-tiny")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LIKE_OTHERS else n for n in GENERATIVE]
)
def test_generate_gives_the_same_tokens_without_falling_back(name, optimized):
    model, result = optimized(name)
    assert type(result) is type(model)
    assert result.fxopt.notes == ()
    for batch_size, length, options in ((3, 10, {}), (1, 6, {}), (4, 8, {"num_beams": 3}), (2, 5, {"num_beams": 2})):
        inputs = prompt(model, batch_size, length)
        options = {"max_new_tokens": 9, "do_sample": False, **options}
        expected = model.generate(**inputs, **options)
        assert torch.equal(expected, result.generate(**inputs, **options))
    calls = result.fxopt.calls
    assert not result.fxopt.fallbacks
    assert calls["prefill"] == 4 and calls["decode"] >= 4 * 7
    assert calls["encoder"] == (4 if model.config.is_encoder_decoder else 0)


@pytest.mark.parametrize("name", [*OTHERS, "gpt2-tiny", "t5-small-tiny"])
def test_forward_gives_the_same_output_of_the_same_class(name, optimized):
    model, result = optimized(name)
    for batch_size in (1, 2, 5):
        inputs = example_inputs(model, batch_size, 7)
        with torch.no_grad():
            expected, actual = model(**inputs), result(**inputs)
        assert type(expected) is type(actual) and expected.keys() == actual.keys()
        assert torch.equal(expected[0], actual[0])
    assert result.fxopt.calls == {"forward": 3} and not result.fxopt.fallbacks


def test_the_given_model_is_not_touched_and_parameters_are_shared():
    model = models.build("bert-base-tiny")
    before = {path: sorted(vars(module)) for path, module in model.named_modules()}
    result = optimize(model, pipeline=None)
    assert {path: sorted(vars(module)) for path, module in model.named_modules()} == before
    assert result is not model and "fxopt" not in vars(model)
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in result.parameters())
    assert all(id(p) in own for gm in result.fxopt.graphs.values() for p in gm.parameters())
    assert list(result.state_dict()) == list(model.state_dict())


def test_missing_masks_attend_to_everything(optimized):
    model, result = optimized("bert-base-tiny")
    tokens = example_inputs(model, 2, 7)["input_ids"]
    with torch.no_grad():
        expected, actual = model(tokens), result(tokens)
    assert torch.allclose(expected.last_hidden_state, actual.last_hidden_state, atol=1e-6)
    model, result = optimized("gpt2-tiny")
    with torch.no_grad():
        expected, actual = model(input_ids=tokens, return_dict=True), result(input_ids=tokens, return_dict=True)
        step = torch.tensor([[3], [4]])
        more = (
            model(step, past_key_values=expected.past_key_values),
            result(step, past_key_values=actual.past_key_values),
        )
    assert torch.allclose(expected.logits, actual.logits, atol=1e-5)
    assert torch.allclose(more[0].logits, more[1].logits, atol=1e-5)
    assert result.fxopt.calls == {"forward": 1}
    assert result.fxopt.fallbacks == {"GPT2LMHeadModel: decode: it needs position_ids": 1}


def test_a_given_cache_is_written_into(optimized):
    from transformers import DynamicCache

    model, result = optimized("llama-small-tiny")
    inputs = example_inputs(model, 2, 6)
    caches = [DynamicCache(config=m.config) for m in (model, result)]
    positions = torch.arange(6)[None].expand(2, 6)
    with torch.no_grad():
        outputs = [
            m(**inputs, position_ids=positions, past_key_values=cache, logits_to_keep=1)
            for m, cache in zip((model, result), caches, strict=True)
        ]
    assert result.fxopt.calls == {"prefill": 1}
    assert outputs[1].past_key_values is caches[1]
    assert caches[1].get_seq_length() == 6
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(caches[0].layers, caches[1].layers, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.train(), "training mode"),
        (lambda m: m.to(torch.float64), "converted"),
        (lambda m: setattr(m, "pooler", copy.deepcopy(m.pooler)), "submodule was replaced"),
        (lambda m: setattr(m.pooler.dense, "weight", nn.Parameter(m.pooler.dense.weight.detach() * 2)), "replaced"),
        (lambda m: m.encoder.register_forward_hook(lambda *_: None), "hooks"),
        (lambda m: setattr(m.fxopt, "enabled", False), "switched off"),
    ],
)
def test_a_changed_model_runs_its_own_code(change, reason, optimized):
    model, result = optimized("bert-base-tiny")
    result = copy.deepcopy(result)
    inputs = example_inputs(model)
    change(result)
    with torch.no_grad():
        result(**inputs)
    ((said, count),) = result.fxopt.fallbacks.items()
    assert reason in said and count == 1 and not result.fxopt.calls
    assert reason in str(result.fxopt)


def test_a_changed_model_can_be_optimised_again():
    model = models.build("mlp-tiny")
    result = optimize(model, pipeline=None).double()
    x = torch.randn(2, 16, dtype=torch.float64)
    expected = model.double()(x)
    assert torch.equal(expected, result(x))
    again = optimize(result, pipeline=None)
    assert torch.equal(expected, again(x))
    assert result.fxopt.fallbacks and again.fxopt.calls == {"forward": 1} and not again.fxopt.fallbacks


def copies_the_head(gm):
    """A pass that leaves a copy of a weight in the graph, as merging and folding do."""
    node = next(n for n in gm.graph.nodes if n.op == "get_attr" and n.target.endswith("pooler.dense.weight"))
    gm.register_parameter("copied", nn.Parameter(gm.get_parameter(node.target).detach().clone()))
    node.target = "copied"
    gm.delete_all_unused_submodules()
    gm.recompile()
    del gm.pooler.dense.weight
    return gm


def test_an_edit_of_a_weight_that_a_graph_copied_is_noticed():
    model = models.build("bert-base-tiny")
    result = optimize(model, pipeline=copies_the_head)
    inputs = example_inputs(model)
    twin = copy.deepcopy(result)
    with torch.no_grad():
        result(**inputs)
        assert result.fxopt.calls == {"forward": 1}
        model.pooler.dense.weight.mul_(2)
        assert torch.equal(model(**inputs).pooler_output, result(**inputs).pooler_output)
        twin(**inputs)
    assert any("edited in place" in reason for reason in result.fxopt.fallbacks)
    assert twin.fxopt.calls == {"forward": 1} and not twin.fxopt.fallbacks


def test_an_edit_of_a_shared_weight_reaches_the_graph(optimized):
    model = models.build("bert-base-tiny")
    result = optimize(model, pipeline=None)
    inputs = example_inputs(model)
    with torch.no_grad():
        model.pooler.dense.weight.mul_(2)
        assert torch.equal(model(**inputs).pooler_output, result(**inputs).pooler_output)
    assert result.fxopt.calls == {"forward": 1}


def test_other_inputs_fall_back_and_say_why(optimized):
    model, result = optimized("bert-base-tiny")
    inputs = example_inputs(model, 2, 7)
    embedded = {"inputs_embeds": torch.randn(2, 7, 32, requires_grad=True), "attention_mask": inputs["attention_mask"]}
    result(**embedded)[0].sum().backward()
    assert embedded["inputs_embeds"].grad is not None
    with torch.no_grad():
        hidden = result(**inputs, output_hidden_states=True).hidden_states
        result(**{name: value.int() for name, value in inputs.items()})
        result(**inputs)
    assert len(hidden) == 3
    reasons = " | ".join(result.fxopt.fallbacks)
    assert "gradients" in reasons and "output_hidden_states" in reasons and "int32" in reasons
    assert result.fxopt.calls == {"forward": 1}


def test_a_copy_is_a_model_of_its_own(optimized):
    model, result = optimized("llama-small-tiny")
    twin = copy.deepcopy(result)
    inputs = prompt(model, 2, 6)
    expected = model.generate(**inputs, max_new_tokens=5)
    assert torch.equal(expected, twin.generate(**inputs, max_new_tokens=5))
    assert twin.fxopt.calls["decode"] == 4 and not twin.fxopt.fallbacks and not result.fxopt.calls
    with torch.no_grad():
        twin.lm_head.weight.zero_()
        assert not twin(**inputs).logits.any()
    assert torch.equal(expected, result.generate(**inputs, max_new_tokens=5))


def test_it_saves_what_the_model_saves(optimized, tmp_path):
    model, result = optimized("gpt2-tiny")
    model.save_pretrained(tmp_path / "model")
    result.save_pretrained(tmp_path / "result")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "result" / name).read_bytes()


def test_it_works_in_a_pipeline(optimized, tmp_path):
    from transformers import BertTokenizerFast, pipeline

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "pass", "is", "commit"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    model, result = optimized("bert-base-tiny")
    text = ["a pass is a commit", "a pass"]
    expected, actual = (
        pipeline("feature-extraction", model=m, tokenizer=tokenizer, batch_size=2, return_tensors=True)(text)
        for m in (model, result)
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert result.fxopt.calls["forward"] >= 1 and not result.fxopt.fallbacks


def test_names_and_passes_may_be_given_by_name():
    result = optimize("mlp-tiny", pipeline=None, dtype=torch.float64)
    assert result.head.weight.dtype == torch.float64
    assert result(torch.randn(3, 16, dtype=torch.float64)).shape == (3, 10)
    assert result.fxopt.calls == {"forward": 1}
    with pytest.raises(UsageError, match=r"network|HF_HUB_OFFLINE"):
        optimize("bert-base-uncased")


def test_conversion_leaves_the_given_model():
    model = models.build("mlp-tiny")
    result = optimize(model, pipeline=None, dtype=torch.float64)
    assert model.head.weight.dtype == torch.float32 and result.head.weight.dtype == torch.float64


def negates(gm):
    """A pass that is wrong."""
    node = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.relu.default)
    node.target = torch.ops.aten.neg.default
    gm.recompile()
    return gm


def test_a_pass_that_changes_the_numbers_is_refused():
    with pytest.raises(VerificationError, match="forward of MLP"):
        optimize("mlp-tiny", pipeline=negates)


class Opaque(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_gradients_that_a_graph_cuts_are_told():
    result = optimize("mlp-tiny", None)
    inputs = example_inputs(result)
    with torch.no_grad():
        result(**inputs)
    assert "gradients" not in str(result.fxopt)
    assert not result(**inputs).requires_grad
    assert "gave no gradients 1 times, though they were on" in str(result.fxopt)
    result.fxopt.enabled = False
    assert result(**inputs).requires_grad
    assert result.fxopt.cut == 1


def test_what_cannot_be_optimised_is_refused():
    with pytest.raises(CaptureError, match="no graph"):
        optimize(Opaque(), pipeline=None, example_inputs=(torch.randn(2),))
    with pytest.raises(UsageError, match="graph module"):
        optimize(symbolic_trace(nn.ReLU()))
    with pytest.raises(UsageError, match="example_inputs is a list: give a tuple"):
        optimize(nn.ReLU(), example_inputs=[torch.randn(2)])
    with pytest.raises(UsageError, match="pipeline"):
        optimize("mlp-tiny", pipeline=3)


@pytest.mark.parametrize("name", ["bert-base-tiny", "llama-small-tiny"])
def test_torch_compile_with_the_backend_gives_the_same_numbers_and_gradients(name):
    torch.manual_seed(0)
    model = models.build(name)
    compiled = torch.compile(model, backend=dynamo_backend)
    inputs = example_inputs(model, 2, 7)
    with torch.no_grad():
        assert torch.allclose(model(**inputs)[0], compiled(**inputs)[0], atol=1e-5)
    compiled(**inputs)[0].square().sum().backward()
    actual = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**inputs)[0].square().sum().backward()
    expected = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == actual.keys()
    for key, gradient in expected.items():
        assert torch.allclose(gradient, actual[key], rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-6), key


def edit_tied(model):
    model.lm_head.weight.mul_(2)


def edit_data(model):
    model.lm_head.weight.data.mul_(2)


def replace_data(model):
    model.lm_head.weight.data = model.lm_head.weight.data * 2


def load_other(model):
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})


@pytest.fixture(scope="module")
def folded():
    """A GPT-2 whose head was folded into, though the embedding that it is tied to is read as it is."""
    result = optimize(models.build("gpt2-tiny"), generation=False)
    folding = [e for e in history(result.fxopt.graphs["forward"]) if e.signature.startswith("FoldLayerNormAffine")]
    assert folding[0].rewrites
    return result


@pytest.mark.parametrize("edit", [edit_tied, edit_data, replace_data, load_other])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
def test_whatever_way_a_copied_weight_is_edited_the_model_computes_with_the_edit(folded, edit, copied):
    result, expected, tokens = copied(folded), models.build("gpt2-tiny"), torch.arange(18).view(2, 9)
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        assert torch.allclose(result(tokens, attention_mask=mask).logits, expected(tokens).logits, atol=1e-5)
        assert sum(result.fxopt.calls.values()) == 1 and not result.fxopt.fallbacks
        edit(result)
        edit(expected)
        assert torch.equal(result(tokens, attention_mask=mask).logits, expected(tokens).logits)
    assert any("edited in place" in reason for reason in result.fxopt.fallbacks)
    twin = copied(result)  # what is out of date stays so
    assert torch.equal(twin(tokens, attention_mask=mask).logits, expected(tokens).logits)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
def test_a_pickled_model_still_generates_on_its_graphs(optimized):
    model, result = optimized("gpt2-tiny")
    twin, inputs = pickle.loads(pickle.dumps(result)), prompt(model, 2, 5)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), twin.generate(**inputs, **options))
    assert twin.fxopt.calls["decode"] and not twin.fxopt.fallbacks


def test_half_precision_is_judged_by_its_own_rounding():
    model = models.build("gpt2-tiny").to(torch.bfloat16)
    assert set(optimize(model).fxopt.graphs) == {"forward", "prefill", "decode"}


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.layer(x) * self.calls


def test_a_model_that_writes_to_its_buffers_is_left_as_it_was_and_goes_on_so():
    model, x = Counts().eval(), torch.randn(2, 4)
    result = optimize(model, example_inputs=(x,))
    assert model.calls == 0
    with torch.no_grad():
        once, twice = result(x), result(x)
    assert model.calls == 2 and torch.allclose(once * 2, twice)


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_a_model_that_decides_on_its_data_is_optimised_in_parts():
    model, x = Decides().eval(), torch.rand(2, 4)
    result = optimize(model, example_inputs=(x,))
    with torch.no_grad():
        assert torch.allclose(result(x), model(x)) and torch.allclose(result(-x), model(-x))
    assert result.fxopt.calls


def test_graphs_of_one_model_hold_what_they_merge_once() -> None:
    """Forward, prefill and decode make equal weights, and share them; each is undone alone all the same."""
    model = models.build("llama-small-tiny")
    result = optimize(model, pipeline="MergeLinears,FoldLayerNormAffine,MergeGateUp")
    graphs = result.fxopt.graphs
    assert set(graphs) >= {"forward", "prefill", "decode"}
    own = {id(t) for t in result.parameters()}
    made = [{name: t for name, t in gm.named_parameters() if id(t) not in own} for gm in graphs.values()]
    assert made[0] and all(gm.keys() == made[0].keys() for gm in made)
    assert all(gm[name] is made[0][name] for gm in made for name in gm)
    assert len({id(t) for t in made[0].values()}) == len(made[0])

    inputs = prompt(model, 2, 7)
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    for commit in reversed(list(fxopt.history(graphs["decode"]))):
        commit.reverse()
    assert {id(t) for t in graphs["decode"].parameters()} <= own
    assert torch.equal(result.generate(**inputs, max_new_tokens=5, do_sample=False), expected)
    assert not result.fxopt.fallbacks


def test_equal_tensors_are_shared_between_graphs_alone() -> None:
    first, second = (torch.fx.symbolic_trace(nn.Linear(2, 2)) for _ in range(2))
    a, b, c, d = (torch.zeros(3) for _ in range(4))
    assert reused(first, a) is a and reused(first, b) is b  # outside of `reusing`
    with reusing():
        first.register_buffer("a", reused(first, a))
        assert reused(first, b) is b  # another one of the same graph
        assert reused(second, c) is a and reused(second, -c) is not a and reused(second, c.half()).dtype == torch.half
        a.add_(1)
        assert reused(second, d) is b and reused(second, a) is a
