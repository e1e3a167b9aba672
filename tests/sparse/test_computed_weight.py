"""`weight` of layers that hold a part of it: cheap to ask, computed to read, and never written to in vain."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5Config, T5EncoderModel

from fxopt.errors import UsageError
from fxopt.sparse import BlockSparseLinear, BlockSparseModelPatcher, SemiStructuredLinear
from fxopt.sparse.computed_weight import ComputedWeight


@pytest.fixture(params=(BlockSparseLinear, SemiStructuredLinear))
def layer(request):
    return request.param(64, 96)


@pytest.fixture
def computed(layer, monkeypatch):
    """How often the dense weight was made."""
    made, dense = [], type(layer).dense

    def counted(self, values=None):
        made.append(self)
        return dense(self, values)

    monkeypatch.setattr(type(layer), "dense", counted)
    return made


def test_what_it_is_is_asked_without_computing_it(layer, computed):
    weight = layer.weight
    assert isinstance(weight, torch.Tensor) and weight.dtype is torch.float32 and weight.shape == (96, 64)
    assert weight.device.type == "cpu" and weight.size(1) == 64 and weight.dim() == weight.ndim == 2
    assert len(weight) == 96 and weight.numel() == 96 * 64 and weight.is_floating_point() and not weight.is_cuda
    assert layer.half().weight.dtype is torch.float16 and not computed
    assert layer.to("meta").weight.is_meta and not computed


def test_its_elements_are_those_of_the_layer(layer):
    weight, dense = layer.weight, layer.dense()
    assert torch.equal(weight, dense) and torch.equal(weight.t() + 1, dense.t() + 1) and repr(weight) == repr(dense)
    assert weight.tolist() == dense.tolist() and (weight.detach().numpy() == dense.detach().numpy()).all()
    assert weight.requires_grad and not weight.detach().requires_grad and not weight.data.requires_grad
    assert weight.is_contiguous() and weight.stride() == (64, 1) and weight[3, 5] == dense[3, 5]
    assert torch.equal(torch.cat([weight, weight]), torch.cat([dense, dense]))
    x = torch.empty(96, 64)
    with torch.no_grad():
        x.copy_(weight)
        assert torch.equal(x, dense) and not (weight * 1).requires_grad
    assert type(weight * 1) is torch.Tensor


def test_it_is_differentiable(layer):
    x = torch.randn(3, 64)
    (found,) = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).square().sum(), layer.tensors[0])
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), layer.tensors[0])
    torch.testing.assert_close(found, wanted)


def test_it_is_saved_as_a_plain_tensor(layer):
    for again in (
        pickle.loads(pickle.dumps(layer.weight.detach())),
        torch.load(io.BytesIO(saved(layer.weight))),
        copy.deepcopy(layer.weight.detach()),
    ):
        assert type(again) is torch.Tensor and torch.equal(again, layer.weight)


def saved(tensor):
    file = io.BytesIO()
    torch.save(tensor.detach(), file)
    return file.getvalue()


WRITES = {
    "zeros_": lambda w: nn.init.zeros_(w),
    "xavier_uniform_": lambda w: nn.init.xavier_uniform_(w),
    "normal_": lambda w: nn.init.normal_(w),
    "eye_": lambda w: nn.init.eye_(w),
    "data": lambda w: w.data.mul_(0),
    "detach": lambda w: w.detach().mul_(0),
    "copy_": lambda w: w.copy_(torch.zeros(96, 64)),
    "setitem": lambda w: w.__setitem__(0, 0),
    "iadd": lambda w: w.__iadd__(1),
    "out": lambda w: torch.add(1, torch.zeros(96, 64), out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "requires_grad": lambda w: setattr(w, "requires_grad", False),
    "data.set": lambda w: setattr(w, "data", torch.zeros(96, 64)),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_refused(name, layer):
    before = layer.dense().clone()
    with torch.no_grad(), pytest.raises(UsageError, match=r"would write to a weight .* assign layer\.weight"):
        WRITES[name](layer.weight)
    assert torch.equal(layer.dense(), before)


def test_detached_it_can_be_a_leaf(layer):
    leaf = layer.weight.detach().requires_grad_()
    (leaf * 2).sum().backward()
    assert type(leaf) is torch.Tensor and torch.equal(leaf.grad, torch.full_like(leaf, 2))
    assert torch.equal(leaf, layer.dense())


def test_below_torch_functions_it_says_what_to_call(layer):
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(UsageError, match=r"call layer\.dense\(\) first"):
        layer.weight.sum()


@pytest.mark.parametrize("form", (nn.Parameter, lambda t: t, lambda t: t.double()))
def test_assigned_the_layer_takes_what_it_keeps(form, layer):
    held, given = layer.tensors[0], torch.randn(96, 64)
    layer.weight = form(given)
    assert layer.tensors[0] is held and held.dtype is torch.float32 and "weight" not in layer._parameters
    assert torch.equal(layer.weight, given * layer.kept) and held.grad_fn is None
    layer.weight = layer.weight
    assert torch.equal(layer.weight, given * layer.kept)


@pytest.mark.parametrize(
    ("given", "message"),
    (
        (torch.zeros(64, 96), r"weight was assigned \(64, 96\), expected a tensor \(96, 64\)"),
        (None, "weight was assigned NoneType"),
        (torch.zeros(96, 64, device="meta"), "weight was assigned on the meta device"),
    ),
)
def test_what_is_no_weight_cannot_be_assigned(given, message, layer):
    with pytest.raises(UsageError, match=message):
        layer.weight = given


class Asks(nn.Module):
    """As T5's feed-forward layer."""

    def __init__(self, layer):
        super().__init__()
        self.wo = layer

    def forward(self, x):
        if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x) + self.wo.weight.sum()


def test_models_that_ask_are_compiled_and_exported(layer):
    model, x = Asks(layer), torch.randn(3, 64)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_t5_never_computes_it(monkeypatch):
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50)
    model = T5EncoderModel(config).eval()
    wanted = model(torch.arange(6)[None]).last_hidden_state
    BlockSparseModelPatcher(guard="off").add_pattern(r".*\.wo", {"density": 1.0, "block": (16, 16)}).patch_model(model)
    asked = []
    monkeypatch.setattr(BlockSparseLinear, "dense", lambda self, data=None: asked.append(self))
    torch.testing.assert_close(model(torch.arange(6)[None]).last_hidden_state, wanted)
    assert not asked and type(model.encoder.block[0].layer[1].DenseReluDense.wo.weight) is ComputedWeight
