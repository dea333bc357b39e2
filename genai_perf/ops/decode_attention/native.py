"""Decode attention by csrc/cpu/decode_attention_kernel.cpp and decode_append_kernel.cpp."""

import math

import torch

from ..._backends import native
from ..._checks import FAR, scale_of_scores
from ..._dispatch import goes_direct
from .options import QUANTIZED, New, Options, appended, q_in_sequence
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


def _longest(lengths, batch: int, capacity: int) -> int:
    """The largest of few int32 (batch,), each within the capacity; else -1."""
    fits = (
        isinstance(lengths, torch.Tensor) and goes_direct(lengths) and lengths.dtype == torch.int32
        and lengths.shape == (batch,) and lengths.is_contiguous() and 0 < batch <= FEW
    )  # fmt: skip
    values = lengths.tolist() if fits else (-1,)
    return max(values) if min(values) >= 0 and max(values) <= capacity else -1


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


def _tables(new: New) -> list[torch.Tensor]:
    """cos and sin as the kernel reads them: contiguous, of one of its dtypes."""
    both = (new.rotary_cos, new.rotary_sin)
    same = both[0].dtype == both[1].dtype and both[0].dtype in _DTYPES
    return [x.to(x.dtype if same else torch.float32).contiguous() for x in both]


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


def _are_scales(k_scale, v_scale, batch: int, heads: int) -> bool:
    """Both alike: (nheads_k,) or (batch, nheads_k)."""
    return (
        goes_direct(k_scale, v_scale) and k_scale.dtype == v_scale.dtype == torch.float32
        and k_scale.is_contiguous() and v_scale.is_contiguous()
        and k_scale.shape == v_scale.shape and k_scale.shape in ((heads,), (batch, heads))
    )  # fmt: skip


def _added(new: New, q, k_cache, v_cache, longest: int) -> tuple[int, ...] | None:
    """What `decode_whole` appends, for sequences of at most so many keys; None if it cannot."""
    k, v, cos, sin = new[:4]
    fits = (
        goes_direct(k, v) and q.dtype == k.dtype == v.dtype and k.dim() == 4
        and k.is_contiguous() and v.is_contiguous()
        and k.shape == (q.shape[0], k.shape[1], *k_cache.shape[2:])
        and v.shape == (*k.shape[:2], *v_cache.shape[2:])
        and longest + k.shape[1] <= k_cache.shape[1] and new.rotary_seqlens is None
    )  # fmt: skip
    if not fits:
        return None
    found = (k.shape[1], k.data_ptr(), v.data_ptr())
    if cos is None or sin is None:
        return None if cos is not sin else (*found, 0, 0)
    fits = (
        goes_direct(cos, sin) and cos.dtype == sin.dtype and cos.dtype in _DTYPES
        and cos.dim() == 2 and cos.shape == sin.shape and 0 < 2 * cos.shape[1] <= q.shape[3]
        and cos.is_contiguous() and sin.is_contiguous()
        and longest + max(k.shape[1], 1) <= cos.shape[0]
    )  # fmt: skip
    if not fits:
        return None
    return (*found, cos.data_ptr(), sin.data_ptr(), native.DTYPE_CODES[cos.dtype], cos.shape[1],
            new.rotary_interleaved)  # fmt: skip


