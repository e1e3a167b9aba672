import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fxopt
from fxopt import store
from fxopt.errors import Conflict, StoreError
from fxopt.history import history
from fxopt.models import build
from fxopt.transformations import (
    BlockSparsify,
    ChangeTrueDivToMulByInverse,
    EliminateDropout,
    MergeLinears,
    SparsifyWeights,
    SwapSparse,
)
from tests.rewriting import DIALECTS, trace

X = (torch.randn(2, 8, generator=torch.Generator().manual_seed(0)),)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.1)
        self.b.weight = self.a.weight  # tied
        self.register_buffer("scale", torch.full((8,), 4.0))
        self.register_buffer("cache", torch.arange(8.0), persistent=False)

    def forward(self, x):
        return self.b(self.drop(self.a(x / 3) / self.scale)) / 7 + self.cache


def saved(tmp_path, dialect):
    gm = trace(Net().eval(), X, dialect)
    EliminateDropout()(gm)
    ChangeTrueDivToMulByInverse()(gm)
    history(gm)[1].rewrites[0].reverse()
    store.save(gm, tmp_path / "net")
    return gm, tmp_path / "net"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_loaded_is_what_was_saved(tmp_path, dialect):
    gm, folder = saved(tmp_path, dialect)
    loaded = store.load(folder)
    assert repr(history(loaded)) == repr(history(gm))
    assert torch.equal(loaded(*X), gm(*X))
    assert [*loaded.state_dict()] == [*gm.state_dict()]
    for side in (gm, loaded):
        history(side).checkout(0)
    assert torch.equal(loaded(*X), gm(*X))
    assert store.digest(loaded) == store.digest(gm)


def test_a_fresh_process_loads_the_same(tmp_path):
    gm, folder = saved(tmp_path, "aten")
    torch.save([X[0], gm(*X).detach()], tmp_path / "io.pt")
    code = (
        "import sys, torch, fxopt.store as s; x, y = torch.load(sys.argv[2]); "
        "torch.set_num_threads(1); assert torch.equal(s.load(sys.argv[1])(x), y)"
    )
    subprocess.run([sys.executable, "-c", code, folder, tmp_path / "io.pt"], check=True)


