"""The public `decode_attention`: its checks, and what they make of its arguments."""

from contextlib import nullcontext

import torch

from ..._checks import (
    check_dtype,
    check_flags,
    check_ndim,
    check_same,
    check_softcap,
    check_tensor,
    check_window,
    fail,
    heads_fit,
    scale_of_scores,
)
from . import native
from .op import APPEND, READ
from .options import QUANTIZED, New, Options
from .values import OP, check_values

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def decode_attention(
    q,
    k_cache,
    v_cache,
    *,
    cache_seqlens,
    block_table=None,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    rotary_seqlens=None,
    rotary_interleaved=True,
    cache_batch_idx=None,
    cache_leftpad=None,
    k_scale=None,
    v_scale=None,
    causal=False,
    window_size=(None, None),
    softmax_scale=None,
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    num_splits=0,
    check_cache=False,
    return_lse=False,
    backend=None,
):
    """Attention of a few new queries over a cache of keys and values, read once a key head.

        append k, v to the caches in place, rotated;  rotate q
        s = softmax_scale * q k_cache^T;  s = softcap * tanh(s / softcap);  s = s + alibi + mask
        out = softmax(s) v_cache,   lse = log sum exp of the rows of s

    Args:
        q: (batch, seqlen_q, nheads, headdim), float32, bfloat16 or float16 (float64: reference).
        k_cache: (batch_cache, seqlen_cache, nheads_k, headdim), or with block_table
            (num_pages, page_size, nheads_k, headdim); the dtype of q, int8 or float8_e4m3fn.
            nheads is a multiple of nheads_k. Any strides; native wants the last dimension dense.
        v_cache: the same with headdim_v.
        cache_seqlens: int, or int32 (batch,): keys in the cache before this call, padding on the
            left included.
        block_table: int32 (batch, max_pages): the pages of each sequence in order. Entries past
            its last key are not read.
        k, v: (batch, seqlen_new, nheads_k, headdim or headdim_v) in the dtype of q, written to
            positions cache_seqlens .. cache_seqlens + seqlen_new - 1 and seen by the queries.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), any floating dtype; need k and v. New
            key i is rotated as position rotary_seqlens + i; query i too if causal or windowed,
            else every query as position rotary_seqlens. Rounded to the dtype of q (queries) or of
            the cache (keys) after the rotation.
        rotary_seqlens: int32 (batch,); None: cache_seqlens.
        rotary_interleaved: rotates dimensions (0, 1), (2, 3) ...; else (0, rotary_dim / 2),
            (1, rotary_dim / 2 + 1) ... as GPT-NeoX and Llama do.
        cache_batch_idx: int32 (batch,): rows of a contiguous cache. If they repeat and k is given,
            the last of them is what the cache holds.
        cache_leftpad: int32 (batch,): where the keys of each sequence begin, <= cache_seqlens.
        k_scale, v_scale: float32 (nheads_k,) or (batch, nheads_k), for int8 and float8 caches:
            cached value times scale. Appended rows are divided by it, rounded and saturated
            (int8: to -127 .. 127).
        causal: query i sees keys j <= i + seqlen_k - seqlen_q (aligned bottom right), seqlen_k
            being cache_seqlens - cache_leftpad + seqlen_new.
        window_size: (left, right) around i + seqlen_k - seqlen_q; None is unbounded.
        softmax_scale: 1 / sqrt(headdim) by default.
        softcap: bounds the scores to (-softcap, softcap); 0 does not.
        alibi_slopes: float32 (nheads,) or (batch, nheads); the score of query i and key j loses
            slope * |i + seqlen_k - seqlen_q - j|.
        sinks: (nheads,), a score without a value in every softmax of its head, and in lse.
        num_splits: into how many parts the keys of each sequence are cut; 0 leaves it to the
            backend. A number fixes the result: it does not depend on the batch. native's own
            choice does not either.
        check_cache: on an accelerator, wait for lengths, indices and pages and check them as a CPU
            call always does; without, they must lie within the cache.
        return_lse: also return lse.
        backend: "triton", "nki", "native" or "reference"; None takes the first that can run the
            call.

    Returns:
        out (batch, seqlen_q, nheads, headdim_v) in the dtype of q, and with return_lse also lse
        (batch, nheads, seqlen_q), float32 (float64 for float64), natural logarithm. A query that
        sees no key gives out 0 and lse -inf (its sink, where there is one). Nothing has a gradient.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, a length passes the
            capacity, a page or a row is not in the cache.
        BackendUnsupported: the backend that was named cannot run the call.

    Source: split keys and their merge, Dao et al., Flash-Decoding (2023); the words and the
    rotary's positions are those of flash_attn_with_kvcache; pages, Kwon et al. (arXiv 2309.06180);
    rotary embedding, Su et al. (arXiv 2104.09864).
    """
    check_flags(OP, rotary_interleaved=rotary_interleaved, causal=causal, check_cache=check_cache,
                return_lse=return_lse)  # fmt: skip
    left, right = check_window(OP, window_size)
    if causal:
        right = 0
    new = None
    if not (k is v is rotary_cos is rotary_sin is rotary_seqlens is None):
        new = New(k, v, rotary_cos, rotary_sin, rotary_seqlens, bool(rotary_interleaved))
    plain = (
        backend is None and block_table is None and alibi_slopes is None
        and cache_batch_idx is None and cache_leftpad is None
    )  # fmt: skip
    if plain and (found := native.direct(q, k_cache, v_cache, cache_seqlens, (left, right),
                                         softmax_scale, softcap, num_splits, sinks,
                                         scales=(k_scale, v_scale), new=new,
                                         return_lse=return_lse)):  # fmt: skip
        return found if return_lse else found[0]
    plain = k_scale is None and v_scale is None and heads_fit(q, k_cache, v_cache, DTYPES)
    if not (plain and k_cache.shape[1] > 0):
        check_tensor(OP, q=q, k_cache=k_cache, v_cache=v_cache)
        _check_shapes(q, k_cache, v_cache, k_scale, v_scale)
    batch = q.shape[0]
    softcap = check_softcap(OP, softcap)
    if not isinstance(num_splits, int) or num_splits < 0:
        fail(OP, "num_splits", "an int >= 0", num_splits)
    _check_heads("alibi_slopes", alibi_slopes, q, q.shape[2], "nheads", by_batch=True)
    _check_heads("sinks", sinks, q, q.shape[2], "nheads", by_batch=False, dtypes=DTYPES)
    _check_table(block_table, cache_batch_idx, q)
    if block_table is None and cache_batch_idx is None and k_cache.shape[0] < batch:
        fail(OP, "k_cache", f"of at least batch {batch} rows", f"{k_cache.shape[0]} rows")
    _check_integers(q, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
                    rotary_seqlens=rotary_seqlens)  # fmt: skip
    seqlen_new = _check_new(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, rotary_seqlens)
    if isinstance(cache_seqlens, bool) or not isinstance(
        cache_seqlens, int | torch.SymInt | torch.Tensor
    ):
        fail(OP, "cache_seqlens", f"an int or an int32 tensor (batch {batch},)", cache_seqlens)
    if not isinstance(cache_seqlens, torch.Tensor):
        room = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        if not 0 <= cache_seqlens <= room - seqlen_new:
            fail(OP, "cache_seqlens", f"in 0..{room - seqlen_new} (capacity {room} less "
                 f"{seqlen_new} new keys)", cache_seqlens)  # fmt: skip
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    _check_integers(q, cache_seqlens=cache_seqlens)
    options = Options(
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        k_scale=k_scale,
        v_scale=v_scale,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        window_left=left,
        window_right=right,
        softmax_scale=scale_of_scores(OP, softmax_scale, q.shape[3]),
        softcap=softcap,
        num_splits=num_splits,
    )
    if check_cache:
        check_values(k_cache, options, new)
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        if new is None:
            out, lse = READ(q, k_cache, v_cache, *options, backend=backend)
        else:
            out, lse = APPEND(q, k_cache, v_cache, *new, *options, backend=backend)
    return (out, lse) if return_lse else out


