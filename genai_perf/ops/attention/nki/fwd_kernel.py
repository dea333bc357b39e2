"""Attention forward: queries on partitions, an online softmax over sections of 2048 keys.

Pseudocode, for one head and 128 queries:
    for each section: S = Q K^T (four PSUM banks); m' = max(m, rowmax S)
        P = exp(scale S - scale m'), its row sums from the same instruction
        O = O exp(scale (m - m')) + P V, through P^T
    out = O / l, lse = scale m + log l
"""

from ...._backends.nki import nisa, nki, nl
from .geometry import (
    BLOCK,
    KEYS,
    QUERIES,
    SECTION,
    all_visible,
    key_range,
    may_be_blind,
    tiles,
)
from .tiles import head_rows, key_bounds, load_transposed, new_transposed, product

# A maximum below every score and above the value of a masked one, so that nothing is inf - inf.
NO_MAXIMUM = -1e30
SMALLEST_SUM = 2.0**-60
# K^T and V of a head stay in SBUF up to this many bytes of a partition.
RESIDENT_BYTES = 112 * 1024
# Blocks of P, of a tile's four, that the tensor engine turns; DMA turns the others.
BY_ENGINE = 2
# Tiles of queries that share a load of K and V where these do not stay.
SHARING = 8


@nki.jit
def attention_fwd(q_hbm, k_hbm, v_hbm, sinks_hbm, has_sinks, softmax_scale, softcap, left, right):
    """out, lse of softmax(mask(cap(scale Q K^T))) V.

    Dimensions: batch B, seqlen_q Sq, seqlen_k Sk, heads H, heads_k Hk, dim D, dim_v Dv <= 512.
    Args:
        q_hbm (B, Sq, H, D), k_hbm (B, Sk, Hk, D), v_hbm (B, Sk, Hk, Dv): one type, H % Hk == 0.
        sinks_hbm (1, H) fp32, read if has_sinks.
        softmax_scale > 0; softcap, 0 for none; left, right: the window, -1 unbounded.
    Returns:
        out (B, Sq, H, Dv) of q's type, lse (B, H, Sq) fp32.
    Notes: gen3 and later. Row maxima and part of the transposed P's way out of PSUM are Vector's,
        exponentials and the rest Scalar's; running sums are kept by GpSimd.
    """
    batch, seqlen_q, heads, dim = q_hbm.shape
    seqlen_k, heads_k, dim_v = k_hbm.shape[1], k_hbm.shape[2], v_hbm.shape[3]
    group = heads // heads_k
    out_hbm = nl.ndarray((batch, seqlen_q, heads, dim_v), dtype=q_hbm.dtype, buffer=nl.shared_hbm)
    lse_hbm = nl.ndarray((batch, heads, seqlen_q), dtype=nl.float32, buffer=nl.shared_hbm)
    work = Scratch(q_hbm.dtype, dim_v)
    each = 2 if q_hbm.dtype != nl.float32 else 4
    chunk_count = len(tiles(0, dim, BLOCK))
    section_bytes = (SECTION * chunk_count + (SECTION // BLOCK) * dim_v) * each
    sections = tiles(0, seqlen_k, SECTION)
    resident = section_bytes * len(sections) <= RESIDENT_BYTES
    for b in range(batch):
        for hk in range(heads_k):
            held = []
            if resident:
                for k0, nk in sections:
                    held.append(load_section(k_hbm, v_hbm, b, hk, k0, nk, work))
            for g in range(group):
                head = hk * group + g
                rows = QUERIES if resident else QUERIES * SHARING
                for start, count in tiles(0, seqlen_q, rows):
                    states = []
                    for q0, nq in tiles(start, start + count, QUERIES):
                        states.append(begin(q_hbm, sinks_hbm, has_sinks, b, head, q0, nq, seqlen_k,
                                            softmax_scale, softcap, left, right, dim_v,
                                            work))  # fmt: skip
                    low, high = key_range(start, count, seqlen_q, seqlen_k, left, right)
                    for i in range(len(sections)):
                        k0, nk = sections[i]
                        if k0 < high and k0 + nk > low:
                            if resident:
                                keys = held[i]
                            else:
                                keys = load_section(k_hbm, v_hbm, b, hk, k0, nk, work)
                            for state in states:
                                add_section(state, keys, work)
                    for state in states:
                        finish(state, out_hbm, lse_hbm, b, head, work)
    return out_hbm, lse_hbm


class Scratch(nl.NKIObject):
    """PSUM: four banks of scores, two of transposes, one of O, one for loads."""

    def __init__(self, dtype, dim_v):
        self.dtype = dtype
        self.scores = []
        for _ in range(SECTION // KEYS):
            self.scores.append(nl.ndarray((QUERIES, KEYS), dtype=nl.float32, buffer=nl.psum))
        self.turned = []
        for _ in range(2):
            self.turned.append(
                nl.ndarray((BLOCK, KEYS // BLOCK, QUERIES), dtype=dtype, buffer=nl.psum)
            )
        self.out = nl.ndarray((QUERIES, dim_v), dtype=nl.float32, buffer=nl.psum)
        self.zero = nl.ndarray((QUERIES, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=self.zero, value=0.0, engine=nisa.engine.gpsimd)
        self.loads = nl.ndarray((BLOCK, BLOCK), dtype=dtype, buffer=nl.psum)


class Keys(nl.NKIObject):
    """A section of one head in SBUF: K^T by chunks of dim, V by blocks of 128 keys."""

    def __init__(self, k0, nk, k_chunks, v_sb):
        self.k0 = k0
        self.nk = nk
        self.k_chunks = k_chunks
        self.v_sb = v_sb


class State(nl.NKIObject):
    """A tile of queries on its way through the sections."""

    def __init__(self, q0, nq, factor, shape):
        self.q0 = q0
        self.nq = nq
        self.factor = factor
        self.seqlen_q, self.seqlen_k, self.left, self.right, self.softmax_scale, self.softcap = (
            shape
        )
        self.started = False
        self.masked = False


def load_section(k_hbm, v_hbm, b, hk, k0, nk, work):
    dim, dim_v = k_hbm.shape[3], v_hbm.shape[3]
    k_chunks = new_transposed(dim, nk, work.dtype)
    blocks = tiles(0, nk, BLOCK)
    v_sb = nl.ndarray((BLOCK, len(blocks), dim_v), dtype=work.dtype, buffer=nl.sbuf)
    for i in range(len(blocks)):
        start, size = blocks[i]
        load_transposed(k_chunks, start, k_hbm, b, hk, k0 + start, size, work.loads)
        nisa.dma_copy(dst=v_sb[0:size, i, :], src=head_rows(v_hbm, b, hk, k0 + start, size))
    return Keys(k0, nk, k_chunks, v_sb)


def begin(q_hbm, sinks_hbm, has_sinks, b, head, q0, nq, seqlen_k, softmax_scale, softcap, left,
          right, dim_v, work):  # fmt: skip
    """Q^T of a tile, and the state before any key: the sink's, or an empty one."""
    seqlen_q, dim = q_hbm.shape[1], q_hbm.shape[3]
    factor = softcap if softcap > 0 else softmax_scale
    state = State(q0, nq, factor, (seqlen_q, seqlen_k, left, right, softmax_scale, softcap))
    state.has_sinks = has_sinks
    state.q_chunks = new_transposed(dim, nq, work.dtype)
    load_transposed(state.q_chunks, 0, q_hbm, b, head, q0, nq, work.loads)
    state.top = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)  # of raw scores
    state.total = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
    state.out = nl.ndarray((nq, dim_v), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=state.out, value=0.0, engine=nisa.engine.gpsimd)
    if has_sinks:
        sink_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=sink_sb, src=sinks_hbm.ap(pattern=[[0, nq], [1, 1]], offset=head))
        nisa.tensor_scalar(dst=state.top, data=sink_sb, op0=nl.multiply, operand0=1.0 / factor)
        # Rounded on the way to raw units: what the sink still adds is exp(sink - factor top).
        left_sb = scaled(state.top, -factor, nq)
        nisa.activation(dst=state.total, op=nl.exp, data=sink_sb, bias=left_sb)
    else:
        nisa.memset(dst=state.top, value=NO_MAXIMUM, engine=nisa.engine.gpsimd)
        nisa.memset(dst=state.total, value=0.0, engine=nisa.engine.gpsimd)
    # -factor as a column, for GpSimd, which multiplies tiles only.
    state.minus_factor = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=state.minus_factor, value=-float(factor), engine=nisa.engine.gpsimd)
    state.bounds = key_bounds(q0, nq, seqlen_q, seqlen_k, left, right)
    return state


def scaled(x_sb, factor, nq):
    y_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=y_sb, data=x_sb, op0=nl.multiply, operand0=factor)
    return y_sb


def add_section(state, keys, work):
    nq = state.nq
    low, high = key_range(state.q0, nq, state.seqlen_q, state.seqlen_k, state.left, state.right)
    start, end = max(low, keys.k0), min(high, keys.k0 + keys.nk)
    if start >= end:
        return
    # From a block's start on: V lies in blocks of 128 keys.
    start = keys.k0 + ((start - keys.k0) // BLOCK) * BLOCK
    pieces = tiles(start, end, KEYS)
    tops_sb = nl.ndarray((nq, len(pieces) + 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=tops_sb[:, 0:1], src=state.top, engine=nisa.engine.gpsimd)
    sources = []
    for i in range(len(pieces)):
        k0, nk = pieces[i]
        sources.append(scores(state, keys, work, i, k0, nk, tops_sb[:, i + 1 : i + 2]))
    top_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=top_sb, op=nl.maximum, data=tops_sb, axis=1)
    shift_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=shift_sb, data1=top_sb, data2=state.minus_factor, op=nl.multiply,
                       engine=nisa.engine.gpsimd)  # fmt: skip
    part_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
    weights = []
    for i in range(len(pieces)):
        p_sb = nl.ndarray((nq, pieces[i][1]), dtype=work.dtype, buffer=nl.sbuf)
        source, scale, bias_sb = sources[i], state.factor, shift_sb
        if work.dtype == nl.float32:
            # Subtracting first keeps the bits that scale * S + shift rounds away.
            source = below(source, top_sb, state.factor)
            scale, bias_sb = 1.0, work.zero[0:nq]
        command = nisa.reduce_cmd.reset_reduce if i == 0 else nisa.reduce_cmd.reduce
        if i == len(pieces) - 1:
            nisa.activation(dst=p_sb, op=nl.exp, data=source, bias=bias_sb, scale=scale,
                            reduce_op=nl.add, reduce_res=part_sb, reduce_cmd=command)  # fmt: skip
        else:
            nisa.activation(dst=p_sb, op=nl.exp, data=source, bias=bias_sb, scale=scale,
                            reduce_op=nl.add, reduce_cmd=command)  # fmt: skip
        weights.append(p_sb)
    times_values(weights, pieces, keys, nq, work)
    accumulate(state, top_sb, shift_sb, part_sb, work)


def below(x, top_sb, factor):
    """factor * (x - top), fp32."""
    y_sb = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=y_sb, data=x, op0=nl.subtract, operand0=top_sb, op1=nl.multiply,
                       operand1=factor)  # fmt: skip
    return y_sb


def scores(state, keys, work, i, k0, nk, top_sb):
    """Scores of one tile, masked, and the maximum of each row into top_sb; in PSUM or SBUF."""
    nq = state.nq
    source = work.scores[i][0:nq, 0:nk]
    product(source, state.q_chunks, 0, nq, keys.k_chunks, k0 - keys.k0, nk)
    if state.softcap > 0:
        capped_sb = nl.ndarray((nq, nk), dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=capped_sb, op=nl.tanh, data=source,
                        scale=state.softmax_scale / state.softcap)  # fmt: skip
        source = capped_sb
    if all_visible(state.q0, nq, k0, nk, state.seqlen_q, state.seqlen_k, state.left, state.right):
        nisa.tensor_reduce(dst=top_sb, op=nl.maximum, data=source, axis=1)
        return source
    masked_sb = nl.ndarray((nq, nk), dtype=nl.float32, buffer=nl.sbuf)
    nisa.range_select(
        dst=masked_sb, on_true_tile=source, comp_op0=nl.greater_equal, comp_op1=nl.less,
        bound0=state.bounds[0], bound1=state.bounds[1], range_start=k0,
        reduce_cmd=nisa.reduce_cmd.reset_reduce, reduce_res=top_sb, reduce_op=nl.maximum,
    )  # fmt: skip
    return masked_sb


def times_values(weights, pieces, keys, nq, work):
    """work.out = P V: P^T by blocks of 128 keys, V as it lies."""
    first = True
    for i in range(len(pieces)):
        k0, nk = pieces[i]
        blocks = tiles(0, nk, BLOCK)
        turned_sb = transposed(weights[i], work.turned[i % 2], blocks, nq, work, i % 4 == 0)
        for j in range(len(blocks)):
            start, size = blocks[j]
            at = (k0 - keys.k0 + start) // BLOCK
            nisa.nc_matmul(
                dst=work.out[0:nq, :],
                stationary=turned_sb[0:size, j, :],
                moving=keys.v_sb[0:size, at, :],
                accumulate=not first,
            )
            first = False


def transposed(p_sb, turned_psum, blocks, nq, work, by_vector):
    """P^T (128, blocks, nq). Of a tile's four blocks DMA turns the last two in one go (two-byte
    types only); the tensor engine's leave PSUM through Scalar, and of one tile in four the first
    through Vector, which also has the maxima."""
    turned_sb = nl.ndarray((BLOCK, len(blocks), nq), dtype=work.dtype, buffer=nl.sbuf)
    by_engine = len(blocks)
    if work.dtype != nl.float32 and blocks[-1][1] == BLOCK:
        by_engine = min(BY_ENGINE, len(blocks))
    for j in range(by_engine):
        start, size = blocks[j]
        nisa.nc_transpose(dst=turned_psum[0:size, j, 0:nq], data=p_sb[0:nq, start : start + size],
                          engine=nisa.engine.tensor)  # fmt: skip
        nisa.tensor_copy(
            dst=turned_sb[0:size, j, :],
            src=turned_psum[0:size, j, 0:nq],
            engine=nisa.engine.vector if by_vector and j == 0 else nisa.engine.scalar,
        )
    count = len(blocks) - by_engine
    if count > 0:
        source = p_sb[0:nq, by_engine * BLOCK : (by_engine + count) * BLOCK]
        nisa.dma_transpose(dst=turned_sb[:, by_engine:, :],
                           src=source.reshape((nq, count, BLOCK)), axes=(2, 1, 0))  # fmt: skip
    return turned_sb


def accumulate(state, top_sb, shift_sb, part_sb, work):
    """The running maximum, sum and output after a section."""
    nq = state.nq
    if state.started or state.has_sinks:
        decay_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
        if work.dtype == nl.float32:
            nisa.activation(dst=decay_sb, op=nl.exp, data=below(state.top, top_sb, state.factor),
                            bias=work.zero[0:nq])  # fmt: skip
        else:
            nisa.activation(dst=decay_sb, op=nl.exp, data=state.top, bias=shift_sb,
                            scale=state.factor)  # fmt: skip
        old_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
        total_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=old_sb, data1=state.total, data2=decay_sb, op=nl.multiply,
                           engine=nisa.engine.gpsimd)  # fmt: skip
        nisa.tensor_tensor(dst=total_sb, data1=old_sb, data2=part_sb, op=nl.add,
                           engine=nisa.engine.gpsimd)  # fmt: skip
        state.total = total_sb
        nisa.scalar_tensor_tensor(dst=state.out, data=state.out, op0=nl.multiply,
                                  operand0=decay_sb, op1=nl.add,
                                  operand1=work.out[0:nq, :])  # fmt: skip
    else:
        state.total = part_sb
        nisa.tensor_copy(dst=state.out, src=work.out[0:nq, :])
    state.top = top_sb
    state.started = True


