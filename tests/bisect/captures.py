"""The graphs that bugs are planted in: small, but with dozens of places for the same rewrite."""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification

import fxopt


class Net(nn.Module):
    """A residual MLP with a gate, a softmax, writes in place, and a buffer that counts its calls."""

    def __init__(self, width=16, depth=12):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.gains = nn.ParameterList(nn.Parameter(torch.rand(width) + 0.5) for _ in range(depth))
        self.head = nn.Linear(width, width)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        self.seen.add_(2)
        for layer, gain in zip(self.layers, self.gains, strict=True):
            h = F.relu(layer(x)) * gain
            g = (F.log_softmax(h, -1).clamp(min=-2.8) * 0.1 + 0.5).clamp(min=0.22)
            a, b, c = (h + g).split([8, 4, 4], -1)
            d = torch.cat((c, a, b), -1) * 0.5
            d[..., :2].fill_(0.25)
            x = x + torch.tanh(d) + d.mean(-1, keepdim=True)
        return self.head(x), x.argmax(-1)


@functools.cache
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    ids = torch.randint(1, 100, (2, 10))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return fxopt.capture(_scaled(BertModel(config).eval()), inputs), inputs


@functools.cache
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_embd=32, n_layer=6, n_head=4, n_positions=64, use_cache=False)
    ids = torch.randint(1, 100, (2, 10))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return fxopt.capture(_scaled(GPT2LMHeadModel(config).eval()), inputs), inputs


@functools.cache
def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[3, 3], layer_type="basic", num_labels=5
    )
    model = ResNetForImageClassification(config).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.3)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    return fxopt.capture(model, inputs), inputs


@functools.cache
def mlp():
    torch.manual_seed(0)
    inputs = (torch.randn(6, 16),)
    return fxopt.capture(Net().eval(), inputs), inputs


def _scaled(model):
    """Weights as large as trained ones, so that every layer matters."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.3)
    return model
