"""The functions of flash-attn 2.8 by `genai_perf.attention`.

Arguments have flash-attn's names, order and defaults:

    q, k, v: (batch, seqlen, nheads, headdim), kv (batch, seqlen, 2, nheads_k, headdim),
        qkv (batch, seqlen, 3, nheads, headdim); packed sequences (varlen) have (total,) instead of
        (batch, seqlen), cut by cu_seqlens, int32 (batch + 1,). float32, bfloat16 or float16;
        nheads is a multiple of nheads_k.
    dropout_p: in [0, 1), by a counter-based generator seeded from torch's.
    softmax_scale: 1 / sqrt(headdim) by default.
    causal: query i sees keys j <= i + seqlen_k - seqlen_q. A row that sees nothing gives 0.
    window_size: (left, right), -1 is unbounded.
    softcap: scores become softcap * tanh(score / softcap); 0 does not.
    alibi_slopes: float32 (nheads,) or (batch, nheads).
    deterministic: accepted; the backward pass always is.
    return_attn_probs: return (out, softmax_lse, S_dmask) instead of out. softmax_lse is float32
        (batch, nheads, seqlen_q), or (nheads, total_q) for varlen, and differentiable; S_dmask is
        empty without dropout, with it (batch, nheads, seqlen_q, seqlen_k) the softmax, negative
        where it was dropped: for tests, slow and large.

`flash_attn_with_kvcache` is that of `genai_perf.ops.decode_attention`.

Every function raises ValueError in one sentence for a wrong shape, dtype, device or value. One
number differs: a row that sees no key has softmax_lse -inf, where flash-attn 2 has +inf.
"""

import operator

import torch

from .._checks import check_dtype, check_flags, check_ndim, check_tensor, fail
from ..ops.attention import attention, checks
from ..ops.decode_attention import flash_attn_with_kvcache as flash_attn_with_kvcache
from ..ops.decode_attention.flash import window


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                    softcap=0.0, alibi_slopes=None, deterministic=False,
                    return_attn_probs=False):  # fmt: skip
    """Attention of q over k and v; see the module for the arguments."""
    return _attend("flash_attn_func", q, k, v, dropout_p, softmax_scale, causal, window_size,
                   softcap, alibi_slopes, deterministic, return_attn_probs)  # fmt: skip


def flash_attn_kvpacked_func(q, kv, dropout_p=0.0, softmax_scale=None, causal=False,
                             window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                             deterministic=False, return_attn_probs=False):  # fmt: skip
    """`flash_attn_func` with k and v in one tensor (batch, seqlen_k, 2, nheads_k, headdim)."""
    name = "flash_attn_kvpacked_func"
    k, v = _parts(name, "kv", kv, 2, ("batch", "seqlen"))
    return _attend(name, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
                   alibi_slopes, deterministic, return_attn_probs)  # fmt: skip


def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False,
                              window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                              deterministic=False, return_attn_probs=False):  # fmt: skip
    """`flash_attn_func` with q, k and v in one tensor (batch, seqlen, 3, nheads, headdim)."""
    name = "flash_attn_qkvpacked_func"
    q, k, v = _parts(name, "qkv", qkv, 3, ("batch", "seqlen"))
    return _attend(name, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
                   alibi_slopes, deterministic, return_attn_probs)  # fmt: skip


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                           dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                           softcap=0.0, alibi_slopes=None, deterministic=False,
                           return_attn_probs=False, block_table=None):  # fmt: skip
    """Attention of packed sequences; see the module for the arguments.

    With block_table, int32 (batch, pages), k and v are pages (num_pages, page_size, nheads_k,
    headdim) and cu_seqlens_k says how many keys each sequence has; they are gathered first.
    """
    name = "flash_attn_varlen_func"
    if block_table is not None:
        rows = _paged_rows(name, k, block_table, cu_seqlens_k)
        k, v = (pages.flatten(0, 1).index_select(0, rows) for pages in (k, v))
    return _attend(name, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
                   alibi_slopes, deterministic, return_attn_probs,
                   (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))  # fmt: skip


def flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                    dropout_p=0.0, softmax_scale=None, causal=False,
                                    window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                                    deterministic=False, return_attn_probs=False):  # fmt: skip
    """`flash_attn_varlen_func` with k and v in one tensor (total_k, 2, nheads_k, headdim)."""
    name = "flash_attn_varlen_kvpacked_func"
    k, v = _parts(name, "kv", kv, 2, ("total",))
    return _attend(name, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
                   alibi_slopes, deterministic, return_attn_probs,
                   (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))  # fmt: skip


