"""What the quant_matmul kernels share: transposes and the decoding of a tile of the weight."""

from ...._backends.nki import nisa, nl

ROWS = 128
WIDTH = 512  # columns of a product: one PSUM bank of fp32
CHUNK = 2048  # elements of a row that are decoded at a time


def pieces(total, size):
    """(offset, length) of the pieces of `total`, each up to `size` long."""
    found = []
    offset = 0
    while offset < total:
        found.append((offset, min(size, total - offset)))
        offset = offset + size
    return found


def load_columns(row_hbm, total):
    """A vector (1, total) with its elements on partitions: (128, pieces), piece i in column i.

    Read as rows of 128, which DMA likes, and turned by the tensor engine.
    """
    found = pieces(total, ROWS)
    columns_sb = nl.ndarray((ROWS, len(found)), dtype=nl.float32, buffer=nl.sbuf)
    whole = total // ROWS
    for start, count in pieces(whole, ROWS):
        rows_sb = nl.ndarray((count, ROWS), dtype=nl.float32, buffer=nl.sbuf)
        source = row_hbm.ap(pattern=[[ROWS, count], [1, ROWS]], offset=start * ROWS)
        nisa.dma_copy(dst=rows_sb, src=source)
        turn(columns_sb[:, start : start + count], rows_sb, count, ROWS, nl.float32)
    rest = total - whole * ROWS
    if rest > 0:
        row_sb = nl.ndarray((1, rest), dtype=nl.float32, buffer=nl.sbuf)
        source = row_hbm.ap(pattern=[[1, 1], [1, rest]], offset=whole * ROWS)
        nisa.dma_copy(dst=row_sb, src=source)
        turn(columns_sb[0:rest, whole : whole + 1], row_sb, 1, rest, nl.float32)
    return columns_sb


def turn(dst, src, rows, columns, dtype, engine=nisa.engine.vector):
    """dst (columns, rows) = src (rows, columns)^T, through PSUM."""
    turned_psum = nl.ndarray((columns, rows), dtype=dtype, buffer=nl.psum)
    nisa.nc_transpose(dst=turned_psum, data=src, engine=nisa.engine.tensor)
    nisa.tensor_copy(dst=dst, src=turned_psum, engine=engine)


def load_turned(x_hbm, m0, count, size, stride=1, phase=0):
    """x[m0 : m0 + count, phase::stride]^T as (128, pieces, count), `size` elements in all.

    The same type as x; piece i holds elements i * 128 ...
    """
    width = x_hbm.shape[1]
    found = pieces(size, ROWS)
    held = nl.ndarray((ROWS, len(found), count), dtype=x_hbm.dtype, buffer=nl.sbuf)
    for start, rows in pieces(count, ROWS):
        for i in range(len(found)):
            at, columns = found[i]
            x_sb = nl.ndarray((rows, columns, stride), dtype=x_hbm.dtype, buffer=nl.sbuf)
            source = x_hbm.ap(pattern=[[width, rows], [1, columns * stride]],
                              offset=(m0 + start) * width + at * stride)  # fmt: skip
            nisa.dma_copy(dst=x_sb.reshape((rows, columns * stride)), src=source)
            turn(held[0:columns, i, start : start + rows], x_sb[:, :, phase], rows, columns,
                 x_hbm.dtype)  # fmt: skip
    return held


def decode_tile(form, codes_hbm, scale_hbm, zero_hbm, table_sb, n0, rows, k0, count, dtype):
    """w[n0 : n0 + rows, k0 : k0 + count] in `dtype`: (code or table[code] - zero) * scale.

    form: (bits, high nibble first, elements of a row that share a scale (0: all),
        uses table, has zero).
    """
    bits, high_first, share, uses_table, has_zero = form
    per_byte = 8 // bits
    row_bytes = codes_hbm.shape[1]
    packed_sb = nl.ndarray((rows, count // per_byte), dtype=codes_hbm.dtype, buffer=nl.sbuf)
    source = codes_hbm.ap(pattern=[[row_bytes, rows], [1, count // per_byte]],
                          offset=n0 * row_bytes + k0 // per_byte)  # fmt: skip
    nisa.dma_copy(dst=packed_sb, src=source)
    codes_sb = packed_sb
    if bits == 4:
        codes_sb = nl.ndarray((rows, count), dtype=nl.uint8, buffer=nl.sbuf)
        pairs = codes_sb.reshape((rows, count // 2, 2))
        first, second = (0, 1) if high_first else (1, 0)
        nisa.tensor_scalar(dst=pairs[:, :, first], data=packed_sb, op0=nl.right_shift, operand0=4)
        nisa.tensor_scalar(dst=pairs[:, :, second], data=packed_sb, op0=nl.bitwise_and,
                           operand0=15)  # fmt: skip
    values_sb = nl.ndarray((rows, count), dtype=nl.float32, buffer=nl.sbuf)
    if uses_table:
        index_sb = nl.ndarray((rows, count), dtype=nl.uint32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=index_sb, src=codes_sb)
        nisa.nc_n_gather(dst=values_sb, data=table_sb[0:rows, :], indices=index_sb)
    else:
        nisa.tensor_copy(dst=values_sb, src=codes_sb)
    first, groups = 0, 1
    if share == 0:
        share = count
    else:
        first, groups = k0 // share, count // share
    shared = values_sb.reshape((rows, groups, share))
    if has_zero:
        zero_sb = load_shared(zero_hbm, n0, rows, first, groups)
        nisa.tensor_tensor(dst=shared, data1=shared, data2=zero_sb.broadcast(2, share),
                           op=nl.subtract)  # fmt: skip
    scale_sb = load_shared(scale_hbm, n0, rows, first, groups)
    w_sb = nl.ndarray((rows, count), dtype=dtype, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=w_sb.reshape((rows, groups, share)), data1=shared,
                       data2=scale_sb.broadcast(2, share), op=nl.multiply)  # fmt: skip
    return w_sb


def load_shared(values_hbm, n0, rows, first, count):
    """(rows, count, 1) of a (N, groups) fp32 tensor."""
    groups = values_hbm.shape[1]
    held = nl.ndarray((rows, count), dtype=nl.float32, buffer=nl.sbuf)
    source = values_hbm.ap(pattern=[[groups, rows], [1, count]], offset=n0 * groups + first)
    nisa.dma_copy(dst=held, src=source)
    return held.reshape((rows, count, 1))


def load_table(table_hbm):
    """The code book on every partition."""
    size = table_hbm.shape[1]
    table_sb = nl.ndarray((ROWS, size), dtype=table_hbm.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=table_sb, src=table_hbm.ap(pattern=[[0, ROWS], [1, size]], offset=0))
    return table_sb
