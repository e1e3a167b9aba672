import copy
import csv
import itertools
import json
import math
import sys

import onnx
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from transformers import PreTrainedTokenizerFast

import fxopt.pruning as P
from fxopt import cli, models
from fxopt.capture import capture
from fxopt.errors import UsageError
from fxopt.history import history
from fxopt.inputs import example_inputs
from fxopt.pruning.config import PruneConfig, run
from fxopt.store import load
from tests.transformations.test_prune_trees import Model, X, state


@pytest.fixture(scope="module")
def captured():
    return capture(Model(2), (X,))


@pytest.fixture
def gm(captured):
    return copy.deepcopy(captured)


@pytest.fixture(scope="module")
def data():
    return P.Calibration.of([torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(i)) for i in range(2)])


class TestLoop:
    def test_until_a_sparsity_and_all_the_way_back(self, gm, data):
        before, out = state(gm), gm(X)
        found = P.prune(gm, data, target_sparsity=0.3)
        assert found.sparsity >= 0.3 and found.parameters == sum(p.numel() for p in gm.parameters())
        assert len(found.removed) == len(history(gm)) and found.iterations[-1].loss > found.dense_loss == 0
        for tree in found.removed[::-1]:
            found.restore(tree)
        assert state(gm) == before and torch.equal(gm(X), out)

    def test_the_first_one_comes_back_alone(self, gm, captured, data):
        found = P.prune(gm, data, count_trees=3, by="block_influence")
        other = copy.deepcopy(captured)
        P.PruneTrees(found.removed[1:])(other)
        found.restore(found.removed[0])
        assert torch.equal(gm(X), other(X))
        with pytest.raises(UsageError, match="was not pruned"):
            found.restore(found.removed[0])

    def test_greedy_takes_the_cheapest(self, gm, data):
        known = P.trees(gm).of_kind("branch")
        deltas = P.score(gm, known, "loss_delta", data)
        found = P.prune(gm, data, count_trees=1, by="greedy", kinds=("branch",))
        assert found.removed == (min(deltas, key=deltas.get),)

    def test_a_fit_is_nearer_than_nothing_in_its_place(self, captured, data):
        losses = []
        for fit in (False, True):
            gm = copy.deepcopy(captured)
            losses.append(
                P.prune(gm, data, count_trees=2, by="magnitude", kinds=("branch",), fit=fit).iterations[-1].loss
            )
        assert losses[1] < losses[0]

    def test_what_was_fitted_is_not_fitted_again(self, gm, data):
        found = P.prune(gm, data, count_trees=99, by="magnitude", kinds=("branch", "block", "norm", "heads"), fit=True)
        left = [found.dense_parameters, *(i.parameters for i in found.iterations)]
        assert all(b < a for a, b in itertools.pairwise(left)) and len(left) > 4
        assert not any("fitted" in (t.root or "") for i in found.iterations for t in i.trees if t.id in i.removed)

    def test_a_killed_run_goes_on_where_it_was(self, captured, data, tmp_path):
        class Killed(Exception):
            pass

        def kill(done, jobs):
            asked.append((done, jobs))
            if len(asked) == 3:  # in the second round
                raise Killed

        asked = []
        first, second = copy.deepcopy(captured), copy.deepcopy(captured)
        options = {"count_trees": 3, "by": "greedy", "kinds": ("branch",), "fit": True, "directory": tmp_path}
        with pytest.raises(Killed):
            P.prune(copy.deepcopy(captured), data, progress=kill, **options)
        assert asked == [(1, 2), (2, 2), (1, 2)]
        again = []
        P.prune(first, data, progress=lambda done, jobs: again.append((done, jobs)), **options)
        assert again == [(2, 2), (1, 2), (2, 2)]
        P.prune(second, data, **{**options, "directory": None})
        assert first.code == second.code and torch.equal(first(X), second(X))

    def test_nothing_to_prune_is_said(self, data):
        gm = capture(nn.Linear(5, 3), (X,))
        found = P.prune(gm, data, count_trees=1, by="magnitude")
        assert not found.removed and "no tree was removed: of the 1 trees that are there" in repr(found)

    def test_less_than_was_asked_for_is_said(self, gm, data):
        said = []
        found = P.prune(gm, data, target_sparsity=0.99, by="magnitude", kinds=("branch",), say=said.append)
        assert found.sparsity < 0.99 and said[-1] == found.note and "name other kinds" in found.note
        again = P.prune(gm, data, count_trees=1, by="magnitude", kinds=("layer",), exclude=("embed", "head"))
        assert again.note == "all 2 trees of these kinds are excluded" and "excluded" in repr(again)

    @pytest.mark.parametrize(
        ("options", "said"),
        (
            ({}, "give one of target_sparsity"),
            ({"target_sparsity": 0.1, "count_trees": 2}, "give one of target_sparsity"),
            ({"target_sparsity": 1.5}, "no share"),
            ({"count_trees": 1, "by": "x"}, "is not known"),
        ),
    )
    def test_wrong_arguments(self, gm, data, options, said):
        with pytest.raises(UsageError, match=said):
            P.prune(gm, data, **options)

    def test_greedy_without_data_and_shared_data_are_refused(self, gm, data):
        with pytest.raises(UsageError, match="give calibration data"):
            P.prune(gm, count_trees=1)
        with pytest.raises(UsageError, match="rows of the evaluation"):
            P.prune(gm, data, count_trees=1, evaluation=data)

    def test_the_rankings(self, gm, data, tmp_path):
        found = P.prune(gm, data, count_trees=2, by="taylor")
        found.write(tmp_path / "scores.csv")
        rows = list(csv.DictReader((tmp_path / "scores_1.csv").read_text().splitlines()))
        assert [r["rank"] for r in rows] == [str(i + 1) for i in range(len(rows))]
        values = [float(r["importance"]) for r in rows if r["importance"] != "nan"]
        assert values == sorted(values) and values[0] > 0  # at the dense outputs, where the distance has no slope
        assert [r["pruning_tree"] for r in rows if r["pruned"] == "True"] == [found.removed[1]]
        told = json.loads((tmp_path / "scores_0.json").read_text())
        assert told["removed"] == [found.removed[0]]


