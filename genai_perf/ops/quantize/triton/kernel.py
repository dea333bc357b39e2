"""A quantized tensor as floats, by the tiles that quant_matmul multiplies."""

import triton
import triton.language as tl

from ...quant_matmul.triton.weights import COUNTS, Layout, weight_tile


@triton.jit(do_not_specialize=COUNTS)
def _dequantize_kernel(
    q_ptr, scale_ptr, zero_ptr, nested_ptr, offset_ptr, table_ptr, out_ptr,
    n, k, scale_rows, scale_stride, group,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr, PAIRS: tl.constexpr,
    RUN: tl.constexpr, NESTED: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows and BLOCK_K columns, rounded once."""
    c: tl.constexpr = Layout(BLOCK_N, BLOCK_K, FORMAT, PAIRS, RUN, NESTED, ZEROS)
    pid = tl.program_id(0)
    blocks = tl.cdiv(k, BLOCK_K)
    first_n = (pid // blocks) * BLOCK_N
    first_k = (pid % blocks) * BLOCK_K
    w = weight_tile(first_n, first_k, q_ptr, scale_ptr, zero_ptr, nested_ptr, offset_ptr, table_ptr,
                    n, k, scale_rows, scale_stride, group, c)  # fmt: skip
    rows = first_n + tl.arange(0, BLOCK_N)
    cols = first_k + tl.arange(0, BLOCK_K)
    ptrs = out_ptr + rows.to(tl.int64)[:, None] * k + cols[None, :]
    tl.store(ptrs, w.to(out_ptr.dtype.element_ty), mask=(rows < n)[:, None] & (cols < k)[None, :])
