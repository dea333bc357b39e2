"""What the decode kernels share on the device: where rows of the cache lie, and codes of 8 bits."""

import triton
import triton.language as tl

# Values of the constexpr CACHE: floats as they are, int8 or float8_e4m3fn codes (as bytes).
FLOATS, INT8, FP8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Integer arguments whose value no kernel is specialised on: a new length compiles nothing.
COUNTS = (
    "nheads", "nheads_k", "group", "seqlen_q", "seqlen_new", "splits", "row_blocks", "page_size",
    "left", "right", "stride_table", "stride_scale", "stride_slopes_b",
)  # fmt: skip


@triton.jit
def cache_rows(batch, positions, valid, table_ptr, batch_idx_ptr, stride_table, page_size,
               stride_page, stride_slot, PAGED: tl.constexpr, INDEXED: tl.constexpr):  # fmt: skip
    """64-bit offsets of the rows at `positions` of a sequence; an invalid one looks up no page."""
    if PAGED:
        entry = table_ptr + tl.cast(batch, tl.int64) * stride_table + positions // page_size
        page = tl.load(entry, mask=valid, other=0).to(tl.int64)
        slot = (positions % page_size).to(tl.int64)
        offsets = page * stride_page + slot * stride_slot
    else:
        row = tl.cast(batch, tl.int64)
        if INDEXED:
            row = tl.load(batch_idx_ptr + batch).to(tl.int64)
        offsets = row * stride_page + positions.to(tl.int64) * stride_slot
    return offsets


@triton.jit
def decode(codes, dtype: tl.constexpr, CACHE: tl.constexpr):
    """The numbers that elements of a cache stand for, exactly, before their scale."""
    if CACHE == FP8:
        # Through float16, whose exponent is one bit longer: 2^8 makes up for the bias.
        bits = codes.to(tl.uint16)
        low = bits & 0x7F
        half = tl.where(low == 0x7F, 0x7E00, low << 7) | ((bits & 0x80) << 8)
        values = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    elif CACHE == INT8:
        values = codes.to(tl.float32)
    else:
        values = codes
    return values.to(dtype)


@triton.jit
def encode(x, scale, dtype: tl.constexpr, CACHE: tl.constexpr):
    """x / scale in the type of the cache: rounded half to even, saturated."""
    if CACHE == FLOATS:
        coded = x
    elif CACHE == INT8:
        y = tl.div_rn(x, scale)
        bounded = tl.minimum(tl.maximum(tl.where(y == y, y, 0.0), -127.0), 127.0)
        # Adding 1.5 * 2^23 rounds to an integer, half to even.
        coded = ((bounded + 12582912.0) - 12582912.0).to(tl.int32)
    else:
        bits = tl.div_rn(x, scale).to(tl.uint32, bitcast=True)
        sign = (bits >> 24) & 0x80
        size = bits & 0x7FFFFFFF
        normal = (size - 0x3C000000 + 0x7FFFF + ((size >> 20) & 1)) >> 20
        # Below 2^-6 in steps of 2^-9, rounded by an addition.
        lifted = size.to(tl.float32, bitcast=True) + 16384.0
        tiny = lifted.to(tl.uint32, bitcast=True) & 0xF
        code = tl.where(size < 0x3C800000, tiny, normal)
        code = tl.where(size >= 0x43E00000, 0x7E, code)
        code = tl.where(size > 0x7F800000, 0x7F, code)
        coded = code | sign
    return coded.to(dtype)
