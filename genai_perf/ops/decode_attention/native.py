"""Decode attention by csrc/cpu/decode_attention_kernel.cpp and decode_append_kernel.cpp."""

import math

import torch

from ..._backends import native
from ..._checks import FAR, scale_of_scores
from ..._dispatch import goes_direct
from .options import New, Options, appended, q_in_sequence
from .values import FEW, OP, check_values

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(q, k_cache, v_cache, *options) -> str | None:
    if q.dtype not in _DTYPES:
        return f"native takes q of float32, bfloat16 and float16, got {q.dtype}"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1 and cache.shape[-1] != 1:
            return f"native needs a {name} whose last dimension is contiguous"
    return native.why_not(q, k_cache, v_cache)


def why_not_append(q, k_cache, v_cache, *arguments) -> str | None:
    return why_not(q, k_cache, v_cache)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _are_sinks(sinks, heads: int) -> bool:
    return (
        goes_direct(sinks) and sinks.dtype == torch.float32 and sinks.is_contiguous()
        and sinks.shape == (heads,)
    )  # fmt: skip


def _are_lengths(x, batch: int, capacity: int) -> bool:
    """Few int32 (batch,), each within the capacity."""
    fits = (
        isinstance(x, torch.Tensor) and goes_direct(x) and x.dtype == torch.int32
        and x.shape == (batch,) and x.is_contiguous() and 0 < batch <= FEW
    )  # fmt: skip
    lengths = x.tolist() if fits else (-1,)
    return min(lengths) >= 0 and max(lengths) <= capacity


