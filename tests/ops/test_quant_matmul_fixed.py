"""4-bit weights against up to 8 rows of bf16 and fp16: products of integers, whatever x holds."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import genai_perf as gp
from genai_perf import formats
from genai_perf.ops.quant_matmul import cases
from genai_perf.testing.numerics import assert_close_to_oracle

pytest.importorskip("genai_perf._C", reason="the native extension is not built")
HALVES = (torch.bfloat16, torch.float16)
# Blocks from where they lie, two scales in a chunk, zero points, and groups lane by lane.
WEIGHTS = ("nf4-double", "nf4-g32", "fp4", "int4", "int4-asymmetric", "int4-g24-asymmetric")
SHAPES = ((43, 172), (64, 640), (130, 301))


def weight(name, n, k, zero_columns=None):
    fmt, options = cases.WEIGHTS[name]
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.05
    if zero_columns is not None:
        dense[:, zero_columns] = 0
    return formats.get(fmt).quantize(dense, **options)


def rows(k, dtype):
    """Six rows by what they ask of the kernel, as integers of one term, of two, or as floats."""
    g = torch.Generator().manual_seed(3)
    plain = torch.randn(k, generator=g)
    outlier = torch.randn(k, generator=g)
    outlier[5::64] *= 1000
    tail = F.silu(2 * torch.randn(k, generator=g)) * torch.randn(k, generator=g) ** 3
    tiny = torch.full((k,), 1e-39 if dtype == torch.bfloat16 else 1e-7)
    chunk = torch.cat([torch.zeros(128), torch.randn(k - 128, generator=g)])
    mixed = torch.randn(k, generator=g) * 10.0 ** -torch.arange(k).remainder(8)
    x = {"plain": plain, "outlier": outlier, "tail": tail, "tiny": tiny,
         "zero chunk": chunk, "mixed": mixed}  # fmt: skip
    return {name: row.to(dtype) for name, row in x.items()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_row_keeps_the_rule(isa, name, dtype):
    """Each row alone, against its own yardstick: large rows must not hide what small ones lose."""
    for n, k in SHAPES:
        q = weight(name, n, k)
        dense = q.dequantize(torch.float32)
        for what, row in rows(k, dtype).items():
            x = row[None]
            y = gp.quant_matmul(x, q, backend="native")
            same = F.linear(x, dense.to(dtype))
            assert_close_to_oracle(y, x.double() @ dense.double().T, same, name=f"{what} {n}x{k}")


def residue(x, q):
    """y with a bias that takes the product away, in parts of the sum of magnitudes: the kernel's
    error, which rounding y would cover."""
    dense = q.dequantize(torch.float32).double()
    y64, size = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    got = torch.cat([gp.quant_matmul(x, q, -y.float(), backend="native")[i : i + 1]
                     for i, y in enumerate(y64)])  # fmt: skip
    return (got.double().abs() / size.clamp_min(1e-300)).max().item()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "int4-asymmetric"])
def test_outliers_that_meet_zeros_hide_nothing(isa, name, dtype):
    """W is zero where x has its 1000s: what is left of x must not have lost its bits to them."""
    n, k = 32, 640
    columns = torch.arange(5, k, 64)
    q = weight(name, n, k, columns)
    assert not q.dequantize(torch.float32)[:, columns].any()
    x = torch.stack([rows(k, dtype)["plain"], rows(k, dtype)["outlier"]])
    assert residue(x, q) < 2.0**-13


def saturated(name, k, positive, dtype):
    """Rows of W and x whose products all have the largest magnitude, and the sign of `positive`."""
    fmt, options = cases.WEIGHTS[name]
    low, high = {"nf4": (0, 15), "fp4": (11, 3), "int4": (0, 15), "int4-asymmetric": (0, 15)}[name]
    sign = 1 - 2 * (torch.arange(k) % 2)
    codes = torch.where(sign > 0, high, low).to(torch.uint8)
    first, second = (4, 0) if fmt in ("nf4", "fp4") else (0, 4)
    packed = (codes[::2] << first | codes[1::2] << second).to(torch.uint8)
    q = formats.get(fmt).quantize(torch.ones(2, k), **options)
    q = replace(q, qdata=packed.expand(2, -1).contiguous().view(q.qdata.shape))
    most = {torch.bfloat16: 255 / 128, torch.float16: 2047 / 1024}[dtype]
    return ((sign if positive else -sign) * most).to(dtype)[None], q


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "int4-asymmetric"])
def test_sums_reach_their_bound(isa, name, positive, dtype):
    x, q = saturated(name, 512, positive, dtype)
    want = x.double() @ q.dequantize(torch.float32).double().T
    assert want.abs().min() > 0.5 * 512 and residue(x, q) < 2.0**-22
    assert torch.equal(gp.quant_matmul(x, q, backend="native"), want.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_beyond_integers_are_those_of_floats(isa, name, dtype):
    n, k = 43, 301 if name.startswith(("nf4", "fp4")) else 300
    q = weight(name, n, k)
    x = torch.stack([*rows(k, dtype).values()])
    bad = x[:1].repeat(4, 1)
    bad[0, 70], bad[1, 70], bad[2, k - 1] = float("inf"), float("-inf"), float("nan")
    bad[3, 0] = torch.finfo(dtype).max if dtype == torch.bfloat16 else float("inf")
    alone = gp.quant_matmul(bad, q, backend="native")
    floats = gp.quant_matmul(bad.float(), q, backend="native").to(dtype)
    assert torch.equal(torch.isnan(alone), torch.isnan(floats)) and torch.isnan(alone[2]).all()
    assert torch.equal(alone.nan_to_num(7.0), floats.nan_to_num(7.0))
    among = gp.quant_matmul(torch.cat([x[:3], bad[:3], x[3:5]]), q, backend="native")
    good = gp.quant_matmul(x[:5], q, backend="native")
    assert torch.equal(among[[0, 1, 2, 6, 7]], good)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_same_bits_alone_among_others_and_for_any_threads(isa, name, dtype):
    before = torch.get_num_threads()
    for n, k in ((43, 172), (130, 301), (600, 640)):
        q = weight(name, n, k)
        x = torch.stack([*rows(k, dtype).values()])
        x = torch.cat([x, x[:1] * 0, x[:2]])[:8]
        want = torch.cat([gp.quant_matmul(row[None], q, backend="native") for row in x])
        assert not want[6].any()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for m in (2, 3, 5, 8):
                    assert torch.equal(gp.quant_matmul(x[:m], q, backend="native"), want[:m])
                backwards = gp.quant_matmul(x.flip(0), q, backend="native").flip(0)
                assert torch.equal(backwards, want)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "int4-asymmetric", "int4-row-fp16"])
def test_a_unit_vector_reads_the_weight(isa, name, dtype):
    """int4 and fp4 exactly; nf4 within 2^-15.9 of the largest of its block."""
    q = weight(name, 43, 172)
    dense = q.dequantize(torch.float32)
    for at in (0, 63, 64, 171):
        x = torch.zeros(1, 172, dtype=dtype)
        x[0, at] = 1.0
        error = gp.quant_matmul(x, q, -dense[:, at].contiguous(), backend="native").abs().max()
        if name == "nf4":
            assert error <= 2.0**-15.9 * dense.abs().max()
        else:  # fp4: the unit 1/16320 and the rounding of code * scale
            assert error <= (2.0**-23 * dense.abs().max() if name == "fp4" else 0)
            y = gp.quant_matmul(x, q, backend="native")[0]
            assert torch.equal(y, dense[:, at].to(dtype)) or name == "fp4"
