"""The Triton optimizer step; the cases are in triton_optimizer_step_cases.py."""

import pytest
import torch
from triton_runs import MODES, run_cases

import genai_perf as gp
from genai_perf.ops.optimizer_step import lion_step

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("mode", MODES)
def test_cases(mode):
    run_cases("triton_optimizer_step_cases.py", mode)


def test_reason_on_the_cpu_without_the_interpreter():
    z = torch.zeros(5)
    with pytest.raises(gp.BackendUnsupported, match="triton needs CUDA tensors, got cpu"):
        lion_step(z, z, z.clone(), lr=0.1, backend="triton")