def _check_shapes(q, k_cache, v_cache, k_scale, v_scale) -> None:
    check_ndim(OP, 4, "(batch, seqlen, nheads, headdim)", q=q, k_cache=k_cache, v_cache=v_cache)
    check_dtype(OP, DTYPES, q=q)
    check_dtype(OP, (q.dtype, *QUANTIZED), k_cache=k_cache)
    check_same(OP, "dtype", k_cache=k_cache, v_cache=v_cache)
    check_same(OP, "device", q=q, k_cache=k_cache, v_cache=v_cache)
    heads, dim = q.shape[2:]
    heads_k = k_cache.shape[2]
    if k_cache.shape[3] != dim:
        fail(OP, "k_cache", f"of headdim {dim}", tuple(k_cache.shape))
    if v_cache.shape[:3] != k_cache.shape[:3]:
        fail(OP, "v_cache", f"of k_cache's pages, rows and heads {tuple(k_cache.shape[:3])}",
             tuple(v_cache.shape))  # fmt: skip
    if heads_k == 0 or heads % heads_k:
        fail(OP, "nheads of q", f"a multiple of nheads_k ({heads_k})", heads)
    if dim == 0 or v_cache.shape[3] == 0:
        fail(OP, "headdim", "at least 1", f"{dim} (q, k) and {v_cache.shape[3]} (v)")
    if k_cache.shape[1] == 0:
        fail(OP, "k_cache", "of at least one row a page or sequence", tuple(k_cache.shape))
    quantized = k_cache.dtype in QUANTIZED
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if quantized != (scale is not None):
            fail(OP, name, "given for an int8 or float8_e4m3fn cache and for no other",
                 f"{'None' if scale is None else 'a tensor'} for {k_cache.dtype}")  # fmt: skip
        _check_heads(name, scale, q, heads_k, "nheads_k", by_batch=True)
    if quantized and k_scale.dim() != v_scale.dim():
        fail(OP, "v_scale", f"of as many dimensions as k_scale ({k_scale.dim()})", v_scale.dim())


