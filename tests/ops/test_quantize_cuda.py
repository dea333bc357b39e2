"""The CUDA kernels: what can be said of them without a device, and their bits where there is one.

Their arithmetic runs on the CPU in csrc/tests/test_cuda_nf4.cpp.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import genai_perf as gp
from genai_perf._backends import cuda

ROOT = Path(__file__).resolve().parents[2]


def test_a_cpu_tensor_is_refused_by_name():
    qt = gp.quantize(torch.randn(4, 64), "nf4")
    with pytest.raises(gp.BackendUnsupported, match="on one CUDA device, got cpu"):
        gp.dequantize(qt, backend="cuda")
    with pytest.raises(gp.BackendUnsupported, match="nf4 only, got int8"):
        gp.dequantize(gp.quantize(torch.randn(4, 64), "int8"), backend="cuda")


@pytest.mark.skipif(not cuda.LIBRARY.exists(), reason="the CUDA kernels are not built")
def test_the_library_loads_without_a_driver():
    library = ctypes.CDLL(str(cuda.LIBRARY))
    library.gp_cuda_error.restype = ctypes.c_char_p
    assert library.gp_cuda_error(0) == b"no error"
    pointers = [None] * 5
    assert library.gp_cuda_nf4_dequantize(*pointers, ctypes.c_int64(0), ctypes.c_int64(64), None,
                                          0, 0, None) == 0  # fmt: skip


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_without_spills_and_load_16_bytes(arch, tmp_path):
    source = ROOT / "csrc/cuda/nf4_dequantize.cu"
    build = ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}", str(source)]
    done = subprocess.run([*build, "-cubin", "-Xptxas", "-v", "-o", tmp_path / "out.cubin"],
                          capture_output=True, text=True)  # fmt: skip
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert kernels == [("0", "0")] * 3
    assert len(registers) == 3 and max(registers) <= 32  # 2048 threads on a multiprocessor
    subprocess.run([*build, "-ptx", "-o", tmp_path / "out.ptx"], check=True)
    ptx = (tmp_path / "out.ptx").read_text()
    assert len(re.findall(r"ld\.global\.nc\.v4\.[a-z]*32", ptx)) == 3
    assert "st.global.cs.v4" in ptx


@pytest.mark.skipif(cuda.unavailable() is not None, reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 77), (1000, 1030)], ids=str)
def test_bits_of_the_reference_on_a_device(shape, double_quant, dtype):
    qt = gp.quantize(torch.randn(shape), "nf4", double_quant=double_quant)
    want = gp.dequantize(qt, dtype, backend="reference")
    assert torch.equal(gp.dequantize(qt.to("cuda"), dtype, backend="cuda").cpu(), want)
