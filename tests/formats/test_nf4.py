"""nf4 against bitsandbytes' CPU back end, and the double quantization against float64.

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

from genai_perf.formats import nf4

bnb = pytest.importorskip("bitsandbytes.functional")
ROOT = Path(__file__).resolve().parents[2]


def assert_equals_bitsandbytes(x, block=64):
    packed, state = bnb.quantize_4bit(x, quant_type="nf4", blocksize=block)
    qt = nf4.quantize(x, group_size=block)
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


def test_code_book_is_the_same_in_cpp_and_bitsandbytes():
    text = (ROOT / "csrc/common/codebooks.h").read_text()
    body = re.search(r"NF4\[16\] = \{(.*?)\}", text, re.S).group(1)
    values = [float(v.rstrip("f")) for v in re.findall(r"-?[\d.]+f?", body)]
    assert values == list(nf4.NF4)
    assert torch.equal(nf4.code_book(), bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [32, 64, 128, 4096])
@pytest.mark.parametrize("shape", [(64, 64), (3, 200), (5, 77), (1,), (63,), (129,)], ids=str)
def test_equals_bitsandbytes(shape, block, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    qt, packed, state = assert_equals_bitsandbytes(x, block)
    # Its CPU kernel takes the wrong scales where a block crosses the end of a row.
    if shape[-1] % block == 0:
        assert torch.equal(qt.dequantize(), bnb.dequantize_4bit(packed, state).reshape(shape))
    codes = torch.stack([qt.qdata >> 4, qt.qdata & 15], 1).view(-1)[: x.numel()]
    dense = nf4.code_book().numpy()[codes.numpy()] * np.repeat(qt.scale.numpy(), block)[: x.numel()]
    assert torch.equal(qt.dequantize(), torch.from_numpy(dense).view(shape).to(dtype))


@settings(max_examples=150, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
@given(hnp.arrays("float32", st.integers(1, 200),
                  elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))  # fmt: skip
def test_equals_bitsandbytes_for_any_floats(array):
    assert_equals_bitsandbytes(torch.from_numpy(array.copy()))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.floats(-44, 38), st.integers(1, 700))
def test_equals_bitsandbytes_at_any_scale(seed, exponent, count):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(count) * 10.0**exponent * 10.0 ** rng.uniform(-3, 0, count)
    x[rng.random(count) < 0.1] = 0.0
    x = np.clip(x, -3e38, 3e38).astype(np.float32)
    assert_equals_bitsandbytes(torch.from_numpy(x))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(-126, 127), st.integers(0, 63))
def test_ties_and_their_neighbours_equal_bitsandbytes(exponent, place):
    book = nf4.code_book()
    bounds = (book[:-1] + book[1:]) / 2
    near = torch.cat([bounds, torch.nextafter(bounds, bounds + 1),
                      torch.nextafter(bounds, bounds - 1), book])  # fmt: skip
    x = torch.cat([near, torch.zeros(64 - near.numel() % 64)]) * 2.0**exponent
    x = torch.nn.functional.pad(x, (0, -x.numel() % 64)).view(-1, 64)
    x[:, place] = 2.0**exponent  # absmax, so that t is the tie itself
    assert_equals_bitsandbytes(x)


def test_blocks_of_zeros_and_subnormals():
    x = torch.zeros(4, 64)
    x[1] = 1e-45
    x[2, 5] = -1e-39
    qt, *_ = assert_equals_bitsandbytes(x)
    assert torch.equal(qt.dequantize()[0], torch.zeros(64))
    assert_equals_bitsandbytes(torch.zeros(70))
    assert_equals_bitsandbytes(torch.full((70,), 1e-42))


def test_double_quantization_against_bitsandbytes():
    x = torch.randn(512, 640, generator=torch.Generator().manual_seed(0))
    x *= torch.exp(2 * torch.randn(512, 1, generator=torch.Generator().manual_seed(1)))
    packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    qt = nf4.quantize(x, double_quant=True)
    assert torch.equal(qt.qdata, packed.view(-1))
    assert torch.equal(qt.scale_offset, state.offset)
    assert torch.equal(qt.nested_scale, state.state2.absmax)
    absmax = nf4.quantize(x).scale.double()
    ours = (nf4.block_scales(qt).double() - absmax).abs()
    qt.scale = state.absmax
    theirs = (nf4.block_scales(qt).double() - absmax).abs()
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
