"""The sparse layers under `torch.func` and forward-mode differentiation: against the dense layers of torch."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from fxopt.sparse import BlockSparseLinear, SemiStructuredLinear, SparseConv2d, SparseLinear


def emptied(layer, share=0.8):
    with torch.no_grad():
        layer.weight[torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) < share] = 0
    return layer


def blocks():
    sparse = BlockSparseLinear.from_dense(nn.Linear(30, 40), 0.5, block_shape=(16, 16))
    return sparse, sparse.to_dense(), torch.randn(5, 3, 30)


def pairs():
    sparse = SemiStructuredLinear.from_dense(nn.Linear(64, 32))
    return sparse, sparse.to_dense(), torch.randn(5, 3, 64)


def linear():
    dense = emptied(nn.Linear(20, 30))
    return SparseLinear.from_dense(dense), dense, torch.randn(5, 3, 20)


def conv2d():
    dense = emptied(nn.Conv2d(4, 6, 3, 2, 1))
    return SparseConv2d.from_dense(dense), dense, torch.randn(3, 4, 8, 8)


def dual(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, 2 * x))).tangent


def energy(layer):
    return lambda x: layer(x).sin().sum()


TRANSFORMS = {
    "grad": lambda layer, x: torch.func.grad(energy(layer))(x),
    "jacrev": lambda layer, x: torch.func.jacrev(layer)(x[0]),
    "jacfwd": lambda layer, x: torch.func.jacfwd(layer)(x[0]),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (2 * x,))[1],
    "hessian": lambda layer, x: torch.func.hessian(energy(layer))(x[:1]),
    "vmap": lambda layer, x: torch.vmap(layer)(x),
    "vmap of grad": lambda layer, x: torch.vmap(torch.func.grad(energy(layer)))(x),
    "dual": dual,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("made", [blocks, pairs, linear, conv2d])
def test_it_is_what_the_dense_layer_gives(made, name, trained):
    torch.manual_seed(0)
    sparse, dense, x = made()
    sparse.requires_grad_(trained)
    found, wanted = TRANSFORMS[name](sparse, x), TRANSFORMS[name](dense, x)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("made", [blocks, pairs, linear, conv2d])
def test_gradients_of_many_samples_by_the_parameters(made):
    torch.manual_seed(0)
    sparse, _, x = made()
    held = {n: p.detach() for n, p in sparse.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(sparse, parameters, (sample,)).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(held, x)
    for i, sample in enumerate(x):
        sparse.zero_grad()
        sparse(sample).square().sum().backward()
        for name, parameter in sparse.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad)
