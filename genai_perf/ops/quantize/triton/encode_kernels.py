"""Rows to int8 and fp8, blocks to 4-bit codes of a book: the bits of the reference codecs."""

import triton
import triton.language as tl

COUNTS = ("count", "width", "k")
# Added and taken away, it rounds magnitudes below 2^22 to integers, half to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def fp8_code(v, MANTISSA: tl.constexpr, LOWEST: tl.constexpr):
    """The byte of an fp8 number with so many bits of mantissa whose smallest normal is 2^LOWEST;
    v is finite and within its range."""
    bits = v.to(tl.int32, bitcast=True)
    exponent = tl.maximum(((bits >> 23) & 255) - 127, LOWEST)
    # Steps of 2^(exponent - MANTISSA) are counted: a full count carries into the exponent.
    steps = ((127 + MANTISSA - exponent) << 23).to(tl.float32, bitcast=True)
    count = ((tl.abs(v) * steps + ROUNDER) - ROUNDER).to(tl.int32)
    return (((exponent - LOWEST) << MANTISSA) + count) | ((bits >> 24) & 128)


@triton.jit(do_not_specialize=COUNTS)
def _quantize_rows_kernel(x_ptr, q_ptr, scale_ptr, k, width, top,
                          BLOCK: tl.constexpr, MANTISSA: tl.constexpr,
                          LOWEST: tl.constexpr, MARK: tl.constexpr):  # fmt: skip
    """One run of `width` elements of a row of k, the last one shorter: its largest magnitude, then
    its codes. MANTISSA 0: int8, by 127 / absmax with small runs lifted by 2^64; else fp8, divided
    by absmax / top. MARK: a run with an infinity or NaN gets codes of 0 and a scale of NaN."""
    run = tl.program_id(0).to(tl.int64)
    runs = tl.cdiv(k, width)
    first = (run % runs) * width
    end = tl.minimum(first + width, k)
    x_ptr += run // runs * k
    q_ptr += run // runs * k
    cols = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for at in range(first, end, BLOCK):
        x = tl.load(x_ptr + at + cols, mask=at + cols < end, other=0.0).to(tl.float32)
        if MARK:
            finite = (x.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
            bad |= 1 - finite.to(tl.int32)
            x = tl.where(finite, x, 0.0)
        largest = tl.maximum(largest, tl.abs(x))
    absmax = tl.max(largest, 0)
    # As tensors: division of a bare number would be rounded otherwise.
    one = tl.full([1], 1.0, tl.float32)
    wide = absmax + tl.zeros([1], tl.float32)
    if MANTISSA == 0:
        lift = tl.where(wide < 2.0**-119, one * 18446744073709551616.0, one)
        lifted = tl.where(wide > 0, wide * lift, one)
        factor = tl.where(wide > 0, tl.div_rn(one, lifted) * 127.0, 0.0)
        scale = tl.div_rn(wide, one * top)
    else:
        smallest = tl.full([1], 8388608, tl.int32).to(
            tl.float32, bitcast=True
        )  # the smallest normal
        scale = tl.maximum(tl.div_rn(wide, one * top), smallest)
    good = tl.zeros([1], tl.int32) == 0
    stored = scale
    if MARK:
        good = tl.max(bad, 0) + tl.zeros([1], tl.int32) == 0
        stored = tl.where(good, scale, float("nan"))
    tl.store(scale_ptr + run + tl.zeros([1], tl.int64), stored)
    for at in range(first, end, BLOCK):
        inside = at + cols < end
        x = tl.load(x_ptr + at + cols, mask=inside & good, other=0.0).to(tl.float32)
        if MANTISSA == 0:
            code = ((x * lift * factor + ROUNDER) - ROUNDER).to(tl.int32)
            tl.store(q_ptr + at + cols, code.to(tl.int8), mask=inside)
        else:
            v = tl.div_rn(x, scale + tl.zeros([BLOCK], tl.float32))
            v = tl.minimum(tl.maximum(v, -top), top)
            code = fp8_code(v, MANTISSA, LOWEST)
            tl.store(q_ptr + at + cols, code.to(tl.uint8), mask=inside)


@triton.jit
def place(t, bound_ptr):
    """How many of the 15 rising bounds lie below t."""
    found = tl.zeros(t.shape, tl.int32)
    for i in tl.static_range(15):
        found += (t > tl.load(bound_ptr + i)).to(tl.int32)
    return found


@triton.jit(do_not_specialize=COUNTS)
def _quantize_book_kernel(x_ptr, q_ptr, scale_ptr, bound_ptr, order_ptr, count, width,
                          ROWS: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """ROWS blocks of `width` elements, at most 2 PAIRS: even elements go to high nibbles."""
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, PAIRS)
    inside = (block < count)[:, None] & (2 * pair < width)[None, :]
    at = block.to(tl.int64)[:, None] * width + 2 * pair[None, :]
    even = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(x_ptr + at + 1, mask=inside, other=0.0).to(tl.float32)
    absmax = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 1)
    tl.store(scale_ptr + block, absmax, mask=block < count)
    # As a tensor: a bare 1e-38, below the smallest normal fp32, would be taken for fp64.
    floor = tl.full(absmax.shape, 1e-38, tl.float32)
    inverse = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), tl.maximum(absmax, floor))
    high = tl.load(order_ptr + place(even * inverse[:, None], bound_ptr)).to(tl.int32)
    low = tl.load(order_ptr + place(odd * inverse[:, None], bound_ptr)).to(tl.int32)
    packed = ((high << 4) | low).to(tl.uint8)
    tl.store(
        q_ptr + block.to(tl.int64)[:, None] * (width // 2) + pair[None, :], packed, mask=inside
    )
