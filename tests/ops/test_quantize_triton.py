"""The Triton dequantization; the cases are in triton_dequantize_cases.py."""

import pytest
import torch
from triton_runs import MODES, run_cases

import genai_perf as gp

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("mode", MODES)
def test_cases(mode):
    run_cases("triton_dequantize_cases.py", mode)


def test_reason_on_the_cpu_without_the_interpreter():
    with pytest.raises(gp.BackendUnsupported, match="triton needs CUDA tensors, got cpu"):
        gp.dequantize(gp.quantize(torch.zeros(4, 64), "int8"), backend="triton")
