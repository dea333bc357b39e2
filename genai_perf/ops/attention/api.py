"""The public `attention`: its checks, and what they make of its arguments."""

import math

import torch

from ..._checks import check_dtype, check_ndim, check_same, check_tensor, fail
from .op import FORWARD
from .options import Options

OP = "attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    window_size=(None, None),
    softmax_scale=None,
    softcap=0.0,
    alibi_slopes=None,
    attn_bias=None,
    sinks=None,
    return_lse=False,
    backend=None,
):
    # fmt: skip
    """Attention with grouped queries, never holding a seqlen_q x seqlen_k matrix (native backend).

        s = softmax_scale * q k^T;  s = softcap * tanh(s / softcap);  s = s + alibi + bias + mask
        out = softmax(s) v,   lse = log sum exp of the rows of s

    Args:
        q: (batch, seqlen_q, nheads, headdim), float32, bfloat16 or float16 (float64: reference).
        k: (batch, seqlen_k, nheads_k, headdim); nheads is a multiple of nheads_k, and query head h
            uses key head h // (nheads / nheads_k).
        v: (batch, seqlen_k, nheads_k, headdim_v).
        causal: query i sees keys j <= i + seqlen_k - seqlen_q (aligned bottom right).
        window_size: (left, right), query i sees keys from i + seqlen_k - seqlen_q - left to
            i + seqlen_k - seqlen_q + right; None is unbounded. causal makes right 0.
        softmax_scale: 1 / sqrt(headdim) by default.
        softcap: bounds the scores to (-softcap, softcap); 0 does not.
        alibi_slopes: float32 (nheads,) or (batch, nheads); the score of query i and key j loses
            slope * |i + seqlen_k - seqlen_q - j|. Has no gradient.
        attn_bias: broadcastable to (batch, nheads, seqlen_q, seqlen_k), added to the scores, with a
            gradient; or of bool: a query sees the keys where it is True.
        sinks: (nheads,), a score without a value that takes part in every softmax of its head, and
            in lse.
        return_lse: also return lse; its gradient is supported.
        backend: "triton", "native" or "reference"; None takes the first that can run the call.

    Returns:
        out (batch, seqlen_q, nheads, headdim_v) in the dtype of q, and with return_lse also lse
        (batch, nheads, seqlen_q), float32 (float64 for float64), natural logarithm. A query that
        sees no key gives out 0, lse -inf (its sink, where there is one) and gradient 0.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        BackendUnsupported: the backend that was named cannot run the call.

    Source: Dao, FlashAttention-2 (arXiv 2307.08691), sections 3.1 and 3.2; the words are those of
    the flash-attn package. ALiBi: arXiv 2108.12409. Softcap: Gemma 2 (arXiv 2408.00118). Sinks:
    arXiv 2309.17453, learned as in GPT-OSS (arXiv 2508.10925). Second derivatives come from the
    reference, exact and slow.
    """
    check_tensor(OP, q=q, k=k, v=v)
    check_shapes(q, k, v)
    left, right = check_window(window_size)
    check_softcap(softcap)
    check_alibi(alibi_slopes, q)
    check_sinks(sinks, q)
    options = Options(
        attn_bias=check_bias(attn_bias, q, k),
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        window_left=left,
        window_right=0 if causal else right,
        softmax_scale=1 / math.sqrt(q.shape[3]) if softmax_scale is None else float(softmax_scale),
        softcap=float(softcap),
    )
    out, lse = FORWARD(q, k, v, *options, backend=backend)
    return (out, lse) if return_lse else out


def check_shapes(q, k, v) -> None:
    check_ndim(OP, 4, "(batch, seqlen, nheads, headdim)", q=q, k=k, v=v)
    check_dtype(OP, DTYPES, q=q)
    check_same(OP, "dtype", q=q, k=k, v=v)
    check_same(OP, "device", q=q, k=k, v=v)
    batch, _, heads, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim:
        fail(OP, "k", f"(batch {batch}, seqlen_k, nheads_k, headdim {dim})", tuple(k.shape))
    if v.shape[:3] != k.shape[:3]:
        fail(OP, "v", f"of k's batch, seqlen and heads {tuple(k.shape[:3])}", tuple(v.shape))
    if k.shape[2] == 0 or heads % k.shape[2]:
        fail(OP, "nheads of q", f"a multiple of nheads_k ({k.shape[2]})", heads)
    if dim == 0 or v.shape[3] == 0:
        fail(OP, "headdim", "at least 1", f"{dim} (q, k) and {v.shape[3]} (v)")


def check_window(window_size) -> tuple[int, int]:
    """(left, right) with None made -1."""
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        fail(OP, "window_size", "a pair (left, right)", repr(window_size))
    for side in window_size:
        if side is not None and (not isinstance(side, int) or side < 0):
            fail(OP, "window_size", "(left, right), each None or an int >= 0", repr(window_size))
    left, right = (-1 if side is None else side for side in window_size)
    return left, right


def check_softcap(softcap) -> None:
    if not 0 <= softcap < math.inf:
        fail(OP, "softcap", "0 (none) or positive and finite", softcap)


def check_alibi(alibi_slopes, q) -> None:
    if alibi_slopes is None:
        return
    check_tensor(OP, alibi_slopes=alibi_slopes)
    check_dtype(OP, (torch.float32, torch.float64), alibi_slopes=alibi_slopes)
    check_same(OP, "device", q=q, alibi_slopes=alibi_slopes)
    batch, _, heads, _ = q.shape
    if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        fail(OP, "alibi_slopes", f"(nheads {heads},) or (batch {batch}, nheads {heads})",
             tuple(alibi_slopes.shape))  # fmt: skip
    if alibi_slopes.requires_grad:
        fail(OP, "alibi_slopes", "a constant (it has no gradient)", "requires_grad=True")


def check_sinks(sinks, q) -> None:
    if sinks is None:
        return
    check_tensor(OP, sinks=sinks)
    check_dtype(OP, DTYPES, sinks=sinks)
    check_same(OP, "device", q=q, sinks=sinks)
    if tuple(sinks.shape) != (q.shape[2],):
        fail(OP, "sinks", f"(nheads {q.shape[2]},)", tuple(sinks.shape))


def check_bias(attn_bias, q, k):
    """The bias with four dimensions, the last of them whole (its gradient is made by columns)."""
    if attn_bias is None:
        return None
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
