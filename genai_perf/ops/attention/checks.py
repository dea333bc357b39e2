"""The checks of `attention`: one ValueError sentence each, naming the argument."""

import torch

from ..._checks import (
    check_dtype,
    check_ndim,
    check_same,
    check_tensor,
    check_window,
    fail,
    heads_fit,
    number,
)

OP = "attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shapes(q, k, v, cu_seqlens_q, cu_seqlens_k) -> int:
    """Check that the tensors belong together; returns the batch size."""
    dense = cu_seqlens_q is None and cu_seqlens_k is None
    if dense and heads_fit(q, k, v, DTYPES) and q.shape[0] == k.shape[0]:
        return q.shape[0]
    check_tensor(OP, q=q, k=k, v=v)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    layout = "(total, nheads, headdim)" if packed else "(batch, seqlen, nheads, headdim)"
    check_ndim(OP, 3 if packed else 4, layout, q=q, k=k, v=v)
    check_dtype(OP, DTYPES, q=q)
    check_same(OP, "dtype", q=q, k=k, v=v)
    check_same(OP, "device", q=q, k=k, v=v)
    dim, heads, heads_k = q.shape[-1], q.shape[-2], k.shape[-2]
    if k.shape[-1] != dim:
        fail(OP, "headdim of k", f"that of q ({dim})", k.shape[-1])
    if v.shape[:-1] != k.shape[:-1]:
        fail(OP, "v", f"of k's shape up to headdim {tuple(k.shape[:-1])}", tuple(v.shape))
    if heads_k == 0 or heads % heads_k:
        fail(OP, "nheads of q", f"a multiple of nheads_k ({heads_k})", heads)
    if dim == 0 or v.shape[-1] == 0:
        fail(OP, "headdim", "at least 1", f"{dim} (q, k) and {v.shape[-1]} (v)")
    if packed:
        return _sequences(q, cu_seqlens_q, cu_seqlens_k)
    if k.shape[0] != q.shape[0]:
        fail(OP, "batch of k and v", f"that of q ({q.shape[0]})", k.shape[0])
    return q.shape[0]


def _sequences(q, cu_seqlens_q, cu_seqlens_k) -> int:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        fail(OP, "cu_seqlens_q and cu_seqlens_k", "given together", "one of them")
    check_tensor(OP, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_dtype(OP, (torch.int32,), cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_ndim(OP, 1, "(batch + 1,)", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_same(OP, "device", q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    batch = cu_seqlens_q.shape[0] - 1
    if batch < 0 or cu_seqlens_k.shape[0] != batch + 1:
        fail(OP, "cu_seqlens_q and cu_seqlens_k", "of one length, batch + 1",
             f"{cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}")  # fmt: skip
    return batch


def max_seqlen(value, rows, packed: bool, name: str) -> int:
    """The bound to plan for: that of the caller, else all `rows`; 0 where nothing is packed."""
    if value is None:
        return rows.shape[0] if packed else 0
    if not isinstance(value, int | torch.SymInt) or value < 0:
        fail(OP, name, "an int, 0 or more", repr(value))
    return value if packed else 0


def window(window_size) -> tuple[int, int]:
    return check_window(OP, window_size)


def alibi(alibi_slopes, q, batch) -> None:
    if alibi_slopes is None:
        return
    check_tensor(OP, alibi_slopes=alibi_slopes)
    check_dtype(OP, (torch.float32, torch.float64), alibi_slopes=alibi_slopes)
    check_same(OP, "device", q=q, alibi_slopes=alibi_slopes)
    heads = q.shape[-2]
    if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        fail(OP, "alibi_slopes", f"(nheads {heads},) or (batch {batch}, nheads {heads})",
             tuple(alibi_slopes.shape))  # fmt: skip
    if alibi_slopes.requires_grad:
        fail(OP, "alibi_slopes", "a constant (it has no gradient)", "requires_grad=True")


def sinks(values, q) -> None:
    if values is None:
        return
    check_tensor(OP, sinks=values)
    check_dtype(OP, DTYPES, sinks=values)
    check_same(OP, "device", q=q, sinks=values)
    if tuple(values.shape) != (q.shape[-2],):
        fail(OP, "sinks", f"(nheads {q.shape[-2]},)", tuple(values.shape))


def dropout(dropout_p, rng_state, q):
    """The state to use: that of the caller, or a new one from torch's generator; None for none."""
    if not 0 <= number(OP, "dropout_p", dropout_p) < 1:
        fail(OP, "dropout_p", "in [0, 1)", dropout_p)
    if rng_state is not None:
        check_tensor(OP, rng_state=rng_state)
        check_dtype(OP, (torch.int64,), rng_state=rng_state)
        check_same(OP, "device", q=q, rng_state=rng_state)
        if tuple(rng_state.shape) != (2,):
            fail(OP, "rng_state", "(2,): seed and offset", tuple(rng_state.shape))
    if dropout_p == 0:
        return None
    if rng_state is None:
        return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=q.device)
    return rng_state


def blocks(block_mask, block_size, q, k, *, packed: bool):
    """The block mask with four dimensions, the last two of them whole; queries, keys of a block."""
    pair = isinstance(block_size, tuple | list) and len(block_size) == 2
    if not pair or any(not isinstance(n, int) or n < 1 for n in block_size):
        fail(OP, "block_size", "a pair (queries, keys) of ints >= 1", repr(block_size))
    if block_mask is None:
        return None, 1, 1
    if packed:
        fail(OP, "block_mask", "None with cu_seqlens (give each sequence its own call)", "a tensor")
    check_tensor(OP, block_mask=block_mask)
    check_dtype(OP, (torch.bool,), block_mask=block_mask)
    check_same(OP, "device", q=q, block_mask=block_mask)
    counts = (-(-q.shape[1] // block_size[0]), -(-k.shape[1] // block_size[1]))
    full, shape = (q.shape[0], q.shape[2], *counts), block_mask.shape
    fits = (size in (1, want) for size, want in zip(reversed(shape), reversed(full), strict=False))
    if len(shape) > 4 or not all(fits):
        expected = f"broadcastable to (batch, nheads, blocks of queries, of keys) {full}"
        fail(OP, "block_mask", expected, tuple(shape))
    block_mask = block_mask.reshape((1,) * (4 - len(shape)) + tuple(shape))
    return block_mask.expand(-1, -1, *counts), *block_size


def bias(attn_bias, q, k, *, packed: bool):
    """The bias with four dimensions, the last of them whole (its gradient is made by columns)."""
    if attn_bias is None:
        return None
    if packed:
        fail(OP, "attn_bias", "None with cu_seqlens (give each sequence its own call)", "a tensor")
    check_tensor(OP, attn_bias=attn_bias)
    check_dtype(OP, (*DTYPES, torch.bool), attn_bias=attn_bias)
    check_same(OP, "device", q=q, attn_bias=attn_bias)
    full, shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), attn_bias.shape
    fits = (size in (1, want) for size, want in zip(reversed(shape), reversed(full), strict=False))
    if len(shape) > 4 or not all(fits):
        fail(OP, "attn_bias", f"broadcastable to (batch, nheads, seqlen_q, seqlen_k) {full}",
             tuple(shape))  # fmt: skip
    attn_bias = attn_bias.reshape((1,) * (4 - len(shape)) + tuple(shape))
    return attn_bias.expand(-1, -1, -1, k.shape[1])
