import concurrent.futures
import copy
import math
import os
from concurrent.futures.process import BrokenProcessPool

import loky
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

import fxopt.pruning as P
from fxopt.capture import capture
from fxopt.errors import FxoptError, UsageError
from fxopt.pruning.jobs import _Journal
from tests.transformations.test_prune_trees import Model, X, state


@pytest.fixture(scope="module")
def gm():
    return capture(Model(2), (X,))


@pytest.fixture(scope="module")
def data():
    gen = torch.Generator().manual_seed(1)
    return P.Calibration.of([torch.randn(2, 6, 5, generator=gen) for _ in range(3)], seed=1)


@pytest.fixture(scope="module")
def some(gm):
    return P.trees(gm).of_kind("branch", "block", "heads")


@pytest.fixture(scope="module")
def few(some):
    """Of the first block alone: a job is up to eight trees, so that each batch has two."""
    return P.Trees(tuple(t for t in some if t.kind == "branch" or "blocks.0" in t.module), some.nodes)


class TestScores:
    def test_block_influence_is_one_minus_the_cosine(self, gm, data):
        tree = next(t for t in P.trees(gm) if t.kind == "branch")
        model, expected = Model(2), []
        for batch in data.batches:
            x = model.embed(*batch.inputs)
            y = (x + model.blocks[0].attention(model.blocks[0].norm(x))).detach()
            expected.append(1 - F.cosine_similarity(x.detach().double(), y.double(), dim=-1).mean())
        found = P.score(gm, [tree], "block_influence", data)[tree.id]
        assert found == pytest.approx(float(sum(expected)) / 3, rel=1e-6)

    def test_loss_delta_is_the_loss_without_the_tree(self, gm, data, some):
        found = P.score(gm, some, "loss_delta", data)
        for tree in some:
            pruned = copy.deepcopy(gm)
            P.PruneTrees((tree,))(pruned)
            expected = P.mean_loss(pruned, data, P.distance, gm)
            assert found[tree.id] == pytest.approx(expected, rel=1e-4, abs=1e-7)

    def test_taylor_is_the_slope_of_the_loss_on_the_way_out(self, gm):
        tree = next(t for t in P.trees(gm) if t.kind == "branch")
        target = torch.tensor([1, 3])
        data = P.Calibration((P.Batch((X,), target),))

        def loss(output, batch, reference):
            return F.cross_entropy(output.mean(1), batch.target)

        model = Model(2).double().requires_grad_(False)

        def at(share):
            x = model.embed(X.double())
            branch = model.blocks[0].attention(model.blocks[0].norm(x))
            first = x + (1 - share) * branch
            y = model.blocks[0].norm2(first)
            first = first + model.blocks[0].down(F.silu(model.blocks[0].gate(y)) * model.blocks[0].up(y))
            return float(F.cross_entropy(model.head(model.blocks[1](first)).mean(1), target))

        slope = (at(1e-4) - at(-1e-4)) / 2e-4
        assert P.score(gm, [tree], "taylor", data, loss)[tree.id] == pytest.approx(abs(slope), rel=1e-3)

    def test_taylor_leaves_the_parameters_alone_when_it_fails(self, data):
        def fail(output, batch, reference):
            assert output.requires_grad
            raise ValueError("no loss")

        gm = capture(Model(1), (X,))
        for p in gm.parameters():
            p.requires_grad_(False)
        with pytest.raises(ValueError, match="no loss"):
            P.score(gm, P.trees(gm), "taylor", data, fail)
        assert not any(p.requires_grad for p in gm.parameters())

    def test_magnitude_is_the_sum_of_squares_and_a_groups_is_its_own(self, gm, some):
        found = P.score(gm, some, "magnitude")
        parameters = {n: p.detach() for n, p in gm.named_parameters()}
        for tree in some.of_kind("branch"):
            assert found[tree.id] == pytest.approx(sum(float(parameters[p].square().sum()) for p in tree.parameters))
        heads = some.of_kind("heads")[:2]
        q, k, v, o = (parameters[f"blocks.0.{n}.weight"] for n in "qkvo")
        bias = sum(float(parameters[f"blocks.0.{n}.bias"][:4].square().sum()) for n in "qkv")
        first = sum(float(w[:4].square().sum()) for w in (q, k, v)) + float(o[:, :4].square().sum()) + bias
        assert found[heads[0].id] == pytest.approx(first, rel=1e-5)

    def test_nothing_is_left_behind(self, gm, data, some):
        before = state(gm), [p.requires_grad for p in gm.parameters()]
        for by in P.SCORES:
            scores = P.score(gm, some, by, data)
            assert set(scores) == {t.id for t in some}
            undefined = [t for t in some if math.isnan(scores[t.id])]
            assert not undefined or by in ("block_influence", "angular")
            assert all(t.kind == "heads" for t in undefined)
        assert (state(gm), [p.requires_grad for p in gm.parameters()]) == before
        assert all(p.grad is None for p in gm.parameters())

    def test_per_millisecond(self, gm, data, some):
        plain, divided = (P.score(gm, some, "magnitude", data, per_ms=ms) for ms in (False, True))
        assert all(divided[n] > plain[n] for n in plain)  # a tree takes less than a millisecond

    def test_wrong_questions_are_one_line(self, gm, some):
        with pytest.raises(UsageError, match="is not known"):
            P.score(gm, some, "x")
        with pytest.raises(UsageError, match="needs calibration data"):
            P.score(gm, some, "taylor")

    def test_width_scores_need_data_and_rank_dead_units_last(self, data):
        model = Model(1)
        with torch.no_grad():
            for name in ("up", "gate"):
                getattr(model.blocks[0], name).weight[3] = 0
                getattr(model.blocks[0], name).bias[3] = 0
            model.blocks[0].down.weight[:, 3] = 0
        gm = capture(model, (X,))
        name = next(c.id for c in P.axes(gm) if c.kind == "features")
        for by in ("magnitude", "taylor", "fisher", "wanda"):
            scores = P.width_scores(gm, by, data)
            assert int(scores[name].argmin()) == 3, by
        with pytest.raises(UsageError, match="needs calibration data"):
            P.width_scores(gm, "wanda")


