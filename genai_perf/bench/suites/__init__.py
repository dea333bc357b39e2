"""How each op is measured: its cases, inputs, oracle and own backends. One file an op.

A suite is a module with
    PHASES      what can be timed, the usual one first
    BASELINE    the peer that it is compared with if none is named
    BACKENDS    the op's own, in order of preference
    HEADLINE    the cases of a quick run
    cases()     name -> case, those that are large enough to time
    make(case, phase, device, seed) -> Problem
    own(problem, backend) -> Variant; raises BackendUnsupported
    check(problem, outputs, numerics=None, weight=None) -> Check against the float64 oracle
"""

from importlib import import_module
from types import ModuleType

from ...ops import OPS
from ..problem import choose

SUITES = ("attention", "quantize", "quant_matmul")


def suite(op: str) -> ModuleType:
    """The suite of an op.

    Raises:
        ValueError: unknown op, or one that has no suite yet.
    """
    if op in OPS and op not in SUITES:
        raise ValueError(f"bench: {op} has no suite in genai_perf/bench/suites yet; "
                         f"those that have one: {', '.join(SUITES)}")  # fmt: skip
    return import_module(f"{__name__}.{choose('op', op, SUITES)}")
