"""KL, JSD and cross entropy of rows of logits: tokens on partitions, the vocabulary in chunks.

Pseudocode, for 128 tokens:
    pass 1: running maxima and sums of exp of student and teacher (and of the student at T = 1)
    pass 2: p, q, and the sums that make the divergence; the label's logit
    pass 3: the gradient, from p, q and those sums
"""

from ...._backends.nki import nisa, nki, nl

ROWS = 128
CHUNK = 2048
# In the place of -inf, so that 0 * log 0 is 0.
LOWEST = -1e30
SMALLEST = 2.0**-60


@nki.jit
def distill_rows(student_hbm, teacher_hbm, label_hbm, weight_hbm, kind, hard, need_grad,
                 student_scale, teacher_scale, rate, beta, soft_weight, hard_weight):  # fmt: skip
    """(loss, grad): divergence and cross entropy of each row, and the gradient of
    weight * (soft_weight * divergence + hard_weight * cross entropy).

    Args:
        student_hbm, teacher_hbm (R, V) fp32, bf16 or fp16; label_hbm, weight_hbm (R, 1) fp32.
        kind: forward_kl, reverse_kl, jsd or none (no teacher); rate: 1 / temperature.
        student_scale, teacher_scale: of the logits; beta: jsd's share of the teacher.
    Returns: loss (R, 2) fp32, grad (R, V) of the student's type ((1, 1) without need_grad).
    Notes: gen2 and later. Sums over the vocabulary are fp32, one per 2048 logits, then added.
    """
    rows, vocab = student_hbm.shape
    loss_hbm = nl.ndarray((rows, 2), dtype=nl.float32, buffer=nl.shared_hbm)
    shape = (rows, vocab) if need_grad else (1, 1)
    grad_hbm = nl.ndarray(shape, dtype=student_hbm.dtype, buffer=nl.shared_hbm)
    chunks = []
    for start in range(0, vocab, CHUNK):
        chunks.append((start, min(CHUNK, vocab - start)))
    soft = kind != "none"
    for r0 in range(0, rows, ROWS):
        count = min(ROWS, rows - r0)
        label_sb = load_column(label_hbm, r0, count)
        weight_sb = load_column(weight_hbm, r0, count)
        student = Softmax(student_hbm, student_scale * rate, r0, count)
        student.sum_up(chunks)
        teacher = student
        if soft:
            teacher = Softmax(teacher_hbm, teacher_scale * rate, r0, count)
            teacher.sum_up(chunks)
        plain = student
        if hard:
            plain = Softmax(student_hbm, student_scale, r0, count)
            plain.sum_up(chunks)
        sums = Sums(kind, beta, count)
        for start, size in chunks:
            if soft:
                sums.add_divergence(student, teacher, start, size)
            if hard:
                sums.add_label(plain, label_sb, start, size)
        sums.write(loss_hbm, r0)
        if need_grad:
            for start, size in chunks:
                grad_sb = gradient(kind, hard, student, teacher, plain, sums, label_sb, start, size,
                                   beta, soft_weight * student_scale * rate,
                                   hard_weight * student_scale)  # fmt: skip
                out_sb = nl.ndarray((count, size), dtype=student_hbm.dtype, buffer=nl.sbuf)
                nisa.tensor_scalar(dst=out_sb, data=grad_sb, op0=nl.multiply, operand0=weight_sb)
                nisa.dma_copy(dst=grad_hbm[r0 : r0 + count, start : start + size], src=out_sb)
    if not need_grad:
        zero_sb = new(1, 1, student_hbm.dtype)
        nisa.memset(dst=zero_sb, value=0.0)
        nisa.dma_copy(dst=grad_hbm, src=zero_sb)
    return loss_hbm, grad_hbm


def new(rows, columns, dtype=nl.float32):
    return nl.ndarray((rows, columns), dtype=dtype, buffer=nl.sbuf)


def load_column(x_hbm, r0, count):
    column_sb = new(count, 1)
    nisa.dma_copy(dst=column_sb, src=x_hbm[r0 : r0 + count, :])
    return column_sb


def combine(a, b, op):
    """a op b for (P, 1) tiles, by GpSimd, which is free."""
    out_sb = new(a.shape[0], 1)
    nisa.tensor_tensor(dst=out_sb, data1=a, data2=b, op=op, engine=nisa.engine.gpsimd)
    return out_sb


