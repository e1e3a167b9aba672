import json
import subprocess
import sys

import pytest
import torch

import fxopt
from fxopt import cli
from fxopt.catalogue import catalogue
from fxopt.models import names

TINY = ("optimize", "bert-base-tiny", "--max-length", "12", "--passes", "EliminateDropout,ChangeTrueDivToMulByInverse")


@pytest.fixture
def fxopt_(monkeypatch, capsys):
    """Run the command line in this process; gives the exit code, what it printed, and its errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fxopt", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        else:
            code = 0
        said = capsys.readouterr()
        return code or 0, said.out, said.err

    return run


def test_optimize_prints_saves_and_undoes(fxopt_, tmp_path):
    folder, table = tmp_path / "saved", tmp_path / "table.json"
    code, out, err = fxopt_(*TINY, "--no-benchmark", "--save", folder, "--json", table)
    assert code == 0, err
    assert "EliminateDropout" in out and "same as eager" in out
    saved = json.loads(table.read_text())
    assert [s["rewrites"] for s in saved["graphs"]["forward"]["steps"]] == [4, 0]
    assert saved["verification"]["ok"] and not saved["fallbacks"]

    code, out, _ = fxopt_("log", folder, "--rewrites")
    assert code == 0 and "EliminateDropout()" in out and out.count("#") >= 4
    rewrite = json.loads((folder / "fxopt.json").read_text())["graphs"]["forward"][0]["rewrites"][0]
    code, out, err = fxopt_("undo", folder, "EliminateDropout", "--rewrite", rewrite)
    assert code == 0 and rewrite in out, err
    code, out, err = fxopt_("undo", folder, "0")
    assert code == 0 and "undone: EliminateDropout()" in out, err
    assert "EliminateDropout" not in fxopt_("log", folder)[1]
    code, _, err = fxopt_("undo", folder, "EliminateDropout")
    assert code == 2 and "fxopt: EliminateDropout is not in the history; `fxopt log " in err
    code, _, err = fxopt_("undo", folder, "ChangeTrueDivToMulByInvers")
    assert code == 2 and "did you mean ChangeTrueDivToMulByInverse? `fxopt log " in err
    code, _, err = fxopt_("undo", folder, "ChangeTrueDivToMulByInverse")
    assert code == 2 and "it did nothing" in err
    code, out, err = fxopt_("undo", folder, "0")
    assert code == 0 and "(number 0, which did nothing)" in out, err


def test_of_two_with_a_name_the_one_that_did_something_is_undone(fxopt_, tmp_path):
    twice = ("--passes", "EliminateDropout,EliminateNoOps,EliminateDropout", "--no-benchmark")
    assert fxopt_(*TINY[:4], *twice, "--save", tmp_path)[0] == 0
    code, out, err = fxopt_("undo", tmp_path, "EliminateDropout")
    assert code == 0 and "undone: EliminateDropout() (number 0)" in out, err
    code, _, err = fxopt_("undo", tmp_path, "EliminateDropout()")
    # made again on the graph without the first, the second has its rewrites
    assert code == 0, err


@pytest.mark.slow
def test_the_default_length_is_one_that_the_model_takes(fxopt_):
    code, out, err = fxopt_("optimize", "whisper-tiny-tiny", "--passes", "EliminateDropout", "--no-benchmark")
    assert code == 0 and "same as eager" in out, err


def test_every_step_is_timed(fxopt_, tmp_path):
    arguments = ("optimize", "mlp-tiny", "--passes", "EliminateDropout", "--num-runs", 6, "--warmup", 1)
    code, out, err = fxopt_(*arguments, "--json", tmp_path / "table.json")
    assert code == 0 and "× eager" in out, err
    assert json.loads((tmp_path / "table.json").read_text())["latency"]["ratio"] > 0


def test_too_few_rounds_give_no_ratio(fxopt_):
    arguments = ("optimize", "mlp-tiny", "--passes", "EliminateDropout", "--num-runs", 2, "--warmup", 0)
    code, out, err = fxopt_(*arguments)
    assert code == 0 and "not measurable with 2 rounds; give --num-runs more" in out, err
    assert "no difference" not in out and "→" not in out.partition("end to end")[2]


def test_a_saved_folder_is_a_transformers_folder_too(fxopt_, tmp_path):
    from transformers import AutoModel

    assert fxopt_(*TINY, "--no-benchmark", "--save", tmp_path / "saved")[0] == 0
    model, loaded = AutoModel.from_pretrained(tmp_path / "saved").eval(), fxopt.load(tmp_path / "saved")
    inputs = {"input_ids": torch.arange(12).reshape(2, 6) + 5}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    assert type(loaded) is type(model)


def test_saving_says_where_the_class_is_lost(fxopt_, tmp_path):
    arguments = ("optimize", "mlp-tiny", "--passes", "EliminateDropout", "--no-benchmark", "--save", tmp_path)
    code, out, err = fxopt_(*arguments)
    assert code == 0 and "saved as a graph: fxopt.load gives a graph module, no MLP" in out, err
    assert isinstance(fxopt.load(tmp_path), torch.fx.GraphModule)


def test_models_and_passes_are_listed(fxopt_):
    _, out, _ = fxopt_("models")
    assert all(name in out for name in names() if not name.endswith("-tiny"))
    _, out, _ = fxopt_("passes")
    assert all(name in out for name in catalogue()) and "dropout(x, training=False)  ->  x" in out


PASSES = """
from dataclasses import dataclass
import torch
from fxopt import ReversibleTransformation


