"""Decode attention: keys gathered by page, 128 at a time for all heads; on one core or two.

Pseudocode, for one sequence, its keys in turn (every other section for the second core):
    rows of the cache by block table; past the end nothing is fetched
    for each key head: S = Q K^T, masked; m' = max(m, rowmax S); P = exp(scale S - scale m')
        O = O exp(scale (m - m')) + P V
    two cores: both write (O, m, l), meet, and the first merges; out = O / l, lse = scale m + log l
"""

from ...._backends.nki import nisa, nki, nl

KEYS = 128  # of a gather: one a partition
SECTION = 4  # gathers between two updates of the running maximum: one PSUM bank of scores
NO_MAXIMUM = -1e30
SMALLEST_SUM = 2.0**-60
LOWEST = -3.4e38
# A row of the cache that no cache has: the gather leaves it out.
NOWHERE = 1 << 30


@nki.jit
def decode_attention(q_hbm, k_hbm, v_hbm, table_hbm, lengths_hbm, ages_hbm, positions_hbm,
                     sinks_hbm, has_sinks, softmax_scale, left, right):  # fmt: skip
    """out (B, Hk, R, Dv) and lse (B, Hk, R) of R query rows of each key head over its cache.

    Args:
        q_hbm (B, Hk, R, D), R <= 128; k_hbm (pages, page, Hk, D), v_hbm (pages, page, Hk, Dv);
        table_hbm (B, max_pages) int32; lengths_hbm (B, 1) fp32;
        ages_hbm (R, 1) fp32: i - seqlen_q of each row; positions_hbm (T, 128, 2) int32: place in
        the table and in the page of key 128 t + p; sinks_hbm (Hk, R, 1) fp32, read if has_sinks.
    Notes: gen3 and later; the bytes of the cache set the time.
    """
    batch, heads_k, rows, dim = q_hbm.shape
    dim_v = v_hbm.shape[3]
    out_hbm = nl.ndarray((batch, heads_k, rows, dim_v), dtype=q_hbm.dtype, buffer=nl.shared_hbm)
    lse_hbm = nl.ndarray((batch, heads_k, rows), dtype=nl.float32, buffer=nl.shared_hbm)
    cores = nl.num_programs(0)
    core = nl.program_id(0)
    partial_hbm = out_hbm
    if cores > 1:
        partial_hbm = nl.ndarray((batch, heads_k, rows, dim_v + 2), dtype=nl.float32,
                                 buffer=nl.shared_hbm)  # fmt: skip
    tiles = positions_hbm.shape[0]
    states = []
    for b in range(batch):
        call = Sequence(q_hbm, lengths_hbm, ages_hbm, b, left, right)
        own = []
        for h in range(heads_k):
            own.append(State(q_hbm, sinks_hbm, has_sinks and core == 0, b, h, softmax_scale, dim_v))
        for s, first in enumerate(range(0, tiles, SECTION)):
            if s % cores == core:
                count = min(SECTION, tiles - first)
                k_tiles = []
                v_tiles = []
                for t in range(first, first + count):
                    k_sb, v_sb = gather(k_hbm, v_hbm, table_hbm, positions_hbm, call, b, t)
                    k_tiles.append(k_sb)
                    v_tiles.append(v_sb)
                for h in range(heads_k):
                    add_keys(own[h], call, k_tiles, v_tiles, h, first * KEYS, dim, dim_v,
                             softmax_scale)  # fmt: skip
        if cores > 1 and core == 1:
            for h in range(heads_k):
                own[h].save(partial_hbm, b, h)
        states.append(own)
    if cores > 1:
        nisa.core_barrier(data=partial_hbm, cores=(0, 1))
    if core == 0:
        for b in range(batch):
            for h in range(heads_k):
                if cores > 1:
                    merge(states[b][h], partial_hbm, b, h, softmax_scale)
                finish(states[b][h], out_hbm, lse_hbm, b, h, softmax_scale, has_sinks)
    return out_hbm, lse_hbm


def column(rows):
    return nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)


