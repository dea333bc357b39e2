"""4-bit and fp8 weights for few rows of x: stored words turned by DMA, sums scaled, not weights.

Pseudocode, for 1024 rows of W and a section of groups:
    words^T by DMA (128 words of 2 or 4 codes on partitions); codes: bits of the words, or a table
    sums[n, group, m] = codes^T x, x set to 0 outside the group: one product for all groups
    y[n, m] += sum over groups of (sums - zero * sum of x) * scale
"""

from ...._backends.nki import nisa, nki, nl
from .tiles import ROWS, WIDTH, load_table, pieces, turn
from .words_tiles import BLOCK, FACTORS, Plan, decode_words, group_sums, load_x


@nki.jit
def words_matmul(x_hbm, words_hbm, scale_hbm, zero_hbm, table_hbm, bias_hbm, code, per, share, zero,
                 has_bias):  # fmt: skip
    """y = x W^T + bias, W[n, k] = (value of code [n, k] - zero) * scale[n, k // share].

    Dimensions: M rows of x, N and K of the weight, W = K / per words of 16 bits.
    Args:
        x_hbm (M, K up to a multiple of 128 per, zeros) bf16 or fp16; words_hbm (N, W) uint16;
        scale_hbm (N, groups) fp32; zero_hbm (N, groups) fp32, read if zero is "tensor";
        bias_hbm (1, N) fp32, read if has_bias; table_hbm (1, 256) uint32.
        code: "int4" (4-bit integers, low nibble first), "e4m3" (up to 240), "e5m2", "fp8"
            (e4m3fn: as it lies on gen4, as "halves" before), or "table4": a byte is two values of
            x's type, table_hbm has the first in its low half.
        share: codes of a group: all K, or 128 per is a multiple of it, or it of 128 per.
        zero: "none", "tensor", or a number.
    Returns: y (M, N) of x's type.
    Notes: gen3 and later. A product takes 64 cycles for 128 x 128 codes, whatever M * groups up to
        64: 85 % of trn2's HBM bandwidth for 4-bit codes alone; fp8 goes in as it lies.
    """
    rows = x_hbm.shape[0]
    columns, words = words_hbm.shape
    plan = Plan(words * per, per, share)
    y_hbm = nl.ndarray((rows, columns), dtype=x_hbm.dtype, buffer=nl.shared_hbm)
    table_sb = load_table(table_hbm)
    if code == "fp8":
        code = "e4m3fn" if nisa.get_nc_version() == nisa.nc_version.gen4 else "halves"
    factor = FACTORS.get(code, 1.0)
    for m0, count in pieces(rows, plan.rows()):
        x_sb = load_x(x_hbm, m0, count, plan)
        sums_sb = x_sb
        if zero != "none":
            sums_sb = group_sums(x_sb, plan, factor)
            if zero != "tensor":
                nisa.tensor_scalar(dst=sums_sb, data=sums_sb, op0=nl.multiply, operand0=zero)
        for n0, parts, each in blocks(columns):
            scale_sb = load_rows(scale_hbm, n0, parts, each)
            zero_sb = scale_sb
            if zero == "tensor":
                zero_sb = load_rows(zero_hbm, n0, parts, each)
            y_sb = nl.ndarray((parts, each, count), dtype=nl.float32, buffer=nl.sbuf)
            for section in plan.sections(count):
                held = products(x_sb, words_hbm, plan, code, table_sb, n0, parts, each, section)
                add_scaled(y_sb, held, section, scale_sb, zero_sb, sums_sb, zero)
                held = []  # PSUM is free for what comes next
            write(y_hbm, m0, n0, y_sb, bias_hbm, has_bias, 1.0 / factor)
    return y_hbm


def blocks(columns):
    """(n0, parts, each): row n0 + each * p + j of W is the j-th of partition p in the output."""
    found = []
    for n0, count in pieces(columns, ROWS * BLOCK):
        whole = count // BLOCK
        if whole > 0:
            found.append((n0, whole, BLOCK))
        if count > whole * BLOCK:
            found.append((n0 + whole * BLOCK, count - whole * BLOCK, 1))
    return found


def load_rows(values_hbm, n0, parts, each):
    """(parts, each, groups) of a (N, groups) tensor."""
    groups = values_hbm.shape[1]
    held = nl.ndarray((parts, each, groups), dtype=nl.float32, buffer=nl.sbuf)
    source = values_hbm.ap(pattern=[[each * groups, parts], [1, each * groups]],
                           offset=n0 * groups)  # fmt: skip
    nisa.dma_copy(dst=held.reshape((parts, each * groups)), src=source)
    return held


