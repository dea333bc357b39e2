"""Two result files against each other: what became slower from one commit to the next.

The files are of different runs, so nothing is paired. Where both hold the same peer, times are
divided by its times first, so that a machine that was slower as a whole does not count; the
interval comes from resampling each file by itself.
"""

from dataclasses import dataclass

import numpy as np

from . import results
from .timer import Comparison
from .verdict import LEAST_EFFECT, MIN_PAIRS, Verdict

# Another process has its code and data at other addresses, and another day another temperature.
ACROSS_RUNS = 0.02
_RESAMPLES = 2000


@dataclass(frozen=True)
class Change:
    """One variant of one row: B over A. `against`: the peer both were divided by."""

    row: tuple
    variant: str
    verdict: Verdict
    pair: Comparison | None
    against: str | None
    reason: str


def compare_files(a: dict, b: dict, *, peers: bool = False) -> list[Change]:
    """Every own variant (with `peers` the others too) that both reports hold.

    Args:
        a, b: bench reports, before and after.

    Raises:
        ValueError: they have no row in common.
    """
    before = {results.key(row): row for row in a["rows"]}
    after = {results.key(row): row for row in b["rows"]}
    shared = [key for key in before if key in after]
    if not shared:
        raise ValueError("bench compare: the files have no case in common")
    found = []
    for key in shared:
        old = {variant["name"]: variant for variant in before[key]["variants"]}
        new = {variant["name"]: variant for variant in after[key]["variants"]}
        anchor = next(
            (
                name
                for name, variant in old.items()
                if not variant["own"] and _timed(variant) and name in new and _timed(new[name])
            ),
            None,
        )
        floors = [row["noise"]["floor"] for row in (before[key], after[key]) if row["noise"]]
        band = max(LEAST_EFFECT, ACROSS_RUNS, *floors) if len(floors) == 2 else None
        for name, variant in old.items():
            if name in new and (variant["own"] or peers):
                by = anchor if variant["own"] else None
                found.append(_change(key, name, old, new, by, band))
    return found


def _timed(variant: dict) -> bool:
    return variant["status"] == "ok" and bool(variant["seconds"])


def _change(key: tuple, name: str, old: dict, new: dict, anchor: str | None,
            band: float | None) -> Change:  # fmt: skip
    was, now = old[name], new[name]

    def say(verdict: Verdict, reason: str, pair: Comparison | None = None) -> Change:
        return Change(key, name, verdict, pair, anchor, reason)

    if _timed(was) and not _timed(now):
        return say(Verdict.SLOWER, f"it ran before and now is {now['status']}: {now['reason']}")
    if not _timed(was) or not _timed(now):
        return say(Verdict.UNDECIDED, f"not timed in both: {was['status']}, {now['status']}")
    seconds = {"was": was["seconds"], "now": now["seconds"]}
    if anchor:
        seconds |= {"was by": old[anchor]["seconds"], "now by": new[anchor]["seconds"]}
    draw = np.random.default_rng(0)
    medians = {part: _medians(values, draw) for part, values in seconds.items()}
    ratios = medians["now"] / medians["was"]
    ratio = np.median(seconds["now"]) / np.median(seconds["was"])
    if anchor:
        ratios = ratios * medians["was by"] / medians["now by"]
        ratio = ratio * np.median(seconds["was by"]) / np.median(seconds["now by"])
    low, high = np.percentile(ratios, [0.5, 99.5])
    count = min(len(values) for values in seconds.values())
    pair = Comparison(name, name, float(ratio), float(low), float(high), 0.99, count)
    if count < MIN_PAIRS or band is None:
        why = f"only {count} samples" if count < MIN_PAIRS else "no noise floor in both files"
        return say(Verdict.UNDECIDED, why, pair)
    if low > 1 + band:
        return say(Verdict.SLOWER, f"the interval is above 1 + {band:.1%}", pair)
    if high < 1 - band:
        return say(Verdict.FASTER, f"the interval is below 1 - {band:.1%}", pair)
    if low >= 1 - ACROSS_RUNS and high <= 1 + ACROSS_RUNS:
        return say(Verdict.SAME, f"the interval is within {ACROSS_RUNS:.0%} of 1", pair)
    return say(Verdict.UNDECIDED, f"the interval meets the band, 1 +- {band:.1%}", pair)


def _medians(values: list[float], draw: np.random.Generator) -> np.ndarray:
    picks = draw.integers(len(values), size=(_RESAMPLES, len(values)))
    return np.median(np.asarray(values)[picks], axis=1)
