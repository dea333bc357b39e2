"""Is it faster? faster, slower, same or undecided, with an interval and the noise of the machine.

A verdict needs three things: at least 30 pairs, an interval of the ratio that leaves the band
around 1, and a band at least as wide as what the machine shows between two copies of one and the
same variant (A/A), timed in the same rounds. Everything else is `same`, if the interval lies
within 1 %, or `undecided`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from .clocks import Timer
from .timer import Comparison, Interleaver, OnRound, Samples, WarmUp, abba_blocks, compare_abba

MIN_PAIRS = 30
SAME_WITHIN = 0.01
# No smaller difference is called one, however quiet the machine: code and data lie elsewhere in
# memory from one process to the next, which alone moves times by some tenths of a percent.
LEAST_EFFECT = 0.005
# Sampling goes on until the intervals are this narrow on either side, or the budget ends.
PRECISION = 0.005
TWIN = "A/A"


class Verdict(StrEnum):
    FASTER = "faster"
    SLOWER = "slower"
    SAME = "same"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Judgement:
    """A verdict about a candidate, and why."""

    verdict: Verdict
    pair: Comparison
    band: float
    reason: str


@dataclass(frozen=True)
class Noise:
    """The A/A measurement: one variant against its twin. `floor` is how far from 1 it came."""

    of: str
    pair: Comparison

    @property
    def floor(self) -> float:
        return max(abs(self.pair.low - 1), abs(self.pair.high - 1))


@dataclass(frozen=True)
class Measured:
    """Samples of every variant by name, the noise floor, and how the warm-up went."""

    samples: dict[str, Samples]
    noise: Noise
    warm: dict[str, WarmUp]
    seconds: float

    def pair(self, baseline: str, candidate: str) -> Judgement:
        return judge(compare_abba(self.samples[baseline], self.samples[candidate]), self.noise)


def measure(
    variants: Mapping[str, Callable[[], object]],
    *,
    timer: Timer | None = None,
    twin: str | None = None,
    pairs: int = MIN_PAIRS,
    precision: float = PRECISION,
    budget_seconds: float = 15.0,
    warmup_seconds: float = 0.2,
    stable_seconds: float | None = 2.0,
    min_sample_seconds: float = 0.005,
    before: Callable[[], object] | None = None,
    on_round: OnRound | None = None,
) -> Measured:
    """Time variants in ABBA rounds with the A/A twin of one of them, until the answer is precise.

    When to stop depends on how wide the intervals are, never on which way they point, so that
    looking often does not find more differences than there are.

    Args:
        variants: name -> what to call; names must not be "A/A".
        timer: see `clocks`; None: the processor's.
        twin: the variant that is timed a second time; None: the first.
        pairs: rounds at least, if the budget allows.
        precision: half-width of the intervals that is enough.
        budget_seconds: for the rounds; warm-up comes on top.
        warmup_seconds, stable_seconds, min_sample_seconds, before, on_round: see `Interleaver`.
    """
    names = list(variants)
    twin = twin or names[0]
    run = Interleaver(
        dict(variants) | {TWIN: variants[twin]},
        timer=timer,
        warmup_seconds=warmup_seconds,
        stable_seconds=stable_seconds,
        min_sample_seconds=min_sample_seconds,
        before=before,
        on_round=on_round,
    )
    start = run.timer.now()
    goal = pairs + pairs % 2
    while True:
        run.run(goal - run.rounds, budget_seconds - (run.timer.now() - start))
        if run.rounds < goal or _narrow(run.samples(), twin, precision):
            break
        goal *= 2
    samples = run.samples()
    noise = Noise(twin, compare_abba(samples[twin], samples.pop(TWIN)))
    return Measured(samples, noise, run.warm, run.timer.now() - start)


def _narrow(samples: dict[str, Samples], base: str, precision: float) -> bool:
    """Whether every ratio to `base` is known well enough, as a share of itself."""
    return all(
        _half_width(abba_blocks(samples[base], other)) <= precision
        for name, other in samples.items()
        if name != base
    )


def _half_width(blocks: list[float]) -> float:
    """Of the median's 99 % interval by order statistics, over the median: what a bootstrap would
    give, without its cost."""
    ordered, count = sorted(blocks), len(blocks)
    reach = 2.576 * math.sqrt(count) / 2
    low = ordered[max(0, math.floor(count / 2 - reach))]
    high = ordered[min(count - 1, math.ceil(count / 2 + reach))]
    return (high - low) / 2 / ordered[count // 2]


def judge(pair: Comparison, noise: Noise | None) -> Judgement:
    """The verdict about `pair.candidate`.

    Args:
        pair: from `compare_abba`.
        noise: the A/A measurement of the same rounds; None: not measured, which decides nothing.
    """
    band = max(LEAST_EFFECT, noise.floor) if noise else math.inf

    def say(verdict: Verdict, reason: str) -> Judgement:
        return Judgement(verdict, pair, band, reason)

    if pair.pairs < MIN_PAIRS:
        return say(Verdict.UNDECIDED, f"only {pair.pairs} pairs, {MIN_PAIRS} are needed")
    if noise is None:
        return say(Verdict.UNDECIDED, "no noise floor was measured")
    if pair.high < 1 - band:
        return say(Verdict.FASTER, f"the interval is below 1 - {band:.2%}")
    if pair.low > 1 + band:
        return say(Verdict.SLOWER, f"the interval is above 1 + {band:.2%}")
    if pair.low >= 1 - SAME_WITHIN and pair.high <= 1 + SAME_WITHIN:
        return say(Verdict.SAME, f"the interval is within {SAME_WITHIN:.0%} of 1")
    return say(Verdict.UNDECIDED, f"the interval meets the noise band, 1 +- {band:.2%}")


def exit_code(verdicts: list[Verdict]) -> int:
    """1 if any is slower, else 2 if any is undecided (or there is none), else 0."""
    if Verdict.SLOWER in verdicts:
        return 1
    return 2 if Verdict.UNDECIDED in verdicts or not verdicts else 0
