"""The built-in models (configs with random weights, so that nothing is downloaded), and loading a model by any name.

`build("bert-base")` makes a full-size model, `build("bert-base-tiny")` the same architecture with two layers of
width 32. `load` also takes a local folder or a hub name.
"""

from __future__ import annotations

import itertools
import json
import math
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import UsageError

TINY = "-tiny"
HUB_TIMEOUT_SECONDS = 3.0


class MLP(nn.Module):
    """Alternating linear layers and activations: (batch, features) float -> (batch, classes) float."""

    def __init__(self, features: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.features = features
        sizes = [features] + [width] * depth
        blocks = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(x))
        return logits

    def example_inputs(self, batch_size: int, sequence_length: int) -> dict[str, Tensor]:
        """Random rows; there is no sequence."""
        return {"x": torch.randn(batch_size, self.features)}


class GraphLayer(nn.Module):
    """One round of message passing: h' = norm(h + relu(W h + V D⁻¹ A h)), with D the degrees of A."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own = nn.Linear(width, width)
        self.message = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, h: Tensor, adjacency: Tensor) -> Tensor:
        degree = adjacency.sum(-1, keepdim=True).clamp(min=1.0)
        messages = torch.matmul(adjacency, self.message(h)) / degree
        normalised: Tensor = self.norm(h + torch.relu(self.own(h) + messages))
        return normalised


class GraphNetwork(nn.Module):
    """A dense graph network in the manner of GraphSAGE with mean aggregation (Hamilton et al., 2017).

    `x` (batch, nodes, features) float and `adjacency` (batch, nodes, nodes) float give (batch, classes) float.
    """

    def __init__(self, features: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.embed = nn.Linear(features, width)
        self.layers = nn.ModuleList([GraphLayer(width) for _ in range(depth)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h, adjacency)
        logits: Tensor = self.head(h.mean(dim=1))
        return logits

    def example_inputs(self, batch_size: int, sequence_length: int) -> dict[str, Tensor]:
        """Random graphs of `sequence_length` nodes, with a symmetric adjacency of about one edge in four."""
        upper = torch.rand(batch_size, sequence_length, sequence_length).triu(1) > 0.75
        adjacency = (upper | upper.transpose(1, 2)).float()
        return {"x": torch.randn(batch_size, sequence_length, self.features), "adjacency": adjacency}


@dataclass(frozen=True)
class BuiltIn:
    """One line of the table: how to make a model, at full size and very small."""

    family: str
    architecture: str
    task: str
    full: Mapping[str, Any]
    tiny: Mapping[str, Any]
    hub: tuple[str, ...] = ()
    config: str | None = None
    plain: Callable[..., nn.Module] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Description:
    """A built-in model in words and numbers; `parameters` counts elements, tied weights once."""

    name: str
    family: str
    architecture: str
    task: str
    parameters: int
    hub: tuple[str, ...]

    @property
    def summary(self) -> str:
        """What it is, in a few words."""
        return f"{self.task} ({self.architecture})"


def _options(**values: Any) -> Mapping[str, Any]:
    return MappingProxyType(values)


_ENCODER = _options(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
    initializer_range=0.2,
)
_DECODER = _options(**_ENCODER, num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=0)
_SMALL_DECODER = _options(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_TINY_RESNET = _options(embedding_size=8, hidden_sizes=[8, 16, 32, 32], depths=[1, 1, 1, 1], num_labels=10)

# fmt: off
_TABLE: Mapping[str, BuiltIn] = MappingProxyType(
    {
        "bert-base": BuiltIn(
            "bert", "BertModel", "text encoder", _options(), _ENCODER,
            ("bert-base-uncased", "bert-base-cased", "google-bert/bert-base-uncased", "google-bert/bert-base-cased"),
            "BertConfig",
        ),
        "distilbert-base": BuiltIn(
            "distilbert", "DistilBertModel", "text encoder", _options(),
            _options(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64,
                     initializer_range=0.2),
            ("distilbert-base-uncased", "distilbert-base-cased", "distilbert/distilbert-base-uncased"),
            "DistilBertConfig",
        ),
        "roberta-base": BuiltIn(
            "roberta", "RobertaModel", "text encoder",
            _options(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
            _ENCODER, ("roberta-base", "FacebookAI/roberta-base"), "RobertaConfig",
        ),
        "gpt2": BuiltIn(
            "gpt2", "GPT2LMHeadModel", "text generation", _options(pad_token_id=50256),
            _options(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
                     pad_token_id=0, initializer_range=0.2),
            ("gpt2", "openai-community/gpt2"), "GPT2Config",
        ),
        "opt-125m": BuiltIn(
            "opt", "OPTForCausalLM", "text generation", _options(),
            _options(vocab_size=99, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2,
                     num_attention_heads=4, ffn_dim=64, max_position_embeddings=64, init_std=0.2),
            ("facebook/opt-125m",), "OPTConfig",
        ),
        "llama-small": BuiltIn(
            "llama", "LlamaForCausalLM", "text generation", _SMALL_DECODER, _DECODER,
            ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.2-1B", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
            "LlamaConfig",
        ),
        "qwen3-small": BuiltIn(
            "qwen3", "Qwen3ForCausalLM", "text generation", _SMALL_DECODER, _DECODER,
            ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B"), "Qwen3Config",
        ),
        "t5-small": BuiltIn(
            "t5", "T5ForConditionalGeneration", "text to text", _options(decoder_start_token_id=0),
            _options(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
                     decoder_start_token_id=0),
            ("t5-small", "google-t5/t5-small"), "T5Config",
        ),
        "vit-base": BuiltIn(
            "vit", "ViTForImageClassification", "image classification", _options(num_labels=1000),
            _options(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32,
                     patch_size=8, num_labels=10, initializer_range=0.2),
            ("google/vit-base-patch16-224",), "ViTConfig",
        ),
        "resnet18": BuiltIn(
            "resnet", "ResNetForImageClassification", "image classification",
            _options(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], num_labels=1000),
            _options(**_TINY_RESNET, layer_type="basic"), ("microsoft/resnet-18",), "ResNetConfig",
        ),
        "resnet50": BuiltIn(
            "resnet", "ResNetForImageClassification", "image classification",
            _options(layer_type="bottleneck", depths=[3, 4, 6, 3], hidden_sizes=[256, 512, 1024, 2048],
                     num_labels=1000),
            _options(**_TINY_RESNET, layer_type="bottleneck"), ("microsoft/resnet-50",), "ResNetConfig",
        ),
        "whisper-tiny": BuiltIn(
            "whisper", "WhisperForConditionalGeneration", "speech to text", _options(),
            _options(vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                     decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16,
                     max_source_positions=32, max_target_positions=64, decoder_start_token_id=1, bos_token_id=1,
                     eos_token_id=2, pad_token_id=0, init_std=0.2),
            ("openai/whisper-tiny",), "WhisperConfig",
        ),
        "mixtral": BuiltIn(
            "mixtral", "MixtralForCausalLM", "text generation",
            _options(**_SMALL_DECODER, num_local_experts=8, num_experts_per_tok=2),
            _options(**_DECODER, num_local_experts=4, num_experts_per_tok=2),
            ("mistralai/Mixtral-8x7B-v0.1",), "MixtralConfig",
        ),
        "mlp": BuiltIn(
            "mlp", "MLP", "classification", _options(features=512, width=1024, depth=6, classes=10),
            _options(features=16, width=32, depth=2, classes=10), plain=MLP,
        ),
        "gnn": BuiltIn(
            "gnn", "GraphNetwork", "graph classification", _options(features=64, width=256, depth=4, classes=10),
            _options(features=8, width=32, depth=2, classes=10), plain=GraphNetwork,
        ),
    }
)
# fmt: on


def names() -> tuple[str, ...]:
    """All built-in names: the full-size ones first, then the very small ones (`NAME-tiny`)."""
    return (*_TABLE, *(name + TINY for name in _TABLE))


def equivalent(hub_name: str) -> str | None:
    """The built-in model of the same architecture as a hub model, or None: `bert-base-uncased` -> `bert-base`.

    A name that the table does not list is judged by the family that it starts with (`bert-large-uncased`).
    """
    for name, entry in _TABLE.items():
        if hub_name == name or hub_name in entry.hub:
            return name
    stem = hub_name.rsplit("/", 1)[-1].lower()
    families = sorted(_TABLE.items(), key=lambda item: -len(item[1].family))
    return next((name for name, entry in families if stem.startswith(entry.family)), None)


def build(name: str, seed: int = 0) -> nn.Module:
    """The built-in model `name` in eval mode, float32 on the CPU; the same seed gives the same numbers.

    Norm weights, biases and BatchNorm statistics are random too: at their initial ones and zeros a wrong fold would
    not show. The global random state is left as it was. UsageError if there is no such name.
    """
    entry, options = _find(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _make(entry, options)
        _randomise(model)
    return model.eval()


@lru_cache(maxsize=1)
def describe() -> tuple[Description, ...]:
    """Every built-in model in words and numbers, without allocating weights."""
    return tuple(_describe(name) for name in names())


def load(name_or_path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """A model in eval mode: a built-in name, a local folder, or a hub name, tried in this order.

    `dtype` None keeps the model's own. A folder or hub model is made by the class that its `config.architectures`
    names, else by AutoModel. Raises UsageError if there is no such model, or no network to get it by; a missing
    network is found out in seconds, and at once under HF_HUB_OFFLINE.
    """
    text = str(name_or_path)
    if text in names():
        model = build(text)
    elif Path(text).is_dir():
        model = _load_folder(Path(text))
    elif text.count("/") > 1 or text.startswith((".", "~", "/")):
        raise UsageError(
            f"there is no folder {text!r}: give a folder with a config.json, a hub name or a built-in name"
        )
    else:
        model = _load_hub(text)
    return model.to(device=device, dtype=dtype).eval() if dtype is not None else model.to(device=device).eval()


def _find(name: str) -> tuple[BuiltIn, Mapping[str, Any]]:
    if name in _TABLE:
        return _TABLE[name], _TABLE[name].full
    stem = name.removesuffix(TINY)
    if name.endswith(TINY) and stem in _TABLE:
        return _TABLE[stem], _TABLE[stem].tiny
    raise UsageError(f"there is no built-in model {name!r}: expected one of {', '.join(names())}")


def _make(entry: BuiltIn, options: Mapping[str, Any]) -> nn.Module:
    if entry.plain is not None:
        return entry.plain(**options)
    # transformers takes seconds to import: names and the command line's help must not wait for it
    import transformers

    config_class = getattr(transformers, str(entry.config))
    config = config_class(**options, architectures=[entry.architecture])
    model: nn.Module = getattr(transformers, entry.architecture)(config)
    return model


def _describe(name: str) -> Description:
    entry, options = _find(name)
    with torch.device("meta"):
        model = _make(entry, options)
    count = sum(parameter.numel() for parameter in model.parameters())
    return Description(name, entry.family, entry.architecture, entry.task, count, entry.hub)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Draw norm weights around 1, biases around 0 and BatchNorm statistics, from the current random state."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1:
            weight.normal_(1.0, 0.1)
        if isinstance(bias, nn.Parameter):
            bias.normal_(0.0, 0.02 / math.sqrt(2))


def _load_folder(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise UsageError(f"the folder {str(folder)!r} has no config.json: give one written by save_pretrained")
    return _from_pretrained(str(folder), json.loads((folder / "config.json").read_text()).get("architectures"))


def _load_hub(name: str) -> nn.Module:
    import transformers
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise UsageError(f"{name!r} is no built-in model, folder or hub name: see `fxopt models`") from error
    if not isinstance(cached, str):
        _need_network(name, offline=constants.is_offline_mode(), endpoint=constants.ENDPOINT)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        return _from_pretrained(name, config.architectures)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"the hub model {name!r} cannot be loaded ({reason}): {_instead(name)}") from error


def _need_network(name: str, offline: bool, endpoint: str) -> None:
    """Refuse in one line, within seconds, where the hub's own client would retry for minutes."""
    if offline:
        raise UsageError(f"the hub model {name!r} is not in the cache and HF_HUB_OFFLINE is set: {_instead(name)}")
    if not _reachable(endpoint):
        raise UsageError(f"the hub model {name!r} needs a network and {endpoint} cannot be reached: {_instead(name)}")


def _reachable(endpoint: str) -> bool:
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    target = urlsplit(endpoint)
    proxy = getproxies().get(target.scheme)
    if proxy and not proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname, port), timeout=HUB_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def _instead(name: str) -> str:
    built_in = equivalent(name)
    if built_in is None:
        return "use a local folder or a built-in model (`fxopt models` lists them)"
    return f"use a local folder or the built-in {built_in!r} (same architecture, random weights)"


def _from_pretrained(source: str, architectures: list[str] | None) -> nn.Module:
    import transformers

    known = [getattr(transformers, name) for name in architectures or () if hasattr(transformers, name)]
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        model: nn.Module = (known[0] if known else transformers.AutoModel).from_pretrained(source)
    finally:
        if shown:
            transformers.logging.enable_progress_bar()
    return model
