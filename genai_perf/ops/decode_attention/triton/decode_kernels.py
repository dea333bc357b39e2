"""Split keys, then merge: a program for each part of the keys of a key head, then one for each row.

Rows are the queries of all heads of a group, packed: row r is query r // group of head r % group.
"""

import triton
import triton.language as tl

from ...attention.triton.common import exponential, tanh, unit
from .common import COUNTS, cache_rows, decode


@triton.jit(do_not_specialize=COUNTS)
def _decode_split_kernel(
    q_ptr, k_ptr, v_ptr, sums_ptr, max_ptr, sum_ptr, seqlens_ptr, leftpad_ptr, table_ptr,
    batch_idx_ptr, k_scale_ptr, slopes_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh, stride_table, stride_scale, stride_slopes_b,
    nheads_k, group, seqlen_q, splits, row_blocks, page_size, left, right, softmax_scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    LEFTPAD: tl.constexpr, PAGED: tl.constexpr, INDEXED: tl.constexpr, CACHE: tl.constexpr,
    PRECISION: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Unnormalised sums, maximum (in the units of the scores) and sum of one part of the keys."""
    pid = tl.program_id(0)
    split = pid % splits
    rest = pid // splits
    row_block = rest % row_blocks
    stream = rest // row_blocks
    batch = stream // nheads_k
    head_k = stream - batch * nheads_k

    pad = 0
    if LEFTPAD:
        pad = tl.load(leftpad_ptr + batch)
    len_k = tl.maximum(tl.load(seqlens_ptr + batch) - pad, 0)
    offset = len_k - seqlen_q
    begin = 0
    end = len_k
    if HAS_LEFT:
        begin = tl.minimum(tl.maximum(offset - left, 0), len_k)
    if HAS_RIGHT:
        end = tl.maximum(tl.minimum(tl.maximum(seqlen_q + offset + right, 0), len_k), begin)
    part = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_N) * BLOCK_N
    first = begin + split * part
    last = tl.minimum(end, first + part)

    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < group * seqlen_q
    query = rows // group
    head = head_k * group + rows - query * group
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    q_rows = query.to(tl.int64) * stride_qs + head.to(tl.int64) * stride_qh
    q_ptrs = q_ptr + tl.cast(batch, tl.int64) * stride_qb + q_rows[:, None] + dims[None, :]
    q = tl.load(q_ptrs, mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    scale = softmax_scale
    if CACHE != 0:
        scale = scale * tl.load(k_scale_ptr + batch * stride_scale + head_k)
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * stride_slopes_b + head, mask=inside, other=0.0)
    k_ptr += tl.cast(head_k, tl.int64) * stride_kh
    v_ptr += tl.cast(head_k, tl.int64) * stride_vh
    aligned = query + offset

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for first_n in tl.range(first, last, BLOCK_N):
        cols = first_n + tl.arange(0, BLOCK_N)
        valid = cols < last
        k_rows = cache_rows(batch, pad + cols, valid, table_ptr, batch_idx_ptr, stride_table,
                            page_size, stride_kb, stride_ks, PAGED, INDEXED)  # fmt: skip
        k = tl.load(k_ptr + k_rows[:, None] + dims[None, :],
                    mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0)  # fmt: skip
        k = decode(k, q.dtype, CACHE)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if SOFTCAP:
            s = tanh(s / softcap, NATURAL) * softcap
        if ALIBI:
            distance = tl.abs(aligned[:, None] - cols[None, :]).to(tl.float32)
            s = s - distance * slope[:, None]
        seen = valid[None, :]
        if HAS_LEFT:
            seen = seen & (cols[None, :] >= aligned[:, None] - left)
        if HAS_RIGHT:
            seen = seen & (cols[None, :] <= aligned[:, None] + right)
        s = tl.where(seen, s * unit(NATURAL), float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = exponential(s - shift[:, None], NATURAL)
        rescale = exponential(row_max - shift, NATURAL)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        v_rows = cache_rows(batch, pad + cols, valid, table_ptr, batch_idx_ptr, stride_table,
                            page_size, stride_vb, stride_vs, PAGED, INDEXED)  # fmt: skip
        v = tl.load(v_ptr + v_rows[:, None] + dims_v[None, :],
                    mask=valid[:, None] & (dims_v < HEAD_DIM_V)[None, :], other=0)  # fmt: skip
        v = decode(v, q.dtype, CACHE)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)

    at = (tl.cast(stream, tl.int64) * splits + split) * (group * seqlen_q) + rows
    tl.store(max_ptr + at, row_max, mask=inside)
    tl.store(sum_ptr + at, row_sum, mask=inside)
    tl.store(sums_ptr + at[:, None] * HEAD_DIM_V + dims_v[None, :], acc,
             mask=inside[:, None] & (dims_v < HEAD_DIM_V)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _decode_merge_kernel(
    sums_ptr, max_ptr, sum_ptr, out_ptr, lse_ptr, sinks_ptr, v_scale_ptr,
    stride_ob, stride_os, stride_oh, stride_scale, nheads_k, group, seqlen_q, splits,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, SINKS: tl.constexpr, CACHE: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """out and lse of one row from its parts, in their order."""
    pid = tl.program_id(0)
    rows = group * seqlen_q
    stream = pid // rows
    row = pid - stream * rows
    batch = stream // nheads_k
    head_k = stream - batch * nheads_k
    query = row // group
    head = head_k * group + row - query * group
    dims = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    if SINKS:
        # The sink is one more logit, whose value vector is 0: the state after having seen it.
        top = tl.load(sinks_ptr + head).to(tl.float32) * unit(NATURAL)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    for split in range(0, splits):
        at = (tl.cast(stream, tl.int64) * splits + split) * rows + row
        part_max = tl.load(max_ptr + at)
        new_top = tl.maximum(top, part_max)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        before = exponential(top - shift, NATURAL)
        weight = exponential(part_max - shift, NATURAL)
        part = tl.load(sums_ptr + at * HEAD_DIM_V + dims, mask=dims < HEAD_DIM_V, other=0.0)
        acc = acc * before + part * weight
        total = total * before + tl.load(sum_ptr + at) * weight
        top = new_top
    # total is 0 only where no key was seen (acc is 0 there), and lse is -inf + log 1 then.
    safe = tl.where(total == 0.0, 1.0, total)
    factor = 1.0 / safe
    if CACHE != 0:
        factor = factor * tl.load(v_scale_ptr + batch * stride_scale + head_k)
    out_ptr += tl.cast(batch, tl.int64) * stride_ob + tl.cast(query, tl.int64) * stride_os
    out_ptr += tl.cast(head, tl.int64) * stride_oh
    tl.store(out_ptr + dims, (acc * factor).to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM_V)
    lse = top / unit(NATURAL) + tl.log(safe)
    tl.store(lse_ptr + (stream * group + head - head_k * group) * seqlen_q + query, lse)
