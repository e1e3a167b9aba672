"""`BlockSparseLinear` as a module, and which blocks it keeps."""

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from transformers.pytorch_utils import Conv1D

from fxopt.errors import UsageError
from fxopt.models import build
from fxopt.sparse import BlockSparseLinear, BlockSparseModelPatcher, SemiStructuredLinear, kept_blocks
from fxopt.sparse.block_select import block_energy

SELECTS = ("magnitude", "balanced", "random", "random(3)", "existing")


def expand(layer):
    bo, bi = layer.block_shape
    return layer.mask.repeat_interleave(bo, 0).repeat_interleave(bi, 1)[: layer.out_features, : layer.in_features]


def tied(layer):
    return layer.tied(layer.bias)


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("shape", ((64, 96), (70, 100), (1, 1), (33, 7)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_it_keeps_blocks_of_the_dense_weight(select, shape, dtype):
    linear = nn.Linear(shape[1], shape[0], dtype=dtype)
    layer = BlockSparseLinear.from_dense(linear, 0.5, select=select, block_shape=(16, 32))
    assert torch.equal(layer.weight, linear.weight * expand(layer))
    assert layer.bias is linear.bias
    assert layer.mask.sum() == layer.data.shape[0] >= 1
    x = torch.randn(2, 3, shape[1], dtype=dtype)
    wanted = F.linear(x.double(), layer.weight.double(), linear.bias.double())
    torch.testing.assert_close(layer(x).double(), wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 5e-2)
    assert torch.equal(layer.to_dense().weight, layer.weight)


def test_density_one_is_the_dense_layer():
    linear, x = nn.Linear(100, 70), torch.randn(5, 100)
    layer = BlockSparseLinear.from_dense(linear, 1.0)
    assert torch.equal(layer.weight, linear.weight)
    torch.testing.assert_close(layer(x), linear(x))


def test_magnitude_keeps_the_most_energy():
    weight = torch.randn(128, 128)
    energy = block_energy(weight, (16, 16))
    for name in SELECTS[1:4]:
        other = kept_blocks(weight, (16, 16), 0.3, name)
        assert energy[kept_blocks(weight, (16, 16), 0.3)].sum() >= energy[other].sum()
    assert kept_blocks(weight, (16, 16), 0.3).sum() == round(0.3 * 64)
    assert kept_blocks(weight, (16, 16), 0.25, "balanced").sum(1).tolist() == [2] * 8


def test_activation_loses_less_of_the_output_than_magnitude():
    torch.manual_seed(0)
    scale = torch.logspace(-2, 1, 256)[torch.randperm(256)].view(16, 16).sort(1).values.flatten()
    linear, x = nn.Linear(256, 128, bias=False), torch.randn(500, 256) * scale
    errors = {}
    for select in ("magnitude", "activation"):
        layer = BlockSparseLinear.from_dense(linear, 0.3, select=select, block_shape=(16, 16), inputs=x)
        errors[select] = float((layer(x) - linear(x)).detach().norm())
    assert errors["activation"] < 0.9 * errors["magnitude"], errors


def test_rescale_comes_closer():
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 64, bias=False), torch.randn(300, 1) + 0.3 * torch.randn(300, 128)
    plain, scaled = (
        BlockSparseLinear.from_dense(linear, 0.5, block_shape=(16, 16), inputs=x, rescale=r) for r in (False, True)
    )
    lost = [float((layer(x) - linear(x)).detach().norm()) for layer in (plain, scaled)]
    assert lost[1] < lost[0]
    by_norm = BlockSparseLinear.from_dense(linear, 0.5, block_shape=(16, 16), rescale=True)
    kept = by_norm.weight.norm(dim=1) > 0
    torch.testing.assert_close(by_norm.weight.norm(dim=1)[kept], linear.weight.norm(dim=1)[kept])


@pytest.mark.parametrize("density", (np.float32(0.5), np.float64(0.5), 0.5))
def test_a_density_may_be_of_numpy(density):
    assert BlockSparseLinear.from_dense(nn.Linear(64, 64), density).density == 0.5


def test_random_is_its_seed():
    weight = torch.randn(128, 128)
    a, b, c = (kept_blocks(weight, (16, 16), 0.3, f"random({s})") for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_existing_is_lossless():
    linear = nn.Linear(128, 96)
    with torch.no_grad():
        linear.weight[:, 32:96] = 0
        linear.weight[5, 70] = 1
    layer = BlockSparseLinear.from_dense(linear, select="existing")
    assert torch.equal(layer.weight, linear.weight) and layer.data.shape[0] == 7


def bsr_zeros(stored, shape):
    values, col, crow = (torch.as_tensor(a) for a in stored)
    return torch.sparse_bsr_tensor(crow, col, values, size=shape, check_invariants=True)


KINDS = ("blocks", "elements", "scipy", "torch", "numpy", "list")
STORED_ZEROS = ("scipy zeros", "scipy csr zeros", "torch zeros", "bsr zeros")


@pytest.mark.parametrize("kind", KINDS + STORED_ZEROS)
@pytest.mark.filterwarnings("ignore:Sparse")  # torch tells once in a process that it is in beta
def test_a_mask_may_be_given(kind):
    linear = nn.Linear(128, 96)
    blocks = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    elements = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)
    stored = np.zeros((5, 32, 32)), np.array([0, 3, 1, 2, 3]), np.array([0, 2, 2, 5])
    mask = {
        "blocks": blocks,
        "elements": elements,
        "scipy": scipy.sparse.bsr_array(elements.float().numpy(), blocksize=(32, 32)),
        "torch": elements.float().to_sparse(),
        "numpy": blocks.numpy(),
        "list": blocks.tolist(),
        "scipy zeros": scipy.sparse.bsr_array(stored, shape=elements.shape),
        "scipy csr zeros": scipy.sparse.bsr_array(stored, shape=elements.shape).tocsr(),
        "torch zeros": elements.float().to_sparse() * 0,
        "bsr zeros": bsr_zeros(stored, elements.shape),
    }[kind]
    layer = BlockSparseLinear.from_dense(linear, mask=mask)
    assert torch.equal(layer.mask, blocks)
    assert torch.equal(BlockSparseLinear.from_dense(linear, select=mask).mask, blocks)


def test_a_conv1d_of_transformers_is_one_too():
    linear, x = Conv1D(64, 96), torch.randn(3, 96)
    layer = BlockSparseLinear.from_dense(linear, 1.0)
    torch.testing.assert_close(layer(x), linear(x))


def test_made_from_nothing():
    torch.manual_seed(0)
    layer = BlockSparseLinear(1000, 500, density=0.25, block_shape=(16, 64))
    assert layer.density == pytest.approx(0.25, abs=0.01)
    with torch.no_grad():
        y = layer(torch.randn(200, 1000))
        dense = nn.Linear(1000, 500)(torch.randn(200, 1000))
    assert 0.7 < float(y.std() / dense.std()) < 1.4
    padding = layer.data.numel() - int(layer.dense(torch.ones_like(layer.data)).sum())
    assert padding > 0 and int((layer.data == 0).sum()) == padding


def test_padding_stays_zero_in_training():
    layer = BlockSparseLinear(100, 70, density=0.6, block_shape=(32, 32))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 100)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer.data.square().sum(), layer.weight.square().sum())


