import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.history import history
from fxopt.kernels import layouts, packed
from fxopt.text import show
from fxopt.transformations import pack_weights
from fxopt.transformations.pack_weights import PackWeights
from tests.rewriting import DIALECTS, rewrites, trace, unchanged

pytestmark = pytest.mark.skipif(not packed.available(), reason="this torch has no oneDNN")
X = (torch.randn(3, 16),)
IMAGE = (torch.randn(2, 4, 8, 8),)


@pytest.fixture(autouse=True)
def _small_counts(monkeypatch):
    """Small layers are packed too, so that tests are quick."""
    monkeypatch.setattr(pack_weights, "SMALLEST_CONVOLUTION", 0)
    monkeypatch.setattr(packed, "rows", lambda features, inputs, threads: (1, 128))


class Linear(nn.Module):
    def __init__(self, act=None, bias=True):
        super().__init__()
        self.fc, self.act = nn.Linear(16, 24, bias), act

    def forward(self, x):
        y = self.fc(x)
        return y if self.act is None else self.act(y)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("act", "name"),
    [(None, None), (nn.ReLU(), "relu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.ReLU(True), "relu")],
)
def test_a_linear_takes_its_activation_along(act, name, bias):
    given = [
        "x",
        "fc.weight",
        *(["fc.bias"] if bias else []),
        *([f"{'' if bias else 'activation='}'{name}'"] if name else []),
    ]
    text = f"%0 = packed_linear({', '.join(given)})\nreturn %0"
    for gm in rewrites(PackWeights(), Linear(act, bias), X, text, count=1).values():
        assert list(gm.state_dict()) == (["fc.weight", "fc.bias"] if bias else ["fc.weight"])


class GPT2Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 24)), nn.Parameter(torch.randn(24))

    def forward(self, x):
        y = torch.addmm(self.bias, x.view(-1, 16), self.weight)
        return F.gelu(y.view(3, 1, 24), approximate="tanh")


def test_a_transposed_linear_takes_its_activation_through_a_view():
    text = """
        %0 = view(x, [-1, 16])
        %1 = packed_linear(%0, weight, bias, 'gelu_tanh', True)
        %2 = view(%1, [3, 1, 24])
        return %2
    """
    rewrites(PackWeights(), GPT2Linear(), X, text, count=1, rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    """A residual block as in ResNet, a convolution beside it, and a head."""

    def __init__(self, inplace=False):
        super().__init__()
        self.a, self.b, self.side = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, 5)
        self.inplace = inplace

    def forward(self, x):
        y = self.b(F.relu(self.a(x)))
        if self.inplace:
            y += self.side(x)
        else:
            y = y + self.side(x)
        y = F.max_pool2d(F.relu(y), 2)
        return self.fc(y.mean((2, 3))), y


@pytest.mark.parametrize("inplace", [False, True])
def test_convolutions_take_relu_and_residual_along_and_give_back_the_layout(inplace):
    after = """
        %0 = packed_conv2d(x, a.weight, a.bias, None, [1, 1], [1, 1], [1, 1], 1, 'relu')
        %1 = packed_conv2d(x, side.weight, side.bias, None, [1, 1], [0, 0], [1, 1], 1, 'none')
        %2 = packed_conv2d(%0, b.weight, None, %1, [1, 1], [0, 0], [1, 1], 1, 'relu')
        %3 = max_pool2d(%2, [2, 2], [2, 2])
        %4 = contiguous(%3)
        %5 = mean(%3, [2, 3])
        %6 = contiguous(%5)
        %7 = packed_linear(%6, fc.weight, fc.bias)
        return [%7, %4]
    """
    rewrites(PackWeights(), Block(inplace), IMAGE, after, dialects=("aten",), rtol=1e-5, atol=1e-5)
    found = rewrites(PackWeights(), Block(inplace), IMAGE, None, rtol=1e-5, atol=1e-5)
    for gm in found.values():
        names = [str(n.target) for n in gm.graph.nodes if n.op.startswith("call") and "packed" not in str(n.target)]
        assert not [n for n in names if "relu" in n or "add" in n], names
        with torch.no_grad():
            for _ in range(3):
                assert gm(*IMAGE)[1].is_contiguous()


