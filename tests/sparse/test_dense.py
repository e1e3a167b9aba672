"""A whole model on dense layers again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxopt.errors import UsageError
from fxopt.models import build
from fxopt.sparse import (
    BlockSparseLinear,
    Pruner,
    SemiStructuredLinear,
    SparseConv2d,
    SparseLinear,
    swap,
    to_dense,
)

SPARSE = (SparseLinear, SparseConv2d, BlockSparseLinear, SemiStructuredLinear)


class Net(nn.Module):
    """A sparse layer of each kind, one at two places, and two on one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        Pruner(conv, 0.7)
        self.conv = SparseConv2d.from_dense(conv)
        shared = nn.Linear(64, 64)
        Pruner(shared, 0.8)
        self.twice = nn.ModuleList([SparseLinear.from_dense(shared)] * 2)
        self.blocks = BlockSparseLinear(64, 64, block_shape=(16, 16))
        self.tied = self.blocks.tied(nn.Parameter(torch.randn(64)))
        self.pairs = SemiStructuredLinear(64, 32).eval()
        self.pairs.values.requires_grad_(False)
        self.dense = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(1)
        for layer in (*self.twice, self.blocks, self.tied, self.pairs, self.dense):
            y = torch.tanh(layer(y))
        return y


@pytest.mark.parametrize("inplace", [False, True])
def test_every_kind_becomes_dense_and_what_is_shared_stays_so(inplace):
    net, x = Net(), torch.randn(3, 4, 4, 4)
    expected, layers, bias = net(x), dict(net.named_modules()), net.twice[0].bias
    dense = to_dense(net, inplace=inplace)
    assert (dense is net) == inplace and not any(isinstance(m, SPARSE) for m in dense.modules())
    torch.testing.assert_close(dense(x), expected, rtol=1e-4, atol=1e-5)
    assert type(dense.conv) is nn.Conv2d and type(dense.pairs) is nn.Linear
    assert dense.twice[0] is dense.twice[1] and dense.blocks is not dense.tied
    assert dense.blocks.weight is dense.tied.weight and dense.blocks.bias is not dense.tied.bias
    assert not dense.pairs.training and not dense.pairs.weight.requires_grad and dense.conv.weight.requires_grad
    assert (dense.twice[0].bias is bias) == inplace
    if not inplace:
        assert all(module is layers[name] for name, module in net.named_modules())
        assert torch.equal(net(x), expected)


def test_a_model_of_transformers_is_saved_and_loaded(tmp_path: Path):
    model = build("bert-base-tiny")
    Pruner(model, 0.9)
    inputs = {"input_ids": torch.arange(12).reshape(2, 6) + 5}
    sparse, report = swap(model, inputs, measure=False)
    assert report.swapped
    dense = to_dense(sparse)
    assert list(dense.state_dict()) == list(model.state_dict())
    dense.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = dense(**inputs).last_hidden_state
        assert torch.equal(loaded(**inputs).last_hidden_state, expected)
        torch.testing.assert_close(sparse(**inputs).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_one_layer_alone():
    layer, x = SparseLinear.from_dense(nn.Linear(5, 3)), torch.randn(2, 5)
    for inplace in (False, True):
        dense = to_dense(layer, inplace=inplace)
        assert type(dense) is nn.Linear and (dense.bias is layer.bias) == inplace
        torch.testing.assert_close(dense(x), layer(x))


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU()])
def test_torchs_encoder_layer_has_its_fast_path_back(activation):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=activation)
    before = model.activation_relu_or_gelu
    sparse, _ = swap(model, torch.randn(2, 5, 8), min_sparsity=0, measure=False)
    assert sparse.activation_relu_or_gelu == 0
    assert to_dense(sparse).activation_relu_or_gelu == before


def test_what_it_refuses_is_one_line_and_changes_nothing():
    net = Net()
    net.tied.register_forward_hook(lambda *_: None)
    for use, told in (
        (lambda: to_dense(net, inplace=True), "tied has hooks, or a forward of its own; remove them first"),
        (lambda: to_dense({}), "a dict was given; expected a torch.nn.Module"),
    ):
        with pytest.raises(UsageError, match=told) as error:
            use()
        assert "\n" not in str(error.value)
    assert isinstance(net.conv, SparseConv2d)