def direct(q, k_cache, v_cache, cache_seqlens, window, softmax_scale, softcap, num_splits=0,
           sinks=None, *, scales=(None, None), new=None, heads_first=False,
           return_lse=False):  # fmt: skip
    """`forward`, or with `new` (New) `append`, without the op around it, for a contiguous cache
    that only cache_seqlens (int, or int32 (batch,)) cuts: (out, lse), lse None where it is not
    returned.

    None unless everything fits and no gradient is wanted: the long way says why, or records.

    Args:
        scales: k_scale and v_scale, both or none.
        heads_first: q and the caches are (batch, nheads, seqlen, headdim), and nothing is new; out
            is not.
    """
    fits = (
        goes_direct(q, k_cache, v_cache) and q.dim() == k_cache.dim() == v_cache.dim() == 4
        and q.dtype in _DTYPES and k_cache.dtype == v_cache.dtype
        and type(softcap) in (float, int) and 0 <= softcap < math.inf
        and max(window) < FAR and type(num_splits) is int and 0 <= num_splits < FAR
    )  # fmt: skip
    if not fits:
        return None
    (batch, rows, heads, dim), (capacity, heads_k, dim_v) = q.shape, v_cache.shape[1:]
    if heads_first:
        rows, heads, capacity, heads_k = heads, rows, heads_k, capacity
    if dim == 0 or not (sinks is None or _are_sinks(sinks, heads)):
        return None
    k_scale, v_scale = scales
    if k_cache.dtype == q.dtype:
        if not (k_scale is v_scale is None):
            return None
    elif not (k_cache.dtype in QUANTIZED and _are_scales(k_scale, v_scale, batch, heads_k)):
        return None
    keys, lengths = cache_seqlens, 0
    if type(keys) is not int:
        keys = _longest(cache_seqlens, batch, capacity)
        lengths = cache_seqlens.data_ptr() if keys >= 0 else 0
    if capacity == 0 or not 0 <= keys <= capacity:
        return None
    added = () if new is None else _added(new, q, k_cache, v_cache, keys)
    if added is None:
        return None
    out = q.new_empty((batch, rows, heads, dim_v))
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32) if return_lse else None
    done = native.lib().decode_whole(
        heads_first,
        (q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(),
         native.pointer(sinks), native.pointer(lse), lengths, native.pointer(k_scale),
         native.pointer(v_scale)),
        q.shape, q.stride(), k_cache.shape, k_cache.stride(), v_cache.shape, v_cache.stride(),
        (keys, *window, num_splits, native.DTYPE_CODES[q.dtype], native.DTYPE_CODES[k_cache.dtype],
         heads_k if k_scale is not None and k_scale.dim() == 2 else 0, native.threads()),
        scale_of_scores(OP, softmax_scale, dim), softcap, added,
    )  # fmt: skip
    if done and new is not None:
        _written(k_cache, v_cache)
    return (out, lse) if done else None


def _written(k_cache, v_cache) -> None:
    """Behind torch's back: what autograd saved of the caches is out of date."""
    torch.autograd.graph.increment_version((k_cache, v_cache))


def append(q, k_cache, v_cache, *arguments):
    new, plain = New(*arguments[: len(New._fields)]), Options(*arguments[len(New._fields) :])
    check_values(k_cache, plain, new)
    o, q, k, v = _prepared(plain), _dense(q), _dense(new.k), _dense(new.v)
    batch, seqlen_q, heads, dim = q.shape
    turned, rotary = q, ()
    if new.rotary_cos is not None:
        turned = q.new_empty(q.shape)
        cos, sin = _tables(new)
        first = o.cache_seqlens if new.rotary_seqlens is None else new.rotary_seqlens.contiguous()
        rotary = (cos.data_ptr(), sin.data_ptr(), native.DTYPE_CODES[cos.dtype], cos.shape[1],
                  new.rotary_interleaved, q_in_sequence(o), first.data_ptr())  # fmt: skip
    sizes = (batch, seqlen_q, k.shape[1], heads, k.shape[2], dim, v.shape[3],
             native.DTYPE_CODES[q.dtype])  # fmt: skip
    native.lib().decode_append(
        sizes, _tensor4(k_cache), _tensor4(v_cache), _cache(k_cache, o), _tensor4(k), _tensor4(v),
        rotary, _tensor4(q), _tensor4(turned),
    )  # fmt: skip
    _written(k_cache, v_cache)
    return _attend(turned, k_cache, v_cache, appended(o, new))