def _tensor4(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Address, then batch (or page), seqlen and head strides."""
    batch, seq, head, _ = x.stride()
    return x.data_ptr(), batch, seq, head


def _prepared(o: Options) -> Options:
    """The tensors as the kernels read them: contiguous, sinks and slopes of float32."""
    changed = {}
    for name, value in zip(o._fields[:8], o[:8], strict=True):
        if value is None:
            continue
        dtype = torch.float32 if name in ("alibi_slopes", "sinks") else value.dtype
        if value.dtype != dtype or not value.is_contiguous():
            changed[name] = value.to(dtype).contiguous()
    return o._replace(**changed) if changed else o


def _cache(k_cache, o: Options) -> tuple[int, ...]:
    """The numbers of DecodeCache after k and v (csrc/bindings/bind_decode_attention.cpp)."""
    by_batch = o.k_scale is not None and o.k_scale.dim() == 2
    table = o.block_table
    return (
        native.DTYPE_CODES[k_cache.dtype], native.pointer(o.k_scale), native.pointer(o.v_scale),
        k_cache.shape[2] if by_batch else 0, native.pointer(o.cache_seqlens),
        native.pointer(o.cache_leftpad), native.pointer(o.cache_batch_idx), native.pointer(table),
        0 if table is None else table.shape[1], k_cache.shape[1],
    )  # fmt: skip


def _window(side: int, q, k_cache, o: Options) -> int:
    """A side that reaches past everything is unbounded: the kernels add it to positions."""
    table = 1 if o.block_table is None else o.block_table.shape[1]
    return -1 if side >= q.shape[1] + k_cache.shape[1] * table else side


def forward(q, k_cache, v_cache, *options):
    plain = Options(*options)
    check_values(k_cache, plain)
    return _attend(_dense(q), k_cache, v_cache, _prepared(plain))


def _attend(q, k_cache, v_cache, o: Options):
    batch, seqlen_q, heads, dim = q.shape
    out = q.new_empty(batch, seqlen_q, heads, v_cache.shape[3])
    lse = q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)
    slopes = o.alibi_slopes
    sizes = (
        batch, seqlen_q, heads, k_cache.shape[2], dim, v_cache.shape[3],
        _window(o.window_left, q, k_cache, o), _window(o.window_right, q, k_cache, o),
        o.num_splits, native.pointer(slopes),
        heads if slopes is not None and slopes.dim() == 2 else 0, native.pointer(o.sinks),
        native.DTYPE_CODES[q.dtype], native.threads(),
    )  # fmt: skip
    native.lib().decode_attention(
        sizes, o.softmax_scale, o.softcap, _tensor4(q), _tensor4(k_cache), _tensor4(v_cache),
        _cache(k_cache, o), _tensor4(out), lse.data_ptr(),
    )  # fmt: skip
    return out, lse


def direct(q, k_cache, v_cache, cache_seqlens, window, softmax_scale, softcap, num_splits=0,
           sinks=None, *, heads_first=False, return_lse=False):  # fmt: skip
    """`forward` without the op around it, for a contiguous cache of q's type that only
    cache_seqlens (int, or int32 (batch,)) cuts: (out, lse), lse None where it is not returned.

    None unless everything fits and no gradient is wanted: the long way says why, or records.

    Args:
        heads_first: q and the caches are (batch, nheads, seqlen, headdim); out never is.
    """
    fits = (
        goes_direct(q, k_cache, v_cache) and q.dim() == k_cache.dim() == v_cache.dim() == 4
        and q.dtype in _DTYPES and q.dtype == k_cache.dtype == v_cache.dtype
        and type(softcap) in (float, int) and 0 <= softcap < math.inf
        and max(window) < FAR and type(num_splits) is int and 0 <= num_splits < FAR
    )  # fmt: skip
    if not fits:
        return None
    (batch, rows, heads, dim), (capacity, dim_v) = q.shape, v_cache.shape[1::2]
    if heads_first:
        rows, heads, capacity = heads, rows, v_cache.shape[2]
    if dim == 0 or not (sinks is None or _are_sinks(sinks, heads)):
        return None
    keys, lengths = cache_seqlens, 0
    if type(keys) is not int:
        if not _are_lengths(cache_seqlens, batch, capacity):
            return None
        keys, lengths = capacity, cache_seqlens.data_ptr()
    elif not 0 < keys <= capacity:
        return None
    out = q.new_empty((batch, rows, heads, dim_v))
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32) if return_lse else None
    done = native.lib().decode_whole(
        heads_first,
        (q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(),
         native.pointer(sinks), native.pointer(lse), lengths),
        q.shape, q.stride(), k_cache.shape, k_cache.stride(), v_cache.shape, v_cache.stride(),
        (keys, *window, num_splits, native.DTYPE_CODES[q.dtype], native.threads()),
        scale_of_scores(OP, softmax_scale, dim), softcap,
    )  # fmt: skip
    return (out, lse) if done else None


def append(q, k_cache, v_cache, *arguments):
    new, plain = New(*arguments[: len(New._fields)]), Options(*arguments[len(New._fields) :])
    check_values(k_cache, plain, new)
    o, q, k, v = _prepared(plain), _dense(q), _dense(new.k), _dense(new.v)
    batch, seqlen_q, heads, dim = q.shape
    turned, rotary = q, ()
    if new.rotary_cos is not None:
        turned = q.new_empty(q.shape)
        cos, sin = (x.to(torch.float32).contiguous() for x in (new.rotary_cos, new.rotary_sin))
        first = o.cache_seqlens if new.rotary_seqlens is None else new.rotary_seqlens.contiguous()
        rotary = (cos.data_ptr(), sin.data_ptr(), cos.shape[1], new.rotary_interleaved,
                  q_in_sequence(o), first.data_ptr())  # fmt: skip
    sizes = (batch, seqlen_q, k.shape[1], heads, k.shape[2], dim, v.shape[3],
             native.DTYPE_CODES[q.dtype])  # fmt: skip
    native.lib().decode_append(
        sizes, _tensor4(k_cache), _tensor4(v_cache), _cache(k_cache, o), _tensor4(k), _tensor4(v),
        rotary, _tensor4(q), _tensor4(turned),
    )  # fmt: skip
    # Written behind torch's back: what autograd saved of the caches is out of date.
    torch.autograd.graph.increment_version((k_cache, v_cache))
    return _attend(turned, k_cache, v_cache, appended(o, new))
