"""Running the kernels: outputs, grids and configurations. Nothing here waits for the device."""

import torch

from ...._backends import triton as toolchain
from ...attention.triton.problem import block_dim
from ..options import New, Options, appended, capacity, q_in_sequence
from ..values import check_values
from . import configs
from .append_kernels import _decode_append_kernel, _decode_rotate_kernel
from .common import FLOATS, FP8, INT8
from .decode_kernels import _decode_merge_kernel, _decode_split_kernel

KINDS = {torch.int8: INT8.value, torch.float8_e4m3fn: FP8.value}


def _kind(cache) -> int:
    return KINDS.get(cache.dtype, FLOATS.value)


def _bytes(cache):
    """The cache as the kernels take it: float8 as bytes, which every chip can read."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def _dense(x):
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _dims(headdim: int, headdim_v: int) -> dict[str, int]:
    return {"HEAD_DIM": headdim, "HEAD_DIM_V": headdim_v, "BLOCK_D": block_dim(headdim),
            "BLOCK_DV": block_dim(headdim_v)}  # fmt: skip


def _prepared(o: Options) -> Options:
    """Integer tensors and scales contiguous, slopes of float32."""
    values = {n: None if x is None else x.contiguous()
              for n, x in zip(o._fields[:6], o[:6], strict=True)}  # fmt: skip
    slopes = None if o.alibi_slopes is None else o.alibi_slopes.to(torch.float32).contiguous()
    return o._replace(**values, alibi_slopes=slopes)


def _by_batch(x) -> int:
    """The batch stride of numbers by head, or by batch and head."""
    return x.shape[1] if x is not None and x.dim() == 2 else 0


def _table_stride(o: Options) -> int:
    return 0 if o.block_table is None else o.block_table.shape[1]


def _places(o: Options) -> dict[str, bool]:
    return {"PAGED": o.block_table is not None, "INDEXED": o.cache_batch_idx is not None}


def forward(q, k_cache, v_cache, options: Options):
    if q.device.type == "cpu":
        check_values(k_cache, options)
    return _attend(_dense(q), k_cache, v_cache, _prepared(options))


def _attend(q, k_cache, v_cache, o: Options):
    """out and lse (natural logarithm, float32)."""
    batch, seqlen_q, nheads, headdim = q.shape
    nheads_k, headdim_v = k_cache.shape[2], v_cache.shape[3]
    group = nheads // nheads_k
    out = q.new_empty(batch, seqlen_q, nheads, headdim_v)
    lse = q.new_empty(batch, nheads, seqlen_q, dtype=torch.float32)
    streams, rows = batch * nheads_k, group * seqlen_q
    if streams * rows == 0:
        return out, lse
    room = capacity(k_cache, o)
    config = configs.choose(q, k_cache.dtype, headdim_v, rows, room)
    row_blocks = -(-rows // config["BLOCK_M"])
    splits = o.num_splits or configs.splits(q.device, streams * row_blocks, room, config)
    sums = q.new_empty(streams, splits, rows, headdim_v, dtype=torch.float32)
    top, total = q.new_empty(2, streams, splits, rows, dtype=torch.float32)
    kind, natural = _kind(k_cache), q.dtype == torch.float32
    # Kept so small that sums with them stay in 32 bits.
    left, right = (min(max(side, 0), 2**29) for side in (o.window_left, o.window_right))
    k_cache, v_cache = _bytes(k_cache), _bytes(v_cache)
    toolchain.launch(
        _decode_split_kernel, streams * row_blocks * splits, q.device,
        q, k_cache, v_cache, sums, top, total, o.cache_seqlens, o.cache_leftpad, o.block_table,
        o.cache_batch_idx, o.k_scale, o.alibi_slopes, *q.stride()[:3], *k_cache.stride()[:3],
        *v_cache.stride()[:3], _table_stride(o), _by_batch(o.k_scale), _by_batch(o.alibi_slopes),
        nheads_k, group, seqlen_q, splits, row_blocks, k_cache.shape[1], left, right,
        o.softmax_scale, o.softcap, HAS_LEFT=o.window_left >= 0, HAS_RIGHT=o.window_right >= 0,
        SOFTCAP=o.softcap != 0, ALIBI=o.alibi_slopes is not None,
        LEFTPAD=o.cache_leftpad is not None, CACHE=kind, PRECISION=configs.precision(q),
        NATURAL=natural, **_places(o), **_dims(headdim, headdim_v), **config,
    )  # fmt: skip
    toolchain.launch(
        _decode_merge_kernel, streams * rows, q.device, sums, top, total, out, lse, o.sinks,
        o.v_scale, *out.stride()[:3], _by_batch(o.v_scale), nheads_k, group, seqlen_q, splits,
        HEAD_DIM_V=headdim_v, BLOCK_DV=block_dim(headdim_v), SINKS=o.sinks is not None, CACHE=kind,
        NATURAL=natural, num_warps=configs.MERGE_WARPS, num_stages=1,
    )  # fmt: skip
    return out, lse


def append(q, k_cache, v_cache, new: New, options: Options):
    if q.device.type == "cpu":
        check_values(k_cache, options, new)
    o, q, k, v = _prepared(options), _dense(q), _dense(new.k), _dense(new.v)
    batch, seqlen_new, nheads_k, headdim = k.shape
    rotary = new.rotary_cos is not None
    half = new.rotary_cos.shape[1] if rotary else 0
    block_half = block_dim(max(half, 1))
    cos, sin = (x.contiguous() if rotary else None for x in (new.rotary_cos, new.rotary_sin))
    positions = o.cache_seqlens if new.rotary_seqlens is None else new.rotary_seqlens.contiguous()
    last = cos.shape[0] - 1 if rotary else 0
    keys, values = _bytes(k_cache), _bytes(v_cache)
    shared = {"ROTARY_HALF": half, "BLOCK_HALF": block_half, "INTERLEAVED": new.rotary_interleaved,
              "num_warps": configs.APPEND_WARPS, "num_stages": 1}  # fmt: skip
    if batch * seqlen_new:
        toolchain.launch(
            _decode_append_kernel, batch * seqlen_new * nheads_k, q.device,
            k, v, keys, values, cos, sin, o.cache_seqlens, positions, o.block_table,
            o.cache_batch_idx, o.k_scale, o.v_scale, *k.stride()[:3], *v.stride()[:3],
            *keys.stride()[:3], *values.stride()[:3], _table_stride(o), _by_batch(o.k_scale),
            nheads_k, seqlen_new, k_cache.shape[1], last, CACHE=_kind(k_cache), **_places(o),
            **_dims(headdim, v.shape[3]), **shared,
        )  # fmt: skip
        # Written behind torch's back: what autograd saved of the caches is out of date.
        torch.autograd.graph.increment_version((k_cache, v_cache))
    if rotary and q.numel():
        turned = torch.empty_like(q)
        toolchain.launch(
            _decode_rotate_kernel, batch * q.shape[1] * q.shape[2], q.device,
            q, turned, cos, sin, positions, *q.stride()[:3], *turned.stride()[:3], q.shape[2],
            q.shape[1], last, HEAD_DIM=headdim, BLOCK_D=block_dim(headdim),
            IN_SEQUENCE=q_in_sequence(o), **shared,
        )  # fmt: skip
        q = turned
    return _attend(q, k_cache, v_cache, appended(o, new))
