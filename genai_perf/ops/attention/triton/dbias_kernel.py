"""The gradient of a dense additive bias, summed over whatever the bias is broadcast over."""

import triton
import triton.language as tl

from .bwd_kernels import score_gradient
from .common import COUNTS, base, row_sums, rows_tile
from .rules import ADDED_BIAS, WHOLE_TILES, Constants, head_rules, reached


@triton.jit(do_not_specialize=COUNTS)
def _attention_bwd_dbias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dbias_ptr, bias_ptr, slopes_ptr, blocks_ptr,
    rng_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh, stride_dob, stride_dos, stride_doh, stride_db, stride_dh, stride_dm, stride_dn,
    stride_lb, stride_lh, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_slopes_b, stride_blocks_b, stride_blocks_h, stride_blocks_m, stride_blocks_n, block_q,
    block_k, nheads, group, bias_heads, bias_blocks_m, bias_blocks_n, batches, heads, blocks_m,
    blocks_n, seqlen_q, seqlen_k, left, right, drop_below, keep_scale, qk_scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BLOCKS: tl.constexpr, DROPOUT: tl.constexpr, SHARED_M: tl.constexpr, SHARED_N: tl.constexpr,
    PRECISION: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """One tile of dbias, all of it: the sum of dS over the batches, heads and tiles that share it.

    batches, heads, blocks_m, blocks_n count what shares one tile: 1 where the bias has the full
    dimension. The order of the sum is fixed.
    """
    pid = tl.program_id(0)
    bias_n = pid % bias_blocks_n
    rest = pid // bias_blocks_n
    bias_m = rest % bias_blocks_m
    rest = rest // bias_blocks_m
    bias_h = rest % bias_heads
    bias_b = rest // bias_heads
    c: tl.constexpr = Constants(
        BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, SOFTCAP,
        ALIBI, ADDED_BIAS, BLOCKS, DROPOUT, PRECISION, NATURAL)  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, batches * heads * blocks_m * blocks_n):
        first_n = (bias_n + step % blocks_n) * BLOCK_N
        outer = step // blocks_n
        first_m = (bias_m + outer % blocks_m) * BLOCK_M
        outer = outer // blocks_m
        head = bias_h + outer % heads
        batch = bias_b + outer // heads
        r = head_rules(
            batch, head, nheads, seqlen_q, seqlen_k, left, right, qk_scale, softcap, slopes_ptr,
            stride_slopes_b, bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
            blocks_ptr, stride_blocks_b, stride_blocks_h, stride_blocks_m, stride_blocks_n,
            block_q, block_k, rng_ptr, drop_below, keep_scale, c)  # fmt: skip
        first_seen = 0
        last_seen = seqlen_k
        if HAS_LEFT:
            first_seen = first_m + seqlen_k - seqlen_q - left
        if HAS_RIGHT:
            last_seen = first_m + BLOCK_M - 1 + seqlen_k - seqlen_q + right
        seen = (first_n + BLOCK_N > first_seen) & (first_n <= last_seen)
        if BLOCKS == WHOLE_TILES:
            seen = seen & reached(first_m, first_n, r)
        if seen:
            head_k = head // group
            q_head = base(q_ptr, batch, head, 0, stride_qb, stride_qh, stride_qs, False)
            k_head = base(k_ptr, batch, head_k, 0, stride_kb, stride_kh, stride_ks, False)
            v_head = base(v_ptr, batch, head_k, 0, stride_vb, stride_vh, stride_vs, False)
            do_head = base(dout_ptr, batch, head, 0, stride_dob, stride_doh, stride_dos, False)
            lse_head = base(lse_ptr, batch, head, 0, stride_lb, stride_lh, 1, False)
            delta_head = base(delta_ptr, batch, head, 0, stride_lb, stride_lh, 1, False)
            q = rows_tile(q_head, first_m, stride_qs, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
            k = rows_tile(k_head, first_n, stride_ks, seqlen_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
            v = rows_tile(v_head, first_n, stride_vs, seqlen_k, BLOCK_N, HEAD_DIM_V, BLOCK_DV, True)
            do = rows_tile(
                do_head, first_m, stride_dos, seqlen_q, BLOCK_M, HEAD_DIM_V, BLOCK_DV, True
            )
            rows = first_m + tl.arange(0, BLOCK_M)
            lse = row_sums(lse_head, rows, seqlen_q, NATURAL)
            delta = tl.load(delta_head + rows, mask=rows < seqlen_q, other=0.0)
            ds, _ = score_gradient(q, k, v, do, lse, delta, first_m, first_n, r, c, True)
            acc += ds
    out_ptr = (
        dbias_ptr + tl.cast(bias_b, tl.int64) * stride_db + tl.cast(bias_h, tl.int64) * stride_dh
    )
    rows = bias_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = bias_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = dbias_ptr.dtype.element_ty
    if SHARED_M and SHARED_N:
        tl.store(out_ptr, tl.sum(tl.sum(acc, 1), 0).to(dtype))
    elif SHARED_M:
        tl.store(out_ptr + cols * stride_dn, tl.sum(acc, 0).to(dtype), mask=cols < seqlen_k)
    elif SHARED_N:
        row_ptrs = out_ptr + rows.to(tl.int64) * stride_dm
        tl.store(row_ptrs, tl.sum(acc, 1).to(dtype), mask=rows < seqlen_q)
    else:
        ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_dm + cols[None, :] * stride_dn
        tl.store(ptrs, acc.to(dtype), mask=(rows < seqlen_q)[:, None] & (cols < seqlen_k)[None, :])