class Softmax(nl.NKIObject):
    """softmax(scale * logits) of 128 rows: log p = scale * (x - top) - log_sum."""

    def __init__(self, x_hbm, scale, r0, count):
        self.x_hbm = x_hbm
        self.scale = scale
        self.r0 = r0
        self.count = count

    def load(self, start, size):
        """Logits in fp32, -inf as the lowest that can be computed with."""
        raw_sb = new(self.count, size, self.x_hbm.dtype)
        x_sb = new(self.count, size)
        rows = self.x_hbm[self.r0 : self.r0 + self.count, start : start + size]
        nisa.dma_copy(dst=raw_sb, src=rows)
        nisa.tensor_scalar(dst=x_sb, data=raw_sb, op0=nl.maximum, operand0=LOWEST)
        return x_sb

    def below(self, x_sb):
        """scale * (x - top): subtracted first, which loses no bits."""
        y_sb = new(self.count, x_sb.shape[1])
        nisa.tensor_scalar(dst=y_sb, data=x_sb, op0=nl.subtract, operand0=self.top, op1=nl.multiply,
                           operand1=self.scale)  # fmt: skip
        return y_sb

    def sum_up(self, chunks):
        count = self.count
        tops_sb = new(count, len(chunks))
        sums_sb = new(count, len(chunks))
        for i, (start, size) in enumerate(chunks):
            nisa.tensor_reduce(dst=tops_sb[:, i : i + 1], op=nl.maximum,
                               data=self.load(start, size), axis=1)  # fmt: skip
        self.top = new(count, 1)
        nisa.tensor_reduce(dst=self.top, op=nl.maximum, data=tops_sb, axis=1)
        for i, (start, size) in enumerate(chunks):
            y_sb = self.below(self.load(start, size))
            nisa.activation(dst=y_sb, op=nl.exp, data=y_sb, reduce_op=nl.add,
                            reduce_res=sums_sb[:, i : i + 1],
                            reduce_cmd=nisa.reduce_cmd.reset_reduce)  # fmt: skip
        total_sb = new(count, 1)
        nisa.tensor_reduce(dst=total_sb, op=nl.add, data=sums_sb, axis=1)
        self.log_sum = new(count, 1)
        nisa.activation(dst=self.log_sum, op=nl.log, data=total_sb)

    def logs(self, start, size):
        """(log p, p) of a chunk."""
        y_sb = self.below(self.load(start, size))
        nisa.tensor_scalar(dst=y_sb, data=y_sb, op0=nl.subtract, operand0=self.log_sum)
        p_sb = new(self.count, size)
        nisa.activation(dst=p_sb, op=nl.exp, data=y_sb)
        return y_sb, p_sb


def weighted(weight_sb, a, b):
    """weight * (a - b)."""
    y_sb = new(a.shape[0], a.shape[1])
    nisa.tensor_tensor(dst=y_sb, data1=a, data2=b, op=nl.subtract)
    nisa.tensor_tensor(dst=y_sb, data1=y_sb, data2=weight_sb, op=nl.multiply)
    return y_sb


def log_mixture(p_sb, q_sb, beta):
    """log(beta q + (1 - beta) p)."""
    m_sb = new(p_sb.shape[0], p_sb.shape[1])
    part_sb = new(p_sb.shape[0], p_sb.shape[1])
    nisa.tensor_scalar(dst=part_sb, data=q_sb, op0=nl.multiply, operand0=beta)
    nisa.scalar_tensor_tensor(dst=m_sb, data=p_sb, op0=nl.multiply, operand0=1.0 - beta,
                              op1=nl.add, operand1=part_sb)  # fmt: skip
    nisa.tensor_scalar(dst=m_sb, data=m_sb, op0=nl.maximum, operand0=SMALLEST)
    nisa.activation(dst=m_sb, op=nl.log, data=m_sb)
    return m_sb


