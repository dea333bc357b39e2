"""Where a sequence's keys lie, and 128 of them at a time in SBUF as what can be multiplied."""

from ...._backends.nki import nisa, nl

KEYS = 128  # of a gather: one a partition
LOWEST = -3e38
# A row of the cache that no cache has: the gather leaves it out.
NOWHERE = 1 << 30
# The bits of e4m3fn as float16 are its value * 2^-8.
WIDE = 256.0


def new(rows, columns, dtype=nl.float32):
    return nl.ndarray((rows, columns), dtype=dtype, buffer=nl.sbuf)


def spread(x_hbm, offset, count, partitions, dtype=nl.float32):
    """`count` numbers from `offset` on, the same on every partition."""
    x_sb = new(partitions, count, dtype)
    nisa.dma_copy(dst=x_sb, src=x_hbm.ap(pattern=[[0, partitions], [1, count]], offset=offset))
    return x_sb


class Sequence(nl.NKIObject):
    """The rows of the cache of one sequence, key 128 t + p on partition p, and what is no key.

    rows: (128, T) int32, NOWHERE for what is none; gone: (128, T), 1 there, else 0; at: (128, T)
    the positions; own: (128, R) the position of each query row.
    """

    def __init__(self, call, b):
        tiles = call.places_hbm.shape[2]
        pages = call.table_hbm.shape[1]
        # cache_seqlens, then the padding on the left
        span_sb = spread(call.spans_hbm, 2 * b, 2, KEYS)
        length, first = span_sb[:, 0:1], span_sb[:, 1:2]
        self.at = new(KEYS, tiles)
        nisa.iota(dst=self.at, pattern=[[KEYS, tiles]], offset=0, channel_multiplier=1)
        early_sb = new(KEYS, tiles)
        self.gone = new(KEYS, tiles)
        nisa.tensor_scalar(dst=early_sb, data=self.at, op0=nl.less, operand0=first)
        nisa.tensor_scalar(dst=self.gone, data=self.at, op0=nl.greater_equal, operand0=length)
        nisa.tensor_tensor(dst=self.gone, data1=self.gone, data2=early_sb, op=nl.maximum)
        self.rows = new(KEYS, tiles, nl.int32)
        table_sb = spread(call.table_hbm, b * pages, pages, KEYS, nl.int32)
        nisa.nc_n_gather(dst=self.rows, data=table_sb, indices=call.slots_sb)
        lost_sb, kept_sb = new(KEYS, tiles, nl.int32), new(KEYS, tiles, nl.int32)
        nisa.tensor_scalar(dst=lost_sb, data=self.gone, op0=nl.multiply, operand0=float(NOWHERE))
        nisa.tensor_scalar(dst=kept_sb, data=self.gone, op0=nl.multiply, operand0=-1.0, op1=nl.add,
                           operand1=1.0)  # fmt: skip
        # Integers, exactly: GpSimd's. Entries of the table past a sequence's end may be anything.
        for other, op in ((call.page_sb, nl.multiply), (call.inside_sb, nl.add),
                          (kept_sb, nl.multiply), (lost_sb, nl.add)):  # fmt: skip
            nisa.tensor_tensor(dst=self.rows, data1=self.rows, data2=other, op=op,
                               engine=nisa.engine.gpsimd)  # fmt: skip
        self.own = new(KEYS, call.rows)
        nisa.tensor_scalar(dst=self.own, data=call.ages_sb, op0=nl.add, operand0=length)

    def penalty(self, call, t, count):
        """LOWEST where a query row does not see a key, else 0: (128, count, R), or R is 1 where
        rows see the same; and key - query position (with a window or slopes)."""
        gone = self.gone[:, t : t + count]
        if not call.placed:
            penalty_sb = new(KEYS, count)
            nisa.tensor_scalar(dst=penalty_sb, data=gone, op0=nl.multiply, operand0=LOWEST)
            return penalty_sb.expand_dim(2), penalty_sb
        shape = (KEYS, count, call.rows)
        away_sb = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
        penalty_sb = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
        keys = self.at[:, t : t + count].expand_dim(2).broadcast(2, call.rows)
        queries = self.own.expand_dim(1).broadcast(1, count)
        nisa.tensor_tensor(dst=away_sb, data1=keys, data2=queries, op=nl.subtract)
        nisa.tensor_copy(dst=penalty_sb, src=gone.expand_dim(2).broadcast(2, call.rows))
        for op, side in ((nl.less, -call.left), (nl.greater, call.right)):
            if (op is nl.less and call.left >= 0) or (op is nl.greater and call.right >= 0):
                outside_sb = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
                nisa.tensor_scalar(dst=outside_sb, data=away_sb, op0=op, operand0=float(side))
                nisa.tensor_tensor(dst=penalty_sb, data1=penalty_sb, data2=outside_sb,
                                   op=nl.maximum)  # fmt: skip
        nisa.tensor_scalar(dst=penalty_sb, data=penalty_sb, op0=nl.multiply, operand0=LOWEST)
        return penalty_sb, away_sb


