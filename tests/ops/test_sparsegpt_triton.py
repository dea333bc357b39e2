"""SparseGPT's block in Triton; the cases are in triton_sparsegpt_cases.py."""

import pytest
import torch
from triton_runs import MODES, run_cases

from genai_perf.compression import triton as block_kernel

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("mode", MODES)
def test_cases(mode):
    run_cases("triton_sparsegpt_cases.py", mode)


def test_reasons():
    weight = torch.zeros(8, 4)
    assert block_kernel.why_not(weight, weight, 128) == "triton needs CUDA tensors, got cpu"


def test_reasons_where_triton_runs(monkeypatch):
    weight = torch.zeros(8, 4)
    monkeypatch.setattr(block_kernel.toolchain, "why_not", lambda *tensors: None)
    assert block_kernel.why_not(weight, weight, 128) is None
    assert "of float32, got torch.float64" in block_kernel.why_not(weight.double(), weight, 128)
    assert "up to 128 columns, got 256" in block_kernel.why_not(weight, weight, 256)
