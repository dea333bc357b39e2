"""Attention on Trainium by NKI kernels; see the op's README for what was proven and where."""

import torch

from ...._backends import nki as toolchain
from ..options import Options, present
from ..packed import bounds

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEADDIM = 256


def why_not(q, k, v, *options) -> str | None:
    if (reason := toolchain.why_not(q, k, v)) is not None:
        return reason
    o = Options(*options)
    if q.dtype not in DTYPES:
        return f"nki takes float32, bfloat16 and float16, got {q.dtype}"
    largest = max(q.shape[-1], v.shape[-1])
    if largest > MAX_HEADDIM:
        return f"nki takes head dimensions up to {MAX_HEADDIM}, got {largest}"
    for name in ("attn_bias", "alibi_slopes", "block_mask"):
        if getattr(o, name) is not None:
            return f"nki takes no {name}"
    if o.dropout_p:
        return "nki takes no dropout"
    if not o.softmax_scale > 0:
        return f"nki takes a positive softmax_scale, got {o.softmax_scale}"
    return None


def why_not_backward(dout, dlse, q, k, v, out, lse, bias_grad, *options) -> str | None:
    return why_not(q, k, v, *options)


def _sinks(o: Options, q) -> torch.Tensor:
    """(1, heads) fp32; a placeholder where there are none, which no kernel reads."""
    if o.sinks is None:
        return q.new_zeros(1, 1, dtype=torch.float32)
    return o.sinks.to(torch.float32).reshape(1, -1)


def _numbers(o: Options, q, k) -> tuple:
    """Window sides that reach past everything are unbounded."""
    reach = q.shape[1] + k.shape[1]
    left, right = (-1 if s >= reach else s for s in (o.window_left, o.window_right))
    return o.sinks is not None, o.softmax_scale, o.softcap, left, right


def _sequences(q, k, o: Options):
    """(rows, keys) of each packed sequence."""
    starts_q = bounds(o.cu_seqlens_q, q.shape[0], o.max_seqlen_q, "q")
    starts_k = bounds(o.cu_seqlens_k, k.shape[0], o.max_seqlen_k, "k")
    for i in range(len(starts_q) - 1):
        yield slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])


def _empty_forward(q, v, o: Options):
    """Without keys a query sees its sink alone."""
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_zeros(batch, seqlen_q, heads, v.shape[3])
    lse = q.new_full((batch, heads, seqlen_q), -torch.inf, dtype=torch.float32)
    if o.sinks is not None:
        lse = o.sinks.float()[:, None].expand(lse.shape).contiguous()
    return out, lse


def forward(q, k, v, *options):
    o = Options(*options)
    if o.cu_seqlens_q is not None:
        return _forward_packed(q, k, v, o)
    if q.numel() == 0 or k.shape[1] == 0:
        return _empty_forward(q, v, o)
    from .fwd_kernel import attention_fwd

    return toolchain.launch(attention_fwd, q, k, v, _sinks(o, q), *_numbers(o, q, k))


def _alone(o: Options) -> Options:
    return o._replace(cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0)


def _forward_packed(q, k, v, o: Options):
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
    for rows, keys in _sequences(q, k, o):
        own, own_lse = forward(q[None, rows], k[None, keys], v[None, keys], *_alone(o))
        out[rows], lse[:, rows] = own[0], own_lse[0]
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, bias_grad, *options):
    o = Options(*options)
    if o.cu_seqlens_q is not None:
        return _backward_packed(dout, dlse, q, k, v, out, lse, o)
    if q.numel() == 0 or k.shape[1] == 0:
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        delta = torch.zeros_like(lse) if dlse is None else -dlse.float()
    else:
        from .bwd_kernel import attention_bwd

        dlse = torch.zeros_like(lse) if dlse is None else dlse.float()
        dq, dk, dv, delta = toolchain.launch(
            attention_bwd, q, k, v, out, dout.to(q.dtype), lse, dlse, *_numbers(o, q, k)[1:]
        )
    dsinks = None
    if o.sinks is not None:  # a key with value 0, so dP = 0
        p_sink = torch.exp(o.sinks.float()[:, None] - lse)
        dsinks = -(p_sink * delta).sum((0, 2)).to(o.sinks.dtype)
    return dq, dk, dv, *present(None, dsinks, like=q)


def _backward_packed(dout, dlse, q, k, v, out, lse, o: Options):
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    dsinks = None if o.sinks is None else torch.zeros_like(o.sinks)
    for rows, keys in _sequences(q, k, o):
        own = backward(
            dout[None, rows], None if dlse is None else dlse[None, :, rows], q[None, rows],
            k[None, keys], v[None, keys], out[None, rows], lse[None, :, rows], False, *_alone(o),
        )  # fmt: skip
        dq[rows], dk[keys], dv[keys] = own[0][0], own[1][0], own[2][0]
        dsinks = None if dsinks is None else dsinks + own[4]
    return dq, dk, dv, *present(None, dsinks, like=q)