class Sums(nl.NKIObject):
    """What the rows add up to: the divergence, jsd's sum over p, the label's log-probability."""

    def __init__(self, kind, beta, count):
        self.kind = kind
        self.beta = beta
        self.count = count
        self.soft = new(count, 1)  # the divergence
        self.own = new(count, 1)  # jsd: sum p (log p - log m)
        self.hard = new(count, 1)  # minus the label's log-probability
        for column in (self.soft, self.own, self.hard):
            nisa.memset(dst=column, value=0.0, engine=nisa.engine.gpsimd)

    def row_sum(self, x_sb):
        part_sb = new(self.count, 1)
        nisa.tensor_reduce(dst=part_sb, op=nl.add, data=x_sb, axis=1)
        return part_sb

    def add_divergence(self, student, teacher, start, size):
        log_p, p_sb = student.logs(start, size)
        log_q, q_sb = teacher.logs(start, size)
        if self.kind == "forward_kl":
            part_sb = self.row_sum(weighted(q_sb, log_q, log_p))
        elif self.kind == "reverse_kl":
            part_sb = self.row_sum(weighted(p_sb, log_p, log_q))
        else:
            log_m = log_mixture(p_sb, q_sb, self.beta)
            other_sb = self.row_sum(weighted(q_sb, log_q, log_m))
            own_sb = self.row_sum(weighted(p_sb, log_p, log_m))
            self.own = combine(self.own, own_sb, nl.add)
            part_sb = new(self.count, 1)
            nisa.tensor_scalar(dst=other_sb, data=other_sb, op0=nl.multiply, operand0=self.beta)
            nisa.scalar_tensor_tensor(dst=part_sb, data=own_sb, op0=nl.multiply,
                                      operand0=1.0 - self.beta, op1=nl.add,
                                      operand1=other_sb)  # fmt: skip
        self.soft = combine(self.soft, part_sb, nl.add)

    def add_label(self, plain, label_sb, start, size):
        log_p, _ = plain.logs(start, size)
        hit_sb = one_hot(label_sb, start, size, self.count)
        nisa.tensor_tensor(dst=hit_sb, data1=hit_sb, data2=log_p, op=nl.multiply)
        self.hard = combine(self.hard, self.row_sum(hit_sb), nl.subtract)

    def write(self, loss_hbm, r0):
        both_sb = new(self.count, 2)
        nisa.tensor_copy(dst=both_sb[:, 0:1], src=self.soft)
        nisa.tensor_copy(dst=both_sb[:, 1:2], src=self.hard)
        nisa.dma_copy(dst=loss_hbm[r0 : r0 + self.count, :], src=both_sb)


def one_hot(label_sb, start, size, count):
    """1.0 at the label's place in the chunk, 0.0 elsewhere."""
    at_sb = new(count, size)
    nisa.iota(dst=at_sb, pattern=[[1, size]], offset=start, channel_multiplier=0)
    nisa.tensor_scalar(dst=at_sb, data=at_sb, op0=nl.equal, operand0=label_sb)
    return at_sb


def gradient(kind, hard, student, teacher, plain, sums, label_sb, start, size, beta, soft_factor,
             hard_factor):  # fmt: skip
    """Of a chunk of the raw logits, without the row's weight."""
    count = student.count
    total_sb = new(count, size)
    nisa.memset(dst=total_sb, value=0.0, engine=nisa.engine.gpsimd)
    if kind != "none":
        log_p, p_sb = student.logs(start, size)
        log_q, q_sb = teacher.logs(start, size)
        factor = soft_factor
        part_sb = new(count, size)
        if kind == "forward_kl":
            nisa.tensor_tensor(dst=part_sb, data1=p_sb, data2=q_sb, op=nl.subtract)
        else:
            mean_sb, against = sums.soft, log_q
            if kind == "jsd":
                mean_sb, against = sums.own, log_mixture(p_sb, q_sb, beta)
                factor = soft_factor * (1.0 - beta)
            nisa.tensor_tensor(dst=part_sb, data1=log_p, data2=against, op=nl.subtract)
            nisa.scalar_tensor_tensor(dst=part_sb, data=part_sb, op0=nl.subtract,
                                      operand0=mean_sb, op1=nl.multiply,
                                      operand1=p_sb)  # fmt: skip
        nisa.scalar_tensor_tensor(dst=total_sb, data=part_sb, op0=nl.multiply, operand0=factor,
                                  op1=nl.add, operand1=total_sb)  # fmt: skip
    if hard:
        _, p_sb = plain.logs(start, size)
        hit_sb = one_hot(label_sb, start, size, count)
        nisa.tensor_tensor(dst=hit_sb, data1=p_sb, data2=hit_sb, op=nl.subtract)
        nisa.scalar_tensor_tensor(dst=total_sb, data=hit_sb, op0=nl.multiply, operand0=hard_factor,
                                  op1=nl.add, operand1=total_sb)  # fmt: skip
    return total_sb
