"""CUDA C++ kernels: nf4 dequantize. Compiled for sm_80, sm_90 and sm_100; see README.md."""

from ctypes import c_int, c_int64, c_void_p

import torch

from ..._backends import cuda
from ..._backends.native import DTYPE_CODES, pointer
from ...formats.base import from_parts
from ...formats.dynamic_map import map_on


def why_not_dequantize(qdata, scale, zero_point, nested_scale, scale_offset, format, *rest):
    if format != "nf4":
        return f"cuda dequantizes nf4 only, got {format}"
    return cuda.why_not(qdata, scale, nested_scale, scale_offset)


def dequantize(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, shape,
               dtype) -> torch.Tensor:  # fmt: skip
    out = torch.empty(shape, dtype=dtype, device=qdata.device)
    tensors = (qdata, scale, zero_point, nested_scale, scale_offset)
    tensors = [None if t is None else t.contiguous() for t in tensors]
    # The kernels trust the sizes that they are given.
    from_parts(*tensors, format, group_size, out.shape, dtype).check()
    qdata, scale, _, nested, offset = tensors
    codes = None if nested is None else map_on(qdata.device)
    run = cuda.kernel("gp_cuda_nf4_dequantize", *[c_void_p] * 5, c_int64, c_int64, c_void_p, c_int,
                      c_int, c_void_p)  # fmt: skip
    cuda.check(run(pointer(qdata), pointer(scale), pointer(nested), pointer(offset), pointer(codes),
                   out.numel(), group_size, pointer(out), DTYPE_CODES[dtype],
                   *cuda.place(qdata)))  # fmt: skip
    return out