def test_its_state_goes_through_safetensors():
    a = BlockSparseLinear(100, 70, density=0.4, block_shape=(16, 32))
    state = load(save(a.state_dict()))
    assert {k: v.dtype for k, v in state.items() if k in ("crow", "col")} == {"crow": torch.int32, "col": torch.int32}
    assert state["data"].shape[1:] == (16, 32) and set(state) == {"data", "bias", "crow", "col"}
    b = BlockSparseLinear(100, 70, density=0.4, block_shape=(16, 32))
    held = b.data
    b.load_state_dict(state)
    x = torch.randn(3, 100)
    assert b.data is held and torch.equal(a(x), b(x))
    a(x).sum().backward()
    b(x).sum().backward()
    assert torch.equal(a.data.grad, b.data.grad)


def test_the_state_of_a_dense_layer_loads():
    linear, layer = nn.Linear(100, 70), BlockSparseLinear(100, 70, density=0.4, block_shape=(16, 32))
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight * expand(layer)) and torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize("sizes", ((64, 64), (64, 192)))
@pytest.mark.parametrize("through", (lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), tied))
def test_the_state_of_a_conv1d_loads_the_way_round_that_it_was(sizes, through):
    linear, other = (Conv1D(sizes[1], sizes[0]) for _ in range(2))
    layer = through(BlockSparseLinear.from_dense(linear, 0.5, block_shape=(16, 16)))
    assert "fan_in_fan_out=True" in repr(layer)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, other.weight.t() * expand(layer)) and consistent(layer)
    dense, x = layer.to_dense(), torch.randn(3, sizes[0])
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense(x), layer(x))
    with pytest.raises(RuntimeError, match=r"weight is \(3, 3\), expected \(64, "):
        layer.load_state_dict({"weight": torch.ones(3, 3)})


