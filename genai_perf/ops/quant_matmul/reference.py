"""The oracle: the weight dequantized by its reference codec, and a dense product in fp32."""

import torch

from ...formats import QuantizedTensor, Spec, get


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
    finite = torch.isfinite(x).all(-1, keepdim=True)
    codes = get("int8").encode(torch.where(finite, x, 0).float(), Spec())
    sums = (codes["qdata"].double() @ qdata.double().T).float()  # exact, then rounded once
    y = sums * scale.float().T * torch.where(finite, codes["scale"], torch.nan)
    return (y + (0.0 if bias is None else bias.float())).to(x.dtype)
