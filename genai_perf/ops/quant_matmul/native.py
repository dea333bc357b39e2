"""CPU kernels in C++ (csrc/cpu/quant_matmul*): few rows fused, many rows by decoded tiles."""

import torch

from ..._backends import native
from ..._checks import fail
from ...formats.dynamic_map import dynamic_map

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BYTES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
# csrc/cpu/quant_matmul.h holds the same numbers.
FORMAT_CODES = {"int8": 0, "fp8": 1, "fp8_e5m2": 2, "nf4": 3, "int4": 4}


def why_not(x, qdata, scale, zero_point, nested_scale, scale_offset, bias,
            format, group_size, n) -> str | None:  # fmt: skip
    return native.why_not(x, qdata, scale, zero_point, nested_scale, scale_offset, bias)


def why_not_backward(dy, qdata, scale, zero_point, nested_scale, scale_offset,
                     format, group_size, k) -> str | None:  # fmt: skip
    return native.why_not(dy, qdata, scale, zero_point, nested_scale, scale_offset)


def forward(x, qdata, scale, zero_point, nested_scale, scale_offset, bias, format, group_size, n):
    y = x.new_empty((*x.shape[:-1], n))
    weight = (qdata, scale, zero_point, nested_scale, scale_offset)
    _run(False, format, n, x.shape[-1], weight, group_size, x, y, bias)
    return y


def backward(dy, qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, k):
    dx = dy.new_empty((*dy.shape[:-1], k))
    weight = (qdata, scale, zero_point, nested_scale, scale_offset)
    _run(True, format, dy.shape[-1], k, weight, group_size, dy, dx, None)
    return dx


def _check(format, n, k, weight, group_size) -> None:
    """The kernels trust their pointers: components that do not fit the weight stop here."""
    qdata, scale, zero, nested, shift = weight
    if format == "nf4":
        codes, scales = -(-n * k // 2), -(-n * k // group_size) if group_size > 0 else -1
    elif format == "int4":
        codes = n * -(-k // 2)
        scales = n if group_size == -1 else n * -(-k // group_size) if group_size > 0 else -1
    else:
        blocks = -(-n // 128) * -(-k // 128)
        codes, scales = n * k, {0: 1, -1: n, 128: blocks}.get(group_size, -1)
    if scales < 0 or (group_size > 0 and group_size % (32 if format == "nf4" else 8)):
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


def _run(backward, format, n, k, weight, group_size, x, y, bias) -> None:
    _check(format, n, k, weight, group_size)
    if y.numel() == 0:
        return
    if x.numel() == 0:  # an empty sum
        y.zero_() if bias is None else y.copy_(bias)
        return
    # Held until the kernel has run: contiguous copies, where a component is a view.
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    qdata, scale, zero, nested, shift = (None if t is None else t.contiguous() for t in weight)
    book = None if nested is None else dynamic_map()
    address = native.pointer
    native.lib().quant_matmul(
        backward, FORMAT_CODES[format], n, k, address(qdata),
        address(scale), 0 if nested is not None else native.DTYPE_CODES[scale.dtype],
        address(zero), address(nested), address(book), address(shift),
        group_size, x.numel() // x.shape[-1], address(x), address(y), native.DTYPE_CODES[x.dtype],
        address(bias), 0 if bias is None else native.DTYPE_CODES[bias.dtype], native.threads(),
    )  # fmt: skip
