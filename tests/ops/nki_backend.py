"""Running backend="nki" in the interpreter, whatever the environment says."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: the NKI interpreter needs it")
from genai_perf._backends import nki as backend
from genai_perf.neuron.interpreter import target

GENERATIONS = ("gen3", "gen4")


@contextmanager
def interpreting(generation: str = "gen3"):
    before = backend.CONFIG
    backend.CONFIG = replace(before, nki="interpret")
    backend.unavailable.cache_clear()
    try:
        with target(generation):
            yield
    finally:
        backend.CONFIG = before
        backend.unavailable.cache_clear()
