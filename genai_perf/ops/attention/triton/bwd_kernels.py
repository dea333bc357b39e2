"""The backward kernels: delta, then dK and dV by key blocks, then dQ by query blocks.

    P = exp2(S - lse),  dV = P^T dO,  dP = dO V^T,  dS = P * (dP - delta),  dK = dS^T Q,  dQ = dS K
    delta = rowsum(dO * O) - dlse

Nothing is added atomically: each program owns its output, so that two runs agree bit for bit.
"""

import triton
import triton.language as tl

from .common import (
    COUNTS,
    base,
    exponential,
    heavy_first,
    masked_tile_start,
    masked_tiles,
    row_sums,
    rows_tile,
    sequence,
    store_rows,
    tile_ranges,
    unit,
)
from .rules import WHOLE_TILES, Constants, head_rules, kept, probabilities, reached, scores


@triton.jit(do_not_specialize=COUNTS)
def _attention_bwd_delta_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, sinks_ptr, dsinks_ptr, cu_seqlens_q_ptr,
    stride_ob, stride_os, stride_oh, stride_dob, stride_dos, stride_doh, stride_lb, stride_lh,
    nheads, max_seqlen_q,
    BLOCK_M: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, DLSE: tl.constexpr,
    SINKS: tl.constexpr, VARLEN: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """delta of BLOCK_M rows, and their share of the sink's gradient: -sum exp(sink - lse) delta."""
    blocks = tl.cdiv(max_seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    stream = pid // blocks
    first = (pid - stream * blocks) * BLOCK_M
    batch = stream // nheads
    head = stream - batch * nheads
    start, seqlen = sequence(cu_seqlens_q_ptr, batch, max_seqlen_q, VARLEN)
    if first >= seqlen:
        if SINKS:
            tl.store(dsinks_ptr + pid, 0.0)
        return
    out_ptr = base(out_ptr, batch, head, start, stride_ob, stride_oh, stride_os, VARLEN)
    dout_ptr = base(dout_ptr, batch, head, start, stride_dob, stride_doh, stride_dos, VARLEN)
    lse_ptr = base(lse_ptr, batch, head, start, stride_lb, stride_lh, 1, VARLEN)
    delta_ptr = base(delta_ptr, batch, head, start, stride_lb, stride_lh, 1, VARLEN)
    o = rows_tile(out_ptr, first, stride_os, seqlen, BLOCK_M, HEAD_DIM_V, BLOCK_DV, True)
    do = rows_tile(dout_ptr, first, stride_dos, seqlen, BLOCK_M, HEAD_DIM_V, BLOCK_DV, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    rows = first + tl.arange(0, BLOCK_M)
    if DLSE:
        dlse_ptr = base(dlse_ptr, batch, head, start, stride_lb, stride_lh, 1, VARLEN)
        delta -= tl.load(dlse_ptr + rows, mask=rows < seqlen, other=0.0)
    tl.store(delta_ptr + rows, delta, mask=rows < seqlen)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * unit(NATURAL)
        share = exponential(sink - row_sums(lse_ptr, rows, seqlen, NATURAL), NATURAL) * delta
        tl.store(dsinks_ptr + pid, -tl.sum(share, 0))


@triton.jit
def _add_to_dkdv(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qs, stride_dos, first_m,
                 first_n, r, c: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """What queries [first_m, first_m + BLOCK_M) add to dK and dV; tiles are (BLOCK_N, BLOCK_M).

    dV still lacks the factor keep_scale.
    """
    q = rows_tile(q_ptr, first_m, stride_qs, r.seqlen_q, c.BLOCK_M, c.HEAD_DIM, c.BLOCK_D, MASKED)
    rows = first_m + tl.arange(0, c.BLOCK_M)
    lse = row_sums(lse_ptr, rows, r.seqlen_q, c.NATURAL)
    s = tl.dot(k, tl.trans(q), input_precision=c.PRECISION)
    cols = (first_n + tl.arange(0, c.BLOCK_N))[:, None]
    s, slope_of_cap = scores(s, first_m, first_n, rows[None, :], cols, r, c)
    # Keys past the end are not masked apart: they change rows of dK and dV that are not stored.
    p = probabilities(s, lse[None, :], rows[None, :], cols, r, c, MASKED)
    do = rows_tile(do_ptr, first_m, stride_dos, r.seqlen_q, c.BLOCK_M, c.HEAD_DIM_V, c.BLOCK_DV,
                   MASKED)  # fmt: skip
    dropped = p
    if c.DROPOUT:
        keep = kept(first_m, first_n, r, c, True)
        dropped = tl.where(keep, p, 0.0)
    dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=c.PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=c.PRECISION)
    if c.DROPOUT:
        dp = tl.where(keep, dp * r.keep_scale, 0.0)
    delta = tl.load(delta_ptr + rows, mask=rows < r.seqlen_q, other=0.0)
    ds = p * (dp - delta[None, :]) * slope_of_cap
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=c.PRECISION)
    return dk, dv


@triton.jit
def _dkdv_tile(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qs, stride_dos, first_m,
               first_n, r, c: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """`_add_to_dkdv`, unless the block mask hides the whole tile."""
    if c.BLOCKS == WHOLE_TILES:
        if reached(first_m, first_n, r):
            dk, dv = _add_to_dkdv(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qs,
                                  stride_dos, first_m, first_n, r, c, MASKED)  # fmt: skip
    else:
        dk, dv = _add_to_dkdv(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qs,
                              stride_dos, first_m, first_n, r, c, MASKED)  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, bias_ptr, slopes_ptr,
    blocks_ptr, rng_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh, stride_dob, stride_dos, stride_doh, stride_dkb, stride_dks, stride_dkh, stride_dvb,
    stride_dvs, stride_dvh, stride_lb, stride_lh,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, stride_slopes_b,
    stride_blocks_b, stride_blocks_h, stride_blocks_m, stride_blocks_n, block_q, block_k,
    nheads_k, group, streams, together, max_seqlen_q, max_seqlen_k, left, right, drop_below,
    keep_scale, softmax_scale, qk_scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, BLOCKS: tl.constexpr, DROPOUT: tl.constexpr, VARLEN: tl.constexpr,
    PRECISION: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys: the queries of every head of the group, one after the other."""
    blocks = tl.cdiv(max_seqlen_k, BLOCK_N)
    # Under a causal mask the first keys are seen by most queries: their blocks come first.
    block, stream = heavy_first(tl.program_id(0), blocks, streams, together, False)
    batch = stream // nheads_k
    head_k = stream - batch * nheads_k
    start_q, seqlen_q = sequence(cu_seqlens_q_ptr, batch, max_seqlen_q, VARLEN)
    start_k, seqlen_k = sequence(cu_seqlens_k_ptr, batch, max_seqlen_k, VARLEN)
    first_n = block * BLOCK_N
    if first_n >= seqlen_k:
        return
    k_ptr = base(k_ptr, batch, head_k, start_k, stride_kb, stride_kh, stride_ks, VARLEN)
    v_ptr = base(v_ptr, batch, head_k, start_k, stride_vb, stride_vh, stride_vs, VARLEN)
    k = rows_tile(k_ptr, first_n, stride_ks, seqlen_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = rows_tile(v_ptr, first_n, stride_vs, seqlen_k, BLOCK_N, HEAD_DIM_V, BLOCK_DV, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    lo, full_lo, full_hi, hi = tile_ranges(first_n, seqlen_q - seqlen_k, seqlen_q, right, left,
                                           HAS_RIGHT, HAS_LEFT, BLOCK_N, BLOCK_M)  # fmt: skip
    c: tl.constexpr = Constants(
        BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, SOFTCAP,
        ALIBI, BIAS, BLOCKS, DROPOUT, PRECISION, NATURAL)  # fmt: skip
    for member in range(0, group):
        head = head_k * group + member
        q_head = base(q_ptr, batch, head, start_q, stride_qb, stride_qh, stride_qs, VARLEN)
        do_head = base(dout_ptr, batch, head, start_q, stride_dob, stride_doh, stride_dos, VARLEN)
        lse_head = base(lse_ptr, batch, head, start_q, stride_lb, stride_lh, 1, VARLEN)
        delta_head = base(delta_ptr, batch, head, start_q, stride_lb, stride_lh, 1, VARLEN)
        r = head_rules(
            batch, head, nheads_k * group, seqlen_q, seqlen_k, left, right, qk_scale, softcap,
            slopes_ptr, stride_slopes_b, bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m,
            stride_bias_n, blocks_ptr, stride_blocks_b, stride_blocks_h, stride_blocks_m,
            stride_blocks_n, block_q, block_k, rng_ptr, drop_below, keep_scale, c)  # fmt: skip
        for first_m in tl.range(full_lo, full_hi, BLOCK_M):
            dk, dv = _dkdv_tile(dk, dv, k, v, q_head, do_head, lse_head, delta_head, stride_qs,
                                stride_dos, first_m, first_n, r, c, False)  # fmt: skip
        for index in tl.range(0, masked_tiles(lo, full_lo, full_hi, hi, BLOCK_M), num_stages=1):
            first_m = masked_tile_start(index, lo, full_lo, full_hi, BLOCK_M)
            dk, dv = _dkdv_tile(dk, dv, k, v, q_head, do_head, lse_head, delta_head, stride_qs,
                                stride_dos, first_m, first_n, r, c, True)  # fmt: skip
    dk_ptr = base(dk_ptr, batch, head_k, start_k, stride_dkb, stride_dkh, stride_dks, VARLEN)
    dv_ptr = base(dv_ptr, batch, head_k, start_k, stride_dvb, stride_dvh, stride_dvs, VARLEN)
    dk = dk * softmax_scale
    if DROPOUT:
        dv = dv * keep_scale
    store_rows(dk_ptr, dk, first_n, stride_dks, seqlen_k, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, dv, first_n, stride_dvs, seqlen_k, BLOCK_N, HEAD_DIM_V, BLOCK_DV)


@triton.jit
def score_gradient(
    q, k, v, do, lse, delta, first_m, first_n, r, c: tl.constexpr, MASKED: tl.constexpr
):
    """(dS of one (BLOCK_M, BLOCK_N) tile, with respect to the scores after softcap; that slope)."""
    rows = (first_m + tl.arange(0, c.BLOCK_M))[:, None]
    cols = (first_n + tl.arange(0, c.BLOCK_N))[None, :]
    s = tl.dot(q, tl.trans(k), input_precision=c.PRECISION)
    s, slope_of_cap = scores(s, first_m, first_n, rows, cols, r, c)
    p = probabilities(s, lse[:, None], rows, cols, r, c, MASKED)
    dp = tl.dot(do, tl.trans(v), input_precision=c.PRECISION)
    if c.DROPOUT:
        dp = tl.where(kept(first_m, first_n, r, c, False), dp * r.keep_scale, 0.0)
    return p * (dp - delta[:, None]), slope_of_cap


@triton.jit
def _add_to_dq(dq, q, do, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, first_m, first_n, r,
               c: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    k = rows_tile(k_ptr, first_n, stride_ks, r.seqlen_k, c.BLOCK_N, c.HEAD_DIM, c.BLOCK_D, MASKED)
    v = rows_tile(v_ptr, first_n, stride_vs, r.seqlen_k, c.BLOCK_N, c.HEAD_DIM_V, c.BLOCK_DV,
                  MASKED)  # fmt: skip
    ds, slope_of_cap = score_gradient(q, k, v, do, lse, delta, first_m, first_n, r, c, MASKED)
    return tl.dot((ds * slope_of_cap).to(k.dtype), k, dq, input_precision=c.PRECISION)


@triton.jit
def _dq_tile(dq, q, do, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, first_m, first_n, r,
             c: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """dQ with what keys [first_n, first_n + BLOCK_N) add, unless the block mask hides them."""
    if c.BLOCKS == WHOLE_TILES:
        if reached(first_m, first_n, r):
            dq = _add_to_dq(dq, q, do, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, first_m,
                            first_n, r, c, MASKED)  # fmt: skip
    else:
        dq = _add_to_dq(dq, q, do, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, first_m,
                        first_n, r, c, MASKED)  # fmt: skip
    return dq


@triton.jit(do_not_specialize=COUNTS)
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, bias_ptr, slopes_ptr, blocks_ptr,
    rng_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh, stride_dob, stride_dos, stride_doh, stride_dqb, stride_dqs, stride_dqh, stride_lb,
    stride_lh, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, stride_slopes_b,
    stride_blocks_b, stride_blocks_h, stride_blocks_m, stride_blocks_n, block_q, block_k,
    nheads, group, streams, together, max_seqlen_q, max_seqlen_k, left, right, drop_below,
    keep_scale, softmax_scale, qk_scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, BLOCKS: tl.constexpr, DROPOUT: tl.constexpr, VARLEN: tl.constexpr,
    PRECISION: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head."""
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
    do_ptr = base(dout_ptr, batch, head, start_q, stride_dob, stride_doh, stride_dos, VARLEN)
    lse_ptr = base(lse_ptr, batch, head, start_q, stride_lb, stride_lh, 1, VARLEN)
    delta_ptr = base(delta_ptr, batch, head, start_q, stride_lb, stride_lh, 1, VARLEN)
    c: tl.constexpr = Constants(
        BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, SOFTCAP,
        ALIBI, BIAS, BLOCKS, DROPOUT, PRECISION, NATURAL)  # fmt: skip
    r = head_rules(
        batch, head, nheads, seqlen_q, seqlen_k, left, right, qk_scale, softcap, slopes_ptr,
        stride_slopes_b, bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
        blocks_ptr, stride_blocks_b, stride_blocks_h, stride_blocks_m, stride_blocks_n, block_q,
        block_k, rng_ptr, drop_below, keep_scale, c)  # fmt: skip
    q = rows_tile(q_ptr, first_m, stride_qs, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    do = rows_tile(do_ptr, first_m, stride_dos, seqlen_q, BLOCK_M, HEAD_DIM_V, BLOCK_DV, True)
    rows = first_m + tl.arange(0, BLOCK_M)
    lse = row_sums(lse_ptr, rows, seqlen_q, NATURAL)
    delta = tl.load(delta_ptr + rows, mask=rows < seqlen_q, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    lo, full_lo, full_hi, hi = tile_ranges(first_m, seqlen_k - seqlen_q, seqlen_k, left, right,
                                           HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)  # fmt: skip
    for first_n in tl.range(full_lo, full_hi, BLOCK_N):
        dq = _dq_tile(dq, q, do, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, first_m, first_n,
                      r, c, False)  # fmt: skip
    for index in tl.range(0, masked_tiles(lo, full_lo, full_hi, hi, BLOCK_N), num_stages=1):
        first_n = masked_tile_start(index, lo, full_lo, full_hi, BLOCK_N)
        dq = _dq_tile(dq, q, do, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, first_m, first_n,
                      r, c, True)  # fmt: skip
    dq_ptr = base(dq_ptr, batch, head, start_q, stride_dqb, stride_dqh, stride_dqs, VARLEN)
    dq = dq * softmax_scale
    store_rows(dq_ptr, dq, first_m, stride_dqs, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D)