@dataclass(frozen=True)
class WrongGELU(ReversibleTransformation):
    which: int = 1

    def transform(self, graph_module):
        found = [n for n in graph_module.graph.nodes if n.target is torch.ops.aten.gelu.default]
        for i, node in enumerate(found, 1):
            node.kwargs = {"approximate": "tanh" if i == self.which else "none"}


def nothing(graph_module):
    pass
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / f"passes_{tmp_path.name}.py"  # a module of its own for each test
    file.write_text(PASSES)
    return f"EliminateDropout,{file}:WrongGELU(which=2),{file}:nothing,MergeLinears"


TOLERANCE = ("--max-length", 12, "--rtol", 0, "--atol", "1e-6")


def test_bisect_finds_resumes_and_reruns(fxopt_, tmp_path, mine):
    folder = tmp_path / "run"
    code, out, err = fxopt_("bisect", "bert-base-tiny", "--passes", mine, *TOLERANCE, "--out", folder)
    assert code == 0, (out, err)
    assert "probe 1: the original: good" in out and "probe 2: all: bad" in out and "got" in out
    assert "found: WrongGELU(which=2)@encoder.layer.1.intermediate.intermediate_act_fn#" in out
    assert "hint: gelu approximate 'none' → 'tanh'" in out and "from activations.py:" in out
    result = json.loads((folder / "result.json").read_text())
    assert result["graph"] == "forward" and result["found"] and len(result["probes"]) <= 2 + 1 + 3
    assert {p.name for p in folder.iterdir()} == {"bisect.jsonl", "result.json", "repro"}
    assert f"reproduce: python {folder / 'repro' / 'repro.py'}" in out

    code, out, _ = fxopt_(
        "bisect", "bert-base-tiny", "--passes", mine, *TOLERANCE, "--out", folder, "--resume", "--json", "-"
    )
    again = json.loads(out)
    assert code == 0 and all(p["resumed"] for p in again["probes"]) and again["rewrite"] == result["rewrite"]

    for limit, expected in ((result["last_good"], 0), (result["first_bad"], 1)):
        rerun = ("optimize", "bert-base-tiny", "--passes", mine, *TOLERANCE, "--no-benchmark", "--limit", limit)
        code, out, err = fxopt_(*rerun)
        assert code == expected and "MergeLinears" not in out, (out, err)


def test_bisect_finds_nothing_where_nothing_is_wrong(fxopt_):
    code, out, err = fxopt_("bisect", "mlp-tiny", "--passes", "default")
    assert code == 1 and "not reproduced" in out, err


