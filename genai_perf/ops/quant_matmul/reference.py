"""The oracle: the weight dequantized by its reference codec, and a dense product in fp32."""

import torch

from ...formats import QuantizedTensor, Spec, get
from .outliers import multiply


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


why_not_fp8 = why_not_int8


def rounded(x, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale (..., 1)) of the rows of x; the scale of one with inf or NaN is NaN."""
    finite = torch.isfinite(x).all(-1, keepdim=True)
    parts = get(format).encode(torch.where(finite, x, 0).float(), Spec())
    return parts["qdata"], torch.where(finite, parts["scale"], torch.nan)


def int8(x, qdata, scale, bias):
    return _product(x, "int8", qdata, scale, bias)


def why_not_int4_int8(*args) -> None:
    return None


def int4_int8(x, qdata, scale, zero_point, bias, group_size):
    n, k = qdata.shape[0], x.shape[-1]
    w_scale, size = scale.float(), group_size if group_size > 0 else max(k, 1)
    unit = torch.ones_like(w_scale)
    w = weight(qdata, unit, zero_point, None, None, "int4", group_size, (n, k)).double()
    y = x.new_zeros((*x.shape[:-1], n), dtype=torch.float32)
    for g, first in enumerate(range(0, k, size)):
        codes, x_scale = rounded(x[..., first : first + size], "int8")
        sums = (codes.double() @ w[:, first : first + size].T).float()  # exact, then rounded once
        y += sums * (w_scale[:, g] * x_scale)
    return (y + (0.0 if bias is None else bias.float())).to(x.dtype)


def fp8(x, qdata, scale, bias):
    return _product(x, "fp8_240", qdata.view(torch.float8_e4m3fn), scale, bias)


why_not_outliers = why_not_int8


def outliers(x, qdata, scale, bias, threshold):
    return multiply(x, qdata, scale, bias, threshold, int8)


def _product(x, format, qdata, scale, bias):
    codes, x_scale = rounded(x, format)
    sums = (codes.double() @ qdata.double().T).float()  # exact, then rounded once
    y = sums * scale.float().T * x_scale
    return (y + (0.0 if bias is None else bias.float())).to(x.dtype)
