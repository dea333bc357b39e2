"""A pytest fixture that measures a kernel, yours or another's, the way `genaiperf bench` does.

    # conftest.py
    pytest_plugins = ["genai_perf.testing.plugin"]

    # test_mine.py
    def test_my_kernel(kernel_benchmark):
        result = kernel_benchmark(lambda: mine(x), baseline=lambda: theirs(x),
                                  check=lambda out: assert_close_to_oracle(out, exact, same))
        assert result.verdict != "slower"

With pytest-benchmark installed, its `benchmark` fixture may be passed on, and the verdict then
stands in the `extra_info` of `--benchmark-json`.
"""

from collections.abc import Callable

import pytest

from ..bench.clocks import timer_for
from ..bench.verdict import Judgement, measure


@pytest.fixture
def kernel_benchmark() -> Callable[..., Judgement]:
    """A function that checks a kernel, times it in ABBA pairs with a baseline, and judges it."""
    return compare_kernels


def compare_kernels(candidate: Callable[[], object], *, baseline: Callable[[], object],
                    check: Callable[[object], object], device: str = "cpu",
                    budget_seconds: float = 5.0, benchmark=None) -> Judgement:  # fmt: skip
    """Check `candidate`, then time it against `baseline`.

    Args:
        candidate, baseline: calls without arguments.
        check: gets what each of the two returns and raises AssertionError if it is wrong: what is
            wrong gets no time.
        device: "cpu", "cuda" or "neuron": whose timer is used.
        budget_seconds: for the rounds; 30 pairs must fit, or the verdict is `undecided`.
        benchmark: pytest-benchmark's fixture; it then times the candidate too, for its own report.

    Returns:
        Judgement: `.verdict`, `.pair` (ratio of times, below 1 is faster, with its interval) and
        `.reason`.
    """
    check(candidate())
    check(baseline())
    found = measure({"candidate": candidate, "baseline": baseline}, timer=timer_for(device),
                    budget_seconds=budget_seconds)  # fmt: skip
    judged = found.pair("baseline", "candidate")
    if benchmark is not None:
        benchmark.extra_info |= {"verdict": str(judged.verdict), "ratio": judged.pair.ratio,
                                 "low": judged.pair.low, "high": judged.pair.high}  # fmt: skip
        benchmark.pedantic(candidate, rounds=30, warmup_rounds=1)
    return judged
