"""Which nki the kernels get, and who may run them."""

import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from genai_perf._backends import nki as backend
from genai_perf.neuron.interpreter import KernelError


@pytest.fixture
def interpreting(monkeypatch):
    backend.unavailable.cache_clear()
    monkeypatch.setattr(backend, "CONFIG", replace(backend.CONFIG, nki="interpret"))
    yield
    backend.unavailable.cache_clear()


def test_cpu_tensors_need_the_switch(monkeypatch):
    monkeypatch.setattr(backend, "CONFIG", replace(backend.CONFIG, nki=None))
    assert backend.why_not(torch.zeros(1)) == "nki needs tensors on a Neuron device, got cpu"


def test_cpu_tensors_with_the_switch(interpreting):
    assert backend.why_not(torch.zeros(1), None) is None
    assert backend.why_not(torch.zeros(1, device="meta")).endswith("got meta")


def test_launch_round_trip(interpreting):
    nki, nl, nisa = backend.nki, backend.nl, backend.nisa

    @nki.jit
    def twice(x, factor):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        t = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=t, src=x)
        nisa.tensor_scalar(dst=t, data=t, op0=nl.multiply, operand0=factor)
        nisa.dma_copy(dst=out, src=t)
        return out

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8):
        x = torch.arange(12).reshape(3, 4).to(dtype)
        got = backend.launch(twice, x, 2.0)
        assert got.dtype == dtype and (got.float() == 2 * x.float()).all()


def test_fp8_travels_by_its_bits():
    x = torch.tensor([240.0, -0.875]).to(torch.float8_e4m3fn)
    array = backend.to_numpy(x)
    assert array.dtype == ml_dtypes.float8_e4m3 and array.astype(np.float32).tolist() == [
        240,
        -0.875,
    ]


def test_standing_in_for_the_package():
    assert "nki" not in sys.modules
    with backend.standing_in():
        import nki
        import nki.isa as nisa
        import nki.language as nl

        with pytest.raises(KernelError, match="1 to 128 partitions"):
            nki.simulate(lambda x: nl.ndarray((129, 1), dtype=nl.float32, buffer=nl.sbuf))(
                np.zeros((1, 1), np.float32)
            )
        assert nisa.engine.vector is backend.nisa.engine.vector
    assert "nki" not in sys.modules


def test_an_installed_package_is_not_shadowed(monkeypatch):
    monkeypatch.setattr(backend, "official", lambda: True)
    with pytest.raises(RuntimeError, match="nki is installed"), backend.standing_in():
        pass
