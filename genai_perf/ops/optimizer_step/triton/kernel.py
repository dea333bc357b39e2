"""One program for ROWS blocks of a parameter: moments decoded, the step, moments encoded again."""

import triton
import triton.language as tl

COUNTS = ("n",)


@triton.jit
def nearest_code(t, bound_ptr):
    """How many of the 255 bounds lie below t: the 256th, +inf, never does."""
    code = tl.zeros(t.shape, tl.int32)
    for step in tl.static_range(8):
        half = 128 >> step
        code += tl.where(t > tl.load(bound_ptr + code + (half - 1)), half, 0)
    return code


@triton.jit
def read(moment_ptr, scale, value_ptr, at, inside, QUANTIZED: tl.constexpr):
    held = tl.load(moment_ptr + at, mask=inside, other=0)
    if QUANTIZED:
        held = tl.load(value_ptr + held.to(tl.int32)) * scale[:, None]
        held = tl.where(inside, held, 0.0)
    return held


@triton.jit
def write(values, moment_ptr, scale_ptr, bound_ptr, at, inside, block, exists,
          SIGNED: tl.constexpr, QUANTIZED: tl.constexpr):  # fmt: skip
    if QUANTIZED:
        values = tl.where(inside, values, 0.0)
        absmax = tl.max(tl.abs(values), 1)
        tl.store(scale_ptr + block, absmax, mask=exists)
        # As tensors: a bare 1e-38, below the smallest normal fp32, would be taken for fp64.
        one, floor = (
            tl.full(absmax.shape, 1.0, tl.float32),
            tl.full(absmax.shape, 1e-38, tl.float32),
        )
        inverse = tl.div_rn(one, tl.maximum(absmax, floor))
        low: tl.constexpr = -1.0 if SIGNED else 0.0
        t = tl.minimum(tl.maximum(values * inverse[:, None], low), 1.0)
        code = nearest_code(t, bound_ptr)
        if not SIGNED:
            code = tl.maximum(code, (values > 0).to(tl.int32))
        tl.store(moment_ptr + at, code.to(tl.uint8), mask=inside)
    else:
        tl.store(moment_ptr + at, values, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _optimizer_step_kernel(
    p_ptr, grad_ptr, first_ptr, second_ptr, first_scale_ptr, second_scale_ptr,
    signed_value_ptr, signed_bound_ptr, unsigned_value_ptr, unsigned_bound_ptr, n,
    keep1, take1, keep2, take2, decay, rate, unbias, eps,
    ADAMW: tl.constexpr, QUANTIZED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (ROWS, BLOCK)
    inside, exists = at < n, block * BLOCK < n
    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
    first_scale, second_scale = g, g
    if QUANTIZED:
        first_scale = tl.load(first_scale_ptr + block, mask=exists, other=0.0)
    m = read(first_ptr, first_scale, signed_value_ptr, at, inside, QUANTIZED)
    if ADAMW:
        if QUANTIZED:
            second_scale = tl.load(second_scale_ptr + block, mask=exists, other=0.0)
        v = read(second_ptr, second_scale, unsigned_value_ptr, at, inside, QUANTIZED)
        m = m * keep1 + g * take1
        v = v * keep2 + (g * g) * take2
        change = tl.div_rn(m * rate, tl.sqrt_rn(v) * unbias + eps)
        write(v, second_ptr, second_scale_ptr, unsigned_bound_ptr, at, inside, block, exists,
              False, QUANTIZED)  # fmt: skip
    else:
        mixed = m * keep1 + g * take1
        change = ((mixed > 0).to(tl.float32) - (mixed < 0).to(tl.float32)) * rate
        m = m * keep2 + g * take2
    tl.store(p_ptr + at, (p * decay - change).to(p_ptr.dtype.element_ty), mask=inside)
    write(m, first_ptr, first_scale_ptr, signed_bound_ptr, at, inside, block, exists,
          True, QUANTIZED)  # fmt: skip
