"""The sweep that SparseGPT and GPTQ share: change one input column, compensate in the rest.

In fp32 on a CPU it is one native kernel a block, unless the grid is fitted on the way or has no
tables; else torch, column by column.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from .._backends import native
from ..ops.quantize.grid import Tables
from . import triton
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
    root: torch.Tensor,
    *,
    block_size: int,
    sparsity: Sparsity | None = None,
    zero: torch.Tensor | None = None,
    grid: Grid | None = None,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Prunes and rounds columns left to right, each error spread over the columns to its right.

    For column j with d = U[j, j], U^T U = H^-1: q = round(mask * w_j), e = (w_j - q) / d,
    W[:, j:] -= e U[j, j:]. Pruning chooses by w^2 / d^2 on weights that carry all updates so far:
    at each block's start when unstructured, at each group's start for n:m.

    U itself is needed in its diagonal blocks only. It is the inverse of V = L^T, and all errors E
    so far obey E = C V with C what has changed, dense less final weights: a block B with the
    changes C before it starts from W_B + C V[:B, B] U[B, B].

    Args:
        weight: (rows, columns) in the solver's dtype.
        root: (columns, columns), L of `hessian.factorize`.
        block_size: columns between two full updates of the weights to the right; a multiple of m.
        sparsity: how much to prune; None prunes only `zero`.
        zero: (rows, columns) bool, weights that are and stay zero.
        grid: rounds what is kept; zero must be one of its points.
        overwrite: weight may be written to, which saves a copy of its size.

    Returns:
        (weight, pruned, cost): (rows, columns) each, new tensors, pruned is bool; and the sum of
        all e^2, which is tr(C H C^T): ||C X||^2 over the calibration inputs and the damping.
    """
    step = _step(weight, root, block_size, sparsity, grid)
    new = weight.new_empty(weight.shape)
    changes = weight if overwrite else weight.clone()  # dense weights until a block is done
    pruned = weight.new_zeros(weight.shape, dtype=torch.bool)
    if zero is not None:
        pruned |= zero
    cost = torch.zeros((), dtype=torch.float64, device=weight.device)
    for first in range(0, weight.shape[1], block_size):
        here = slice(first, first + block_size)
        block, before = new[:, here], changes[:, here]
        factor = _inverse(root[here, here]).T.contiguous()
        with full_precision():
            carried = factor.T @ root[here, :first]
            torch.addmm(before, changes[:, :first], carried.T, out=block)
        begun = block.clone()
        step(block, pruned[:, here], factor, first)
        with full_precision():
            errors = begun.sub_(block) @ root[here, here].T
        cost += errors.square_().sum(dtype=torch.float64)
        before -= block
    return new, pruned, float(cost)


def _inverse(lower: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False)


# Changes the columns of a block in place: (weight, pruned, factor, first column), the first two
# (rows, block columns), the factor its part of U.
_Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], None]


def _step(
    weight: torch.Tensor,
    root: torch.Tensor,
    block_size: int,
    sparsity: Sparsity | None,
    grid: Grid | None,
) -> _Step:
    tables = grid.tables() if grid else None
    in_tables = grid is None or tables is not None
    if in_tables and weight.dtype == torch.float32 and native.why_not(weight, root) is None:
        return partial(_native_step, sparsity, tables)
    if grid is None and triton.why_not(weight, root, block_size) is None:
        return partial(_triton_step, sparsity)
    return partial(_torch_step, sparsity, grid)


def _torch_step(sparsity, grid, weight, pruned, factor, start) -> None:
    block, mask = weight.T.contiguous(), pruned.T.contiguous()  # whose columns are contiguous
    group = sparsity.group or len(block) if sparsity else len(block)
    tile = _tile(math.lcm(sparsity.group or 1 if sparsity else 1, grid.refit if grid else 1))
    for first in range(0, len(block), tile):
        last = min(first + tile, len(block))
        errors = torch.empty_like(block[first:last])
        for i in range(first, last):
            if sparsity and i % group == 0:
                scores = (block[i : i + group] / factor.diagonal()[i : i + group, None]).square_()
                mask[i : i + group] = sparsity.choose(scores.T, mask[i : i + group].T).T
            wanted = block[i].masked_fill(mask[i], 0)
            if grid:
                grid.enter(start + i, block[i:])
                wanted = grid.round(wanted, start + i)
            torch.sub(block[i], wanted, out=errors[i - first]).div_(factor[i, i])
            block[i] = wanted
            block[i + 1 : last].addr_(factor[i, i + 1 : last], errors[i - first], alpha=-1)
        with full_precision():
            block[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    weight.copy_(block.T)
    pruned.copy_(mask.T)


def _native_step(sparsity, tables: Tables | None, weight, pruned, factor, start) -> None:
    """The same by one kernel (csrc/cpu/sparsegpt_kernel.cpp), rows in parallel."""
    rows, columns = weight.shape
    zeros, group, count = 0, 0, -1
    if sparsity and sparsity.group:
        zeros, group = sparsity.zeros, sparsity.group
    elif sparsity:
        count = round(weight.numel() * sparsity.fraction)
    rounding = {}
    if tables:
        groups = tables.groups[start : start + columns].contiguous()
        rounding = {"scale": tables.scale.data_ptr(), "zero": tables.zero.data_ptr(),
                    "groups": groups.data_ptr(), "low": tables.low,
                    "high": tables.high}  # fmt: skip
    if rows:
        native.lib().sparsegpt_block(
            columns, rows, weight.stride(0), weight.data_ptr(), pruned.data_ptr(),
            factor.data_ptr(), zeros, group, count, native.threads(), **rounding,
        )  # fmt: skip


def _triton_step(sparsity, weight, pruned, factor, start) -> None:
    """The same by one Triton kernel; what unstructured pruning takes is chosen before."""
    zeros, group = (sparsity.zeros, sparsity.group) if sparsity else (0, 0)
    if sparsity and not group:
        scores = (weight / factor.diagonal()).square_()
        pruned.copy_(sparsity.choose(scores, pruned))
    triton.block(weight, pruned, factor, zeros, group)
