"""Weights of any format, decoded in SBUF: forward with a transpose of the weight, backward without.

Their cost is that of decoding (a gather on GpSimd for nf4 and fp8), not that of HBM: for many rows.
"""

from ...._backends.nki import nisa, nki, nl
from .tiles import CHUNK, ROWS, WIDTH, decode_tile, load_table, load_turned, pieces, turn


@nki.jit
def decoded_matmul(x_hbm, codes_hbm, scale_hbm, zero_hbm, table_hbm, bias_hbm, form, has_bias):
    """y = x W^T + bias.

    Args:
        x_hbm (M, K) bf16, fp16 or fp32; codes_hbm (N, K bits / 8); scale_hbm, zero_hbm (N, groups)
        fp32; table_hbm (1, codes) fp32; bias_hbm (1, N) fp32; form: see decode_tile.
    Returns: y (M, N) of x's type.
    Notes: W is decoded once for every 512 rows of x, turned by the tensor engine, 128 of N at once.
    """
    rows, size = x_hbm.shape
    columns = codes_hbm.shape[0]
    y_hbm = nl.ndarray((rows, columns), dtype=x_hbm.dtype, buffer=nl.shared_hbm)
    table_sb = load_table(table_hbm)
    for m0, count in pieces(rows, WIDTH):
        x_turned = load_turned(x_hbm, m0, count, size)
        for n0, width in pieces(columns, ROWS):
            w_turned = []
            for k0, length in pieces(size, CHUNK):
                w_sb = decode_tile(form, codes_hbm, scale_hbm, zero_hbm, table_sb, n0, width, k0,
                                   length, x_hbm.dtype)  # fmt: skip
                for at, part in pieces(length, ROWS):
                    turned_sb = nl.ndarray((part, width), dtype=x_hbm.dtype, buffer=nl.sbuf)
                    turn(turned_sb, w_sb[:, at : at + part], width, part, x_hbm.dtype,
                         nisa.engine.scalar)  # fmt: skip
                    w_turned.append(turned_sb)
            for start, part in pieces(count, ROWS):
                sum_psum = nl.ndarray((part, width), dtype=nl.float32, buffer=nl.psum)
                for i in range(len(w_turned)):
                    length = w_turned[i].shape[0]
                    nisa.nc_matmul(dst=sum_psum,
                                   stationary=x_turned[0:length, i, start : start + part],
                                   moving=w_turned[i], accumulate=i > 0)  # fmt: skip
                y_sb = nl.ndarray((part, width), dtype=x_hbm.dtype, buffer=nl.sbuf)
                if has_bias:
                    bias_sb = nl.ndarray((part, width), dtype=nl.float32, buffer=nl.sbuf)
                    nisa.dma_copy(dst=bias_sb, src=bias_hbm.ap(
                        pattern=[[0, part], [1, width]], offset=n0))  # fmt: skip
                    nisa.tensor_tensor(dst=y_sb, data1=sum_psum, data2=bias_sb, op=nl.add)
                else:
                    nisa.tensor_copy(dst=y_sb, src=sum_psum)
                at = m0 + start
                nisa.dma_copy(dst=y_hbm[at : at + part, n0 : n0 + width], src=y_sb)
    return y_hbm


@nki.jit
def decoded_matmul_backward(dy_hbm, codes_hbm, scale_hbm, zero_hbm, table_hbm, size, form):
    """dx = dy W, as decoded_matmul; W is moved as it lies, no transpose.

    Args: dy_hbm (M, N) bf16, fp16 or fp32; size: K.
    Returns: dx (M, K) of dy's type.
    """
    rows, columns = dy_hbm.shape
    dx_hbm = nl.ndarray((rows, size), dtype=dy_hbm.dtype, buffer=nl.shared_hbm)
    table_sb = load_table(table_hbm)
    for m0, count in pieces(rows, ROWS):
        dy_turned = load_turned(dy_hbm, m0, count, columns)
        for k0, length in pieces(size, WIDTH):
            sum_psum = nl.ndarray((count, length), dtype=nl.float32, buffer=nl.psum)
            for i, (n0, width) in enumerate(pieces(columns, ROWS)):
                w_sb = decode_tile(form, codes_hbm, scale_hbm, zero_hbm, table_sb, n0, width, k0,
                                   length, dy_hbm.dtype)  # fmt: skip
                nisa.nc_matmul(dst=sum_psum, stationary=dy_turned[0:width, i, :], moving=w_sb,
                               accumulate=i > 0)  # fmt: skip
            dx_sb = nl.ndarray((count, length), dtype=dy_hbm.dtype, buffer=nl.sbuf)
            nisa.tensor_copy(dst=dx_sb, src=sum_psum)
            nisa.dma_copy(dst=dx_hbm[m0 : m0 + count, k0 : k0 + length], src=dx_sb)
    return dx_hbm
