"""Every headline case of every op: ours and the baseline peer, checked against the oracle first.

The JSON holds the op, the case, the error and what the numerics rule allows beside the times.
"""

import pytest
import torch

from genai_perf.bench import probe
from genai_perf.bench.problem import Unsupported
from genai_perf.bench.suites import SUITES, suite

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def combinations():
    for op in SUITES:
        room = suite(op)
        for name in room.HEADLINE:
            for phase in room.PHASES:
                for own in (True, False):
                    who = "ours" if own else room.BASELINE
                    yield pytest.param(op, name, phase, own, id=f"{op}-{name}-{phase}-{who}")


@pytest.mark.parametrize("op, name, phase, own", combinations())
def test_case(request, op, name, phase, own):
    benchmark = request.getfixturevalue("benchmark")
    room = suite(op)
    problem = room.make(room.cases()[name], phase, DEVICE, seed=0)
    try:
        # The backend that a call without backend= takes.
        variant = room.own(problem, None) if own else probe.build(problem, room.BASELINE, False)
    except Unsupported as error:
        pytest.skip(str(error))
    with torch.set_grad_enabled("backward" in phase):
        outputs = variant.result(variant.call())
        check = room.check(problem, outputs, variant.numerics, variant.weight)
        assert check.passed, f"error {check.error:.3g}, allowed {check.allowed:.3g}"

        def call():
            variant.call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.extra_info |= {"op": op, "case": name, "phase": phase, "error": check.error,
                                 "allowed": check.allowed, "flops": problem.flops,
                                 "floor_bytes": problem.floor_bytes}  # fmt: skip
        benchmark.pedantic(call, rounds=30, warmup_rounds=2)
