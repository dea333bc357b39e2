"""The step on GPUs by Triton kernels; the op's README says what was proven and where."""

from ...._backends import triton as toolchain


def why_not_adamw(p, grad, exp_avg, exp_avg_sq, *rest) -> str | None:
    return toolchain.why_not(p, grad, exp_avg, exp_avg_sq)


def why_not_lion(p, grad, exp_avg, *rest) -> str | None:
    return toolchain.why_not(p, grad, exp_avg)


def adamw(*args) -> None:
    from . import launch

    launch.adamw(*args)


def lion(*args) -> None:
    from . import launch

    launch.lion(*args)
