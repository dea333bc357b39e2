"""CPU kernels in C++ (csrc/cpu/quant_matmul*): few rows fused, many rows by decoded tiles."""

import torch

from ..._backends import native
from ..._checks import fail
from ...formats.dynamic_map import dynamic_map

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


def _check_sizes(format, n, k, weight, group_size) -> None:
    """The kernels trust their pointers: components that do not fit the weight stop here."""
    qdata, scale, zero, nested, shift = weight
    groups = 1 if group_size <= 0 else -(-k // group_size)
    if format == "nf4":
        codes, scales = -(-n * k // 2), -(-n * k // group_size)
    elif format == "int4":
        codes, scales = n * -(-k // 2), n * groups
    else:
        codes, scales = n * k, {0: 1, -1: n}.get(group_size, -(-n // 128) * groups)
    want = {"qdata": codes, "scale": scales}
    if zero is not None:
        want["zero_point"] = scales
    if nested is not None:
        want |= {"nested_scale": -(-scales // 256), "scale_offset": 1}
    components = {"qdata": qdata, "scale": scale, "zero_point": zero,
                  "nested_scale": nested, "scale_offset": shift}  # fmt: skip
    for name, count in want.items():
        got = 0 if components[name] is None else components[name].numel()
        if got != count:
            fail("quant_matmul", f"qweight.{name}",
                 f"of {count} elements for {format} of shape {(n, k)}", got)  # fmt: skip


def _run(backward, format, n, k, weight, group_size, x, y, bias) -> None:
    _check_sizes(format, n, k, weight, group_size)
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

