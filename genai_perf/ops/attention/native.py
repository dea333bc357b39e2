"""Attention by csrc/cpu/attention_{fwd,bwd}_kernel.cpp."""

import torch

from ..._backends import native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(q, k, v, *rest) -> str | None:
    if q.dtype not in _DTYPES:
        return f"native takes float32, bfloat16 and float16, got {q.dtype}"
    return native.why_not(q, k, v)


def why_not_backward(dout, dlse, q, k, v, *rest) -> str | None:
    return why_not(q, k, v)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its last dimension is not contiguous."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _tensor4(x: torch.Tensor) -> tuple[int, int, int, int]:
    batch, seq, head, _ = x.stride()
    return x.data_ptr(), batch, seq, head


def _sizes(q, k, v, causal):
    batch, seqlen_q, heads, dim = q.shape
    right = 0 if causal else -1
    return (batch, seqlen_q, k.shape[1], heads, k.shape[2], dim, v.shape[3], -1, right,
            native.DTYPE_CODES[q.dtype], native.threads())  # fmt: skip


def forward(q, k, v, causal, softmax_scale):
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty(batch, seqlen_q, heads, v.shape[3])
    lse = q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)
    native.lib().attention_fwd(
        _sizes(q, k, v, causal), softmax_scale, _tensor4(q), _tensor4(k), _tensor4(v),
        _tensor4(out), lse.data_ptr(),
    )  # fmt: skip
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, causal, softmax_scale):
    q, k, v, out, dout = _rows(q), _rows(k), _rows(v), _rows(out), _rows(dout.to(q.dtype))
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    native.lib().attention_bwd(
        _sizes(q, k, v, causal), softmax_scale,
        *(_tensor4(x) for x in (q, k, v, out, dout, dq, dk, dv)),
        lse.data_ptr(), native.pointer(dlse),
    )  # fmt: skip
    return dq, dk, dv