def test_a_checkpoint_of_gpt2_loads_into_the_patched_model():
    model = build("gpt2-tiny").eval()
    ids, state = torch.arange(12).reshape(2, 6), copy.deepcopy(model.state_dict())
    wanted = model(ids).logits
    patcher = BlockSparseModelPatcher(guard="off")
    patcher.add_pattern(r".*(attn|mlp)\.c_\w+", {"density": 1.0, "block": (16, 16)}).patch_model(model)
    model.load_state_dict(state)
    torch.testing.assert_close(model(ids).logits, wanted)


def make(way, **options):
    torch.manual_seed(3)
    if way == "device":
        return BlockSparseLinear(100, 70, density=0.4, device="meta", **options)
    if way == "moved":
        return BlockSparseLinear(100, 70, density=0.4, **options).to("meta")
    with torch.device("meta"):
        return BlockSparseLinear(100, 70, density=0.4, **options)


@pytest.mark.parametrize("way", ("device", "context", "moved"))
def test_the_meta_device_knows_where_blocks_are(way):
    linear, like = nn.Linear(100, 70), make("moved").to_empty(device="cpu")
    layer = make(way)
    assert layer.data.is_meta and layer.crow.is_meta and layer.bias.is_meta
    assert layer(torch.empty(3, 100, device="meta")).shape == (3, 70)
    empty = copy.deepcopy(layer).to_empty(device="cpu")
    empty.load_state_dict(linear.state_dict())
    layer.load_state_dict(linear.state_dict(), assign=True)
    for one in (layer, empty):
        assert torch.equal(one.weight, linear.weight * expand(like)) and consistent(one)


def test_to_empty_and_drawing_anew_make_a_layer():
    layer = nn.utils.skip_init(BlockSparseLinear, 100, 70, density=0.4)
    layer.reset_parameters()
    assert consistent(layer) and layer.density == pytest.approx(0.4, abs=0.05)
    places = layer.mask
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.equal(layer.mask, places) and consistent(layer)
    assert torch.equal(layer.data.square().sum(), layer.dense(layer.data.square()).sum())  # the padding is zero


def test_moving_it_nowhere_writes_to_nothing():
    layer = BlockSparseLinear(100, 70)
    held = [(t, t._version) for t in layer.tensors]
    layer.to("cpu").float()
    assert all(a is b and b._version == v for (a, v), b in zip(held, layer.tensors, strict=True))


def test_blocks_that_were_lost_are_asked_for():
    a, layer = BlockSparseLinear(100, 70), BlockSparseLinear(100, 70)
    layer.load_state_dict(a.to("meta").state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="own blocks were lost on the meta device; load blocks"):
        layer.load_state_dict(nn.Linear(100, 70).state_dict(), assign=True)
    with pytest.raises(UsageError, match="the weight is on the meta device"):
        BlockSparseLinear.from_dense(nn.Linear(64, 64, device="meta"), 0.5)


