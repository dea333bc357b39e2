"""SparseGPT's block on GPUs by one Triton kernel. In Triton's interpreter it agrees with the torch
sweep, and it compiles for four chips without spills; it has not run on a GPU.

The kernel is imported by the first call that runs it.
"""

import torch

from ..._backends import triton as toolchain

COLUMNS = 128  # of a block at most: a program holds its rows of all of them in registers


def why_not(weight: torch.Tensor, root: torch.Tensor, block_size: int) -> str | None:
    if (reason := toolchain.why_not(weight, root)) is not None:
        return reason
    if weight.dtype != torch.float32:
        return f"triton sweeps weights of float32, got {weight.dtype}"
    if block_size > COLUMNS:
        return f"triton sweeps blocks of up to {COLUMNS} columns, got {block_size}"
    return None


def block(
    weight: torch.Tensor,
    pruned: torch.Tensor,
    factor: torch.Tensor,
    zeros: int,
    group: int,
) -> None:
    """One block of `sweep.sweep`, in place.

    Args:
        weight: (rows, columns) fp32, rows of any stride.
        pruned: the same shape and strides, bool; group 0 prunes these, else more are chosen.
        factor: (columns, columns) contiguous, the block's part of U.
        zeros, group: n and m of n:m, or 0 and 0.
    """
    from .kernel import CONFIG, _sparsegpt_block_kernel

    rows, columns = weight.shape
    if not rows:
        return
    toolchain.launch(
        _sparsegpt_block_kernel, -(-rows // CONFIG["BLOCK_R"]), weight.device, weight,
        pruned.view(torch.uint8), factor, rows, columns, weight.stride(0), zeros, max(group, 1),
        GROUPED=group > 0, **CONFIG,
    )  # fmt: skip
