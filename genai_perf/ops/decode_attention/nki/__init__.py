"""Decode attention on Trainium by NKI kernels; see the op's README for what was proven where."""

import torch

from ...._backends import nki as toolchain
from ..options import New, Options, appended, q_in_sequence
from ..reference import rotate, to_cache
from ..values import check_values

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
MAX_HEADDIM = 256
PARTITIONS = 128


def why_not(q, k_cache, v_cache, *options) -> str | None:
    if (reason := toolchain.why_not(q, k_cache, v_cache)) is not None:
        return reason
    o = Options(*options)
    if q.dtype not in DTYPES:
        return f"nki takes float32, bfloat16 and float16, got {q.dtype}"
    largest = max(q.shape[-1], v_cache.shape[-1])
    if largest > MAX_HEADDIM:
        return f"nki takes head dimensions up to {MAX_HEADDIM}, got {largest}"
    rows = q.shape[1] * (q.shape[2] // k_cache.shape[2])
    if rows > PARTITIONS:
        return f"nki takes {PARTITIONS} queries a key head, got {rows}"
    return None if o.softmax_scale > 0 else "nki takes a positive softmax_scale"


def why_not_append(q, k_cache, v_cache, *arguments) -> str | None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not cache.is_contiguous():
            return f"nki appends to a contiguous cache, {name} has strides {cache.stride()}"
    return why_not(q, k_cache, v_cache, *arguments[len(New._fields) :])


def _bytes(cache):
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def _places(page_size: int, pages: int, device) -> torch.Tensor:
    """int32 (2, 128, tiles): of key 128 t + p its place in the block table and in the page."""
    count = -(-page_size * pages // PARTITIONS) * PARTITIONS
    at = torch.arange(count, device=device)
    slot = (at // page_size).clamp(max=pages - 1)
    both = torch.stack([slot, at % page_size]).to(torch.int32)
    return both.view(2, -1, PARTITIONS).transpose(1, 2).contiguous()


def _table(o: Options, batch: int, device) -> torch.Tensor:
    """The block table; a contiguous cache is one page a sequence."""
    if o.block_table is not None:
        return o.block_table
    rows = o.cache_batch_idx
    rows = torch.arange(batch, device=device) if rows is None else rows
    return rows.to(torch.int32)[:, None]


def _by_batch(x, batch: int, like) -> torch.Tensor:
    """(batch, n) of (n,) or (batch, n); a placeholder, which no kernel reads, of None."""
    if x is None:
        return like.new_zeros(1, 1, dtype=torch.float32)
    return x.float().expand(batch, -1).contiguous()


def _grouped(x, group: int, seqlen_q: int) -> torch.Tensor:
    """(n, heads) as (n, heads_k * rows): a key head's rows, query after query."""
    return x.unflatten(1, (-1, 1, group)).expand(-1, -1, seqlen_q, -1).flatten(1).contiguous()


def forward(q, k_cache, v_cache, *options):
    o = Options(*options)
    if q.device.type == "cpu":
        check_values(k_cache, o)
    batch, seqlen_q, heads, _ = q.shape
    if q.numel() == 0:
        return (q.new_zeros(batch, seqlen_q, heads, v_cache.shape[3]),
                q.new_zeros(batch, heads, seqlen_q, dtype=torch.float32))  # fmt: skip
    from .kernel import decode_attention

    table = _table(o, batch, q.device)
    group = heads // k_cache.shape[2]
    ages = (torch.arange(seqlen_q, device=q.device) - seqlen_q).repeat_interleave(group)
    sinks = torch.zeros(heads, device=q.device) if o.sinks is None else o.sinks.float()
    sinks = _grouped(sinks[None], group, seqlen_q).view(-1, seqlen_q * group)
    slopes = _by_batch(o.alibi_slopes, batch, q)
    if o.alibi_slopes is not None:
        slopes = _grouped(slopes, group, seqlen_q)
    first = torch.zeros_like(o.cache_seqlens) if o.cache_leftpad is None else o.cache_leftpad
    window = (-1 if s >= 2**23 else s for s in (o.window_left, o.window_right))
    grouped = q.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)
    out, lse = toolchain.launch(
        decode_attention, grouped, _bytes(k_cache), _bytes(v_cache), table,
        torch.stack([o.cache_seqlens, first], 1).float(), ages.float()[None],
        _places(k_cache.shape[1], table.shape[1], q.device), sinks, slopes,
        _by_batch(o.k_scale, batch, q), _by_batch(o.v_scale, batch, q),
        KINDS.get(k_cache.dtype, "plain"), o.sinks is not None, o.alibi_slopes is not None,
        o.softmax_scale, o.softcap, *window, cores=toolchain.cores(),
    )  # fmt: skip
    out = out.unflatten(2, (seqlen_q, group)).transpose(1, 2).flatten(2, 3)
    lse = lse.unflatten(2, (seqlen_q, group)).transpose(2, 3).flatten(1, 2)
    return out.contiguous(), lse.contiguous()


def _rotated(x, first, step: int, new: New) -> torch.Tensor:
    """x (batch, n, heads, dim) in fp32, row i of a sequence turned as position first + step i."""
    batch, count = x.shape[:2]
    at = first[:, None].long() + step * torch.arange(count, device=x.device)
    cos, sin = (t[at.flatten()].float() for t in (new.rotary_cos, new.rotary_sin))
    turned = rotate(x.float().flatten(0, 1), cos, sin, new.rotary_interleaved)
    return turned.unflatten(0, (batch, count))


def _write(cache, x, scale, places) -> None:
    """x (batch, new, heads, dim) into the cache at places (batch, new, 1)."""
    from .append_kernel import append_rows

    if scale is not None:
        scale = scale.expand(x.shape[0], -1)[:, None, :, None]
    rows = _bytes(to_cache(x.float(), cache.dtype, scale)).flatten(2)
    toolchain.launch(append_rows, _bytes(cache), rows, places)


def append(q, k_cache, v_cache, *arguments):
    new, o = New(*arguments[: len(New._fields)]), Options(*arguments[len(New._fields) :])
    if q.device.type == "cpu":
        check_values(k_cache, o, new)
    k, count, page_size = new.k, new.k.shape[1], k_cache.shape[1]
    if new.rotary_cos is not None:
        first = o.cache_seqlens if new.rotary_seqlens is None else new.rotary_seqlens
        k = _rotated(k, first, 1, new)
        q = _rotated(q, first, int(q_in_sequence(o)), new).to(q.dtype)
    if new.k.numel():
        at = o.cache_seqlens[:, None].long() + torch.arange(count, device=q.device)
        pages = _table(o, q.shape[0], q.device).long().gather(1, at // page_size)
        places = (pages * page_size + at % page_size).to(torch.int32)[..., None]
        _write(k_cache, k, o.k_scale, places)
        _write(v_cache, new.v, o.v_scale, places)
    return forward(q, k_cache, v_cache, *appended(o, new))
