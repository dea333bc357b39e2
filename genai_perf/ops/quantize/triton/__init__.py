"""dequantize on GPUs by a Triton kernel; see the op's README for what was proven and where.

The kernel is imported by the first call that runs it: a machine without Triton can still ask
`why_not_dequantize`.
"""

from ...._backends import triton as toolchain
from ...quant_matmul.triton import FORMATS


def why_not_dequantize(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size,
                       shape, dtype) -> str | None:  # fmt: skip
    if format not in FORMATS:
        return f"triton does not dequantize {format}"
    if format.startswith("fp8") and group_size > 0 and len(shape) > 2:
        return f"triton dequantizes blocks of {format} in matrices, got shape {tuple(shape)}"
    return toolchain.why_not(qdata, scale, zero_point, nested_scale, scale_offset)


def dequantize(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, shape,
               dtype):  # fmt: skip
    from . import launch

    weight = (qdata, scale, zero_point, nested_scale, scale_offset)
    return launch.dequantize(weight, format, group_size, shape, dtype)
