"""How each op is measured: its cases, inputs, oracle and own backends. One file an op.

A suite is a module with
    PHASES      what can be timed, the usual one first
    BASELINE    the peer that it is compared with if none is named
    BACKENDS    the op's own, in order of preference
    EXTRA       further own variants, measured where they are named; may be left out
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

SUITES = OPS


def suite(op: str) -> ModuleType:
    """The suite of an op.

    Raises:
        ValueError: unknown op; offers the nearest.
    """
    return import_module(f"{__name__}.{choose('op', op, SUITES)}")


def own_names(op: str) -> tuple[str, ...]:
    """Backends of an op and its further own variants."""
    room = suite(op)
    return (*room.BACKENDS, *getattr(room, "EXTRA", ()))
