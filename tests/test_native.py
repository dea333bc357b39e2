"""The native extension as a whole: instruction sets and the C++ tests."""

import shutil
import subprocess
from pathlib import Path

import pytest

from genai_perf import _C

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
