"""Which keys a tile of queries sees: constants of the compiled kernel, plain Python."""

QUERIES = 128  # of a tile: they lie on partitions
KEYS = 512  # of a tile: one PSUM bank of fp32 scores
BLOCK = 128  # keys of a transpose, and of one product with V
SECTION = 2048  # keys between two updates of the running maximum: four banks


def key_range(q0, nq, seqlen_q, seqlen_k, left, right):
    """The keys [start, end) that any of the queries q0 .. q0 + nq - 1 sees; -1 is unbounded."""
    first = q0 + seqlen_k - seqlen_q
    last = first + nq - 1
    start = 0
    end = seqlen_k
    if left >= 0:
        start = max(0, first - left)
    if right >= 0:
        end = min(seqlen_k, last + right + 1)
    return start, max(start, end)


def all_visible(q0, nq, k0, nk, seqlen_q, seqlen_k, left, right):
    """Whether every one of the queries sees every one of the keys k0 .. k0 + nk - 1."""
    first = q0 + seqlen_k - seqlen_q
    last = first + nq - 1
    visible = True
    if left >= 0 and k0 < last - left:
        visible = False
    if right >= 0 and k0 + nk - 1 > first + right:
        visible = False
    return visible


def may_be_blind(seqlen_q, seqlen_k, right):
    """Whether the first query, and with it some query, sees no key at all."""
    return right >= 0 and seqlen_k - seqlen_q + right < 0


def tiles(start, end, size):
    """(offset, length) of the pieces of [start, end), each up to `size` long."""
    pieces = []
    offset = start
    while offset < end:
        pieces.append((offset, min(size, end - offset)))
        offset = offset + size
    return pieces