def test_a_graph_with_a_cache_is_loaded_in_a_fresh_process(tmp_path):
    given = {"input_ids": torch.arange(5, 37).reshape(2, 16)}
    gm = fxopt.capture(build("gpt2-tiny").eval(), given)
    BlockSparsify({".*c_fc": (0.5, (8, 8))}, guard="off").settled(gm)(gm)
    assert type(gm(**given)[1]).__name__ == "DynamicCache"
    store.save(gm, tmp_path / "saved")
    leaves = [t.detach() for t in tree_leaves(gm(**given))]
    history(gm).undo(0)
    torch.save([given, leaves, [t.detach() for t in tree_leaves(gm(**given))]], tmp_path / "io.pt")
    code = (
        "import sys, torch; from torch.utils._pytree import tree_leaves; torch.set_num_threads(1)\n"
        "import fxopt; x, sparse, dense = torch.load(sys.argv[2]); gm = fxopt.load(sys.argv[1])\n"
        "same = lambda wanted: all(map(torch.equal, tree_leaves(gm(**x)), wanted))\n"
        "assert same(sparse); fxopt.history(gm).undo(0); assert same(dense)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "saved", tmp_path / "io.pt"], check=True)
    undo = [sys.executable, "-m", "fxopt", "undo", tmp_path / "saved", "BlockSparsify"]
    assert "undone: BlockSparsify(" in subprocess.run(undo, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("old", "new", "message"),
    (
        ("transformers.modeling_outputs.BaseModelOutputWithPooling", "transformers.nothing.Gone", "cannot be imported"),
        (
            "transformers.modeling_outputs.BaseModelOutputWithPooling",
            "mine.Own",
            "cannot be loaded .NotImplementedError",
        ),
        ('"builtins.tuple"', '"builtins.tulip"', "cannot be loaded .NotImplementedError"),
        ('"name"', '"nome"', "cannot be loaded .KeyError"),
    ),
)
def test_a_graph_of_other_versions_is_one_line(old, new, message, tmp_path):
    gm = fxopt.capture(build("bert-base-tiny").eval(), {"input_ids": torch.arange(5, 21).reshape(2, 8)})
    store.save(gm, tmp_path)
    text = (tmp_path / "graph.json").read_text()
    changed = text.replace(old.replace('"', r"\""), new.replace('"', r"\""))
    changed = text.replace(old, new) if changed == text else changed
    assert changed != text
    (tmp_path / "graph.json").write_text(changed)
    journal = json.loads((tmp_path / "fxopt.json").read_text())
    journal["files"]["graph.json"] = store.file_hash(tmp_path / "graph.json")
    (tmp_path / "fxopt.json").write_text(json.dumps(journal))
    with pytest.raises(StoreError, match=message) as caught:
        store.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_is_pickled(tmp_path):
    _, folder = saved(tmp_path, "module")
    assert sorted(p.name for p in folder.iterdir()) == ["fxopt.json", "graph.json", "model.safetensors"]
    json.loads((folder / "graph.json").read_text())


def test_tied_weights_stay_tied(tmp_path):
    _, folder = saved(tmp_path, "module")
    loaded = store.load(folder)
    assert loaded.a.weight is loaded.b.weight


def test_an_interrupted_save_leaves_the_old_one(tmp_path, monkeypatch):
    gm, folder = saved(tmp_path, "aten")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_journal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save(gm, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        store.save(gm, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    (
        (lambda f: (f / "fxopt.json").unlink(), "has no fxopt.json"),
        (lambda f: (f / "graph.json").unlink(), "lacks graph.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "is not the file that was saved"),
        (lambda f: (f / "fxopt.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "fxopt.json").write_text('{"format": 99}'), "not of format"),
    ),
)
def test_a_damaged_folder_is_one_line(tmp_path, spoil, message):
    _, folder = saved(tmp_path, "aten")
    spoil(folder)
    with pytest.raises(StoreError, match=message) as caught:
        store.load(folder)
    assert "\n" not in str(caught.value)


def test_a_replay_that_differs_is_refused(tmp_path):
    _, folder = saved(tmp_path, "aten")
    entry = json.loads((folder / "fxopt.json").read_text())
    entry["graphs"][""][0]["after"] = "0" * 64
    (folder / "fxopt.json").write_text(json.dumps(entry))
    with pytest.raises(StoreError, match=r"EliminateDropout\(\) made another graph"):
        store.load(folder)


def test_a_module_of_ones_own_cannot_be_written(tmp_path):
    class Own(nn.Module):
        def forward(self, x):
            return x

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return True

    model = nn.Sequential(Own())
    gm = torch.fx.GraphModule(model, Tracer().trace(model))
    with pytest.raises(StoreError, match=r"0 is a .*Own, which cannot be written without pickle"):
        store.save(gm, tmp_path / "own")
    assert not os.path.exists(tmp_path / "own")


def journal_without(key):
    return lambda e: e.pop(key)


def journal_with(**fields):
    return lambda e: e.update(fields)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = fxopt.optimize(build("bert-base-tiny"), "EliminateDropout", generation=False)
    assert store.keeps_class(model)
    return store.save(model, folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    (
        (journal_without("graphs"), "lacks 'graphs'"),
        (journal_without("files"), "lacks 'files'"),
        (journal_without("dtype"), "lacks 'dtype'"),
        (journal_with(inputs=None), "'inputs' is None, expected dict"),
        (journal_with(order=5), "'order' is 5, expected a list of str"),
        (journal_with(order=["x"]), "'order' does not name the inputs attention_mask"),
        (journal_with(dtype="nn"), "'dtype' is 'nn', expected one of torch's"),
        (journal_with(kind="pickle"), "'kind' is 'pickle'"),
        (journal_with(kind="graph"), "'kind' is 'graph', which its graphs do not fit"),
        (journal_with(graphs={"forward": [1]}), r"graphs\['forward'\].* is \[1\], expected a list of dict"),
        (lambda e: e["graphs"]["forward"][0].pop("undone"), r"lacks .graphs\['forward'\]\[0\].undone"),
        (lambda e: e["graphs"]["forward"][0]["options"].update(nothing=1), "does not take the options nothing"),
        (journal_with(**{"class": "os:system"}), "'class' is 'os:system', expected a model class of transformers"),
        (journal_with(**{"class": "transformers.models.bert:os"}), "expected a model class of transformers"),
        (journal_with(**{"class": "transformers.models.bert:BertConfig"}), "expected a model class of transformers"),
    ),
)
def test_a_damaged_journal_is_one_line_that_names_the_key(saved_model, tmp_path, spoil, message):
    folder = shutil.copytree(saved_model, tmp_path / "spoilt")
    entry = json.loads((folder / "fxopt.json").read_text())
    spoil(entry)
    (folder / "fxopt.json").write_text(json.dumps(entry))
    with pytest.raises(StoreError, match=message) as caught:
        store.load(folder)
    assert "\n" not in str(caught.value)


def test_no_module_is_imported_for_a_class_that_is_none_of_transformers(saved_model, tmp_path, monkeypatch):
    (tmp_path / "a_trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = shutil.copytree(saved_model, tmp_path / "spoilt")
    entry = json.loads((folder / "fxopt.json").read_text()) | {"class": "a_trap:Model"}
    (folder / "fxopt.json").write_text(json.dumps(entry))
    with pytest.raises(StoreError, match="a_trap:Model"):
        store.load(folder)


def test_a_module_of_another_class_comes_back_as_its_graph(tmp_path):
    model = fxopt.optimize(nn.Sequential(nn.Linear(8, 8), nn.Dropout()), "EliminateDropout", X)
    assert not store.keeps_class(model)
    loaded = store.load(store.save(model, tmp_path))
    assert isinstance(loaded, torch.fx.GraphModule)
    assert torch.equal(loaded(*X), model(*X))


def test_a_size_that_is_fixed_and_equal_to_one_that_varies(tmp_path):
    gm = fxopt.capture(nn.Linear(2, 2), (torch.randn(2, 2),))
    fxopt.save(gm, tmp_path / "saved")
    x = torch.randn(5, 2)
    assert torch.equal(fxopt.load(tmp_path / "saved")(x), gm(x))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.left(x).relu() + self.right(x))


TRAINED = {
    "merged": ([MergeLinears()], {"edited": "carry"}),
    "sparse": ([SparsifyWeights(sparsity=0.5), SwapSparse(measure=False)], {"edited": "carry"}),
    "blocks": ([BlockSparsify({"left|out": (0.5, (4, 4))}, guard="off")], {"mode": "zeros"}),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("what", TRAINED)
def test_what_was_trained_since_is_saved_and_still_an_edit(tmp_path, dialect, what):
    made, choice = TRAINED[what]
    gm = trace(Branches().eval(), X, dialect)
    for transformation in made:
        transformation(gm)
    optimizer = torch.optim.SGD(gm.parameters(), 0.5)
    gm(*X).square().sum().backward()
    before = gm(*X).detach()
    optimizer.step()
    assert not torch.equal(gm(*X), before)
    loaded = store.load(store.save(gm, tmp_path / "net"))
    assert torch.equal(loaded(*X), gm(*X))
    with pytest.raises(Conflict, match="edited since"):
        made[-1].reverse(loaded)
    for side in (gm, loaded):
        made[-1].reverse(side, **choice)
    assert torch.equal(loaded(*X), gm(*X))
    torch.testing.assert_close(store.load(store.save(loaded, tmp_path / "again"))(*X), gm(*X), rtol=0, atol=0)


def test_an_edit_between_transformations_is_refused_by_name(tmp_path):
    gm = trace(Branches().eval(), X, "aten")
    SparsifyWeights(sparsity=0.5)(gm)
    with torch.no_grad():
        gm.get_parameter("left.weight").mul_(2)
    MergeLinears()(gm)
    with pytest.raises(StoreError, match=r"left\.weight was written to before MergeLinears\(.*undo"):
        store.save(gm, tmp_path / "net")
    assert not (tmp_path / "net").exists()
