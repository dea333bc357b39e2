"""The dynamic maps against bitsandbytes, their codes against the nearest value, and dynamic8."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genai_perf as gp
from genai_perf.formats import dynamic8
from genai_perf.formats.dynamic_map import bin_starts, dynamic_bounds, dynamic_map, encode_blocks

bnb = pytest.importorskip("bitsandbytes.functional")
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@SIGNED
def test_map_equals_bitsandbytes(signed):
    assert torch.equal(dynamic_map(signed), bnb.create_dynamic_map(signed))


@SIGNED
@settings(max_examples=40, deadline=None, derandomize=True)
@given(array=hnp.arrays("float32", st.integers(1, 300), elements=st.floats(-1, 1, width=32)))
def test_codes_are_exactly_the_nearest(signed, array):
    x = torch.from_numpy(np.append(array, np.float32(1)))
    x = x if signed else x.abs()
    codes, absmax = encode_blocks(x, 512, signed)
    distance = (dynamic_map(signed).double()[None] - x.double()[:, None]).abs()
    assert absmax.tolist() == [1.0]
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    # The bounds are fp32: a value within half an ulp of a midpoint may go to either side.
    assert (chosen <= distance.min(1).values + 2.0**-25 * x.abs().double()).all()


@SIGNED
def test_bins_hold_at_most_one_bound(signed):
    bits = 6 if signed else 7
    bounds, starts = dynamic_bounds(signed), bin_starts(signed).long()
    # Every float next to a bound, and every edge of a bin.
    steps = torch.arange(24 << bits, dtype=torch.int32) + (104 << bits)
    edges = (steps << (23 - bits)).view(torch.float32)
    x = torch.cat([bounds, torch.nextafter(bounds, bounds + 1), torch.nextafter(bounds, bounds - 1),
                   edges, -edges, torch.nextafter(edges, edges * 0), torch.zeros(1)])  # fmt: skip
    x = x[(x <= 1) & (x >= (-1 if signed else 0))]
    magnitude = ((x.view(torch.int32) & 0x7FFFFFFF) >> (23 - bits)) - (104 << bits)
    bins = magnitude.clamp(min=0) + torch.signbit(x) * (24 * 64)
    start = starts[bins.long()]
    code = start + (x > torch.cat([bounds, torch.ones(1)])[start]) * (start < 255)
    assert torch.equal(code, torch.bucketize(x, bounds))


@pytest.mark.parametrize("block", [256, 4096])
def test_nearer_than_bitsandbytes_whose_scales_are_the_same(block):
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    x *= 10.0 ** torch.linspace(-5, 0, 5000)
    qt = dynamic8.quantize(x, group_size=block)
    codes, state = bnb.quantize_blockwise(x, blocksize=block)
    assert torch.equal(qt.scale, state.absmax)
    theirs = bnb.dequantize_blockwise(codes, state)
    ours = qt.dequantize()
    assert ((ours - x).abs() <= (theirs - x).abs() + 1e-7 * x.abs()).all()
    assert (ours - x).abs().mean() < (theirs - x).abs().mean()
    qt.qdata = codes
    assert torch.equal(qt.dequantize(), theirs)


def test_zeros_stay_and_infinity_is_refused():
    x = torch.zeros(600)
    x[5], x[300] = 1.0, 1e-44
    back = gp.quantize(x, "dynamic8").dequantize()
    assert back[5] == 1 and not back[6:].any() and back.isfinite().all()
    x[7] = torch.inf
    for backend in ("native", "reference"):
        with pytest.raises(ValueError, match=r"x must be finite, got inf at \(7,\)"):
            gp.quantize(x, "dynamic8", backend=backend)
    with pytest.raises(ValueError, match="group_size must be one of 32, 64"):
        gp.quantize(x, "dynamic8", group_size=100)
