"""What the attention kernels share: loads, transposes, masks.

Written for NKI 0.3 to 0.7: plain functions, keyword arguments, Python loops over constants.
"""

from ...._backends.nki import nisa, nl
from .geometry import BLOCK, tiles


def head_rows(x_hbm, batch, head, row, count):
    """(count, dim) of x (batch, seqlen, heads, dim): `count` rows of one head."""
    seqlen, heads, dim = x_hbm.shape[1], x_hbm.shape[2], x_hbm.shape[3]
    offset = ((batch * seqlen + row) * heads + head) * dim
    return x_hbm.ap(pattern=[[heads * dim, count], [1, dim]], offset=offset)


def load_rows(x_hbm, batch, head, row, count):
    """The rows of one head in SBUF, rows on partitions."""
    dim = x_hbm.shape[3]
    x_sb = nl.ndarray((count, dim), dtype=x_hbm.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=x_sb, src=head_rows(x_hbm, batch, head, row, count))
    return x_sb


def transpose_into(dst_chunks, column, x_sb, x_psum, count, dim):
    """dst_chunks[c][:, column : column + count] = x_sb[:, chunk c]^T, by the tensor engine.

    dst_chunks: one (up to 128, anything) tile for every 128 of dim; x_psum: (128, 128) scratch.
    """
    for c, (start, size) in enumerate(tiles(0, dim, BLOCK)):
        turned_psum = x_psum[0:size, 0:count]
        nisa.nc_transpose(dst=turned_psum, data=x_sb[0:count, start : start + size],
                          engine=nisa.engine.tensor)  # fmt: skip
        nisa.tensor_copy(dst=dst_chunks[c][0:size, column : column + count], src=turned_psum)


def load_transposed(dst_chunks, column, x_hbm, batch, head, row, count, x_psum):
    """dst_chunks as in transpose_into, from HBM: by DMA, or for fp32 by the tensor engine."""
    dim = x_hbm.shape[3]
    if x_hbm.dtype == nl.float32:
        x_sb = load_rows(x_hbm, batch, head, row, count)
        transpose_into(dst_chunks, column, x_sb, x_psum, count, dim)
    else:
        for c, (start, size) in enumerate(tiles(0, dim, BLOCK)):
            seqlen, heads = x_hbm.shape[1], x_hbm.shape[2]
            offset = ((batch * seqlen + row) * heads + head) * dim + start
            source = x_hbm.ap(pattern=[[heads * dim, count], [1, size]], offset=offset)
            nisa.dma_transpose(dst=dst_chunks[c][0:size, column : column + count], src=source,
                               axes=(1, 0))  # fmt: skip


def new_transposed(dim, columns, dtype):
    """Tiles for a transposed (columns, dim) tensor: one for every 128 of dim."""
    chunks = []
    for _, size in tiles(0, dim, BLOCK):
        chunks.append(nl.ndarray((size, columns), dtype=dtype, buffer=nl.sbuf))
    return chunks


def product(dst_psum, left_chunks, column, count, right_chunks, start, width):
    """dst = left[:, column..]^T right[:, start..], the contraction over all chunks of dim."""
    for c in range(len(left_chunks)):
        nisa.nc_matmul(
            dst=dst_psum,
            stationary=left_chunks[c][:, column : column + count],
            moving=right_chunks[c][:, start : start + width],
            accumulate=c > 0,
        )


def key_bounds(q0, nq, seqlen_q, seqlen_k, left, right):
    """(nq, 1) fp32 tiles: query p sees the keys from low[p] to before high[p]."""
    first = q0 + seqlen_k - seqlen_q
    low_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
    high_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
    if left >= 0:
        nisa.iota(dst=low_sb, pattern=[[0, 1]], offset=first - left, channel_multiplier=1)
    else:
        nisa.memset(dst=low_sb, value=0.0, engine=nisa.engine.gpsimd)
    if right >= 0:
        nisa.iota(dst=high_sb, pattern=[[0, 1]], offset=first + right + 1, channel_multiplier=1)
    else:
        nisa.memset(dst=high_sb, value=float(seqlen_k), engine=nisa.engine.gpsimd)
    return low_sb, high_sb
