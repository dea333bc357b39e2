"""One program a row: sums over the vocabulary, then the gradient over the logits.

The row is read two or three times and stays in L2 in between; nothing else of its size exists.
"""

import triton
import triton.language as tl

# Values of the constexpr KIND; the order of options.KINDS.
FORWARD_KL, REVERSE_KL, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SKEW_KL, SKEW_REVERSE_KL, TV = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
# Values of the constexpr TEACHER.
NO_TEACHER, DENSE, TOPK_BIN, TOPK_RENORM = (
    tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3),
)  # fmt: skip

COUNTS = ("vocab", "k", "stride_row", "stride_teacher")


@triton.jit
def capped(raw, scale, softcap, SOFTCAP: tl.constexpr, MARKED: tl.constexpr):
    """(logits proper, derivative of the cap); -inf stays -inf where ids are marked by it."""
    z = raw * scale
    slope = 1.0
    if SOFTCAP:
        x = z / softcap
        a = tl.abs(x)
        big = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(a, 44.0)) + 1.0)
        x2 = x * x
        poly = -5.70498872745e-3
        poly = poly * x2 + 2.06390887954e-2
        poly = poly * x2 - 5.37397155531e-2
        poly = poly * x2 + 1.33314422036e-1
        poly = poly * x2 - 3.33332819422e-1
        t = tl.where(a < 0.625, x + x * x2 * poly, tl.where(x < 0, -big, big))
        slope = 1.0 - t * t
        z = t * softcap
        if MARKED:
            z = tl.where(raw == float("-inf"), float("-inf"), z)
    return z, slope


@triton.jit
def bounded(x, limit):
    return tl.minimum(tl.maximum(x, -limit), limit)


@triton.jit
def terms(s, t, beta, KIND: tl.constexpr):
    """(term of D, p dD/dp up to c p) of log-probabilities s of the student and t of the teacher."""
    p = tl.exp(s)
    q = tl.exp(t)
    if KIND == TV:
        d = p - q
        return 0.5 * tl.abs(d), p * tl.where(d > 0, 0.5, tl.where(d < 0, -0.5, 0.0))
    if KIND == FORWARD_KL:
        return tl.where(q > 0, q * bounded(t - s, 1e30), 0.0), -q
    if KIND == REVERSE_KL:
        term = tl.where(p > 0, p * bounded(s - t, 1e30), 0.0)
        return term, term
    # m = wt q + ws p, D = a KL(q || m) + b KL(p || m)
    wt = beta
    ws = 1.0 - beta
    a = 1.0
    b = 0.0
    if KIND == JSD:
        a = beta
        b = 1.0 - beta
    elif KIND == SKEW_REVERSE_KL:
        wt = 1.0 - beta
        ws = beta
        a = 0.0
        b = 1.0
    d = tl.where((p == 0) & (q == 0), 0.0, bounded(t - s, 80.0))
    y = ws + wt * tl.exp(d)
    log_y = tl.log(y)
    slope = -b * p * log_y
    term = a * q * (d - log_y) + slope
    if KIND != JSD:
        slope += b * p - ws / y * (a * q + b * p)
    return term, slope


@triton.jit
def more(top, total, u):
    """The running maximum and sum of exp(u - maximum) with a block more."""
    new = tl.maximum(top, tl.max(u, 0))
    shift = tl.where(new == float("-inf"), 0.0, new)
    # max drops NaN; exp(u - shift) keeps it.
    return new, total * tl.exp(top - shift) + tl.sum(tl.exp(u - shift), 0)


@triton.jit
def log_sum(top, total):
    return tl.where(top == float("-inf"), 0.0, top) + tl.log(total)


