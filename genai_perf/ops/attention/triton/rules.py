"""What a query and a key are subject to: window, softcap, ALiBi, bias, masks, dropout.

Scores are in log2 units (softmax_scale * log2 e folded into one factor), so that exp2, the
instruction that the hardware has, is the exponential; for float32 inputs they stay NATURAL, because
folding rounds scores more coarsely than the float32 reference does. A window is a pair of
distances: query i sees keys j with i + offset - left <= j <= i + offset + right, where offset is
seqlen_k - seqlen_q.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .common import base, exponential, tanh, unit

# Values of the constexpr BIAS.
NO_BIAS, ADDED_BIAS, BOOL_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Values of the constexpr BLOCKS: no block mask; each tile lies within one block of it, and is
# skipped where that is False; tiles lie across blocks, and scores are masked one by one.
NO_BLOCKS, WHOLE_TILES, PARTS_OF_TILES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Constants(NamedTuple):
    """What a kernel is compiled for, all constexpr: tile sizes and which rules there are."""

    BLOCK_M: object
    BLOCK_N: object
    HEAD_DIM: object
    HEAD_DIM_V: object
    BLOCK_D: object
    BLOCK_DV: object
    HAS_LEFT: object
    HAS_RIGHT: object
    SOFTCAP: object
    ALIBI: object
    BIAS: object
    BLOCKS: object
    DROPOUT: object
    PRECISION: object
    NATURAL: object


class Rules(NamedTuple):
    """The rules of one head of one sequence; pointers are those of that head.

    qk_scale holds the unit of the scores, or with SOFTCAP softmax_scale / softcap alone. The key of
    the dropout mask is 64 bits, its last two counter words are stream and counter; a word below
    drop_below drops, and what is kept grows by keep_scale.
    """

    seqlen_q: object
    seqlen_k: object
    left: object
    right: object
    qk_scale: object
    softcap: object
    slope: object
    bias_ptr: object
    stride_bias_m: object
    stride_bias_n: object
    blocks_ptr: object
    stride_blocks_m: object
    stride_blocks_n: object
    block_q: object
    block_k: object
    key: object
    counter: object
    stream: object
    drop_below: object
    keep_scale: object


@triton.jit
def head_rules(batch, head, nheads, seqlen_q, seqlen_k, left, right, qk_scale, softcap, slopes_ptr,
               stride_slopes_b, bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m,
               stride_bias_n, blocks_ptr, stride_blocks_b, stride_blocks_h, stride_blocks_m,
               stride_blocks_n, block_q, block_k, rng_ptr, drop_below, keep_scale,
               c: tl.constexpr):  # fmt: skip
    """The Rules of query head `head` of sequence `batch`; 0 where there is nothing."""
    slope = 0.0
    if c.ALIBI:
        slope = tl.load(slopes_ptr + batch * stride_slopes_b + head)
    bias = 0
    if c.BIAS != NO_BIAS:
        bias = base(bias_ptr, batch, head, 0, stride_bias_b, stride_bias_h, 0, False)
    blocks = 0
    if c.BLOCKS != NO_BLOCKS:
        blocks = base(blocks_ptr, batch, head, 0, stride_blocks_b, stride_blocks_h, 0, False)
    key = 0
    counter = 0
    if c.DROPOUT:
        seed = tl.load(rng_ptr).to(tl.uint64, bitcast=True)
        offset = tl.load(rng_ptr + 1).to(tl.uint64, bitcast=True)
        key = seed ^ (offset >> 32 << 32)
        counter = offset.to(tl.uint32)
    return Rules(seqlen_q, seqlen_k, left, right, qk_scale, softcap, slope, bias, stride_bias_m,
                 stride_bias_n, blocks, stride_blocks_m, stride_blocks_n, block_q, block_k, key,
                 counter, batch * nheads + head, drop_below, keep_scale)  # fmt: skip


@triton.jit
def visible(rows, cols, r, c: tl.constexpr):
    """Where query `rows` sees key `cols`; the two broadcast to the shape of the score tile."""
    seen = (rows < r.seqlen_q) & (cols < r.seqlen_k)
    aligned = rows + (r.seqlen_k - r.seqlen_q)
    if c.HAS_LEFT:
        seen = seen & (cols >= aligned - r.left)
    if c.HAS_RIGHT:
        seen = seen & (cols <= aligned + r.right)
    return seen


@triton.jit
def reached(first_m, first_n, r):
    """Whether the block mask lets a tile be seen, where tiles lie within its blocks."""
    row = tl.cast(first_m // r.block_q, tl.int64) * r.stride_blocks_m
    return tl.load(r.blocks_ptr + row + (first_n // r.block_k) * r.stride_blocks_n) != 0


@triton.jit
def scores(qk, first_m, first_n, rows, cols, r, c: tl.constexpr):
    """Scores in their units from raw q k^T, and the derivative of softcap (1.0 without it).

    rows and cols broadcast, so the tile may be either way round.
    """
    slope_of_cap = 1.0
    if c.SOFTCAP:
        t = tanh(qk * r.qk_scale, c.NATURAL)
        slope_of_cap = 1.0 - t * t
        s = t * (r.softcap * unit(c.NATURAL))
    else:
        s = qk * r.qk_scale
    if c.ALIBI:
        distance = tl.abs(rows + (r.seqlen_k - r.seqlen_q) - cols).to(tl.float32)
        s = s - distance * (r.slope * unit(c.NATURAL))
    if c.BIAS != NO_BIAS:
        inside = (rows < r.seqlen_q) & (cols < r.seqlen_k)
        corner = (
            tl.cast(first_m, tl.int64) * r.stride_bias_m
            + tl.cast(first_n, tl.int64) * r.stride_bias_n
        )
        ptrs = (
            r.bias_ptr
            + corner
            + ((rows - first_m) * r.stride_bias_m + (cols - first_n) * r.stride_bias_n)
        )
        if c.BIAS == ADDED_BIAS:
            s = s + tl.load(ptrs, mask=inside, other=0.0).to(tl.float32) * unit(c.NATURAL)
        else:
            s = tl.where(tl.load(ptrs, mask=inside, other=0) != 0, s, float("-inf"))
    if c.BLOCKS == PARTS_OF_TILES:
        inside = (rows < r.seqlen_q) & (cols < r.seqlen_k)
        row = (rows // r.block_q).to(tl.int64) * r.stride_blocks_m
        ptrs = r.blocks_ptr + row + (cols // r.block_k) * r.stride_blocks_n
        s = tl.where(tl.load(ptrs, mask=inside, other=0) != 0, s, float("-inf"))
    return s, slope_of_cap


@triton.jit
def probabilities(s, lse, rows, cols, r, c: tl.constexpr, MASKED: tl.constexpr):
    """exp(s - lse), zero where the query does not see the key."""
    p = exponential(s - lse, c.NATURAL)
    if MASKED:
        p = tl.where(visible(rows, cols, r, c), p, 0.0)
    return p


@triton.jit
def kept(first_m, first_n, r, c: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Where dropout keeps a probability, (BLOCK_M, BLOCK_N), or turned with KEYS_FIRST.

    Keys 4n to 4n + 3 take the four words of Philox4x32-10 at (n, query, stream, counter), as
    `attention/dropout.py` says; a tile begins at a multiple of four keys.
    """
    n = tl.cast(first_n // 4, tl.uint32) + tl.arange(0, c.BLOCK_N // 4).to(tl.uint32)
    m = tl.cast(first_m, tl.uint32) + tl.arange(0, c.BLOCK_M).to(tl.uint32)
    if KEYS_FIRST:
        n = n[:, None] + tl.zeros((1, c.BLOCK_M), tl.uint32)
        m = m[None, :] + tl.zeros((c.BLOCK_N // 4, 1), tl.uint32)
    else:
        n = n[None, :] + tl.zeros((c.BLOCK_M, 1), tl.uint32)
        m = m[:, None] + tl.zeros((1, c.BLOCK_N // 4), tl.uint32)
    stream = tl.zeros_like(n) + tl.cast(r.stream, tl.uint32)
    w0, w1, w2, w3 = tl.philox(r.key, n, m, stream, tl.zeros_like(n) + r.counter)
    below = r.drop_below.to(tl.uint32, bitcast=True)
    # Bit i is set where the key 4n + i is kept: one word a group is less to hold than four.
    bits = (w0 >= below).to(tl.int32) | ((w1 >= below).to(tl.int32) << 1)
    bits = bits | ((w2 >= below).to(tl.int32) << 2) | ((w3 >= below).to(tl.int32) << 3)
    low = tl.join(bits & 1, (bits >> 2) & 1)
    high = tl.join((bits >> 1) & 1, bits >> 3)
    words = tl.join(low, high)  # (..., 2, 2): the key 4n + 2i + j at [i, j]
    if KEYS_FIRST:
        words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), (c.BLOCK_N, c.BLOCK_M))
    else:
        words = tl.reshape(words, (c.BLOCK_M, c.BLOCK_N))
    return words != 0
