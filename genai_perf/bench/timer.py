"""Timing variants side by side: in turn within one run, compared round by round.

One round calls every variant once, and the next round calls them in the opposite order (A B, B A:
"ABBA" with two variants), so that a machine that speeds up or slows down hits all alike and a
linear drift cancels. Ratios are formed inside a round, never between runs.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import numpy as np

from .._checks import fail
from .clocks import CpuTimer, Timer

MIN_ROUNDS = 3
# Called with the number of the round, the order, and seconds by name.
OnRound = Callable[[int, list[str], dict[str, float]], None]
# Warm-up ends once the fastest calls of two stretches in a row agree this well.
STABLE_WITHIN = 0.02
_STRETCH = 3  # calls, at least


@dataclass(frozen=True)
class Samples:
    """The raw times of one variant, none dropped: `seconds[i]` per call in round i."""

    name: str
    seconds: tuple[float, ...]
    calls_per_sample: int

    @property
    def median(self) -> float:
        return median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """Time of a candidate over time of a baseline: median of the ratios of each round.

    `low` and `high` bound the ratio at `confidence` by a percentile bootstrap over rounds; below 1
    the candidate is faster.
    """

    baseline: str
    candidate: str
    ratio: float
    low: float
    high: float
    confidence: float
    pairs: int


@dataclass(frozen=True)
class WarmUp:
    """How many calls fill one sample, and how the warm-up went."""

    calls_per_sample: int
    calls: int
    seconds: float
    stable: bool


class Interleaver:
    """Variants warmed up once, then timed round after round, for as many rounds as asked.

    Args:
        variants: name -> what to call.
        timer: how a sample is taken; None: the processor's clock.
        warmup_seconds: each variant is first called for this long, and at least twice.
        stable_seconds: the warm-up goes on until two stretches of calls agree to 2 %, at most to
            this; None: it does not wait for that.
        min_sample_seconds: calls shorter than this are timed several at once, so that the clock's
            resolution does not matter; the sample is their mean.
        before: called before every sample, outside of its time: to flush a cache, say.
        on_round: called after each round with its number, the order, and seconds by name.
    """

    def __init__(self, variants: Mapping[str, Callable[[], object]], *, timer: Timer | None = None,
                 warmup_seconds: float = 0.2, stable_seconds: float | None = None,
                 min_sample_seconds: float = 0.005, before: Callable[[], object] | None = None,
                 on_round: OnRound | None = None):  # fmt: skip
        if not variants:
            fail("interleave", "variants", "at least one", "none")
        self.variants, self.timer = dict(variants), timer or CpuTimer()
        self.before, self.on_round = before, on_round
        self.warm = {
            name: _warm_up(call, self.timer, warmup_seconds, stable_seconds, min_sample_seconds)
            for name, call in self.variants.items()
        }
        self.prepared = {
            name: self.timer.prepare(call, self.warm[name].calls_per_sample)
            for name, call in self.variants.items()
        }
        self.seconds: dict[str, list[float]] = {name: [] for name in self.variants}
        gc.collect()

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def run(self, rounds: int, budget_seconds: float = math.inf) -> int:
        """Up to `rounds` more; none starts after the budget, but 3, and an even number above."""
        with _no_collection():
            start = self.timer.now()
            for done in range(rounds):
                even = self.rounds >= MIN_ROUNDS and self.rounds % 2 == 0
                if even and self.timer.now() - start > budget_seconds:
                    return done
                self._round()
        return rounds

    def _round(self) -> None:
        names = list(self.variants)
        order = names if self.rounds % 2 == 0 else names[::-1]
        handles = {}
        for name in order:
            if self.before:
                self.before()
            handles[name] = self.timer.sample(self.prepared[name])
        found = {name: self.timer.seconds(handles[name]) for name in order}
        for name, value in found.items():
            self.seconds[name].append(value)
        if self.on_round:
            self.on_round(self.rounds, order, found)

    def samples(self) -> dict[str, Samples]:
        return {
            name: Samples(name, tuple(values), self.warm[name].calls_per_sample)
            for name, values in self.seconds.items()
        }


def interleave(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warmup_seconds: float = 0.2,
    min_sample_seconds: float = 0.005,
    budget_seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Samples]:
    """Time every variant in turn, round after round, in alternating order.

    Args:
        variants: name -> what to call.
        rounds: samples of each variant; fewer if the budget ends first (at least 3, an even number
            above that so that both orders weigh the same).
        warmup_seconds, min_sample_seconds: see `Interleaver`.
        budget_seconds: no round starts after this much time, warm-up not counted.
        clock: seconds, monotonic.
        on_round: called with the number of rounds done.

    Returns:
        name -> Samples, in the order of `variants`.

    Raises:
        ValueError: no variants, or rounds below 1.
    """
    if rounds < 1:
        fail("interleave", "rounds", "at least 1", rounds)
    run = Interleaver(
        variants,
        timer=CpuTimer(clock),
        warmup_seconds=warmup_seconds,
        min_sample_seconds=min_sample_seconds,
        on_round=on_round and (lambda done, order, seconds: on_round(done)),
    )
    run.run(rounds, budget_seconds)
    return run.samples()


def compare(
    baseline: Samples,
    candidate: Samples,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """The ratio candidate / baseline of samples taken in the same rounds, with its interval.

    Raises:
        ValueError: the two do not have the same number of rounds.
    """
    ratios = _ratios(baseline, candidate)
    return _summary(baseline, candidate, ratios, 1, confidence, resamples, seed)


def compare_abba(
    baseline: Samples,
    candidate: Samples,
    *,
    confidence: float = 0.99,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Like `compare`, but over ABBA blocks: the geometric mean of the ratios of two rounds.

    What comes first in a round may run slower (a cache that the other left, a clock that fell);
    the two orders then read high and low, and only their mean says which variant is faster. A last
    round without a partner is not used.

    Raises:
        ValueError: the two do not have the same number of rounds, or fewer than two.
    """
    blocks = abba_blocks(baseline, candidate)
    if not blocks:
        fail("compare_abba", candidate.name, "timed in at least 2 rounds", len(baseline.seconds))
    return _summary(baseline, candidate, blocks, 2, confidence, resamples, seed)


