"""CPU kernels in C++ (csrc/cpu/sparse_matmul_kernel.cpp): few rows of x from the stored values; for
more, and for gradients, panels of W are decoded to fp32 and multiplied by torch."""

import torch

from ..._backends import native
from . import weights

# csrc/cpu/sparse_matmul.h holds the same numbers.
KIND_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}
FEW_ROWS = 8


def why_not(x, values, index, row_start, scale, bias, group_size, n) -> str | None:
    return native.why_not(x, values, index, row_start, scale, bias)


def why_not_backward(dy, values, index, row_start, scale, group_size, k) -> str | None:
    return native.why_not(dy, values, index, row_start, scale)


def forward(x, values, index, row_start, scale, bias, group_size, n):
    k = x.shape[-1]
    weight, held = _weight(n, k, values, index, row_start, scale, group_size)
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel() == 0:
        return y
    if k == 0:  # an empty sum
        return y.zero_() if bias is None else y.copy_(bias)
    rows = x.numel() // k
    if rows <= FEW_ROWS:
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        native.lib().sparse_matmul(
            *weight, rows, x.data_ptr(), y.data_ptr(), native.DTYPE_CODES[x.dtype],
            native.pointer(bias), 0 if bias is None else native.DTYPE_CODES[bias.dtype],
            native.threads(),
        )  # fmt: skip
        del held
        return y
    flat, out = x.reshape(-1, k).float(), y.view(-1, n)
    for start, stop, panel in _panels(weight, n, k):
        product = flat @ panel.T
        out[:, start:stop] = product if bias is None else product + bias[start:stop].float()
    del held
    return y


def backward(dy, values, index, row_start, scale, group_size, k):
    n = dy.shape[-1]
    weight, held = _weight(n, k, values, index, row_start, scale, group_size)
    flat = dy.reshape(-1, n).float() if dy.numel() else dy.float().new_zeros(0, n)
    dx = flat.new_zeros(dy.shape[:-1].numel(), k)
    if dx.numel():
        for start, stop, panel in _panels(weight, n, k):
            dx.addmm_(flat[:, start:stop], panel)
    del held
    return dx.view(*dy.shape[:-1], k).to(dy.dtype)


def _panels(weight, n, k):
    """(first row, end, rows of W in fp32) over all of W."""
    for start, stop in weights.panels(n, k):
        panel = torch.empty(stop - start, k)
        native.lib().sparse_decode(*weight, start, stop, panel.data_ptr(), native.threads())
        yield start, stop, panel


def _weight(n, k, values, index, row_start, scale, group_size):
    """The kernel's description of the weight, and the tensors that must outlive it."""
    held, _ = weights.checked(n, k, values, index, row_start, scale, group_size)
    values, index, row_start, scale = held
    described = (
        n, k, KIND_CODES[values.dtype], values.data_ptr(), values.nbytes, index.data_ptr(),
        native.pointer(row_start), native.pointer(scale),
        0 if scale is None else native.DTYPE_CODES[scale.dtype], group_size,
    )  # fmt: skip
    return described, held
