"""A tile of rows of a sparse W, expanded in registers: multiplied by one row of x, or written out.

Both layouts become the same two things for each column: whether it is kept, and where its value
stands. So a kernel is written once, and lanes of pruned columns read nothing.
"""

import triton
import triton.language as tl

# Values of the constexpr KIND: how values are stored.
FLOATS, INT8, INT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SIZES = ("n", "k", "units", "groups", "group_size")


@triton.jit
def ones_below(byte, bit):
    """How many of the bits 0 .. bit - 1 of a byte are set."""
    rest = byte & ((1 << bit) - 1)
    rest = rest - ((rest >> 1) & 0x55)
    rest = (rest & 0x33) + ((rest >> 2) & 0x33)
    return (rest + (rest >> 4)) & 0x0F


@triton.jit
def expand(values_ptr, index_ptr, scale_ptr, rows, begin, done, n, units, groups, group_size,
           KIND: tl.constexpr, TWO_FOUR: tl.constexpr, UNITS: tl.constexpr):  # fmt: skip
    """UNITS units of 8 columns, from `done` on, of some rows.

    rows, begin: (R,) int64; begin is where a row's values not yet read begin (bitmask).

    Returns:
        weight (R, UNITS, 8) fp32, zero where pruned; columns (1, UNITS, 8); begin, moved on.
    """
    unit = done + tl.arange(0, UNITS)  # (UNITS,)
    inside = (rows[:, None] < n) & (unit[None, :] < units)
    byte = tl.load(index_ptr + rows[:, None] * units + unit[None, :], mask=inside, other=0)
    byte = byte.to(tl.int32)  # (R, UNITS)
    place = tl.arange(0, 8)[None, None, :]
    if TWO_FOUR:
        nibble = byte[:, :, None] >> (place // 4 * 4)
        second = (nibble >> 2 & 3) == place % 4
        kept = inside[:, :, None] & (second | ((nibble & 3) == place % 4))
        first = (rows[:, None] * units + unit[None, :]) * 4
        at = first[:, :, None] + place // 4 * 2 + second.to(tl.int64)
    else:
        kept = (byte[:, :, None] >> place & 1) != 0
        count = ones_below(byte, 8)
        first = begin[:, None] + (tl.cumsum(count, 1) - count)
        at = first[:, :, None] + ones_below(byte[:, :, None], place)
        begin += tl.sum(count, 1)
    if KIND == INT4:
        pair = tl.load(values_ptr + at // 2, mask=kept, other=0).to(tl.int32)
        weight = ((pair >> (at % 2 * 4).to(tl.int32) & 15) - 8).to(tl.float32)
        weight = tl.where(kept, weight, 0.0)
    else:
        weight = tl.load(values_ptr + at, mask=kept, other=0).to(tl.float32)
    column = unit[None, :, None] * 8 + place
    if KIND != FLOATS:
        group = unit * 8 // group_size
        scale = tl.load(scale_ptr + rows[:, None] * groups + group[None, :], mask=inside, other=0.0)
        weight *= scale.to(tl.float32)[:, :, None]
    return weight, column, begin


@triton.jit
def _sparse_gemv_kernel(
    x_ptr, values_ptr, index_ptr, start_ptr, scale_ptr, bias_ptr, y_ptr, m, n, k, units, groups,
    group_size, KIND: tl.constexpr, TWO_FOUR: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """y[i, rows of a tile]; programs of the same tile are neighbours and share it in L2."""
    program = tl.program_id(0)
    i = (program % m).to(tl.int64)
    rows = (program // m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = rows
    if not TWO_FOUR:
        begin = tl.load(start_ptr + rows, mask=rows < n, other=0)
    sums = tl.zeros((BLOCK_N, UNITS, 8), tl.float32)
    for done in range(0, units, UNITS):
        weight, column, begin = expand(
            values_ptr, index_ptr, scale_ptr, rows, begin, done, n, units, groups, group_size,
            KIND, TWO_FOUR, UNITS,
        )  # fmt: skip
        x = tl.load(x_ptr + i * k + column, mask=column < k, other=0.0)
        sums += weight * x.to(tl.float32)
    y = tl.sum(tl.sum(sums, 2), 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + i * n + rows, y.to(y_ptr.dtype.element_ty), mask=rows < n)


@triton.jit
def _sparse_decode_kernel(
    values_ptr, index_ptr, start_ptr, scale_ptr, out_ptr, row0, stop, n, k, units, groups,
    group_size, KIND: tl.constexpr, TWO_FOUR: tl.constexpr,
    BLOCK_N: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """out[r - row0] = row r of W in fp32, for r in [row0, stop)."""
    rows = row0 + tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = rows
    if not TWO_FOUR:
        begin = tl.load(start_ptr + rows, mask=rows < stop, other=0)
    for done in range(0, units, UNITS):
        weight, column, begin = expand(
            values_ptr, index_ptr, scale_ptr, rows, begin, done, n, units, groups, group_size,
            KIND, TWO_FOUR, UNITS,
        )  # fmt: skip
        place = out_ptr + (rows - row0)[:, None, None] * k + column
        tl.store(place, weight, mask=(column < k) & (rows < stop)[:, None, None])
