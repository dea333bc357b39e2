"""The public `attention`, its checks, its operators and their autograd."""

import math

import torch

from ..._checks import check_dtype, check_ndim, check_same, check_tensor, fail
from ..._dispatch import Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("native", "reference")


def attention(q, k, v, *, causal=False, softmax_scale=None, return_lse=False, backend=None):
    """Attention with grouped queries, never holding a seqlen_q x seqlen_k matrix (native backend).

        out = softmax(softmax_scale * q k^T + mask) v,   lse = log sum exp of its rows

    Args:
        q: (batch, seqlen_q, nheads, headdim), float32, bfloat16 or float16 (float64: reference).
        k: (batch, seqlen_k, nheads_k, headdim); nheads is a multiple of nheads_k, and query head h
            uses key head h // (nheads / nheads_k).
        v: (batch, seqlen_k, nheads_k, headdim_v).
        causal: query i sees keys j <= i + seqlen_k - seqlen_q (aligned bottom right).
        softmax_scale: 1 / sqrt(headdim) by default.
        return_lse: also return lse; its gradient is supported.
        backend: "native" or "reference"; None takes the first that can run the call.

    Returns:
        out (batch, seqlen_q, nheads, headdim_v) in the dtype of q, and with return_lse also lse
        (batch, nheads, seqlen_q), float32 (float64 for float64), natural logarithm. A query that
        sees no key gives out 0, lse -inf and gradient 0.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        BackendUnsupported: the backend that was named cannot run the call.

    Source: Dao, FlashAttention-2 (arXiv 2307.08691), sections 3.1 and 3.2; arguments in the words of
    the flash-attn package.
    """
    check_tensor("attention", q=q, k=k, v=v)
    check_shapes(q, k, v)
    if softmax_scale is None:
        softmax_scale = 1 / math.sqrt(max(q.shape[-1], 1))
    out, lse = FORWARD(q, k, v, bool(causal), float(softmax_scale), backend=backend)
    return (out, lse) if return_lse else out


def check_shapes(q, k, v) -> None:
    op = "attention"
    check_ndim(op, 4, "(batch, seqlen, nheads, headdim)", q=q, k=k, v=v)
    check_dtype(op, DTYPES, q=q)
    check_same(op, "dtype", q=q, k=k, v=v)
    check_same(op, "device", q=q, k=k, v=v)
    batch, _, heads, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim:
        fail(op, "k", f"(batch {batch}, seqlen_k, nheads_k, headdim {dim})", tuple(k.shape))
    if v.shape[:3] != k.shape[:3]:
        fail(op, "v", f"of k's batch, seqlen and heads {tuple(k.shape[:3])}", tuple(v.shape))
    if k.shape[2] == 0 or heads % k.shape[2]:
        fail(op, "nheads of q", f"a multiple of nheads_k ({k.shape[2]})", heads)
    if dim == 0 or v.shape[3] == 0:
        fail(op, "headdim", "at least 1", f"{dim} (q, k) and {v.shape[3]} (v)")


def _forward_fake(q, k, v, causal, softmax_scale, *, backend=None):
    batch, seqlen_q, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty(batch, seqlen_q, heads, v.shape[3]),
        q.new_empty(batch, heads, seqlen_q, dtype=lse_dtype),
    )


def _backward_fake(dout, dlse, q, k, v, out, lse, causal, softmax_scale, *, backend=None):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


FORWARD = Op(
    __package__,
    "attention_fwd",
    "(Tensor q, Tensor k, Tensor v, bool causal, float softmax_scale, *, str? backend=None)"
    " -> (Tensor, Tensor)",
    fake=_forward_fake,
    backends=BACKENDS,
)
BACKWARD = Op(
    __package__,
    "attention_bwd",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal,"
    " float softmax_scale, *, str? backend=None) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    backends=BACKENDS,
    entry="backward",
)


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    q, k, v, ctx.causal, ctx.softmax_scale = inputs
    ctx.backend = keyword_only_inputs["backend"]
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None, None, None
    if dout is None:
        dout = torch.zeros_like(out)
    grads = BACKWARD(
        dout, dlse, q, k, v, out, lse, ctx.causal, ctx.softmax_scale, backend=ctx.backend
    )
    return *grads, None, None


FORWARD.register_autograd(_backward, setup_context=_setup_context)
