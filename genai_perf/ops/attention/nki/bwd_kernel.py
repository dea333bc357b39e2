"""Attention backward: 512 keys stay, the queries of a section stream by; no score matrix in HBM.

Pseudocode, for one query head, a section of queries, 512 keys and 128 queries of the section:
    S = Q K^T, P = exp(scale S - lse), dP = dO V^T, dS = P (dP - D)
    dV += P^T dO, dK += dS^T Q (PSUM, over the section), dQ += dS K (SBUF, over the keys)
with D = rowsum(dO O) - dlse, and dS times 1 - tanh^2 where there is a softcap; scale comes last.
"""

from ...._backends.nki import nisa, nki, nl
from .geometry import BLOCK, KEYS, QUERIES, all_visible, key_range, tiles
from .tiles import head_rows, key_bounds, load_rows, new_transposed, product, transpose_into

# A row without a key has lse -inf; its probabilities are made exp(-NO_KEYS) = 0.
NO_KEYS = 1e30
# What the queries of a section may take of a partition.
SECTION_BYTES = 96 * 1024


@nki.jit
def attention_bwd(q_hbm, k_hbm, v_hbm, out_hbm, dout_hbm, lse_hbm, dlse_hbm, softmax_scale, softcap,
                  left, right):  # fmt: skip
    """dq, dk, dv and delta = rowsum(dO O) - dlse.

    Dimensions and arguments as in attention_fwd, D and Dv up to 256.
    Args:
        out_hbm, dout_hbm (B, Sq, H, Dv); lse_hbm, dlse_hbm (B, H, Sq) fp32.
    Returns:
        dq (B, Sq, H, D), dk (B, Sk, Hk, D), dv (B, Sk, Hk, Dv) of q's type, delta (B, H, Sq) fp32.
    Notes: gen3 and later. P and dS are stationary as they lie for dV and dK; dS^T, for dQ, is the
        one transpose. Several sections or heads of a group add dK and dV in HBM, in fp32.
    """
    batch, seqlen_q, heads, dim = q_hbm.shape
    seqlen_k, heads_k, dim_v = k_hbm.shape[1], k_hbm.shape[2], v_hbm.shape[3]
    dq_hbm = nl.ndarray(q_hbm.shape, dtype=q_hbm.dtype, buffer=nl.shared_hbm)
    dk_hbm = nl.ndarray(k_hbm.shape, dtype=q_hbm.dtype, buffer=nl.shared_hbm)
    dv_hbm = nl.ndarray(v_hbm.shape, dtype=q_hbm.dtype, buffer=nl.shared_hbm)
    delta_hbm = nl.ndarray(lse_hbm.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    work = Scratch(q_hbm.dtype, dim, dim_v)
    work.rule(seqlen_q, seqlen_k, softmax_scale, softcap, left, right)
    each = 2 if q_hbm.dtype != nl.float32 else 4
    chunks = len(tiles(0, dim, BLOCK)) + len(tiles(0, dim_v, BLOCK))
    tile_bytes = (dim + dim_v + QUERIES * chunks) * each + 4 * dim + 32
    sections = tiles(0, seqlen_q, (SECTION_BYTES // tile_bytes) * QUERIES)
    group = heads // heads_k
    passes = group * len(sections)
    for b in range(batch):
        for hk in range(heads_k):
            dk_sum = Sum(dk_hbm, b, hk, passes, softmax_scale)
            dv_sum = Sum(dv_hbm, b, hk, passes, 1.0)
            for turn in range(passes):
                head = hk * group + turn // len(sections)
                start, count = sections[turn % len(sections)]
                queries = []
                for q0, nq in tiles(start, start + count, QUERIES):
                    queries.append(Queries(work, b, head, q0, nq))
                    queries[-1].load(q_hbm, out_hbm, dout_hbm, lse_hbm, dlse_hbm, delta_hbm)
                for k0, nk in tiles(0, seqlen_k, KEYS):
                    seen = keys_of_section(work, queries, k_hbm, v_hbm, b, hk, k0, nk)
                    for j, (at, size) in enumerate(tiles(0, nk, BLOCK)):
                        dk_sum.add(turn, k0 + at, size, work.dk[0:size, j, :], seen)
                        dv_sum.add(turn, k0 + at, size, work.dv[0:size, j, :], seen)
                for query in queries:
                    query.write(dq_hbm, softmax_scale)
    return dq_hbm, dk_hbm, dv_hbm, delta_hbm


class Scratch(nl.NKIObject):
    """PSUM: a bank each of S, dP, dQ and transposes; one or two each of dK and dV."""

    def __init__(self, dtype, dim, dim_v):
        self.dtype = dtype
        blocks = KEYS // BLOCK
        self.scores = nl.ndarray((QUERIES, KEYS), dtype=nl.float32, buffer=nl.psum)
        self.dp = nl.ndarray((QUERIES, KEYS), dtype=nl.float32, buffer=nl.psum)
        self.dq = nl.ndarray((QUERIES, dim), dtype=nl.float32, buffer=nl.psum)
        self.dk = psum_blocks(blocks, dim)
        self.dv = psum_blocks(blocks, dim_v)
        self.turned = nl.ndarray((BLOCK, blocks, QUERIES), dtype=dtype, buffer=nl.psum)

    def rule(self, seqlen_q, seqlen_k, softmax_scale, softcap, left, right):
        self.seqlen_q = seqlen_q
        self.seqlen_k = seqlen_k
        self.softcap = softcap
        self.scale = softmax_scale
        self.factor = softcap if softcap > 0 else softmax_scale
        self.left = left
        self.right = right


def psum_blocks(blocks, dim):
    """(128, blocks, dim) fp32 in PSUM, no block on two banks."""
    room = 128 if dim <= 128 else 256
    held = nl.ndarray((BLOCK, blocks, room), dtype=nl.float32, buffer=nl.psum)
    return held[:, :, 0:dim]


class Sum(nl.NKIObject):
    """dK or dV of one head: gathered over passes in fp32 HBM, written by the last."""

    def __init__(self, out_hbm, b, head, passes, scale):
        self.out_hbm = out_hbm
        self.b = b
        self.head = head
        self.passes = passes
        self.scale = scale
        if passes > 1:
            self.sum_hbm = nl.ndarray((out_hbm.shape[1], out_hbm.shape[3]), dtype=nl.float32,
                                      buffer=nl.private_hbm)  # fmt: skip

    def add(self, turn, row, count, part_psum, seen):
        """The rows row .. row + count - 1 of pass `turn`; nothing if the pass saw none of them."""
        dim = self.out_hbm.shape[3]
        rows_sb = nl.ndarray((count, dim), dtype=nl.float32, buffer=nl.sbuf)
        if turn > 0:
            nisa.dma_copy(dst=rows_sb, src=self.sum_hbm[row : row + count, :])
            if seen:
                nisa.tensor_tensor(dst=rows_sb, data1=rows_sb, data2=part_psum, op=nl.add)
        elif seen:
            nisa.tensor_copy(dst=rows_sb, src=part_psum, engine=nisa.engine.scalar)
        else:
            nisa.memset(dst=rows_sb, value=0.0, engine=nisa.engine.gpsimd)
        if turn < self.passes - 1:
            nisa.dma_copy(dst=self.sum_hbm[row : row + count, :], src=rows_sb)
        else:
            write_scaled(self.out_hbm, self.b, self.head, row, count, rows_sb, self.scale)


def write_scaled(out_hbm, b, head, row, count, rows_sb, scale):
    cast_sb = nl.ndarray(rows_sb.shape, dtype=out_hbm.dtype, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=cast_sb, data=rows_sb, op0=nl.multiply, operand0=scale)
    nisa.dma_copy(dst=head_rows(out_hbm, b, head, row, count), src=cast_sb)


class Queries(nl.NKIObject):
    """128 queries of a section: Q, dO as they lie and transposed, D, -lse and the sum of dQ."""

    def __init__(self, work, b, head, q0, nq):
        self.work = work
        self.b = b
        self.head = head
        self.q0 = q0
        self.nq = nq
        self.started = False

    def load(self, q_hbm, out_hbm, dout_hbm, lse_hbm, dlse_hbm, delta_hbm):
        work, nq = self.work, self.nq
        dim, dim_v = q_hbm.shape[3], dout_hbm.shape[3]
        self.q_sb = load_rows(q_hbm, self.b, self.head, self.q0, nq)
        self.do_sb = load_rows(dout_hbm, self.b, self.head, self.q0, nq)
        self.q_chunks = new_transposed(dim, nq, work.dtype)
        self.do_chunks = new_transposed(dim_v, nq, work.dtype)
        scratch = work.turned[:, 0, :]
        transpose_into(self.q_chunks, 0, self.q_sb, scratch, nq, dim)
        transpose_into(self.do_chunks, 0, self.do_sb, scratch, nq, dim_v)
        self.bounds = key_bounds(self.q0, nq, work.seqlen_q, work.seqlen_k, work.left, work.right)
        self.load_delta(out_hbm, dlse_hbm, delta_hbm)
        self.load_lse(lse_hbm)
        self.dq_sb = nl.ndarray((nq, dim), dtype=nl.float32, buffer=nl.sbuf)

    def column(self, x_hbm):
        """(nq, 1) of x (B, H, Sq)."""
        heads, seqlen_q = x_hbm.shape[1], x_hbm.shape[2]
        offset = (self.b * heads + self.head) * seqlen_q + self.q0
        return x_hbm.ap(pattern=[[1, self.nq], [1, 1]], offset=offset)

    def load_delta(self, out_hbm, dlse_hbm, delta_hbm):
        nq, dim_v = self.nq, out_hbm.shape[3]
        out_sb = load_rows(out_hbm, self.b, self.head, self.q0, nq)
        product_sb = nl.ndarray((nq, dim_v), dtype=nl.float32, buffer=nl.sbuf)
        self.delta_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
        dlse_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=dlse_sb, src=self.column(dlse_hbm))
        nisa.tensor_tensor(dst=product_sb, data1=out_sb, data2=self.do_sb, op=nl.multiply,
                           engine=nisa.engine.gpsimd)  # fmt: skip
        nisa.tensor_reduce(dst=self.delta_sb, op=nl.add, data=product_sb, axis=1)
        nisa.tensor_tensor(dst=self.delta_sb, data1=self.delta_sb, data2=dlse_sb, op=nl.subtract,
                           engine=nisa.engine.gpsimd)  # fmt: skip
        nisa.dma_copy(dst=self.column(delta_hbm), src=self.delta_sb)

    def load_lse(self, lse_hbm):
        """-lse, and -NO_KEYS where lse is -inf."""
        nq = self.nq
        lse_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
        blind_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
        self.shift_sb = nl.ndarray((nq, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=lse_sb, src=self.column(lse_hbm))
        nisa.tensor_scalar(dst=blind_sb, data=lse_sb, op0=nl.less, operand0=-0.9 * NO_KEYS,
                           op1=nl.multiply, operand1=-2.0 * NO_KEYS)  # fmt: skip
        nisa.tensor_scalar(dst=self.shift_sb, data=lse_sb, op0=nl.maximum, operand0=-NO_KEYS,
                           op1=nl.multiply, operand1=-1.0)  # fmt: skip
        nisa.tensor_tensor(dst=self.shift_sb, data1=self.shift_sb, data2=blind_sb, op=nl.add)

    def write(self, dq_hbm, scale):
        if not self.started:
            nisa.memset(dst=self.dq_sb, value=0.0, engine=nisa.engine.gpsimd)
        write_scaled(dq_hbm, self.b, self.head, self.q0, self.nq, self.dq_sb, scale)


def keys_of_section(work, queries, k_hbm, v_hbm, b, hk, k0, nk):
    """dK and dV of 512 keys into PSUM, dQ's share into SBUF; False if no query sees the keys."""
    seeing = []
    for query in queries:
        low, high = key_range(query.q0, query.nq, work.seqlen_q, work.seqlen_k, work.left,
                              work.right)  # fmt: skip
        if k0 < high and k0 + nk > low:
            seeing.append(query)
    if len(seeing) == 0:
        return False
    dim, dim_v = k_hbm.shape[3], v_hbm.shape[3]
    k_chunks = new_transposed(dim, nk, work.dtype)
    v_chunks = new_transposed(dim_v, nk, work.dtype)
    k_rows = []
    scratch = work.turned[:, 0, :]
    for at, size in tiles(0, nk, BLOCK):
        k_sb = load_rows(k_hbm, b, hk, k0 + at, size)
        v_sb = load_rows(v_hbm, b, hk, k0 + at, size)
        transpose_into(k_chunks, at, k_sb, scratch, size, dim)
        transpose_into(v_chunks, at, v_sb, scratch, size, dim_v)
        k_rows.append(k_sb)
    for i in range(len(seeing)):
        tile_gradients(work, seeing[i], k_chunks, v_chunks, k_rows, k0, nk, i == 0)
    return True


def probabilities(work, query, k_chunks, k0, nk):
    """P (nq, nk), and tanh's values where there is a softcap (else P again)."""
    nq = query.nq
    source = work.scores[0:nq, 0:nk]
    product(source, query.q_chunks, 0, nq, k_chunks, 0, nk)
    capped_sb = source
    if work.softcap > 0:
        capped_sb = nl.ndarray((nq, nk), dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=capped_sb, op=nl.tanh, data=source, scale=work.scale / work.softcap)
        source = capped_sb
    if not all_visible(query.q0, nq, k0, nk, work.seqlen_q, work.seqlen_k, work.left, work.right):
        masked_sb = nl.ndarray((nq, nk), dtype=nl.float32, buffer=nl.sbuf)
        nisa.range_select(
            dst=masked_sb, on_true_tile=source, comp_op0=nl.greater_equal, comp_op1=nl.less,
            bound0=query.bounds[0], bound1=query.bounds[1], range_start=k0,
        )  # fmt: skip
        source = masked_sb
    p_sb = nl.ndarray((nq, nk), dtype=work.dtype, buffer=nl.sbuf)
    nisa.activation(dst=p_sb, op=nl.exp, data=source, bias=query.shift_sb, scale=work.factor)
    return p_sb, capped_sb


def tile_gradients(work, query, k_chunks, v_chunks, k_rows, k0, nk, first):
    """What 128 queries and 512 keys add to dQ, dK and dV."""
    nq = query.nq
    p_sb, capped_sb = probabilities(work, query, k_chunks, k0, nk)
    dp_psum = work.dp[0:nq, 0:nk]
    product(dp_psum, query.do_chunks, 0, nq, v_chunks, 0, nk)
    ds_sb = nl.ndarray((nq, nk), dtype=work.dtype, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(dst=ds_sb, data=dp_psum, op0=nl.subtract, operand0=query.delta_sb,
                              op1=nl.multiply, operand1=p_sb)  # fmt: skip
    if work.softcap > 0:
        slope_sb = nl.ndarray((nq, nk), dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=slope_sb, op=nl.square, data=capped_sb)
        nisa.scalar_tensor_tensor(dst=ds_sb, data=slope_sb, op0=nl.subtract, operand0=1.0,
                                  reverse0=True, op1=nl.multiply, operand1=ds_sb)  # fmt: skip
    blocks = tiles(0, nk, BLOCK)
    turned_sb = nl.ndarray((BLOCK, len(blocks), nq), dtype=work.dtype, buffer=nl.sbuf)
    for j in range(len(blocks)):
        at, size = blocks[j]
        nisa.nc_matmul(dst=work.dv[0:size, j, :], stationary=p_sb[:, at : at + size],
                       moving=query.do_sb, accumulate=not first)  # fmt: skip
        nisa.nc_matmul(dst=work.dk[0:size, j, :], stationary=ds_sb[:, at : at + size],
                       moving=query.q_sb, accumulate=not first)  # fmt: skip
        turned_psum = work.turned[0:size, j, 0:nq]
        nisa.nc_transpose(dst=turned_psum, data=ds_sb[:, at : at + size],
                          engine=nisa.engine.tensor)  # fmt: skip
        nisa.tensor_copy(dst=turned_sb[0:size, j, :], src=turned_psum, engine=nisa.engine.scalar)
    for j in range(len(blocks)):
        size = blocks[j][1]
        nisa.nc_matmul(dst=work.dq[0:nq, :], stationary=turned_sb[0:size, j, :],
                       moving=k_rows[j], accumulate=j > 0)  # fmt: skip
    if query.started:
        nisa.tensor_tensor(dst=query.dq_sb, data1=query.dq_sb, data2=work.dq[0:nq, :], op=nl.add)
    else:
        nisa.tensor_copy(dst=query.dq_sb, src=work.dq[0:nq, :])
        query.started = True
