"""Example inputs for a model: from a tokenizer when there is one, else from optimum's dummy input generators.

Integer inputs are int64, masks are int64 of zeros and ones whose first row is full, floats have the model's dtype.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import UsageError

SENTENCES = (
    "The graph is rewritten, verified, timed, and can be put back.",
    "A pass is a commit.",
    "Every rewrite is recorded, so that each of them can be undone alone, exactly, in any order.",
    "Nothing is lost in silence.",
)
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "bbox")
_DECODER = ("decoder_input_ids",)
_IMAGE = ("pixel_values",)
_AUDIO = ("input_features", "input_values")
_LIMITS = ("max_position_embeddings", "n_positions", "max_target_positions")
_LENGTH = 16


def example_inputs(
    model: nn.Module,
    batch_size: int = 2,
    sequence_length: int | None = None,
    text: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword inputs for `model(**inputs)`, on the model's device; 16 tokens long by default, or what the model takes.

    With a tokenizer (its object, or a folder that holds one), `text` (a few sentences of its own if None) is
    tokenised, repeated or cut to `batch_size` rows, padded, and truncated to `sequence_length`. A module with a method
    `example_inputs(batch_size, sequence_length)` is asked first; a Hugging Face model gets what its config
    says; of any other module the first layer with weights is judged. The same seed gives the same numbers, and the
    global random state is left as it was. UsageError if the model takes inputs that cannot be made up, or has fewer
    positions than `sequence_length`.
    """
    sequence_length = fitting_length(model, _LENGTH) if sequence_length is None else sequence_length
    if batch_size < 1 or sequence_length < 1:
        raise UsageError(f"batch_size {batch_size} and sequence_length {sequence_length} must be at least 1")
    if (longest := longest_sequence(model)) is not None and sequence_length > longest:
        raise UsageError(
            f"sequence_length {sequence_length} is more than the {longest} positions of {type(model).__name__}; "
            f"give at most {longest}"
        )
    if text is not None and tokenizer is None:
        raise UsageError("text was given without a tokenizer: give tokenizer=, or leave text out for random tokens")
    if tokenizer is not None:
        inputs = _tokenised(model, tokenizer, text, batch_size, sequence_length)
    else:
        state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            inputs = _made_up(model, batch_size, sequence_length)
        random.setstate(state)
    return _placed(inputs, model)


def longest_sequence(model: nn.Module) -> int | None:
    """The most tokens for which the model has positions, by its config; None where it names no limit."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(inner, "rope_parameters", None):  # rotations are computed for every position, however far
        return None
    limits = [getattr(c, name, None) for c in (config, inner) for name in _LIMITS]
    limit = min((n for n in limits if isinstance(n, int) and n > 0), default=None)
    return None if limit is None else limit - _rows_before_the_first(model)


def fitting_length(model: nn.Module, wanted: int) -> int:
    """`wanted` tokens, or as many as the model has positions for."""
    longest = longest_sequence(model)
    return wanted if longest is None else max(1, min(wanted, longest))


def _rows_before_the_first(model: nn.Module) -> int:
    """RoBERTa and its kin number positions from the padding token on, and count those before it in the config."""
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    pads = (m.padding_idx for m in tables if isinstance(m, nn.Embedding))
    return max((pad + 1 for pad in pads if pad is not None), default=0)


def load_tokenizer(folder: str) -> Any | None:
    """The tokenizer in a local folder, or None if the folder holds none. Never asks a network."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError):  # what transformers raises where tokenizer files are absent
        return None


def _tokenised(
    model: nn.Module, tokenizer: Any, text: str | Sequence[str] | None, batch_size: int, sequence_length: int
) -> dict[str, Any]:
    if isinstance(tokenizer, str):
        loaded = load_tokenizer(tokenizer)
        if loaded is None:
            raise UsageError(f"the folder {tokenizer!r} holds no tokenizer: give one, or leave tokenizer out")
        tokenizer = loaded
    given = [text] if isinstance(text, str) else list(text or SENTENCES)
    rows = [given[i % len(given)] for i in range(batch_size)]
    if tokenizer.pad_token is None:
        # GPT-2 and its kin have none; the mask hides what is padded, so that any known token does
        tokenizer.pad_token = tokenizer.eos_token
    encoded = dict(tokenizer(rows, padding=True, truncation=True, max_length=sequence_length, return_tensors="pt"))
    inputs = {name: encoded[name] for name in encoded if name in _parameters(model)}
    if "decoder_input_ids" in _parameters(model):
        inputs["decoder_input_ids"] = inputs["input_ids"].clone()
    return inputs


def _made_up(model: nn.Module, batch_size: int, sequence_length: int) -> dict[str, Any]:
    own = getattr(model, "example_inputs", None)
    if callable(own):
        return dict(own(batch_size, sequence_length))
    if getattr(model, "config", None) is not None and hasattr(model, "main_input_name"):
        return _from_config(model, batch_size, sequence_length)
    return _from_first_layer(model, batch_size, sequence_length)


