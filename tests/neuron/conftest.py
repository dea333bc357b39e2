"""The namespaces that kernels see, and a way to run a few instructions."""

import numpy as np
import pytest

pytest.importorskip("ml_dtypes")
from genai_perf.neuron.interpreter import modules, target

MODULES = modules()


@pytest.fixture
def nki():
    return MODULES["nki"]


@pytest.fixture
def nl():
    return MODULES["nki.language"]


@pytest.fixture
def nisa():
    return MODULES["nki.isa"]


@pytest.fixture
def on(nki, nl, nisa):
    """on(body, *arrays): run `body(load, *tensors) -> tile`, the tile as an array.

    Every array is in SBUF when the body begins; what it returns is copied to an output.
    """

    def run(body, *arrays, generation="gen3", report=False):
        def kernel(*hbm):
            tiles = []
            for x in hbm:
                t = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
                nisa.dma_copy(dst=t, src=x)
                tiles.append(t)
            result = body(*tiles)
            if result.buffer is nl.psum:
                held = nl.ndarray(result.shape, dtype=result.dtype, buffer=nl.sbuf)
                nisa.tensor_copy(dst=held, src=result)
                result = held
            out = nl.ndarray(result.shape, dtype=result.dtype, buffer=nl.shared_hbm)
            nisa.dma_copy(dst=out, src=result)
            return out

        with target(generation):
            done = nki.simulate(kernel).run(*arrays)
        return done if report else done.outputs

    return run


@pytest.fixture
def rng():
    return np.random.default_rng(0)
