"""New rows into a cache in place, by index."""

from ...._backends.nki import nisa, nki, nl

ROWS = 128


@nki.jit
def append_rows(cache_hbm, rows_hbm, places_hbm):
    """cache[place] = row, in place; returns the cache.

    Args: cache_hbm (pages, page, heads, dim); rows_hbm (B, new, heads dim) of its type;
        places_hbm (B, new, 1) int32: page * page_size + place in the page.
    Notes: gen3 and later. A sequence after the other, so that of two that write one row the last
        is what the cache holds.
    """
    batch, count, width = rows_hbm.shape
    for b in range(batch):
        for start in range(0, count, ROWS):
            size = min(ROWS, count - start)
            row_sb = nl.ndarray((size, width), dtype=rows_hbm.dtype, buffer=nl.sbuf)
            place_sb = nl.ndarray((size, 1), dtype=nl.int32, buffer=nl.sbuf)
            nisa.dma_copy(dst=row_sb, src=rows_hbm[b, start : start + size, :])
            nisa.dma_copy(dst=place_sb, src=places_hbm[b, start : start + size, :])
            target = cache_hbm.ap(pattern=[[width, size], [1, width]], offset=0,
                                  vector_offset=place_sb.view(nl.uint32),
                                  indirect_dim=1)  # fmt: skip
            nisa.dma_copy(dst=target, src=row_sb)
    return cache_hbm
