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


def _call(q, k, v, o: Options) -> tuple:
    """The arguments that both entries of csrc/bindings/bind_attention.cpp share."""
    batch, seqlen_q, heads, dim = q.shape
    sizes = (
        batch, seqlen_q, k.shape[1], heads, k.shape[2], dim, v.shape[3],
        heads * seqlen_q, seqlen_q, _window(o.window_left, q, k), _window(o.window_right, q, k),
        0, 0, 0, 0, 0, native.DTYPE_CODES[q.dtype], native.threads(),
    )  # fmt: skip
    return sizes, (), o.softmax_scale, 0.0, _tensor4(q), _tensor4(k), _tensor4(v)


def forward(q, k, v, *options):
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty(batch, seqlen_q, heads, v.shape[3])
    lse = q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)
    native.lib().attention_fwd(*_call(q, k, v, Options(*options)), _tensor4(out), lse.data_ptr())
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, *options):
    q, k, v, out, dout = _rows(q), _rows(k), _rows(v), _rows(out), _rows(dout.to(q.dtype))
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    native.lib().attention_bwd(
        *_call(q, k, v, Options(*options)), *(_tensor4(x) for x in (out, dout, dq, dk, dv)),
        lse.data_ptr(), native.pointer(dlse), (), 0,
    )  # fmt: skip
    return dq, dk, dv
