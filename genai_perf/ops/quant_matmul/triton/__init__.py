"""quant_matmul on GPUs by Triton kernels; see the op's README for what was proven and where.

The kernels are imported by the first call that runs them: a machine without Triton can still ask
`why_not`.
"""

from ...._backends import triton as toolchain
from ..outliers import multiply

# Values of the kernels' constexpr FORMAT: fp4 is nf4 with another table.
FORMATS = {"int8": 0, "fp8": 1, "fp8_240": 1, "fp8_e5m2": 2, "nf4": 3, "fp4": 3, "int4": 4}


def _why_not(format: str, *tensors) -> str | None:
    if format not in FORMATS:
        return f"triton has no kernel for {format} weights"
    return toolchain.why_not(*tensors)


def why_not(x, qdata, scale, zero_point, nested_scale, scale_offset, bias,
            format, group_size, n) -> str | None:  # fmt: skip
    return _why_not(format, x, qdata, scale, zero_point, nested_scale, scale_offset, bias)


def why_not_backward(dy, qdata, scale, zero_point, nested_scale, scale_offset,
                     format, group_size, k) -> str | None:  # fmt: skip
    return _why_not(format, dy, qdata, scale, zero_point, nested_scale, scale_offset)


def forward(x, qdata, scale, zero_point, nested_scale, scale_offset, bias, format, group_size, n):
    from . import launch

    weight = (qdata, scale, zero_point, nested_scale, scale_offset)
    return launch.forward(x, launch.Weight(format, n, x.shape[-1], weight, group_size), bias)


def backward(dy, qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, k):
    from . import launch

    weight = (qdata, scale, zero_point, nested_scale, scale_offset)
    return launch.backward(dy, launch.Weight(format, dy.shape[-1], k, weight, group_size))


def why_not_int8(x, qdata, scale, bias) -> str | None:
    return toolchain.why_not(x, qdata, scale, bias)


def int8(x, qdata, scale, bias):
    from . import rounded

    return rounded.product(x, qdata, scale, bias, "int8", -1)


def why_not_outliers(x, qdata, scale, bias, threshold) -> str | None:
    return toolchain.why_not(x, qdata, scale, bias)


def outliers(x, qdata, scale, bias, threshold):
    return multiply(x, qdata, scale, bias, threshold, int8)


def why_not_fp8(x, qdata, scale, bias, format, group_size) -> str | None:
    return toolchain.why_not(x, qdata, scale, bias)


def fp8(x, qdata, scale, bias, format, group_size):
    from . import rounded

    return rounded.product(x, qdata, scale, bias, format, group_size)
