"""The Triton products with quantized weights against the float64 oracle; run by
test_quant_matmul_triton.py.

On a GPU if there is one, else in Triton's interpreter (TRITON_INTERPRET=1), in tiles of 16 x 64.
"""

from dataclasses import replace

import pytest
import torch

import genai_perf as gp
from genai_perf.ops.quant_matmul import cases
from genai_perf.ops.quant_matmul.triton import FORMATS
from genai_perf.testing.numerics import assert_close_to_oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Odd rows of nf4, blocks across row ends, a last tile that is cut, several splits.
SHAPES = ((1, 1), (3, 33), (43, 172), (20, 130))


def products(case: cases.Case, **options) -> dict[str, torch.Tensor]:
    x, weight, bias = cases.make_inputs(case, DEVICE)
    x.requires_grad_()
    y = gp.quant_matmul(x, weight, bias, backend="triton", **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy)[0], "dy": dy}


def check(case: cases.Case) -> None:
    x, weight, bias = cases.make_inputs(case, DEVICE)
    dense, got = weight.dequantize().float(), products(case)

    def exact(dtype):
        w = dense.to(dtype)
        y = x.to(dtype) @ w.T + (0 if bias is None else bias.to(dtype))
        return {"y": y, "dx": got["dy"].to(dtype) @ w}

    want, same = exact(torch.float64), exact(case.dtype)
    for name, factor in (("y", 2), ("dx", 3)):
        assert got[name].dtype == case.dtype
        assert_close_to_oracle(got[name], want[name], same[name], factor, name)


