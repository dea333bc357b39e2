"""CUDA C++ kernels: dequantize. Compiled for sm_80, sm_90 and sm_100; see README.md."""

import math
from ctypes import c_int, c_int64, c_void_p

import torch

from ..._backends import cuda
from ..._backends.native import DTYPE_CODES, pointer
from ...formats.base import from_parts
from ...formats.dynamic_map import map_on
from ..quant_matmul.components import FORMAT_CODES, scale_places

FORMATS = ("int8", "fp8", "fp8_240", "fp8_e5m2", "nf4", "fp4", "int4")
# As gp_cuda_dequantize takes them: the weight, then what becomes of it, and where it runs.
DEQUANTIZE = (c_int, c_int64, c_int64, c_void_p, c_void_p, c_int, *[c_void_p] * 4, *[c_int64] * 3,
              c_void_p, c_int, c_int, c_void_p)  # fmt: skip


def why_not_dequantize(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size,
                       shape, dtype) -> str | None:  # fmt: skip
    if format not in FORMATS:
        return f"cuda does not dequantize {format}"
    if format.startswith("fp8") and group_size > 0 and len(shape) > 2 and shape[-2] % group_size:
        return (
            f"cuda dequantizes blocks of {format} in matrices, or in stacks of whole blocks, "
            f"got shape {tuple(shape)}"
        )
    return cuda.why_not(qdata, scale, zero_point, nested_scale, scale_offset)


def dequantize(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, shape,
               dtype) -> torch.Tensor:  # fmt: skip
    out = torch.empty(shape, dtype=dtype, device=qdata.device)
    tensors = (qdata, scale, zero_point, nested_scale, scale_offset)
    tensors = [None if t is None else t.contiguous() for t in tensors]
    # The kernels trust the sizes that they are given.
    from_parts(*tensors, format, group_size, out.shape, dtype).check()
    if out.numel() == 0:
        return out
    qdata, scale, zero, nested, offset = tensors
    codes = None if nested is None else map_on(qdata.device)
    n, k = math.prod(out.shape[:-1]), out.shape[-1]
    rows, stride, group = scale_places(format, n, k, group_size)
    cuda.check(cuda.kernel("gp_cuda_dequantize", *DEQUANTIZE)(
        FORMAT_CODES[format], n, k, pointer(qdata), pointer(scale),
        0 if nested is not None else DTYPE_CODES[scale.dtype], pointer(zero), pointer(nested),
        pointer(offset), pointer(codes), group, rows, stride, pointer(out), DTYPE_CODES[dtype],
        *cuda.place(qdata),
    ))  # fmt: skip
    return out
