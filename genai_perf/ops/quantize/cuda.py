"""CUDA C++ kernels, compiled for sm_80, sm_90 and sm_100; see README.md."""

import math
from ctypes import c_float, c_int, c_int64, c_void_p

import torch

from ..._backends import cuda
from ..._backends.native import DTYPE_CODES, pointer
from ...formats import FORMATS as CODECS
from ...formats import CodeBook, Spec
from ...formats.base import check_finite, from_parts
from ...formats.code_book import nest
from ...formats.dynamic_map import map_on
from ..quant_matmul.components import FORMAT_CODES, scale_places

FORMATS = ("int8", "fp8", "fp8_240", "fp8_e5m2", "nf4", "fp4", "int4")
# As gp_cuda_dequantize takes them: the weight, then what becomes of it, and where it runs.
DEQUANTIZE = (c_int, c_int64, c_int64, c_void_p, c_void_p, c_int, *[c_void_p] * 4, *[c_int64] * 3,
              c_void_p, c_int, c_int, c_void_p)  # fmt: skip
# As gp_cuda_quantize takes them.
QUANTIZE = (c_int, c_void_p, c_int, c_int64, c_int64, c_int64, c_float, c_void_p, c_void_p,
            c_void_p, c_int, c_void_p)  # fmt: skip
PART = 4096  # elements that one block of threads takes of a tensor with one scale


def why_not_quantize(x, format, *spec) -> str | None:
    if format not in FORMATS or format == "int4":
        return f"cuda does not quantize to {format}"
    if format.startswith("fp8") and Spec(*spec).group_size > 0:
        return f"cuda does not quantize {format} in blocks of 128x128"
    return cuda.why_not(x)


def quantize(x: torch.Tensor, format: str, *spec) -> list[torch.Tensor]:
    spec, chosen, x = Spec(*spec), CODECS[format], x.contiguous()
    if not spec.allow_nonfinite:
        check_finite(x)
    if x.numel() == 0:
        return list(chosen.encode(x.float(), spec).values())
    layout = chosen.layout(x.shape, spec._replace(double_quant=False))
    out = {name: x.new_empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
    if isinstance(chosen, CodeBook):
        _encode(x, format, (1, x.numel(), spec.group_size), **out)
        if spec.double_quant:
            out |= nest(out["scale"])
    elif spec.group_size == 0:
        parts = (1, x.numel(), PART)
        largest = x.new_empty(-(-x.numel() // PART), dtype=torch.float32)
        _encode(x, format, parts, None, largest)
        _encode(x, format, parts, **out, given=largest.amax())
    else:
        k = x.shape[-1]
        _encode(x, format, (x.numel() // k, k, k if spec.group_size == -1 else 128), **out)
    return list(out.values())


def _encode(x, format, segments, qdata, scale, given=None) -> None:
    limit = CODECS[format].max if format.startswith("fp8") else 0.0
    cuda.check(cuda.kernel("gp_cuda_quantize", *QUANTIZE)(
        FORMAT_CODES[format], pointer(x), DTYPE_CODES[x.dtype], *segments, limit, pointer(given),
        pointer(qdata), pointer(scale), *cuda.place(x),
    ))  # fmt: skip


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
