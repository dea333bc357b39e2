"""int8, fp8 and nf4 codes; rows (or blocks) on partitions, two passes: absmax, then codes."""

from ...._backends.nki import nisa, nki, nl

ROWS = 128
CHUNK = 4096
# Below it 127 / absmax leaves fp32, so that the row is first multiplied by 2^64, which is exact.
TINY_ROW = 2.0**-119
LIFT = 2.0**64
FLOOR = 2.0**-90
ABSMAX_FLOOR = 1e-38
FP8_MAX = 240.0


def pieces(total, size):
    found = []
    for offset in range(0, total, size):
        found.append((offset, min(size, total - offset)))
    return found


def new(rows, columns, dtype=nl.float32):
    return nl.ndarray((rows, columns), dtype=dtype, buffer=nl.sbuf)


@nki.jit
def rows_quantize(x_hbm, gamma_hbm, has_norm, eps, fp8):
    """(codes, absmax) of each row, of the RMS-normalised row with has_norm.

    Args: x_hbm (R, K) fp32, bf16 or fp16; gamma_hbm (1, K) fp32, read if has_norm; eps of the norm.
    Returns: codes (R, K) int8, or float8_e4m3 up to +-240 with fp8; absmax (R, 1) fp32.
    Notes: gen2 and later. int8 multiplies by (1 / absmax) * 127, rounded twice, as the reference.
    """
    rows, size = x_hbm.shape
    kind = nl.float8_e4m3 if fp8 else nl.int8
    codes_hbm = nl.ndarray((rows, size), dtype=kind, buffer=nl.shared_hbm)
    absmax_hbm = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    for r0, count in pieces(rows, ROWS):
        rate_sb = new(count, 1)
        if has_norm:
            norm_rate(rate_sb, x_hbm, r0, count, eps)
        absmax_sb = new(count, 1)
        nisa.memset(dst=absmax_sb, value=0.0)
        for at, width in pieces(size, CHUNK):
            y_sb = load(x_hbm, gamma_hbm, has_norm, rate_sb, r0, count, at, width)
            size_sb = new(count, width)
            part_sb = new(count, 1)
            nisa.activation(dst=size_sb, op=nl.abs, data=y_sb)
            nisa.tensor_reduce(dst=part_sb, op=nl.maximum, data=size_sb, axis=1)
            nisa.tensor_tensor(dst=absmax_sb, data1=absmax_sb, data2=part_sb, op=nl.maximum)
        nisa.dma_copy(dst=absmax_hbm[r0 : r0 + count, :], src=absmax_sb)
        lift_sb, factor_sb = factors(absmax_sb, count, FP8_MAX if fp8 else 127.0)
        for at, width in pieces(size, CHUNK):
            y_sb = load(x_hbm, gamma_hbm, has_norm, rate_sb, r0, count, at, width)
            codes_sb = new(count, width, kind)
            if fp8:
                nisa.tensor_scalar(dst=y_sb, data=y_sb, op0=nl.multiply, operand0=lift_sb,
                                   op1=nl.multiply, operand1=factor_sb)  # fmt: skip
                nisa.tensor_scalar(dst=codes_sb, data=y_sb, op0=nl.minimum, operand0=FP8_MAX,
                                   op1=nl.maximum, operand1=-FP8_MAX)  # fmt: skip
            else:
                nisa.tensor_scalar(dst=codes_sb, data=y_sb, op0=nl.multiply, operand0=lift_sb,
                                   op1=nl.multiply, operand1=factor_sb)  # fmt: skip
            nisa.dma_copy(dst=codes_hbm[r0 : r0 + count, at : at + width], src=codes_sb)
    return codes_hbm, absmax_hbm


