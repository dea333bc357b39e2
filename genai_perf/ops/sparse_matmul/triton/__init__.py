"""Sparse products on GPUs by Triton kernels; see the op's README for what was proven and where.

The kernels are imported by the first call that runs them: a machine without Triton can still ask
`why_not`.
"""

from ...._backends import triton as toolchain


def why_not(x, values, index, row_start, scale, bias, group_size, n) -> str | None:
    return toolchain.why_not(x, values, index, row_start, scale, bias)


def why_not_backward(dy, values, index, row_start, scale, group_size, k) -> str | None:
    return toolchain.why_not(dy, values, index, row_start, scale)


def forward(*arguments):
    from . import launch

    return launch.forward(*arguments)


def backward(*arguments):
    from . import launch

    return launch.backward(*arguments)
