"""Decode attention: keys gathered by page, 128 at a time for all heads; on one core or two.

Pseudocode, for one sequence, up to 16 gathers at a time (every other section the second core's):
    rows of the cache by block table; past the end nothing is fetched
    S^T = K Q^T, keys on partitions, all heads side by side, masked; m' = max(m, max S)
    P^T = exp(scale (S^T - m')); l = l exp(scale (m - m')) + sum P; O = O exp(...) + P V
    two cores: both write (O, m, l), meet, and the first merges; out = O / l, lse = scale m + log l
Keys on partitions make P^T the stationary operand as it lies, and every partition works.
"""

from ...._backends.nki import nisa, nki, nl
from .cache import KEYS, WIDE, Section, Sequence, new, spread
from .state import GROUP, State, merge

SECTION = 16  # gathers between two updates of the running maximum
SCORES = 512  # of a partition: a PSUM bank
SECTION_BYTES = 64 * 1024  # of a partition, for the keys and values of a section
TURNED = 4  # heads whose keys leave PSUM together


@nki.jit
def decode_attention(q_hbm, k_hbm, v_hbm, table_hbm, spans_hbm, ages_hbm, places_hbm, sinks_hbm,
                     slopes_hbm, k_scale_hbm, v_scale_hbm, kind, has_sinks, has_slopes,
                     softmax_scale, softcap, left, right):  # fmt: skip
    """out (B, Hk, R, Dv) and lse (B, Hk, R) of R query rows of each key head over its cache.

    Args:
        q_hbm (B, Hk, R, D), R <= 128; k_hbm (pages, page, Hk, D), v_hbm (pages, page, Hk, Dv) of
        q's type, or int8 or the bytes of e4m3fn; table_hbm (B, max_pages) int32; spans_hbm (B, 2)
        fp32: length, padding on the left; ages_hbm (1, R) fp32: i - seqlen_q of each row;
        places_hbm (2, 128, T) int32: of key 128 t + p at [:, p, t] its place in the table and in
        the page; sinks_hbm (Hk, R), slopes_hbm (B, Hk R), read if there are any;
        k_scale_hbm, v_scale_hbm (B, Hk) fp32, read unless kind is plain.
        kind: "plain", "int8" or "fp8". softcap 0 is none; left, right: the window, -1 unbounded.
    Notes: gen3 and later; the bytes of the cache set the time, where it is not of fp8 on gen3,
        whose codes above 240 Vector has to make float16 of (a NaN becomes 480).
    """
    call = Call(q_hbm, k_hbm, v_hbm, table_hbm, spans_hbm, ages_hbm, places_hbm, sinks_hbm,
                slopes_hbm, k_scale_hbm, v_scale_hbm)  # fmt: skip
    call.numbers(kind, has_sinks, has_slopes, softmax_scale, softcap, left, right)
    batch, heads_k, rows, _ = q_hbm.shape
    dim_v = v_hbm.shape[3]
    out_hbm = nl.ndarray((batch, heads_k, rows, dim_v), dtype=q_hbm.dtype, buffer=nl.shared_hbm)
    lse_hbm = nl.ndarray((batch, heads_k, rows), dtype=nl.float32, buffer=nl.shared_hbm)
    cores, core = nl.num_programs(0), nl.program_id(0)
    partial_hbm = out_hbm
    if cores > 1:
        partial_hbm = nl.ndarray((batch, heads_k, rows, dim_v + 2), dtype=nl.float32,
                                 buffer=nl.shared_hbm)  # fmt: skip
    tiles = places_hbm.shape[2]
    states = []
    for b in range(batch):
        sequence = Sequence(call, b)
        own = []
        for h0 in range(0, heads_k, call.group):
            own.append(State(call, b, h0, min(call.group, heads_k - h0), core == 0))
        held = min(call.section, tiles)
        rooms = [Section(call, held)]
        if tiles > held * cores:
            rooms.append(Section(call, held))
        for s, first in enumerate(range(0, tiles, call.section)):
            if s % cores == core:
                count = min(call.section, tiles - first)
                room = rooms[s // cores % len(rooms)]
                k_tiles, v_tiles = room.load(call, sequence, first, count)
                penalty, away_sb = sequence.penalty(call, first, count)
                for state in own:
                    add_keys(call, state, k_tiles, v_tiles, penalty, away_sb)
        if core == 1:
            for state in own:
                state.save(partial_hbm)
        states.append(own)
    if cores > 1:
        nisa.core_barrier(data=partial_hbm, cores=(0, 1))
    if core == 0:
        for own in states:
            for state in own:
                if cores > 1:
                    merge(state, partial_hbm, call.factor)
                state.finish(call, out_hbm, lse_hbm)
    return out_hbm, lse_hbm


class Call(nl.NKIObject):
    """What is the same for all sequences."""

    def __init__(self, q_hbm, k_hbm, v_hbm, table_hbm, spans_hbm, ages_hbm, places_hbm, sinks_hbm,
                 slopes_hbm, k_scale_hbm, v_scale_hbm):  # fmt: skip
        self.q_hbm, self.k_hbm, self.v_hbm = q_hbm, k_hbm, v_hbm
        self.table_hbm, self.spans_hbm, self.places_hbm = table_hbm, spans_hbm, places_hbm
        self.sinks_hbm, self.slopes_hbm = sinks_hbm, slopes_hbm
        self.k_scale_hbm, self.v_scale_hbm = k_scale_hbm, v_scale_hbm
        self.dtype = q_hbm.dtype
        heads_k, self.rows, self.dim = q_hbm.shape[1], q_hbm.shape[2], q_hbm.shape[3]
        self.dim_v = v_hbm.shape[3]
        each = 4 if k_hbm.dtype == nl.float32 else 2
        if k_hbm.dtype in (nl.int8, nl.uint8):
            each = 4  # the codes, and what they become
        self.group = max(1, min(GROUP, KEYS // self.rows, heads_k))
        fits = SECTION_BYTES // (heads_k * (self.dim + self.dim_v) * each)
        self.section = max(1, min(SECTION, SCORES // (self.group * self.rows), fits))
        tiles = places_hbm.shape[2]
        self.ages_sb = spread(ages_hbm, 0, self.rows, KEYS)
        self.slots_sb = new(KEYS, tiles, nl.uint32)
        self.inside_sb = new(KEYS, tiles, nl.int32)
        nisa.dma_copy(dst=self.slots_sb.view(nl.int32), src=places_hbm[0])
        nisa.dma_copy(dst=self.inside_sb, src=places_hbm[1])
        self.page_sb = new(KEYS, tiles, nl.int32)
        nisa.memset(dst=self.page_sb, value=k_hbm.shape[1])
        self.ones_sb = new(KEYS, KEYS)
        nisa.memset(dst=self.ones_sb, value=1.0)
        self.unit_sb = nl.shared_identity_matrix(self.rows, dtype=nl.float32)

    def numbers(self, kind, has_sinks, has_slopes, softmax_scale, softcap, left, right):
        self.kind, self.has_sinks, self.has_slopes = kind, has_sinks, has_slopes
        self.softmax_scale, self.softcap, self.left, self.right = (
            softmax_scale,
            softcap,
            left,
            right,
        )
        # Scores, capped or not, times factor are what exp takes.
        self.factor = softcap if softcap > 0 else softmax_scale
        self.placed = left >= 0 or right >= 0 or has_slopes
        self.native_fp8 = nisa.get_nc_version() == nisa.nc_version.gen4
        # What a cached 1 is, in units of its scale.
        self.unit = 1.0
        if kind == "fp8" and not self.native_fp8:
            self.unit = WIDE


def add_keys(call, state, k_tiles, v_tiles, penalty, away_sb):
    """A section of keys to the state of some key heads."""
    scores_sb = scores(call, state, k_tiles, penalty, away_sb)
    state.raise_maximum(call, scores_sb)
    count, heads, rows = len(k_tiles), state.heads, call.rows
    p_sb = nl.ndarray((KEYS, count, heads, rows), dtype=call.dtype, buffer=nl.sbuf)
    tops = state.spread_top(call)
    nisa.tensor_tensor(dst=scores_sb, data1=scores_sb,
                       data2=tops.expand_dim(1).broadcast(1, count), op=nl.subtract)  # fmt: skip
    nisa.activation(dst=p_sb, op=nl.exp, data=scores_sb, scale=call.factor)
    state.add_sums(call, p_sb)
    dim_v, h0 = call.dim_v, state.h0
    room = 128 if dim_v <= 128 else 256
    held = nl.ndarray((rows, heads, room), dtype=nl.float32, buffer=nl.psum)
    for t in range(count):
        for h in range(heads):
            nisa.nc_matmul(dst=held[:, h, 0:dim_v], stationary=p_sb[:, t, h, :],
                           moving=v_tiles[t][:, (h0 + h) * dim_v : (h0 + h + 1) * dim_v],
                           accumulate=t > 0)  # fmt: skip
    for h in range(heads):
        nisa.scalar_tensor_tensor(dst=state.out[:, h, :], data=state.out[:, h, :],
                                  op0=nl.multiply, operand0=state.decay[:, h : h + 1],
                                  op1=nl.add, operand1=held[:, h, 0:dim_v])  # fmt: skip


def scores(call, state, k_tiles, penalty, away_sb):
    """(128, gathers, heads, R) fp32: scores, capped, with slopes and what is not seen LOWEST."""
    count, heads, rows = len(k_tiles), state.heads, call.rows
    shape = (KEYS, count, heads, rows)
    source = nl.ndarray(shape, dtype=nl.float32, buffer=nl.psum)
    for t in range(count):
        products(call, state, k_tiles[t], source, t)
    scores_sb = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
    if call.kind != "plain":
        scale = state.k_scale.expand_dim(1).broadcast(1, count).expand_dim(3).broadcast(3, rows)
        nisa.tensor_tensor(dst=scores_sb, data1=source, data2=scale, op=nl.multiply)
        source = scores_sb
    if call.softcap > 0:
        nisa.activation(dst=scores_sb, op=nl.tanh, data=source,
                        scale=call.softmax_scale / call.softcap)  # fmt: skip
        source = scores_sb
    if call.has_slopes:
        far_sb = nl.ndarray((KEYS, count, rows), dtype=nl.float32, buffer=nl.sbuf)
        bias_sb = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=far_sb, op=nl.abs, data=away_sb)
        nisa.tensor_tensor(dst=bias_sb, data1=far_sb.expand_dim(2).broadcast(2, heads),
                           data2=state.slopes.expand_dim(1).broadcast(1, count),
                           op=nl.multiply)  # fmt: skip
        nisa.tensor_tensor(dst=scores_sb, data1=source, data2=bias_sb, op=nl.subtract)
        source = scores_sb
    hidden = penalty.expand_dim(2).broadcast(2, heads)
    if penalty.shape[2] < rows:
        hidden = hidden.broadcast(3, rows)
    nisa.tensor_tensor(dst=scores_sb, data1=source, data2=hidden, op=nl.add)
    return scores_sb


def products(call, state, k_sb, scores_psum, t):
    """scores_psum[:, t] = K Q^T of one gather, K turned by the tensor engine."""
    dim = call.dim
    for i, first in enumerate(range(0, state.heads, TURNED)):
        many = min(TURNED, state.heads - first)
        for c, start in enumerate(range(0, dim, KEYS)):
            size = min(KEYS, dim - start)
            turned_psum = nl.ndarray((size, many, KEYS), dtype=k_sb.dtype, buffer=nl.psum)
            turned_sb = nl.ndarray((size, many, KEYS), dtype=k_sb.dtype, buffer=nl.sbuf)
            for j in range(many):
                at = (state.h0 + first + j) * dim + start
                nisa.nc_transpose(dst=turned_psum[:, j, :], data=k_sb[:, at : at + size],
                                  engine=nisa.engine.tensor)  # fmt: skip
            # A third of them by Scalar, where it does not make numbers of codes.
            by_scalar = call.kind == "plain" and (t + i + c) % 3 == 2
            engine = nisa.engine.scalar if by_scalar else nisa.engine.vector
            nisa.tensor_copy(dst=turned_sb, src=turned_psum, engine=engine)
            for j in range(many):
                nisa.nc_matmul(dst=scores_psum[:, t, first + j, :], stationary=turned_sb[:, j, :],
                               moving=state.q_chunks[c][:, first + j, :],
                               accumulate=c > 0)  # fmt: skip