def _check_heads(name, x, q, heads, word, *, by_batch, dtypes=(torch.float32,)) -> None:
    """One number a head, or a batch entry and head."""
    if x is None:
        return
    check_tensor(OP, **{name: x})
    check_dtype(OP, dtypes, **{name: x})
    check_same(OP, "device", q=q, **{name: x})
    shapes = [(heads,), (q.shape[0], heads)] if by_batch else [(heads,)]
    if tuple(x.shape) not in shapes:
        wanted = f"({word} {heads},)" + (
            f" or (batch {q.shape[0]}, {word} {heads})" if by_batch else ""
        )
        fail(OP, name, wanted, tuple(x.shape))


def _check_integers(q, **tensors) -> None:
    """int32 (batch,) on the device of q, each of them or None."""
    for name, x in tensors.items():
        if x is None:
            continue
        check_tensor(OP, **{name: x})
        check_dtype(OP, (torch.int32,), **{name: x})
        check_same(OP, "device", q=q, **{name: x})
        if tuple(x.shape) != (q.shape[0],):
            fail(OP, name, f"(batch {q.shape[0]},)", tuple(x.shape))


def _check_table(block_table, cache_batch_idx, q) -> None:
    if block_table is None:
        return
    check_tensor(OP, block_table=block_table)
    check_dtype(OP, (torch.int32,), block_table=block_table)
    check_same(OP, "device", q=q, block_table=block_table)
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        fail(OP, "block_table", f"(batch {q.shape[0]}, max_pages)", tuple(block_table.shape))
    if cache_batch_idx is not None:
        fail(OP, "cache_batch_idx", "None with a block_table", "a tensor")


def _check_new(q, k_cache, v_cache, k, v, cos, sin, rotary_seqlens) -> int:
    """How many keys are appended."""
    if (k is None) != (v is None):
        fail(OP, "k and v", "both given or both None", "one of them")
    if (cos is None) != (sin is None):
        fail(OP, "rotary_cos and rotary_sin", "both given or both None", "one of them")
    if cos is None and rotary_seqlens is not None:
        fail(OP, "rotary_seqlens", "None without rotary_cos", "a tensor")
    if k is None:
        if cos is not None:
            fail(OP, "rotary_cos", "None where no k and v are appended", "a tensor")
        return 0
    check_tensor(OP, k=k, v=v)
    check_same(OP, "dtype", q=q, k=k, v=v)
    check_same(OP, "device", q=q, k=k, v=v)
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        wanted = (q.shape[0], k.shape[1] if k.dim() == 4 else 1, *cache.shape[2:])
        if tuple(x.shape) != wanted:
            fail(OP, name, "(batch {}, seqlen_new, nheads_k {}, headdim {})".format(
                wanted[0], *cache.shape[2:]), tuple(x.shape))  # fmt: skip
    if cos is not None:
        check_tensor(OP, rotary_cos=cos, rotary_sin=sin)
        check_dtype(OP, DTYPES, rotary_cos=cos, rotary_sin=sin)
        check_same(OP, "device", q=q, rotary_cos=cos, rotary_sin=sin)
        if cos.dim() != 2 or not 0 < 2 * cos.shape[1] <= q.shape[3]:
            fail(OP, "rotary_cos", f"(positions, rotary_dim / 2), rotary_dim at most {q.shape[3]}",
                 tuple(cos.shape))  # fmt: skip
        if sin.shape != cos.shape:
            fail(OP, "rotary_sin", f"of the shape of rotary_cos {tuple(cos.shape)}",
                 tuple(sin.shape))  # fmt: skip
    return k.shape[1]
