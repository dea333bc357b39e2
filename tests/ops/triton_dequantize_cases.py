"""The Triton dequantization against the reference, bit for bit; run by test_quantize_triton.py."""

import pytest
import torch

import genai_perf as gp
from genai_perf.ops.quant_matmul.triton import FORMATS
from genai_perf.ops.quantize import cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((1, 1), (67,), (3, 203), (130, 70), (3, 13, 70), (0, 8))


def taken(format: str, options: dict, shape: tuple[int, ...]) -> bool:
    return format in FORMATS and not (options.get("granularity") == "block" and len(shape) > 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [n for n, (fmt, _) in cases.VARIANTS.items() if fmt in FORMATS])
def test_bits_of_the_reference(name, dtype):
    format, options = cases.VARIANTS[name]
    for shape in SHAPES:
        if taken(format, options, shape):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
            qt = gp.quantize(x, format, **options, backend="reference").to(DEVICE)
            got = gp.dequantize(qt, backend="triton")
            want = gp.dequantize(qt, backend="reference")
            assert got.dtype == dtype and torch.equal(got, want), shape


def test_every_code_of_a_byte():
    for format in ("int8", "fp8", "fp8_e5m2"):
        qt = gp.quantize(torch.randn(2, 128), format, backend="reference").to(DEVICE)
        qt.qdata = torch.arange(256, device=DEVICE).byte().view(2, 128).view(qt.qdata.dtype)
        got, want = (gp.dequantize(qt, backend=name) for name in ("triton", "reference"))
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
        assert torch.equal(got.isnan(), want.isnan())


def test_what_it_does_not_take_is_said():
    qt = gp.quantize(torch.randn(2, 3, 8), "fp8", granularity="block", backend="reference")
    with pytest.raises(gp.BackendUnsupported, match=r"in matrices, got shape \(2, 3, 8\)"):
        gp.dequantize(qt.to(DEVICE), backend="triton")
    qt = gp.quantize(torch.randn(2, 256), "dynamic8", backend="reference")
    with pytest.raises(gp.BackendUnsupported, match="does not dequantize dynamic8"):
        gp.dequantize(qt.to(DEVICE), backend="triton")
