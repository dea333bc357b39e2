"""The native extension as a whole: instruction sets and the C++ tests."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import genai_perf as gp
from genai_perf import _C
from genai_perf._backends import native

BUILD = Path(__file__).resolve().parent.parent / "build" / "native"


def test_instruction_sets_can_be_lowered():
    best = _C.best_isa()
    names = ["scalar", "avx2", "avx512"]
    try:
        for name in names[: names.index(best) + 1]:
            _C.force_isa(name)
            assert _C.isa() == name
    finally:
        _C.force_isa(best)
    with pytest.raises(ValueError, match="expected scalar, avx2 or avx512, got sse9"):
        _C.force_isa("sse9")


def test_cpp_tests():
    """`make test` builds them; a plain `pytest` in a tree without that build says so."""
    if not (BUILD / "CTestTestfile.cmake").exists():
        pytest.skip("C++ tests are not built: run `make native`")
    from cmake import CMAKE_BIN_DIR

    ctest = shutil.which("ctest", path=CMAKE_BIN_DIR)
    done = subprocess.run(
        [ctest, "--test-dir", str(BUILD), "--output-on-failure", "--no-tests=error"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_run_on_torchs_own_threads():
    """Threads of our own beside OpenMP's, which spin, cost a small model a third of its speed."""
    assert native.lib().uses_openmp() == torch.backends.openmp.is_available()


def test_thread_counts_may_change_between_calls():
    weight = gp.quantize(torch.randn(600, 512, generator=torch.Generator().manual_seed(0)), "nf4")
    before, x = torch.get_num_threads(), torch.linspace(-1, 1, 4 * 512).view(4, 512)
    try:
        results = []
        for count in (2, 1, 4, 3, 2):
            torch.set_num_threads(count)
            results.append(gp.quant_matmul(x, weight))
            torch.mm(torch.ones(300, 300), torch.ones(300, 300))  # torch's threads in between
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


FORKING = """
import os, sys, torch
import genai_perf as gp
torch.set_num_threads(2)
weight, x = gp.quantize(torch.ones(600, 512), "nf4"), torch.ones(4, 512)
before = gp.quant_matmul(x, weight)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(gp.quant_matmul(x, weight), before) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_computes():
    """GNU's OpenMP hangs in the child of a process that used it; the kernels do not."""
    done = subprocess.run([sys.executable, "-c", FORKING], timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_a_weight_that_is_used_moves_to_huge_pages_once(monkeypatch):
    """From 4 MB on, at the first call; never what other processes share; its numbers stay."""
    moved = []
    gather = _C.gather_huge_pages
    monkeypatch.setattr(
        _C, "gather_huge_pages", lambda at, size: moved.append((at, size)) or gather(at, size)
    )
    large, small = torch.randn(4096, 2048), torch.randn(64, 2048)
    x = torch.randn(2, 2048)
    for dense, times in ((large, 1), (small, 0)):
        q = gp.quantize(dense, "nf4")
        before = q.qdata.clone()
        first, second = gp.quant_matmul(x, q), gp.quant_matmul(x, q)
        assert torch.equal(first, second) and torch.equal(before, q.qdata)
        assert moved == [(q.qdata.data_ptr(), q.qdata.nbytes)] * times
        moved.clear()
    shared = gp.quantize(large, "nf4")
    shared.qdata.share_memory_()
    gp.quant_matmul(x, shared)
    assert not moved
