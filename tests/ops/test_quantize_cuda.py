"""The CUDA kernels: their bits, emulated on the CPU and on a device where there is one, and their
machine code."""

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_library import emulated as emulated  # a fixture

import genai_perf as gp
from genai_perf._backends import cuda as glue
from genai_perf.ops.quantize import cases, cuda

ROOT = Path(__file__).resolve().parents[2]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = ("fp8", "fp8_240", "fp8_e5m2")
TAKEN = ("int8", "nf4", "fp4", *FP8)  # but for blocks of 128x128
ENCODED = [name for name, (fmt, how) in cases.VARIANTS.items()
           if fmt in TAKEN and how.get("granularity") != "block"]  # fmt: skip
DECODED = [name for name, (fmt, _) in cases.VARIANTS.items() if fmt in cuda.FORMATS]
# One element; odd rows; a cut tile; whole tiles and stacks of whole blocks; none.
SHAPES = ((1, 1), (67,), (3, 203), (13, 344), (2, 128, 256), (0, 8))


def test_a_cpu_tensor_is_refused_by_name():
    qt = gp.quantize(torch.randn(4, 64), "nf4")
    with pytest.raises(gp.BackendUnsupported, match="on one CUDA device, got cpu"):
        gp.dequantize(qt, backend="cuda")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", DECODED)
def test_dequantize_gives_the_bits_of_the_reference(emulated, name, dtype):
    format, options = cases.VARIANTS[name]
    for shape in SHAPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        qt = gp.quantize(x, format, **options, backend="reference")
        got, want = (gp.dequantize(qt, dtype, backend=b) for b in ("cuda", "reference"))
        assert got.dtype == dtype and torch.equal(got, want), shape


def test_a_stack_of_cut_blocks_is_refused(emulated):
    qt = gp.quantize(torch.randn(2, 130, 70), "fp8", granularity="block")
    with pytest.raises(gp.BackendUnsupported, match=r"whole blocks, got shape \(2, 130, 70\)"):
        gp.dequantize(qt, backend="cuda")
    with pytest.raises(gp.BackendUnsupported, match="does not dequantize int3"):
        gp.dequantize(gp.quantize(torch.randn(2, 8), "int3"), backend="cuda")


@pytest.mark.parametrize("format", ["int8", "fp8", "fp8_240", "fp8_e5m2", "nf4", "fp4", "int4"])
@pytest.mark.parametrize("k", [256, 250])
def test_every_code_of_a_byte(emulated, format, k):
    codes = torch.arange(256, dtype=torch.uint8).repeat(20)
    qt = gp.formats.get(format).quantize(torch.ones(8, k))
    qt.qdata = codes[: qt.qdata.numel()].view(qt.qdata.dtype).view(qt.qdata.shape)
    for dtype in FLOATS:
        got, want = (gp.dequantize(qt, dtype, backend=b) for b in ("cuda", "reference"))
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["nf4-double", "int4-asym-fp16", "fp8-group", "int8"])
def test_codes_that_begin_at_any_byte(emulated, name):
    format, options = cases.VARIANTS[name]
    qt = gp.quantize(torch.randn(5, 256), format, **options)
    codes = torch.cat([torch.zeros(3, dtype=torch.uint8), qt.qdata.view(torch.uint8).view(-1)])
    moved = replace(qt, qdata=codes[3:].view(qt.qdata.dtype).view(qt.qdata.shape))
    assert moved.qdata.data_ptr() % 16
    assert torch.equal(gp.dequantize(moved, backend="cuda"), gp.dequantize(qt, backend="reference"))


def assert_bits(x, format, device="cpu", **options):
    """Components of the reference, byte for byte."""
    got = gp.quantize(x.to(device), format, backend="cuda", **options).to("cpu").components()
    want = gp.quantize(x, format, backend="reference", **options).components()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        bits, other = (t.reshape(-1).view(torch.uint8) for t in (tensor, got[name]))
        assert torch.equal(bits, other), f"{name}, {tuple(x.shape)}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ENCODED)
def test_quantize_gives_the_bits_of_the_reference(emulated, name, dtype):
    format, options = cases.VARIANTS[name]
    # Teams of one lane, some, a warp and a block; rows that are not aligned; cut blocks and groups.
    for shape in (*SHAPES, (5, 8), (3, 1280), (2, 4104), (1, 9001)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        if len(x) > 1:
            x[0], x[1] = 0, x[1] * 1e-4
        assert_bits(x.to(dtype), format, **options)


@pytest.mark.parametrize("name", ENCODED)
def test_ties_and_extreme_magnitudes(emulated, name):
    format, options = cases.VARIANTS[name]
    grid = torch.cat([torch.arange(-512, 512) / 512, torch.arange(-128, 128) / 254]).view(1, -1)
    for scale in (1.0, 1e-45, 1e-42, 2.0**-120, 1e-20, 3e38):
        assert_bits(grid * scale, format, **options)
    assert_bits(torch.tensor([[torch.finfo(torch.float32).max, -0.0, 1e-45]]), format, **options)
    assert_bits(torch.zeros(70), format, **options)
    if isinstance(gp.formats.get(format), gp.formats.CodeBook):
        bounds = gp.formats.get(format).bounds()
        near = [bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0))]
        assert_bits(torch.cat([*near, torch.ones(20)])[:64], format, **options)  # t = x


