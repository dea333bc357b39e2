"""Rows are independent inside a block: a program takes all columns of some rows in registers and
reads a row of the factor a column, 64 KB that all programs share in cache."""

import triton
import triton.language as tl

CONFIG = {"BLOCK_C": 128, "BLOCK_R": 16, "num_warps": 8, "num_stages": 1}


@triton.jit
def choose(w, pruned, d, c, i, columns, zeros, group):
    """n:m for the group of columns from i on: the least scores go, equal ones by column."""
    width = tl.minimum(group, columns - i)
    count = zeros * width // group
    ratio = w / d[:, None]
    score = tl.where(pruned, -1.0, ratio * ratio)
    rank = tl.zeros(w.shape, tl.int32)
    for j in range(i, i + width):
        other = tl.sum(tl.where((c == j)[:, None], score, 0.0), 0)[None, :]
        earlier = (c > j)[:, None]
        rank += ((other < score) | ((other == score) & earlier)).to(tl.int32)
    within = ((c >= i) & (c < i + width))[:, None]
    return pruned | (within & (rank < count))


@triton.jit
def _sparsegpt_block_kernel(
    weight_ptr, pruned_ptr, factor_ptr, rows, columns, stride, zeros, group,
    GROUPED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    inside = (c < columns)[:, None] & (r < rows)[None, :]
    at = c[:, None] + r.to(tl.int64)[None, :] * stride
    w = tl.load(weight_ptr + at, mask=inside, other=0.0)  # (BLOCK_C, BLOCK_R)
    pruned = tl.load(pruned_ptr + at, mask=inside, other=0) != 0
    d = tl.load(factor_ptr + c * (columns + 1), mask=c < columns, other=1.0)
    for i in range(columns):
        if GROUPED:  # noqa: SIM102, one is known when compiling, the other is not
            if i % group == 0:
                pruned = choose(w, pruned, d, c, i, columns, zeros, group)
        here = (c == i)[:, None]
        value = tl.sum(tl.where(here, w, 0.0), 0)
        gone = tl.sum((here & pruned).to(tl.int32), 0) != 0
        error = tl.where(gone, value / tl.load(factor_ptr + i), 0.0)
        u = tl.load(factor_ptr + c, mask=(c > i) & (c < columns), other=0.0)
        w -= u[:, None] * error[None, :]
        w = tl.where(here & gone[None, :], 0.0, w)
        factor_ptr += columns
    tl.store(weight_ptr + at, w, mask=inside)
    tl.store(pruned_ptr + at, pruned.to(tl.uint8), mask=inside)
