"""The Triton sparse kernels; the cases are in triton_sparse_matmul_cases.py."""

import pytest
import torch
from triton_runs import MODES, run_cases

import genai_perf as gp
from genai_perf.ops.sparse_matmul import cases

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("mode", MODES)
def test_cases(mode):
    run_cases("triton_sparse_matmul_cases.py", mode)


def test_reason_on_the_cpu_without_the_interpreter():
    _, w, _ = cases.make_inputs(cases.Case("", 1, 3, 33, "2:4", "bfloat16"))
    with pytest.raises(gp.BackendUnsupported, match="triton needs CUDA tensors, got cpu"):
        gp.sparse_matmul(torch.zeros(1, 33), w, backend="triton")
