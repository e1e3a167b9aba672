"""Plain models: patched by name, all or nothing, and restored."""

import copy

import pytest
import torch
from torch import nn

from fxopt.errors import Conflict, UsageError
from fxopt.models import build
from fxopt.sparse import BlockSparseLinear, BlockSparseModelPatcher, Spec, block_patcher, following

IDS = {"input_ids": torch.arange(5, 37).reshape(2, 16)}


def state(model):
    return [(k, id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()]


def same(model, before):
    now = state(model)
    return [(k, i) for k, i, _ in now] == [(k, i) for k, i, _ in before] and all(
        torch.equal(a[2], b[2]) for a, b in zip(now, before, strict=True)
    )


def patcher(**patterns):
    made = BlockSparseModelPatcher(guard="off")
    for name, spec in (patterns or {r"encoder\.layer\.[0-9]+\.(intermediate|output)\.dense": (0.5, (16, 16))}).items():
        made.add_pattern(name, spec)
    return made


def step(model, optimizer):
    optimizer.zero_grad()
    model(**IDS).last_hidden_state.square().sum().backward()
    optimizer.step()


def test_seeds_example_has_the_seeds_ratio():
    """The three patterns of pytorch_block_sparse's readme, on a RoBERTa: 84 → 68 million in its own count."""
    model = build("roberta-base-tiny") if "roberta-base-tiny" in names() else build("bert-base-tiny")
    made = BlockSparseModelPatcher(guard="off")
    for name in ("intermediate.dense", "output.dense", "attention.output.dense"):
        pattern = rf"(roberta\.)?encoder\.layer\.[0-9]+\.{name}".replace(".dense", r"\.dense")
        made.add_pattern(pattern, {"density": 0.5, "block": (16, 16)})
    before = model.num_parameters()
    weights = sum(x.bytes_before // 4 for x in made.patch_model(model))
    assert before - model.num_parameters() == weights // 2
    out = model(**IDS).last_hidden_state
    assert out.isfinite().all()


def names():
    from fxopt.models import describe

    return [d.name for d in describe()]


def test_density_one_is_the_model():
    model = build("bert-base-tiny").eval()
    wanted = model(**IDS).last_hidden_state
    made = BlockSparseModelPatcher(guard="off")
    made.add_pattern(".*", 1.0)
    assert len(made.patch_model(model)) == len(made.get_patchable_layers(build("bert-base-tiny")))
    torch.testing.assert_close(model(**IDS).last_hidden_state, wanted)


def test_untouched_it_comes_back_bitwise_as_the_same_objects():
    model = build("bert-base-tiny").eval()
    before, made = state(model), patcher()
    report = made.patch_model(model, inputs=IDS)
    assert len(report.changed) == 4 and not same(model, before)
    assert all(0 < x.error < 1 and 0.4 < x.energy < 0.7 for x in report)
    made.restore(model)
    assert same(model, before)


@pytest.mark.parametrize("mode", ("zeros", "merge"))
def test_trained_the_caller_chooses(mode):
    model = build("bert-base-tiny").eval()
    original, made = copy.deepcopy(model), patcher()
    made.patch_model(model)
    step(model, torch.optim.SGD(model.parameters(), lr=0.01))
    patched = copy.deepcopy(model)
    with pytest.raises(Conflict, match="changed since; say mode='zeros'"):
        made.restore(model)
    assert isinstance(model.encoder.layer[0].output.dense, BlockSparseLinear)
    made.restore(model, mode=mode)
    if mode == "zeros":
        torch.testing.assert_close(model(**IDS).last_hidden_state, patched(**IDS).last_hidden_state)
    layer, dense = patched.encoder.layer[0].output.dense, model.encoder.layer[0].output.dense
    kept = layer.mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(dense.weight[kept], layer.weight[kept])
    rest = torch.zeros(1) if mode == "zeros" else original.encoder.layer[0].output.dense.weight[~kept]
    assert torch.equal(dense.weight[~kept], rest.expand(int((~kept).sum())))


@pytest.mark.parametrize("kind", (torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad))
def test_the_optimizer_goes_along_both_ways(kind):
    model, made = build("bert-base-tiny").eval(), patcher()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=1e-3, **options)
    step(model, optimizer)
    weight = model.encoder.layer[0].output.dense.weight
    held = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[weight].items()}
    made.patch_model(model, optimizer=optimizer)
    layer = model.encoder.layer[0].output.dense
    for key, value in optimizer.state[layer.data].items():
        if isinstance(value, torch.Tensor) and value.dim() == 3:
            assert torch.equal(layer.dense(value), held[key] * (layer.weight != 0))
        else:
            assert value == held[key]
    parameters = {id(p) for p in model.parameters()}
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == parameters
    made.restore(model, optimizer=optimizer)
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(held[k])) for k, v in optimizer.state[weight].items())
    made.patch_model(model, optimizer=optimizer)
    step(model, optimizer)
    made.restore(model, mode="zeros", optimizer=optimizer)
    step(model, optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.a, self.b, self.head = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 64, bias=False)
        self.again, self.b.weight, self.head.weight = self.a, self.a.weight, self.embedding.weight

    def forward(self, ids):
        return self.head(self.b(self.again(self.a(self.embedding(ids)))))


