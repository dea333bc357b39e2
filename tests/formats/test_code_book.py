"""nf4 and fp4 against bitsandbytes' CPU back end, and the double quantization against float64.

Codes and absmax equal bitsandbytes' for every finite input: blocks of zeros, subnormals and the
last partial block included, where its CPU and CUDA paths differ and this follows the CPU. Not
compared:
- the nested 8-bit codes of double quantization: bitsandbytes' CPU path takes them from a table of
  65,536 bins that is wrong near zero; here they are exactly the nearest (a tie goes down), so the
  offset and the nested scales are compared, and each code is at least as near as bitsandbytes';
- inputs whose block scales sum beyond fp32, whose offset is infinite in bitsandbytes.
"""

import re
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genai_perf import formats
from genai_perf.formats import code_book, fp4, nf4

bnb = pytest.importorskip("bitsandbytes.functional")
ROOT = Path(__file__).resolve().parents[2]
kinds = pytest.mark.parametrize("kind", ["nf4", "fp4"])


def assert_equals_bitsandbytes(x, kind, block=64):
    packed, state = bnb.quantize_4bit(x, quant_type=kind, blocksize=block)
    qt = formats.get(kind).quantize(x, group_size=block)
    assert torch.equal(qt.qdata, packed.view(-1))
    assert torch.equal(qt.scale.view(torch.int32), state.absmax.view(torch.int32))
    return qt, packed, state


def test_golden_vector():
    x = 2 * torch.arange(64, dtype=torch.float32) / 63 - 1
    qt = nf4.quantize(x)
    assert qt.scale.tolist() == [1.0]
    assert bytes(qt.qdata.tolist()).hex() == (
        "00000111111112222233344445556667788899aaabbbccccddddeeeeeeefffff"
    )


@kinds
def test_code_book_is_the_same_in_cpp_and_bitsandbytes(kind):
    text = (ROOT / "csrc/common/codebooks.h").read_text()
    body = re.search(rf"{kind.upper()}\[16\] = \{{(.*?)\}}", text, re.S).group(1)
    numbers = re.findall(r"(-?[\d.]+)f?(?: / (12))?", body)
    values = torch.tensor([float(value) for value, _ in numbers]) / (12 if numbers[0][1] else 1)
    assert torch.equal(values, formats.get(kind).book())
    assert torch.equal(formats.get(kind).book(), bnb.get_4bit_type(kind, device="cpu"))
    order = re.search(rf"{kind.upper()}_ORDER\[16\] = \{{(.*?)\}}", text).group(1)
    assert [int(code) for code in order.split(",")] == formats.get(kind).order


def test_golden_vector_fp4():
    qt = fp4.quantize(torch.tensor([[0, 1e-6, -1e-6, 1, -1, 0.5, 2 / 3, 1 / 6, 1 / 3, -0.25]]))
    assert bytes(qt.qdata.tolist()).hex() == "0803b5264f"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [32, 64, 128, 4096])
@pytest.mark.parametrize("shape", [(64, 64), (3, 200), (5, 77), (1,), (63,), (129,)], ids=str)
@kinds
def test_equals_bitsandbytes(shape, block, dtype, kind):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    qt, packed, state = assert_equals_bitsandbytes(x, kind, block)
    # Its CPU kernel takes the wrong scales where a block crosses the end of a row.
    if shape[-1] % block == 0:
        assert torch.equal(qt.dequantize(), bnb.dequantize_4bit(packed, state).reshape(shape))
    codes = torch.stack([qt.qdata >> 4, qt.qdata & 15], 1).view(-1)[: x.numel()]
    scales = np.repeat(qt.scale.numpy(), block)[: x.numel()]
    dense = formats.get(kind).book().numpy()[codes.numpy()] * scales
    assert torch.equal(qt.dequantize(), torch.from_numpy(dense).view(shape).to(dtype))


@kinds
@settings(max_examples=150, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
@given(hnp.arrays("float32", st.integers(1, 200),
                  elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))  # fmt: skip
def test_equals_bitsandbytes_for_any_floats(kind, array):
    assert_equals_bitsandbytes(torch.from_numpy(array.copy()), kind)


@kinds
@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.floats(-44, 38), st.integers(1, 700))
def test_equals_bitsandbytes_at_any_scale(kind, seed, exponent, count):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(count) * 10.0**exponent * 10.0 ** rng.uniform(-3, 0, count)
    x[rng.random(count) < 0.1] = 0.0
    x = np.clip(x, -3e38, 3e38).astype(np.float32)
    assert_equals_bitsandbytes(torch.from_numpy(x), kind)


@kinds
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(-126, 127), st.integers(0, 63))
def test_ties_and_their_neighbours_equal_bitsandbytes(kind, exponent, place):
    book, bounds = formats.get(kind).book(), formats.get(kind).bounds()
    near = torch.cat([bounds, torch.nextafter(bounds, bounds + 1),
                      torch.nextafter(bounds, bounds - 1), book])  # fmt: skip
    x = torch.cat([near, torch.zeros(64 - near.numel() % 64)]) * 2.0**exponent
    x = torch.nn.functional.pad(x, (0, -x.numel() % 64)).view(-1, 64)
    x[:, place] = 2.0**exponent  # absmax, so that t is the tie itself
    assert_equals_bitsandbytes(x, kind)


@kinds
def test_blocks_of_zeros_and_subnormals(kind):
    x = torch.zeros(4, 64)
    x[1] = 1e-45
    x[2, 5] = -1e-39
    qt, *_ = assert_equals_bitsandbytes(x, kind)
    assert torch.equal(qt.dequantize()[0], torch.zeros(64))
    assert_equals_bitsandbytes(torch.zeros(70), kind)
    assert_equals_bitsandbytes(torch.full((70,), 1e-42), kind)


@kinds
def test_double_quantization_against_bitsandbytes(kind):
    x = torch.randn(512, 640, generator=torch.Generator().manual_seed(0))
    x *= torch.exp(2 * torch.randn(512, 1, generator=torch.Generator().manual_seed(1)))
    packed, state = bnb.quantize_4bit(x, quant_type=kind, compress_statistics=True)
    qt = formats.get(kind).quantize(x, double_quant=True)
    assert torch.equal(qt.qdata, packed.view(-1))
    assert torch.equal(qt.scale_offset, state.offset)
    assert torch.equal(qt.nested_scale, state.state2.absmax)
    absmax = formats.get(kind).quantize(x).scale.double()
    ours = (code_book.block_scales(qt).double() - absmax).abs()
    qt.scale = state.absmax
    theirs = (code_book.block_scales(qt).double() - absmax).abs()
    # A code that is nearer before the fp32 sum with the offset may lose an ulp of the sum.
    assert (ours <= theirs + 1e-7 * absmax.max()).all()
    assert ours.mean() < theirs.mean()
    dense = bnb.dequantize_4bit(packed, state)
    torch.testing.assert_close(qt.dequantize(), dense, rtol=2e-7, atol=0)


@pytest.mark.parametrize("huge", [1e38, 3.4e38])
def test_double_quantization_of_huge_weights_gives_no_nan(huge):
    x = torch.linspace(-1, 1, 64 * 300) * huge
    qt = nf4.quantize(x, double_quant=True)
    assert qt.scale_offset.isfinite()
    assert not qt.dequantize().isnan().any()
