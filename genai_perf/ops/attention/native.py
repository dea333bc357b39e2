"""Attention by csrc/cpu/attention_{fwd,bwd}_kernel.cpp."""

import torch

from ..._backends import native
from .options import Options

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(q, k, v, *options) -> str | None:
    if q.dtype not in _DTYPES:
        return f"native takes float32, bfloat16 and float16, got {q.dtype}"
    return native.why_not(q, k, v)


def why_not_backward(dout, dlse, q, k, v, out, lse, *options) -> str | None:
    return why_not(q, k, v, *options)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _tensor4(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Address, then batch, seqlen and head strides."""
    batch, seq, head, _ = x.stride()
    return x.data_ptr(), batch, seq, head


def _window(side: int, q, k) -> int:
    """A side that reaches past everything is unbounded: the kernels add it to positions."""
    return -1 if side >= q.shape[1] + k.shape[1] else side


def _float(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _call(q, k, v, o: Options) -> tuple:
    """The arguments that both entries of csrc/bindings/bind_attention.cpp share."""
    batch, seqlen_q, heads, dim = q.shape
    slopes, sinks = o.alibi_slopes, o.sinks
    sizes = (
        batch, seqlen_q, k.shape[1], heads, k.shape[2], dim, v.shape[3],
        heads * seqlen_q, seqlen_q, _window(o.window_left, q, k), _window(o.window_right, q, k),
        0, 0, native.pointer(slopes), heads if slopes is not None and slopes.dim() == 2 else 0,
        native.pointer(sinks), native.DTYPE_CODES[q.dtype], native.threads(),
    )  # fmt: skip
    return sizes, (), o.softmax_scale, o.softcap, _tensor4(q), _tensor4(k), _tensor4(v)


def _prepared(q, k, v, options) -> tuple:
    o = Options(*options)
    o = o._replace(sinks=_float(o.sinks), alibi_slopes=_float(o.alibi_slopes))
    return _rows(q), _rows(k), _rows(v), o


def forward(q, k, v, *options):
    q, k, v, o = _prepared(q, k, v, options)
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty(batch, seqlen_q, heads, v.shape[3])
    lse = q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)
    native.lib().attention_fwd(*_call(q, k, v, o), _tensor4(out), lse.data_ptr())
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, *options):
    sinks = Options(*options).sinks
    q, k, v, o = _prepared(q, k, v, options)
    out, dout, lse, dlse = _rows(out), _rows(dout.to(q.dtype)), lse.contiguous(), _float(dlse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(o.sinks)
    native.lib().attention_bwd(
        *_call(q, k, v, o), *(_tensor4(x) for x in (out, dout, dq, dk, dv)),
        lse.data_ptr(), native.pointer(dlse), (), 0 if sinks is None else dsinks.data_ptr(),
    )  # fmt: skip
    return dq, dk, dv, dsinks if sinks is None else dsinks.to(sinks.dtype)