def test_bisect_by_script(fxopt_, tmp_path, mine):
    table = tmp_path / "found.json"
    arguments = ("bisect", "bert-base-tiny", "--passes", mine, "--max-length", 12, "--json", table)
    code, out, err = fxopt_(*arguments, "--script", "! grep -q tanh.*approximate $FXOPT_GRAPH/graph.json && "
                            "! grep -A3 '\"approximate\"' $FXOPT_GRAPH/graph.json | grep -q tanh")  # fmt: skip
    assert code == 0, (out, err)
    assert json.loads(table.read_text())["transformation"] == "WrongGELU(which=2)"
    arguments = ("bisect", "mlp-tiny", "--passes", "EliminateDropout")
    code, _, err = fxopt_(*arguments, "--script", "exit 130")
    assert code == 2 and "the script ended with exit code 130" in err
    code, _, err = fxopt_(*arguments, "--script", "no-such-command")
    assert code == 2 and "the original fails the check itself: exit code 127" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (("bisect", "mlp-tiny", "--check", "wrong"), "expected one of outputs, nan, crash, slower"),
        (("bisect", "mlp-tiny", "--check", "nan", "--script", "true"), "give one of them"),
        (("bisect", "mlp-tiny", "--script", " "), "--script is empty; give a command"),
        (("bisect", "mlp-tiny", "--script", "true", "--rtol", "1"), "--script does not use them; leave them out"),
        (("bisect", "mlp-tiny", "--check", "nan", "--atol", "0"), "--check nan does not use them; leave them out"),
        (("bisect", "mlp-tiny", "--resume"), "give --out DIR"),
        (("bisect", "mlp-tiny", "--graph", "decode"), "the model has forward"),
        (("bisect", "mlp-tiny", "--out", __file__), "--out"),
        (("optimize", "mlp-tiny", "--limit", "Nothing:3"), "names no pass of the pipeline"),
        (("optimize", "mlp-tiny", "--passes", "nowhere.py:X"), "there is no file nowhere.py"),
        (("optimize", "mlp-tiny", "--passes", "no_such_module:X"), "no_such_module cannot be imported"),
        (("optimize", "mlp-tiny", "--passes", "fxopt.transformations:FuseLinear"), "it has"),
        (("optimize", "mlp-tiny", "--passes", "fxopt.transformations:FuseLinearGELU(x=1)"), "cannot be made with x"),
    ),
)
def test_wrong_usage_of_bisect_is_one_line_and_exit_2(fxopt_, arguments, message):
    code, _, err = fxopt_(*arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (("optimize", "bert-base-uncased"), "built-in 'bert-base'"),
        (("optimize", "./nowhere"), "there is no folder './nowhere'"),
        (("optimize", "mlp-tiny", "--passes", "Fuse"), "no pass is called 'Fuse'"),
        (("optimize", "mlp-tiny", "--dtype", "int3"), "--dtype int3 is not known"),
        (("optimize", "gpt2-tiny", "--max-length", "65"), "--max-length 65 is more than the 64 positions of gpt2-tiny"),
        (("optimize", "mlp-tiny", "--device", "tpu9"), "--device tpu9 is no device"),
        (("optimize", "mlp-tiny", "--device", "meta"), "--device meta is none on which fxopt runs models"),
        (("optimize", "mlp-tiny", "--passes", "default,Xyzzy"), "no pass is called 'Xyzzy'; `fxopt passes` lists"),
        (("optimize", "mlp-tiny", "--text", "hello"), "mlp-tiny has no tokenizer"),
        (("optimize", "mlp-tiny", "--save", __file__), "is a file, expected a folder"),
        (("optimize", "mlp-tiny", "--json", "/no/such/folder/x.json"), "cannot be written"),
        (("log", "/no/such/folder"), "is no folder"),
        (("undo", "/no/such/folder", "X"), "is no folder"),
    ),
)
def test_wrong_usage_is_one_line_and_exit_2(fxopt_, arguments, message):
    code, out, err = fxopt_(*arguments)
    assert code == 2 and message in err and not out
    assert err.startswith("fxopt: ") and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize("arguments", (("optimize",), ("optimize", "mlp-tiny", "--num-runs", "0"), ("explode",)))
def test_wrong_options_exit_2(fxopt_, arguments):
    assert fxopt_(*arguments)[0] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here, so asking for one is no error")
def test_no_cuda_is_one_line(fxopt_):
    code, _, err = fxopt_("optimize", "mlp-tiny", "--device", "cuda")
    assert code == 2 and "torch sees no CUDA device" in err


