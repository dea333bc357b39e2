"""Decode attention on Trainium by an NKI kernel; see the op's README for what was proven where."""

import torch

from ...._backends import nki as toolchain
from ..options import Options
from ..values import check_values

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEADDIM = 256
PARTITIONS = 128


def why_not(q, k_cache, v_cache, *options) -> str | None:
    if (reason := toolchain.why_not(q, k_cache, v_cache)) is not None:
        return reason
    o = Options(*options)
    if q.dtype not in DTYPES or k_cache.dtype != q.dtype:
        return f"nki takes q and cache of one of {DTYPES}, got {q.dtype} and {k_cache.dtype}"
    largest = max(q.shape[-1], v_cache.shape[-1])
    if largest > MAX_HEADDIM:
        return f"nki takes head dimensions up to {MAX_HEADDIM}, got {largest}"
    rows = q.shape[1] * (q.shape[2] // k_cache.shape[2])
    if rows > PARTITIONS:
        return f"nki takes {PARTITIONS} queries a key head, got {rows}"
    for name in ("cache_leftpad", "alibi_slopes"):
        if getattr(o, name) is not None:
            return f"nki takes no {name}"
    if o.softcap:
        return "nki takes no softcap"
    return None if o.softmax_scale > 0 else "nki takes a positive softmax_scale"


def why_not_append(q, k_cache, v_cache, *arguments) -> str | None:
    return "nki reads a cache and appends nothing to it"


def _positions(page_size: int, pages: int, device) -> torch.Tensor:
    """int32 (tiles, 128, 2): for each key in turn its place in the block table and in the page."""
    count = -(-page_size * pages // PARTITIONS) * PARTITIONS
    at = torch.arange(count, device=device)
    slot = (at // page_size).clamp(max=pages - 1)
    both = torch.stack([slot, at % page_size], -1).to(torch.int32)
    return both.view(-1, PARTITIONS, 2)


def forward(q, k_cache, v_cache, *options):
    o = Options(*options)
    check_values(k_cache, o)
    batch, seqlen_q, heads, _ = q.shape
    if q.numel() == 0:
        return (q.new_zeros(batch, seqlen_q, heads, v_cache.shape[3]),
                q.new_zeros(batch, heads, seqlen_q, dtype=torch.float32))  # fmt: skip
    from .kernel import decode_attention

    # A contiguous cache is one page a sequence.
    table = o.block_table
    if table is None:
        rows = o.cache_batch_idx
        rows = torch.arange(batch, device=q.device) if rows is None else rows
        table = rows.to(torch.int32)[:, None]
    group = heads // k_cache.shape[2]
    # A key head's rows: query after query, the heads of its group inside.
    ages = (torch.arange(seqlen_q, device=q.device) - seqlen_q).repeat_interleave(group)
    sinks = torch.zeros(heads, device=q.device) if o.sinks is None else o.sinks.float()
    sinks = sinks.view(-1, 1, group).expand(-1, seqlen_q, group).reshape(-1, seqlen_q * group, 1)
    window = (-1 if s >= 2**23 else s for s in (o.window_left, o.window_right))
    grouped = q.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)
    out, lse = toolchain.launch(
        decode_attention, grouped, k_cache, v_cache, table, o.cache_seqlens.float()[:, None],
        ages.float()[:, None], _positions(k_cache.shape[1], table.shape[1], q.device),
        sinks.contiguous(), o.sinks is not None, o.softmax_scale, *window, cores=toolchain.cores(),
    )  # fmt: skip
    out = out.unflatten(2, (seqlen_q, group)).transpose(1, 2).flatten(2, 3)
    lse = lse.unflatten(2, (seqlen_q, group)).transpose(2, 3).flatten(1, 2)
    return out.contiguous(), lse.contiguous()
