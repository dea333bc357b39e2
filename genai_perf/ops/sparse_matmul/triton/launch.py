"""Running the kernels: few rows of x from the stored values; for more, and for gradients, panels of
W are decoded to fp32 and multiplied by torch. Nothing here waits for the device."""

from pathlib import Path

import torch

from ...._backends import triton as toolchain
from .. import weights
from .kernels import FLOATS, INT4, INT8, _sparse_decode_kernel, _sparse_gemv_kernel

FEW_ROWS = 8
TUNED = Path(__file__).parent.parent / "tuned"
# A guess from the sizes, 8 values a thread; nothing here has run on a GPU.
CONFIG = {"BLOCK_N": 4, "UNITS": 32, "num_warps": 4, "num_stages": 1}
KINDS = {torch.int8: INT8.value, torch.uint8: INT4.value}


def constants(values: torch.Tensor, two_four: bool) -> dict:
    return {"KIND": KINDS.get(values.dtype, FLOATS.value), "TWO_FOUR": two_four, **CONFIG}


def choose(x: torch.Tensor, values: torch.Tensor, two_four: bool, k: int) -> dict[str, int]:
    """The launch keywords of the product: measured on this device if there is a table."""
    exact = {"kernel": "gemv", "dtype": str(x.dtype).removeprefix("torch."),
             "values": str(values.dtype).removeprefix("torch."), "two_four": two_four}  # fmt: skip
    return toolchain.measured(TUNED, x.device, exact, {"k": k}) or CONFIG


def forward(x, values, index, row_start, scale, bias, group_size, n):
    k = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], n))
    weight = weights.checked(n, k, values, index, row_start, scale, group_size)
    if y.numel() == 0:
        return y
    flat = x.reshape(-1, k).contiguous()
    if len(flat) > FEW_ROWS:
        out = y.view(-1, n)
        for start, stop, panel in _panels(weight, n, k, x.device):
            product = flat.float() @ panel.T
            out[:, start:stop] = product if bias is None else product + bias[start:stop].float()
        return y
    bias = None if bias is None else bias.contiguous()
    found = constants(values, row_start is None) | choose(x, values, row_start is None, k)
    toolchain.launch(
        _sparse_gemv_kernel, -(-n // found["BLOCK_N"]) * len(flat), x.device,
        flat, *weight.tensors, bias, y, len(flat), n, k, *weight.sizes,
        HAS_BIAS=bias is not None, **found,
    )  # fmt: skip
    return y


def backward(dy, values, index, row_start, scale, group_size, k):
    n = dy.shape[-1]
    weight = weights.checked(n, k, values, index, row_start, scale, group_size)
    flat = dy.float().reshape(dy.shape[:-1].numel(), n)
    dx = flat.new_zeros(len(flat), k)
    if dx.numel():
        for start, stop, panel in _panels(weight, n, k, dy.device):
            dx.addmm_(flat[:, start:stop], panel)
    return dx.view(*dy.shape[:-1], k).to(dy.dtype)


def _panels(weight: weights.Weight, n: int, k: int, device: torch.device):
    """(first row, end, rows of W in fp32) over all of W."""
    values, _, row_start, _ = weight.tensors
    for start, stop in weights.panels(n, k):
        panel = torch.empty(stop - start, k, device=device)
        if k:
            toolchain.launch(
                _sparse_decode_kernel, -(-(stop - start) // CONFIG["BLOCK_N"]), device,
                *weight.tensors, panel, start, stop, n, k, *weight.sizes,
                **constants(values, row_start is None),
            )  # fmt: skip
        yield start, stop, panel
