"""The Triton decode kernels; the cases are in triton_decode_attention_cases.py."""

import pytest
import torch
from triton_runs import MODES, run_cases

import genai_perf as gp

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("mode", MODES)
def test_cases(mode):
    run_cases("triton_decode_attention_cases.py", mode)


def test_reason_on_the_cpu_without_the_interpreter():
    q, cache = torch.zeros(1, 1, 2, 8), torch.zeros(1, 3, 1, 8)
    with pytest.raises(gp.BackendUnsupported, match="triton needs CUDA tensors, got cpu"):
        gp.decode_attention(q, cache, cache, cache_seqlens=2, backend="triton")