@pytest.mark.parametrize("format", FP8)
def test_codes_and_their_midpoints(emulated, format):
    chosen = gp.formats.get(format)
    codes = torch.arange(256, dtype=torch.uint8).view(chosen.code_dtype).float()
    codes = codes[codes.abs() <= chosen.max].sort().values
    near = torch.cat([codes, (codes[1:] + codes[:-1]) / 2])
    near = torch.cat([near, near * (1 + 2.0**-20), near * (1 - 2.0**-20)])
    near = torch.cat([near.clamp(-chosen.max, chosen.max), torch.tensor([chosen.max])])
    for granularity in ("row", "tensor"):  # a scale of 1: each is rounded as it stands
        assert_bits(near[None], format, granularity=granularity)


@pytest.mark.parametrize("granularity", ["row", "tensor", "group"])
@pytest.mark.parametrize("format", FP8)
def test_infinities_saturate_and_nan_stays(emulated, format, granularity):
    x = torch.randn(4, 300)
    x[1, 3], x[1, 4], x[2, 299], x[3] = torch.nan, -torch.inf, torch.inf, torch.nan
    for dtype in FLOATS:
        assert_bits(x.to(dtype), format, granularity=granularity, allow_nonfinite=True)


def test_what_quantize_refuses(emulated):
    def reason(*args, **options):
        with pytest.raises(gp.BackendUnsupported) as refused:
            gp.quantize(*args, backend="cuda", **options)
        return str(refused.value)

    assert "does not quantize to int4" in reason(torch.randn(2, 8), "int4")
    assert "in blocks of 128x128" in reason(torch.randn(2, 8), "fp8", granularity="block")
    x = torch.zeros(2, 64)
    x[1, 3] = torch.nan
    for format in ("int8", "fp8", "nf4"):
        with pytest.raises(ValueError, match=r"x must be finite, got nan at \(1, 3\)"):
            gp.quantize(x, format, backend="cuda")


def test_what_lies_beside_is_left_alone(emulated):
    """x begins at any element, and a transposed x is copied."""
    x = torch.randn(3, 129)
    for view in (x.view(-1)[1:129], x.view(-1)[3:323].view(5, 64), x.T):
        for format in ("int8", "fp8", "nf4"):
            assert_bits(view, format)


@pytest.mark.skipif(not glue.LIBRARY.exists(), reason="the CUDA kernels are not built")
def test_the_library_loads_without_a_driver():
    library = ctypes.CDLL(str(glue.LIBRARY))
    library.gp_cuda_error.restype = ctypes.c_char_p
    assert library.gp_cuda_error(0) == b"no error"
    no_elements = [arg(0) for arg in cuda.DEQUANTIZE]
    assert library.gp_cuda_dequantize(*no_elements) == 0
    assert library.gp_cuda_quantize(*[arg(0) for arg in cuda.QUANTIZE]) == 0


def compiled(source: str, arch: int, tmp_path) -> tuple[dict[str, int], str]:
    """Registers of each kernel of a file under csrc/cuda, which must not spill, and the PTX."""
    build = ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}",
             str(ROOT / "csrc/cuda" / source)]  # fmt: skip
    done = subprocess.run([*build, "-cubin", "-Xptxas", "-v", "-o", tmp_path / "out.cubin"],
                          capture_output=True, text=True)  # fmt: skip
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes "
                       r"spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
                       done.stderr, re.DOTALL)  # fmt: skip
    assert all(row[1:4] == ("0", "0", "0") for row in found), found
    subprocess.run([*build, "-ptx", "-o", tmp_path / "out.ptx"], check=True)
    return {row[0]: int(row[4]) for row in found}, (tmp_path / "out.ptx").read_text()


needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_dequantize_compiles_without_spills_and_loads_16_bytes(arch, tmp_path):
    registers, ptx = compiled("dequantize.cu", arch, tmp_path)
    fast = {name: n for name, n in registers.items() if "_any_" not in name}
    assert len(fast) == 18  # six decoders, three types
    assert len(registers) == 21  # three for any shape
    assert max(fast.values()) <= 32  # 2048 threads on a multiprocessor
    for body in ptx.split(".entry ")[1:]:
        wide = 0 if "_any_" in body.split("(")[0] else 1
        assert len(re.findall(r"ld\.global\.nc\.L1::no_allocate\.v4\.u32", body)) == wide
        assert len(re.findall(r"st\.global\.cs\.v4", body)) >= 2 * wide


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_quantize_compiles_without_spills_and_loads_16_bytes(arch, tmp_path):
    registers, ptx = compiled("quantize.cu", arch, tmp_path)
    assert len(registers) == 12  # four encoders, three types
    assert max(registers.values()) <= 40  # 1536 threads on a multiprocessor
    for body in ptx.split(".entry ")[1:]:
        assert len(re.findall(r"ld\.global\.nc\.v4", body)) >= 2  # for magnitude and codes
        assert "div.rn.f32" in body and "div.approx" not in body and ".ftz" not in body
        assert "fma.rn" not in body and "mad.rn" not in body  # each operation rounds on its own


@pytest.mark.skipif(glue.unavailable() is not None, reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", DECODED)
def test_dequantize_on_a_device(name, dtype):
    format, options = cases.VARIANTS[name]
    for shape in (*SHAPES, (1000, 1030), (1024, 4096)):
        qt = gp.quantize(torch.randn(shape), format, **options)
        want = gp.dequantize(qt, dtype, backend="reference")
        assert torch.equal(gp.dequantize(qt.to("cuda"), dtype, backend="cuda").cpu(), want)


@pytest.mark.skipif(glue.unavailable() is not None, reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ENCODED)
def test_quantize_on_a_device(name, dtype):
    format, options = cases.VARIANTS[name]
    if options.get("double_quant"):  # torch's mean of the scales rounds otherwise there
        options = {}
    for shape in (*SHAPES, (1000, 1030), (1024, 4096)):
        assert_bits(torch.randn(shape).to(dtype), format, device="cuda", **options)