def _from_config(model: nn.Module, batch_size: int, sequence_length: int) -> dict[str, Any]:
    """Inputs by optimum's generators, judged by the normalised config and the names that `forward` takes."""
    wanted = _names(model)
    # optimum's masks need two columns, and pad every row: _pad makes them instead
    inputs: dict[str, Any] = {
        name: None if name == "attention_mask" else _generate(model, name, batch_size, sequence_length)
        for name in wanted
    }
    if "attention_mask" in inputs:
        _pad(inputs, getattr(model.config, "pad_token_id", None))
    return inputs


def _names(model: nn.Module) -> list[str]:
    """The inputs to make, in the order of `forward`: the main one, its mask, a decoder's tokens.

    `position_ids` and `encoder_outputs` are left to the model: random ones would contradict the rest.
    """
    main = str(model.main_input_name)
    wanted = {main}
    if main == "input_ids":
        wanted.add("attention_mask")
    if getattr(model.config, "type_vocab_size", 0) >= 2:
        wanted.add("token_type_ids")
    if getattr(model.config, "is_encoder_decoder", False):
        wanted.update(_DECODER)
    if hasattr(model.config, "vision_config") and hasattr(model.config, "text_config"):
        wanted.update(("input_ids", "attention_mask", *_IMAGE))
    return [name for name in _parameters(model) if name in wanted]


def _generate(model: nn.Module, name: str, batch_size: int, sequence_length: int) -> Tensor:
    from optimum.utils import input_generators as generators

    config = _normalised(model.config)
    shapes: dict[str, Any] = {"batch_size": batch_size, "sequence_length": sequence_length}
    if name in _TEXT:
        kind = generators.DummyTextInputGenerator
    elif name in _DECODER:
        kind = generators.DummyDecoderTextInputGenerator
    elif name in _IMAGE:
        kind = generators.DummyVisionInputGenerator
        shapes.update(height=224, width=224)
    elif name in _AUDIO:
        kind = generators.DummyAudioInputGenerator
        shapes.update(_audio_shape(model.config))
    else:
        raise UsageError(f"no example for the input {name!r} of {type(model).__name__}: give example_inputs")
    tensor: Tensor = kind("feature-extraction", config, **shapes).generate(name, framework="pt")
    return tensor


def _normalised(config: Any) -> Any:
    """Optimum's normalised config, by the model's type, else by what the config holds."""
    from optimum.utils import normalized_config as normal

    try:
        return normal.NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError:  # a model type that optimum does not list
        if hasattr(config, "vision_config") and hasattr(config, "text_config"):
            both = normal.NormalizedTextAndVisionConfig.with_args(
                text_config="text_config", vision_config="vision_config"
            )
            return both(config)
        inner = config.get_text_config() if hasattr(config, "get_text_config") else config
        return (
            normal.NormalizedTextConfig(inner)
            if hasattr(inner, "vocab_size")
            else normal.NormalizedVisionConfig(config)
        )


def _audio_shape(config: Any) -> dict[str, int]:
    """Mel bands and frames: Whisper's encoder halves the frames, and takes no other number than its own."""
    shape: dict[str, int] = {}
    if hasattr(config, "num_mel_bins"):
        shape["feature_size"] = config.num_mel_bins
    if hasattr(config, "max_source_positions"):
        shape["nb_max_frames"] = 2 * config.max_source_positions
    return shape


def _pad(inputs: dict[str, Any], pad_token: int | None) -> None:
    """Right-pad all rows but the first by a few tokens, and keep the padding token out of the attended places."""
    ids: Tensor = inputs["input_ids"]
    batch_size, length = ids.shape
    lengths = torch.tensor([max(1, length - (row * length) // (batch_size + 1)) for row in range(batch_size)])
    mask = (torch.arange(length)[None, :] < lengths[:, None]).long()
    inputs["attention_mask"] = mask
    if pad_token is None or pad_token < 0:
        return
    other = 3 if pad_token != 3 else 4
    inputs["input_ids"] = torch.where(ids == pad_token, torch.full_like(ids, other), ids)
    inputs["input_ids"] = torch.where(mask == 0, torch.full_like(ids, pad_token), inputs["input_ids"])


def _from_first_layer(model: nn.Module, batch_size: int, sequence_length: int) -> dict[str, Any]:
    required = [p.name for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty]
    if len(required) != 1:
        raise UsageError(f"{type(model).__name__} takes the inputs {required}: give example_inputs for them")
    layer = next((m for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor)), None)
    if isinstance(layer, nn.Embedding):
        return {required[0]: torch.randint(layer.num_embeddings, (batch_size, sequence_length))}
    if isinstance(layer, nn.Linear):
        return {required[0]: torch.randn(batch_size, layer.in_features)}
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        edge = {1: 64, 2: 64, 3: 16}[len(layer.kernel_size)]
        return {required[0]: torch.randn(batch_size, layer.in_channels, *[edge] * len(layer.kernel_size))}
    raise UsageError(f"no example inputs can be made up for {type(model).__name__}: give example_inputs")


def _parameters(model: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(model.forward).parameters)


def _placed(inputs: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The inputs on the model's device, floats in the dtype of its first float parameter."""
    first = next(model.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

    return {name: place(value) for name, value in inputs.items()}