class TestSaving:
    def test_the_pruned_work_is_gone_from_what_is_written(self, tmp_path):
        model = models.build("gpt2-tiny")
        model.config.use_cache = False
        inputs = example_inputs(model, 2, 8)
        gm = capture(model, inputs)

        def products(graph):
            return sum(n.op_type in ("MatMul", "Gemm") for n in graph.node)

        batch = P.Batch(inputs)
        P.save_pruned(gm, tmp_path / "dense", batch, ("onnx",))
        attention = next(t for t in P.trees(gm) if t.kind == "branch" and "c_attn" in (t.root or ""))
        P.PruneTrees((attention,))(gm)
        P.save_pruned(gm, tmp_path / "pruned", batch, ("fxopt", "pt2", "onnx"))
        dense, pruned = (onnx.load(tmp_path / n / "model.onnx").graph for n in ("dense", "pruned"))
        assert products(pruned) <= products(dense) - 4  # two projections, and the two products of attention
        program = torch.export.load(tmp_path / "pruned" / "model.pt2")
        called = [str(n.target) for n in program.graph.nodes]
        assert sum("addmm" in c for c in called) == 6 and sum("scaled_dot" in c for c in called) == 1
        assert not any(p in program.state_dict for p in attention.parameters)
        torch.testing.assert_close(program.module()(**inputs)["logits"], gm(**inputs)["logits"])
        again = load(tmp_path / "pruned" / "model")
        history(again).undo(0)
        assert torch.equal(again(**inputs)["logits"], capture(model, inputs)(**inputs)["logits"])

    def test_wrong_formats(self, gm, tmp_path):
        with pytest.raises(UsageError, match="format 'x'"):
            P.save_pruned(gm, tmp_path, formats=("x",))
        with pytest.raises(UsageError, match="example inputs"):
            P.save_pruned(gm, tmp_path, formats=("pt2",))


