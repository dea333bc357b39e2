"""The oracle: the weight dequantized by its reference codec, and a dense product in fp32."""

import torch

from ...formats import QuantizedTensor, get
from .outliers import multiply
from .rounding import in_groups, rounded


def weight(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, shape):
    """The dequantized weight, fp32 (n, k)."""
    if format.startswith("fp8"):
        qdata = qdata.view(get(format).code_dtype)
    return QuantizedTensor(
        format, torch.Size(shape), torch.float32, qdata, scale, zero_point,
        group_size, nested_scale, scale_offset,
    ).dequantize()  # fmt: skip


def why_not(*args) -> None:
    return None


def forward(x, qdata, scale, zero_point, nested_scale, scale_offset, bias, format, group_size, n):
    shape = (n, x.shape[-1])
    w = weight(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, shape)
    y = x.float() @ w.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def why_not_backward(*args) -> None:
    return None


def backward(dy, qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, k):
    shape = (dy.shape[-1], k)
    w = weight(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, shape)
    return (dy.float() @ w).to(dy.dtype)


def why_not_int8(*args) -> None:
    return None


def int8(x, qdata, scale, bias):
    return _product(x, "int8", qdata, scale, bias)


def why_not_outliers(*args) -> None:
    return None


def outliers(x, qdata, scale, bias, threshold):
    return multiply(x, qdata, scale, bias, threshold, int8)


def why_not_int4_int8(*args) -> None:
    return None


def int4_int8(x, qdata, scale, zero_point, bias, group_size):
    n, k = qdata.shape[0], x.shape[-1]
    unit = torch.ones_like(scale.float())
    codes = weight(qdata, unit, zero_point, None, None, "int4", group_size, (n, k))
    size = group_size if group_size > 0 else max(k, 1)
    return _product_of_groups(x, "int8", codes, scale.float(), size, bias)


def why_not_fp8(*args) -> None:
    return None


def fp8(x, qdata, scale, bias, format, group_size):
    codes = qdata.view(get(format).code_dtype)
    if not in_groups(group_size):
        return _product(x, format, codes, scale, bias)
    if group_size > 0:  # a scale for 128 rows, too
        scale = scale.repeat_interleave(group_size, 0)[: qdata.shape[0]]
    return _product_of_groups(x, format, codes, scale, abs(group_size), bias)


def _product(x, format, qdata, scale, bias):
    codes, x_scale = rounded(x, format)
    sums = (codes.double() @ qdata.double().T).float()  # exact, then rounded once
    y = sums * scale.float().T * x_scale
    return (y + (0.0 if bias is None else bias.float())).to(x.dtype)


def _product_of_groups(x, format, w, scale, size, bias):
    """w: codes (n, k), scale (n, ceil(k / size)): `size` columns share one, in x as in w."""
    y = x.new_zeros((*x.shape[:-1], w.shape[0]), dtype=torch.float32)
    for g, first in enumerate(range(0, x.shape[-1], size)):
        codes, x_scale = rounded(x[..., first : first + size], format)
        part = w[:, first : first + size].double()
        sums = (codes.double() @ part.T).float()  # exact, then rounded once
        y += sums * (scale[:, g] * x_scale)
    return (y + (0.0 if bias is None else bias.float())).to(x.dtype)
