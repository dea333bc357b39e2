"""Products with a quantized weight: one row of x by parts of K, many rows by tiles, the gradient.

Tiles of W are decoded in registers. For many rows they are the left operand, W x^T, because the
matrix instruction of Hopper takes that one from registers.
"""

import triton
import triton.language as tl

from .weights import COUNTS, Layout, weight_tile


@triton.jit(do_not_specialize=COUNTS)
def _quant_gemv_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, nested_ptr, offset_ptr, table_ptr, parts_ptr,
    stride_xm, m, n, k, splits, scale_rows, scale_stride, group,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr, PAIRS: tl.constexpr,
    RUN: tl.constexpr, NESTED: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """parts[split, row, :]: BLOCK_N sums over one part of the columns, for one row of x."""
    c: tl.constexpr = Layout(BLOCK_N, BLOCK_K, FORMAT, PAIRS, RUN, NESTED, ZEROS)
    pid = tl.program_id(0)
    row = pid % m
    rest = pid // m
    split = rest % splits
    first_n = (rest // splits) * BLOCK_N
    tiles = tl.cdiv(tl.cdiv(k, BLOCK_K), splits)
    begin = split * tiles * BLOCK_K
    x_ptr += tl.cast(row, tl.int64) * stride_xm
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first_k in tl.range(begin, tl.minimum(begin + tiles * BLOCK_K, k), BLOCK_K):
        cols = first_k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + cols, mask=cols < k, other=0.0).to(tl.float32)
        w = weight_tile(first_n, first_k, q_ptr, scale_ptr, zero_ptr, nested_ptr, offset_ptr,
                        table_ptr, n, k, scale_rows, scale_stride, group, c)  # fmt: skip
        acc += w * x[None, :]
    rows = first_n + tl.arange(0, BLOCK_N)
    at = (tl.cast(split, tl.int64) * m + row) * n + rows
    tl.store(parts_ptr + at, tl.sum(acc, 1), mask=rows < n)


@triton.jit(do_not_specialize=COUNTS)
def _quant_merge_kernel(
    parts_ptr, bias_ptr, y_ptr, m, n, splits, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y of one row: its parts in their order, then the bias."""
    blocks = tl.cdiv(n, BLOCK)
    pid = tl.program_id(0)
    row = tl.cast(pid // blocks, tl.int64)
    cols = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        total += tl.load(parts_ptr + (split * m + row) * n + cols, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n + cols, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _turned(ptr, rows, cols, stride_m, m, length):
    """(cols, rows) of the matrix (m, length), zero outside it."""
    ptrs = ptr + rows.to(tl.int64)[None, :] * stride_m + cols[:, None]
    return tl.load(ptrs, mask=(rows < m)[None, :] & (cols < length)[:, None], other=0.0)


@triton.jit(do_not_specialize=COUNTS)
def _quant_gemm_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, nested_ptr, offset_ptr, table_ptr, bias_ptr, y_ptr,
    stride_xm, m, n, k, scale_rows, scale_stride, group,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr,
    PAIRS: tl.constexpr, RUN: tl.constexpr, NESTED: tl.constexpr, ZEROS: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of BLOCK_M rows and BLOCK_N columns."""
    c: tl.constexpr = Layout(BLOCK_N, BLOCK_K, FORMAT, PAIRS, RUN, NESTED, ZEROS)
    pid = tl.program_id(0)
    blocks = tl.cdiv(m, BLOCK_M)
    first_m = (pid % blocks) * BLOCK_M
    first_n = (pid // blocks) * BLOCK_N
    rows = first_m + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first_k in tl.range(0, k, BLOCK_K):
        x = _turned(x_ptr, rows, first_k + tl.arange(0, BLOCK_K), stride_xm, m, k)
        w = weight_tile(first_n, first_k, q_ptr, scale_ptr, zero_ptr, nested_ptr, offset_ptr,
                        table_ptr, n, k, scale_rows, scale_stride, group, c)  # fmt: skip
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision=PRECISION)
    out = first_n + tl.arange(0, BLOCK_N)
    if BIAS:
        acc += tl.load(bias_ptr + out, mask=out < n, other=0.0).to(tl.float32)[:, None]
    ptrs = y_ptr + rows.to(tl.int64)[None, :] * n + out[:, None]
    tl.store(ptrs, acc.to(y_ptr.dtype.element_ty), mask=(rows < m)[None, :] & (out < n)[:, None])


@triton.jit(do_not_specialize=COUNTS)
def _quant_gemm_dx_kernel(
    dy_ptr, q_ptr, scale_ptr, zero_ptr, nested_ptr, offset_ptr, table_ptr, dx_ptr,
    stride_dym, m, n, k, scale_rows, scale_stride, group,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr,
    PAIRS: tl.constexpr, RUN: tl.constexpr, NESTED: tl.constexpr, ZEROS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx = dy W of BLOCK_M rows and BLOCK_K columns."""
    c: tl.constexpr = Layout(BLOCK_N, BLOCK_K, FORMAT, PAIRS, RUN, NESTED, ZEROS)
    pid = tl.program_id(0)
    blocks = tl.cdiv(m, BLOCK_M)
    first_m = (pid % blocks) * BLOCK_M
    first_k = (pid // blocks) * BLOCK_K
    rows = first_m + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for first_n in tl.range(0, n, BLOCK_N):
        dy = _turned(dy_ptr, rows, first_n + tl.arange(0, BLOCK_N), stride_dym, m, n)
        w = weight_tile(first_n, first_k, q_ptr, scale_ptr, zero_ptr, nested_ptr, offset_ptr,
                        table_ptr, n, k, scale_rows, scale_stride, group, c)  # fmt: skip
        acc = tl.dot(tl.trans(w.to(dy.dtype)), dy, acc, input_precision=PRECISION)
    cols = first_k + tl.arange(0, BLOCK_K)
    ptrs = dx_ptr + rows.to(tl.int64)[None, :] * k + cols[:, None]
    tl.store(ptrs, acc.to(dx_ptr.dtype.element_ty), mask=(rows < m)[None, :] & (cols < k)[:, None])