def factors(absmax_sb, count, limit):
    """2^64 for a tiny row, else 1; and limit / (absmax * that), finite for a row of zeros too."""
    lift_sb, factor_sb = new(count, 1), new(count, 1)
    nisa.tensor_scalar(dst=lift_sb, data=absmax_sb, op0=nl.less, operand0=TINY_ROW,
                       op1=nl.multiply, operand1=LIFT)  # fmt: skip
    nisa.tensor_scalar(dst=lift_sb, data=lift_sb, op0=nl.maximum, operand0=1.0)
    nisa.tensor_tensor(dst=factor_sb, data1=absmax_sb, data2=lift_sb, op=nl.multiply)
    nisa.tensor_scalar(dst=factor_sb, data=factor_sb, op0=nl.maximum, operand0=FLOOR)
    nisa.reciprocal(dst=factor_sb, data=factor_sb)
    nisa.tensor_scalar(dst=factor_sb, data=factor_sb, op0=nl.multiply, operand0=limit)
    return lift_sb, factor_sb


def norm_rate(rate_sb, x_hbm, r0, count, eps):
    """1 / sqrt(mean of squares + eps)."""
    size = x_hbm.shape[1]
    total_sb, eps_sb = new(count, 1), new(count, 1)
    nisa.memset(dst=total_sb, value=0.0)
    nisa.memset(dst=eps_sb, value=eps)
    for at, width in pieces(size, CHUNK):
        x_sb = new(count, width, x_hbm.dtype)
        square_sb, part_sb = new(count, width), new(count, 1)
        nisa.dma_copy(dst=x_sb, src=x_hbm[r0 : r0 + count, at : at + width])
        nisa.activation(dst=square_sb, op=nl.square, data=x_sb, reduce_op=nl.add,
                        reduce_res=part_sb, reduce_cmd=nisa.reduce_cmd.reset_reduce)  # fmt: skip
        nisa.tensor_tensor(dst=total_sb, data1=total_sb, data2=part_sb, op=nl.add)
    nisa.activation(dst=rate_sb, op=nl.rsqrt, data=total_sb, bias=eps_sb, scale=1.0 / size)


def load(x_hbm, gamma_hbm, has_norm, rate_sb, r0, count, at, width):
    """A chunk of rows in fp32, normalised with has_norm."""
    x_sb = new(count, width, x_hbm.dtype)
    y_sb = new(count, width)
    nisa.dma_copy(dst=x_sb, src=x_hbm[r0 : r0 + count, at : at + width])
    if not has_norm:
        nisa.tensor_copy(dst=y_sb, src=x_sb)
        return y_sb
    gamma_sb = new(count, width)
    nisa.dma_copy(dst=gamma_sb, src=gamma_hbm.ap(pattern=[[0, count], [1, width]], offset=at))
    nisa.scalar_tensor_tensor(dst=y_sb, data=x_sb, op0=nl.multiply, operand0=rate_sb,
                              op1=nl.multiply, operand1=gamma_sb)  # fmt: skip
    return y_sb


