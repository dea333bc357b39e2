"""What the attention kernels share on the device: sequences, tile ranges, loads and stores."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Integer arguments whose value no kernel is specialised on: a new length compiles nothing.
COUNTS = (
    "nheads", "nheads_k", "group", "streams", "together", "max_seqlen_q", "max_seqlen_k",
    "seqlen_q", "seqlen_k", "left", "right", "stride_lb", "stride_lh", "stride_slopes_b",
    "bias_heads", "bias_blocks_m", "bias_blocks_n", "batches", "heads", "blocks_m", "blocks_n",
    "block_q", "block_k", "drop_below",
)  # fmt: skip


@triton.jit
def sequence(cu_seqlens_ptr, batch, seqlen, VARLEN: tl.constexpr):
    """(first row, length) of sequence `batch`; first row 0 where batches have a dimension."""
    if VARLEN:
        start = tl.load(cu_seqlens_ptr + batch)
        length = tl.load(cu_seqlens_ptr + batch + 1) - start
    else:
        start = tl.full((), 0, tl.int32)
        length = seqlen
    return start, length


@triton.jit
def base(ptr, batch, head, start, stride_b, stride_h, stride_s, VARLEN: tl.constexpr):
    """Address of row `start` of one head, in 64-bit arithmetic."""
    offset = tl.cast(start, tl.int64) * stride_s if VARLEN else tl.cast(batch, tl.int64) * stride_b
    return ptr + offset + tl.cast(head, tl.int64) * stride_h


@triton.jit
def rows_tile(ptr, first, stride_s, length, ROWS: tl.constexpr, DIM: tl.constexpr,
              BLOCK_DIM: tl.constexpr, MASK_ROWS: tl.constexpr):  # fmt: skip
    """Rows [first, first + ROWS) of a (length, DIM) matrix, zero outside it: (ROWS, BLOCK_DIM)."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    ptrs = ptr + tl.cast(first, tl.int64) * stride_s + (rows[:, None] * stride_s + dims[None, :])
    if MASK_ROWS:
        if DIM == BLOCK_DIM:
            tile = tl.load(ptrs, mask=(first + rows)[:, None] < length, other=0.0)
        else:
            mask = ((first + rows)[:, None] < length) & (dims[None, :] < DIM)
            tile = tl.load(ptrs, mask=mask, other=0.0)
    elif DIM == BLOCK_DIM:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=dims[None, :] < DIM, other=0.0)
    return tile


@triton.jit
def store_rows(ptr, tile, first, stride_s, length, ROWS: tl.constexpr, DIM: tl.constexpr,
               BLOCK_DIM: tl.constexpr):  # fmt: skip
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    ptrs = ptr + tl.cast(first, tl.int64) * stride_s + (rows[:, None] * stride_s + dims[None, :])
    mask = ((first + rows)[:, None] < length) & (dims[None, :] < DIM)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def tile_ranges(first, offset, length, below, above, HAS_BELOW: tl.constexpr,
                HAS_ABOVE: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Which tiles of BLOCK partners a block of BLOCK_OWN positions from `first` on has to visit.

    Position x sees partners [x + offset - below, x + offset + above] of [0, length). Returns
    lo <= full_lo <= full_hi, hi: partners [full_lo, full_hi) are seen by the whole block, those of
    [lo, full_lo) and [full_hi, hi) by a part of it; all but hi are multiples of BLOCK.
    """
    last = first + BLOCK_OWN - 1
    lo = tl.full((), 0, tl.int32)
    full_lo = tl.full((), 0, tl.int32)
    hi = length
    full_hi = length
    if HAS_BELOW:
        lo = tl.maximum(first + offset - below, 0) // BLOCK * BLOCK
        full_lo = (tl.maximum(last + offset - below, 0) + BLOCK - 1) // BLOCK * BLOCK
    if HAS_ABOVE:
        hi = tl.minimum(length, last + offset + above + 1)
        full_hi = tl.minimum(length, first + offset + above + 1)
    hi = tl.maximum(hi, lo)
    full_lo = tl.minimum(full_lo, (hi + BLOCK - 1) // BLOCK * BLOCK)
    full_hi = tl.maximum(tl.maximum(full_hi, 0) // BLOCK * BLOCK, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def masked_tile_start(index, lo, full_lo, full_hi, BLOCK: tl.constexpr):
    """Start of the index-th partly seen tile: first those below the full ones, then those above."""
    below = (full_lo - lo) // BLOCK
    return tl.where(index < below, lo + index * BLOCK, full_hi + (index - below) * BLOCK)


@triton.jit
def masked_tiles(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr):
    return (full_lo - lo) // BLOCK + (tl.maximum(hi - full_hi, 0) + BLOCK - 1) // BLOCK


@triton.jit
def exponential(x, NATURAL: tl.constexpr):
    return tl.exp(x) if NATURAL else tl.exp2(x)


@triton.jit
def unit(NATURAL: tl.constexpr):
    """What a natural logarithm is multiplied by to be in the units of the scores."""
    return 1.0 if NATURAL else LOG2E


@triton.jit
def tanh(x, NATURAL: tl.constexpr):
    """1 - 2 / (exp(2x) + 1); near 0, where that cancels, its series if NATURAL."""
    y = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    if NATURAL:
        x2 = x * x
        series = -1382.0 / 155925.0
        series = series * x2 + 62.0 / 2835.0
        series = series * x2 - 17.0 / 315.0
        series = series * x2 + 2.0 / 15.0
        series = series * x2 - 1.0 / 3.0
        y = tl.where(tl.abs(x) < 0.3, x + x * x2 * series, y)
    return y


@triton.jit
def row_sums(lse_ptr, rows, seqlen_q, NATURAL: tl.constexpr):
    """lse in the units of the scores; +inf, so that probabilities are 0, where no key is seen."""
    lse = tl.load(lse_ptr + rows, mask=rows < seqlen_q, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * unit(NATURAL))


@triton.jit
def heavy_first(pid, blocks, streams, together, DESCENDING: tl.constexpr):
    """(block, stream) of a program: `together` streams (heads of a batch) at a time, so that their
    keys stay in L2, and under a causal mask the blocks that see most keys first."""
    chunk = pid // (together * blocks)
    within = pid - chunk * (together * blocks)
    width = tl.minimum(together, streams - chunk * together)
    block = within // width
    stream = chunk * together + within - block * width
    if DESCENDING:
        block = blocks - 1 - block
    return block, stream