def test_a_failed_verification_is_exit_1(fxopt_, monkeypatch):
    from fxopt.transformations import EliminateDropout

    def wrong(self, graph_module):
        for node in list(graph_module.graph.nodes):
            if node.target is torch.ops.aten.gelu.default:
                node.kwargs = {"approximate": "tanh"}

    monkeypatch.setattr(EliminateDropout, "transform", wrong)
    code, out, _ = fxopt_(*TINY, "--no-benchmark", "--rtol", "0", "--atol", "0")
    assert code == 1 and "undone" in out
    assert "by its rewrite EliminateDropout()@" in " ".join(out.split())


def test_the_script_is_installed():
    done = subprocess.run([sys.executable, "-m", "fxopt", "models"], capture_output=True, text=True, check=True)
    assert "bert-base" in done.stdout


def test_diff_and_log_show_what_changed(fxopt_, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, passes in ((a, "EliminateDropout"), (b, "EliminateDropout,FuseLinearGELU")):
        code, _, err = fxopt_(*TINY[:-1], passes, "--no-benchmark", "--save", folder)
        assert code == 0, err
    code, out, err = fxopt_("diff", a, b, "--json", tmp_path / "rows.json")
    assert code == 0 and "linear_gelu(" in out and "FuseLinearGELU" in out and "unchanged" in out, err
    assert "dropout = dropout(" not in out, "both results are without it"
    (rows,) = (found["rows"] for found in json.loads((tmp_path / "rows.json").read_text()).values())
    assert {tuple(r["by"]) for r in rows if r["kind"] != "same"} == {("FuseLinearGELU",)}
    code, out, err = fxopt_("diff", b, a)
    assert code == 0 and "without FuseLinearGELU" in " ".join(out.split()), err
    assert "no difference" in fxopt_("diff", a, a)[1]
    code, out, err = fxopt_("log", "-p", b, "--context", 0)
    assert code == 0 and out.index("- dropout = dropout(") < out.index("linear_gelu("), err
    code, _, err = fxopt_("diff", a, tmp_path / "none")
    assert code == 2 and "is no folder" in err


def test_diff_of_results_that_have_nothing_in_common(fxopt_, tmp_path):
    fxopt_(*TINY[:-1], "EliminateDropout", "--no-benchmark", "--save", tmp_path / "a")
    fxopt.save(fxopt.capture(torch.nn.Linear(4, 3), (torch.randn(2, 4),)), tmp_path / "b")
    code, _, err = fxopt_("diff", tmp_path / "a", tmp_path / "b")
    assert code == 2 and "have no graph in common: 'forward' and ''" in err


def test_report_and_trace(fxopt_, tmp_path):
    fast = ("mlp-tiny", "--passes", "EliminateDropout", "--num-runs", 6, "--warmup", 1)
    code, out, err = fxopt_("report", *fast, "--out", tmp_path / "r.html")
    assert code == 0 and f"report in {tmp_path / 'r.html'}" in "".join(out.splitlines()), err
    assert "EliminateDropout" in (tmp_path / "r.html").read_text()
    arguments = ("--report", tmp_path / "o.html", "--trace", tmp_path / "t.json")
    code, _, err = fxopt_("optimize", *fast, *arguments)
    assert code == 0 and (tmp_path / "o.html").is_file(), err
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    for wrong in (("--report", tmp_path), ("--trace", tmp_path / "no" / "t.json")):
        code, _, err = fxopt_("optimize", *fast, *wrong)
        assert code == 2 and wrong[0] in err and "cannot be written" in err
    code, _, err = fxopt_("report", *fast, "--out", tmp_path)
    assert code == 2 and "--out" in err
    code, _, err = fxopt_("optimize", *fast, "--no-benchmark", "--trace", tmp_path / "t.json")
    assert code == 2 and "--no-benchmark times nothing" in err


def test_sparsify_unstructured_is_saved_and_undone(fxopt_, tmp_path):
    folder, table = tmp_path / "sparse", tmp_path / "table.json"
    some = ("sparsify", "bert-base-tiny", "--unstructured", "0.9", "--pattern", r".*(intermediate|output)\.dense")
    code, out, err = fxopt_(*some, "--guard", "off", "--no-benchmark", "--save", folder, "--json", table)
    assert code == 0 and "saved to" in out, err
    layers = {layer["name"]: layer for layer in json.loads(table.read_text())[0]["layers"]}
    swapped = {name for name, layer in layers.items() if layer["swapped"]}
    assert len(swapped) == 6 and all(name.endswith((".intermediate.dense", ".output.dense")) for name in swapped)
    assert all(abs(layers[name]["sparsity"] - 0.9) < 0.01 for name in swapped)
    assert [c.signature.partition("(")[0] for c in fxopt.history(fxopt.load(folder))] == [
        "SparsifyWeights",
        "SwapSparse",
    ]
    for name in ("SwapSparse", "SparsifyWeights"):
        code, out, err = fxopt_("undo", folder, name)
        assert code == 0 and f"undone: {name}(" in out, err


def test_sparsify_by_less_than_half_forces_every_layer(fxopt_, tmp_path):
    table, some = tmp_path / "table.json", ("--unstructured", "0.3", "--guard", "off", "--no-benchmark")
    code, _, err = fxopt_("sparsify", "resnet18-tiny", *some, "--json", table)
    assert code == 0, err
    assert all(layer["swapped"] for layer in json.loads(table.read_text())[0]["layers"])


@pytest.mark.parametrize("command", [("optimize",), ("sparsify", "--unstructured", "0.9")])
def test_a_folder_that_cannot_be_made_is_said_before_the_work(fxopt_, command, tmp_path, monkeypatch):
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fxopt.frontend.load", load)
    (tmp_path / "file").touch()
    code, _, err = fxopt_(*command, "mlp-tiny", "--save", tmp_path / "file" / "result")
    assert code == 2 and "cannot be written: Not a directory; give another path" in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_sparsify_keeps_two_of_four_where_asked_to(fxopt_, tmp_path):
    table, some = tmp_path / "table.json", ("sparsify", "bert-base-tiny", "--block", "2:4", "--no-benchmark")
    forced = ("--pattern", r".*[0-9]\.output\.dense", "--guard", "off", "--json", table)
    code, out, err = fxopt_(*some, *forced, "--save", tmp_path / "sparse")
    assert code == 0 and "2 are 2:4" in out and "2 of 4" in out, err
    assert [layer["decision"] for layer in json.loads(table.read_text())[0]["layers"]] == ["2:4", "2:4"]
    code, out, err = fxopt_("undo", tmp_path / "sparse", "BlockSparsify")
    assert code == 0 and "undone: BlockSparsify(" in out, err
    code, _, err = fxopt_(*some, "--pattern", r".*intermediate\.dense")
    assert code == 2 and "expected multiples of 32 and 64 for 2:4" in err and err.count("\n") == 1


TWICE = ("--pattern", "up", "--pattern", "up", "--density", "0.5")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--pattern", ".*", "--density", "0.5", "--block", "²x32"), "--block ²x32 was given, expected numbers"),
        (("--pattern", ".*", "--density", "0.5", "--tokens", "²"), "--tokens ² was given, expected numbers"),
        (TWICE, "--pattern up was given twice"),
        ((*TWICE, "--density", "0.25"), "--pattern up was given twice"),
    ],
)
def test_sparsify_refuses_in_one_line(fxopt_, options, told):
    code, _, err = fxopt_("sparsify", "mlp-tiny", "--no-benchmark", *options)
    assert code == 2 and told in err and err.startswith("fxopt: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--unstructured", "1.5"), "expected a share from 0 to 1"),
        (("--unstructured", "0.9", "--pattern", "nothing"), "no linear layer or 2-d convolution matches nothing"),
        (("--unstructured", "0.9", "--pattern", "("), "--pattern ( is no regular expression"),
        (("--unstructured", "0.9", "--guard", "maybe"), "expected 'auto' or 'off'"),
        (("--unstructured", "0.9", "--density", "0.5"), "--density was given beside --unstructured"),
        (("--unstructured", "0.9", "--block", "4x4"), "--block was given beside --unstructured"),
        (("--unstructured", "0.9", "--tokens", "1"), "--tokens was given beside --unstructured"),
    ],
)
def test_sparsify_unstructured_refuses_in_one_line(fxopt_, options, told):
    code, _, err = fxopt_("sparsify", "bert-base-tiny", *options)
    assert code == 2 and told in err and err.startswith("fxopt: ") and err.count("\n") == 1
