"""The harness against itself, on this machine: overhead, torch's own timer, A/A, a planted 3 %.

    python benchmarks/harness_check.py [--runs 5] [--budget 4]

Run it on a quiet machine; tests/bench/test_verdict.py holds the same claims on simulated noise.
"""

import argparse
from collections import Counter
from statistics import median

import torch
from torch.utils import benchmark

from genai_perf.bench.timer import Interleaver
from genai_perf.bench.verdict import measure


def overhead(kernel: float = 100e-6) -> float:
    """What a sample adds to a call of 100 us, as a share of it."""
    run = Interleaver({"nothing": lambda: None}, warmup_seconds=0.05)
    run.run(30)
    return run.samples()["nothing"].median / kernel


def agreement(x: torch.Tensor, turns: int) -> tuple[list[float], list[float]]:
    """Medians of short stretches of one call, by this harness and by torch's timer in turn, so
    that a machine whose speed wanders is seen by both."""
    run = Interleaver({"x @ x": lambda: x @ x}, warmup_seconds=0.1)
    timer = benchmark.Timer("x @ x", globals={"x": x})
    calls, theirs = run.warm["x @ x"].calls_per_sample, []
    for _ in range(turns):
        run.run(1)
        theirs.append(timer.timeit(calls).median)
    return list(run.samples()["x @ x"].seconds), theirs


def steps(count: int):
    """A planted difference: the same small addition, more or less often."""
    x = torch.zeros(1000)

    def call() -> None:
        for _ in range(count):
            x.add_(1.0)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--budget", type=float, default=4.0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    print(f"overhead of measuring an empty call: {overhead():.3%} of a 100 us kernel")

    ours, theirs = agreement(torch.randn(160, 160), 30 * a.runs)
    print(f"medians of {len(ours)} stretches in turn: {median(ours) * 1e6:.1f} us, "
          f"torch.utils.benchmark {median(theirs) * 1e6:.1f} us, "
          f"ratio {median(ours) / median(theirs):.4f}")  # fmt: skip

    for name, count in (("A/A", 100), ("planted 3 %", 103)):
        found, spent = Counter(), 0.0
        for _ in range(a.runs):
            one = measure({"a": steps(100), "b": steps(count)}, budget_seconds=a.budget)
            found[str(one.pair("a", "b").verdict)] += 1
            spent = max(spent, one.seconds)
        print(f"{name}: {dict(found)} in {a.runs} runs of at most {spent:.1f} s")


if __name__ == "__main__":
    main()
