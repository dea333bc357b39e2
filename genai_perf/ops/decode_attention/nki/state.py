"""The running maximum, sum and output of a few key heads, rows of queries on partitions."""

from ...._backends.nki import nisa, nl
from .cache import KEYS, new, spread

GROUP = 8  # key heads at a time
# A maximum below every score and above the value of a masked one, so that nothing is inf - inf.
NO_MAXIMUM = -1e30
SMALLEST_SUM = 2.0**-60
LOWEST = -3.4e38


class State(nl.NKIObject):
    """Q^T of heads h0 ..., and their maxima (in units of raw scores), sums and outputs.

    q_chunks: (up to 128 of dim, heads, R); top, total, decay: (R, heads); out: (R, heads, Dv).
    """

    def __init__(self, call, b, h0, heads, is_first):
        self.b, self.h0, self.heads = b, h0, heads
        self.load_queries(call)
        rows = call.rows
        self.top, self.total = new(rows, heads), new(rows, heads)
        self.out = nl.ndarray((rows, heads, call.dim_v), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=self.out, value=0.0, engine=nisa.engine.gpsimd)
        if call.has_sinks and is_first:
            sink_sb, left_sb = new(rows, heads), new(rows, heads)
            source = call.sinks_hbm.ap(pattern=[[1, rows], [rows, heads]], offset=h0 * rows)
            nisa.dma_copy(dst=sink_sb, src=source)
            nisa.tensor_scalar(dst=self.top, data=sink_sb, op0=nl.multiply,
                               operand0=1.0 / call.factor)  # fmt: skip
            # Rounded on the way to raw units: what the sink still adds is exp(sink - factor top).
            nisa.scalar_tensor_tensor(dst=left_sb, data=self.top, op0=nl.multiply,
                                      operand0=-call.factor, op1=nl.add,
                                      operand1=sink_sb)  # fmt: skip
            nisa.activation(dst=self.total, op=nl.exp, data=left_sb)
        else:
            nisa.memset(dst=self.top, value=NO_MAXIMUM)
            nisa.memset(dst=self.total, value=0.0)
        if call.kind != "plain":
            at = b * call.k_hbm.shape[2] + h0
            self.k_scale = spread(call.k_scale_hbm, at, heads, KEYS)
            self.v_scale = spread(call.v_scale_hbm, at, heads, rows)
            for scale_sb in (self.k_scale, self.v_scale):
                if call.unit != 1.0:
                    nisa.tensor_scalar(dst=scale_sb, data=scale_sb, op0=nl.multiply,
                                       operand0=call.unit)  # fmt: skip
        if call.has_slopes:
            at = (b * call.k_hbm.shape[2] + h0) * rows
            slopes_sb = spread(call.slopes_hbm, at, heads * rows, KEYS)
            nisa.tensor_scalar(dst=slopes_sb, data=slopes_sb, op0=nl.multiply,
                               operand0=1.0 / call.factor)  # fmt: skip
            self.slopes = slopes_sb.reshape((KEYS, heads, rows))

    def load_queries(self, call):
        heads_k, rows, dim = call.q_hbm.shape[1], call.rows, call.dim
        heads = self.heads
        q_sb = nl.ndarray((rows, heads, dim), dtype=call.dtype, buffer=nl.sbuf)
        offset = (self.b * heads_k + self.h0) * rows * dim
        nisa.dma_copy(dst=q_sb, src=call.q_hbm.ap(
            pattern=[[dim, rows], [rows * dim, heads], [1, dim]], offset=offset))  # fmt: skip
        self.q_chunks = []
        for start in range(0, dim, KEYS):
            size = min(KEYS, dim - start)
            turned_sb = nl.ndarray((size, heads, rows), dtype=call.dtype, buffer=nl.sbuf)
            for h in range(heads):
                turned_psum = nl.ndarray((size, rows), dtype=call.dtype, buffer=nl.psum)
                nisa.nc_transpose(dst=turned_psum, data=q_sb[:, h, start : start + size],
                                  engine=nisa.engine.tensor)  # fmt: skip
                nisa.tensor_copy(dst=turned_sb[:, h, :], src=turned_psum)
            self.q_chunks.append(turned_sb)

    def raise_maximum(self, call, scores_sb):
        """top, and the decay of what was summed below the old one."""
        rows, heads = call.rows, self.heads
        most_sb = nl.ndarray((KEYS, heads, rows), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_reduce(dst=most_sb, op=nl.maximum, data=scores_sb.permute((0, 2, 3, 1)), axis=3)
        turned_psum = nl.ndarray((rows, heads, KEYS), dtype=nl.float32, buffer=nl.psum)
        for h in range(heads):
            nisa.nc_transpose(dst=turned_psum[:, h, :], data=most_sb[:, h, :],
                              engine=nisa.engine.tensor)  # fmt: skip
        top_sb = new(rows, heads)
        nisa.tensor_reduce(dst=top_sb, op=nl.maximum, data=turned_psum, axis=2)
        nisa.tensor_tensor(dst=top_sb, data1=top_sb, data2=self.top, op=nl.maximum)
        self.lower(call.factor, top_sb)

    def lower(self, factor, top_sb):
        """top is top_sb, and decay = exp(factor (old top - top_sb))."""
        below_sb = new(top_sb.shape[0], self.heads)
        self.decay = new(top_sb.shape[0], self.heads)
        nisa.tensor_tensor(dst=below_sb, data1=self.top, data2=top_sb, op=nl.subtract)
        nisa.activation(dst=self.decay, op=nl.exp, data=below_sb, scale=factor)
        self.top = top_sb

    def spread_top(self, call):
        """top on every partition, (128, heads, R) in PSUM: ones times a diagonal."""
        rows, heads = call.rows, self.heads
        diagonal_sb = nl.ndarray((rows, heads, rows), dtype=nl.float32, buffer=nl.sbuf)
        units = call.unit_sb.expand_dim(1).broadcast(1, heads)
        tops = self.top.expand_dim(2).broadcast(2, rows)
        nisa.tensor_tensor(dst=diagonal_sb, data1=units, data2=tops, op=nl.multiply)
        tops_psum = nl.ndarray((KEYS, heads, rows), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=tops_psum, stationary=call.ones_sb[0:rows, :], moving=diagonal_sb)
        return tops_psum

    def add_sums(self, call, p_sb):
        """total = total * decay + the sum of P over keys."""
        rows, heads = call.rows, self.heads
        part_sb = nl.ndarray((KEYS, heads, rows), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_reduce(dst=part_sb, op=nl.add, data=p_sb.permute((0, 2, 3, 1)), axis=3)
        sums_psum = nl.ndarray((rows, heads), dtype=nl.float32, buffer=nl.psum)
        for h in range(heads):
            nisa.nc_matmul(dst=sums_psum[:, h : h + 1], stationary=part_sb[:, h, :],
                           moving=call.ones_sb[:, 0:1])  # fmt: skip
        nisa.tensor_tensor(dst=self.total, data1=self.total, data2=self.decay, op=nl.multiply)
        nisa.tensor_tensor(dst=self.total, data1=self.total, data2=sums_psum, op=nl.add)

    def save(self, partial_hbm):
        """(O, m, l) for the other core."""
        for values, place in self.parts(partial_hbm):
            nisa.dma_copy(dst=place, src=values)

    def parts(self, partial_hbm):
        """O, m and l, each with its place in partial (B, Hk, R, Dv + 2)."""
        rows, heads, dim_v = self.out.shape
        width = dim_v + 2
        offset = (self.b * partial_hbm.shape[1] + self.h0) * rows * width
        found = []
        for values, at, size in ((self.out, 0, dim_v), (self.top.expand_dim(2), dim_v, 1),
                                 (self.total.expand_dim(2), dim_v + 1, 1)):  # fmt: skip
            place = partial_hbm.ap(pattern=[[width, rows], [rows * width, heads], [1, size]],
                                   offset=offset + at)  # fmt: skip
            found.append((values, place))
        return found

    def finish(self, call, out_hbm, lse_hbm):
        """out = O / l and lse = factor m + log l; a row without a key has l = 0: 0 and -inf."""
        rows, heads, dim_v = self.out.shape
        safe_sb, over_sb = new(rows, heads), new(rows, heads)
        lse_sb, log_sb = new(rows, heads), new(rows, heads)
        nisa.tensor_scalar(dst=safe_sb, data=self.total, op0=nl.maximum, operand0=SMALLEST_SUM)
        nisa.reciprocal(dst=over_sb, data=safe_sb)
        if call.kind != "plain":
            nisa.tensor_tensor(dst=over_sb, data1=over_sb, data2=self.v_scale, op=nl.multiply)
        out_sb = nl.ndarray((rows, heads, dim_v), dtype=out_hbm.dtype, buffer=nl.sbuf)
        for h in range(heads):
            nisa.tensor_scalar(dst=out_sb[:, h, :], data=self.out[:, h, :], op0=nl.multiply,
                               operand0=over_sb[:, h : h + 1])  # fmt: skip
        first = (self.b * out_hbm.shape[1] + self.h0) * rows
        nisa.dma_copy(dst=out_hbm.ap(
            pattern=[[dim_v, rows], [rows * dim_v, heads], [1, dim_v]], offset=first * dim_v),
            src=out_sb)  # fmt: skip
        nisa.activation(dst=log_sb, op=nl.log, data=safe_sb)
        nisa.scalar_tensor_tensor(dst=lse_sb, data=self.top, op0=nl.multiply,
                                  operand0=call.factor, op1=nl.add, operand1=log_sb)  # fmt: skip
        if not call.has_sinks:
            # 0 or the lowest number, added twice: -inf where the sum is 0.
            low_sb = new(rows, heads)
            nisa.tensor_scalar(dst=low_sb, data=self.total, op0=nl.equal, operand0=0.0,
                               op1=nl.multiply, operand1=LOWEST)  # fmt: skip
            nisa.tensor_tensor(dst=lse_sb, data1=lse_sb, data2=low_sb, op=nl.add)
            nisa.tensor_tensor(dst=lse_sb, data1=lse_sb, data2=low_sb, op=nl.add)
        nisa.dma_copy(dst=lse_hbm.ap(pattern=[[1, rows], [rows, heads]], offset=first), src=lse_sb)


def merge(state, partial_hbm, factor):
    """The other core's state into this one's."""
    rows, heads, dim_v = state.out.shape
    other_out = nl.ndarray((rows, heads, dim_v), dtype=nl.float32, buffer=nl.sbuf)
    other_top, other_total = new(rows, heads), new(rows, heads)
    places = state.parts(partial_hbm)
    for other, (_, place) in zip((other_out, other_top.expand_dim(2), other_total.expand_dim(2)),
                                 places, strict=True):  # fmt: skip
        nisa.dma_copy(dst=other, src=place)
    top_sb, below_sb, share_sb = new(rows, heads), new(rows, heads), new(rows, heads)
    nisa.tensor_tensor(dst=top_sb, data1=state.top, data2=other_top, op=nl.maximum)
    nisa.tensor_tensor(dst=below_sb, data1=other_top, data2=top_sb, op=nl.subtract)
    nisa.activation(dst=share_sb, op=nl.exp, data=below_sb, scale=factor)
    state.lower(factor, top_sb)
    for total, share in ((state.total, state.decay), (other_total, share_sb)):
        nisa.tensor_tensor(dst=total, data1=total, data2=share, op=nl.multiply)
    nisa.tensor_tensor(dst=state.total, data1=state.total, data2=other_total, op=nl.add)
    for h in range(heads):
        own, other = state.out[:, h, :], other_out[:, h, :]
        nisa.tensor_scalar(dst=other, data=other, op0=nl.multiply,
                           operand0=share_sb[:, h : h + 1])  # fmt: skip
        nisa.scalar_tensor_tensor(dst=own, data=own, op0=nl.multiply,
                                  operand0=state.decay[:, h : h + 1], op1=nl.add,
                                  operand1=other)  # fmt: skip