class Section(nl.NKIObject):
    """Room for some gathers of keys and values; zeros at first, so that what a gather leaves out is
    zero or of the same sequence."""

    def __init__(self, call, count):
        self.k = empty_rows(call.k_hbm, count, nisa.engine.vector)
        self.v = empty_rows(call.v_hbm, count, nisa.engine.gpsimd)

    def load(self, call, sequence, first, count):
        """(keys, values) of gathers first ...: lists of (128, heads dim)."""
        k_tiles, v_tiles = [], []
        for t in range(count):
            row_sb = sequence.rows[:, first + t : first + t + 1].view(nl.uint32)
            gather(self.k, call.k_hbm, t, row_sb)
            gather(self.v, call.v_hbm, t, row_sb)
            k_tiles.append(floats(self.k[:, t, :], call, nisa.engine.scalar))
            v_tiles.append(floats(self.v[:, t, :], call, nisa.engine.gpsimd))
        return k_tiles, v_tiles


def empty_rows(x_hbm, count, engine):
    """(128, count, heads dim up to a whole number of 16-bit words), zero."""
    width = x_hbm.shape[2] * x_hbm.shape[3]
    if x_hbm.dtype in (nl.int8, nl.uint8):
        width = width + width % 2
    x_sb = nl.ndarray((KEYS, count, width), dtype=x_hbm.dtype, buffer=nl.sbuf)
    nisa.memset(dst=x_sb.view(nl.uint16), value=0, engine=engine)
    return x_sb


def gather(x_sb, x_hbm, t, row_sb):
    width = x_hbm.shape[2] * x_hbm.shape[3]
    nisa.dma_copy(
        dst=x_sb[:, t, 0:width],
        src=x_hbm.ap(pattern=[[width, KEYS], [1, width]], offset=0, vector_offset=row_sb,
                     indirect_dim=1),
        oob_mode=nisa.oob_mode.skip,
    )  # fmt: skip


def floats(codes_sb, call, engine):
    """A gather as the tensor engine takes it: codes as numbers, times call.unit for fp8."""
    if call.kind == "plain":
        return codes_sb
    width = codes_sb.shape[1]
    if call.kind == "int8":
        x_sb = new(KEYS, width, call.dtype)
        nisa.tensor_copy(dst=x_sb, src=codes_sb, engine=engine)
        return x_sb
    if call.native_fp8:
        x_sb = new(KEYS, width, call.dtype)
        nisa.tensor_copy(dst=x_sb, src=codes_sb.view(nl.float8_e4m3fn), engine=engine)
        return x_sb
    wide_sb = widened(codes_sb)
    if call.dtype != nl.float32:
        return wide_sb
    x_sb = new(KEYS, width)
    nisa.tensor_copy(dst=x_sb, src=wide_sb, engine=engine)
    return x_sb


def widened(codes_sb):
    """The bytes of e4m3fn as float16: sign, exponent and mantissa each moved to their places."""
    width = codes_sb.shape[1]
    words = codes_sb.view(nl.uint16)
    bits_sb = new(KEYS, width, nl.uint16)
    for phase, (rest, shift, sign) in enumerate(((nl.left_shift, 7, 8), (nl.right_shift, 1, 0))):
        size_sb, sign_sb = new(KEYS, width // 2, nl.uint16), new(KEYS, width // 2, nl.uint16)
        nisa.tensor_scalar(dst=size_sb, data=words, op0=rest, operand0=shift, op1=nl.bitwise_and,
                           operand1=0x3F80)  # fmt: skip
        nisa.tensor_scalar(dst=sign_sb, data=words, op0=nl.left_shift, operand0=sign,
                           op1=nl.bitwise_and, operand1=0x8000)  # fmt: skip
        nisa.tensor_tensor(dst=bits_sb[:, phase::2], data1=size_sb, data2=sign_sb,
                           op=nl.bitwise_or)  # fmt: skip
    return bits_sb.view(nl.float16)
