"""Whether the components of a quantized weight are those of its format and shape."""

import torch

from ..._checks import fail
from ...formats import FORMATS, CodeBook, IntGroups

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BYTES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
# As csrc/cpu/quant_matmul.h and csrc/cuda/quant_formats.cuh number them.
FORMAT_CODES = {"int8": 0, "fp8": 1, "fp8_240": 1, "fp8_e5m2": 2, "nf4": 3, "int4": 4, "fp4": 5,
                "int3": 6, "int2": 7, "fp8_e3m4": 8}  # fmt: skip


def check_components(format, n, k, weight, group_size) -> None:
    """Kernels trust their pointers: components that do not fit the weight stop here.

    Raises:
        ValueError: a component of another size or dtype, or a group_size that the format lacks.
    """
    qdata, scale, zero, nested, shift = weight
    flat = isinstance(FORMATS.get(format), CodeBook)
    if flat:
        codes, scales = -(-n * k // 2), -(-n * k // group_size) if group_size > 0 else -1
    elif isinstance(FORMATS.get(format), IntGroups):
        codes = n * -(-k * FORMATS[format].bits // 8)
        scales = n if group_size == -1 else n * -(-k // group_size) if group_size > 0 else -1
    else:
        blocks = -(-n // 128) * -(-k // 128)
        codes = n * k
        scales = {0: 1, -1: n, 128: blocks, -128: n * -(-k // 128)}.get(group_size, -1)
    if scales < 0 or (group_size > 0 and group_size % (32 if flat else 8)):
        fail("quant_matmul", "group_size", f"one of those of {format}", group_size)
    scale_dtypes = FLOATS if nested is None else BYTES
    want = [("qdata", qdata, codes, BYTES), ("scale", scale, scales, scale_dtypes)]
    if zero is not None:
        want.append(("zero_point", zero, scales, BYTES))
    if nested is not None:
        want.append(("nested_scale", nested, -(-scales // 256), FLOATS[:1]))
        want.append(("scale_offset", shift, 1, FLOATS[:1]))
    for name, tensor, count, dtypes in want:
        if tensor is None or tensor.numel() != count or tensor.dtype not in dtypes:
            got = None if tensor is None else f"{tensor.numel()} of {tensor.dtype}"
            names = " or ".join(map(str, dtypes))
            expected = f"{count} elements of {names} for {format} of shape {(n, k)}"
            fail("quant_matmul", f"qweight.{name}", expected, got)


def scale_places(format: str, n: int, k: int, group_size: int) -> tuple[int, int, int]:
    """(rows, stride, group), each at least 1: the scale of row i and column j is number
    i // rows * stride + j // group; with a code book it is (i * k + j) // group."""
    if isinstance(FORMATS[format], CodeBook):
        return 1, 1, group_size
    if isinstance(FORMATS[format], IntGroups):
        group = max(k, 1) if group_size == -1 else group_size
        return 1, max(-(-k // group), 1), group
    if abs(group_size) == 128:
        return 128 if group_size > 0 else 1, max(-(-k // 128), 1), 128
    return max(n, 1) if group_size == 0 else 1, 1, max(k, 1)
