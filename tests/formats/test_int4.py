"""int4, int3 and int2 against compressed-tensors' own quantizer and packer, and golden words."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genai_perf import formats
from genai_perf.formats import int4

ct = pytest.importorskip("compressed_tensors.quantization")
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402


def by_compressed_tensors(x, bits, group_size, symmetric):
    strategy = {"strategy": "channel"} if group_size == -1 else {
        "strategy": "group", "group_size": group_size}  # fmt: skip
    args = ct.QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    groups = x.unflatten(1, (-1, x.shape[1] if group_size == -1 else group_size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    return scale, zero, ct_quantize(x, scale, zero, args, dtype=torch.int8)


@pytest.mark.parametrize("bits", [4, 3, 2])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.booleans(),
       st.sampled_from([-1, 32, 128]))  # fmt: skip
def test_equals_compressed_tensors(bits, seed, exponent, symmetric, group_size):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 256)) + rng.uniform(-2, 2, (3, 1))
    x = torch.from_numpy((x * 10.0**exponent).astype(np.float32))
    scale, zero, codes = by_compressed_tensors(x, bits, group_size, symmetric)
    half = 1 << bits - 1
    qt = formats.get(f"int{bits}").quantize(x, group_size=group_size, symmetric=symmetric)
    assert torch.equal(qt.scale, scale)
    assert torch.equal(int4.unpack(qt.qdata, 256, bits).to(torch.int8) - half, codes)
    words = pack_to_int32(codes, bits)
    assert torch.equal(qt.qdata.view(torch.int32), words)
    if symmetric:
        assert qt.zero_point is None
    else:
        assert torch.equal(qt.zero_point.to(torch.int8) - half, zero.to(torch.int8))


def test_golden_words():
    qt = int4.quantize(torch.arange(-8, 8, dtype=torch.float32)[None] * 7.5 / 8, group_size=-1)
    codes = torch.arange(16, dtype=torch.uint8)[None]
    words = int4.pack(codes).view(torch.int32)[0]
    assert [w & 0xFFFFFFFF for w in words.tolist()] == [0x76543210, 0xFEDCBA98]
    assert torch.equal(int4.unpack(int4.pack(codes), 16), codes)
    assert qt.scale.item() == 1.0


def test_golden_bytes_of_three_and_two_bits():
    """Codes 0 to 7 over and over, one little-endian stream: 0x88fac688 and so on as words."""
    codes = (torch.arange(32) % 8).to(torch.uint8)[None]
    words = int4.pack(codes, 3).view(torch.int32)[0]
    assert [w & 0xFFFFFFFF for w in words.tolist()] == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    assert int4.pack(codes[:, :8] & 3, 2).tolist() == [[0b11100100, 0b11100100]]
    for bits in (2, 3):
        for k in (1, 2, 3, 5, 8, 9, 31):
            part = codes[:, :k] & ((1 << bits) - 1)
            packed = int4.pack(part, bits)
            assert packed.shape == (1, -(-k * bits // 8))
            assert torch.equal(int4.unpack(packed, k, bits), part)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [1, 7, 31, 33, 200])
def test_rows_that_groups_do_not_divide(k, symmetric):
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(k))
    qt = int4.quantize(x, group_size=32, symmetric=symmetric)
    assert qt.qdata.shape == (3, -(-k // 2)) and qt.scale.shape == (3, -(-k // 32))
    dense = qt.dequantize()
    for first in range(0, k, 32):
        part = int4.quantize(x[:, first : first + 32], group_size=-1, symmetric=symmetric)
        assert torch.equal(dense[:, first : first + 32], part.dequantize())
    if k % 2:
        assert (qt.qdata[:, -1] >> 4 == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_rounded_before_the_codes(dtype, symmetric):
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    qt = int4.quantize(x, symmetric=symmetric, scale_dtype=dtype)
    assert qt.scale.dtype == dtype
    groups = x.double().view(40, 2, 128)
    scale = qt.scale.double()[..., None]
    zero = 8 if symmetric else qt.zero_point.double()[..., None]
    codes = int4.unpack(qt.qdata, 256).view(40, 2, 128).double()
    # Each code is the best one for the rounded scale; codes for the exact one are not.
    best = (groups / scale + zero).clamp(0, 15)
    assert ((codes - best).abs() <= 0.5 + 1e-4).all()


def test_half_scales_of_small_weights_keep_their_subnormals():
    x = torch.linspace(-1, 1, 128)[None] * 1e-5
    error = (int4.quantize(x, scale_dtype=torch.float16).dequantize() - x).abs().max()
    assert error < 1.2e-6


def test_zero_is_exact():
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    x[x.abs() < 0.5] = 0
    for symmetric in (True, False):
        dense = int4.quantize(x + (x != 0) * 0.3, symmetric=symmetric).dequantize()
        assert (dense[x == 0] == 0).all()