class TestConfiguration:
    def test_a_file_from_end_to_end(self, tmp_path):
        (tmp_path / "prune.toml").write_text(
            f"""
            MODEL = "gpt2-tiny"
            PRUNING_ITERATIONS = 2
            SCORE = "block_influence"
            IMPORTANCES_SAVE_PATH = "{tmp_path}/importances.csv"
            PRUNED_MODEL_SAVE_DIR = "{tmp_path}/model"
            EVALUATE = true
            EVAL_RESULTS_PATH = "{tmp_path}/results.csv"
            exclude = ["h.0"]
            """
        )
        found = run(PruneConfig.read(tmp_path / "prune.toml"), say=lambda line: None)
        assert len(found.pruned.removed) == 2
        assert not any("h.0" in t.module for t in found.pruned.iterations[0].trees)
        assert {p.name for p in tmp_path.iterdir()} >= {
            "importances_0.csv",
            "importances_1.json",
            "results.csv",
            "model",
        }
        assert found.before["distance"] == 0 < found.after["distance"]
        assert len(history(load(tmp_path / "model" / "model"))) == 2

    @pytest.mark.parametrize(
        ("said", "field"),
        (
            ({}, "model"),
            ({"model": "mlp-tiny"}, "target_sparsity"),
            ({"model": "mlp-tiny", "target_sparsity": "x"}, "target_sparsity = 'x' is no number"),
            ({"model": "mlp-tiny", "target_sparsity": 2}, "target_sparsity"),
            ({"model": "mlp-tiny", "target_sparsty": 0.5}, "did you mean target_sparsity"),
            ({"model": "mlp-tiny", "pruning_iterations": 1.5}, "pruning_iterations = 1.5 is no whole number"),
            ({"model": "mlp-tiny", "pruning_iterations": 1, "score": "x"}, "score = 'x'"),
            ({"model": "mlp-tiny", "pruning_iterations": 1, "types": ["x"]}, "types = 'x'"),
            ({"model": "mlp-tiny", "pruning_iterations": 1, "exclude": [1]}, "exclude"),
            ({"model": "mlp-tiny", "pruning_iterations": 1, "eval_results_path": "x.csv"}, "eval_results_path"),
        ),
    )
    def test_a_wrong_field_is_named_in_one_line(self, said, field):
        with pytest.raises(UsageError) as caught:
            PruneConfig.of(said)
        assert field in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.slow
    def test_lm_eval_asks_the_graph(self, tmp_path):
        pytest.importorskip("lm_eval", reason="lm_eval is not installed")
        letters = {"<eos>": 0, "<unk>": 1} | {chr(97 + i): i + 2 for i in range(26)}
        tokenizer = Tokenizer(WordLevel(letters, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Split("", "isolated")
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
        fast.save_pretrained(tmp_path / "tokenizer")
        rows = [{"question": "ab" + chr(97 + i), "choices": ["cd", "xyz"], "answer": i % 2} for i in range(6)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "letters.yaml").write_text(
            f"""
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
        )
        options = {"pruning_iterations": 2, "score": "magnitude", "evaluate": True}
        options |= {"tokenizer": str(tmp_path / "tokenizer"), "lm_eval_tasks": (str(tmp_path / "letters.yaml"),)}
        found = run(PruneConfig("gpt2-tiny", **options), say=lambda line: None)
        model = models.build("gpt2-tiny")
        right = 0
        for row in rows:
            said = []
            for choice in row["choices"]:
                ids = torch.tensor([fast(row["question"] + choice)["input_ids"]])
                log = model(ids).logits[0].detach().log_softmax(-1)
                at = range(len(row["question"]), ids.shape[1])
                said.append(sum(float(log[i - 1, ids[0, i]]) for i in at))
            right += max((0, 1), key=said.__getitem__) == row["answer"]
        assert found.before["letters/acc,none"] == pytest.approx(right / 6)
        assert set(found.after) == set(found.before)
        with pytest.raises(UsageError, match="no task of lm_eval"):
            run(PruneConfig("gpt2-tiny", **{**options, "lm_eval_tasks": ("no such task",)}), say=lambda line: None)

    def test_any_function_evaluates(self):
        config = PruneConfig("mlp-tiny", pruning_iterations=1, score="magnitude", evaluate=True)

        def nodes(gm):
            return len(gm.graph.nodes)

        found = run(config, nodes, say=lambda line: None)
        assert found.after["nodes"] < found.before["nodes"] and math.isfinite(found.before["nodes"])

    def test_the_command_line(self, tmp_path, monkeypatch, capsys):
        def fxopt(*args):
            monkeypatch.setattr(sys, "argv", ["fxopt", "prune", *args])
            with pytest.raises(SystemExit) as stopped:
                cli.main()
            return stopped.value.code or 0, *capsys.readouterr()

        code, out, _ = fxopt("mlp-tiny", "--list", "--picture", str(tmp_path / "trees.svg"))
        assert code == 0 and "pruning trees" in out
        assert (tmp_path / "trees.svg").read_text().startswith("<svg")
        code, out, said = fxopt("mlp-tiny", "--iterations", "1", "--score", "taylor", "--save", str(tmp_path / "m"))
        assert code == 0 and "1 trees removed" in out, said
        for wrong in (("mlp-tiny", "--target", "3"), ("nothing.toml",), ("mlp-tiny",)):
            code, _, said = fxopt(*wrong)
            assert code == 2 and said.count("\n") == 1 and said.startswith("fxopt: ")
