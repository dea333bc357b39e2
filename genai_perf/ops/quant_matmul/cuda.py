"""CUDA C++ kernels for 1 to 8 rows of x (csrc/cuda/quant_matmul.cuh); see README.md."""

import math
from ctypes import c_int, c_int64, c_void_p

from ..._backends import cuda
from ..._backends.native import DTYPE_CODES, pointer
from ...formats.dynamic_map import map_on
from .components import FORMAT_CODES, check_components, scale_places

FORMATS = ("int8", "fp8", "fp8_240", "fp8_e5m2", "nf4", "fp4", "int4")
MAX_ROWS = 8
# As gp_cuda_quant_matmul takes them: the weight, then x, bias, y, and where it runs.
ARGTYPES = (c_int, c_int64, c_int64, c_void_p, c_void_p, c_int, *[c_void_p] * 4, *[c_int64] * 3,
            c_void_p, c_int, c_int, c_void_p, c_int, c_void_p, c_int, c_void_p)  # fmt: skip


def why_not(x, qdata, scale, zero_point, nested_scale, scale_offset, bias,
            format, group_size, n) -> str | None:  # fmt: skip
    if format not in FORMATS:
        return f"cuda has no kernel for {format} weights"
    if (rows := math.prod(x.shape[:-1])) > MAX_ROWS:
        return f"cuda takes up to {MAX_ROWS} rows of x, got {rows}"
    tensors = (x, qdata, scale, zero_point, nested_scale, scale_offset, bias)
    if (reason := cuda.why_not(*tensors)) is not None:
        return reason
    for name, tensor in (("x", x), ("qweight.qdata", qdata)):
        if tensor.is_contiguous() and tensor.data_ptr() % 16:
            return (
                f"cuda reads 16 bytes at a time, and {name} begins at no multiple of 16: clone it"
            )
    return None


def forward(x, qdata, scale, zero_point, nested_scale, scale_offset, bias, format, group_size, n):
    k = x.shape[-1]
    weight = (qdata, scale, zero_point, nested_scale, scale_offset)
    check_components(format, n, k, weight, group_size)
    y = x.new_empty(*x.shape[:-1], n)
    if y.numel() == 0:
        return y
    if k == 0:  # an empty sum
        return y.zero_() if bias is None else y.copy_(bias)
    held = [None if t is None else t.contiguous() for t in (*weight, x, bias)]
    qdata, scale, zero, nested, offset, x, bias = held
    codes = None if nested is None else map_on(qdata.device)
    rows, stride, group = scale_places(format, n, k, group_size)
    cuda.check(cuda.kernel("gp_cuda_quant_matmul", *ARGTYPES)(
        FORMAT_CODES[format], n, k, pointer(qdata), pointer(scale),
        0 if nested is not None else DTYPE_CODES[scale.dtype], pointer(zero), pointer(nested),
        pointer(offset), pointer(codes), group, rows, stride,
        pointer(x), y.numel() // n, DTYPE_CODES[x.dtype],
        pointer(bias), 0 if bias is None else DTYPE_CODES[bias.dtype], pointer(y), *cuda.place(x),
    ))  # fmt: skip
    return y
