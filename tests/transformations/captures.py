"""Two-layer models from configs with random weights, captured whole by torch.export with dynamic sizes."""

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
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from fxopt.capture import capture


def bert():
    config = BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    ids = torch.randint(0, 99, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return BertModel(config), {"input_ids": ids, "attention_mask": mask}


def gpt2():
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=99, use_cache=False, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 99, (2, 8))}


def resnet():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return ResNetForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


_DECODER = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "vocab_size": 99,
    "use_cache": False,
}


def llama(dtype=torch.float32):
    return LlamaForCausalLM(LlamaConfig(**_DECODER)).to(dtype), {"input_ids": torch.randint(0, 99, (2, 8))}


def llama_bfloat16():
    return llama(torch.bfloat16)


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**_DECODER)), {"input_ids": torch.randint(0, 99, (2, 8))}


def t5():
    config = T5Config(num_layers=2, d_model=32, d_kv=16, d_ff=64, num_heads=2, vocab_size=99, use_cache=False)
    ids = {"input_ids": torch.randint(0, 99, (2, 8)), "decoder_input_ids": torch.randint(0, 99, (2, 6))}
    return T5ForConditionalGeneration(config), ids


MODELS = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "llama_bfloat16": llama_bfloat16,
    "qwen3": qwen3,
    "resnet": resnet,
    "t5": t5,
}


@functools.cache
def _captured(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    return capture(model, inputs), inputs


def captured(name):
    """A fresh copy of the graph module of ``name``, and inputs for it."""
    from fxopt.transformation import clone

    gm, inputs = _captured(name)
    return clone(gm), inputs


def applies(transformation, name, count, exact=True):
    """Assert that ``transformation`` makes ``count`` rewrites in ``name``, changes no number, and is undone exactly."""
    from fxopt.history import history

    gm, inputs = captured(name)
    code = gm.code
    with torch.no_grad():
        before = leaves(gm(**inputs))
        transformation(gm)
        after = leaves(gm(**inputs))
        assert len(history(gm)[-1].rewrites) == count, history(gm)[-1].rewrites
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        done = transformation(gm).code
        assert not history(gm)[-1].rewrites, "a second time, there is nothing left to do"
        assert gm.code == done
        history(gm).checkout(0)
        assert gm.code == code
        assert all(map(torch.equal, before, leaves(gm(**inputs))))
    return transformation(gm)


def leaves(value):
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]


transformers.logging.set_verbosity_error()
