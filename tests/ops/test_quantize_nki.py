"""The NKI quantizers in the interpreter: bits of the reference; fp8, W8A8, norms by their own."""

import pytest
import torch
from nki_backend import GENERATIONS, backend, interpreting

import genai_perf as gp
from genai_perf.ops.quantize import cases


def takes(case) -> bool:
    whole = torch.Size(case.shape).numel() % case.options.get("group_size", 64) == 0
    return case.format == "int8" or (
        case.format == "nf4" and whole and not case.options.get("double_quant"))  # fmt: skip


CASES = [c for c in cases.CASES if {"smoke", "edge"} & set(c.tags) and takes(c)]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bits_of_the_reference(case, generation):
    x = cases.make_inputs(case)
    want = gp.quantize(x, case.format, **case.options, backend="reference")
    with interpreting(generation):
        got = gp.quantize(x, case.format, **case.options, backend="nki")
        dense = gp.dequantize(want, backend="nki")
    for name, tensor in want.components().items():
        assert torch.equal(got.components()[name], tensor), name
    assert torch.equal(dense, gp.dequantize(want, backend="reference"))


def test_ragged_nf4_is_dequantized():
    want = gp.quantize(torch.randn(3, 203), "nf4", double_quant=True, backend="reference")
    with interpreting():
        assert torch.equal(
            gp.dequantize(want, backend="nki"), gp.dequantize(want, backend="reference")
        )


def test_rows_of_every_size():
    x = torch.tensor([[0.0] * 8, [1e-40] * 8, [3e38] * 8, [1e-36, -2e-37] * 4])
    want = gp.quantize(x, "int8", backend="reference")
    with interpreting():
        got = gp.quantize(x, "int8", backend="nki")
    assert torch.equal(got.qdata, want.qdata) and torch.equal(got.scale, want.scale)


@pytest.mark.parametrize("options, reason", (
    (("fp8", {}), "nki quantizes int8 and nf4"), (("nf4", {"double_quant": True}), "scales of nf4"),
))  # fmt: skip
def test_what_it_does_not_take(options, reason):
    with interpreting(), pytest.raises(gp.BackendUnsupported, match=reason):
        gp.quantize(torch.ones(4, 64), options[0], **options[1], backend="nki")


@pytest.mark.parametrize("fp8", (False, True))
def test_norm_and_quantize(fp8):
    from genai_perf.ops.quantize.nki import quantize_rows

    torch.manual_seed(0)
    x, gamma = torch.randn(130, 5000) * 3, torch.rand(5000) + 0.5
    exact = x.double() * (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt() * gamma
    with interpreting():
        codes, absmax = quantize_rows(x, gamma, fp8=fp8)
    limit = 240 if fp8 else 127
    torch.testing.assert_close(
        absmax.double(), exact.abs().amax(1, keepdim=True), rtol=1e-6, atol=0
    )
    error = (codes.double() * absmax / limit - exact).abs()
    step = exact.abs() * 2.0**-4 + absmax * 2.0**-10 / limit if fp8 else absmax / limit / 2
    assert (error <= 1.001 * step).all() and codes.float().abs().max() == limit


def test_fp8_product_in_double_rows():
    from genai_perf.ops.quant_matmul.nki.activation_kernels import fp8_matmul

    torch.manual_seed(0)
    a, b = (torch.randn(520, n).to(torch.float8_e4m3fn) for n in (130, 600))
    with interpreting():
        got = backend.launch(fp8_matmul, a, b, 0.5)
    exact = 0.5 * a.double().T @ b.double()
    assert (got.double() - exact).abs().max() <= 2.0**-8 * exact.abs().max()


def test_w8a8_is_exact():
    from genai_perf.ops.quant_matmul.nki.activation_kernels import w8a8_matmul

    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-127, 128, (n, 1000), generator=generator) for n in (130, 140))
    with interpreting():
        got = backend.launch(w8a8_matmul, x.to(torch.int8), w.to(torch.int8), torch.ones(1, 130),
                             torch.full((1, 140), 0.5))  # fmt: skip
    assert torch.equal(got, ((x @ w.T) * 0.5).float())