def finish(state, out_hbm, lse_hbm, b, head, work):
    """out = O / l and lse = factor m + log l; a row without a key has l = 0: 0 and -inf."""
    nq, dim_v = state.nq, out_hbm.shape[3]
    safe_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
    over_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=safe_sb, data=state.total, op0=nl.maximum, operand0=SMALLEST_SUM)
    nisa.reciprocal(dst=over_sb, data=safe_sb)
    out_sb = nl.ndarray((nq, dim_v), dtype=work.dtype, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=out_sb, data=state.out, op0=nl.multiply, operand0=over_sb)
    nisa.dma_copy(dst=head_rows(out_hbm, b, head, state.q0, nq), src=out_sb)
    lse_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
    log_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=log_sb, op=nl.log, data=safe_sb)
    nisa.scalar_tensor_tensor(dst=lse_sb, data=state.top, op0=nl.multiply, operand0=state.factor,
                              op1=nl.add, operand1=log_sb)  # fmt: skip
    blind = may_be_blind(state.seqlen_q, state.seqlen_k, state.right)
    if blind and not state.has_sinks:
        # 0 or the lowest number, added twice: -inf where the sum is 0, nothing elsewhere.
        low_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=low_sb, data=state.total, op0=nl.equal, operand0=0.0,
                           op1=nl.multiply, operand1=-3.4e38)  # fmt: skip
        nisa.tensor_tensor(dst=lse_sb, data1=lse_sb, data2=low_sb, op=nl.add)
        nisa.tensor_tensor(dst=lse_sb, data1=lse_sb, data2=low_sb, op=nl.add)
    heads, seqlen_q = out_hbm.shape[2], out_hbm.shape[1]
    offset = (b * heads + head) * seqlen_q + state.q0
    nisa.dma_copy(dst=lse_hbm.ap(pattern=[[1, nq], [1, 1]], offset=offset), src=lse_sb)