def test_every_reader_that_minds_the_layout_gets_its_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.fc = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 4, 4), nn.Linear(6, 6)

        def forward(self, x):
            y = self.conv(self.stem(x).tanh())
            return self.fc(y.flatten(2).transpose(1, 2)), y.view(2, -1), y.size(1)

    for gm in rewrites(PackWeights(), Net(), IMAGE, None, dialects=("aten",)).values():
        assert show(gm).count("contiguous(") == 1
    for dialect in ("module", "function"):
        gm = PackWeights()(trace(Net().eval(), IMAGE, dialect))
        with torch.no_grad():
            assert [tuple(v.shape) for v in gm(*IMAGE)[:2]] == [(2, 4, 6), (2, 24)]
        assert show(gm).count("contiguous(") == 1


def test_a_side_that_is_spread_is_added_apart():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.next = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.shift = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x):
            return self.next(self.conv(x) + self.shift)

    for gm in rewrites(PackWeights(), Net(), IMAGE, None, rtol=1e-5, atol=1e-5).values():
        assert "add(" in show(gm) and show(gm).count("None, [1, 1]") == 2


def test_dynamic_sizes_need_no_other_graph():
    dynamic = torch.export.Dim.DYNAMIC
    gm = trace(Linear(nn.GELU()).eval(), (torch.randn(2, 5, 16),), "aten", ({0: dynamic, 1: dynamic},))
    image = trace(Block().eval(), IMAGE, "aten", ({0: dynamic},))
    plain = copy.deepcopy(gm), copy.deepcopy(image)
    PackWeights()(gm), PackWeights()(image)
    with torch.no_grad():
        for batch, rows in ((1, 1), (3, 7), (200, 2), (1, 1), (3, 7), (3, 7)):
            x = torch.randn(batch, rows, 16)
            torch.testing.assert_close(gm(x), plain[0](x), rtol=1e-5, atol=1e-5)
            x = torch.randn(batch, 4, 8, 8)
            torch.testing.assert_close(image(x), plain[1](x), rtol=1e-5, atol=1e-5)


class TwiceCalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.tied = nn.Linear(16, 16), nn.Linear(16, 16)
        self.tied.weight = self.fc.weight

    def forward(self, x):
        return self.tied(self.fc(self.fc(x)))


def test_shared_and_tied_weights_stay_one_tensor():
    for gm in rewrites(PackWeights(), TwiceCalled(), X, None, rtol=1e-5, atol=1e-5).values():
        assert show(gm).count("packed_linear(") == 3
        assert len({id(p) for p in gm.parameters() if p.dim() == 2}) == 1
        with torch.no_grad():
            for _ in range(3):
                gm(*X)
        assert layouts.packed_bytes(next(p for p in gm.parameters() if p.dim() == 2)) == 16 * 16 * 4


def test_a_trained_weight_is_used_as_it_is_and_undo_keeps_it():
    for dialect in DIALECTS:
        model = Linear(nn.ReLU())
        gm = trace(model.eval(), X, dialect)
        PackWeights()(gm)
        optimizer = torch.optim.SGD(gm.parameters(), lr=0.5)
        for _ in range(2):
            with torch.no_grad():
                for _ in range(3):
                    torch.testing.assert_close(gm(*X), model(*X), rtol=1e-5, atol=1e-5)
            optimizer.zero_grad()
            gm(*X).sum().backward()
            optimizer.step()
        with torch.no_grad():
            expected = model(*X)
            PackWeights().reverse(gm)
            assert torch.equal(gm(*X), expected)


def test_a_copy_packs_its_own_weights():
    gm = PackWeights()(trace(Linear().eval(), X, "aten"))
    with torch.no_grad():
        for _ in range(3):
            y = gm(*X)
        twin = copy.deepcopy(gm)
        twin.get_parameter("fc.weight").zero_()
        assert torch.equal(gm(*X), y) and not torch.equal(twin(*X), y)
        PackWeights().reverse(twin)
    assert "packed" in gm.code and "packed" not in twin.code


def test_packing_twice_does_nothing_more():
    gm = PackWeights()(trace(Block().eval(), IMAGE, "aten"))
    code = gm.code
    PackWeights()(gm)
    assert gm.code == code and not history(gm)[-1].rewrites


