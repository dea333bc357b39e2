"""Products of two quantized operands: fp8 at twice the rate of bf16, int8 exactly."""

from ...._backends.nki import nisa, nki, nl
from .tiles import ROWS, WIDTH, load_columns, pieces, turn

# 127 * 127 * 1024 < 2^24: a sum of so many products of int8 is exact in fp32.
EXACT = 1024
HELD = 2048  # rows of x whose codes stay in SBUF
TURNED_BYTES = 64 * 1024  # of a partition, for x in bf16


@nki.jit
def fp8_matmul(x_hbm, w_hbm, x_scale_hbm, w_scale_hbm, bias_hbm, like_hbm, has_bias):
    """y = (x w^T) * w_scale * x_scale + bias, two products of e4m3 in one cycle (double-row mode).

    Args: x_hbm (M, K / 2), w_hbm (N, K / 2) uint16, two codes of e4m3 up to 240 each;
        x_scale_hbm (1, M), w_scale_hbm, bias_hbm (1, N) fp32; like_hbm: of the type wanted.
    Returns: y (M, N).
    Notes: gen3 and later. DMA turns the words; the bytes of one are the pair that is summed.
    """
    rows, words = x_hbm.shape
    columns = w_hbm.shape[0]
    y_hbm = nl.ndarray((rows, columns), dtype=like_hbm.dtype, buffer=nl.shared_hbm)
    x_scale_sb = load_columns(x_scale_hbm, rows)
    for m0, count in pieces(rows, HELD):
        x_pairs = load_pairs(x_hbm, m0, count)
        for n0, width in pieces(columns, WIDTH):
            w_pairs = load_pairs(w_hbm, n0, width)
            row = Row(w_scale_hbm, bias_hbm, n0, width, has_bias)
            for start, part in pieces(count, ROWS):
                sum_psum = nl.ndarray((part, width), dtype=nl.float32, buffer=nl.psum)
                for i in range(len(x_pairs)):
                    nisa.nc_matmul(dst=sum_psum, stationary=x_pairs[i][:, :, start : start + part],
                                   moving=w_pairs[i], accumulate=i > 0,
                                   perf_mode=nisa.matmul_perf_mode.double_row)  # fmt: skip
                t = (m0 + start) // ROWS
                row.write(y_hbm, m0 + start, sum_psum, x_scale_sb[0:part, t : t + 1])
    return y_hbm


def load_pairs(words_hbm, start, count):
    """The codes of `count` rows, turned: (words, 2, count) for every 128 words."""
    total = words_hbm.shape[1]
    found = []
    for at, part in pieces(total, ROWS):
        words_sb = nl.ndarray((part, count), dtype=nl.uint16, buffer=nl.sbuf)
        source = words_hbm.ap(pattern=[[total, count], [1, part]], offset=start * total + at)
        nisa.dma_transpose(dst=words_sb, src=source, axes=(1, 0))
        codes = words_sb.view(nl.float8_e4m3).reshape((part, count, 2))
        found.append(codes.permute((0, 2, 1)))
    return found


class Row(nl.NKIObject):
    """Scales and bias of some columns of y, on every partition."""

    def __init__(self, scale_hbm, bias_hbm, n0, width, has_bias):
        self.n0 = n0
        self.scale_sb = load_row(scale_hbm, n0, width)
        self.has_bias = has_bias
        self.bias_sb = self.scale_sb
        if has_bias:
            self.bias_sb = load_row(bias_hbm, n0, width)

    def write(self, y_hbm, m0, sums, x_scale_sb):
        """sums * scale * x_scale + bias."""
        count, width = sums.shape
        y_sb = nl.ndarray((count, width), dtype=nl.float32, buffer=nl.sbuf)
        out_sb = nl.ndarray((count, width), dtype=y_hbm.dtype, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=y_sb, data1=sums, data2=self.scale_sb[0:count, :], op=nl.multiply)
        if self.has_bias:
            nisa.scalar_tensor_tensor(dst=out_sb, data=y_sb, op0=nl.multiply, operand0=x_scale_sb,
                                      op1=nl.add, operand1=self.bias_sb[0:count, :])  # fmt: skip
        else:
            nisa.activation(dst=out_sb, op=nl.copy, data=y_sb, scale=x_scale_sb)
        nisa.dma_copy(dst=y_hbm[m0 : m0 + count, self.n0 : self.n0 + width], src=out_sb)


def load_row(row_hbm, n0, width):
    row_sb = nl.ndarray((ROWS, width), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=row_sb, src=row_hbm.ap(pattern=[[0, ROWS], [1, width]], offset=n0))
    return row_sb


@nki.jit
def w8a8_matmul(x_hbm, w_hbm, x_scale_hbm, w_scale_hbm, bias_hbm, like_hbm, has_bias):
    """y = (x w^T) * w_scale * x_scale + bias, int8 by int8; the sum is that of integers.

    Args: x_hbm (M, K), w_hbm (N, K) int8; x_scale_hbm (1, M), w_scale_hbm, bias_hbm (1, N) fp32;
        like_hbm: a tensor of the type that is wanted.
    Returns: y (M, N).
    Notes: gen2 and later. The tensor engine has no int8: codes go through it as bf16, which holds
        them exactly. Sums of 1024 products are exact in fp32, and are added as int32 by GpSimd.
    """
    rows, size = x_hbm.shape
    columns = w_hbm.shape[0]
    y_hbm = nl.ndarray((rows, columns), dtype=like_hbm.dtype, buffer=nl.shared_hbm)
    x_scale_sb = load_columns(x_scale_hbm, rows)
    together = max(1, TURNED_BYTES // (2 * size)) * ROWS
    for start, many in pieces(rows, together):
        x_turned = []
        for m0, count in pieces(many, ROWS):
            x_turned.append(codes_turned(x_hbm, start + m0, count))
        for n0, width in pieces(columns, ROWS):
            w_turned = codes_turned(w_hbm, n0, width)
            row = Row(w_scale_hbm, bias_hbm, n0, width, has_bias)
            for t in range(len(x_turned)):
                m0 = start + t * ROWS
                count = x_turned[t][0].shape[1]
                sums_sb = integer_sums(x_turned[t], w_turned)
                column = m0 // ROWS
                row.write(y_hbm, m0, sums_sb, x_scale_sb[0:count, column : column + 1])
    return y_hbm


def integer_sums(x_turned, w_turned):
    """(count, width) sums over all tiles in fp32, rounded once from int32."""
    count, width = x_turned[0].shape[1], w_turned[0].shape[1]
    total_sb = nl.ndarray((count, width), dtype=nl.int32, buffer=nl.sbuf)
    for g, (first, tiles) in enumerate(pieces(len(x_turned), EXACT // ROWS)):
        sum_psum = nl.ndarray((count, width), dtype=nl.float32, buffer=nl.psum)
        for i in range(first, first + tiles):
            nisa.nc_matmul(dst=sum_psum, stationary=x_turned[i], moving=w_turned[i],
                           accumulate=i > first)  # fmt: skip
        if g == 0:
            nisa.tensor_copy(dst=total_sb, src=sum_psum)
        else:
            part_sb = nl.ndarray((count, width), dtype=nl.int32, buffer=nl.sbuf)
            nisa.tensor_copy(dst=part_sb, src=sum_psum)
            nisa.tensor_tensor(dst=total_sb, data1=total_sb, data2=part_sb, op=nl.add,
                               engine=nisa.engine.gpsimd)  # fmt: skip
    sums_sb = nl.ndarray((count, width), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=sums_sb, src=total_sb)
    return sums_sb


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
