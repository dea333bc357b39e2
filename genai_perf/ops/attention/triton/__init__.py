"""Attention on GPUs by Triton kernels; see the op's README for what was proven and where.

The kernels are imported by the first call that runs them: a machine without Triton can still ask
`why_not`.
"""

import torch

from ...._backends import triton as toolchain

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEADDIM = 256


def why_not(q, k, v, *rest) -> str | None:
    if (reason := toolchain.why_not(q, k, v)) is not None:
        return reason
    if q.dtype not in DTYPES:
        return f"triton takes float32, bfloat16 and float16, got {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEADDIM:
        return (
            f"triton takes head dimensions up to {MAX_HEADDIM}, got {max(q.shape[-1], v.shape[-1])}"
        )
    return None


def why_not_backward(dout, dlse, q, k, v, *rest) -> str | None:
    return why_not(q, k, v)


def _problem(q, k, v, causal, softmax_scale):
    from .problem import Problem

    return Problem(q, k, v, softmax_scale, window_right=0 if causal else None)


def forward(q, k, v, causal, softmax_scale):
    from . import launch

    return launch.forward(_problem(q, k, v, causal, softmax_scale))


def backward(dout, dlse, q, k, v, out, lse, causal, softmax_scale):
    from . import launch

    return launch.backward(_problem(q, k, v, causal, softmax_scale), dout, dlse, out, lse)[:3]