def test_undoing_what_came_before_packs_what_it_leaves():
    from fxopt.transformations.eliminate_dropout import EliminateDropout

    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1), nn.ReLU()).eval()
    gm = trace(model, X, "aten")
    alone = PackWeights()(trace(model, X, "aten"))
    EliminateDropout()(gm)
    PackWeights()(gm)
    assert "'relu'" in show(gm)
    EliminateDropout().reverse(gm)
    assert show(gm) == show(alone) and "'relu'" not in show(gm)


class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 16))

    def forward(self, x):
        return F.linear(x, self.weight * 2)


class Batched(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv, self.next = nn.Conv2d(4, 4, 3, **options), nn.Conv2d(4, 4, 1, **options)

    def forward(self, x):
        return self.next(self.conv(x))


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.fc.register_forward_hook(lambda module, args, output: output + 1)

    def forward(self, x):
        return self.fc(x)


class WrittenBehind(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.next = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.next(self.conv(x))
        flat = y.view(2, -1)
        flat.add_(1)
        return y * 2


class Patches(nn.Module):
    """The first layer of a vision transformer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 4, 4)

    def forward(self, x):
        return self.conv(x).flatten(2).transpose(1, 2).relu()


def test_what_is_not_packed():
    unchanged(PackWeights(), Patches(), IMAGE, "stands alone: to change the layout and back costs more")
    unchanged(PackWeights(), Computed(), X, "weight = .* is not a Constant", dialects=("function", "aten"))
    unchanged(PackWeights(), Linear().double(), (X[0].double(),), r"fc\.weight is no float32 tensor on a CPU")
    unchanged(PackWeights(), Batched(), (torch.randn(4, 8, 8),), "no known batch of images")
    unchanged(PackWeights(), Batched(padding="same"), IMAGE, "pads by name, 'same'")
    unchanged(PackWeights(), Batched(padding=1, padding_mode="circular"), IMAGE, "padding_mode", dialects=("module",))
    unchanged(PackWeights(), Hooked(), X, "has hooks", dialects=("module",))
    unchanged(PackWeights(), WrittenBehind(), IMAGE, "writes in place to images that others read")


def test_small_layers_are_left_alone(monkeypatch):
    monkeypatch.undo()
    unchanged(PackWeights(), Linear(), X, r"fc\.weight has 384 elements; packing gains nothing")
    unchanged(PackWeights(), Batched(), IMAGE, "computes 5184 products for each image; packing gains nothing")


def test_measured_rows_are_the_widest_run_that_gains(monkeypatch):
    ratios = {1: 1.2, 2: 0.5, 8: 0.5, 32: 0.8, 64: 0.99, 128: 0.9, 192: 1.1, 256: 1.2, 512: 0.5, 1024: 0.5}
    monkeypatch.setattr(pack_weights, "measured_ratios", lambda *_: ratios)
    pack_weights.measured_rows.cache_clear()
    assert pack_weights.measured_rows(8, 8, "none", 1) == (2, 32)
    ratios.update(dict.fromkeys((64, 192, 256), 0.5))
    pack_weights.measured_rows.cache_clear()
    assert pack_weights.measured_rows(8, 8, "none", 1) == (2, packed.ALL_ROWS)
    pack_weights.measured_rows.cache_clear()
    ratios.update(dict.fromkeys(ratios, 1.0))
    assert pack_weights.measured_rows(8, 8, "none", 1) is None
    pack_weights.measured_rows.cache_clear()


def test_measuring_times_every_size_once():
    pack_weights.measured_ratios.cache_clear()
    pack_weights.measured_rows.cache_clear()
    gm = trace(Linear().eval(), X, "aten")
    assert not PackWeights(measure=True).replayable and PackWeights().replayable
    PackWeights(measure=True)(gm)
    assert pack_weights.measured_ratios.cache_info().currsize == 1
    ratios = pack_weights.measured_ratios(24, 16, "none", torch.get_num_threads())
    assert set(ratios) == set(pack_weights._MEASURED_ROWS) and all(r > 0 for r in ratios.values())