def products(x_sb, words_hbm, plan, code, table_sb, n0, parts, each, section):
    """Sums of a section: tiles (parts, rows of each, groups, count) in PSUM, one bank each."""
    first, chunks, group, _ = section
    count, inside = x_sb.shape[4], plan.inside
    width = -(-chunks // plan.unit) * inside
    many = max(1, min(each, WIDTH // (width * count)))
    held = []
    for _, own in pieces(each, many):
        held.append(nl.ndarray((parts, own, width, count), dtype=nl.float32, buffer=nl.psum))
    for i in range(first, first + chunks):
        size = min(ROWS, plan.words - i * ROWS)
        words_sb = nl.ndarray((size, parts * each), dtype=nl.uint16, buffer=nl.sbuf)
        source = words_hbm.ap(pattern=[[plan.words, parts * each], [1, size]],
                              offset=n0 * plan.words + i * ROWS)  # fmt: skip
        nisa.dma_transpose(dst=words_sb, src=source, axes=(1, 0))
        codes = decode_words(words_sb, code, table_sb, x_sb.dtype)
        at = i // plan.unit * inside - group
        fresh = i % plan.unit == 0
        for j in range(each):
            for a in range(len(codes)):
                nisa.nc_matmul(dst=held[j // many][:, j % many, at : at + inside, :],
                               stationary=codes[a][:, j::each],
                               moving=x_sb[0:size, a % plan.per, i, :, :],
                               accumulate=not (fresh and a == 0))  # fmt: skip
    return held


def add_scaled(y_sb, held, section, scale_sb, zero_sb, sums_sb, zero):
    """y += the sums of a section with their scales; the first section is what y begins with."""
    first, _, group, groups = section
    at = 0
    for sum_psum in held:
        many = sum_psum.shape[1]
        part_sb = scaled(sum_psum[:, :, 0:groups, :], scale_sb, zero_sb, sums_sb, zero, at, group)
        target = y_sb[:, at : at + many, :]
        if first == 0:
            nisa.tensor_copy(dst=target, src=part_sb, engine=nisa.engine.gpsimd)
        else:
            nisa.tensor_tensor(dst=target, data1=target, data2=part_sb, op=nl.add,
                               engine=nisa.engine.gpsimd)  # fmt: skip
        at = at + many


def scaled(sum_psum, scale_sb, zero_sb, sums_sb, zero, at, group):
    """sum over groups of (sums - zero * sum of x) * scale, (parts, rows, count)."""
    parts, many, groups, count = sum_psum.shape
    shape = (parts, many, groups, count)
    y_sb = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
    source, engine = sum_psum, nisa.engine.vector
    if zero != "none":
        x_sums = sums_sb[0:parts, group : group + groups, :].expand_dim(1).broadcast(1, many)
        if zero == "tensor":
            shift_sb = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_tensor(dst=shift_sb, data1=per_group(zero_sb, at, many, group, shape),
                               data2=x_sums, op=nl.multiply, engine=nisa.engine.gpsimd)  # fmt: skip
            x_sums = shift_sb
        nisa.tensor_tensor(dst=y_sb, data1=source, data2=x_sums, op=nl.subtract)
        source, engine = y_sb, nisa.engine.gpsimd
    nisa.tensor_tensor(dst=y_sb, data1=source, data2=per_group(scale_sb, at, many, group, shape),
                       op=nl.multiply, engine=engine)  # fmt: skip
    if groups == 1:
        return y_sb[:, :, 0, :]
    total_sb = nl.ndarray((parts, many, count), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=total_sb, op=nl.add, data=y_sb.permute((0, 1, 3, 2)), axis=3)
    return total_sb


def per_group(values_sb, at, many, group, shape):
    """Values of rows and groups, the same for every row of x."""
    own = values_sb[:, at : at + many, group : group + shape[2]]
    return own.expand_dim(3).broadcast(3, shape[3])


def write(y_hbm, m0, n0, y_sb, bias_hbm, has_bias, factor):
    """y * factor + bias: one row of x as it lies, more of them turned."""
    parts, each, count = y_sb.shape
    columns = y_hbm.shape[1]
    if factor != 1.0:
        nisa.tensor_scalar(dst=y_sb, data=y_sb, op0=nl.multiply, operand0=factor)
    if has_bias:
        bias_sb = nl.ndarray((parts, each, 1), dtype=nl.float32, buffer=nl.sbuf)
        source = bias_hbm.ap(pattern=[[each, parts], [1, each]], offset=n0)
        nisa.dma_copy(dst=bias_sb.reshape((parts, each)), src=source)
        nisa.tensor_tensor(dst=y_sb, data1=y_sb, data2=bias_sb.broadcast(2, count), op=nl.add)
    cast_sb = nl.ndarray((parts, each, count), dtype=y_hbm.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=cast_sb, src=y_sb, engine=nisa.engine.scalar)
    if count == 1:
        target = y_hbm.ap(pattern=[[each, parts], [1, each]], offset=m0 * columns + n0)
        nisa.dma_copy(dst=target, src=cast_sb.reshape((parts, each)))
        return
    for start, rows in pieces(count, ROWS):
        rows_sb = nl.ndarray((rows, parts, each), dtype=y_hbm.dtype, buffer=nl.sbuf)
        for j in range(each):
            turn(rows_sb[:, :, j], cast_sb[:, j, start : start + rows], parts, rows, y_hbm.dtype,
                 nisa.engine.scalar)  # fmt: skip
        at = m0 + start
        nisa.dma_copy(dst=y_hbm[at : at + rows, n0 : n0 + parts * each],
                      src=rows_sb.reshape((rows, parts * each)))  # fmt: skip
