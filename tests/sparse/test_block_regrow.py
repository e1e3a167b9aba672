"""Blocks that move in training, in place; and training from scratch beside masked dense training."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fxopt.errors import UsageError
from fxopt.sparse import BlockRegrow, BlockSparseLinear

OPTIMIZERS = (torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adafactor)


def net(seed=0, block=(16, 16), density=0.4):
    torch.manual_seed(seed)
    layers = (BlockSparseLinear(i, o, density=density, block_shape=block) for i, o in ((64, 96), (96, 80)))
    first, second = layers
    return nn.Sequential(first, nn.ReLU(), second)


def train_step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def places(layer):
    return layer.mask.flatten().nonzero()[:, 0]


@pytest.mark.parametrize("grow", ("random", "gradient"))
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_weakest_move_and_nothing_else(kind, grow):
    model, x = net(), torch.randn(32, 64)
    optimizer = kind(model.parameters(), lr=1e-2, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    regrow = BlockRegrow(model, optimizer, 0.2, grow)
    held = [(id(p), p.data_ptr()) for p in (*model.parameters(), *model.buffers())]
    for _ in range(3):
        with regrow.scoring():
            train_step(model, optimizer, x)
        layer = model[0]
        norms, before, was = layer.data.detach().flatten(1).norm(dim=1), places(layer), layer.weight.detach().clone()
        states = {
            k: dict(zip(before.tolist(), v.clone(), strict=True))
            for k, v in optimizer.state[layer.data].items()
            if isinstance(v, torch.Tensor) and v.dim() and v.shape[0] == layer.data.shape[0]
        }
        moved = regrow.step()
        assert moved[0].moved == int(0.2 * moved[0].blocks) > 0
        now = places(layer)
        dropped = set(before[norms.argsort(stable=True)[: moved[0].moved]].tolist())
        grown = set(now.tolist()) - set(before.tolist())
        assert set(before.tolist()) - set(now.tolist()) == dropped and len(grown) == len(dropped)
        kept = layer.mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
        assert torch.equal(layer.weight, was * kept)
        for key, by_place in states.items():
            for place, value in zip(now.tolist(), optimizer.state[layer.data][key], strict=True):
                assert torch.equal(value, by_place.get(place, torch.zeros_like(value))) or place in grown
                assert place not in grown or not value.any()
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert held == [(id(p), p.data_ptr()) for p in (*model.parameters(), *model.buffers())]


def test_gradient_grows_where_the_gradient_is_largest():
    torch.manual_seed(0)
    layer = BlockSparseLinear(256, 128, bias=False, density=0.3, block_shape=(16, 16))
    free = ~layer.mask
    x = torch.randn(64, 256)
    wanted = torch.zeros(128, 256)
    r, c = free.nonzero()[torch.randperm(int(free.sum()))[:3]].T
    for i, j in zip(r.tolist(), c.tolist(), strict=True):  # what is missing, in three blocks
        wanted[16 * i : 16 * i + 16, 16 * j : 16 * j + 16] = torch.randn(16, 16)
    target = x @ (layer.weight.detach() + wanted).t()
    regrow = BlockRegrow(layer, fraction=0.1, grow="gradient", candidates=1000)
    with regrow.scoring():
        (layer(x) - target).square().sum().backward()
    regrow.step()
    assert bool(layer.mask[r, c].all())


def test_compiled_code_goes_on():
    model, x = net(), torch.randn(8, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    BlockRegrow(model, fraction=0.3).step()
    assert torch.equal(compiled(x), model(x))


def test_the_seed_decides():
    masks = []
    for seed in (1, 1, 2):
        model = net(density=0.2)
        BlockRegrow(model, fraction=0.5, seed=seed).step()
        masks.append(model[0].mask)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_a_full_layer_has_no_place_to_grow():
    model = net(density=1.0)
    assert [m.moved for m in BlockRegrow(model, fraction=0.3).step()] == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"fraction": 0}, "fraction=0 was given"),
        ({"grow": "best"}, "grow='best' was given"),
        ({"candidates": 0.5}, "candidates=0.5 was given"),
    ),
)
def test_bad_input(options, message):
    with pytest.raises(UsageError, match=message):
        BlockRegrow(net(), **options)
    with pytest.raises(UsageError, match="no block-sparse layer"):
        BlockRegrow(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="no gradient was seen"):
        BlockRegrow(net(), grow="gradient").step()


# --- training ---------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A dense layer of which only what the mask keeps is used: what block-sparse training has to equal."""

    def __init__(self, layer):
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        bo, bi = layer.block_shape
        kept = layer.mask.repeat_interleave(bo, 0).repeat_interleave(bi, 1)
        self.kept = kept[: layer.out_features, : layer.in_features].float()

    def forward(self, x):
        return F.linear(x, self.weight * self.kept, self.bias)


def digits():
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1400]], y[order[:1400]], x[order[1400:]], y[order[1400:]]


def fit(model, epochs, every=None):
    x, y, held_x, held_y = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    regrow = BlockRegrow(model, optimizer, 0.2, "gradient") if every else None
    generator, losses = torch.Generator().manual_seed(1), []
    for epoch in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(100):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        if regrow is not None and (epoch + 1) % every == 0 and epoch < epochs * 0.7:
            with regrow.scoring():
                F.cross_entropy(model(x), y).backward()
            regrow.step()
    with torch.no_grad():
        return torch.tensor(losses), float((model(held_x).argmax(1) == held_y).float().mean())


def classifier(density):
    sizes = ((64, 128), (128, 128), (128, 10))
    first, second, last = (BlockSparseLinear(i, o, density=density, block_shape=(16, 16)) for i, o in sizes)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


def test_training_is_masked_dense_training():
    torch.manual_seed(0)
    sparse = classifier(0.4)
    masked = nn.Sequential(*(Masked(m) if isinstance(m, BlockSparseLinear) else m for m in sparse))
    (a, right), (b, wanted) = fit(sparse, 8), fit(masked, 8)
    torch.testing.assert_close(a[:20], b[:20], rtol=1e-3, atol=1e-4)  # step by step, until rounding grows
    assert abs(right - wanted) < 0.02 and right > 0.9, (right, wanted)


@pytest.mark.slow
def test_regrowing_learns_more_than_fixed_blocks():
    found = {}
    for every in (None, 4):
        torch.manual_seed(0)
        found[every] = fit(classifier(0.15), 40, every)[1]
    assert found[4] > found[None] and found[4] > 0.85, found
