"""The Triton distillation kernel; the cases are in triton_distill_cases.py."""

import pytest
import torch
from triton_runs import MODES, run_cases

import genai_perf as gp

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("mode", MODES)
def test_cases(mode):
    run_cases("triton_distill_cases.py", mode)


def test_reason_on_the_cpu_without_the_interpreter():
    z = torch.zeros(2, 5)
    with pytest.raises(gp.BackendUnsupported, match="triton needs CUDA tensors, got cpu"):
        gp.distill.distillation_loss(z, z, backend="triton")
