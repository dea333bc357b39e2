"""The CUDA products with quantized weights: emulated on the CPU against the float64 oracle, their
machine code, and a device where there is one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cuda_library import ARCHS, instructions, needs_machine_code, resources
from cuda_library import emulated as emulated  # a fixture

import genai_perf as gp
from genai_perf import formats
from genai_perf._backends import cuda as glue
from genai_perf.ops.quant_matmul import cases, cuda, triton
from genai_perf.testing.numerics import assert_close_to_oracle

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = [name for name, (fmt, _) in cases.WEIGHTS.items() if fmt in cuda.FORMATS]
# One element; odd rows; nf4 blocks across row ends; cut tiles; several slabs and a cut one.
SHAPES = ((1, 1), (3, 33), (43, 172), (18, 192), (5, 1056), (17, 4160))
# For the tensor cores: one step, all warps and one more, three steps of a warp.
STEPS = ((5, 128), (19, 1152), (16, 2176))
ALL_TYPES = [(256, dtype) for dtype in FLOATS]
ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8)


def make(m, n, k, weight="nf4", dtype=torch.float32, bias=True):
    fmt, options = cases.WEIGHTS[weight]
    return cases.make_inputs(cases.Case("", m, n, k, fmt, options, dtype, bias))


def product(x, q, bias=None):
    return gp.quant_matmul(x, q, bias, backend="cuda")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_oracle_and_rows_alone(emulated, weight, dtype):
    halves = SHAPES[2:5] + STEPS * weight.startswith("int4")
    for n, k in SHAPES if dtype == torch.float32 else halves:
        x, q, bias = make(max(ROWS), n, k, weight, dtype, bias=n % 2 == 1)
        dense = q.dequantize(torch.float32)
        y64 = x.double() @ dense.double().T + (0 if bias is None else bias.double())
        same = F.linear(x, dense.to(dtype), bias)
        y = product(x, q, bias)
        assert y.dtype == dtype
        assert_close_to_oracle(y, y64, same, 2, f"{n}x{k}")
        for m in ROWS:
            assert torch.equal(product(x[:m].clone(), q, bias), y[:m]), f"{m} rows of {n}x{k}"


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("k, dtype", [(172, FLOATS[0]), (192, FLOATS[0]), *ALL_TYPES], ids=str)
def test_a_unit_vector_reads_the_exact_weight(emulated, weight, k, dtype):
    _, q, _ = make(1, 43, k, weight)
    dense = q.dequantize(dtype)
    for at in range(0, k, 19):
        x = torch.zeros(3, k, dtype=dtype)
        x[1, at] = 1.0
        y = product(x, q)
        assert torch.equal(y[1], dense[:, at])
        assert not y[0].any() and not y[2].any()


@pytest.mark.parametrize("fmt", ["fp8", "fp8_240", "fp8_e5m2", "int8"])
@pytest.mark.parametrize("k", [31, 32])
def test_every_code(emulated, fmt, k):
    """Subnormals exactly; NaN and infinity where the code says so, in their own row alone."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat_interleave(2, 1)[:, :k]
    q = formats.get(fmt).quantize(torch.ones(16, k))
    q = replace(q, qdata=codes.contiguous().view(q.qdata.dtype), scale=torch.full((16, 1), 0.5))
    dense = q.dequantize(torch.float32)
    finite = torch.isfinite(dense).all(1)
    for at in range(k):
        x = torch.zeros(2, k)
        x[1, at] = 2.0
        y = product(x, q)[1]
        assert torch.equal(y[finite], 2 * dense[finite, at])
        assert torch.isnan(y[~finite]).all()  # 0 * NaN and 0 * inf
    torch.testing.assert_close(product(torch.ones(1, k), q), torch.ones(1, k) @ dense.T,
                               equal_nan=True)  # fmt: skip


