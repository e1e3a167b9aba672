"""benchmark: the statistics on synthetic latencies by a false clock, the memory meter against bytes counted by hand.

No test looks at real time.
"""

import gc
import io
import json
import math
import random
import statistics

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from fxopt.benchmark import benchmark, benchmark_many, measure, peak_memory
from fxopt.errors import BenchmarkError, UsageError
from fxopt.measurement import Comparison, Measurement, median_interval

X = torch.ones(4)


class Clock:
    """A clock that only the functions under measurement advance."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def function(self, name, latency):
        """A function that takes `latency()` seconds by this clock."""

        def call(x):
            self.order.append(name)
            self.now += latency()
            return x

        return call


def noisy(median, noise, seed):
    chance = random.Random(seed)
    return lambda: median * math.exp(chance.gauss(0, noise))


def timed(clock, a, b, **options):
    return benchmark(
        clock.function("a", a), clock.function("b", b), X, clock=clock, memory=False, min_time=0, **options
    )


# ------------------------------------------------------------------------------------------------------ statistics


def binomial_coverage(n, k):
    """How often the median lies between the k-th smallest and the k-th largest of n samples, counted by brute force."""
    inside = sum(math.comb(n, below) for below in range(k, n - k + 1))
    return inside / 2**n


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=60), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_interval_is_the_narrowest_that_covers(samples, confidence):
    low, high = median_interval(samples, confidence)
    n, ordered = len(samples), sorted(samples)
    enough = [k for k in range(1, n // 2 + 1) if binomial_coverage(n, k) >= confidence]
    if not enough:
        assert (low, high) == (0.0, math.inf)
        return
    assert (low, high) == (ordered[max(enough) - 1], ordered[n - max(enough)])
    assert low <= statistics.median(samples) <= high


@pytest.mark.parametrize(("n", "k"), [(6, 1), (10, 2), (20, 6), (50, 18), (100, 40)])
def test_interval_agrees_with_the_printed_tables(n, k):
    """Conover, Practical Nonparametric Statistics, table A3: order statistics of the 95 % interval of the median."""
    assert median_interval(range(1, n + 1)) == (k, n + 1 - k)


def test_interval_covers_as_often_as_it_says():
    draw = numpy.random.default_rng(0)
    for n in (10, 25, 60):
        hits = 0
        for _ in range(2000):
            low, high = median_interval(draw.lognormal(0.3, 1.0, n).tolist())
            hits += low <= math.exp(0.3) <= high
        assert hits / 2000 >= 0.94


def test_interval_agrees_with_a_bootstrap():
    draw = numpy.random.default_rng(1)
    samples = draw.lognormal(0, 0.2, 200)
    medians = numpy.median(draw.choice(samples, (4000, 200)), axis=1)
    low, high = median_interval(samples.tolist())
    assert numpy.percentile(medians, [2.5, 97.5]) == pytest.approx([low, high], rel=0.03)


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=30))
def test_ratio_is_the_median_of_the_rounds(pairs):
    a, b = zip(*pairs, strict=True)
    comparison = Comparison(*(Measurement(n, v, 1, None, "cpu", 1) for n, v in (("a", a), ("b", b))))
    assert comparison.ratio == pytest.approx(float(numpy.median(numpy.array(b) / numpy.array(a))))
    low, high = comparison.interval
    narrow = "no difference" if high <= 2 * low else "not measurable"
    expected = "faster" if high < 1 else "slower" if low > 1 else narrow
    assert comparison.verdict == expected
    assert comparison.a.median == pytest.approx(float(numpy.median(a)))


# ---------------------------------------------------------------------------------------------------------- rounds


def test_a_clear_difference_is_found_and_measured():
    found = timed(Clock(), noisy(2e-3, 0.1, 0), noisy(1.6e-3, 0.1, 1), rounds=200, precision=0)
    assert found.verdict == "faster" and found.interval[0] < 0.8 < found.interval[1]
    assert found.a.median == pytest.approx(2e-3, rel=0.05) and found.b.median == pytest.approx(1.6e-3, rel=0.05)
    found = timed(Clock(), noisy(1.6e-3, 0.1, 0), noisy(2e-3, 0.1, 1), rounds=200)
    assert found.verdict == "slower"


def test_equals_differ_no_more_often_than_the_confidence_allows():
    verdicts = [
        timed(Clock(), noisy(1e-3, 0.3, 2 * i), noisy(1e-3, 0.3, 2 * i + 1), rounds=40, precision=0, seed=i).verdict
        for i in range(300)
    ]
    assert verdicts.count("no difference") >= 0.92 * len(verdicts)


def test_drift_does_not_deceive():
    """The machine becomes three times slower on the way: pairs see no difference, a block of each would."""
    clock, chance = Clock(), random.Random(0)

    def drifting(speed):
        return lambda: speed * (1 + 2 * min(1.0, clock.now / 0.2)) * math.exp(chance.gauss(0, 0.02))

    assert timed(clock, drifting(1e-3), drifting(1e-3), rounds=100, precision=0).verdict == "no difference"
    assert timed(clock, drifting(1e-3), drifting(0.9e-3), rounds=100, precision=0).verdict == "faster"


def test_outliers_do_not_deceive():
    chance = random.Random(3)

    def spiky(median):
        return lambda: median * (50 if chance.random() < 0.05 else math.exp(chance.gauss(0, 0.02)))

    found = timed(Clock(), spiky(1e-3), spiky(0.8e-3), rounds=100, precision=0)
    assert found.verdict == "faster" and found.ratio == pytest.approx(0.8, rel=0.03)


def test_each_round_times_both_once_in_random_order():
    clock = Clock()
    found = timed(clock, noisy(1e-3, 0.1, 0), noisy(2e-3, 0.1, 1), rounds=100, precision=0, warmup=2)
    assert found.stopped == "all rounds made" and len(found.ratios) == 100
    pairs = [tuple(clock.order[i : i + 2]) for i in range(4, len(clock.order), 2)]
    assert len(pairs) == 100 and set(pairs) == {("a", "b"), ("b", "a")}
    assert 25 <= pairs.count(("a", "b")) <= 75
    again = Clock()
    timed(again, noisy(1e-3, 0.1, 0), noisy(2e-3, 0.1, 1), rounds=100, precision=0, warmup=2)
    assert again.order == clock.order  # by the seed


def test_it_stops_when_precise():
    found = timed(Clock(), lambda: 1e-3, lambda: 0.5e-3)
    assert found.stopped == "precise" and len(found.ratios) == 10 and found.ratio == 0.5
    loose = timed(Clock(), noisy(1e-3, 0.1, 0), noisy(1e-3, 0.1, 1), rounds=1000, precision=0.05)
    tight = timed(Clock(), noisy(1e-3, 0.1, 0), noisy(1e-3, 0.1, 1), rounds=1000, precision=0.02)
    assert loose.stopped == tight.stopped == "precise" and len(loose.ratios) < len(tight.ratios)
    low, high = tight.interval
    assert high - low <= 2 * 0.02 * tight.ratio


def test_it_stops_when_out_of_time_but_not_before_an_interval_exists():
    found = timed(Clock(), noisy(1.0, 0.2, 0), noisy(1.0, 0.2, 1), max_time=50)
    assert found.stopped == "out of time" and 20 <= len(found.ratios) <= 30
    found = timed(Clock(), lambda: 100.0, lambda: 50.0, max_time=1)
    assert found.stopped == "out of time" and len(found.ratios) == 6 and found.verdict == "faster"


def test_too_few_rounds_say_nothing():
    found = timed(Clock(), lambda: 1e-3, lambda: 1e-4, rounds=5)
    assert found.verdict == "not measurable" and found.interval == (0.0, math.inf)
    assert found.summary == found.conclusion == "not measurable with 5 rounds"
    assert found.to_json()["interval"] == [0.0, None] and "too few rounds" in found._repr_html_()


def of(a, b):
    return Comparison(*(Measurement(n, v, 1, None, "cpu", 1) for n, v in (("a", a), ("b", b))))


def test_a_wide_interval_is_not_told_as_no_difference():
    a, b = (1.0,) * 6, (0.4, 0.5, 0.9, 1.1, 3.0, 5.0)
    assert of(a, b).interval == (0.4, 5.0)
    assert of(a, b).summary == "not measurable with 6 rounds: 1.000 × a [0.400, 5.000]"
    assert "not measurable with 6 rounds" in of(a, b)._repr_html_()
    assert of(a, (0.9, 0.9, 0.9, 1.1, 1.1, 1.1)).conclusion == "no difference"


def test_the_times_that_are_told_do_not_contradict_the_ratio():
    a, b = (1.0, 1.0, 1.0, 2.0, 6.0, 7.0, 8.0), (0.9, 0.9, 7.0, 1.8, 5.4, 6.3, 7.2)
    found = of(a, b)
    assert found.ratio == pytest.approx(0.9) and found.b.median > found.a.median  # these would say the opposite
    before, after = found.typical
    assert after / before == pytest.approx(found.ratio)


def test_quick_functions_are_called_until_the_clock_can_tell():
    clock = Clock()
    found = benchmark(
        clock.function("a", lambda: 1e-6), clock.function("b", lambda: 1e-4), X,
        clock=clock, memory=False, min_time=1e-3, warmup=1, rounds=10,
    )  # fmt: skip
    assert 1000 <= found.a.calls <= 1001 and 10 <= found.b.calls <= 11
    assert found.ratio == pytest.approx(100)
    assert clock.order.count("a") == 1 + 10 * found.a.calls


def test_a_stopped_clock_is_refused():
    with pytest.raises(BenchmarkError, match="took no time"):
        timed(Clock(), lambda: 0.0, lambda: 1.0, rounds=10)


def test_many_contenders_share_the_rounds():
    clock = Clock()
    functions = {
        name: clock.function(name, noisy(t, 0.05, i)) for i, (name, t) in enumerate(zip("abc", (2, 1, 4), strict=True))
    }
    found = benchmark_many(functions, X, baseline="b", clock=clock, memory=False, rounds=50, min_time=0, max_time=1e9)
    assert [c.b.name for c in found] == ["a", "c"] and len(found) == 2 and found.baseline.name == "b"
    assert found["a"].verdict == found["c"].verdict == "slower"
    assert found["a"].ratio == pytest.approx(2, rel=0.1) and found["c"].ratio == pytest.approx(4, rel=0.1)
    rounds = [frozenset(clock.order[i : i + 3]) for i in range(9, len(clock.order), 3)]
    assert set(rounds) == {frozenset("abc")}
    assert set(found.to_json()) == {"a", "c"}
    with pytest.raises(UsageError, match="no contender is named 'd'"):
        found["d"]


def test_one_callable():
    clock = Clock()
    found = measure(
        clock.function("f", noisy(3e-3, 0.05, 0)),
        X,
        name="f",
        clock=clock,
        memory=False,
        min_time=0,
        rounds=60,
        precision=0,
    )
    low, high = found.interval
    assert len(found.latencies) == 60 and low < found.median < high and found.median == pytest.approx(3e-3, rel=0.05)


# ----------------------------------------------------------------------------------------------------------- memory

UNIT = torch.ones(256, 256)  # 256 KiB
BYTES = 256 * 256 * 4


def three_at_once(x):
    a = x + x
    b = a + a
    c = b + a  # here a, b and c live
    return c


def two_at_once(x):
    a = x + x
    b = a + a
    del a
    return b + b


@pytest.mark.parametrize(
    ("function", "peak"),
    [
        (lambda x: x, 0),
        (lambda x: x.view(-1), 0),
        (lambda x: x.add_(x), 0),
        (lambda x: x + x, BYTES),
        (lambda x: (x + x).sum(), BYTES + 4),
        (lambda x: (x + x, x + x), 2 * BYTES),
        (lambda x: x.double(), 2 * BYTES),
        (lambda x: x > x, BYTES // 4),
        (two_at_once, 2 * BYTES),
        (three_at_once, 3 * BYTES),
        (lambda x: x.expand(3, 256, 256).contiguous(), 3 * BYTES),
    ],
)
def test_peak_memory_by_hand(function, peak):
    assert [peak_memory(function, UNIT.clone()) for _ in range(3)] == [peak] * 3


def test_weights_do_not_count_and_activations_do():
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.ReLU(), nn.Linear(512, 256, bias=False))
    activation, out = 256 * 512 * 4, 256 * 256 * 4
    # `x` is rebound layer by layer: the linear's output and the ReLU's, then the ReLU's and the last output
    assert peak_memory(model, UNIT) == max(2 * activation, activation + out)
    model[1].inplace = True
    assert peak_memory(model, UNIT) == activation + out


def test_training_needs_more_memory_than_inference():
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    assert peak_memory(model, UNIT, train=True) > peak_memory(model, UNIT)


def test_memory_of_what_lives_inside_an_operator_counts():
    @torch.library.custom_op("fxopt_test::two_temporaries", mutates_args=())
    def two_temporaries(x: torch.Tensor) -> torch.Tensor:
        return three_at_once(x)

    assert peak_memory(two_temporaries, UNIT) == 3 * BYTES


def test_memory_of_both_is_in_the_comparison():
    found = benchmark(two_at_once, three_at_once, UNIT, rounds=6, max_time=0)
    assert found.memory == (2 * BYTES, 3 * BYTES)
    assert benchmark(two_at_once, three_at_once, UNIT, rounds=6, max_time=0, memory=False).memory is None


def test_memory_under_a_profiler_is_refused():
    with (
        torch.autograd.profiler.profile(use_kineto=True),
        pytest.raises(BenchmarkError, match="under torch's profiler"),
    ):
        peak_memory(two_at_once, UNIT)


# ------------------------------------------------------------------------------------------------- leaves no trace


@pytest.mark.parametrize("train", [True, False])
def test_nothing_of_the_callers_changes(train):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    model(x).sum().backward()
    state = {n: (t, t._version, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    grads = [p.grad.clone() for p in model.parameters()]
    chance, threads, collecting = torch.get_rng_state(), torch.get_num_threads(), gc.isenabled()

    benchmark(model, model, x, rounds=6, max_time=0, train=train, threads=threads)

    for name, tensor in model.state_dict(keep_vars=True).items():
        known, version, values = state[name]
        assert tensor is known and tensor._version == version and torch.equal(tensor, values)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), chance) and torch.get_num_threads() == threads
    assert gc.isenabled() is collecting and x._version == 0


def test_inference_needs_no_graph_and_training_computes_gradients():
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            seen.append(grad.shape)
            return grad * 2

    layer = nn.Linear(4, 4)
    benchmark(lambda x: Watched.apply(layer(x)), layer, torch.ones(2, 4), rounds=6, max_time=0, memory=False)
    assert not seen
    benchmark(
        lambda x: Watched.apply(layer(x)), layer, torch.ones(2, 4), rounds=6, max_time=0, memory=False, train=True
    )
    assert len(seen) >= 6 and layer.weight.grad is None


def test_threads_are_set_for_the_time_being():
    before, seen = torch.get_num_threads(), set()

    def function(x):
        seen.add(torch.get_num_threads())
        return x

    found = measure(function, X, threads=before + 1, rounds=6, max_time=0)
    assert seen == {before + 1} and torch.get_num_threads() == before and found.threads == before + 1


def test_each_has_its_own_inputs():
    x = torch.zeros(3)
    benchmark(lambda x: x.add_(1), lambda x: x, x, rounds=6, max_time=0)
    assert torch.equal(x, torch.zeros(3))


def test_positional_keyword_and_several_input_sets():
    calls = []

    def function(x, scale=1):
        calls.append((tuple(x.shape), scale))
        return x * scale

    measure(
        function, [(torch.ones(2), 3), {"x": torch.ones(5), "scale": 4}], rounds=1, warmup=1, min_time=0, memory=False
    )
    assert calls == [((2,), 3), ((5,), 4)] * 2


# -------------------------------------------------------------------------------------------------- errors, reports


def fails(x):
    raise ValueError("broken\nin two lines")


@pytest.mark.parametrize("train", [True, False])
def test_a_failing_callable_is_named(train):
    layer, collecting = nn.Linear(4, 4), gc.isenabled()
    with pytest.raises(BenchmarkError) as raised:
        benchmark(layer, fails, X, train=train)
    assert str(raised.value) == "after failed on the inputs: ValueError: broken"
    assert isinstance(raised.value.__cause__, ValueError) and gc.isenabled() is collecting


def test_training_what_has_no_parameters_is_refused():
    with pytest.raises(BenchmarkError, match="before has no output that requires a gradient"):
        benchmark(torch.relu, torch.relu, X, train=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there():
    with pytest.raises(BenchmarkError, match="is_available"):
        benchmark(torch.relu, torch.relu, X, device="cuda")


@pytest.mark.gpu
def test_cuda_events_and_memory():
    x = UNIT.cuda()
    found = benchmark(two_at_once, three_at_once, x, rounds=10)
    assert found.a.device.startswith("cuda") and found.a.median > 0
    assert found.memory == (2 * BYTES, 3 * BYTES)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"min_time": math.nan}, "min_time is nan"),
        ({"max_time": -1.0}, "max_time is -1"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_wrong_options(options, word):
    with pytest.raises(UsageError, match=word):
        benchmark(torch.relu, torch.relu, X, **options)


def test_wrong_baselines():
    with pytest.raises(UsageError, match="'x' is not among"):
        benchmark_many({"a": torch.relu}, X, baseline="x")
    with pytest.raises(UsageError, match="not among"):
        benchmark_many({}, X)


def test_reports():
    found = timed(Clock(), noisy(2e-3, 0.01, 0), noisy(1e-6, 0.01, 1), rounds=20)
    text = json.loads(json.dumps(found.to_json()))
    assert text["verdict"] == "faster" and text["rounds"] == len(text["a"]["latencies"]) == len(found.ratios)
    assert text["ratio"] == found.ratio and text["confidence"] == 0.95
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found)
    console.print(found.a)
    shown = console.export_text()
    assert "faster" in shown and "ms" in shown and "µs" in shown and "interleaved rounds on cpu" in shown
    assert found._repr_html_().count("<tr>") == 3 and "before" in found.a._repr_html_()
    assert found.summary.startswith("faster: 0.000 × before") or found.summary.startswith("faster: 0.001 × before")
    escaped = benchmark_many({"<a>": torch.relu, "b": torch.relu}, X, rounds=1, memory=False)
    assert "<a>" not in escaped._repr_html_() and "&lt;a&gt;" in escaped._repr_html_()
