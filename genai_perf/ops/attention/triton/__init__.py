"""Attention on GPUs by Triton kernels; see the op's README for what was proven and where.

The kernels are imported by the first call that runs them: a machine without Triton can still ask
`why_not`.
"""

import torch

from ...._backends import triton as toolchain
from ..options import Options

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEADDIM = 256


# What the kernels take of `Options`, under the names that it uses.
_WINDOW = ("window_left", "window_right")
_TAKEN = {*_WINDOW, "softmax_scale", "softcap", "alibi_slopes", "sinks"}


def why_not(q, k, v, *options) -> str | None:
    if (reason := toolchain.why_not(q, k, v)) is not None:
        return reason
    if q.dtype not in DTYPES:
        return f"triton takes float32, bfloat16 and float16, got {q.dtype}"
    largest = max(q.shape[-1], v.shape[-1])
    if largest > MAX_HEADDIM:
        return f"triton takes head dimensions up to {MAX_HEADDIM}, got {largest}"
    for name, value in zip(Options._fields, options, strict=True):
        if name not in _TAKEN and value not in (None, 0, -1):
            return f"triton does not take {name} yet"
    return None


def why_not_backward(dout, dlse, q, k, v, out, lse, *options) -> str | None:
    return why_not(q, k, v, *options)


def _problem(q, k, v, options):
    from .problem import Problem

    given = dict(zip(Options._fields, options, strict=True))
    left, right = (None if given[side] < 0 else given[side] for side in _WINDOW)
    slopes = given.get("alibi_slopes")
    return Problem(
        q, k, v, given["softmax_scale"], left, right, given.get("softcap", 0.0),
        None if slopes is None else slopes.to(torch.float32).contiguous(), given.get("sinks"),
    )  # fmt: skip


def forward(q, k, v, *options):
    from . import launch

    return launch.forward(_problem(q, k, v, options))


def backward(dout, dlse, q, k, v, out, lse, *options):
    from . import launch

    dq, dk, dv, _, dsinks = launch.backward(_problem(q, k, v, options), dout, dlse, out, lse)
    if "sinks" not in Options._fields:
        return dq, dk, dv
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks
