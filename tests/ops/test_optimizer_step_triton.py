"""The Triton optimizer step; the cases are in triton_optimizer_step_cases.py."""

from pathlib import Path

import pytest
import torch
from triton_process import run_cases

import genai_perf as gp
from genai_perf.ops.optimizer_step import lion_step

pytest.importorskip("triton", reason="triton is not installed")
CASES = Path(__file__).with_name("triton_optimizer_step_cases.py")


def test_cases_in_the_interpreter():
    run_cases(CASES, interpret=True)


if torch.cuda.is_available():

    def test_cases_on_the_gpu():
        run_cases(CASES, interpret=False)


def test_reason_on_the_cpu_without_the_interpreter():
    z = torch.zeros(5)
    with pytest.raises(gp.BackendUnsupported, match="triton needs CUDA tensors, got cpu"):
        lion_step(z, z, z.clone(), lr=0.1, backend="triton")
