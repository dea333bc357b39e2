"""torch.nn.functional.scaled_dot_product_attention by `genai_perf.attention`: two ways.

    with genai_perf.route_sdpa():            # this thread, here, on every device
        model(x)

    torch.nn.attention.activate_flash_attention_impl("genai_perf")     # the process, CPU tensors

The first sends every call here, and raises where one cannot be honoured. The second is torch's own
registration (torch 2.11 and later; importing this module registers, only the line above activates).
It replaces the kernels behind torch's choice "flash attention" on the CPU, so torch still chooses:
calls with dropout, with a mask that requires a gradient, or with a headdim of value that is not
that of key go to its math path. torch warns once that a kernel of its own is replaced.
`torch.nn.attention.restore_flash_attention_impl()` takes it back. On CUDA it changes nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import library as torch_library
from torch.overrides import TorchFunctionMode

from .._checks import check_ndim, check_tensor, fail
from ..nn.multihead import multi_head_attention_forward
from ..ops.attention import attention
from ..ops.attention.op import BACKWARD, FORWARD
from ..ops.attention.options import PLAIN, Options

OP = "scaled_dot_product_attention"


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
                                 scale=None, enable_gqa=False):  # fmt: skip
    """`torch.nn.functional.scaled_dot_product_attention` by `genai_perf.attention`.

    Args:
        query: (..., nheads, seqlen_q, headdim), at least three dimensions.
        key, value: (..., nheads_k, seqlen_k, headdim[_v]); nheads_k is nheads, or with enable_gqa a
            divisor of it.
        attn_mask: bool, True where a query sees a key, or float, added to the scores; broadcastable
            to (..., nheads, seqlen_q, seqlen_k).
        dropout_p: see `attention`.
        is_causal: query i sees keys j <= i (aligned top left, as torch has it).
        scale: 1 / sqrt(headdim) by default.
        enable_gqa: allow fewer heads of key and value.

    Returns:
        (..., nheads, seqlen_q, headdim_v). A query that sees no key gives 0.

    Raises:
        ValueError: an argument that is wrong, or that `attention` cannot honour.
    """
    check_tensor(OP, query=query, key=key, value=value)
    if is_causal and attn_mask is not None:
        fail(OP, "attn_mask", "None with is_causal", "a mask")
    if query.dim() < 3 or key.dim() < 3 or value.dim() < 3:
        fail(OP, "query, key and value", "of at least 3 dimensions", query.dim())
    if not enable_gqa and key.shape[-3] != query.shape[-3]:
        fail(OP, "nheads of key", f"{query.shape[-3]}, or enable_gqa=True", key.shape[-3])
    q, k, v, leading = _four(query, key, value)
    check_ndim(OP, 4, "(batch, nheads, seqlen, headdim)", query=q, key=k, value=v)
    window, keys = _top_left(is_causal, q.shape[2], k.shape[2])
    out = attention(
        q.transpose(1, 2),
        k[:, :, :keys].transpose(1, 2),
        v[:, :, :keys].transpose(1, 2),
        window_size=window,
        softmax_scale=scale,
        dropout_p=dropout_p,
        attn_bias=_four_mask(attn_mask, leading, q.shape[0]),
    ).transpose(1, 2)
    return out.reshape(*leading, *out.shape[1:])


def _four(*tensors):
    """(batch, nheads, seqlen, headdim) of each, and the dimensions before nheads."""
    leading = torch.broadcast_shapes(*(x.shape[:-3] for x in tensors))
    if all(x.dim() == 4 and x.shape[:1] == leading for x in tensors):
        return *tensors, leading
    return *(x.expand(*leading, *x.shape[-3:]).reshape(-1, *x.shape[-3:]) for x in tensors), leading


def _four_mask(mask, leading, batch: int):
    """The mask with the leading dimensions in one."""
    if mask is None or len(leading) == 1 or mask.dim() < 4:
        return mask
    return mask.expand(*leading, *mask.shape[-3:]).reshape(batch, *mask.shape[-3:])


def _top_left(causal: bool, seqlen_q: int, seqlen_k: int):
    """torch's causal mask, as a window aligned bottom right over the first keys."""
    if not causal:
        return (None, None), seqlen_k
    keys = min(seqlen_q, seqlen_k)
    return (None, seqlen_q - keys), keys


class _Route(TorchFunctionMode):
    """Replaces what reaches attention from Python: from inside torch.nn.functional nothing does
    while a mode is at work, so the function of torch.nn.MultiheadAttention is replaced whole."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            func = scaled_dot_product_attention
        elif func is F.multi_head_attention_forward:
            func = multi_head_attention_forward
        return func(*args, **(kwargs or {}))


def route_sdpa() -> TorchFunctionMode:
    """A context in which torch.nn.functional.scaled_dot_product_attention, and with it
    torch.nn.MultiheadAttention without weights, runs `genai_perf.attention`, in this thread.

    What it cannot honour raises ValueError."""
    return _Route()


def register() -> None:
    """Make "genai_perf" known to torch's activate_flash_attention_impl, where torch has it."""
    offer = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if offer is not None:
        offer("genai_perf", register_fn=_activate)


class _Handle:
    def __init__(self, registered: torch_library.Library):
        self.registered = registered

    def remove(self) -> None:
        self.registered._destroy()


def _activate() -> _Handle:
    library = torch_library.Library("aten", "IMPL", "CPU")
    name = "_scaled_dot_product_flash_attention_for_cpu"
    library.impl(name, _cpu_forward, "CPU", allow_override=True)
    library.impl(f"{name}_backward", _cpu_backward, "CPU", allow_override=True)
    return _Handle(library)


def _options(query, key, is_causal: bool, attn_mask, scale) -> tuple[Options, int]:
    window, keys = _top_left(is_causal, query.shape[2], key.shape[2])
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        attn_mask = attn_mask.expand(-1, -1, -1, key.shape[2])[..., :keys]
    return PLAIN._replace(
        attn_bias=attn_mask,
        window_right=-1 if window[1] is None else window[1],
        softmax_scale=1 / math.sqrt(query.shape[3]) if scale is None else scale,
    ), keys


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p:
        fail(OP, "dropout_p", "0.0 (torch's operator brings no random state)", dropout_p)


def _rows(x: torch.Tensor, keys: int | None = None) -> torch.Tensor:
    return x.transpose(1, 2) if keys is None else x[:, :, :keys].transpose(1, 2)


def _cpu_forward(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    _refuse_dropout(dropout_p)
    options, keys = _options(query, key, is_causal, attn_mask, scale)
    with torch.no_grad():  # the derivative is that of torch's operator, below
        out, lse = FORWARD(_rows(query), _rows(key, keys), _rows(value, keys), *options)
    return out.transpose(1, 2), lse


def _cpu_backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *,
                  attn_mask=None, scale=None):  # fmt: skip
    _refuse_dropout(dropout_p)
    options, keys = _options(query, key, is_causal, attn_mask, scale)
    rows = (_rows(query), _rows(key, keys), _rows(value, keys))
    with torch.no_grad():
        dq, dk, dv, *_ = BACKWARD(_rows(grad_out), None, *rows, _rows(out), logsumexp, False,
                                  *options)  # fmt: skip
    unseen = key.shape[2] - keys
    dk, dv = (F.pad(g, (0, 0, 0, 0, 0, unseen)) for g in (dk, dv))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


register()
