"""Attention by csrc/cpu/attention_{fwd,bwd}_kernel.cpp."""

import math

import torch

from ..._backends import native
from ..._checks import FAR, scale_of_scores
from ..._dispatch import goes_direct
from .dropout import below
from .options import Options, present
from .packed import bounds

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(q, k, v, *options) -> str | None:
    if q.dtype not in _DTYPES:
        return f"native takes float32, bfloat16 and float16, got {q.dtype}"
    bias = Options(*options).attn_bias
    if bias is not None and bias.dtype not in (*_DTYPES, torch.bool):
        return f"native takes an attn_bias of bool, float32, bfloat16 and float16, got {bias.dtype}"
    return native.why_not(q, k, v)


def why_not_backward(dout, dlse, q, k, v, out, lse, bias_grad, *options) -> str | None:
    return why_not(q, k, v, *options)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _tensor4(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Address, then batch, seqlen and head strides; no batch where sequences are packed."""
    *batch, seq, head, _ = x.stride()
    return x.data_ptr(), *(batch or (0,)), seq, head


def _window(side: int, q, k) -> int:
    """A side that reaches past everything is unbounded: the kernels add it to positions."""
    return -1 if side >= q.shape[-3] + k.shape[-3] else side


def _float(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _strides(bias: torch.Tensor) -> tuple[int, ...]:
    """Of the batch, head, row and column; 0 where it is broadcast."""
    return tuple(
        0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)
    )


def _bias(bias: torch.Tensor | None) -> tuple[int, ...]:
    """Kind (1: added, 2: hides where False), dtype, address and strides."""
    if bias is None:
        return ()
    mask = bias.dtype == torch.bool
    return 1 + mask, 0 if mask else native.DTYPE_CODES[bias.dtype], bias.data_ptr(), *_strides(bias)


def _blocks(o: Options) -> tuple[int, ...]:
    """Address, strides, queries and keys of a block."""
    if o.block_mask is None:
        return ()
    return o.block_mask.data_ptr(), *_strides(o.block_mask), o.block_q, o.block_k


def _dropout(o: Options) -> tuple[int, ...]:
    """The words that drop, seed and offset."""
    return (below(o.dropout_p), *o.rng_state.tolist()) if o.dropout_p else ()


def _call(q, k, v, o: Options) -> tuple:
    """The arguments that both entries of csrc/bindings/bind_attention.cpp share."""
    seqlen_q, heads, dim = q.shape[-3:]
    packed, slopes = o.cu_seqlens_q is not None, o.alibi_slopes
    sizes = (
        len(o.cu_seqlens_q) - 1 if packed else q.shape[0],
        seqlen_q, k.shape[-3], heads, k.shape[-2], dim, v.shape[-1],
        0 if packed else heads * seqlen_q, seqlen_q,
        _window(o.window_left, q, k), _window(o.window_right, q, k),
        native.pointer(o.cu_seqlens_q), native.pointer(o.cu_seqlens_k),
        native.pointer(slopes), heads if slopes is not None and slopes.dim() == 2 else 0,
        native.pointer(o.sinks), native.DTYPE_CODES[q.dtype], native.threads(),
    )  # fmt: skip
    tensors = (_tensor4(x) for x in (q, k, v))
    factors = (o.softmax_scale, o.softcap, 1 / (1 - o.dropout_p))
    return sizes, _bias(o.attn_bias), _blocks(o), _dropout(o), factors, *tensors


def _prepared(q, k, v, options) -> tuple:
    """The inputs as the kernels read them, and whether packed sequences fill q, and k and v."""
    o = Options(*options)
    if o.sinks is not None or o.alibi_slopes is not None:
        o = o._replace(sinks=_float(o.sinks), alibi_slopes=_float(o.alibi_slopes))
    q_full = k_full = True
    if o.cu_seqlens_q is not None:
        cu_q, cu_k = o.cu_seqlens_q.contiguous(), o.cu_seqlens_k.contiguous()
        o = o._replace(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        q_full = bounds(cu_q, q.shape[0], o.max_seqlen_q, "q")[-1] == q.shape[0]
        k_full = bounds(cu_k, k.shape[0], o.max_seqlen_k, "k")[-1] == k.shape[0]
    return _rows(q), _rows(k), _rows(v), o, q_full, k_full


def _room(like: torch.Tensor, shape: tuple[int, ...], full: bool) -> torch.Tensor:
    """For an output; zeros where rows past the last sequence stay untouched."""
    return like.new_empty(shape) if full else like.new_zeros(shape)


def forward(q, k, v, *options):
    q, k, v, o, q_full, _ = _prepared(q, k, v, options)
    *batch, seqlen_q, heads, _ = q.shape
    out = _room(q, (*batch, seqlen_q, heads, v.shape[-1]), q_full)
    lse = q.new_empty(*batch, heads, seqlen_q, dtype=torch.float32)
    if not q_full:
        lse.fill_(-torch.inf)
    native.lib().attention_fwd(*_call(q, k, v, o), _tensor4(out), lse.data_ptr())
    return out, lse


def direct(q, k, v, window, softmax_scale, softcap):
    """`forward` without the op around it, for a call with no tensor beside q, k and v.

    None unless everything fits and no gradient is wanted: the long way says why, or records.
    """
    fits = (
        goes_direct(q, k, v) and q.dim() == k.dim() == v.dim() == 4 and max(window) < FAR
        and type(softcap) in (float, int) and 0 <= softcap < math.inf
    )  # fmt: skip
    if not fits:
        return None
    (batch, seqlen_q, heads, dim), dim_v = q.shape, v.shape[3]
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype or dim == 0:
        return None
    out = q.new_empty((batch, seqlen_q, heads, dim_v))
    lse = q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)
    done = native.lib().attention_plain(
        (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr()),
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(),
        (*window, native.DTYPE_CODES[q.dtype], native.threads()),
        scale_of_scores("attention", softmax_scale, dim), softcap,
    )  # fmt: skip
    return (out, lse) if done else None


def backward(dout, dlse, q, k, v, out, lse, bias_grad, *options):
    plain = Options(*options)
    q, k, v, o, q_full, k_full = _prepared(q, k, v, options)
    out, dout, lse, dlse = _rows(out), _rows(dout.to(q.dtype)), lse.contiguous(), _float(dlse)
    dq, dk, dv = (_room(x, x.shape, f) for x, f in ((q, q_full), (k, k_full), (v, k_full)))
    dbias = dsinks = None
    if bias_grad:
        dbias = q.new_zeros(o.attn_bias.shape, dtype=torch.float32)
    if o.sinks is not None:
        dsinks = torch.empty_like(o.sinks)
    native.lib().attention_bwd(
        *_call(q, k, v, o), *(_tensor4(x) for x in (out, dout, dq, dk, dv)),
        lse.data_ptr(), native.pointer(dlse),
        (dbias.data_ptr(), *_strides(dbias)) if bias_grad else (), native.pointer(dsinks),
    )  # fmt: skip
    dbias = None if dbias is None else dbias.to(plain.attn_bias.dtype)
    dsinks = None if dsinks is None else dsinks.to(plain.sinks.dtype)
    return dq, dk, dv, *present(dbias, dsinks, like=q)
