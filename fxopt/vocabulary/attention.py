"""Attention and embedding."""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, empty-body"

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fxopt.ops import op, spell

aten = torch.ops.aten


@op(
    F.scaled_dot_product_attention,
    aten.scaled_dot_product_attention.default,
    random=lambda arguments: arguments["dropout_p"] != 0,
)
def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
): ...


@op(
    nn.Embedding,
    F.embedding,
    spell(
        aten.embedding.default,
        "weight input padding_idx scale_grad_by_freq sparse",
        translate={"padding_idx": (-1, None)},
    ),
    writes=lambda arguments: () if arguments["max_norm"] is None else ("weight",),
)
def embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
): ...


@op(F.one_hot, aten.one_hot.default)
def one_hot(input, num_classes=-1): ...
