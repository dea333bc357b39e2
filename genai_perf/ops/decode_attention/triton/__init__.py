"""Decode attention on GPUs by Triton kernels; see the op's README for what was proven and where.

The kernels are imported by the first call that runs them: a machine without Triton can still ask
`why_not`.
"""

import torch

from ...._backends import triton as toolchain
from ..options import New, Options

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the configurations hold in registers.
MAX_HEADDIM = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}


def why_not(q, k_cache, v_cache, *options) -> str | None:
    if (reason := toolchain.why_not(q, k_cache, v_cache)) is not None:
        return reason
    if q.dtype not in DTYPES:
        return f"triton takes q of float32, bfloat16 and float16, got {q.dtype}"
    largest, most = max(q.shape[-1], v_cache.shape[-1]), MAX_HEADDIM[q.dtype]
    if largest > most:
        return f"triton takes head dimensions up to {most} of {q.dtype}, got {largest}"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1 and cache.shape[-1] != 1:
            return f"triton needs a {name} whose last dimension is contiguous"
    return None


def why_not_append(q, k_cache, v_cache, *arguments) -> str | None:
    return why_not(q, k_cache, v_cache)


def forward(q, k_cache, v_cache, *options):
    from . import launch

    return launch.forward(q, k_cache, v_cache, Options(*options))


def append(q, k_cache, v_cache, *arguments):
    from . import launch

    new = New(*arguments[: len(New._fields)])
    return launch.append(q, k_cache, v_cache, new, Options(*arguments[len(New._fields) :]))