class TestCalibration:
    def test_the_hash_is_the_contents(self, data):
        again = P.Calibration.of([b.inputs[0].clone() for b in data.batches])
        assert again.hash == data.hash
        assert P.Calibration.of([data.batches[0].inputs[0] + 1]).hash != data.hash

    def test_the_evaluation_shares_no_row(self, data):
        with pytest.raises(UsageError, match="2 rows of the evaluation"):
            data.check_apart(P.Calibration.of([data.batches[1].inputs]))
        data.check_apart(P.Calibration.of([torch.randn(2, 6, 5)]))

    def test_a_fit_is_least_squares(self, gm, data):
        tree = next(t for t in P.trees(gm) if t.kind == "branch")
        model = Model(2)
        x = torch.cat([model.embed(*b.inputs).reshape(-1, 8) for b in data.batches]).detach().double()
        y = [model.embed(*b.inputs) for b in data.batches]
        y = torch.cat([(e + model.blocks[0].attention(model.blocks[0].norm(e))).reshape(-1, 8) for e in y])
        y = y.detach().double()
        ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        # the embedding has 5 dimensions of 8, so that many solutions fit equally well: only what they give is one
        solution = torch.linalg.lstsq(ones, y, driver="gelsd", rcond=1e-5).solution
        found = P.fit(gm, tree, data, ridge=1e-9)
        given = F.linear(x, found.weight.double(), found.bias.double())
        torch.testing.assert_close(given, ones @ solution, rtol=1e-5, atol=1e-5)
        penalty = 0.1 * x.var(0, correction=0).mean() * len(x)
        ridge = Ridge(alpha=float(penalty)).fit(x.numpy(), (y - x).numpy())
        found = P.fit(gm, tree, data, ridge=0.1)
        weight = torch.as_tensor(ridge.coef_) + torch.eye(8)
        torch.testing.assert_close(found.weight.double(), weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.bias.double(), torch.as_tensor(ridge.intercept_), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def serial(gm, data, few):
    return P.loss_deltas(gm, few, data)


class Breaking(concurrent.futures.ThreadPoolExecutor):
    """An executor that breaks once, at the second job, as a pool does of which a worker was killed."""

    def __init__(self, path):
        super().__init__(1)
        self.path, self.count = path, 0

    def submit(self, function, *args):
        self.count += 1
        if self.count == 2 and not self.path.exists():
            self.path.touch()
            broken = concurrent.futures.Future()
            broken.set_exception(BrokenProcessPool("a worker was killed"))
            return broken
        return super().submit(function, *args)

    def shutdown(self, wait=True, **options):  # threads cannot be killed: none is left to run into the next test
        super().shutdown(wait=True, cancel_futures=True)


class Killing(loky.ProcessPoolExecutor):
    """An executor of which one worker is killed in the middle."""

    def __init__(self, path):
        super().__init__(max_workers=1)
        self.path, self.count = path, 0

    def submit(self, function, *args):
        self.count += 1
        if self.count == 2 and not self.path.exists():
            self.path.touch()
            super().submit(os._exit, 1)
        return super().submit(function, *args)


class TestJobs:
    def test_serial_parallel_and_resumed_are_equal_bit_for_bit(self, gm, data, few, serial, tmp_path):
        assert P.loss_deltas(gm, few, data, workers=1, directory=tmp_path) == serial
        done = []
        assert P.loss_deltas(gm, few, data, directory=tmp_path, say=lambda i, n: done.append(i)) == serial
        assert not done  # all of it was in the journal
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            assert P.loss_deltas(gm, few, data, executor=executor) == serial

    @pytest.mark.parametrize("kind", (Breaking, pytest.param(Killing, marks=pytest.mark.slow)))
    def test_a_killed_worker_loses_nothing(self, gm, data, few, serial, tmp_path, kind):
        made = P.loss_deltas(gm, few, data, executor=lambda: kind(tmp_path / "killed"), directory=tmp_path / "run")
        assert (tmp_path / "killed").exists()
        assert made == serial

    @pytest.mark.parametrize("kind", (Breaking, pytest.param(Killing, marks=pytest.mark.slow)))
    def test_a_broken_executor_of_ones_own_is_said_and_the_rest_is_kept(self, gm, data, few, serial, tmp_path, kind):
        executor = kind(tmp_path / "killed")
        with pytest.raises(FxoptError, match="the executor broke"):
            P.loss_deltas(gm, few, data, executor=executor, directory=tmp_path / "run")
        executor.shutdown()
        assert P.loss_deltas(gm, few, data, directory=tmp_path / "run") == serial

    def test_a_torn_line_of_the_journal_is_left_out(self, tmp_path):
        path = tmp_path / "scores.jsonl"
        journal = _Journal(path)
        journal.write("a", [0.1, -2.5])
        path.write_text(path.read_text() + '{"job": "b", "los')
        assert _Journal(path).known == {"a": [0.1, -2.5]}

    def test_wrong_arguments(self, gm, data, few, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match="expected a folder"):
            P.loss_deltas(gm, few, data, directory=tmp_path / "file")
        with pytest.raises(UsageError, match="beside an executor"):
            P.loss_deltas(gm, few, data, executor=concurrent.futures.ThreadPoolExecutor(1), workers=1)
        with pytest.raises(UsageError, match="cannot be found by a worker"):
            P.loss_deltas(gm, few, data, lambda o, b, r: o.mean(), workers=1)

    @pytest.mark.slow
    def test_dask(self, gm, data, few, tmp_path):
        from distributed import Client

        with Client(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as client:
            found = P.loss_deltas(gm, few, data, executor=client.get_executor(), directory=tmp_path)
        assert found == P.loss_deltas(gm, few, data)