@pytest.mark.parametrize("weight", ["nf4-double", "int4", "int4-asymmetric", "int8", "fp8"])
@pytest.mark.parametrize("k, dtype", [(172, FLOATS[0]), (1056, FLOATS[0]), *ALL_TYPES], ids=str)
def test_what_is_not_finite_in_x_stays_in_its_row(emulated, weight, k, dtype):
    x, q, bias = make(4, 43, k, weight, dtype)
    want = product(x, q, bias)
    x[1, 5], x[2, k - 1] = torch.nan, torch.inf
    y = product(x, q, bias)
    assert torch.equal(y[::3], want[::3]) and torch.isnan(y[1]).all()
    infinite = torch.isinf(x[2:3].float() @ q.dequantize(torch.float32).T)  # but inf * 0 is NaN
    assert torch.equal(torch.isinf(y[2:3]), infinite) and not torch.isfinite(y[2]).any()


@pytest.mark.parametrize("weight", WEIGHTS)
def test_neighbouring_memory_is_neither_read_nor_written(emulated, weight):
    """Every input lies between NaN, or bytes that decode to the largest codes."""
    for n, k, dtype in ((43, 172, FLOATS[0]), (3, 33, FLOATS[0]), (5, 1056, FLOATS[0]),
                        (5, 1152, FLOATS[1]), (5, 128, FLOATS[2])):  # fmt: skip
        x, q, bias = make(3, n, k, weight, dtype)
        want = product(x, q, bias)
        walled_q = replace(q, **{name: walled(t) for name, t in q.components().items()})
        assert torch.equal(product(walled(x), walled_q, walled(bias)), want)