@pytest.mark.parametrize("assign", (False, True))
def test_on_the_meta_device_it_waits_for_its_state(assign):
    a = BlockSparseLinear(100, 70, density=0.4)
    b = BlockSparseLinear(100, 70, density=0.4, device="meta")
    if not assign:
        b = b.to_empty(device="cpu")
    b.load_state_dict(a.state_dict(), assign=assign)
    x = torch.randn(3, 100)
    b(x).sum().backward()
    a(x).sum().backward()
    assert torch.equal(a.data.grad, b.data.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda s: s.update(col=s["col"].flip(0)), "do not name each block once, in order"),
        (lambda s: s.update(crow=s["crow"] * 0), "do not count the blocks row by row"),
        (lambda s: s.update(col=s["col"] + 100), "do not name each block once"),
        (lambda s: s.update(col=s["col"][:-1]), "make the layer with the density and block shape"),
        (lambda s: (s.clear(), s.update(weight=torch.ones(3, 3))), r"weight is \(3, 3\), expected \(70, 100\)"),
        (lambda s: (s.clear(), s.update(weight=torch.ones(100, 70))), r"weight is \(100, 70\), expected \(70, 100\)"),
        (lambda s: s.update(bias=torch.ones(3)), r"bias is \(3,\), expected \(70,\)"),
        (lambda s: s.update(data=s["data"][:, :8]), r"data is \(8, 8, 32\), expected \(8, 16, 32\); make the layer"),
        (lambda s: s.update(data=s["data"].tolist()), "data is list, expected a tensor"),
        (lambda s: s.update(col=s["col"].float()), r"col is torch\.float32, expected torch\.int32"),
        (lambda s: s.update(bias=s["bias"].to("meta")), "bias is on the meta device"),
        (lambda s: s.pop("data"), "data, crow and col belong together, but there is only crow, col, bias"),
        (lambda s: s.pop("crow"), "belong together"),
    ),
)
def test_state_that_does_not_fit_is_refused_as_a_whole(change, message):
    torch.manual_seed(0)
    layer = BlockSparseLinear(100, 70, density=0.4, block_shape=(16, 32))
    state = dict(BlockSparseLinear(100, 70, density=0.4, block_shape=(16, 32)).state_dict())
    change(state)
    before = [t.clone() for t in (*layer.tensors, layer.bias)]
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, (*layer.tensors, layer.bias), strict=True))


def consistent(layer):
    """It computes with the weight that it tells of."""
    x = torch.randn(3, layer.in_features, requires_grad=True)
    y, wanted = layer(x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(y, wanted)
    (found,), (expected,) = (torch.autograd.grad(out.square().sum(), x) for out in (y, wanted))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return True


def test_a_layer_is_loaded_where_another_one_fails():
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(n, 8), BlockSparseLinear(128, 128, density=0.25)) for n in (3, 4))
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        b.load_state_dict(a.state_dict(), strict=False)
    assert torch.equal(b[1].weight, a[1].weight) and consistent(b[1])


def test_a_state_of_parameters_alone_is_for_the_places_that_there_are():
    a = BlockSparseLinear(128, 128, density=0.25)
    b, places = copy.deepcopy(a), a.mask
    a.reset_parameters()
    b.load_state_dict(dict(a.named_parameters()), strict=False)
    assert torch.equal(b.weight, a.weight) and torch.equal(b.mask, places) and consistent(b)


@pytest.mark.parametrize("assign", (False, True))
@pytest.mark.parametrize("form", (lambda t: t.long(), lambda t: t.repeat_interleave(2)[::2], lambda t: t.short()))
def test_places_of_other_integers_are_cast(assign, form):
    torch.manual_seed(0)
    a, b = (BlockSparseLinear(128, 128, density=0.25) for _ in range(2))
    state = a.state_dict()
    b.load_state_dict(state | {n: form(state[n]) for n in ("crow", "col")}, assign=assign)
    assert b.crow.dtype == b.col.dtype == torch.int32 and b.col.is_contiguous()
    assert torch.equal(b.weight, a.weight) and consistent(b)


def test_a_layer_that_shares_blocks_keeps_them_when_the_other_is_assigned_its_own():
    torch.manual_seed(0)
    a, other = (BlockSparseLinear(128, 128, density=0.25) for _ in range(2))
    b = a.tied(None)
    b.load_state_dict({k: v for k, v in other.state_dict().items() if k != "bias"}, assign=True)
    assert consistent(a) and consistent(b) and torch.equal(b.weight, other.weight)


def test_copies_and_casts():
    layer, x = BlockSparseLinear(100, 70, density=0.4), torch.randn(2, 100)
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), layer(x)) and again.data is not layer.data
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16 and layer.crow.dtype == torch.int32
    assert "density=0.417, block_shape=(32, 32)" in repr(layer)


