"""Checks of what integer tensors hold: always on the CPU, elsewhere only on request (they wait)."""

import torch

from ..._checks import fail
from .options import New, Options, capacity

OP = "decode_attention"
FEW = 64  # numbers that are compared in Python: 1 us where a reduction by torch takes 8


def _first(bad: torch.Tensor) -> int:
    return int(bad.nonzero()[0, 0])


def _within(name: str, values: torch.Tensor, low: int, high: int, what: str) -> None:
    if values.numel() == 0:
        return
    if values.is_cpu and values.numel() <= FEW:
        few = values.tolist()
        least, most = min(few), max(few)
    else:
        least, most = (int(x) for x in torch.aminmax(values))
    if least < low or most > high:
        at = _first((values < low) | (values > high))
        fail(OP, f"{name}[{at}]", f"in {low}..{high} ({what})", int(values[at]))


def check_values(k_cache, options: Options, new: New | None = None) -> None:
    """Raises ValueError where a length, an index or a page would lead out of the cache."""
    o, seqlen_new = options, 0 if new is None else new.k.shape[1]
    room = capacity(k_cache, o)
    what = f"capacity {room} less {seqlen_new} new keys" if seqlen_new else f"capacity {room}"
    _within("cache_seqlens", o.cache_seqlens, 0, room - seqlen_new, what)
    if o.cache_leftpad is not None:
        bad = (o.cache_leftpad < 0) | (o.cache_leftpad > o.cache_seqlens)
        if bad.any():
            at = _first(bad)
            fail(OP, f"cache_leftpad[{at}]", f"in 0..{int(o.cache_seqlens[at])} (cache_seqlens)",
                 int(o.cache_leftpad[at]))  # fmt: skip
    if o.cache_batch_idx is not None:
        _within("cache_batch_idx", o.cache_batch_idx, 0, k_cache.shape[0] - 1, "rows of the cache")
    if o.block_table is not None:
        _check_pages(k_cache, o, seqlen_new)
    if new is not None and new.rotary_cos is not None:
        first = o.cache_seqlens if new.rotary_seqlens is None else new.rotary_seqlens
        longest = max(seqlen_new, 1)
        _within("rotary_seqlens" if new.rotary_seqlens is not None else "cache_seqlens", first, 0,
                new.rotary_cos.shape[0] - longest, f"{new.rotary_cos.shape[0]} rotary positions "
                f"less {longest} of this call")  # fmt: skip


def _check_pages(k_cache, o: Options, seqlen_new: int) -> None:
    """Entries of pages that hold no key of the sequence may be anything."""
    page_size = k_cache.shape[1]
    used = (o.cache_seqlens + (seqlen_new + page_size - 1)) // page_size
    column = torch.arange(o.block_table.shape[1], device=used.device)
    bad = (column < used[:, None]) & ((o.block_table < 0) | (o.block_table >= k_cache.shape[0]))
    if o.cache_leftpad is not None:
        bad &= column >= (o.cache_leftpad // page_size)[:, None]
    if bad.any():
        row, col = bad.nonzero()[0].tolist()
        fail(OP, f"block_table[{row}, {col}]", f"in 0..{k_cache.shape[0] - 1} (pages of the cache)",
             int(o.block_table[row, col]))  # fmt: skip