class Sequence(nl.NKIObject):
    """The length of a sequence on every partition, and which keys each query row sees."""

    def __init__(self, q_hbm, lengths_hbm, ages_hbm, b, left, right):
        rows = q_hbm.shape[2]
        self.length = column(KEYS)
        nisa.dma_copy(dst=self.length, src=lengths_hbm.ap(pattern=[[0, KEYS], [1, 1]], offset=b))
        self.low, self.high = column(rows), column(rows)
        length = self.length[0:rows, :]
        age_sb = column(rows)
        nisa.dma_copy(dst=age_sb, src=ages_hbm)
        nisa.memset(dst=self.low, value=0.0)
        nisa.tensor_copy(dst=self.high, src=length)
        if left >= 0:
            nisa.tensor_scalar(dst=self.low, data=age_sb, op0=nl.add, operand0=length, op1=nl.add,
                               operand1=float(-left))  # fmt: skip
        if right >= 0:
            nisa.tensor_scalar(dst=self.high, data=age_sb, op0=nl.add, operand0=length, op1=nl.add,
                               operand1=float(right + 1))  # fmt: skip
            nisa.tensor_scalar(dst=self.high, data=self.high, op0=nl.minimum, operand0=length)


class State(nl.NKIObject):
    """Q^T of a key head, and the running maximum, sum and output of its rows."""

    def __init__(self, q_hbm, sinks_hbm, has_sinks, b, h, softmax_scale, dim_v):
        rows, dim = q_hbm.shape[2], q_hbm.shape[3]
        self.rows = rows
        q_sb = nl.ndarray((rows, dim), dtype=q_hbm.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=q_sb, src=q_hbm[b, h])
        self.q_chunks = turned(q_sb, rows, 0, dim)
        self.top = column(rows)
        self.total = column(rows)
        self.out = nl.ndarray((rows, dim_v), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=self.out, value=0.0, engine=nisa.engine.gpsimd)
        if has_sinks:
            sink_sb = column(rows)
            shift_sb = column(rows)
            nisa.dma_copy(dst=sink_sb, src=sinks_hbm[h])
            nisa.tensor_scalar(dst=self.top, data=sink_sb, op0=nl.multiply,
                               operand0=1.0 / softmax_scale)  # fmt: skip
            nisa.tensor_scalar(dst=shift_sb, data=self.top, op0=nl.multiply,
                               operand0=-softmax_scale)  # fmt: skip
            nisa.activation(dst=self.total, op=nl.exp, data=sink_sb, bias=shift_sb)
        else:
            nisa.memset(dst=self.top, value=NO_MAXIMUM)
            nisa.memset(dst=self.total, value=0.0)

    def save(self, partial_hbm, b, h):
        dim_v = self.out.shape[1]
        nisa.dma_copy(dst=partial_hbm[b, h, :, 0:dim_v], src=self.out)
        nisa.dma_copy(dst=partial_hbm[b, h, :, dim_v : dim_v + 1], src=self.top)
        nisa.dma_copy(dst=partial_hbm[b, h, :, dim_v + 1 : dim_v + 2], src=self.total)


def turned(x_sb, count, start, dim, engine=nisa.engine.vector):
    """x[:, start : start + dim]^T in tiles of up to 128 of dim."""
    chunks = []
    for at in range(0, dim, KEYS):
        size = min(KEYS, dim - at)
        x_psum = nl.ndarray((size, count), dtype=x_sb.dtype, buffer=nl.psum)
        chunk_sb = nl.ndarray((size, count), dtype=x_sb.dtype, buffer=nl.sbuf)
        nisa.nc_transpose(dst=x_psum, data=x_sb[0:count, start + at : start + at + size],
                          engine=nisa.engine.tensor)  # fmt: skip
        nisa.tensor_copy(dst=chunk_sb, src=x_psum, engine=engine)
        chunks.append(chunk_sb)
    return chunks


