"""The Triton quantizers against the reference, bit for bit; run by test_quantize_triton.py."""

import pytest
import torch

import genai_perf as gp
from genai_perf.ops.quantize import cases
from genai_perf.ops.quantize.triton import FP8_SHAPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KNOWN = ("int8", "nf4", "fp4", *FP8_SHAPES)
WAYS = [n for n, (fmt, options) in cases.VARIANTS.items()
        if fmt in KNOWN and options.get("granularity") != "block"]  # fmt: skip


def assert_bits(x, format, **options):
    got = gp.quantize(x.to(DEVICE), format, backend="triton", **options)
    want = gp.quantize(x, format, backend="reference", **options)
    assert got.components().keys() == want.components().keys()
    for name, tensor in want.components().items():
        other = got.components()[name].cpu()
        assert other.dtype == tensor.dtype and other.shape == tensor.shape, name
        assert torch.equal(other.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), (
            name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_bits_of_the_reference(name, dtype):
    format, options = cases.VARIANTS[name]
    for shape in ((3, 256), (2, 5, 128), (8, 1280)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        x[0] = 0
        x[1] *= 1e-4
        assert_bits(x.to(dtype), format, **options)


@pytest.mark.parametrize("format", ["int8", *FP8_SHAPES])
def test_rows_of_any_width_and_none(format):
    for shape in ((1, 1), (5, 77), (67,), (0, 8)):
        assert_bits(torch.randn(shape, generator=torch.Generator().manual_seed(1)), format)


@pytest.mark.parametrize("format", FP8_SHAPES)
def test_the_last_group_of_a_row_may_be_short(format):
    for shape in ((1, 1), (3, 172), (2, 5, 130)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        assert_bits(x, format, granularity="group")


@pytest.mark.parametrize("name", WAYS)
def test_ties_and_extreme_magnitudes(name):
    format, options = cases.VARIANTS[name]
    grid = torch.cat([torch.arange(-512, 512) / 512, torch.arange(-128, 128) / 254]).view(1, -1)
    for scale in (1.0, 1e-45, 1e-42, 2.0**-120, 1e-20, 3e38):
        assert_bits(grid * scale, format, **options)
    values = torch.arange(256, dtype=torch.uint8)
    if format in FP8_SHAPES:
        codes = values.view(gp.formats.get(format).code_dtype).float()
        codes = codes[codes.abs() <= gp.formats.get(format).max].sort().values
        near = torch.cat([codes, (codes[1:] + codes[:-1]) / 2])
        near = torch.cat([near, near * (1 + 2.0**-20), near * (1 - 2.0**-20)])
        top = gp.formats.get(format).max
        near = torch.cat([near.clamp(-top, top), torch.tensor([top])])
        near = torch.nn.functional.pad(near, (0, -near.numel() % 128))
        assert_bits(near[None], format, **options)


def test_what_it_does_not_take_is_said():
    def reason(x, format, **options):
        with pytest.raises(gp.BackendUnsupported) as refused:
            gp.quantize(x.to(DEVICE), format, backend="triton", **options)
        return str(refused.value)

    assert "whole blocks of 64, got 65" in reason(torch.randn(65), "nf4")
    assert "does not quantize to int4" in reason(torch.randn(2, 128), "int4")
    assert "finite tensors" in reason(torch.randn(2, 8), "fp8", allow_nonfinite=True)
    assert "in groups of 128 here" in reason(torch.randn(2, 8), "fp8", granularity="block")
    with pytest.raises(ValueError, match=r"x must be finite, got nan at \(1, 3\)"):
        x = torch.zeros(2, 64)
        x[1, 3] = torch.nan
        gp.quantize(x.to(DEVICE), "int8", backend="triton")
