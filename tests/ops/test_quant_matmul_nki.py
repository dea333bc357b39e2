"""quant_matmul's NKI kernels in the interpreter against the float64 oracle, on trn2 and trn3."""

import pytest
import torch
from nki_backend import GENERATIONS, backend, interpreting
from test_quant_matmul import backward, check, make, oracle

import genai_perf as gp
from genai_perf.neuron.interpreter import target
from genai_perf.ops.quant_matmul import cases
from genai_perf.ops.quant_matmul.nki import FORMATS, layout

ROWS = (0, 1, 17, 130)
KNOWN = [name for name, (fmt, options) in cases.WEIGHTS.items()
         if fmt in FORMATS and options.get("granularity") != "group"]  # fmt: skip


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("weight", KNOWN)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_oracle(generation, weight, dtype):
    if generation == "gen4" and dtype != torch.bfloat16:
        shapes = ((43, 172),)
    else:
        shapes = cases.SHAPES if dtype == torch.float32 else ((3, 33), (130, 300))
    for n, k in shapes:
        x, q, bias = make(max(ROWS), n, k, weight, dtype)
        y64, same = oracle(x, q, bias)
        dense = q.dequantize(torch.float32)
        dy = torch.randn(max(ROWS), n, generator=torch.Generator().manual_seed(2)).to(dtype)
        dx64, dx_same = dy.double() @ dense.double(), dy @ dense.to(dtype)
        with interpreting(generation):
            y = [gp.quant_matmul(x[:m], q, bias, backend="nki") for m in ROWS]
            dx = [backward(dy[:m], q, "nki") for m in ROWS]
        assert [t.shape for t in y] == [(m, n) for m in ROWS] and y[0].dtype == dtype
        check(y, y64, same, f"{n}x{k}")
        check(dx, dx64, dx_same, f"dx {n}x{k}", factor=3)


def test_autograd():
    x, q, bias = make(5, 43, 172, "int8", torch.float32)
    x.requires_grad_()
    with interpreting():
        gp.quant_matmul(x, q, bias, backend="nki").sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(5, -1))


