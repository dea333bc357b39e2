"""The Triton quantizers; the cases are in triton_quantize_cases.py, triton_dequantize_cases.py."""

import pytest
import torch
from triton_runs import MODES, run_cases

import genai_perf as gp

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("file", ["triton_quantize_cases.py", "triton_dequantize_cases.py"])
def test_cases(mode, file):
    run_cases(file, mode)


def test_reason_on_the_cpu_without_the_interpreter():
    with pytest.raises(gp.BackendUnsupported, match="triton needs CUDA tensors, got cpu"):
        gp.dequantize(gp.quantize(torch.zeros(4, 64), "int8"), backend="triton")
