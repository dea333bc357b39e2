"""A part of the ahead-of-time gate (`make aot` is the whole), and that the gate can fail."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from genai_perf._backends.triton_aot import CHIPS, compile_for
from genai_perf.ops.attention.triton import shipped
from genai_perf.testing import aot
from genai_perf.testing.aot import gate

# package -> kernels in the subset
KERNELS = {"ops.decode_attention": 4, "ops.distill_loss": 1, "ops.sparse_matmul": 4,
           "ops.optimizer_step": 1, "ops.quantize": 4, "ops.quant_matmul": 5,
           "compression": 2}  # fmt: skip


@pytest.mark.parametrize("arch", CHIPS)
def test_the_forward_kernel_compiles(arch):
    (result,) = gate((arch,), subset=True, only="fwd")
    assert result.problems == []
    assert result.registers > 0 and result.shared > 0 and result.instructions


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("module, kernels", KERNELS.items())
def test_the_kernels_of_a_package_compile(arch, module, kernels):
    sources = import_module(f"genai_perf.{module}.triton.shipped").sources(arch, subset=True)
    results = [compile_for(source, arch) for source in sources]
    assert len(results) == kernels
    assert [problem for result in results for problem in result.problems] == []


def test_a_spill_fails():
    large = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2}
    source = shipped.source("fwd", "sm_80", torch.bfloat16, 128, 128, "causal", large)
    result = compile_for(source, "sm_80")
    assert result.spills > 0
    assert any(problem.startswith("spills") for problem in result.problems)


def test_too_much_shared_memory_or_a_missing_instruction_fails(monkeypatch):
    source = shipped.source("fwd", "sm_80", torch.bfloat16, 64, 64, "causal")
    small = replace(CHIPS["sm_80"], shared_limit=1024, matrix_instruction="wgmma")
    monkeypatch.setitem(CHIPS, "sm_80", small)
    problems = " ".join(compile_for(source, "sm_80").problems)
    assert "shared memory" in problems and "has no wgmma instruction" in problems


def test_reports_are_summed_up_and_compared():
    entry = {"arch": "sm_90", "name": "attention fwd", "registers": 200, "spills": 0,
             "shared": 4096, "instructions": ["wgmma.mma_async.sync"], "problems": []}  # fmt: skip
    worse = entry | {"registers": 255, "spills": 8, "problems": ["spills 8 bytes"]}
    assert aot.differences([entry], [entry]) == []
    (line,) = aot.differences([entry], [worse])
    assert line.startswith("sm_90 attention fwd: registers 200 -> 255; spills 0 -> 8; problems []")
    assert aot.differences([entry], [worse | {"name": "attention dq"}]) == []
    (line,) = aot.summary([entry, worse])
    assert "2 compiled, 1 failed" in line and "255 registers, 4 KiB" in line and "wgmma" in line
