"""Verdicts on simulated noise: what is the same is never called faster or slower, a planted
slow-down is found, and a noisy machine is not believed."""

import math
import random
from collections import Counter

import pytest

from genai_perf.bench import timer
from genai_perf.bench.clocks import CpuTimer
from genai_perf.bench.timer import Comparison, Samples, compare_abba
from genai_perf.bench.verdict import Noise, Verdict, exit_code, judge, measure


class SimulatedMachine:
    """A clock that fake calls move: log-normal jitter, spikes upwards, and a speed that wanders."""

    def __init__(self, seed, jitter, *, spikes=0.03, wander=0.05):
        self.random, self.now = random.Random(seed), 0.0
        self.jitter, self.spikes, self.wander = jitter, spikes, wander
        self.phase = self.random.random() * 6

    def __call__(self):
        return self.now

    def work(self, seconds):
        def call():
            took = seconds * math.exp(self.random.gauss(0, self.jitter))
            took *= 1 + self.wander * math.sin(self.phase + 1.3 * self.now)
            if self.random.random() < self.spikes:
                took *= 1 + self.random.expovariate(1)
            self.now += took

        return call


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """A third of a second each with torch imported, and nothing here needs it."""
    monkeypatch.setattr(timer.gc, "collect", lambda: 0)


def verdicts(runs, factor, jitter, *, budget=15.0, **noise):
    found, longest = Counter(), 0.0
    for seed in range(runs):
        machine = SimulatedMachine(seed, jitter, **noise)
        calls = {"a": machine.work(0.005), "b": machine.work(0.005 * factor)}
        result = measure(calls, timer=CpuTimer(machine), warmup_seconds=0.02, stable_seconds=None,
                         budget_seconds=budget)  # fmt: skip
        found[result.pair("a", "b").verdict] += 1
        longest = max(longest, result.seconds)
    return found, longest


@pytest.mark.parametrize("jitter", [0.005, 0.05])
def test_of_200_runs_of_the_same_at_most_2_verdicts_are_false(jitter):
    found, _ = verdicts(200, 1.0, jitter, budget=2.0)
    assert found[Verdict.FASTER] + found[Verdict.SLOWER] <= 2
    assert jitter > 0.01 or found[Verdict.SAME] > 190


def test_a_slow_down_of_3_percent_is_found_within_15_seconds():
    found, longest = verdicts(40, 1.03, 0.01)
    assert found[Verdict.SLOWER] >= 38
    assert longest < 15.5


def test_a_noisy_machine_is_not_believed():
    found, _ = verdicts(40, 1.03, 0.3, budget=5.0, spikes=0.2, wander=0.5)
    assert found[Verdict.FASTER] == 0
    assert found[Verdict.UNDECIDED] > 30


def test_the_first_place_in_a_round_does_not_count():
    """What runs first is 20 % slower: the two orders read 0.8 and 1.2, the blocks 1."""
    first, second = (1.2, 1.0) * 20, (1.0, 1.2) * 20
    pair = compare_abba(Samples("a", first, 1), Samples("b", second, 1))
    assert pair.low == pytest.approx(1) == pair.high


def pair(low, high, pairs=30):
    return Comparison("a", "b", (low + high) / 2, low, high, 0.99, pairs)


def quiet(floor=0.001):
    return Noise("a", pair(1 - floor, 1 + floor))


@pytest.mark.parametrize(
    "low, high, floor, expected",
    [
        (0.90, 0.95, 0.001, "faster"),
        (1.05, 1.10, 0.001, "slower"),
        (0.995, 1.004, 0.001, "same"),
        (0.98, 1.01, 0.001, "undecided"),
        (1.05, 1.10, 0.06, "undecided"),  # within what the machine shows against itself
        (0.997, 0.999, 0.0001, "same"),  # a real difference, but too small to be called one
    ],
)
def test_the_law(low, high, floor, expected):
    assert judge(pair(low, high), quiet(floor)).verdict == expected


def test_too_few_pairs_or_no_noise_floor_decide_nothing():
    few = judge(pair(0.5, 0.6, pairs=28), quiet())
    assert (few.verdict, few.reason) == ("undecided", "only 28 pairs, 30 are needed")
    assert judge(pair(0.5, 0.6), None).verdict == "undecided"


def test_exit_codes():
    assert exit_code([Verdict.FASTER, Verdict.SAME]) == 0
    assert exit_code([Verdict.FASTER, Verdict.SLOWER, Verdict.UNDECIDED]) == 1
    assert exit_code([Verdict.FASTER, Verdict.UNDECIDED]) == 2
    assert exit_code([]) == 2
