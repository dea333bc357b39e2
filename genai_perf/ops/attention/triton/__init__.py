"""Attention on GPUs by Triton kernels; see the op's README for what was proven and where.

The kernels are imported by the first call that runs them: a machine without Triton can still ask
`why_not`.
"""

import torch

from ...._backends import triton as toolchain
from ..options import Options, present

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEADDIM = 256


def why_not(q, k, v, *options) -> str | None:
    if (reason := toolchain.why_not(q, k, v)) is not None:
        return reason
    if q.dtype not in DTYPES:
        return f"triton takes float32, bfloat16 and float16, got {q.dtype}"
    o = Options(*options)
    if o.block_mask is not None:
        return "triton takes no block_mask"
    if o.dropout_p:
        return "triton has no dropout"
    largest = max(q.shape[-1], v.shape[-1])
    if largest > MAX_HEADDIM:
        return f"triton takes head dimensions up to {MAX_HEADDIM}, got {largest}"
    return None


def why_not_backward(dout, dlse, q, k, v, out, lse, bias_grad, *options) -> str | None:
    return why_not(q, k, v, *options)


def _problem(q, k, v, options):
    from .problem import Problem

    o = Options(*options)
    left, right = (None if side < 0 else side for side in (o.window_left, o.window_right))
    slopes = None if o.alibi_slopes is None else o.alibi_slopes.to(torch.float32).contiguous()
    return Problem(
        q, k, v, o.softmax_scale, left, right, o.softcap, slopes, o.sinks, o.attn_bias,
        *(None if cu is None else cu.contiguous() for cu in (o.cu_seqlens_q, o.cu_seqlens_k)),
        o.max_seqlen_q, o.max_seqlen_k,
    )  # fmt: skip


def forward(q, k, v, *options):
    from . import launch

    return launch.forward(_problem(q, k, v, options))


def backward(dout, dlse, q, k, v, out, lse, bias_grad, *options):
    from . import launch

    dq, dk, dv, dbias, dsinks = launch.backward(
        _problem(q, k, v, options), dout, dlse, out, lse, need_dbias=bias_grad
    )
    return dq, dk, dv, *present(dbias, dsinks, like=q)
