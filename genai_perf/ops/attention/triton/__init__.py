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
    largest = max(q.shape[-1], v.shape[-1])
    if largest > MAX_HEADDIM:
        return f"triton takes head dimensions up to {MAX_HEADDIM}, got {largest}"
    return None


def why_not_backward(dout, dlse, q, k, v, out, lse, bias_grad, *options) -> str | None:
    return why_not(q, k, v, *options)


def forward(q, k, v, *options):
    from . import launch, problem

    return launch.forward(problem.Problem(q, k, v, Options(*options)))


def backward(dout, dlse, q, k, v, out, lse, bias_grad, *options):
    from . import launch, problem

    call = problem.Problem(q, k, v, Options(*options))
    dq, dk, dv, dbias, dsinks = launch.backward(call, dout, dlse, out, lse, need_dbias=bias_grad)
    return dq, dk, dv, *present(dbias, dsinks, like=q)
