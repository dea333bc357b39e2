"""int8 weights at the rate of HBM: decoded two at a time by bit operations on 16-bit words."""

from ...._backends.nki import nisa, nki, nl
from .tiles import ROWS, WIDTH, load_columns, load_turned, pieces, turn

# A byte u = q + 128 under the exponent of 1024 is the float16 1024 + u, exactly.
EXPONENT = 0x6400
OFFSET = 1024.0 + 128.0


@nki.jit
def int8_matmul(x_hbm, words_hbm, scale_hbm, bias_hbm, has_bias):
    """y = x W^T * scale + bias, W int8.

    Dimensions: M rows of x, N and K (even) of the weight.
    Args:
        x_hbm (M, K) bf16, fp16 or fp32; words_hbm (N, K / 2) uint16, W's bytes;
        scale_hbm (1, N) fp32; bias_hbm (1, N) fp32, read if has_bias.
    Returns: y (M, N) of x's type.
    Notes: gen3 and later. DMA turns the words, so that pairs of k lie on partitions: the low bytes
        meet the even elements of x, the high bytes the odd ones; 512 rows of W at once, because an
        instruction takes 64 cycles at least. Half types multiply
        1152 + q and take 1152 sum(x) off the fp32 sum; fp32 takes it off the codes, for exactness.
    """
    rows = x_hbm.shape[0]
    columns, words = words_hbm.shape
    exact = x_hbm.dtype == nl.float32
    y_hbm = nl.ndarray((rows, columns), dtype=x_hbm.dtype, buffer=nl.shared_hbm)
    scale_sb = load_columns(scale_hbm, columns)
    bias_sb = scale_sb
    if has_bias:
        bias_sb = load_columns(bias_hbm, columns)
    for m0, count in pieces(rows, WIDTH):
        even = load_turned(x_hbm, m0, count, words, 2, 0)
        odd = load_turned(x_hbm, m0, count, words, 2, 1)
        shift_sb = scale_sb
        if not exact:
            shift_sb = sums(even, odd, words, count, x_hbm.dtype)
        y_rows = []
        for _, part in pieces(count, ROWS):
            y_rows.append(nl.ndarray((part, columns), dtype=x_hbm.dtype, buffer=nl.sbuf))
        for n0, width in pieces(columns, WIDTH):
            parts = pieces(width, ROWS)
            sums_psum = []
            for _, own in parts:
                sums_psum.append(nl.ndarray((own, count), dtype=nl.float32, buffer=nl.psum))
            for i, (at, part) in enumerate(pieces(words, ROWS)):
                low, high = decode_words(words_hbm, n0, width, at, part, exact)
                for s, (first, own) in enumerate(parts):
                    nisa.nc_matmul(dst=sums_psum[s], stationary=low[:, first : first + own],
                                   moving=even[0:part, i, :], accumulate=i > 0)  # fmt: skip
                    nisa.nc_matmul(dst=sums_psum[s], stationary=high[:, first : first + own],
                                   moving=odd[0:part, i, :], accumulate=True)  # fmt: skip
            for s, (first, own) in enumerate(parts):
                y_sb = nl.ndarray((own, count), dtype=nl.float32, buffer=nl.sbuf)
                t = n0 // ROWS + s
                finish(y_sb, sums_psum[s], shift_sb, scale_sb, bias_sb, t, own, exact, has_bias)
                for j, (start, part) in enumerate(pieces(count, ROWS)):
                    turn(y_rows[j][:, n0 + first : n0 + first + own],
                         y_sb[:, start : start + part], own, part, nl.float32,
                         nisa.engine.scalar)  # fmt: skip
        for j, (start, part) in enumerate(pieces(count, ROWS)):
            nisa.dma_copy(dst=y_hbm[m0 + start : m0 + start + part, :], src=y_rows[j])
    return y_hbm


def decode_words(words_hbm, n0, width, at, part, exact):
    """W^T of `part` words and `width` rows: the low bytes and the high ones, (part, width)."""
    total = words_hbm.shape[1]
    words_sb = nl.ndarray((part, width), dtype=nl.uint16, buffer=nl.sbuf)
    source = words_hbm.ap(pattern=[[total, width], [1, part]], offset=n0 * total + at)
    nisa.dma_transpose(dst=words_sb, src=source, axes=(1, 0))
    found = []
    for high in range(2):
        bits_sb = nl.ndarray((part, width), dtype=nl.uint16, buffer=nl.sbuf)
        # The sign bit of the byte turns q into q + 128.
        nisa.tensor_scalar(dst=bits_sb, data=words_sb,
                           op0=nl.right_shift if high else nl.bitwise_and,
                           operand0=8 if high else 0x00FF,
                           op1=nl.bitwise_xor, operand1=EXPONENT | 0x80)  # fmt: skip
        codes = bits_sb.view(nl.float16)
        if exact:
            codes = nl.ndarray((part, width), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=codes, data=bits_sb.view(nl.float16), op0=nl.subtract,
                               operand0=OFFSET)  # fmt: skip
        found.append(codes)
    return found[0], found[1]


def sums(even, odd, words, count, dtype):
    """OFFSET * sum of x over k, on every partition: (128, count)."""
    ones_sb = nl.ndarray((ROWS, ROWS), dtype=dtype, buffer=nl.sbuf)
    nisa.memset(dst=ones_sb, value=OFFSET)
    sum_psum = nl.ndarray((ROWS, count), dtype=nl.float32, buffer=nl.psum)
    for i, (_, part) in enumerate(pieces(words, ROWS)):
        nisa.nc_matmul(dst=sum_psum, stationary=ones_sb[0:part, :], moving=even[0:part, i, :],
                       accumulate=i > 0)  # fmt: skip
        nisa.nc_matmul(dst=sum_psum, stationary=ones_sb[0:part, :], moving=odd[0:part, i, :],
                       accumulate=True)  # fmt: skip
    sum_sb = nl.ndarray((ROWS, count), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=sum_sb, src=sum_psum)
    return sum_sb


def finish(y_sb, sum_psum, shift_sb, scale_sb, bias_sb, t, width, exact, has_bias):
    """y = (sum - shift) * scale + bias, the scale of a row on its partition."""
    source = sum_psum
    if not exact:
        nisa.tensor_tensor(dst=y_sb, data1=sum_psum, data2=shift_sb[0:width, :], op=nl.subtract)
        source = y_sb
    if has_bias:
        nisa.tensor_scalar(dst=y_sb, data=source, op0=nl.multiply,
                           operand0=scale_sb[0:width, t : t + 1], op1=nl.add,
                           operand1=bias_sb[0:width, t : t + 1])  # fmt: skip
    else:
        nisa.tensor_scalar(dst=y_sb, data=source, op0=nl.multiply,
                           operand0=scale_sb[0:width, t : t + 1])  # fmt: skip