def test_what_is_tied_stays_tied():
    model = Tied()
    before, made = state(model), patcher(**{"a|b|head": (0.5, (16, 16))})
    report = made.patch_model(model)
    assert model.a is model.again and model.a.data is model.b.data and model.b.bias is None
    assert [x.path for x in report.changed] == ["a"]
    assert "that of embedding too" in report["head"].reason and model.head.weight is model.embedding.weight
    assert torch.equal(model(torch.arange(5)), model(torch.arange(5)))
    made.restore(model)
    assert same(model, before)


def test_the_guard_keeps_what_is_slower_dense():
    model = nn.Sequential(nn.Linear(16, 16))
    made = BlockSparseModelPatcher(tokens=(1, 8))
    made.add_pattern("0", {"density": 1.0, "block": (16, 16)})
    report = made.patch_model(model)
    assert not report.changed and set(report["0"].speed) == {1, 8} and type(model[0]) is nn.Linear
    assert "no faster block-sparse" in report["0"].reason and "nothing was changed" in report.summary


def test_a_predicate_and_a_spec():
    model = build("bert-base-tiny")
    made = BlockSparseModelPatcher(guard="off")
    made.add_pattern(lambda path, weight: weight.shape[0] > weight.shape[1], Spec(0.5, (16, 16), "balanced"))
    assert {x.path for x in made.patch_model(model).changed} == {
        f"encoder.layer.{i}.intermediate.dense" for i in (0, 1)
    }


@pytest.mark.parametrize(
    ("pattern", "spec", "message"),
    (
        ("encoder.layer.1", 0.5, "matches encoder.layer.1, a BertLayer, expected torch.nn.Linear"),
        ("nothing", 0.5, "matches no linear layer; it has to match a whole path, such as encoder"),
        (r"encoder\.layer\.1", 0, r"density=0 was given"),
        ("(", 0.5, "is no regular expression"),
        ("x", {"densty": 0.5}, "its options are density, block, select, rescale"),
        ("x", {"select": "magnitude"}, "needs a density"),
        ("x", {"select": None}, "a NoneType was given to select, expected magnitude"),
        ("x", {"select": [[1, 0], [1]]}, "a list was given to select"),
        ("x", torch.ones(2, 2), "a Tensor was given as density, expected a number"),
        (3, 0.5, "expected a regular expression or a predicate"),
        (r"encoder\.layer\.0\.output\.dense", (0.5, (16, 16), torch.ones(9, 9)), "output.dense: a mask of shape"),
    ),
)
def test_bad_input_leaves_the_model_alone(pattern, spec, message):
    model = build("bert-base-tiny")
    before = state(model)
    with pytest.raises(UsageError, match=message) as caught:
        patcher(**{".*intermediate.*": 0.5}).add_pattern(pattern, spec).patch_model(model)
    assert "\n" not in str(caught.value) and same(model, before)