@pytest.mark.parametrize("shape", ((50,), (3, 50), (3, 39), (3, 64), (2, 3, 1), ()))
def test_inputs_of_another_width_are_refused(shape):
    layer = BlockSparseLinear(40, 64, density=1.0, block_shape=(32, 32))
    with pytest.raises(UsageError, match="expected 40 features") as caught:
        layer(torch.randn(shape))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", (BlockSparseLinear, SemiStructuredLinear))
def test_it_is_called_as_a_linear_layer_is(kind):
    layer, x = kind(64, 64), torch.randn(3, 64)
    assert torch.equal(layer(input=x), layer(x))


def test_it_is_exported_compiled_and_traced_for_any_number_of_tokens():
    layer, any_ = BlockSparseLinear(40, 64, block_shape=(32, 32)), torch.export.Dim.DYNAMIC
    program = torch.export.export(layer, (torch.randn(2, 5, 40),), dynamic_shapes={"input": {0: any_, 1: any_}})
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    traced = torch.fx.symbolic_trace(layer)
    for shape in ((3, 9, 40), (4, 2, 40)):
        x = torch.randn(shape)
        for one in (program.module(), compiled, traced):
            assert torch.equal(one(x), layer(x))
    assert sum(n.op == "call_function" for n in traced.graph.nodes) == 1


@pytest.mark.parametrize(("inputs", "outputs"), ((0, 5), (5, 0), (0, 0)))
def test_layers_without_features(inputs, outputs):
    layer, x = BlockSparseLinear(inputs, outputs), torch.randn(2, 3, inputs, requires_grad=True)
    assert layer.weight.shape == (outputs, inputs) and layer.density == 0 and "density=0" in repr(layer)
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias)) and y.shape == (2, 3, outputs)
    y.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((outputs,), 6.0)) and x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: BlockSparseLinear(8, 8, density=0), r"density=0 was given, expected a number in \(0, 1\]"),
        (lambda: BlockSparseLinear(8, 8, density=1.5), "density=1.5 was given"),
        (lambda: BlockSparseLinear(8, 8, block_shape=(0, 3)), r"block_shape=\(0, 3\) was given"),
        (lambda: BlockSparseLinear(8, 8, block_shape=32), "block_shape=32 was given"),
        (lambda: BlockSparseLinear.from_dense(nn.ReLU(), 0.5), "a ReLU was given, expected torch.nn.Linear"),
        (lambda: BlockSparseLinear.from_dense(nn.Bilinear(2, 2, 2), 0.5), "a Bilinear was given"),
        (lambda: BlockSparseLinear.from_dense(nn.Linear(64, 64)), "needs a density"),
        (lambda: BlockSparseLinear.from_dense(nn.Linear(64, 64), 0.5, select="best"), "select='best' was given"),
        (lambda: BlockSparseLinear.from_dense(nn.Linear(64, 64), 0.5, select="activation"), "needs inputs"),
        (
            lambda: BlockSparseLinear.from_dense(nn.Linear(64, 64), 0.5, select=None),
            "a NoneType was given to select, expected ",
        ),
        (lambda: BlockSparseLinear.from_dense(nn.Linear(64, 64), mask=[["a"]]), "or a mask of numbers"),
        (lambda: BlockSparseLinear.from_dense(nn.Linear(64, 64), mask=object()), "a mask of numbers"),
        (
            lambda: BlockSparseLinear.from_dense(nn.Linear(64, 64), mask=torch.ones(2, 2, 2).to_sparse()),
            r"mask of shape \(2, 2, 2\)",
        ),
        (lambda: BlockSparseLinear.from_dense(nn.Linear(64, 64), mask=[[1], [1, 0]]), "a mask of numbers"),
        (lambda: BlockSparseLinear.from_dense(nn.Linear(64, 64), np.float32(1.5)), r"density=np\.float32\(1\.5\)"),
        (lambda: BlockSparseLinear.from_dense(nn.Linear(64, 64), True), "density=True was given"),
        (lambda: BlockSparseLinear.from_dense(nn.Linear(64, 64), torch.ones(3, 3)), r"mask of shape \(3, 3\)"),
    ),
)
def test_bad_input_is_one_line(make, message):
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
