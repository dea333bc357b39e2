"""quant_matmul on Trainium by NKI kernels; see the op's README for what was proven and where."""

import torch

from ...._backends import nki as toolchain
from ..outliers import multiply
from ..rounding import rounded
from . import layout

FORMATS = ("int8", "fp8", "fp8_240", "fp8_e5m2", "nf4", "int4")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def why_not(x, qdata, scale, zero_point, nested_scale, scale_offset, bias,
            format, group_size, n) -> str | None:  # fmt: skip
    tensors = (x, qdata, scale, zero_point, nested_scale, scale_offset, bias)
    return toolchain.why_not(*tensors) or _why_not_format(format, group_size)


def why_not_backward(dy, qdata, scale, zero_point, nested_scale, scale_offset,
                     format, group_size, k) -> str | None:  # fmt: skip
    weight = (qdata, scale, zero_point, nested_scale, scale_offset)
    return toolchain.why_not(dy, *weight) or _why_not_format(format, group_size)


def _why_not_format(format: str, group_size: int) -> str | None:
    if format.startswith("fp8") and group_size == -128:
        return "nki has no kernel for scales of 128 elements of a row"
    return None if format in FORMATS else f"nki has no kernel for {format} weights"


def _bias(bias, n: int, like: torch.Tensor) -> torch.Tensor:
    if bias is None:
        return like.new_zeros(1, 1, dtype=torch.float32)
    return bias.float().reshape(1, n)


def forward(x, qdata, scale, zero_point, nested_scale, scale_offset, bias, format, group_size, n):
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    if rows.numel() == 0 or n == 0:
        y = x.new_zeros((*x.shape[:-1], n))
        return y if bias is None else y + bias.to(y.dtype)
    row = _bias(bias, n, x)
    if format == "int8":
        from .int8_kernel import int8_matmul

        words = layout.padded(qdata, 2).contiguous().view(torch.uint16)
        y = toolchain.launch(int8_matmul, layout.padded(rows, 2), words, scale.reshape(1, n), row,
                             bias is not None)  # fmt: skip
        return y.reshape(*x.shape[:-1], n)
    weight = (qdata, scale, zero_point, nested_scale, scale_offset)
    found = layout.words(weight, format, group_size, n, k, len(rows), x.dtype)
    if found is not None:
        from .words_kernel import words_matmul

        *tensors, code, per, share, zero = found
        y = toolchain.launch(words_matmul, layout.padded(rows, layout.PARTITIONS * per), *tensors,
                             row, code, per, share, zero, bias is not None)  # fmt: skip
    else:
        from .decode_kernels import decoded_matmul

        codes, scales, zero, table, form = layout.describe(weight, format, group_size, n, k)
        y = toolchain.launch(decoded_matmul, rows, codes, scales, zero, table, row, form,
                             bias is not None)  # fmt: skip
    return y.reshape(*x.shape[:-1], n)


def backward(dy, qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, k):
    n = dy.shape[-1]
    rows = dy.reshape(-1, n)
    if rows.numel() == 0 or k == 0:
        return dy.new_zeros((*dy.shape[:-1], k))
    from .decode_kernels import decoded_matmul_backward

    weight = (qdata, scale, zero_point, nested_scale, scale_offset)
    codes, scales, zero, table, form = layout.describe(weight, format, group_size, n, k)
    dx = toolchain.launch(decoded_matmul_backward, rows, codes, scales, zero, table, k, form)
    return dx.reshape(*dy.shape[:-1], k)


def why_not_int8(x, qdata, scale, bias) -> str | None:
    return toolchain.why_not(x, qdata, scale, bias)


def why_not_fp8(x, qdata, scale, bias, format, group_size) -> str | None:
    if (format, group_size) != ("fp8_240", -1):
        return f"nki rounds x to fp8 for fp8_240 weights by row, got {format} with {group_size}"
    return toolchain.why_not(x, qdata, scale, bias)


def _both_rounded(x, qdata, scale, bias, format: str):
    n = qdata.shape[0]
    if x.numel() == 0 or n == 0:
        y = x.new_zeros((*x.shape[:-1], n))
        return y if bias is None else y + bias.to(y.dtype)
    from . import activation_kernels

    codes, x_scale = rounded(x.reshape(-1, x.shape[-1]), format)
    kernel, weight = activation_kernels.w8a8_matmul, qdata
    if format == "fp8_240":
        kernel = activation_kernels.fp8_matmul
        codes, weight = (layout.padded(c.view(torch.uint8), 2).contiguous().view(torch.uint16)
                         for c in (codes, qdata))  # fmt: skip
    y = toolchain.launch(kernel, codes, weight, x_scale.reshape(1, -1),
                         scale.float().reshape(1, n), _bias(bias, n, x), x.reshape(-1, 1)[:1],
                         bias is not None)  # fmt: skip
    return y.reshape(*x.shape[:-1], n)


def int8(x, qdata, scale, bias):
    return _both_rounded(x, qdata, scale, bias, "int8")


def why_not_outliers(x, qdata, scale, bias, threshold) -> str | None:
    return toolchain.why_not(x, qdata, scale, bias)


def outliers(x, qdata, scale, bias, threshold):
    return multiply(x, qdata, scale, bias, threshold, int8)


def fp8(x, qdata, scale, bias, format, group_size):
    return _both_rounded(x, qdata, scale, bias, "fp8_240")
