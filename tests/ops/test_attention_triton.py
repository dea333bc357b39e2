"""The Triton attention kernels; the cases are in triton_attention*_cases.py."""

import os
import subprocess
import sys

import pytest
import torch
from triton_runs import HERE, MODES, run_cases

import genai_perf as gp

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("file", ["triton_attention_cases.py", "triton_attention_rules_cases.py",
                                  "test_attention_promises.py"])  # fmt: skip
def test_cases(file, mode):
    run_cases(file, mode)


def test_reason_on_the_cpu_without_the_interpreter():
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(gp.BackendUnsupported, match="triton needs CUDA tensors, got cpu"):
        gp.attention(q, q, q, backend="triton")


def test_calls_on_the_cpu_import_no_triton():
    code = (
        "import sys, torch, genai_perf as gp; q = torch.zeros(1, 2, 1, 8); gp.attention(q, q, q);"
        "sys.exit('triton' in sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent.parent, env=environment)
    assert done.returncode == 0
