"""Running the kernel: its tables, its configuration."""

from functools import cache
from pathlib import Path

import torch

from ...._backends import triton as toolchain
from ....formats.base import ceil_div
from ....formats.dynamic_map import kernel_tables
from .. import coefficients
from .kernel import _optimizer_step_kernel

TUNED = Path(__file__).parent.parent / "tuned"
# Not measured: bytes enough in flight for a memory-bound kernel, registers few enough to spill none
# (the ahead-of-time gate checks it).
ELEMENTS = 1024
WARPS = 4


def config(block_size: int) -> dict[str, int]:
    """Where nothing was measured."""
    return {"ROWS": max(1, ELEMENTS // block_size), "BLOCK": block_size,
            "num_warps": WARPS * max(1, block_size // ELEMENTS)}  # fmt: skip


def choose(p: torch.Tensor, adamw: bool, quantized: bool, block_size: int) -> dict[str, int]:
    """The launch keywords: measured on this device if there is a table, else `config`."""
    exact = {"kernel": "step", "dtype": str(p.dtype).removeprefix("torch."), "adamw": adamw,
             "quantized": quantized, "block": block_size}  # fmt: skip
    found = toolchain.measured(TUNED, p.device, exact, {"elements": p.numel()})
    return config(block_size) | (found or {})


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Values and bounds of the signed map and of the unsigned one."""
    return tuple(t.to(device) for signed in (True, False) for t in kernel_tables(signed)[:2])


def _launch(p, grad, first, second, first_scale, second_scale, found, block_size) -> None:
    if p.numel() == 0:
        return
    shape = choose(p, second is not None, first_scale is not None, block_size)
    programs = ceil_div(p.numel(), shape["ROWS"] * block_size)
    toolchain.launch(
        _optimizer_step_kernel, programs, p.device, p, grad.contiguous(), first, second,
        first_scale, second_scale, *_tables(p.device), p.numel(), *found,
        ADAMW=second is not None, QUANTIZED=first_scale is not None, **shape,
    )  # fmt: skip


def adamw(p, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, lr, beta1, beta2, eps,
          weight_decay, step, block_size) -> None:  # fmt: skip
    found = coefficients.adamw(lr, beta1, beta2, eps, weight_decay, step)
    _launch(p, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, found, block_size)


def lion(p, grad, exp_avg, exp_avg_scale, lr, beta1, beta2, weight_decay, block_size) -> None:
    found = coefficients.lion(lr, beta1, beta2, weight_decay)
    _launch(p, grad, exp_avg, None, exp_avg_scale, None, found, block_size)
