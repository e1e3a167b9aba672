"""Blocks that move in training, in place; and training from scratch beside masked dense training."""

import inspect
import itertools
import operator

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxopt
from fxopt.errors import UsageError
from fxopt.kernels.block_linear import block_view
from fxopt.sparse import BlockRegrow, BlockSparseLinear
from fxopt.sparse.block_regrow import Moved
from fxopt.transformations import BlockSparsify

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


@pytest.mark.parametrize("grow", ("random", "gradient"))
def test_of_few_blocks_one_moves(grow):
    layer = BlockSparseLinear(64, 64, density=0.25, block_shape=(16, 16))
    before, regrow = layer.mask, BlockRegrow(layer, fraction=0.1, grow=grow)
    with regrow.scoring():
        layer(torch.randn(3, 64)).square().sum().backward()
    assert regrow.step() == (Moved("", 1, 4),)
    assert int((layer.mask & ~before).sum()) == int((before & ~layer.mask).sum()) == 1


def test_the_only_block_of_a_layer_stays():
    layer = BlockSparseLinear(64, 64, density=0.05, block_shape=(16, 16))
    weight = layer.weight.detach().clone()
    assert BlockRegrow(layer, fraction=0.9).step() == (Moved("", 0, 1),)
    assert torch.equal(layer.weight, weight)


class Tied(nn.Module):
    """Two layers with one weight, of which the second is called by keyword."""

    def __init__(self):
        super().__init__()
        self.a = BlockSparseLinear(96, 96, density=0.3, block_shape=(16, 16), dtype=torch.float64)
        self.b = self.a.tied(nn.Parameter(torch.zeros(96, dtype=torch.float64)))
        (self.name,) = list(inspect.signature(self.b.forward).parameters)

    def forward(self, x):
        return self.b(**{self.name: torch.tanh(self.a(x))})


def test_scores_are_the_gradient_of_the_dense_weight_over_all_that_have_it():
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(8, 96, dtype=torch.float64)
    regrow = BlockRegrow(model, fraction=0.2, grow="gradient", candidates=1000)
    with regrow.scoring():
        model(x).square().sum().backward()
    ((places, scores),) = regrow._scores.values()
    assert set(places.tolist()) == set((~model.a.mask).flatten().nonzero()[:, 0].tolist())
    weight = model.a.weight.detach().requires_grad_()
    F.linear(torch.tanh(F.linear(x, weight, model.a.bias)), weight, model.b.bias).square().sum().backward()
    torch.testing.assert_close(scores, block_view(weight.grad, (16, 16)).reshape(-1, 16, 16)[places])


class Crowded(nn.Module):
    """A layer whose module has attributes of the names that the tensors of blocks have."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.inner.data = nn.Parameter(torch.randn(64, 2, 2))
        for name in ("crow", "col", "index"):
            self.inner.register_buffer(name, torch.full((64,), float("nan")))

    def forward(self, x):
        return F.linear(x, self.inner.weight) * self.inner.data.sum((1, 2))


def test_a_graph_tells_which_tensors_are_blocks_whatever_their_names():
    torch.manual_seed(0)
    x = (torch.randn(3, 64),)
    gm = fxopt.capture(Crowded(), x)
    BlockSparsify({"inner": (0.5, (16, 16))}, guard="off")(gm)
    (node,) = (n for n in gm.graph.nodes if "block_linear" in str(n.target))
    paths = [a.target for a in (node.args[1], *node.args[3:6])]
    blocks = [operator.attrgetter(p)(gm) for p in paths]
    data, held = blocks[0], {k: v.clone() for k, v in gm.state_dict().items()}
    (moved,) = BlockRegrow(gm, fraction=0.5).step()
    assert (moved.moved, moved.blocks) == (4, 8) and int((data.flatten(1) == 0).all(1).sum()) == 4
    others = {k: v for k, v in gm.state_dict().items() if k not in paths}
    assert {f"inner.{n}" for n in ("data", "crow", "col", "index")} <= others.keys()
    assert all(torch.equal(v.nan_to_num(), held[k].nan_to_num()) for k, v in others.items())
    layer = BlockSparseLinear(64, 64, bias=False, density=0.5, block_shape=(16, 16))
    with torch.no_grad():
        for name, value in zip(layer.TENSORS, blocks, strict=True):
            getattr(layer, name).copy_(value)
    torch.testing.assert_close(gm(*x), layer(*x) * gm.inner.data.sum((1, 2)))
    with pytest.raises(UsageError, match=r"inner\S* is no BlockSparseLinear module"):
        BlockRegrow(gm, grow="gradient")


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


# --- processes that train together ------------------------------------------------------------------------------------


def processes_regrow(rank: int, folder: str, processes: int) -> None:
    """One of `processes` processes that train one model together, each on inputs of its own."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    try:
        kept = {}
        for grow, wrapped in itertools.product(("random", "gradient"), (True, False)):
            torch.manual_seed(0)
            model = BlockSparseLinear(64, 64, density=0.25, block_shape=(8, 8), dtype=torch.float64)
            parallel = DistributedDataParallel(nn.Sequential(model))
            optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.1)
            given = parallel if wrapped else model  # as one has it at hand
            regrow = BlockRegrow(given, optimizer, 0.3, grow, candidates=2, seed=rank)
            torch.manual_seed(rank)
            for _ in range(2):
                with regrow.scoring():
                    parallel(torch.randn(4, 64, dtype=torch.float64)).square().mean().backward()
                optimizer.step()
                regrow.step()
            state = optimizer.state[model.data]
            index = model.index.clone()
            y = parallel(torch.ones(1, 64, dtype=torch.float64)).detach()  # gets the places of the first process
            kept[grow, wrapped] = (index, y, model.dense(state["exp_avg"]))
        torch.save(kept, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_that_train_together_move_the_same_blocks(tmp_path):
    torch.multiprocessing.spawn(processes_regrow, (str(tmp_path), 2), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case, first in found[0].items():
        assert all(torch.equal(a, b) for a, b in zip(first, found[1][case], strict=True)), case
    assert not torch.equal(found[0]["random", True][0], found[0]["gradient", True][0])


def test_scores_are_summed_over_the_processes(monkeypatch):
    """What another process saw, standing in for it: its scores are so large that they decide."""
    torch.manual_seed(0)
    layer = BlockSparseLinear(64, 64, density=0.25, block_shape=(16, 16))
    regrow = BlockRegrow(layer, fraction=0.5, grow="gradient", candidates=1000, process_group="replicas")
    wanted = (~layer.mask).flatten().nonzero()[[2, 7], 0]

    def all_reduce(total, group):
        assert group == "replicas"
        ((places, _),) = regrow._scores.values()
        total[torch.isin(places, wanted)] += 1e6

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, group, group_src: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with regrow.scoring():
        layer(torch.randn(3, 64)).square().sum().backward()
    assert regrow.step() == (Moved("", 2, 4),) and bool(layer.mask.flatten()[wanted].all())


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
