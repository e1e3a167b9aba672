"""Layers call their kernels past the dispatcher where nobody looks; whoever looks sees the operator."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.kernels.registration import is_plain
from tests.kernels.test_functorch import blocks, conv2d, linear, pairs

LAYERS = {
    "block_linear": blocks,
    "sparse_linear": linear,
    "sparse_conv2d": conv2d,
    "semi_structured_linear": pairs,
}


@pytest.fixture(params=LAYERS)
def made(request):
    torch.manual_seed(0)
    return (request.param, *LAYERS[request.param]())


class Seen:
    def __init__(self):
        super().__init__()
        self.seen = []

    def see(self, func, types, args=(), kwargs=None):
        self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


class Dispatched(Seen, TorchDispatchMode):
    __torch_dispatch__ = Seen.see


class Called(Seen, TorchFunctionMode):
    __torch_function__ = Seen.see


@pytest.mark.parametrize("mode", [Dispatched, Called])
@pytest.mark.parametrize("trained", [True, False])
def test_modes_see_the_operator(made, mode, trained):
    name, layer, _, x = made
    expected = layer(x)
    with mode() as watching, torch.set_grad_enabled(trained):
        y = layer(x)
    assert [func for func, _ in watching.seen].count(getattr(torch.ops.fxopt, name).default) == 1
    assert torch.equal(y, expected)


@pytest.mark.parametrize("trained", [True, False])
def test_a_profile_tells_the_operator(made, trained):
    name, layer, _, x = made
    with torch.profiler.profile() as profile, torch.set_grad_enabled(trained):
        layer(x)
    assert f"fxopt::{name}" in {event.key for event in profile.key_averages()}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the layer compares the size of what it is given
@pytest.mark.parametrize("trained", [True, False])
def test_a_trace_computes_with_what_it_is_given(made, trained):
    _, layer, _, x = made
    with torch.set_grad_enabled(trained):
        traced = torch.jit.trace(layer.eval(), x, check_trace=False)
        other = torch.randn_like(x)
        assert torch.equal(traced(other), layer(other))


def test_a_subclass_of_tensor_stays_one(made):
    class Own(torch.Tensor):
        pass

    _, layer, _, x = made
    with torch.no_grad():
        assert type(layer(x.as_subclass(Own))) is Own
    assert not is_plain(x.as_subclass(Own))


def test_gradients_by_either_way_are_the_same(made):
    name, layer, _, x = made
    operator = getattr(torch.ops.fxopt, name).default
    x = x.requires_grad_()
    wanted = [x, *layer.parameters()]

    def gradients(y):
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        return [y, *first, *second]

    with Called() as watching:
        layer(x)
    (arguments,) = [given for func, given in watching.seen if func is operator]
    for found, expected in zip(gradients(layer(x)), gradients(operator(*arguments)), strict=True):
        assert torch.equal(found, expected)


def test_what_is_written_to_before_the_backward_is_refused(made):
    _, layer, _, x = made
    loss = layer(x).sum()
    with torch.no_grad():
        next(layer.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_parameter_may_be_parametrized(made):
    _, layer, dense, x = made
    twice = copy.deepcopy(layer)
    parametrize.register_parametrization(twice, "bias", Twice())  # not `values`: torch cannot hold that name
    bias = layer.bias.detach().view(-1, 1, 1) if isinstance(dense, nn.Conv2d) else layer.bias.detach()
    with torch.no_grad():
        torch.testing.assert_close(twice(x), layer(x) + bias)
    twice(x).sum().backward()
    assert twice.parametrizations.bias.original.grad is not None


def test_replicas_hold_their_tensors_as_attributes(made):
    _, layer, _, x = made
    replica = layer._replicate_for_data_parallel()
    for name, held in (*layer.named_parameters(), *layer.named_buffers()):
        replica._parameters.pop(name, None)
        replica._buffers.pop(name, None)
        object.__setattr__(replica, name, held)
    assert torch.equal(replica(x), layer(x))


def negated(x):
    return torch._neg_view(x)


def conjugated(x):
    return torch.complex(torch.zeros_like(x), x).conj().imag  # negated lazily, with gaps


def zeros(x):
    return torch._efficientzerotensor(x.shape)


@pytest.mark.parametrize("lazily", [negated, conjugated, zeros])
def test_what_is_not_what_it_holds_is_resolved(made, lazily):
    _, layer, _, x = made
    lazy = lazily(x)
    plain = torch.zeros_like(x) if lazily is zeros else -x
    with torch.no_grad():
        assert torch.equal(layer(lazy), layer(plain))
    x.requires_grad_()
    y = layer(x)
    wanted = [x, *layer.parameters()]
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, wanted, lazily(g), retain_graph=True)
    expected = torch.autograd.grad(y, wanted, torch.zeros_like(g) if lazily is zeros else -g)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_many_gradients_at_once(made):
    _, layer, _, x = made
    x = x.detach().requires_grad_()
    y = layer(x)
    many = torch.randn(3, *y.shape)
    (found,) = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)
    for one, g in zip(found, many, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(y, x, g, retain_graph=True)[0])
    first = x.detach()[:1]
    jacobians = [torch.autograd.functional.jacobian(layer, first, vectorize=v) for v in (True, False)]
    torch.testing.assert_close(*jacobians)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_may_be_written_to(made, dtype):
    _, layer, _, x = made
    layer, x = layer.to(dtype), x.to(dtype)
    expected = layer(x).relu()
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        y = nn.Sequential(layer, nn.ReLU(inplace=True))(given)
        torch.testing.assert_close(y, expected)
        y.sum().backward()


def test_its_node_is_named_after_the_operator(made):
    name, layer, _, x = made
    assert name in layer(x).grad_fn.name()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_inputs_of_other_layouts(layout):
    torch.manual_seed(0)
    layer = linear()[0]
    x = torch.randn(4, 20)
    with torch.no_grad():
        y = layer(getattr(x, layout)())
        torch.testing.assert_close(y if y.layout is torch.strided else y.to_dense(), layer(x))