@pytest.mark.parametrize("m", [2, 17])
@pytest.mark.parametrize("name", [n for n, (fmt, _) in cases.WEIGHTS.items() if fmt in FORMATS])
def test_weights(name, m):
    fmt, options = cases.WEIGHTS[name]
    check(cases.Case("", m, 43, 172, fmt, options, bias=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["nf4-double", "int4-asymmetric", "int8", "fp8-block"])
def test_half_precision(name, dtype):
    fmt, options = cases.WEIGHTS[name]
    for m in (3, 20):
        check(cases.Case("", m, 43, 172, fmt, options, dtype, bias=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "nf4-double", "int4", "int4-g24-asymmetric", "fp8-block",
                                  "fp8-tensor", "int8"])  # fmt: skip
def test_shapes(name, shape):
    fmt, options = cases.WEIGHTS[name]
    for m in (1, 9):
        check(cases.Case("", m, *shape, fmt, options))


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_do(rows):
    for shape in ((0, 16), (16, 0)):
        case = cases.Case("", rows, *shape, "int4", bias=True)
        x, weight, bias = cases.make_inputs(case, DEVICE)
        y = gp.quant_matmul(x, weight, bias, backend="triton")
        assert torch.equal(y, gp.quant_matmul(x, weight, bias, backend="reference"))


def test_every_code_decodes_as_the_reference_does():
    """One-hot rows read W itself, all 256 codes of a byte among it."""
    codes = torch.arange(256).repeat(2).view(4, 128)
    for fmt in ("int8", "fp8", "fp8_e5m2"):
        weight = gp.formats.get(fmt).quantize(torch.randn(4, 128))
        weight.qdata = codes.to(torch.uint8).view(weight.qdata.dtype).to(DEVICE)
        weight.scale = weight.scale.to(DEVICE)
        want = weight.dequantize().float()
        finite = torch.isfinite(want).all(0)  # a one-hot row multiplies what is not finite by 0
        x = torch.eye(128, device=DEVICE)[finite]
        weight.qdata = torch.where(finite, weight.qdata.view(torch.uint8), 0).view(
            weight.qdata.dtype
        )
        for rows in (x[:8], x):
            got = gp.quant_matmul(rows, weight, backend="triton")
            assert torch.equal(got, want.T[finite][: len(rows)])


@pytest.mark.parametrize("name", ["nf4-double", "int4-asymmetric"])
@pytest.mark.parametrize("m, alone", [(8, 1), (30, 9)])
def test_a_row_does_not_see_the_others(name, m, alone):
    fmt, options = cases.WEIGHTS[name]
    x, weight, bias = cases.make_inputs(cases.Case("", m, 43, 172, fmt, options, bias=True), DEVICE)
    whole = gp.quant_matmul(x, weight, bias, backend="triton")
    assert torch.equal(gp.quant_matmul(x[:alone], weight, bias, backend="triton"), whole[:alone])
    assert torch.equal(gp.quant_matmul(x, weight, bias, backend="triton"), whole)


def test_poison_in_rows_between_changes_nothing():
    case = cases.Case("", 12, 43, 172, "nf4")
    x, weight, _ = cases.make_inputs(case, DEVICE)
    guard = torch.full((24, 200), torch.nan, device=DEVICE)
    guard[::2, 5:177] = x
    want = gp.quant_matmul(x, weight, backend="triton")
    assert torch.equal(gp.quant_matmul(guard[::2, 5:177], weight, backend="triton"), want)


def test_components_that_do_not_fit_are_named():
    x, weight, _ = cases.make_inputs(cases.Case("", 2, 43, 172, "int4"), DEVICE)
    weight.scale = weight.scale[:, :1]
    with pytest.raises(ValueError, match="qweight.scale must be 86 elements"):
        gp.quant_matmul(x, weight, backend="triton")


def test_both_ways_of_a_call_agree():
    case = cases.Case("", 3, 43, 172, "int8", dtype=torch.bfloat16)
    one = products(case)
    two = products(replace(case, m=3))
    assert all(torch.equal(one[name], two[name]) for name in one)


ROUNDED = {
    "int8": ("int8", {}, "int8"),
    "fp8": ("fp8", {}, "fp8"),
    "fp8-tensor": ("fp8", {"granularity": "tensor"}, "fp8"),
    "fp8-block": ("fp8", {"granularity": "block"}, "fp8"),
    "fp8-group": ("fp8", {"granularity": "group"}, "fp8"),
    "fp8_240": ("fp8_240", {}, "fp8"),
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_rows(name, own, monkeypatch):
    """int8 has the bits of the reference; fp8 adds exact products of its codes in float32, which
    the chip multiplies itself (own) or as float16."""
    fmt, options, activations = ROUNDED[name]
    if own and DEVICE == "cpu" and activations == "fp8":
        from genai_perf.ops.quant_matmul.triton import rounded

        monkeypatch.setattr(rounded, "kind", lambda format, arch: rounded.FP8.value)
    for m, n, k in ((1, 1, 1), (3, 43, 172), (33, 70, 256), (17, 130, 300)):
        for dtype in (torch.float32, torch.bfloat16):
            case = cases.Case("", m, n, k, fmt, options, dtype, bias=True)
            x, weight, bias = cases.make_inputs(case, DEVICE)
            if m > 2:
                x[0], x[2, -1] = 0, torch.nan
            want = gp.quant_matmul(x, weight, bias, activations=activations, backend="reference")
            got = gp.quant_matmul(x, weight, bias, activations=activations, backend="triton")
            if fmt == "int8":
                assert torch.equal(got.nan_to_num(7e9), want.nan_to_num(7e9))
            else:
                tight = 1e-5 if dtype == torch.float32 else 1e-2
                torch.testing.assert_close(got, want, rtol=tight, atol=tight, equal_nan=True)


def test_outlier_columns():
    x, weight, bias = cases.make_inputs(cases.Case("", 5, 43, 172, "int8", bias=True), DEVICE)
    x[1, 7] = 60.0
    options = {"activations": "int8", "threshold": 6.0}
    want = gp.quant_matmul(x, weight, bias, **options, backend="reference")
    assert torch.equal(gp.quant_matmul(x, weight, bias, **options, backend="triton"), want)


def test_a_rounded_row_does_not_see_the_others():
    for fmt, options, activations in ROUNDED.values():
        case = cases.Case("", 20, 43, 172, fmt, options)
        x, weight, _ = cases.make_inputs(case, DEVICE)
        whole = gp.quant_matmul(x, weight, activations=activations, backend="triton")
        alone = gp.quant_matmul(x[17:], weight, activations=activations, backend="triton")
        assert torch.equal(alone, whole[17:])
        guard = torch.full((40, 200), torch.nan, device=DEVICE)
        guard[::2, 5:177] = x
        spread = guard[::2, 5:177]
        assert torch.equal(
            gp.quant_matmul(spread, weight, activations=activations, backend="triton"), whole
        )
