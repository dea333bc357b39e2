"""What the tests of the CUDA kernels share: the library's machine code, and its twin on the CPU."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from genai_perf._backends import cuda

ROOT = Path(__file__).resolve().parents[2]
EMULATED = ROOT / "build/native/emulated_cuda.so"
ARCHS = (80, 90, 100)


def cuobjdump() -> str | None:
    """NVIDIA's disassembler, the toolkit's or the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        from triton import knobs
    except ImportError:
        return None
    return str(knobs.nvidia.cuobjdump.path)


@cache
def _dump(option: str, arch: int) -> str:
    done = subprocess.run([cuobjdump(), option, "-arch", f"sm_{arch}", str(cuda.LIBRARY)],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout


def resources(kernel: str, arch: int) -> dict[str, dict[str, int]]:
    """For each compiled kernel whose mangled name holds `kernel`: REG, STACK, SHARED, LOCAL."""
    found = re.findall(r"Function (\S+):\n(.*)", _dump("-res-usage", arch))
    return {
        name: {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", numbers)}
        for name, numbers in found
        if kernel in name
    }


def instructions(kernel: str, arch: int) -> dict[str, list[str]]:
    """The machine instructions of the same kernels."""
    functions = re.split(r"Function : ", _dump("-sass", arch))[1:]
    bodies = {body.split()[0]: body for body in functions}
    return {
        name: re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]*);", body)
        for name, body in bodies.items()
        if kernel in name
    }


needs_machine_code = pytest.mark.skipif(
    not cuda.LIBRARY.exists() or cuobjdump() is None,
    reason="the CUDA kernels are not built, or nothing here disassembles them",
)


@pytest.fixture
def emulated(monkeypatch):
    """backend="cuda" runs the kernels on the CPU (csrc/tests/cuda_emulation.h), on CPU tensors."""
    if not EMULATED.exists():
        pytest.skip("the emulated CUDA library is not built: run `make native`")
    monkeypatch.setattr(cuda, "LIBRARY", EMULATED)
    monkeypatch.setattr(cuda, "why_not", lambda *tensors: None)
    monkeypatch.setattr(cuda, "place", lambda tensor: (0, None))
    for cached in (cuda._load, cuda.kernel):
        cached.cache_clear()
    yield
    for cached in (cuda._load, cuda.kernel):
        cached.cache_clear()
