"""The built-in models: built by name without a network, the same for the same seed; loading by any name."""

import socket

import pytest
import torch
from torch import nn

import fxopt
from fxopt import models
from fxopt.errors import UsageError
from fxopt.inputs import example_inputs, longest_sequence

TINY = [name for name in models.names() if name.endswith("-tiny") and name != "whisper-tiny"]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_every_name_has_a_tiny_twin():
    full = [name for name in models.names() if name not in TINY]
    assert [name + "-tiny" for name in full] == TINY


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_runs_in_eval_mode_on_its_example_inputs(name):
    model = models.build(name)
    assert not any(module.training for module in model.modules())
    for batch_size, length in ((1, 1), (3, 7)):
        inputs = example_inputs(model, batch_size, length)
        with torch.no_grad():
            output = model(**inputs)
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        assert tensor.shape[0] == batch_size
        assert torch.isfinite(tensor).all()


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_random_state():
    before = torch.get_rng_state()
    one, again, other = models.build("resnet18-tiny"), models.build("resnet18-tiny"), models.build("resnet18-tiny", 1)
    assert torch.equal(torch.get_rng_state(), before)
    states = zip(one.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_norm_statistics_are_random():
    norms = [m for m in models.build("resnet18-tiny").modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.running_mean.abs().min() > 0
        assert norm.weight.std() > 0
        assert norm.running_var.min() > 0.4


def test_descriptions_count_parameters_without_allocating_them():
    by_name = {d.name: d for d in models.describe()}
    assert tuple(by_name) == models.names()
    assert by_name["bert-base"].parameters == 109_482_240
    tiny = models.build("gpt2-tiny")
    assert by_name["gpt2-tiny"].parameters == sum(p.numel() for p in tiny.parameters())


@pytest.mark.parametrize(
    ("hub", "built_in"),
    [
        ("bert-base-uncased", "bert-base"),
        ("google-bert/bert-large-uncased", "bert-base"),
        ("distilbert-base-uncased", "distilbert-base"),
        ("openai-community/gpt2-xl", "gpt2"),
        ("Qwen/Qwen3-0.6B", "qwen3-small"),
        ("microsoft/resnet-50", "resnet50"),
        ("some/unheard-of", None),
    ],
)
def test_equivalents_of_hub_names(hub, built_in):
    assert models.equivalent(hub) == built_in


def test_an_unknown_built_in_name_lists_the_known_ones():
    with pytest.raises(UsageError, match="bert-base"):
        models.build("bort")


def test_a_hub_name_without_a_network_is_refused_in_one_line(no_network):
    with pytest.raises(UsageError, match="network") as caught:
        models.load("bert-base-uncased")
    assert "'bert-base'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_name_under_offline_mode_asks_no_network(no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(models, "_reachable", lambda endpoint: pytest.fail("asked the network"))
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        models.load("google-bert/bert-base-uncased")


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "two words"])
def test_what_can_be_no_name_is_refused_at_once(name, no_network):
    with pytest.raises(UsageError):
        models.load(name)


@pytest.mark.parametrize("name", ["bert-base-tiny", "gpt2-tiny", "resnet18-tiny"])
def test_a_local_folder_is_loaded_by_its_own_architecture(name, tmp_path):
    saved = models.build(name)
    saved.save_pretrained(tmp_path)
    loaded = models.load(tmp_path)
    assert type(loaded) is type(saved)
    assert not loaded.training
    states = zip(saved.state_dict().items(), loaded.state_dict().items(), strict=True)
    assert all(a == c and torch.equal(b, d) for (a, b), (c, d) in states)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        models.load(tmp_path)


def test_load_converts_to_the_dtype_asked_for():
    assert models.load("mlp-tiny", dtype=torch.float64).head.weight.dtype == torch.float64


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, tokens):
        return self.table(tokens)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Linear(5, 3), nn.ReLU()), (2, 5)),
        (nn.Sequential(nn.Conv1d(3, 4, 3)), (2, 3, 64)),
        (Embedder(), (2, 16)),
    ],
)
def test_example_inputs_of_a_plain_module_fit_its_first_layer(module, shape):
    (value,) = example_inputs(module).values()
    assert value.shape == shape
    module(value)


def test_example_inputs_that_cannot_be_made_up_are_asked_for():
    with pytest.raises(UsageError, match="example_inputs"):
        example_inputs(nn.Bilinear(2, 3, 4))
    with pytest.raises(UsageError, match="example_inputs"):
        example_inputs(nn.ReLU())


def test_example_inputs_keep_masks_and_padding_consistent():
    model = models.build("bert-base-tiny")
    inputs = example_inputs(model, 4, 9)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert mask[0].all() and not mask.all() and mask.any(dim=1).all()
    assert torch.equal(ids == model.config.pad_token_id, mask == 0)
    again = example_inputs(model, 4, 9)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)


def test_text_goes_through_the_tokenizer_of_a_folder(tmp_path):
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "pass", "is", "commit"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    model = models.build("bert-base-tiny")
    inputs = example_inputs(model, 2, 8, text=["a pass is a commit", "a pass"], tokenizer=str(tmp_path))
    assert inputs["input_ids"].shape == (2, 7)
    assert inputs["attention_mask"].sum(1).tolist() == [7, 4]
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    with pytest.raises(UsageError, match="tokenizer"):
        example_inputs(model, text="a pass")
    with pytest.raises(UsageError, match="no tokenizer"):
        example_inputs(model, tokenizer=str(tmp_path / "nowhere"))


# the positions in each tiny config; RoBERTa's first two rows are before the first token
LONGEST = {"bert-base-tiny": 64, "gpt2-tiny": 64, "opt-125m-tiny": 64, "whisper-tiny-tiny": 64, "roberta-base-tiny": 62}


@pytest.mark.parametrize("name", LONGEST)
def test_the_longest_sequence_is_the_longest_that_runs(name):
    model, longest = models.build(name), LONGEST[name]
    inputs = example_inputs(model, 1, longest)
    with torch.no_grad():
        model(**inputs)
    tokens = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    longer = {n: torch.cat([v, v[:, :1]], 1) if v.dim() == 2 else v for n, v in inputs.items()}
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
        model(**longer)
    assert inputs[tokens].shape == (1, longest)
    with pytest.raises(UsageError, match=f"sequence_length {longest + 1} is more than the {longest} positions"):
        example_inputs(model, 1, longest + 1)


@pytest.mark.parametrize("name", ("t5-small-tiny", "llama-small-tiny", "vit-base-tiny", "mlp-tiny"))
def test_relative_positions_have_no_limit(name):
    assert longest_sequence(models.build(name)) is None


def test_a_short_model_is_optimised_without_a_word_of_lengths():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    assert example_inputs(model)["input_ids"].shape == (2, 8)
    assert [*fxopt.optimize(model, None).fxopt.graphs] == ["forward", "prefill", "decode"]