def test_no_pattern():
    with pytest.raises(UsageError, match="no pattern was given"):
        BlockSparseModelPatcher().patch_model(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("attach", "reason"),
    (
        (lambda m: m.register_forward_hook(lambda *a: None), "it has forward hooks, which would be lost"),
        (lambda m: m.register_state_dict_pre_hook(lambda *a: None), "it has state dict pre hooks"),
        (lambda m: setattr(m, "forward", lambda x: x), "it has a forward of its own"),
        (lambda m: m.weight.register_hook(lambda g: g), "it has hooks on its weight"),
        (lambda m: m.weight.register_post_accumulate_grad_hook(lambda p: None), "it has hooks on its weight"),
    ),
)
def test_what_would_be_lost_is_a_reason_to_stay(attach, reason):
    model = nn.Sequential(nn.Linear(64, 64))
    attach(model[0])
    assert reason in patcher(**{"0": 0.5}).patch_model(model)["0"].reason and type(model[0]) is nn.Linear


FORMS = {
    "blocks": ((0.5, (16, 16)), {}),
    "rescaled": ((0.5, (16, 16), "magnitude", True), {}),
    "calibrated": ((0.5, (16, 16), "activation", True), {"inputs": torch.randn(9, 64)}),
    "pairs": (Spec(block="2:4", rescale=True), {}),
}


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))


def patched(form):
    model, (spec, options) = small(), FORMS[form]
    with torch.no_grad():
        model[0].weight[0, 0], model[0].weight[1, 1] = float("nan"), -0.0
    made = patcher(**{"[02]": spec})
    assert len(made.patch_model(model, **options).changed) == 2
    return model, made


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("move", (lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m))
def test_what_was_only_converted_comes_back_converted(form, move):
    model, made = patched(form)
    weight = made._patched[model][0].original.weight
    wanted = move(nn.Parameter(weight.detach().clone()))
    move(model)
    made.restore(model)
    assert model[0].weight is weight and weight.dtype is wanted.dtype
    assert torch.equal(weight.detach().nan_to_num(7), wanted.detach().nan_to_num(7))
    assert model(torch.ones(2, 64, dtype=weight.dtype)).dtype is weight.dtype


@pytest.mark.parametrize("form", FORMS)
def test_an_edit_that_no_version_tells_is_an_edit(form):
    model, made = patched(form)
    model[2].tensors[0].data.mul_(3.0)
    function = model(torch.ones(2, 64))
    with pytest.raises(Conflict, match=r"^2 changed since; say mode"):
        made.restore(model)
    assert torch.equal(model(torch.ones(2, 64)).nan_to_num(7), function.nan_to_num(7))
    weight = model[2].weight.detach()
    made.restore(model, "zeros")
    assert torch.equal(model[2].weight, weight)


def test_blocks_that_were_moved_elsewhere_are_an_edit():
    model, made = patched("blocks")
    model[2].col.data.copy_(model[2].col.flip(0))
    with pytest.raises(Conflict, match=r"^2 changed since"):
        made.restore(model)


def test_the_gradient_flag_that_was_set_last_counts():
    model, made = patched("blocks")
    model.requires_grad_(False)
    made.restore(model)
    assert not any(p.requires_grad for p in model.parameters())
    made.patch_model(model)
    model[0].data.requires_grad_(True)
    model[2].data.data.mul_(2.0)
    made.restore(model, "merge")
    assert model[0].weight.requires_grad and not model[2].weight.requires_grad


def test_a_bias_that_took_the_place_of_another_stays():
    model, made = patched("blocks")
    model[0].bias = bias = nn.Parameter(torch.ones(64))
    made.restore(model)
    assert model[0].bias is bias


