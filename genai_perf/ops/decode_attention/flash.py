"""`flash_attn_with_kvcache` as flash-attn 2.8 has it, on `decode_attention`."""

import operator

from ..._checks import check_flags, fail
from .api import decode_attention

OP = "flash_attn_with_kvcache"


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """flash-attn's cache attention, with its signature, on any backend of `decode_attention`.

    Args:
        q: (batch, seqlen, nheads, headdim).
        k_cache, v_cache: (batch_cache, seqlen_cache, nheads_k, headdim), or with block_table
            (num_blocks, page_block_size, nheads_k, headdim) with pages of any size from 1.
        k, v: (batch, seqlen_new, nheads_k, headdim), appended to the cache in place at
            cache_seqlens.
        rotary_cos, rotary_sin: (seqlen_ro, rotary_dim / 2), for the new keys and for q.
        cache_seqlens: int or int32 (batch,); None: the whole cache is used.
        cache_batch_idx, cache_leftpad: int32 (batch,).
        block_table: int32 (batch, max_num_blocks_per_seq).
        softmax_scale: 1 / sqrt(headdim) by default.
        causal, window_size, softcap, alibi_slopes: as in `decode_attention`; -1 is unbounded.
        rotary_interleaved: pairs (0, 1), (2, 3) ...; else the halves, as GPT-NeoX.
        num_splits: 0 leaves the number of parts to the backend.
        return_softmax_lse: also return the log sum exp of each row.

    Returns:
        out (batch, seqlen, nheads, headdim), and with return_softmax_lse also softmax_lse
        (batch, nheads, seqlen), float32. A row that sees no key is 0, its softmax_lse -inf.

    Raises:
        ValueError: as `decode_attention`; or k is given without cache_seqlens.

    Source: the documented interface of flash-attn 2.8.
    """
    check_flags(OP, causal=causal, rotary_interleaved=rotary_interleaved,
                return_softmax_lse=return_softmax_lse)  # fmt: skip
    if cache_seqlens is None:
        if k is not None:
            fail(OP, "cache_seqlens", "given where k and v are appended", "None")
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    return decode_attention(
        q, k_cache, v_cache, k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        block_table=block_table, softmax_scale=softmax_scale, causal=causal,
        window_size=window(OP, window_size), softcap=softcap,
        rotary_interleaved=rotary_interleaved, alibi_slopes=alibi_slopes, num_splits=num_splits,
        return_lse=return_softmax_lse,
    )  # fmt: skip


def window(op: str, window_size) -> tuple[int | None, int | None]:
    """flash-attn's window, whose sides are -1 where unbounded, as `attention` takes it."""
    try:
        left, right = (operator.index(side) for side in window_size)
    except (TypeError, ValueError):
        fail(op, "window_size", "a pair of ints (left, right)", repr(window_size))
    if left < -1 or right < -1:
        fail(op, "window_size", "(left, right), each -1 (unbounded) or more", (left, right))
    return (None if left == -1 else left), (None if right == -1 else right)
