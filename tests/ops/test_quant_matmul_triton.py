"""The Triton products with quantized weights; the cases are in triton_quant_matmul_cases.py."""

import pytest
import torch
from triton_runs import MODES, run_cases

import genai_perf as gp

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("mode", MODES)
def test_cases(mode):
    run_cases("triton_quant_matmul_cases.py", mode)


def test_reason_on_the_cpu_without_the_interpreter():
    weight = gp.quantize(torch.zeros(4, 64), "nf4")
    with pytest.raises(gp.BackendUnsupported, match="triton needs CUDA tensors, got cpu"):
        gp.quant_matmul(torch.zeros(1, 64), weight, backend="triton")
