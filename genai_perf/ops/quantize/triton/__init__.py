"""quantize and dequantize on GPUs by Triton kernels; see the op's README for what was proven and
where.

The kernels are imported by the first call that runs them: a machine without Triton can still ask
`why_not_dequantize`.
"""

import math

from ...._backends import triton as toolchain
from ....formats import FORMATS as CODECS
from ....formats import CodeBook, Spec
from ...quant_matmul.triton import FORMATS

# Bits of mantissa, and the exponent of the smallest normal number.
FP8_SHAPES = {"fp8": (3, -6), "fp8_240": (3, -6), "fp8_e5m2": (2, -14)}


def runs(shape: tuple[int, ...], group_size: int) -> tuple[int, int] | None:
    """(k, width): runs of `width` elements of rows of k share a scale; None: they are blocks."""
    if group_size == 0:
        return math.prod(shape), math.prod(shape)
    if group_size == -128:
        return shape[-1], 128
    return (shape[-1], shape[-1]) if group_size == -1 else None


def why_not_quantize(x, format, *spec) -> str | None:
    spec, chosen = Spec(*spec), CODECS[format]
    if isinstance(chosen, CodeBook):
        if x.numel() % spec.group_size:
            return f"triton takes whole blocks of {spec.group_size}, got {x.numel()} elements"
    elif format != "int8" and format not in FP8_SHAPES:
        return f"triton does not quantize to {format}"
    elif spec.allow_nonfinite:
        return "triton quantizes finite tensors"
    elif runs(x.shape, spec.group_size) is None:
        return f"triton does not quantize {format} in groups of {spec.group_size} here"
    return toolchain.why_not(x)


def quantize(x, format, *spec):
    from . import encode

    return encode.quantize(x, format, Spec(*spec))


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
