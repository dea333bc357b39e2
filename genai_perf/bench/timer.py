"""Timing variants side by side: in turn within one run, compared round by round.

One round calls every variant once, and the next round calls them in the opposite order (A B, B A:
"ABBA" with two variants), so that a machine that speeds up or slows down hits all alike and a
linear drift cancels. Ratios are formed inside a round, never between runs.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np

from .._checks import fail

MIN_ROUNDS = 3


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
        warmup_seconds: each variant is first called for this long, and at least twice.
        min_sample_seconds: calls shorter than this are timed several at once, so that the clock's
            resolution does not matter; the sample is their mean.
        budget_seconds: no round starts after this much time, warm-up not counted.
        clock: seconds, monotonic.
        on_round: called with the number of rounds done.

    Returns:
        name -> Samples, in the order of `variants`.

    Raises:
        ValueError: no variants, or rounds below 1.
    """
    if not variants:
        fail("interleave", "variants", "at least one", "none")
    if rounds < 1:
        fail("interleave", "rounds", "at least 1", rounds)
    calls = {
        name: _warm_up(call, warmup_seconds, min_sample_seconds, clock)
        for name, call in variants.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection inside one variant's sample would be charged to that variant
    try:
        start = clock()
        for done in range(rounds):
            if done >= MIN_ROUNDS and done % 2 == 0 and clock() - start > budget_seconds:
                break
            order = list(variants) if done % 2 == 0 else list(variants)[::-1]
            for name in order:
                seconds[name].append(_sample(variants[name], calls[name], clock))
            if on_round:
                on_round(done + 1)
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(name, tuple(seconds[name]), calls[name]) for name in variants}


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
    if len(baseline.seconds) != len(candidate.seconds):
        fail("compare", candidate.name, f"timed in the {len(baseline.seconds)} rounds of "
             f"{baseline.name}", f"{len(candidate.seconds)} rounds")  # fmt: skip
    ratios = [c / b for b, c in zip(baseline.seconds, candidate.seconds, strict=True)]
    low, high = bootstrap(ratios, confidence=confidence, resamples=resamples, seed=seed)
    return Comparison(
        baseline.name, candidate.name, median(ratios), low, high, confidence, len(ratios)
    )


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


def _warm_up(call: Callable[[], object], seconds: float, min_sample: float,
             clock: Callable[[], float]) -> int:  # fmt: skip
    """Call until `seconds` have passed; returns how many calls fill one sample."""
    start = clock()
    call()
    fastest = math.inf
    while True:
        before = clock()
        call()
        now = clock()
        fastest = min(fastest, now - before)
        if now - start >= seconds:
            break
    return max(1, math.ceil(min_sample / fastest)) if fastest > 0 else 1000


def _sample(call: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    before = clock()
    for _ in range(calls):
        call()
    return (clock() - before) / calls
