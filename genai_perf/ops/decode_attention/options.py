"""What a call carries beside q and the cache: one list for schema, api and backends."""

from typing import NamedTuple

import torch
from torch import Tensor

# The dtypes of a cache that have scales.
QUANTIZED = (torch.int8, torch.float8_e4m3fn)
SCHEMA = (
    "Tensor cache_seqlens, Tensor? block_table, Tensor? cache_batch_idx, Tensor? cache_leftpad,"
    " Tensor? k_scale, Tensor? v_scale, Tensor? alibi_slopes, Tensor? sinks, int window_left,"
    " int window_right, float softmax_scale, float softcap, int num_splits"
)
NEW_SCHEMA = (
    "Tensor k, Tensor v, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? rotary_seqlens,"
    " bool rotary_interleaved"
)


class Options(NamedTuple):
    """The arguments of `SCHEMA`, in its order; the integer tensors are int32, the others float32.

    cache_seqlens: (batch,), one past the last key in the cache, padding on the left included.
    block_table: (batch, pages of a sequence), indices of pages; None: the cache is contiguous.
    cache_batch_idx: (batch,), the row of the contiguous cache; None: 0, 1, 2 ...
    cache_leftpad: (batch,), the first key of each sequence; None: 0.
    k_scale, v_scale: (nheads_k,) or (batch, nheads_k), what a cached 1 stands for; None: 1.
    alibi_slopes: (nheads,) or (batch, nheads). sinks: (nheads,) of any floating dtype.
    window_left, window_right: as in attention; -1 is unbounded, causal is window_right 0.
    softcap: 0 is none. num_splits: 0 leaves it to the backend.
    """

    cache_seqlens: Tensor
    block_table: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    window_left: int
    window_right: int
    softmax_scale: float
    softcap: float
    num_splits: int


class New(NamedTuple):
    """The arguments of `NEW_SCHEMA`: keys and values to append, and how they are rotated.

    k: (batch, seqlen_new, nheads_k, headdim). v: (..., headdim_v).
    rotary_cos, rotary_sin: (positions, rotary_dim / 2); None: no rotation.
    rotary_seqlens: int32 (batch,), position of the first new key; None: cache_seqlens.
    rotary_interleaved: pairs (0, 1), (2, 3) ...; else (0, rotary_dim / 2), ...
    """

    k: Tensor
    v: Tensor
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_seqlens: Tensor | None
    rotary_interleaved: bool


def appended(o: Options, new: New) -> Options:
    """The options with the new keys counted."""
    return o._replace(cache_seqlens=o.cache_seqlens + new.k.shape[1])


def capacity(k_cache: Tensor, o: Options) -> int:
    """Keys that a sequence has room for."""
    return k_cache.shape[1] * (1 if o.block_table is None else o.block_table.shape[1])


def q_in_sequence(o: Options) -> bool:
    """Whether query i is rotated as position i (causal or a window), else all as the first."""
    return o.window_left >= 0 or o.window_right >= 0