@pytest.mark.parametrize("born", (True, False))
def test_in_inference_mode(born):
    made = patcher(**{"[02]": (0.5, (16, 16))})
    with torch.inference_mode(born):
        model = small()
    before = state(model)
    with torch.inference_mode():
        made.patch_model(model)
        model(torch.ones(2, 64))
    assert not model[0].data.is_inference()
    with torch.inference_mode():
        made.restore(model)
    assert same(model, before)


@pytest.mark.parametrize("when", ("patch", "restore"))
def test_all_or_nothing(when, monkeypatch):
    model, made = small(), patcher(**{"[02]": (0.5, (16, 16))})
    optimizer = torch.optim.AdamW(model.parameters())
    if when == "restore":
        made.patch_model(model)
        model.half()
    before, layers, first = state(model), [*model], model[0]
    calls, put = [], block_patcher._set

    def failing(*arguments):
        if calls:
            raise RuntimeError("no memory")
        calls.append(put(*arguments))

    monkeypatch.setattr(block_patcher, "_set", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        made.patch_model(model, optimizer=optimizer) if when == "patch" else made.restore(model, optimizer=optimizer)
    assert calls and [*model] == layers and model[0] is first and same(model, before)
    monkeypatch.undo()
    if when == "patch":
        made.restore(model)  # which it knows nothing to restore of
        made.patch_model(model)
    made.restore(model)
    assert type(model[0]) is type(model[2]) is nn.Linear


def test_what_this_patcher_did_not_patch():
    model, made = patched("blocks")
    for other, its in ((copy.deepcopy(model), made), (model, patcher()), (model[0], made)):
        with pytest.raises(UsageError, match=r"this patcher did not patch this .* has a sparse layer at") as caught:
            its.restore(other)
        assert "\n" not in str(caught.value)
    made.restore(model)
    made.restore(model)


class Counting(nn.Module):
    """Leaves traces in all that calibration could: buffers, modes, the generator; calls its layer by keyword."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(64), nn.Linear(64, 64)
        self.register_buffer("calls", torch.zeros(()))
        self.norm.eval()

    def forward(self, x):
        self.calls += 1
        return self.fc(input=nn.functional.dropout(self.norm(x)))


def test_calibration_leaves_no_trace():
    model = Counting()
    inputs, before, versions = torch.randn(5, 64), state(model), [b._version for b in model.buffers()]
    chance, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    report = patcher(fc=(0.5, (16, 16), "activation")).patch_model(model, inputs=inputs)
    assert report["fc"].error > 0 and [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), chance) and [b._version for b in model.buffers()][:4] == versions
    now = {k: (i, v) for k, i, v in state(model)}
    assert all(now[k][0] == i and torch.equal(now[k][1], v) for k, i, v in before if k != "fc.weight")


def test_what_was_replaced_since_is_not_restored():
    model, made = nn.Sequential(nn.Linear(64, 64)), patcher(**{"0": 0.5})
    made.patch_model(model)
    model[0] = nn.Linear(64, 64)
    with pytest.raises(Conflict, match="0 was replaced since"):
        made.restore(model)
    with pytest.raises(UsageError, match="mode='x'"):
        made.restore(model, mode="x")


def test_following_knows_parameters_by_path():
    model = nn.Sequential(nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    with following(optimizer, model):
        model[0] = BlockSparseLinear.from_dense(model[0], 0.5)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_the_report_shows_everywhere():
    model = build("bert-base-tiny")
    report = patcher().patch_model(model, inputs=[IDS, IDS])
    for text in (str(report), report._repr_html_()):
        assert "encoder.layer.0.output.dense" in text and "4 of 4 layers are block-sparse" in text
    with pytest.raises(KeyError, match=r"no pattern named 'x'; the layers are encoder\.layer\.0"):
        report["x"]
    assert report.to_json()["layers"][0]["kept"] == report.layers[0].kept and report.layers[0].density == 0.5