@nki.jit
def nf4_quantize(x_hbm, book_hbm, block):
    """(codes, absmax) of blocks: a code is the count of the book's midpoints below x / absmax.

    Args: x_hbm (R, B * block) fp32, bf16 or fp16; book_hbm (1, 16) fp32.
    Returns: codes (R, B * block / 2) uint8, the even element in the high nibble; absmax (R, B).
    """
    rows, size = x_hbm.shape
    blocks = size // block
    codes_hbm = nl.ndarray((rows, size // 2), dtype=nl.uint8, buffer=nl.shared_hbm)
    absmax_hbm = nl.ndarray((rows, blocks), dtype=nl.float32, buffer=nl.shared_hbm)
    book_sb = new(ROWS, 16)
    middle_sb = new(ROWS, 15)
    nisa.dma_copy(dst=book_sb, src=book_hbm.ap(pattern=[[0, ROWS], [1, 16]], offset=0))
    nisa.tensor_tensor(dst=middle_sb, data1=book_sb[:, 0:15], data2=book_sb[:, 1:16], op=nl.add)
    nisa.tensor_scalar(dst=middle_sb, data=middle_sb, op0=nl.multiply, operand0=0.5)
    for r0, count in pieces(rows, ROWS):
        x_sb, y_sb = new(count, size, x_hbm.dtype), new(count, size)
        absmax_sb, over_sb = new(count, blocks), new(count, blocks)
        nisa.dma_copy(dst=x_sb, src=x_hbm[r0 : r0 + count, :])
        nisa.activation(dst=y_sb, op=nl.abs, data=x_sb)
        nisa.tensor_reduce(dst=absmax_sb, op=nl.maximum, data=y_sb.reshape((count, blocks, block)),
                           axis=2)  # fmt: skip
        nisa.dma_copy(dst=absmax_hbm[r0 : r0 + count, :], src=absmax_sb)
        nisa.tensor_scalar(dst=over_sb, data=absmax_sb, op0=nl.maximum, operand0=ABSMAX_FLOOR)
        nisa.reciprocal(dst=over_sb, data=over_sb)
        nisa.tensor_tensor(dst=y_sb.reshape((count, blocks, block)),
                           data1=x_sb.reshape((count, blocks, block)),
                           data2=over_sb.reshape((count, blocks, 1)).broadcast(2, block),
                           op=nl.multiply)  # fmt: skip
        codes_sb = new(count, size)
        nisa.memset(dst=codes_sb, value=0.0, engine=nisa.engine.gpsimd)
        for i in range(15):
            nisa.scalar_tensor_tensor(dst=codes_sb, data=y_sb, op0=nl.greater,
                                      operand0=middle_sb[0:count, i : i + 1], op1=nl.add,
                                      operand1=codes_sb)  # fmt: skip
        pairs = codes_sb.reshape((count, size // 2, 2))
        packed_sb = new(count, size // 2, nl.uint8)
        nisa.scalar_tensor_tensor(dst=packed_sb, data=pairs[:, :, 0], op0=nl.multiply,
                                  operand0=16.0, op1=nl.add, operand1=pairs[:, :, 1])  # fmt: skip
        nisa.dma_copy(dst=codes_hbm[r0 : r0 + count, :], src=packed_sb)
    return codes_hbm, absmax_hbm


@nki.jit
def rows_dequantize(codes_hbm, scale_hbm, book_hbm, nf4, like_hbm):
    """code * scale of each row; nf4: book[code] * scale, two codes a byte.

    Args: codes_hbm (R, C) int8, or uint8 with nf4; scale_hbm (R, 1) fp32; book_hbm (1, 16) fp32;
        like_hbm: a tensor of the type that is wanted.
    Returns: (R, C), or (R, 2 C) with nf4. The book is looked up by GpSimd, exactly.
    """
    rows, size = codes_hbm.shape
    each = 2 if nf4 else 1
    out_hbm = nl.ndarray((rows, each * size), dtype=like_hbm.dtype, buffer=nl.shared_hbm)
    book_sb = new(ROWS, 16)
    nisa.dma_copy(dst=book_sb, src=book_hbm.ap(pattern=[[0, ROWS], [1, 16]], offset=0))
    for r0, count in pieces(rows, ROWS):
        scale_sb = new(count, 1)
        nisa.dma_copy(dst=scale_sb, src=scale_hbm[r0 : r0 + count, :])
        for at, width in pieces(size, CHUNK // 2):
            codes_sb = new(count, width, codes_hbm.dtype)
            nisa.dma_copy(dst=codes_sb, src=codes_hbm[r0 : r0 + count, at : at + width])
            values_sb = codes_sb
            if nf4:
                index_sb = new(count, 2 * width, nl.uint32)
                nibble_sb = new(count, 2 * width, nl.uint8)
                pairs = nibble_sb.reshape((count, width, 2))
                nisa.tensor_scalar(dst=pairs[:, :, 0], data=codes_sb, op0=nl.right_shift,
                                   operand0=4)  # fmt: skip
                nisa.tensor_scalar(dst=pairs[:, :, 1], data=codes_sb, op0=nl.bitwise_and,
                                   operand0=15)  # fmt: skip
                nisa.tensor_copy(dst=index_sb, src=nibble_sb)
                values_sb = new(count, 2 * width)
                nisa.nc_n_gather(dst=values_sb, data=book_sb[0:count, :], indices=index_sb)
            out_sb = new(count, each * width, like_hbm.dtype)
            nisa.tensor_scalar(dst=out_sb, data=values_sb, op0=nl.multiply, operand0=scale_sb)
            nisa.dma_copy(dst=out_hbm[r0 : r0 + count, each * at : each * (at + width)], src=out_sb)
    return out_hbm