def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0,
                                     softmax_scale=None, causal=False, window_size=(-1, -1),
                                     softcap=0.0, alibi_slopes=None, deterministic=False,
                                     return_attn_probs=False):  # fmt: skip
    """`flash_attn_varlen_func` with q, k and v in one tensor (total, 3, nheads, headdim)."""
    name = "flash_attn_varlen_qkvpacked_func"
    q, k, v = _parts(name, "qkv", qkv, 3, ("total",))
    return _attend(name, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
                   alibi_slopes, deterministic, return_attn_probs,
                   (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen))  # fmt: skip


def _parts(op: str, argument: str, packed, count: int, leading: tuple[str, ...]):
    """The tensors that `packed` holds side by side, as views."""
    check_tensor(op, **{argument: packed})
    layout = f"({', '.join(leading)}, {count}, nheads, headdim)"
    check_ndim(op, len(leading) + 3, layout, **{argument: packed})
    if packed.shape[-3] != count:
        fail(op, argument, layout, f"shape {tuple(packed.shape)}")
    return packed.unbind(-3)


def _attend(op, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_attn_probs, sequences=None):  # fmt: skip
    check_flags(op, causal=causal, deterministic=deterministic,
                return_attn_probs=return_attn_probs)  # fmt: skip
    options = {
        "causal": causal,
        "window_size": window(op, window_size),
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }
    if sequences is not None:
        cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = sequences
        check_tensor(op, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        options |= {
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            "max_seqlen_q": _longest(op, "max_seqlen_q", longest_q),
            "max_seqlen_k": _longest(op, "max_seqlen_k", longest_k),
        }
    if not return_attn_probs:
        return attention(q, k, v, dropout_p=dropout_p, **options)
    check_tensor(op, q=q)
    options["rng_state"] = checks.dropout(dropout_p, None, q)
    out, lse = attention(q, k, v, dropout_p=dropout_p, return_lse=True, **options)
    return out, lse, _dropped_softmax(q.detach(), k.detach(), dropout_p, options)


def _dropped_softmax(q, k, dropout_p: float, options: dict) -> torch.Tensor:
    """S_dmask: what attention gives where the value of a key is the unit vector of its place."""
    if not dropout_p:
        return q.new_empty(0)
    starts_q, starts_k = options.get("cu_seqlens_q"), options.get("cu_seqlens_k")
    places = torch.arange(k.shape[-3], device=k.device)
    if starts_k is not None:
        sequence = torch.searchsorted(starts_k[1:].contiguous(), places.int(), right=True)
        places = places - starts_k.long()[sequence.clamp(max=len(starts_k) - 2)]
    longest = options.get("max_seqlen_k", k.shape[-3])
    units = (places[:, None] == torch.arange(longest, device=k.device)).to(q.dtype)
    units = units[:, None].expand(*k.shape[:-1], longest)
    softmax = attention(q, k, units, **options)
    kept = attention(q, k, units, dropout_p=dropout_p, **options)
    signed = torch.where(kept == 0, -softmax, softmax)
    if starts_q is None:
        return signed.transpose(1, 2)
    batch, length = len(starts_q) - 1, options["max_seqlen_q"]
    room = q.new_zeros(batch, length, *signed.shape[1:])
    for b, (start, end) in enumerate(zip(starts_q.tolist(), starts_q[1:].tolist(), strict=False)):
        room[b, : end - start] = signed[start:end]
    return room.transpose(1, 2)


def _longest(op: str, name: str, value) -> int:
    try:
        return operator.index(value)
    except TypeError:
        fail(op, name, "an int, 0 or more", repr(value))


def _paged_rows(op: str, pages, block_table, cu_seqlens_k) -> torch.Tensor:
    """For each key of the packed sequences, its row in the pages laid end to end."""
    check_tensor(op, k=pages, block_table=block_table, cu_seqlens_k=cu_seqlens_k)
    layout = "with block_table, (num_pages, page_size, nheads_k, headdim)"
    check_ndim(op, 4, layout, k=pages)
    check_ndim(op, 2, "(batch, pages)", block_table=block_table)
    check_dtype(op, (torch.int32,), block_table=block_table, cu_seqlens_k=cu_seqlens_k)
    lengths = cu_seqlens_k.long().diff()
    if len(block_table) != len(lengths):
        fail(op, "block_table", f"of batch {len(lengths)}", tuple(block_table.shape))
    size = pages.shape[1]
    batch = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    position = torch.arange(len(batch), device=lengths.device) - cu_seqlens_k.long()[batch]
    if len(position) and int(position.max()) >= block_table.shape[1] * size:
        fail(op, "block_table", f"(batch, pages) with pages of {size} keys for every sequence",
             f"{block_table.shape[1]} for one of {int(lengths.max())} keys")  # fmt: skip
    page = block_table[batch, position // size].long()
    if len(page) and not 0 <= int(page.min()) <= int(page.max()) < pages.shape[0]:
        fail(op, "block_table", f"pages from 0 to {pages.shape[0] - 1}",
             f"{int(page.min())} to {int(page.max())}")  # fmt: skip
    return page * size + position % size