@triton.jit(do_not_specialize=COUNTS)
def _distill_loss_kernel(
    logits_ptr, teacher_ptr, ids_ptr, logprobs_ptr, labels_ptr, weights_ptr, loss_ptr,
    stride_row, stride_teacher, vocab, k, scale, softcap, teacher_scale, teacher_softcap,
    over_temperature, temperature, beta, soft_weight, hard_weight, logprob_scale,
    KIND: tl.constexpr, TEACHER: tl.constexpr, HARD: tl.constexpr, OWN_SUM: tl.constexpr,
    SOFTCAP: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, GRAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The loss of one row and, with GRAD, its weighted gradient in the place of the logits.

    OWN_SUM: the labels' softmax is at another temperature than the divergence's.
    """
    row = tl.program_id(0)
    marked: tl.constexpr = TEACHER >= TOPK_BIN
    row_ptr = logits_ptr + row.to(tl.int64) * stride_row
    teacher_row = teacher_ptr
    if TEACHER == DENSE:
        teacher_row += row.to(tl.int64) * stride_teacher
    element = logits_ptr.dtype.element_ty
    weight = tl.load(weights_ptr + row)
    lanes = tl.arange(0, BLOCK)
    if weight == 0:
        tl.store(loss_ptr + 2 * row, 0.0)
        tl.store(loss_ptr + 2 * row + 1, 0.0)
        if GRAD:
            for first in range(0, vocab, BLOCK):
                at = first + lanes
                tl.store(row_ptr + at, tl.zeros((BLOCK,), tl.float32).to(element), mask=at < vocab)
    else:
        label = -1
        hard_label = 0.0
        if HARD:
            label = tl.load(labels_ptr + row).to(tl.int32)
            raw_label = tl.load(row_ptr + label).to(tl.float32)
            hard_label, label_slope = capped(raw_label, scale, softcap, SOFTCAP, False)
        if marked:
            slots = tl.arange(0, BLOCK_K)
            has = slots < k
            ids = tl.load(ids_ptr + row.to(tl.int64) * k + slots, mask=has, other=0)
            logprobs = tl.load(logprobs_ptr + row.to(tl.int64) * k + slots, mask=has,
                               other=float("-inf"))  # fmt: skip
            raw_k = tl.load(row_ptr + ids, mask=has, other=float("-inf")).to(tl.float32)
            z_k, slope_k = capped(raw_k, scale, softcap, SOFTCAP, False)
            u_k = tl.where(has, z_k * over_temperature, float("-inf"))
            tl.debug_barrier()  # every thread has read before any marks
            tl.store(
                row_ptr + ids, tl.full((BLOCK_K,), float("-inf"), tl.float32).to(element), mask=has
            )
            tl.debug_barrier()

        # Sums: of the student (of the rest, where ids are marked), of the teacher, of the labels.
        top_s = float("-inf")
        sum_s = 0.0
        top_t = float("-inf")
        sum_t = 0.0
        top_h = float("-inf")
        sum_h = 0.0
        for first in range(0, vocab, BLOCK):
            at = first + lanes
            inside = at < vocab
            raw = tl.load(row_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
            z, _ = capped(raw, scale, softcap, SOFTCAP, marked)
            z = tl.where(inside, z, float("-inf"))
            top_s, sum_s = more(top_s, sum_s, z * over_temperature)
            if OWN_SUM:
                top_h, sum_h = more(top_h, sum_h, z)
            if TEACHER == DENSE:
                raw_t = tl.load(teacher_row + at, mask=inside, other=float("-inf")).to(tl.float32)
                zt, _ = capped(raw_t, teacher_scale, teacher_softcap, TEACHER_SOFTCAP, False)
                zt = tl.where(inside, zt, float("-inf"))
                top_t, sum_t = more(top_t, sum_t, zt * over_temperature)
        rest_lse = log_sum(top_s, sum_s)
        lse = rest_lse
        lse_t = 0.0
        divergence = 0.0
        mean = 0.0
        soft_rest = 0.0
        if TEACHER == DENSE:
            lse_t = log_sum(top_t, sum_t)
            for first in range(0, vocab, BLOCK):
                at = first + lanes
                inside = at < vocab
                raw = tl.load(row_ptr + at, mask=inside, other=0.0).to(tl.float32)
                z, _ = capped(raw, scale, softcap, SOFTCAP, False)
                raw_t = tl.load(teacher_row + at, mask=inside, other=0.0).to(tl.float32)
                zt, _ = capped(raw_t, teacher_scale, teacher_softcap, TEACHER_SOFTCAP, False)
                term, slope = terms(z * over_temperature - lse, zt * over_temperature - lse_t,
                                    beta, KIND)  # fmt: skip
                divergence += tl.sum(tl.where(inside, term, 0.0), 0)
                mean += tl.sum(tl.where(inside, slope, 0.0), 0)
            if KIND == FORWARD_KL:
                mean = -1.0  # exactly, not to the rounding of a sum
        if marked:
            top_k = tl.max(u_k, 0)
            known_lse = top_k + tl.log(tl.sum(tl.exp(u_k - top_k), 0))
            if k < vocab:
                high = tl.maximum(known_lse, rest_lse)
                lse = high + tl.log(tl.exp(known_lse - high) + tl.exp(rest_lse - high))
            else:
                lse = known_lse
            if TEACHER == TOPK_BIN:
                s_k = u_k - lse
                t_k = logprobs
            else:
                s_k = u_k - known_lse
                t_k = logprobs * logprob_scale
                top_q = tl.max(t_k, 0)
                t_k = t_k - (top_q + tl.log(tl.sum(tl.exp(t_k - top_q), 0)))
            term, slope_q = terms(s_k, t_k, beta, KIND)
            divergence = tl.sum(tl.where(has, term, 0.0), 0)
            mean = tl.sum(tl.where(has, slope_q, 0.0), 0)
            if TEACHER == TOPK_BIN:  # noqa: SIM102 (one is a constexpr)
                if k < vocab:
                    left = 1.0 - tl.sum(tl.exp(logprobs), 0)
                    s_rest = rest_lse - lse
                    t_rest = tl.where(left > 0, tl.log(tl.maximum(left, 1e-30)), float("-inf"))
                    t_rest = tl.maximum(t_rest, s_rest - 80.0)
                    term_rest, slope_rest = terms(s_rest, t_rest, beta, KIND)
                    divergence += term_rest
                    mean += slope_rest
                    soft_rest = slope_rest - tl.exp(s_rest) * mean
            soft_k = slope_q - tl.exp(s_k) * mean

        hard_lse = lse
        if HARD:
            if OWN_SUM:
                hard_lse = log_sum(top_h, sum_h)
                if marked:
                    z_live = tl.where(has, z_k, float("-inf"))
                    top_h, sum_h = more(top_h, sum_h, z_live)
                    hard_lse = log_sum(top_h, sum_h)
            tl.store(loss_ptr + 2 * row + 1, hard_lse - hard_label)
        else:
            tl.store(loss_ptr + 2 * row + 1, 0.0)
        tl.store(loss_ptr + 2 * row, divergence)

        if GRAD:
            soft = weight * soft_weight * over_temperature
            hard = weight * hard_weight
            for first in range(0, vocab, BLOCK):
                at = first + lanes
                inside = at < vocab
                raw = tl.load(row_ptr + at, mask=inside, other=0.0).to(tl.float32)
                z, slope_of_cap = capped(raw, scale, softcap, SOFTCAP, marked)
                u = z * over_temperature
                g = tl.zeros((BLOCK,), tl.float32)
                if TEACHER == DENSE:
                    raw_t = tl.load(teacher_row + at, mask=inside, other=0.0).to(tl.float32)
                    zt, _ = capped(raw_t, teacher_scale, teacher_softcap, TEACHER_SOFTCAP, False)
                    s = u - lse
                    _, slope = terms(s, zt * over_temperature - lse_t, beta, KIND)
                    g = soft * (slope - tl.exp(s) * mean)
                if marked:
                    g = soft * soft_rest * tl.exp(u - rest_lse)
                if HARD:
                    g += hard * (tl.exp(z - hard_lse) - tl.where(at == label, 1.0, 0.0))
                g = g * (slope_of_cap * scale)
                tl.store(row_ptr + at, g.to(element), mask=inside)
            if marked:
                tl.debug_barrier()  # the ids are written last, over what the loop left there
                g = soft * soft_k
                if HARD:
                    g += hard * (tl.exp(z_k - hard_lse) - tl.where(ids == label, 1.0, 0.0))
                g = g * (slope_k * scale)
                tl.store(row_ptr + ids, g.to(element), mask=has)
