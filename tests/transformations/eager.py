"""Two-layer models from configs with random weights, with the attention written out: softmax between two products."""

import functools

import torch
import transformers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from fxopt.capture import capture
from fxopt.transformation import clone

_WRITTEN_OUT = {"attn_implementation": "eager"}
_SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
_TEXT = {"vocab_size": 99, "use_cache": False, **_WRITTEN_OUT}


def _ids(*sizes):
    return torch.randint(3, 99, sizes)


def bert():
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    config = BertConfig(vocab_size=99, **_SMALL, **_WRITTEN_OUT)
    return BertModel(config), {"input_ids": _ids(2, 8), "attention_mask": mask}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, **_TEXT)), {"input_ids": _ids(2, 8)}


def llama():
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **_SMALL, **_TEXT)), {"input_ids": _ids(2, 8)}


def qwen3():
    config = Qwen3Config(num_key_value_heads=1, head_dim=16, **_SMALL, **_TEXT)
    return Qwen3ForCausalLM(config), {"input_ids": _ids(2, 8)}


def t5():
    config = T5Config(num_layers=2, d_model=32, d_kv=16, d_ff=64, num_heads=2, **_TEXT)
    return T5ForConditionalGeneration(config), {"input_ids": _ids(2, 8), "decoder_input_ids": _ids(2, 6)}


def vit():
    config = ViTConfig(image_size=16, patch_size=8, **_SMALL, **_WRITTEN_OUT)
    return ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


@functools.cache
def _captured(make):
    torch.manual_seed(0)
    model, inputs = make()
    return capture(model.eval(), inputs), inputs


def captured(make):
    """A fresh copy of the graph module of the model that ``make`` makes, and inputs for it."""
    gm, inputs = _captured(make)
    return clone(gm), inputs


transformers.logging.set_verbosity_error()
