"""New keys and values into the cache in place, and the rotation of keys and queries."""

import triton
import triton.language as tl

from .common import COUNTS, cache_rows, encode


@triton.jit
def _turned(src_ptr, cos_ptr, sin_ptr, position, dst_ptr, scale, ROTARY_HALF: tl.constexpr,
            BLOCK_HALF: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
            INTERLEAVED: tl.constexpr, CACHE: tl.constexpr):  # fmt: skip
    """One row, its first 2 * ROTARY_HALF elements rotated to `position`, written to dst_ptr."""
    kind = dst_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_HALF)
    inside = d < ROTARY_HALF
    first = 2 * d if INTERLEAVED else d
    second = first + 1 if INTERLEAVED else d + ROTARY_HALF
    table = tl.cast(position, tl.int64) * ROTARY_HALF + d
    cos = tl.load(cos_ptr + table, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(src_ptr + first, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(src_ptr + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(dst_ptr + first, encode(u * cos - v * sin, scale, kind, CACHE), mask=inside)
    tl.store(dst_ptr + second, encode(u * sin + v * cos, scale, kind, CACHE), mask=inside)
    dims = tl.arange(0, BLOCK_D)
    rest = (dims >= 2 * ROTARY_HALF) & (dims < HEAD_DIM)
    x = tl.load(src_ptr + dims, mask=rest, other=0.0).to(tl.float32)
    tl.store(dst_ptr + dims, encode(x, scale, kind, CACHE), mask=rest)


@triton.jit(do_not_specialize=COUNTS)
def _decode_append_kernel(
    k_new_ptr, v_new_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, seqlens_ptr, positions_ptr, table_ptr,
    batch_idx_ptr, k_scale_ptr, v_scale_ptr,
    stride_nkb, stride_nks, stride_nkh, stride_nvb, stride_nvs, stride_nvh, stride_kb, stride_ks,
    stride_kh, stride_vb, stride_vs, stride_vh, stride_table, stride_scale,
    nheads_k, seqlen_new, page_size, last_position,
    ROTARY_HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    INTERLEAVED: tl.constexpr, PAGED: tl.constexpr, INDEXED: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """One new key and value of one key head."""
    pid = tl.program_id(0)
    head = pid % nheads_k
    token = (pid // nheads_k) % seqlen_new
    batch = pid // (nheads_k * seqlen_new)
    row = tl.load(seqlens_ptr + batch) + token
    k_at = cache_rows(batch, row, True, table_ptr, batch_idx_ptr, stride_table, page_size,
                      stride_kb, stride_ks, PAGED, INDEXED)  # fmt: skip
    v_at = cache_rows(batch, row, True, table_ptr, batch_idx_ptr, stride_table, page_size,
                      stride_vb, stride_vs, PAGED, INDEXED)  # fmt: skip
    k_ptr += k_at + tl.cast(head, tl.int64) * stride_kh
    v_ptr += v_at + tl.cast(head, tl.int64) * stride_vh
    b, t, h = tl.cast(batch, tl.int64), tl.cast(token, tl.int64), tl.cast(head, tl.int64)
    k_new_ptr += b * stride_nkb + t * stride_nks + h * stride_nkh
    v_new_ptr += b * stride_nvb + t * stride_nvs + h * stride_nvh
    k_scale = 1.0
    v_scale = 1.0
    if CACHE != 0:
        k_scale = tl.load(k_scale_ptr + batch * stride_scale + head)
        v_scale = tl.load(v_scale_ptr + batch * stride_scale + head)
    if ROTARY_HALF > 0:
        position = tl.load(positions_ptr + batch) + token
        position = tl.minimum(tl.maximum(position, 0), last_position)
        _turned(k_new_ptr, cos_ptr, sin_ptr, position, k_ptr, k_scale, ROTARY_HALF, BLOCK_HALF,
                HEAD_DIM, BLOCK_D, INTERLEAVED, CACHE)  # fmt: skip
    else:
        dims = tl.arange(0, BLOCK_D)
        x = tl.load(k_new_ptr + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        tl.store(k_ptr + dims, encode(x, k_scale, k_ptr.dtype.element_ty, CACHE),
                 mask=dims < HEAD_DIM)  # fmt: skip
    dims_v = tl.arange(0, BLOCK_DV)
    x = tl.load(v_new_ptr + dims_v, mask=dims_v < HEAD_DIM_V, other=0.0).to(tl.float32)
    tl.store(v_ptr + dims_v, encode(x, v_scale, v_ptr.dtype.element_ty, CACHE),
             mask=dims_v < HEAD_DIM_V)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _decode_rotate_kernel(
    q_ptr, out_ptr, cos_ptr, sin_ptr, positions_ptr,
    stride_qb, stride_qs, stride_qh, stride_ob, stride_os, stride_oh,
    nheads, seqlen_q, last_position,
    ROTARY_HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr, IN_SEQUENCE: tl.constexpr,
):  # fmt: skip
    """One query of one head, rotated."""
    pid = tl.program_id(0)
    head = pid % nheads
    token = (pid // nheads) % seqlen_q
    batch = pid // (nheads * seqlen_q)
    position = tl.load(positions_ptr + batch)
    if IN_SEQUENCE:
        position += token
    position = tl.minimum(tl.maximum(position, 0), last_position)
    b, t, h = tl.cast(batch, tl.int64), tl.cast(token, tl.int64), tl.cast(head, tl.int64)
    q_ptr += b * stride_qb + t * stride_qs + h * stride_qh
    out_ptr += b * stride_ob + t * stride_os + h * stride_oh
    _turned(q_ptr, cos_ptr, sin_ptr, position, out_ptr, 1.0, ROTARY_HALF, BLOCK_HALF, HEAD_DIM,
            BLOCK_D, INTERLEAVED, 0)  # fmt: skip
