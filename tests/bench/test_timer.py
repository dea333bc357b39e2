"""Timing statistics on a synthetic clock: every number is known in advance."""

import gc

import pytest

from genai_perf.bench.timer import Samples, bootstrap, compare, interleave


class FakeClock:
    """Time passes only when a fake call says so, at a speed that may drift."""

    def __init__(self, drift=0.0):
        self.now, self.drift, self.log = 0.0, drift, []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        def call():
            self.log.append(name)
            self.now += seconds * (1 + self.drift * self.now)

        return call


def run(clock, variants, **options):
    calls = {name: clock.work(name, seconds) for name, seconds in variants.items()}
    return interleave(calls, clock=clock, warmup_seconds=0, min_sample_seconds=0, **options)


def test_rounds_alternate_in_order():
    clock = FakeClock()
    run(clock, {"a": 1.0, "b": 2.0}, rounds=4)
    assert clock.log[4:] == list("abbaabba")  # after two warm-up calls each


def test_median_and_ratio_of_known_times():
    found = run(FakeClock(), {"a": 1.0, "b": 2.0, "c": 0.5}, rounds=5)
    assert found["b"].seconds == (2.0,) * 5
    assert found["b"].median == 2.0
    pair = compare(found["a"], found["c"])
    assert (pair.ratio, pair.low, pair.high, pair.pairs) == (0.5, 0.5, 0.5, 5)


def test_drift_cancels_between_the_two_orders():
    """At a steady slow-down by 40 % a round, AB alone reads 1.2, and BA alone 0.83."""
    found = run(FakeClock(drift=0.2), {"a": 0.01, "b": 0.01}, rounds=400)
    forward = Samples("b", found["b"].seconds[::2], 1)
    naive = compare(Samples("a", found["a"].seconds[::2], 1), forward)
    assert naive.low > 1  # one order alone is fooled
    pair = compare(found["a"], found["b"])
    assert pair.low < 1 < pair.high


def test_short_calls_are_timed_several_at_once():
    clock = FakeClock()
    found = interleave({"a": clock.work("a", 0.25)}, rounds=2, warmup_seconds=0,
                       min_sample_seconds=1.0, clock=clock)  # fmt: skip
    assert found["a"].calls_per_sample == 4
    assert found["a"].seconds == (0.25, 0.25)


def test_budget_ends_after_an_even_number_of_rounds():
    clock = FakeClock()
    found = run(clock, {"a": 1.0, "b": 1.0}, rounds=100, budget_seconds=9.0)
    assert len(found["a"].seconds) == 6


def test_warm_up_lasts_as_long_as_asked():
    clock = FakeClock()
    interleave({"a": clock.work("a", 1.0)}, rounds=1, warmup_seconds=5, clock=clock)
    assert len(clock.log) == 5 + 1


def test_the_collector_is_off_while_timing_and_on_again():
    states = []
    interleave({"a": lambda: states.append(gc.isenabled())}, rounds=2, warmup_seconds=0,
               min_sample_seconds=0)  # fmt: skip
    assert states[-1] is False
    assert gc.isenabled()


def test_a_failing_variant_leaves_the_collector_on():
    calls = []

    def fails_while_timed():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("third call")

    with pytest.raises(RuntimeError, match="third call"):
        interleave({"a": fails_while_timed}, warmup_seconds=0, min_sample_seconds=0)
    assert gc.isenabled()


def test_bootstrap_covers_the_true_median():
    """The 95 % interval holds the true median in about 190 of 200 samples."""
    import numpy as np

    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap(list(rng.lognormal(0.0, 0.3, size=40)), resamples=500)
        hits += low <= 1.0 <= high
    assert 180 <= hits <= 200


def test_bootstrap_is_repeatable_and_ordered():
    values = [1.0, 1.1, 0.9, 1.3, 1.05]
    low, high = bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) == (low, high)
    assert min(values) <= low <= high <= max(values)


def test_bad_input():
    with pytest.raises(ValueError, match="variants must be at least one"):
        interleave({})
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        interleave({"a": lambda: None}, rounds=0)
    with pytest.raises(ValueError, match="2 rounds"):
        compare(Samples("a", (1.0,), 1), Samples("b", (1.0, 1.0), 1))
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
        bootstrap([1.0], confidence=95)