def _summary(baseline: Samples, candidate: Samples, ratios: list[float], rounds: int,
             confidence: float, resamples: int, seed: int) -> Comparison:  # fmt: skip
    """The median of ratios, each over so many rounds, and its interval."""
    low, high = bootstrap(ratios, confidence=confidence, resamples=resamples, seed=seed)
    return Comparison(baseline.name, candidate.name, median(ratios), low, high, confidence,
                      rounds * len(ratios))  # fmt: skip


def abba_blocks(baseline: Samples, candidate: Samples) -> list[float]:
    """The geometric means of candidate / baseline over two rounds each, first to last."""
    ratios = _ratios(baseline, candidate)
    return [math.sqrt(a * b) for a, b in zip(ratios[::2], ratios[1::2], strict=False)]


def _ratios(baseline: Samples, candidate: Samples) -> list[float]:
    if len(baseline.seconds) != len(candidate.seconds):
        fail("compare", candidate.name, f"timed in the {len(baseline.seconds)} rounds of "
             f"{baseline.name}", f"{len(candidate.seconds)} rounds")  # fmt: skip
    return [c / b for b, c in zip(baseline.seconds, candidate.seconds, strict=True)]


def bootstrap(
    values: list[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", 1979.
    """
    if not 0 < confidence < 1:
        fail("bootstrap", "confidence", "between 0 and 1", confidence)
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    medians = np.median(np.asarray(values)[picks], axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(low), float(high)


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collection inside one variant's sample would be charged to that variant."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _warm_up(call: Callable[[], object], timer: Timer, seconds: float,
             stable_seconds: float | None, min_sample: float) -> WarmUp:  # fmt: skip
    """Call for `seconds`, then on until two stretches of calls agree, if that is asked for."""
    clock = timer.now
    start = last = clock()
    call()
    timer.synchronize()
    calls, fastest, stable = 1, math.inf, False
    stretch, in_stretch, best, earlier = last, 0, math.inf, math.inf
    while True:
        before = clock()
        call()
        timer.synchronize()
        last = clock()
        calls, in_stretch = calls + 1, in_stretch + 1
        best = min(best, last - before)
        if in_stretch >= _STRETCH and last - stretch >= seconds / 4:
            stable = earlier < math.inf and abs(best - earlier) <= STABLE_WITHIN * earlier
            fastest = min(fastest, best)
            stretch, in_stretch, best, earlier = last, 0, math.inf, best
        patient = stable_seconds is not None and not stable and last - start < stable_seconds
        if last - start >= seconds and not patient:
            break
    fastest = min(fastest, best)
    count = max(1, math.ceil(min_sample / fastest)) if fastest > 0 else 1000
    return WarmUp(count, calls, last - start, stable)