def walled(tensor):
    poison = torch.full((64,), torch.nan if tensor.is_floating_point() else 127).to(tensor.dtype)
    flat = torch.cat([t.view(torch.uint8) for t in (poison, tensor.reshape(-1), poison)])
    start = poison.nbytes
    inner = flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    assert torch.equal(inner.view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    return inner


def test_shapes_strides_and_empties(emulated):
    x, q, bias = make(6, 43, 172)
    want = product(x, q, bias)
    assert torch.equal(product(x.view(2, 3, 172), q, bias), want.view(2, 3, 43))
    assert torch.equal(product(x.T.contiguous().T, q, bias), want)
    assert torch.equal(product(x.repeat(1, 2)[:, :172], q, bias), want)
    assert product(x[0], q, bias).shape == (43,)
    assert product(x[:0].view(0, 3, 172), q, bias).shape == (0, 3, 43)
    assert torch.equal(product(x, q, bias.bfloat16()), product(x, q, bias.bfloat16().float()))
    for m, n, k in ((3, 0, 64), (3, 4, 0)):
        empty = formats.get("int8").quantize(torch.zeros(n, k))
        assert torch.equal(product(torch.randn(m, k), empty, torch.ones(n)), torch.ones(m, n))


def test_refusals_are_sentences(emulated):
    def reason(*args):
        with pytest.raises(gp.BackendUnsupported) as refused:
            product(*args)
        return str(refused.value)

    x, q, bias = make(9, 43, 172)
    assert "up to 8 rows of x, got 9" in reason(x, q)
    assert "no kernel for int3" in reason(x[:1], make(1, 43, 172, "int3")[1])
    shifted = torch.empty(x[0].numel() + 1)[1:].copy_(x[0])
    assert "x begins at no multiple of 16" in reason(shifted, q)
    codes = torch.empty(q.qdata.numel() + 8, dtype=torch.uint8)[8:].copy_(q.qdata)
    assert "qweight.qdata begins at no multiple of 16" in reason(x[0], replace(q, qdata=codes))
    with pytest.raises(ValueError, match="qweight.scale must be 116 elements"):
        product(x[0], replace(q, scale=q.scale[:-1]))


def test_more_rows_go_to_triton(emulated, monkeypatch):
    monkeypatch.setattr(triton, "why_not", lambda *args: None)  # as on a device
    x, q, _ = make(9, 43, 172)
    told = gp.explain(gp.quant_matmul, x, q)
    assert (
        told.backend == "triton" and told.reasons["cuda"] == "cuda takes up to 8 rows of x, got 9"
    )
    assert gp.explain(gp.quant_matmul, x[:8], q).backend == "cuda"


def test_an_error_of_cuda_is_raised_in_its_words(emulated, monkeypatch):
    x, q, _ = make(1, 43, 172)
    monkeypatch.setattr(glue, "place", lambda tensor: (1, None))
    with pytest.raises(RuntimeError, match="CUDA: invalid device ordinal"):
        product(x, q)
    with pytest.raises(RuntimeError, match="CUDA: invalid device ordinal"):
        gp.dequantize(q, backend="cuda")


@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantize_is_emulated_too(emulated, double_quant):
    q = gp.quantize(torch.randn(40, 77), "nf4", double_quant=double_quant)
    for dtype in FLOATS:
        got, want = (gp.dequantize(q, dtype, backend=b) for b in ("cuda", "reference"))
        assert torch.equal(got, want)


def test_reasons_without_a_device():
    x, q, _ = make(1, 43, 172)
    with pytest.raises(gp.BackendUnsupported, match="on one CUDA device, got cpu"):
        product(x, q)
    told = gp.explain(gp.quant_matmul, x, q)
    assert told.backend == "native" and "on one CUDA device" in told.reasons["cuda"]


def test_an_old_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    glue._too_old.cache_clear()
    assert "sm_80 or newer, got sm_75" in glue._too_old(torch.device("cuda"))
    glue._too_old.cache_clear()


@needs_machine_code
@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code(arch):
    """No spills; as many blocks on a processor as the launch bounds say; codes 16 bytes at a time,
    past the first cache; products fused; nf4 by shuffles."""
    used = resources("quant_matmul_kernel", arch) | resources("narrow_kernel", arch)
    code = instructions("quant_matmul_kernel", arch)
    assert len(used) == 25 and len(code) == 24  # 6 decoders x 1, 2, 4, 8 rows, and any shape
    for name, numbers in used.items():
        assert numbers["STACK"] == numbers["LOCAL"] == 0, name
        rows = next((m for m in (1, 2, 4, 8) if f"ELi{m}EE" in name), 1)
        assert numbers["REG"] <= {1: 128, 2: 128, 4: 168, 8: 255}[rows], name
    for name, body in code.items():
        wide = [line for line in body if "LDG" in line and ".128" in line and "NA" in line]
        assert len(wide) >= 8, name  # four rows of W, before the loop and in it
        rows = next(m for m in (1, 2, 4, 8) if f"ELi{m}EE" in name)
        columns = 32 if "Int4" in name or "Book4" in name else 16
        assert sum("FFMA" in line for line in body) >= 4 * rows * columns, name
        shuffled = 4 * columns * ("Book4" in name)
        assert sum("SHFL" in line for line in body) >= shuffled, name
        if "Int4ILb0" in name or "Int8" in name:  # codes become floats without the slow conversion
            assert not any("I2F" in line for line in body), name


@needs_machine_code
@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code_of_the_tensor_cores(arch):
    used, code = resources("quant_mma_kernel", arch), instructions("quant_mma_kernel", arch)
    assert len(used) == len(code) == 4  # bf16 and fp16, with and without zero points
    for name, numbers in used.items():
        assert numbers["STACK"] == numbers["LOCAL"] == 0 and numbers["REG"] <= 128, name
        body = code[name]
        kind = "F32.BF16" if "Bf16" in name else "F32"
        assert sum(f"HMMA.16816.{kind} " in line for line in body) == 16, name  # two steps
        wide = [line for line in body if "LDG" in line and ".128" in line and "NA" in line]
        assert len(wide) >= 8, name  # two rows of W, both steps, before the loop and in it
        assert sum("PRMT" in line for line in body) >= 32, name
        decoding = [line for line in body if "I2F" in line]
        assert len(decoding) <= 4 * ("ILb1" in name or "Lb1E" in name), name  # zero points


@pytest.mark.skipif(glue.unavailable() is not None, reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_on_a_device(weight, dtype):
    for n, k in (*SHAPES, (4096, 4096)):
        x, q, bias = make(8, n, k, weight, dtype)
        dense = q.dequantize(torch.float32)
        y64 = x.double() @ dense.double().T + bias.double()
        there = [t.to("cuda") for t in (x, q, bias)]
        y = product(*there)
        same = F.linear(x, dense.to(dtype), bias)
        assert_close_to_oracle(y.cpu(), y64, same, 2, f"{n}x{k}")
        for m in range(1, 8):
            assert torch.equal(product(there[0][:m].clone(), *there[1:]), y[:m])
