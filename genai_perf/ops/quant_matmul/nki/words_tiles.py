"""Parts of words_kernel: the plan of its loops, x as columns, codes out of words."""

from ...._backends.nki import nisa, nl
from .tiles import ROWS, WIDTH, pieces, turn

BLOCK = 8  # rows of the weight that share a partition in the output: long runs for DMA
# What decode_words returns, as a multiple of the value. A 4-bit code alone in a byte is the
# float8_e4m3 code * 2^-9, exactly; of "halves" see e4m3fn_halves.
FACTORS = {"int4": 2.0**-9, "halves": 2.0**-7}
COLUMNS_BYTES = 64 * 1024  # of a partition, for x


class Plan(nl.NKIObject):
    """Chunks of 128 words, and how groups, whose sums have scales of their own, lie in them.

    per: codes of a word. A unit is the least whole number of chunks that is a whole number of
    groups: one chunk of `inside` groups, or `unit` chunks of one.
    """

    def __init__(self, size, per, share):
        self.per = per
        self.words = size // per
        self.chunks = len(pieces(self.words, ROWS))
        self.groups = -(-size // share)
        self.inside = max(1, ROWS * per // share)
        self.unit = max(1, share // (ROWS * per))
        if self.groups == 1:
            self.inside = 1
            self.unit = self.chunks
        self.group_words = share // per

    def rows(self):
        """How many rows of x one pass takes: its columns fit one bank, and SBUF."""
        each = 2 * self.inside * self.chunks * self.per
        return max(1, min(WIDTH // self.inside, COLUMNS_BYTES // each))

    def sections(self, rows):
        """(first chunk, chunks, first group, groups) that leave PSUM together."""
        units = max(1, 64 // (self.inside * rows))
        found = []
        for first, count in pieces(self.chunks, units * self.unit):
            group = first // self.unit * self.inside
            held = -(-count // self.unit) * self.inside
            found.append((first, count, group, min(held, self.groups - group)))
        return found


def load_x(x_hbm, m0, count, plan):
    """x^T as (128, per, chunks, inside, count): element [p, a, i, g, m] is x[m, code a of word
    128 i + p] where that word is of group g of its chunk, else 0. x_hbm (M, chunks 128 per)."""
    per, chunks, inside = plan.per, plan.chunks, plan.inside
    total = count * chunks
    turned_sb = nl.ndarray((ROWS, per, total), dtype=x_hbm.dtype, buffer=nl.sbuf)
    for r0, rows in pieces(total, ROWS):
        rows_sb = nl.ndarray((rows, ROWS, per), dtype=x_hbm.dtype, buffer=nl.sbuf)
        source = x_hbm.ap(pattern=[[ROWS * per, rows], [1, ROWS * per]],
                          offset=(m0 * chunks + r0) * ROWS * per)  # fmt: skip
        nisa.dma_copy(dst=rows_sb.reshape((rows, ROWS * per)), src=source)
        for a in range(per):
            turn(turned_sb[:, a, r0 : r0 + rows], rows_sb[:, :, a], rows, ROWS, x_hbm.dtype)
    x_sb = nl.ndarray((ROWS, per, chunks, inside, count), dtype=x_hbm.dtype, buffer=nl.sbuf)
    own_sb = own_words(plan, x_hbm.dtype)
    for a in range(per):
        source = turned_sb.ap(pattern=[[per * total, ROWS], [1, chunks], [0, inside],
                                       [chunks, count]], offset=a * total)  # fmt: skip
        if inside == 1:
            nisa.tensor_copy(dst=x_sb[:, a, :, :, :], src=source)
        else:
            own = own_sb.ap(pattern=[[inside, ROWS], [0, chunks], [1, inside], [0, count]])
            nisa.tensor_tensor(dst=x_sb[:, a, :, :, :], data1=source, data2=own, op=nl.multiply)
    return x_sb


def own_words(plan, dtype):
    """(128, inside): 1 where word p of a chunk is of group g, else 0."""
    at_sb = nl.ndarray((ROWS, plan.inside), dtype=nl.float32, buffer=nl.sbuf)
    after_sb = nl.ndarray((ROWS, plan.inside), dtype=nl.float32, buffer=nl.sbuf)
    own_sb = nl.ndarray((ROWS, plan.inside), dtype=dtype, buffer=nl.sbuf)
    nisa.iota(dst=at_sb, pattern=[[-plan.group_words, plan.inside]], offset=0,
              channel_multiplier=1)  # fmt: skip
    nisa.tensor_scalar(dst=after_sb, data=at_sb, op0=nl.greater_equal, operand0=0.0)
    nisa.scalar_tensor_tensor(dst=own_sb, data=at_sb, op0=nl.less,
                              operand0=float(plan.group_words), op1=nl.multiply,
                              operand1=after_sb)  # fmt: skip
    return own_sb


def group_sums(x_sb, plan, factor):
    """factor * sum of x over each group, on every partition: (128, units inside, count) fp32."""
    count, inside = x_sb.shape[4], plan.inside
    ones_sb = nl.ndarray((ROWS, ROWS), dtype=x_sb.dtype, buffer=nl.sbuf)
    nisa.memset(dst=ones_sb, value=factor)
    units = -(-plan.chunks // plan.unit)
    sums_sb = nl.ndarray((ROWS, units * inside, count), dtype=nl.float32, buffer=nl.sbuf)
    # Units of one chunk side by side, as many as a bank holds.
    step = max(1, WIDTH // (inside * count)) if plan.unit == 1 else 1
    for u0, many in pieces(units, step):
        width = many * inside
        sums_psum = nl.ndarray((ROWS, width, count), dtype=nl.float32, buffer=nl.psum)
        last = min(plan.chunks, (u0 + many) * plan.unit)
        spans = [(u0, last)]
        if plan.unit > 1:
            spans = [(i, i + 1) for i in range(u0 * plan.unit, last)]
        for s in range(len(spans)):
            for a in range(plan.per):
                nisa.nc_matmul(dst=sums_psum, stationary=ones_sb,
                               moving=x_sb[:, a, spans[s][0] : spans[s][1], :, :],
                               accumulate=s + a > 0)  # fmt: skip
        nisa.tensor_copy(dst=sums_sb[:, u0 * inside : u0 * inside + width, :], src=sums_psum)
    return sums_sb


def decode_words(words_sb, code, table_sb, dtype):
    """The codes 0 .. per - 1 of each word (parts, n), as what the tensor engine multiplies; then
    perhaps the same codes again, and again, whose products are added."""
    parts, n = words_sb.shape
    if code == "int4":
        low_sb = nl.ndarray((parts, n), dtype=nl.uint16, buffer=nl.sbuf)
        high_sb = nl.ndarray((parts, n), dtype=nl.uint16, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=low_sb, data=words_sb, op0=nl.bitwise_and, operand0=0x0F0F)
        nisa.tensor_scalar(dst=high_sb, data=words_sb, op0=nl.right_shift, operand0=4,
                           op1=nl.bitwise_and, operand1=0x0F0F)  # fmt: skip
        low, high = low_sb.view(nl.float8_e4m3), high_sb.view(nl.float8_e4m3)
        return [low[:, 0::2], high[:, 0::2], low[:, 1::2], high[:, 1::2]]
    if code == "halves":
        return e4m3fn_halves(words_sb)
    if code == "table4":
        index_sb = nl.ndarray((parts, 2 * n), dtype=nl.uint32, buffer=nl.sbuf)
        pairs_sb = nl.ndarray((parts, 2 * n), dtype=nl.uint32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=index_sb, src=words_sb.view(nl.uint8), engine=nisa.engine.scalar)
        nisa.nc_n_gather(dst=pairs_sb, data=table_sb[0:parts, :], indices=index_sb)
        values = pairs_sb.view(dtype)
        return [values[:, a::4] for a in range(4)]
    kinds = {"e4m3": nl.float8_e4m3, "e5m2": nl.float8_e5m2}
    if code == "e4m3fn":
        kinds = {"e4m3fn": nl.float8_e4m3fn}
    codes = words_sb.view(kinds[code])
    return [codes[:, 0::2], codes[:, 1::2]]


def e4m3fn_halves(words_sb):
    """float8_e4m3fn codes, which gen3 has not, as float8_e5m2 numbers whose sum is value * 2^-7.

    Without its last bit a code is e5m2's of value * 2^-8, rounded down: the exponents lie alike
    once the sign is put back. With that bit added it is the one rounded up, subnormals included.
    Their mean is the value. The codes of NaN, and no others, carry into the bit between sign and
    exponent: the third part is NaN for these, else 0.
    """
    shape = words_sb.shape
    sign_sb = nl.ndarray(shape, dtype=nl.uint16, buffer=nl.sbuf)
    down_sb = nl.ndarray(shape, dtype=nl.uint16, buffer=nl.sbuf)
    last_sb = nl.ndarray(shape, dtype=nl.uint16, buffer=nl.sbuf)
    up_sb = nl.ndarray(shape, dtype=nl.uint16, buffer=nl.sbuf)
    nan_sb = nl.ndarray(shape, dtype=nl.uint16, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=sign_sb, data=words_sb, op0=nl.bitwise_and, operand0=0x8080)
    nisa.tensor_scalar(dst=down_sb, data=words_sb, op0=nl.right_shift, operand0=1,
                       op1=nl.bitwise_and, operand1=0x3F3F)  # fmt: skip
    nisa.tensor_scalar(dst=last_sb, data=words_sb, op0=nl.bitwise_and, operand0=0x0101)
    nisa.tensor_tensor(dst=down_sb, data1=down_sb, data2=sign_sb, op=nl.bitwise_or)
    # Two bytes at a time: sums of 16 bits are exact, and no byte carries into the next.
    nisa.tensor_tensor(dst=up_sb, data1=down_sb, data2=last_sb, op=nl.add,
                       engine=nisa.engine.gpsimd)  # fmt: skip
    nisa.tensor_scalar(dst=nan_sb, data=up_sb, op0=nl.bitwise_and, operand0=0x4040)
    nisa.tensor_scalar(dst=nan_sb, data=nan_sb, op0=nl.multiply, operand0=127 / 64,
                       engine=nisa.engine.scalar)  # fmt: skip
    parts = [x.view(nl.float8_e5m2) for x in (down_sb, up_sb, nan_sb)]
    return [x[:, a::2] for x in parts for a in range(2)]
