"""Decode attention in plain torch, sequence by sequence with its whole score matrix: the oracle.

Any device, and float64. It reads lengths and pages as numbers, so on a GPU it waits for them.
"""

import torch

from .options import New, Options, appended, q_in_sequence
from .values import check_values


def lse_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def why_not(q, k_cache, v_cache, *options) -> str | None:
    return None


def why_not_append(q, k_cache, v_cache, *arguments) -> str | None:
    return None


def _rows(cache, b: int, first: int, last: int, o: Options) -> tuple:
    """The index that gives rows first..last - 1 of sequence b: (last - first, nheads_k, dim)."""
    positions = torch.arange(first, last, device=cache.device)
    if o.block_table is None:
        row = b if o.cache_batch_idx is None else int(o.cache_batch_idx[b])
        return row, positions
    return o.block_table[b, positions // cache.shape[1]].long(), positions % cache.shape[1]


def _scale(scale, b: int, dtype):
    """(nheads_k, 1), or 1 for a cache without scales."""
    if scale is None:
        return 1
    return (scale if scale.dim() == 1 else scale[b])[:, None].to(dtype)


def _read(cache, scale, b, first, last, o: Options, dtype):
    """Rows first..last - 1 in `dtype`."""
    # float8 cannot be indexed everywhere: its bytes can.
    plain = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
    rows = plain[_rows(cache, b, first, last, o)]
    return rows.view(cache.dtype).to(dtype) * _scale(scale, b, dtype)


def to_cache(x, dtype, scale):
    """x / scale in the dtype of the cache, saturating, half to even; int8 has no NaN: 0."""
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        return x.to(dtype)
    x = x / scale
    if dtype == torch.int8:
        return torch.nan_to_num(x, nan=0.0).clamp(-127, 127).round().to(torch.int8)
    return x.clamp(-448, 448).to(dtype)


def rotate(x, cos, sin, interleaved: bool):
    """x (seqlen, nheads, dim) with its first 2 * half elements turned; cos, sin: (seqlen, half)."""
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    x, rest = x[..., : 2 * half], x[..., 2 * half :]
    u, v = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    pair = (u * cos - v * sin, u * sin + v * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, rest), -1)


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rotation(new: New, o: Options, b: int, count: int, in_sequence: bool, dtype):
    """cos and sin for `count` tokens of sequence b."""
    first = int((o.cache_seqlens if new.rotary_seqlens is None else new.rotary_seqlens)[b])
    step = torch.arange(count, device=new.k.device) if in_sequence else first * 0
    at = torch.zeros(count, dtype=torch.long, device=new.k.device) + first + step
    return new.rotary_cos[at].to(dtype), new.rotary_sin[at].to(dtype)


def write(q, k_cache, v_cache, new: New, o: Options):
    """Append k and v to the caches in place; returns q, rotated where there are tables."""
    seqlen_new, dtype = new.k.shape[1], _work_dtype(q.dtype)
    turned = []
    for b in range(q.shape[0]):
        k, v = new.k[b].to(dtype), new.v[b].to(dtype)
        if new.rotary_cos is not None:
            k = rotate(k, *_rotation(new, o, b, seqlen_new, True, dtype), new.rotary_interleaved)
            table = _rotation(new, o, b, q.shape[1], q_in_sequence(o), dtype)
            turned.append(rotate(q[b].to(dtype), *table, new.rotary_interleaved).to(q.dtype))
        start = int(o.cache_seqlens[b])
        for cache, rows, scale in ((k_cache, k, o.k_scale), (v_cache, v, o.v_scale)):
            rows = to_cache(rows, cache.dtype, _scale(scale, b, dtype))
            at = _rows(cache, b, start, start + seqlen_new, o)
            if cache.dtype == torch.float8_e4m3fn:
                cache.view(torch.uint8)[at] = rows.view(torch.uint8)
            else:
                cache[at] = rows
    return torch.stack(turned) if turned else q.clone()


def append(q, k_cache, v_cache, *arguments):
    new, o = New(*arguments[: len(New._fields)]), Options(*arguments[len(New._fields) :])
    check_values(k_cache, o, new)
    return forward(write(q, k_cache, v_cache, new, o), k_cache, v_cache, *appended(o, new))


def _attend(q, k, v, slopes, o: Options):
    """out and lse of one sequence, (seqlen, nheads, dim) tensors, computed in the dtype of q."""
    seqlen_q, seqlen_k, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    s = (q * o.softmax_scale).transpose(0, 1) @ k.transpose(1, 2)  # (nheads, seqlen_q, seqlen_k)
    if o.softcap:
        s = o.softcap * torch.tanh(s / o.softcap)
    own = torch.arange(seqlen_q, device=q.device)[:, None] + (seqlen_k - seqlen_q)
    distance = torch.arange(seqlen_k, device=q.device) - own
    if slopes is not None:
        s = s - slopes.to(s.dtype)[:, None, None] * distance.abs()
    if o.window_left >= 0:
        s = s.masked_fill(distance < -o.window_left, -torch.inf)
    if o.window_right >= 0:
        s = s.masked_fill(distance > o.window_right, -torch.inf)
    sinks = q.new_full((q.shape[1],), -torch.inf) if o.sinks is None else o.sinks.to(s.dtype)
    s = torch.cat([s, sinks[:, None, None].expand(-1, seqlen_q, 1)], -1)
    blind = (s == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(s.masked_fill(blind, 0), -1, keepdim=True)
    p = torch.exp(s - lse).masked_fill(blind, 0)
    out = (p[..., :-1] @ v).transpose(0, 1)
    return out, lse.masked_fill(blind, -torch.inf).squeeze(-1)


def forward(q, k_cache, v_cache, *options, upcast=True):
    o = Options(*options)
    check_values(k_cache, o)
    half = q.dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if upcast and half else q.dtype
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty(batch, seqlen_q, heads, v_cache.shape[3])
    lse = q.new_empty(batch, heads, seqlen_q, dtype=lse_dtype(q))
    for b, last in enumerate(o.cache_seqlens.tolist()):
        first = 0 if o.cache_leftpad is None else int(o.cache_leftpad[b])
        k = _read(k_cache, o.k_scale, b, first, last, o, dtype)
        v = _read(v_cache, o.v_scale, b, first, last, o, dtype)
        slopes = o.alibi_slopes
        slopes = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
        row, row_lse = _attend(q[b].to(dtype), k, v, slopes, o)
        out[b], lse[b] = row.to(q.dtype), row_lse
    return out, lse
