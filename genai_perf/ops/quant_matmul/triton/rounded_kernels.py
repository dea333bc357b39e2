"""Products of two operands of one byte: int8 codes exactly, fp8 codes with sums in float32."""

import triton
import triton.language as tl

from ...decode_attention.triton.common import FP8 as FP8_BYTES
from ...decode_attention.triton.common import decode

# Values of the constexpr KIND. Chips without fp8 products, and those whose fp8 is another one,
# multiply the codes as float16, which holds them exactly.
INT8, FP8, FP8_AS_HALF = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
GROUP = tl.constexpr(128)  # columns that share a scale, with GROUPS
ORDER_M = tl.constexpr(8)  # tiles of rows that run side by side: they share tiles of W in L2


@triton.jit
def _operand(codes, KIND: tl.constexpr):
    if KIND == FP8:
        value = codes.to(tl.float8e4nv, bitcast=True)
    elif KIND == FP8_AS_HALF:
        value = decode(codes, tl.float16, FP8_BYTES)
    else:
        value = codes
    return value


@triton.jit(do_not_specialize=("m", "n", "scale_rows", "scale_stride", "groups"))
def _rounded_gemm_kernel(
    x_ptr, x_scale_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, stride_k, m, n, k, scale_rows,
    scale_stride, groups, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    KIND: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y of BLOCK_M rows of x and BLOCK_N rows of W, both of k codes, stride_k apart.

    The scale of row j of W (and of group g) is number j // scale_rows * scale_stride (+ g); that of
    row i of x, i * groups (+ g). WHOLE: BLOCK_K divides k.
    """
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    band = pid // (ORDER_M * blocks_n)
    high = tl.minimum(blocks_m - band * ORDER_M, ORDER_M)
    first_m = (band * ORDER_M + pid % (ORDER_M * blocks_n) % high) * BLOCK_M
    first_n = pid % (ORDER_M * blocks_n) // high * BLOCK_N
    rows, outs = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    # Rows past the end are read from the first one and never stored: no mask in the loop.
    safe_m, safe_n = tl.where(rows < m, rows, 0), tl.where(outs < n, outs, 0)
    cols = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + safe_m.to(tl.int64)[:, None] * stride_k + cols[None, :]
    w_ptrs = w_ptr + safe_n.to(tl.int64)[None, :] * stride_k + cols[:, None]
    scale_at = (safe_n // scale_rows).to(tl.int64) * scale_stride
    x_scale_at = safe_m.to(tl.int64) * groups
    if KIND == INT8:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_k in tl.range(0, k, BLOCK_K):
        if WHOLE:
            x, w = tl.load(x_ptrs + first_k), tl.load(w_ptrs + first_k)
        else:
            inside = first_k + cols < k
            x = tl.load(x_ptrs + first_k, mask=inside[None, :], other=0)
            w = tl.load(w_ptrs + first_k, mask=inside[:, None], other=0)
        x, w = _operand(x, KIND), _operand(w, KIND)
        if KIND == INT8:
            acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        elif GROUPS:
            group = first_k // GROUP
            scale = tl.load(scale_ptr + scale_at + group)[None, :]
            scale *= tl.load(x_scale_ptr + x_scale_at + group)[:, None]
            acc += tl.dot(x, w) * scale
        else:
            # Hopper adds fp8 products with 14 bits: their sums leave it every BLOCK_K columns.
            acc = tl.dot(x, w, acc, max_num_imprecise_acc=BLOCK_K)
    y = acc.to(tl.float32)
    if not GROUPS:
        y = y * tl.load(scale_ptr + scale_at)[None, :] * tl.load(x_scale_ptr + x_scale_at)[:, None]
    if BIAS:
        y += tl.load(bias_ptr + safe_n).to(tl.float32)[None, :]
    ptrs = y_ptr + rows.to(tl.int64)[:, None] * n + outs[None, :]
    tl.store(ptrs, y.to(y_ptr.dtype.element_ty), mask=(rows < m)[:, None] & (outs < n)[None, :])
