"""Products of two quantized operands: fp8 at twice the rate of bf16, int8 exactly."""

from ...._backends.nki import nisa, nki, nl
from .tiles import ROWS, WIDTH, load_columns, pieces, turn

# 127 * 127 * 1024 < 2^24: a sum of so many products of int8 is exact in fp32.
EXACT = 1024


@nki.jit
def fp8_matmul(a_hbm, b_hbm, scale):
    """y = scale * a^T b, two rows of the contraction in one cycle (double-row mode).

    Args: a_hbm (K, M), b_hbm (K, N) float8_e4m3 or float8_e5m2, K even; scale: a number.
    Returns: y (M, N) bf16.
    Notes: gen3 and later; on trn2 the largest e4m3 value is 240.
    """
    size, rows = a_hbm.shape
    columns = b_hbm.shape[1]
    y_hbm = nl.ndarray((rows, columns), dtype=nl.bfloat16, buffer=nl.shared_hbm)
    for m0, count in pieces(rows, ROWS):
        for n0, width in pieces(columns, WIDTH):
            sum_psum = nl.ndarray((count, width), dtype=nl.float32, buffer=nl.psum)
            for i, (at, part) in enumerate(pieces(size // 2, ROWS)):
                a_sb = load_pairs(a_hbm, at, part, m0, count)
                b_sb = load_pairs(b_hbm, at, part, n0, width)
                nisa.nc_matmul(dst=sum_psum, stationary=a_sb, moving=b_sb, accumulate=i > 0,
                               perf_mode=nisa.matmul_perf_mode.double_row)  # fmt: skip
            y_sb = nl.ndarray((count, width), dtype=nl.bfloat16, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=y_sb, data=sum_psum, op0=nl.multiply, operand0=scale)
            nisa.dma_copy(dst=y_hbm[m0 : m0 + count, n0 : n0 + width], src=y_sb)
    return y_hbm


def load_pairs(x_hbm, at, part, start, width):
    """Rows 2 at ... of x as (part, 2, width): a pair of them on each partition."""
    total = x_hbm.shape[1]
    x_sb = nl.ndarray((part, 2, width), dtype=x_hbm.dtype, buffer=nl.sbuf)
    source = x_hbm.ap(pattern=[[2 * total, part], [total, 2], [1, width]],
                      offset=2 * at * total + start)  # fmt: skip
    nisa.dma_copy(dst=x_sb, src=source)
    return x_sb


@nki.jit
def w8a8_matmul(x_hbm, w_hbm, x_scale_hbm, w_scale_hbm):
    """y = (x w^T) * x_scale * w_scale, int8 by int8: every sum of 1024 products is exact.

    Args: x_hbm (M, K), w_hbm (N, K) int8; x_scale_hbm (1, M), w_scale_hbm (1, N) fp32.
    Returns: y (M, N) fp32.
    Notes: gen2 and later. The tensor engine has no int8: codes go through it as bf16, which holds
        them exactly; the sums of 1024 are added in fp32.
    """
    rows, size = x_hbm.shape
    columns = w_hbm.shape[0]
    y_hbm = nl.ndarray((rows, columns), dtype=nl.float32, buffer=nl.shared_hbm)
    x_scale_sb = load_columns(x_scale_hbm, rows)
    for n0, width in pieces(columns, ROWS):
        w_turned = codes_turned(w_hbm, n0, width)
        scale_sb = nl.ndarray((ROWS, width), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=scale_sb, src=w_scale_hbm.ap(pattern=[[0, ROWS], [1, width]], offset=n0))
        for t, (m0, count) in enumerate(pieces(rows, ROWS)):
            x_turned = codes_turned(x_hbm, m0, count)
            y_sb = nl.ndarray((count, width), dtype=nl.float32, buffer=nl.sbuf)
            for g, (first, tiles) in enumerate(pieces(len(x_turned), EXACT // ROWS)):
                sum_psum = nl.ndarray((count, width), dtype=nl.float32, buffer=nl.psum)
                for i in range(first, first + tiles):
                    nisa.nc_matmul(dst=sum_psum, stationary=x_turned[i], moving=w_turned[i],
                                   accumulate=i > first)  # fmt: skip
                if g == 0:
                    nisa.tensor_copy(dst=y_sb, src=sum_psum)
                else:
                    nisa.tensor_tensor(dst=y_sb, data1=y_sb, data2=sum_psum, op=nl.add)
            nisa.scalar_tensor_tensor(dst=y_sb, data=y_sb, op0=nl.multiply,
                                      operand0=x_scale_sb[0:count, t : t + 1], op1=nl.multiply,
                                      operand1=scale_sb[0:count, :])  # fmt: skip
            nisa.dma_copy(dst=y_hbm[m0 : m0 + count, n0 : n0 + width], src=y_sb)
    return y_hbm


def codes_turned(x_hbm, start, count):
    """x[start : start + count]^T in bf16, in tiles of 128 of its columns."""
    size = x_hbm.shape[1]
    codes_sb = nl.ndarray((count, size), dtype=x_hbm.dtype, buffer=nl.sbuf)
    plain_sb = nl.ndarray((count, size), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.dma_copy(dst=codes_sb, src=x_hbm[start : start + count, :])
    nisa.tensor_copy(dst=plain_sb, src=codes_sb)
    found = []
    for at, part in pieces(size, ROWS):
        turned_sb = nl.ndarray((part, count), dtype=nl.bfloat16, buffer=nl.sbuf)
        turn(turned_sb, plain_sb[:, at : at + part], count, part, nl.bfloat16, nisa.engine.scalar)
        found.append(turned_sb)
    return found
