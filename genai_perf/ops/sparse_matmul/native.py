"""CPU kernels in C++ (csrc/cpu/sparse_matmul_kernel.cpp): few rows of x from the stored values; for
more, and for gradients, panels of W are decoded to fp32 and multiplied by torch."""

import torch

from ..._backends import native
from ..._checks import fail

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# csrc/cpu/sparse_matmul.h holds the same numbers.
KIND_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}
FEW_ROWS = 8
PANEL = 1 << 21  # weights decoded at once: 8 MB


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
    step = max(1, PANEL // max(1, k))
    for start in range(0, n, step):
        stop = min(start + step, n)
        panel = torch.empty(stop - start, k)
        native.lib().sparse_decode(*weight, start, stop, panel.data_ptr(), native.threads())
        yield start, stop, panel


def _weight(n, k, values, index, row_start, scale, group_size):
    """The kernel's description of the weight, and the tensors that must outlive it. The kernels
    trust their pointers: components that do not fit the weight stop here."""
    units = -(-k // 8)
    kind = KIND_CODES.get(values.dtype)
    if kind is None:
        fail("sparse_matmul", "values", "fp32, bf16, fp16, int8 or uint8", values.dtype)
    if index.dtype != torch.uint8 or index.numel() != n * units:
        fail("sparse_matmul", "index", f"{n * units} of torch.uint8 for shape {(n, k)}",
             f"{index.numel()} of {index.dtype}")  # fmt: skip
    count = 4 * units * n
    if row_start is not None:
        if row_start.dtype != torch.int64 or row_start.numel() != n + 1:
            fail("sparse_matmul", "row_start", f"{n + 1} of torch.int64",
                 f"{row_start.numel()} of {row_start.dtype}")  # fmt: skip
        count = int(row_start[-1])
    if values.numel() != (count // 2 if kind == 4 else count):
        fail("sparse_matmul", "values", f"as many as the index says ({count})", values.numel())
    groups = 1
    if group_size > 0:
        groups = -(-k // group_size)
    if group_size != -1 and (group_size < 8 or group_size % 8):
        fail("sparse_matmul", "group_size", "-1 or a multiple of 8", group_size)
    if (scale is None) != (kind < 3) or (scale is not None and scale.numel() != n * groups):
        got = None if scale is None else scale.numel()
        fail("sparse_matmul", "scale", f"{n * groups} for codes, None for floats", got)
    if scale is not None and scale.dtype not in FLOATS:
        fail("sparse_matmul", "scale", "fp32, bf16 or fp16", scale.dtype)
    held = [None if t is None else t.contiguous() for t in (values, index, row_start, scale)]
    values, index, row_start, scale = held
    described = (
        n, k, kind, values.data_ptr(), values.nbytes, index.data_ptr(), native.pointer(row_start),
        native.pointer(scale), 0 if scale is None else native.DTYPE_CODES[scale.dtype], group_size,
    )  # fmt: skip
    return described, held
