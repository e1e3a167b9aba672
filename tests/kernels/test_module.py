"""The extension module: it computes what goes together as it is, and leaves all else alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxopt.kernels import native
from fxopt.sparse import BlockSparseLinear, SparseConv2d, SparseLinear
from tests.kernels.ways import take

pytestmark = pytest.mark.skipif(
    native.direct("are_plain") is None, reason=f"no native library: {native.why_not()}, or torch is too old for it"
)
CONTEXT = native.call_context()
OPTIONS = ((3, 3), (2, 1), (1, 0, 2, 1), (1, 2), 1)  # kernel size, stride, padding, dilation, groups


def linear():
    torch.manual_seed(0)
    layer = SparseLinear.from_dense(thinned(nn.Linear(20, 30)))
    x, g = torch.randn(5, 20), torch.randn(5, 30)
    return layer, x, g, [*layer._tensors()], []


def conv2d():
    torch.manual_seed(0)
    layer = SparseConv2d.from_dense(thinned(nn.Conv2d(4, 6, 3, (2, 1), (1, 2), (1, 2))))
    x = torch.randn(2, 4, 9, 10)
    return layer, x, torch.randn(2, 6, 4, 9), [*layer._tensors()], list(OPTIONS)


def thinned(layer):
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < 0.4)
    return layer


def calls():
    """By name: what each function is given after the context, all as it takes it."""
    found = {}
    for kind, make in (("sparse_linear", linear), ("sparse_conv2d", conv2d)):
        _, x, g, (values, bias, *pattern), options = make()
        found[kind] = [x, values, bias, *pattern, *options]
        found[f"{kind}_backward"] = [g, x, values, *pattern, *options, [True, True, True]]
    block = BlockSparseLinear.from_dense(nn.Linear(64, 96), 0.5, select="random", block_shape=(32, 16))
    where = [block.crow, block.col, block.index]
    x, g = torch.randn(5, 64), torch.randn(5, 96)
    found["block_linear"] = [x, block.data, block.bias, *where, 96]
    found["block_linear, transposed"] = [g, block.data, None, *where, 64, True]
    found["block_gradient"] = [g, x, block.data, *where]
    return found


NAMES = tuple(calls())


def run(name, arguments, context=CONTEXT):
    with torch.no_grad():
        return native.direct(name.partition(",")[0])(*context, *arguments)


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_ctypes_does(name, monkeypatch):
    given = calls()[name]
    found = run(name, given)
    take("ctypes", monkeypatch)
    expected = getattr(torch.ops.fxopt, name.partition(",")[0])(*given)
    both = (found, expected) if isinstance(found, tuple) else ((found,), (expected,))
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b.detach())
        assert a.is_contiguous() and a.dtype is torch.float32 and not a.requires_grad
        a.resize_(a.numel() + 1)  # memory of its own


class Own(torch.Tensor):
    pass


CHANGES = {
    "another dtype": lambda t: t.double() if t.is_floating_point() else t.long(),
    "half precision": lambda t: t.bfloat16() if t.is_floating_point() else t.short(),
    "one element more": lambda t: torch.cat([t, t[-1:]]),
    "one element less": lambda t: t[:-1],
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "another dimension": lambda t: t[None],
    "no dimension": lambda t: t.flatten()[0],
    "nothing": lambda t: t[:0],
    "a subclass": lambda t: t.as_subclass(Own),
    "meta": lambda t: t.to("meta"),
    "negated lazily": lambda t: torch._neg_view(t),
    "zeros known to be": lambda t: torch._efficientzerotensor(t.shape),
    "sparse": lambda t: t.to_sparse(),
    "a list": lambda t: t.tolist(),
    "a number": lambda t: 3,
    "None": lambda t: None,
    "an uninitialized parameter": lambda t: nn.UninitializedParameter(),
}


def fits(name, i, change):
    """Whether what this changes still goes together: a batch of another size, a layer without a bias."""
    if name.endswith(("backward", "gradient")):
        return False
    if i == 0 and change == "another dimension":
        return not name.startswith("sparse_conv2d")
    return change in ("one element more", "one element less") if i == 0 else i == 2 and change == "None"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_what_does_not_go_together(name, change, monkeypatch):
    found = {}
    for i, held in enumerate(given := calls()[name]):
        negated = change == "negated lazily" and not held.is_floating_point() if torch.is_tensor(held) else True
        if not negated:  # nobody negates an index
            given[i] = CHANGES[change](held.detach())
            found[i] = run(name, given)
            if fits(name, i, change):
                assert found[i] is not None, i
                with monkeypatch.context() as patch:
                    take("ctypes", patch)
                    expected = getattr(torch.ops.fxopt, name.partition(",")[0])(*given)
                assert torch.equal(found[i], expected.detach())
            else:
                assert found[i] is None, i
            given[i] = held
    assert found


@pytest.mark.parametrize("i, value", [
    (0, (3,)), (0, (3, 3, 3)), (0, (0, 3)), (0, (2**40, 3)), (0, "ab"), (0, 3), (0, (3, None)),
    (1, (0, 1)), (1, (-1, 1)), (1, (1, 1)), (1, (2**62, 2**62)),
    (2, (1, 1)), (2, (-1, 0, 0, 0)), (2, (2**31, 0, 0, 0)), (2, (2**62, 2**62, 0, 0)),
    (3, (0, 1)), (3, (2**31, 2**31)), (3, (9, 9)),
    (4, 0), (4, -1), (4, 3), (4, None), (4, 2**70),
])  # fmt: skip
def test_options_that_do_not_fit_are_left(i, value):
    for name in ("sparse_conv2d", "sparse_conv2d_backward"):
        given = calls()[name]
        given[len(given) - 5 - (name == "sparse_conv2d_backward") + i] = value
        try:
            assert run(name, given) is None
        except (TypeError, ValueError, OverflowError):
            assert not isinstance(value, tuple) or not all(isinstance(n, int) for n in value)


@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_arguments_is_an_error(name):
    given = calls()[name]
    for wrong in ([], given[:-2], [*given, *given]):
        with pytest.raises(TypeError, match="was given"):
            run(name, wrong)


shapes, dtypes = st.lists(st.integers(0, 4), max_size=4), st.sampled_from([torch.float32, torch.int32])
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3))
lists = st.lists(st.integers(-5, 5), max_size=5)
anything = st.one_of(scalars, lists, st.builds(torch.zeros, shapes, dtype=dtypes))


@given(
    name=st.sampled_from(NAMES),
    changed=st.dictionaries(st.integers(0, 15), anything, min_size=1, max_size=4),
)
def test_whatever_it_is_given_it_does_not_crash(name, changed):
    given = calls()[name]
    # What the pattern says is not looked at, so it is given with the kernel size that it is of.
    kernel_size = len(given) - 5 - name.endswith("backward") if "conv2d" in name else None
    for i, value in changed.items():
        if i < len(given) and i != kernel_size:
            given[i] = value
    try:
        run(name, given)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # as the number or sequence said of itself
        assert str(error)
