"""The NKI quantizers in the interpreter: bits of the reference; fp8, W8A8, norms by their own."""

import pytest
import torch
from nki_backend import GENERATIONS, interpreting

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


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_fp8_up_to_240(generation, dtype):
    """The reference's scales; a code differs only where x / scale lies by a tie, by one step."""
    x = (torch.randn(130, 600, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    x[3] = 0
    want = gp.quantize(x, "fp8_240", backend="reference")
    with interpreting(generation):
        got = gp.quantize(x, "fp8_240", backend="nki")
        dense = gp.dequantize(want, backend="nki")
    assert torch.equal(got.scale, want.scale) and got.qdata.float().abs().max() == 240
    codes, other = (q.qdata.view(torch.uint8).int() for q in (got, want))
    assert (codes != other).float().mean() < 1e-3 and (codes - other).abs().max() <= 1
    assert torch.equal(dense, want.dequantize())


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
    (("fp8", {}), "nki quantizes int8, fp8_240 and nf4"),
    (("nf4", {"double_quant": True}), "scales of nf4"),
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
