"""The Triton decode kernels, in a process of their own: Triton reads TRITON_INTERPRET when a kernel
is decorated. The cases are in triton_decode_attention_cases.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import genai_perf as gp

pytest.importorskip("triton", reason="triton is not installed")
CASES = Path(__file__).with_name("triton_decode_attention_cases.py")
ROOT = CASES.parent.parent.parent


def run_cases(interpret: bool) -> None:
    # One thread: the interpreter multiplies small matrices, which threads only slow down.
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    environment = os.environ | threads | {"TRITON_INTERPRET": "1" if interpret else "0"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--tb=short", str(CASES)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_cases_in_the_interpreter():
    run_cases(interpret=True)


if torch.cuda.is_available():

    def test_cases_on_the_gpu():
        run_cases(interpret=False)


def test_reason_on_the_cpu_without_the_interpreter():
    q, cache = torch.zeros(1, 1, 2, 8), torch.zeros(1, 3, 1, 8)
    with pytest.raises(gp.BackendUnsupported, match="triton needs CUDA tensors, got cpu"):
        gp.decode_attention(q, cache, cache, cache_seqlens=2, backend="triton")
