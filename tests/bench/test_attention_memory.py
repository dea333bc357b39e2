"""benchmarks/attention_memory.py at one length: who holds the score matrix and who does not."""

import sys
from pathlib import Path

import pytest

from genai_perf.bench.memory import FreshProcesses

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCORES = 2048 * 2048 * 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of one call needs Linux")
def test_only_the_math_path_holds_the_scores():
    given = {"seqlen": 2048, "heads": 1, "dtype": "float32"}
    with FreshProcesses(("torch", "genai_perf", "attention_memory"), (BENCHMARKS,)) as fresh:
        for phase in ("forward", "forward+backward"):
            ours, math = (
                fresh.run("attention_memory:extra_bytes", given | {"name": name, "phase": phase})
                for name in ("genai_perf", "torch math")
            )
            assert 0 < ours.value < SCORES / 3 and math.value > SCORES
