"""The forward kernel: one program a block of queries of one head."""

import triton
import triton.language as tl

from .common import (
    COUNTS,
    base,
    exponential,
    heavy_first,
    masked_tile_start,
    masked_tiles,
    rows_tile,
    sequence,
    store_rows,
    tile_ranges,
    unit,
)
from .rules import (
    NO_BIAS,
    PARTS_OF_TILES,
    WHOLE_TILES,
    Constants,
    head_rules,
    kept,
    reached,
    scores,
    visible,
)


@triton.jit
def _step(acc, row_max, row_sum, q, k_ptr, v_ptr, stride_ks, stride_vs, first_m, first_n, r,
          c: tl.constexpr, SCALE_FIRST: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """One step of the online softmax over keys [first_n, first_n + BLOCK_N)."""
    k = rows_tile(k_ptr, first_n, stride_ks, r.seqlen_k, c.BLOCK_N, c.HEAD_DIM, c.BLOCK_D, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=c.PRECISION)  # (BLOCK_M, BLOCK_N), raw q k^T
    rows = (first_m + tl.arange(0, c.BLOCK_M))[:, None]
    cols = (first_n + tl.arange(0, c.BLOCK_N))[None, :]
    if SCALE_FIRST:
        s, _ = scores(s, first_m, first_n, rows, cols, r, c)
    if MASKED:
        s = tl.where(visible(rows, cols, r, c), s, float("-inf"))
    # Without SCALE_FIRST only the maximum is scaled here, and s * qk_scale - max is one FMA.
    tile_max = tl.max(s, 1)
    if not SCALE_FIRST:
        tile_max = tile_max * r.qk_scale
    new_max = tl.maximum(row_max, tile_max)
    shift = new_max
    if MASKED or c.BIAS != NO_BIAS or c.BLOCKS == PARTS_OF_TILES:
        # A row that has seen no key yet: -inf - -inf would be NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    if not SCALE_FIRST:
        s = s * r.qk_scale
    p = exponential(s - shift[:, None], c.NATURAL)
    rescale = exponential(row_max - shift, c.NATURAL)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None]
    if c.DROPOUT:
        p = tl.where(kept(first_m, first_n, r, c, False), p, 0.0)
    v = rows_tile(v_ptr, first_n, stride_vs, r.seqlen_k, c.BLOCK_N, c.HEAD_DIM_V, c.BLOCK_DV,
                  MASKED)  # fmt: skip
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=c.PRECISION)
    return acc, new_max, row_sum


@triton.jit
def _forward_tile(acc, row_max, row_sum, q, k_ptr, v_ptr, stride_ks, stride_vs, first_m, first_n,
                  r, c: tl.constexpr, SCALE_FIRST: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """`_step`, unless the block mask hides the whole tile."""
    if c.BLOCKS == WHOLE_TILES:
        if reached(first_m, first_n, r):
            acc, row_max, row_sum = _step(acc, row_max, row_sum, q, k_ptr, v_ptr, stride_ks,
                                          stride_vs, first_m, first_n, r, c, SCALE_FIRST,
                                          MASKED)  # fmt: skip
    else:
        acc, row_max, row_sum = _step(acc, row_max, row_sum, q, k_ptr, v_ptr, stride_ks, stride_vs,
                                      first_m, first_n, r, c, SCALE_FIRST, MASKED)  # fmt: skip
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=COUNTS)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, slopes_ptr, sinks_ptr, blocks_ptr, rng_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh, stride_ob, stride_os, stride_oh, stride_lb, stride_lh,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, stride_slopes_b,
    stride_blocks_b, stride_blocks_h, stride_blocks_m, stride_blocks_n, block_q, block_k,
    nheads, group, streams, together, max_seqlen_q, max_seqlen_k, left, right, drop_below,
    keep_scale, qk_scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, BLOCKS: tl.constexpr, DROPOUT: tl.constexpr, SINKS: tl.constexpr,
    VARLEN: tl.constexpr, SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(max_seqlen_q, BLOCK_M)
    block, stream = heavy_first(tl.program_id(0), blocks, streams, together, HAS_RIGHT)
    batch = stream // nheads
    head = stream - batch * nheads
    start_q, seqlen_q = sequence(cu_seqlens_q_ptr, batch, max_seqlen_q, VARLEN)
    start_k, seqlen_k = sequence(cu_seqlens_k_ptr, batch, max_seqlen_k, VARLEN)
    first_m = block * BLOCK_M
    if first_m >= seqlen_q:
        return
    head_k = head // group
    q_ptr = base(q_ptr, batch, head, start_q, stride_qb, stride_qh, stride_qs, VARLEN)
    k_ptr = base(k_ptr, batch, head_k, start_k, stride_kb, stride_kh, stride_ks, VARLEN)
    v_ptr = base(v_ptr, batch, head_k, start_k, stride_vb, stride_vh, stride_vs, VARLEN)
    out_ptr = base(out_ptr, batch, head, start_q, stride_ob, stride_oh, stride_os, VARLEN)
    lse_ptr = base(lse_ptr, batch, head, start_q, stride_lb, stride_lh, 1, VARLEN)
    c: tl.constexpr = Constants(
        BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, SOFTCAP,
        ALIBI, BIAS, BLOCKS, DROPOUT, PRECISION, NATURAL)  # fmt: skip
    r = head_rules(
        batch, head, nheads, seqlen_q, seqlen_k, left, right, qk_scale, softcap, slopes_ptr,
        stride_slopes_b, bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
        blocks_ptr, stride_blocks_b, stride_blocks_h, stride_blocks_m, stride_blocks_n, block_q,
        block_k, rng_ptr, drop_below, keep_scale, c)  # fmt: skip

    q = rows_tile(q_ptr, first_m, stride_qs, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if SINKS:
        # The sink is one more logit, whose value vector is 0: the state after having seen it.
        row_max = tl.zeros_like(row_sum) + tl.load(sinks_ptr + head).to(tl.float32) * unit(NATURAL)
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)

    lo, full_lo, full_hi, hi = tile_ranges(first_m, seqlen_k - seqlen_q, seqlen_k, left, right,
                                           HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)  # fmt: skip
    for first_n in tl.range(full_lo, full_hi, BLOCK_N):
        acc, row_max, row_sum = _forward_tile(acc, row_max, row_sum, q, k_ptr, v_ptr, stride_ks,
                                              stride_vs, first_m, first_n, r, c, SCALE_FIRST,
                                              False)  # fmt: skip
    for index in tl.range(0, masked_tiles(lo, full_lo, full_hi, hi, BLOCK_N), num_stages=1):
        first_n = masked_tile_start(index, lo, full_lo, full_hi, BLOCK_N)
        acc, row_max, row_sum = _forward_tile(acc, row_max, row_sum, q, k_ptr, v_ptr, stride_ks,
                                              stride_vs, first_m, first_n, r, c, SCALE_FIRST,
                                              True)  # fmt: skip

    # row_sum is 0 only where no key was seen (acc is 0 there), and lse is -inf + log 1 then.
    total = tl.where(row_sum == 0.0, 1.0, row_sum)
    acc = acc / total[:, None]
    if DROPOUT:
        acc = acc * keep_scale
    store_rows(out_ptr, acc, first_m, stride_os, seqlen_q, BLOCK_M, HEAD_DIM_V, BLOCK_DV)
    rows = first_m + tl.arange(0, BLOCK_M)
    lse = row_max / unit(NATURAL) + tl.log(total)
    tl.store(lse_ptr + rows, lse, mask=rows < seqlen_q)