def gather(k_hbm, v_hbm, table_hbm, positions_hbm, call, b, t):
    """The keys and values 128 t ... of a sequence, (128, Hk D) and (128, Hk Dv); 0 past its end."""
    page_size = k_hbm.shape[1]
    max_pages = table_hbm.shape[1]
    both_sb = nl.ndarray((KEYS, 2), dtype=nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=both_sb, src=positions_hbm[t])
    page_sb = nl.ndarray((KEYS, 1), dtype=nl.int32, buffer=nl.sbuf)
    entries = table_hbm.ap(pattern=[[1, KEYS], [1, 1]], offset=b * max_pages,
                           vector_offset=both_sb[:, 0:1].view(nl.uint32),
                           indirect_dim=1)  # fmt: skip
    nisa.dma_copy(dst=page_sb, src=entries)
    # Whether a key is within the sequence: 1, else 0; entries beyond may hold anything.
    at_sb = column(KEYS)
    valid_sb = nl.ndarray((KEYS, 1), dtype=nl.int32, buffer=nl.sbuf)
    gone_sb = nl.ndarray((KEYS, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.iota(dst=at_sb, pattern=[[0, 1]], offset=t * KEYS, channel_multiplier=1)
    nisa.tensor_scalar(dst=valid_sb, data=at_sb, op0=nl.less, operand0=call.length)
    nisa.tensor_scalar(dst=gone_sb, data=at_sb, op0=nl.greater_equal, operand0=call.length,
                       op1=nl.multiply, operand1=float(NOWHERE))  # fmt: skip
    size_sb = nl.ndarray((KEYS, 1), dtype=nl.int32, buffer=nl.sbuf)
    row_sb = nl.ndarray((KEYS, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=size_sb, value=page_size)
    for other, op in ((size_sb, nl.multiply), (both_sb[:, 1:2], nl.add), (valid_sb, nl.multiply),
                      (gone_sb, nl.add)):  # fmt: skip
        nisa.tensor_tensor(dst=row_sb, data1=page_sb, data2=other, op=op,
                           engine=nisa.engine.gpsimd)  # fmt: skip
        page_sb = row_sb
    found = []
    for x_hbm in (k_hbm, v_hbm):
        width = x_hbm.shape[2] * x_hbm.shape[3]
        x_sb = nl.ndarray((KEYS, width), dtype=x_hbm.dtype, buffer=nl.sbuf)
        nisa.memset(dst=x_sb, value=0.0, engine=nisa.engine.gpsimd)
        nisa.dma_copy(
            dst=x_sb,
            src=x_hbm.ap(pattern=[[width, KEYS], [1, width]], offset=0,
                         vector_offset=row_sb.view(nl.uint32), indirect_dim=1),
            oob_mode=nisa.oob_mode.skip,
        )  # fmt: skip
        found.append(x_sb)
    return found[0], found[1]


def add_keys(state, call, k_tiles, v_tiles, h, k0, dim, dim_v, softmax_scale):
    """A section of keys to the state of one key head."""
    rows, count = state.rows, len(k_tiles) * KEYS
    scores_psum = nl.ndarray((rows, count), dtype=nl.float32, buffer=nl.psum)
    for i in range(len(k_tiles)):
        k_chunks = turned(k_tiles[i], KEYS, h * dim, dim)
        for c in range(len(k_chunks)):
            nisa.nc_matmul(dst=scores_psum[:, i * KEYS : (i + 1) * KEYS],
                           stationary=state.q_chunks[c], moving=k_chunks[c],
                           accumulate=c > 0)  # fmt: skip
    masked_sb = nl.ndarray((rows, count), dtype=nl.float32, buffer=nl.sbuf)
    seen_sb = column(rows)
    nisa.range_select(
        dst=masked_sb, on_true_tile=scores_psum, comp_op0=nl.greater_equal, comp_op1=nl.less,
        bound0=call.low, bound1=call.high, range_start=k0,
        reduce_cmd=nisa.reduce_cmd.reset_reduce, reduce_res=seen_sb, reduce_op=nl.maximum,
    )  # fmt: skip
    top_sb, shift_sb, part_sb = column(rows), column(rows), column(rows)
    nisa.tensor_tensor(dst=top_sb, data1=seen_sb, data2=state.top, op=nl.maximum)
    nisa.tensor_scalar(dst=shift_sb, data=top_sb, op0=nl.multiply, operand0=-softmax_scale)
    p_sb = nl.ndarray((rows, count), dtype=k_tiles[0].dtype, buffer=nl.sbuf)
    nisa.activation(dst=p_sb, op=nl.exp, data=masked_sb, bias=shift_sb, scale=softmax_scale,
                    reduce_op=nl.add, reduce_res=part_sb,
                    reduce_cmd=nisa.reduce_cmd.reset_reduce)  # fmt: skip
    out_psum = nl.ndarray((rows, dim_v), dtype=nl.float32, buffer=nl.psum)
    for i in range(len(v_tiles)):
        p_turned = turned(p_sb, rows, i * KEYS, KEYS, nisa.engine.scalar)
        nisa.nc_matmul(dst=out_psum, stationary=p_turned[0],
                       moving=v_tiles[i][:, h * dim_v : (h + 1) * dim_v],
                       accumulate=i > 0)  # fmt: skip
    decay_sb = decayed(state, shift_sb, softmax_scale)
    nisa.scalar_tensor_tensor(dst=state.total, data=state.total, op0=nl.multiply,
                              operand0=decay_sb, op1=nl.add, operand1=part_sb)  # fmt: skip
    nisa.scalar_tensor_tensor(dst=state.out, data=state.out, op0=nl.multiply, operand0=decay_sb,
                              op1=nl.add, operand1=out_psum)  # fmt: skip
    state.top = top_sb


def decayed(state, shift_sb, softmax_scale):
    """exp(scale * (old maximum - new maximum))."""
    decay_sb = column(state.rows)
    nisa.activation(dst=decay_sb, op=nl.exp, data=state.top, bias=shift_sb, scale=softmax_scale)
    return decay_sb


def merge(state, partial_hbm, b, h, softmax_scale):
    """The other core's state into this one's."""
    rows, dim_v = state.rows, state.out.shape[1]
    other_sb = nl.ndarray((rows, dim_v + 2), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=other_sb, src=partial_hbm[b, h])
    other_top = other_sb[:, dim_v : dim_v + 1]
    top_sb, shift_sb, other_decay = column(rows), column(rows), column(rows)
    nisa.tensor_tensor(dst=top_sb, data1=state.top, data2=other_top, op=nl.maximum)
    nisa.tensor_scalar(dst=shift_sb, data=top_sb, op0=nl.multiply, operand0=-softmax_scale)
    decay_sb = decayed(state, shift_sb, softmax_scale)
    nisa.activation(dst=other_decay, op=nl.exp, data=other_top, bias=shift_sb, scale=softmax_scale)
    nisa.tensor_scalar(dst=other_sb, data=other_sb, op0=nl.multiply, operand0=other_decay)
    nisa.scalar_tensor_tensor(dst=state.out, data=state.out, op0=nl.multiply, operand0=decay_sb,
                              op1=nl.add, operand1=other_sb[:, 0:dim_v])  # fmt: skip
    nisa.scalar_tensor_tensor(dst=state.total, data=state.total, op0=nl.multiply,
                              operand0=decay_sb, op1=nl.add,
                              operand1=other_sb[:, dim_v + 1 : dim_v + 2])  # fmt: skip
    state.top = top_sb


def finish(state, out_hbm, lse_hbm, b, h, softmax_scale, has_sinks):
    """out and lse; a row without a key has sum 0: 0 and -inf."""
    rows, dim_v = state.rows, state.out.shape[1]
    safe_sb, over_sb, lse_sb, log_sb = column(rows), column(rows), column(rows), column(rows)
    nisa.tensor_scalar(dst=safe_sb, data=state.total, op0=nl.maximum, operand0=SMALLEST_SUM)
    nisa.reciprocal(dst=over_sb, data=safe_sb)
    out_sb = nl.ndarray((rows, dim_v), dtype=out_hbm.dtype, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=out_sb, data=state.out, op0=nl.multiply, operand0=over_sb)
    nisa.dma_copy(dst=out_hbm[b, h], src=out_sb)
    nisa.activation(dst=log_sb, op=nl.log, data=safe_sb)
    nisa.scalar_tensor_tensor(dst=lse_sb, data=state.top, op0=nl.multiply, operand0=softmax_scale,
                              op1=nl.add, operand1=log_sb)  # fmt: skip
    if not has_sinks:
        # 0 or the lowest number, added twice: -inf where the sum is 0.
        low_sb = column(rows)
        nisa.tensor_scalar(dst=low_sb, data=state.total, op0=nl.equal, operand0=0.0,
                           op1=nl.multiply, operand1=LOWEST)  # fmt: skip
        nisa.tensor_tensor(dst=lse_sb, data1=lse_sb, data2=low_sb, op=nl.add)
        nisa.tensor_tensor(dst=lse_sb, data1=lse_sb, data2=low_sb, op=nl.add)
    heads_k = out_hbm.shape[1]
    offset = (b * heads_k + h) * rows
    nisa.dma_copy(dst=lse_hbm.ap(pattern=[[1, rows], [1, 1]], offset=offset), src=lse_sb)