@pytest.mark.parametrize("fmt", ("fp8", "fp8_e5m2"))
def test_every_fp8_code(fmt):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    q = gp.quantize(torch.ones(8, 32), fmt)
    q.qdata = codes.view(8, 32).view(q.qdata.dtype)
    finite = torch.isfinite(q.qdata.float())
    with interpreting():
        got = gp.quant_matmul(torch.eye(32), q, backend="nki").T
    rows = finite.all(1)  # a NaN spoils its row: 0 * NaN
    assert torch.equal(got[rows], q.dequantize()[rows]) and not torch.isfinite(got[~rows]).all()


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_fp8_codes_to_448_are_exact(generation, dtype):
    """Each of the 256 codes, times 1: two halves on trn2, the code itself on trn3."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    q = gp.quantize(torch.ones(256, 64), "fp8")
    q.qdata = codes[:, None].expand(-1, 64).contiguous().view(q.qdata.dtype)
    q.scale.fill_(1.0)
    with interpreting(generation):
        got = gp.quant_matmul(torch.eye(64, dtype=dtype)[:3], q, backend="nki").T
    want = q.dequantize().to(dtype)[:, :3]
    bad = want.isnan().all(1)
    assert bad.nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert torch.equal(got[~bad], want[~bad]) and got[bad].isnan().all()


def test_formats_it_does_not_take():
    weight = gp.quantize(torch.randn(8, 64), "dynamic8")
    with interpreting(), pytest.raises(gp.BackendUnsupported, match="no kernel for dynamic8"):
        gp.quant_matmul(torch.ones(1, 64), weight, backend="nki")


GROUPED = {
    "int4": ("int4", {}), "int4-asymmetric": ("int4", {"symmetric": False}),
    "int4-g1024": ("int4", {"group_size": 1024}), "int4-row": ("int4", {"group_size": -1}),
    "nf4": ("nf4", {}), "nf4-double": ("nf4", {"double_quant": True}), "fp8": ("fp8", {}),
    "fp8_240-block": ("fp8_240", {"granularity": "block"}), "fp8_e5m2": ("fp8_e5m2", {}),
}  # fmt: skip


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("weight", GROUPED)
def test_many_groups_and_sections(generation, weight):
    """More rows than one block has, several sections of groups, several rows of x."""
    fmt, options = GROUPED[weight]
    n, k = 1100, 2304
    for m, dtype in ((1, torch.bfloat16), (9, torch.float16)):
        case = cases.Case("", m, n, k, fmt, options, dtype, True)
        x, q, bias = cases.make_inputs(case)
        stored = (q.qdata, q.scale, q.zero_point, q.nested_scale, q.scale_offset)
        assert layout.words(stored, fmt, q.group_size, n, k, m, dtype) is not None
        y64, same = oracle(x, q, bias)
        with interpreting(generation):
            check([gp.quant_matmul(x, q, bias, backend="nki")], y64, same, weight)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("fmt", ("int4", "fp8_240", "fp8_e5m2", "fp8"))
def test_a_unit_vector_reads_the_code(fmt, dtype):
    """Integers times a scale of 1 are exact in the half types: no code is rounded."""
    q = gp.quantize(torch.ones(40, 64), fmt)
    q.qdata = torch.arange(40 * q.qdata.shape[1]).to(torch.uint8).view(40, -1).view(q.qdata.dtype)
    if fmt != "int4":
        bad = ~(q.qdata.float().abs() <= (240 if fmt == "fp8_240" else 57344))
        q.qdata = torch.where(bad, 0.0, q.qdata.float()).to(q.qdata.dtype)
    q.scale.fill_(1.0)
    with interpreting():
        got = gp.quant_matmul(torch.eye(64, dtype=dtype), q, backend="nki").T
    assert torch.equal(got, q.dequantize().to(dtype))


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_int8_activations_have_the_bits_of_the_reference(generation, dtype):
    for m, n, k in ((1, 43, 172), (130, 130, 300), (17, 5, 2200)):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        weight, bias = gp.quantize(torch.randn(n, k), "int8"), torch.randn(n)
        weight.qdata[0] = 127  # sums past 2^24
        x[0] = x[0].abs() + 3
        for b in (bias, None):
            with interpreting(generation):
                got = gp.quant_matmul(x, weight, b, activations="int8", backend="nki")
            want = gp.quant_matmul(x, weight, b, activations="int8", backend="reference")
            assert torch.equal(got, want)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_fp8_activations(generation):
    """Two rows of the contraction in a cycle; the sum of products of e4m3 in fp32."""
    for m, n, k in ((1, 43, 172), (130, 600, 301)):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        weight, bias = gp.quantize(torch.randn(n, k), "fp8_240"), torch.randn(n)
        for b in (bias, None):
            with interpreting(generation):
                got = gp.quant_matmul(x, weight, b, activations="fp8", backend="nki")
            want = gp.quant_matmul(x, weight, b, activations="fp8", backend="reference")
            torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-4)


def test_fp8_activations_have_a_gradient_and_keep_nan():
    x, weight = torch.randn(3, 64, requires_grad=True), gp.quantize(torch.randn(8, 64), "fp8_240")
    with interpreting():
        gp.quant_matmul(x, weight, activations="fp8", backend="nki").sum().backward()
        bad = torch.where(torch.arange(3)[:, None] == 1, torch.nan, x.detach())
        got = gp.quant_matmul(bad, weight, activations="fp8", backend="nki")
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, -1))
    assert got.isnan().all(1).tolist() == [False, True, False]
    with interpreting(), pytest.raises(gp.BackendUnsupported, match="fp8_240 weights by row"):
        gp.quant_matmul(x, gp.quantize(torch.randn(8, 64), "fp8"), activations="fp8", backend="nki")


def estimate(generation: str, kernel, *arguments):
    with target(generation):
        return kernel.estimate(*(backend.to_numpy(a) if isinstance(a, torch.Tensor) else a
                                 for a in arguments))  # fmt: skip


@pytest.mark.parametrize("generation, share", (("gen3", 0.8), ("gen4", 0.7)))
def test_int8_decodes_at_the_rate_of_hbm(generation, share):
    """One token, 4096 x 14336; an estimate, which a change of the kernel must not lower."""
    from genai_perf.ops.quant_matmul.nki.int8_kernel import int8_matmul

    n, k = 4096, 14336
    vector = torch.empty(1, n)
    x, words = torch.empty(1, k, dtype=torch.bfloat16), torch.empty(n, k // 2, dtype=torch.uint16)
    report = estimate(generation, int8_matmul, x, words, vector, vector, False)
    assert report.busiest == "dma" and report.of_bandwidth > share


@pytest.mark.parametrize("code, per, share, zero, bandwidth", (
    ("int4", 4, 128, 8.0, 0.85), ("int4", 4, 128, "tensor", 0.85), ("int4", 4, 4096, 8.0, 0.8),
    ("e4m3", 2, 4096, "none", 0.85), ("e4m3", 2, 128, "none", 0.85),
    ("e5m2", 2, 4096, "none", 0.85), ("table4", 4, 64, "none", 0.22),
    ("fp8", 2, 4096, "none", 0.42),
))  # fmt: skip
def test_words_at_the_rate_of_hbm(code, per, share, zero, bandwidth):
    """One token on trn2, 14336 x 4096; an estimate, which a change must not lower."""
    from genai_perf.ops.quant_matmul.nki.words_kernel import words_matmul

    n, k = 14336, 4096
    x, words = torch.empty(1, k, dtype=torch.bfloat16), torch.empty(n, k // per, dtype=torch.uint16)
    scale, table = torch.empty(n, k // share), torch.empty(1, 256, dtype=torch.uint32)
    report = estimate("gen3", words_matmul, x, words, scale, scale, table, torch.empty(1, n), code,
                      per, share, zero, False)  # fmt: skip
    assert report.of_bandwidth > bandwidth


def test_fp8_products_at_twice_the_rate_of_bf16():
    """2048 tokens, 4096 x 4096: of the peak of double rows."""
    from genai_perf.ops.quant_matmul.nki.activation_kernels import fp8_matmul

    codes = torch.empty(4096, 2048, dtype=torch.uint16)
    row, like = torch.empty(1, 4096), torch.empty(1, 1, dtype=torch.bfloat16)
    report = estimate("gen3", fp8_matmul, codes[:2048], codes, row[:, :2048], row, row, like, False)
    assert report.busiest == "tensor" and report.of_peak > 0.9
