"""The sweep that SparseGPT and GPTQ share: change one input column, compensate in the rest.

In fp32 on a CPU it is one native kernel a block, unless the grid is fitted on the way or has no
tables; else torch, column by column.
"""

import math
from typing import Protocol

import torch

from .._backends import native
from . import triton
from .grid import Tables
from .hessian import full_precision
from .masks import Sparsity

# Columns updated by rank-1 steps before one matmul carries them to the rest of the block.
_TILE = 16


def _tile(unit: int) -> int:
    """The tile that no group of `unit` columns straddles unless it starts with it."""
    return _TILE if _TILE % unit == 0 or unit % _TILE == 0 else unit * max(1, _TILE // unit)


class Grid(Protocol):
    """Rounds weights, one input column at a time; 0 is one of its points.

    Attributes:
        refit: columns per group where scales are fitted as the sweep arrives, else 1.
    """

    refit: int

    def fit(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """weight: (rows, columns), dense; importance: (columns,), what a squared error costs."""

    def enter(self, column: int, upcoming: torch.Tensor) -> None:
        """Called before each column; upcoming: (block columns left, rows), this column first."""

    def round(self, values: torch.Tensor, column: int) -> torch.Tensor:
        """values: (rows,) of one column -> the nearest grid points."""

    def tables(self) -> Tables | None:
        """The grid as the native sweep reads it, None where it has to ask `round`."""


def sweep(
    weight: torch.Tensor,
    upper: torch.Tensor,
    *,
    block_size: int,
    sparsity: Sparsity | None = None,
    zero: torch.Tensor | None = None,
    grid: Grid | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes and rounds columns left to right, each error spread over the columns to its right.

    For column j with d = U[j, j]: q = round(mask * w_j), e = (w_j - q) / d, W[:, j:] -= e U[j, j:].
    Pruning chooses by w^2 / d^2 on weights that carry all updates so far: at each block's start
    when unstructured, at each group's start for n:m.

    Args:
        weight: (rows, columns) in the solver's dtype; not changed.
        upper: (columns, columns), `hessian.inverse_factor`.
        block_size: columns between two full updates of the weights to the right; a multiple of m.
        sparsity: how much to prune; None prunes only `zero`.
        zero: (rows, columns) bool, weights that are and stay zero.
        grid: rounds what is kept; zero must be one of its points.

    Returns:
        (weight, pruned): (rows, columns) each, new tensors; pruned is bool.
    """
    rows, columns = weight.shape
    work = weight.T.contiguous()  # (columns, rows): a column is contiguous
    pruned = torch.zeros_like(work, dtype=torch.bool)
    if zero is not None:
        pruned |= zero.T
    tables = grid.tables() if grid else None
    in_tables = grid is None or tables is not None
    if in_tables and work.dtype == torch.float32 and native.why_not(work, upper) is None:
        return _native_sweep(work, upper.contiguous(), block_size, sparsity, pruned, tables)
    if grid is None and triton.why_not(work, upper, block_size) is None:
        return _triton_sweep(work, upper.contiguous(), block_size, sparsity, pruned)
    step = sparsity.group or block_size if sparsity else block_size
    tile = _tile(math.lcm(sparsity.group or 1 if sparsity else 1, grid.refit if grid else 1))
    for start in range(0, columns, block_size):
        factor = upper[start : start + block_size, start : start + block_size]
        block, mask = work[start : start + block_size], pruned[start : start + block_size]
        errors = torch.empty_like(block)
        for first in range(0, len(block), tile):
            last = min(first + tile, len(block))
            for i in range(first, last):
                if sparsity and i % step == 0:
                    scores = (block[i : i + step] / factor.diagonal()[i : i + step, None]).square_()
                    mask[i : i + step] = sparsity.choose(scores.T, mask[i : i + step].T).T
                wanted = block[i].masked_fill(mask[i], 0)
                if grid:
                    grid.enter(start + i, block[i:])
                    wanted = grid.round(wanted, start + i)
                torch.sub(block[i], wanted, out=errors[i]).div_(factor[i, i])
                block[i] = wanted
                block[i + 1 : last].addr_(factor[i, i + 1 : last], errors[i], alpha=-1)
            _carry(block[last:], factor[first:last, last:], errors[first:last])
        stop = start + len(block)
        _carry(work[stop:], upper[start:stop, stop:], errors)
    return work.T.contiguous(), pruned.T.contiguous()


def _native_sweep(
    work: torch.Tensor,
    upper: torch.Tensor,
    block_size: int,
    sparsity: Sparsity | None,
    pruned: torch.Tensor,
    tables: Tables | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with one kernel a block (csrc/cpu/sparsegpt_kernel.cpp), rows in parallel."""
    rows, columns = work.shape[1], len(upper)
    mask = pruned.view(torch.uint8)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, errors = work[start:stop], torch.empty_like(work[start:stop])
        zeros, group, count = 0, 0, -1
        if sparsity and sparsity.group:
            zeros, group = sparsity.zeros, sparsity.group
        elif sparsity:
            count = round(block.numel() * sparsity.fraction)
        rounding = {}
        if tables:
            groups = tables.groups[start:stop].contiguous()
            rounding = {"scale": tables.scale.data_ptr(), "zero": tables.zero.data_ptr(),
                        "groups": groups.data_ptr(), "low": tables.low,
                        "high": tables.high}  # fmt: skip
        if rows:
            native.lib().sparsegpt_block(
                stop - start, rows, block.data_ptr(), mask[start].data_ptr(), errors.data_ptr(),
                upper[start, start].data_ptr(), columns, zeros, group, count, native.threads(),
                **rounding,
            )  # fmt: skip
        _carry(work[stop:], upper[start:stop, stop:], errors)
    return work.T.contiguous(), pruned.T.contiguous()


def _triton_sweep(
    work: torch.Tensor,
    upper: torch.Tensor,
    block_size: int,
    sparsity: Sparsity | None,
    pruned: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with one Triton kernel a block, which unstructured pruning is chosen before."""
    zeros, group = (sparsity.zeros, sparsity.group) if sparsity else (0, 0)
    for start in range(0, len(work), block_size):
        stop = min(start + block_size, len(work))
        block, mask, errors = (
            work[start:stop],
            pruned[start:stop],
            torch.empty_like(work[start:stop]),
        )
        factor = upper[start:stop, start:stop]
        if sparsity and not group:
            scores = (block / factor.diagonal()[:, None]).square_()
            mask.copy_(sparsity.choose(scores.T, mask.T).T)
        triton.block(block, mask, errors, factor, zeros, group)
        _carry(work[stop:], upper[start:stop, stop:], errors)
    return work.T.contiguous(), pruned.T.contiguous()


def _carry(rest: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor) -> None:
    with full_precision():
        rest.addmm_(factor.T, errors, alpha=-1)
