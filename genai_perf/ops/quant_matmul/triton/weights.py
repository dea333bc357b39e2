"""Tiles of a quantized weight, from its packed bytes to float32 in registers."""

from typing import NamedTuple

import triton
import triton.language as tl

from ...decode_attention.triton.common import FP8, decode
from . import FORMATS

E4M3, E5M2 = tl.constexpr(FORMATS["fp8"]), tl.constexpr(FORMATS["fp8_e5m2"])
NF4, INT4 = tl.constexpr(FORMATS["nf4"]), tl.constexpr(FORMATS["int4"])
# Where the dynamic map lies in the table of numbers, after the code book of nf4.
MAP_AT = tl.constexpr(16)

# Integer arguments whose value no kernel is specialised on.
COUNTS = ("m", "n", "splits", "scale_rows", "scale_stride")


class Layout(NamedTuple):
    """What a kernel is compiled for, all constexpr.

    PAIRS: both codes of a byte lie in one row. RUN: as many columns of a row share a scale, a power
    of two that divides BLOCK_K. NESTED: scales are codes of the dynamic map. ZEROS: there are zero
    points.
    """

    BLOCK_N: object
    BLOCK_K: object
    FORMAT: object
    PAIRS: object
    RUN: object
    NESTED: object
    ZEROS: object


@triton.jit
def weight_tile(first_n, first_k, q_ptr, scale_ptr, zero_ptr, nested_ptr, offset_ptr, table_ptr, n,
                k, scale_rows, scale_stride, group, c: tl.constexpr):  # fmt: skip
    """W[first_n :, first_k :], (BLOCK_N, BLOCK_K) of float32; finite past the ends of W.

    The scale of row i and column j is number i // scale_rows * scale_stride + j // group, with nf4
    (i * k + j) // group. The table holds nf4's code book and the dynamic map.
    """
    rows = (first_n + tl.arange(0, c.BLOCK_N))[:, None]
    cols = (first_k + tl.arange(0, c.BLOCK_K))[None, :]
    row64 = rows.to(tl.int64)
    if c.FORMAT == INT4 or c.FORMAT == NF4:
        if c.PAIRS:
            pairs = (first_k // 2 + tl.arange(0, c.BLOCK_K // 2))[None, :]
            inside = (rows < n) & (pairs * 2 < k)
            both = tl.load(q_ptr + row64 * ((k + 1) // 2) + pairs, mask=inside, other=0)
            low, high = both & 15, both >> 4
            codes = tl.join(low, high) if c.FORMAT == INT4 else tl.join(high, low)
            codes = tl.reshape(codes, (c.BLOCK_N, c.BLOCK_K))
        else:
            flat = row64 * k + cols
            both = tl.load(q_ptr + flat // 2, mask=(rows < n) & (cols < k), other=0)
            codes = tl.where(flat % 2 == 0, both >> 4, both & 15)
        if c.FORMAT == NF4:
            values = tl.load(table_ptr + codes.to(tl.int32))
        else:
            values = codes.to(tl.float32)
    else:
        codes = tl.load(q_ptr + row64 * k + cols, mask=(rows < n) & (cols < k), other=0)
        if c.FORMAT == E4M3:
            values = decode(codes, tl.float32, FP8)
        elif c.FORMAT == E5M2:
            values = (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            values = codes.to(tl.float32)

    runs = (first_k + tl.arange(0, c.BLOCK_K // c.RUN) * c.RUN)[None, :]
    known = (rows < n) & (runs < k)
    if c.FORMAT == NF4:
        at = (row64 * k + runs) // group
    else:
        at = (row64 // scale_rows) * scale_stride + runs // group
    scale = tl.load(scale_ptr + at, mask=known, other=0)
    if c.NESTED:
        nested = tl.load(nested_ptr + at // 256, mask=known, other=0.0)
        scale = tl.load(table_ptr + MAP_AT + scale.to(tl.int32)) * nested + tl.load(offset_ptr)
        # A scale rounded up to infinity would make NaN of the zeros of its block.
        scale = tl.where(known, tl.minimum(scale, 3.4028234663852886e38), 0.0)
    if c.FORMAT == INT4:
        zero = tl.full((c.BLOCK_N, c.BLOCK_K // c.RUN), 8.0, tl.float32)
        if c.ZEROS:
            zero = tl.load(zero_ptr + at, mask=known, other=0).to(tl.float32)
        values = values - _spread(zero, c)
    return values * _spread(scale.to(tl.float32), c)


@triton.jit
def _spread(x, c: tl.constexpr):
    """(BLOCK_N, BLOCK_K // RUN) numbers, each for RUN columns."""
    if c.RUN == 1:
        wide = x
    else:
        wide = tl.broadcast_to(x[:, :, None], (c.BLOCK_N, c.BLOCK_K // c.RUN, c.RUN))
        wide = tl.reshape(wide, (c.BLOCK_N, c.BLOCK_K))
    return wide
