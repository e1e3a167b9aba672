import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxopt.transformations.fold_layer_norm_affine import FoldLayerNormAffine
from tests.rewriting import rewrites, unchanged

X = (torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)),)


class Net(nn.Module):
    def __init__(self, bias=True, norm_bias=True, heads=1, shape=8):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(shape, bias=norm_bias)
        nn.init.normal_(self.norm.weight)
        if norm_bias:
            nn.init.normal_(self.norm.bias)
        self.heads = nn.ModuleList(nn.Linear(8, 8, bias=bias) for _ in range(heads))

    def forward(self, x):
        y = self.norm(x)
        return tuple(head(y) for head in self.heads)


def test_scale_and_shift_go_into_the_linear_layer():
    after = "%0 = layer_norm(x, [8])\n%1 = linear(%0, heads.0.weight, heads.0.bias)\nreturn %1"
    found = rewrites(FoldLayerNormAffine(), Net(), X, after, count=1, rtol=1e-5, atol=1e-5)
    for gm in found.values():
        assert not any(name.startswith("norm") for name in gm.state_dict())


def test_all_users_get_it():
    rewrites(FoldLayerNormAffine(), Net(heads=3), X, None, count=1, atol=1e-5)


def test_a_linear_layer_without_bias_gets_one():
    rewrites(FoldLayerNormAffine(), Net(bias=False), X, None, count=1, atol=1e-5)


def test_no_shift_leaves_the_bias():
    rewrites(FoldLayerNormAffine(), Net(norm_bias=False), X, None, count=1, atol=1e-5)


def test_half_precision():
    x = (X[0].bfloat16(),)
    rewrites(FoldLayerNormAffine(), Net().bfloat16(), x, None, count=1, rtol=5e-2, atol=5e-2)


def test_a_module_called_twice_keeps_its_weight_for_the_other():
    class Twice(Net):
        def forward(self, x):
            return self.heads[0](self.norm(x)) + self.heads[0](x)

    rewrites(FoldLayerNormAffine(), Twice(), X, None, atol=1e-5)


def test_tied_weights_are_untied_in_the_graph_alone():
    class Tied(Net):
        def __init__(self):
            super().__init__(heads=2)
            self.heads[1].weight = self.heads[0].weight

        def forward(self, x):
            return self.heads[0](self.norm(x)) + self.heads[1](x)

    rewrites(FoldLayerNormAffine(), Tied(), X, None, atol=1e-5)


class Other(Net):
    def forward(self, x):
        y = self.norm(x)
        return self.heads[0](y) + y


class AsWeight(Net):
    def forward(self, x):
        return F.linear(x, self.norm(x)[0])


class Computed(Net):
    def forward(self, x):
        return F.linear(self.norm(x), self.heads[0].weight * 2)


class Output(Net):
    def forward(self, x):
        y = self.norm(x)
        return self.heads[0](y), y


class Planes(Net):
    def forward(self, x):
        return self.heads[0](self.norm(x))


def test_near_misses():
    fold = FoldLayerNormAffine()
    unchanged(fold, Other(), X, "add reads it too")
    unchanged(fold, Output(), X, "output reads it too")
    unchanged(fold, AsWeight(), X, "reads it too, which is no linear layer")
    unchanged(fold, Computed(), X, "the weight of linear is computed")
    unchanged(fold, Planes(shape=(3, 8)), X, "it normalises 2 dimensions")


@given(st.integers(1, 7), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_folded_is_the_same(inputs, outputs, bias, norm_bias, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.LayerNorm(inputs, bias=norm_bias), nn.Linear(inputs, outputs, bias)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    gm = torch.fx.symbolic_trace(model.eval())
    x = torch.randn(4, inputs, dtype=torch.double)
    torch.testing.assert_close(FoldLayerNormAffine()(gm)(x), model(x), rtol=1e-9, atol=1e-9)
