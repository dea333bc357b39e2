"""SparseGPT's block on GPUs by one Triton kernel. In Triton's interpreter it agrees with the torch
sweep, and it compiles for four chips without spills; it has not run on a GPU.

The kernel is imported by the first call that runs it.
"""

import torch

from ..._backends import triton as toolchain

COLUMNS = 128  # of a block at most: a program holds its rows of all of them in registers


def why_not(work: torch.Tensor, upper: torch.Tensor, block_size: int) -> str | None:
    if (reason := toolchain.why_not(work, upper)) is not None:
        return reason
    if work.dtype != torch.float32:
        return f"triton sweeps weights of float32, got {work.dtype}"
    if block_size > COLUMNS:
        return f"triton sweeps blocks of up to {COLUMNS} columns, got {block_size}"
    return None


def block(
    weight: torch.Tensor,
    pruned: torch.Tensor,
    errors: torch.Tensor,
    factor: torch.Tensor,
    zeros: int,
    group: int,
) -> None:
    """One block of `sweep.sweep`, in place.

    Args:
        weight: (columns, rows) fp32, contiguous.
        pruned: the same shape, bool; group 0 prunes these, else more are chosen.
        errors: the same shape as weight, written.
        factor: (columns, columns), the block's part of U, rows of any stride.
        zeros, group: n and m of n:m, or 0 and 0.
    """
    from .kernel import CONFIG, _sparsegpt_block_kernel

    columns, rows = weight.shape
    if not rows:
        return
    toolchain.launch(
        _sparsegpt_block_kernel, -(-rows // CONFIG["BLOCK_R"]), weight.device, weight,
        pruned.view(torch.uint8), errors, factor, rows, columns, factor.stride(0), zeros,
        max(group, 1), GROUPED=group > 0, **CONFIG,
    )  # fmt: skip
