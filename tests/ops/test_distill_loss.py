"""Distillation losses on logits: against float64, against torch's functions, and refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import library

import genai_perf as gp
from genai_perf.distill import TopK, distillation_loss
from genai_perf.ops.distill_loss import cases
from genai_perf.ops.distill_loss.options import KINDS
from genai_perf.testing.numerics import assert_close_to_oracle

_C = pytest.importorskip("genai_perf._C", reason="the native extension is not built")
EDGE = [case for case in cases.CASES if "edge" in case.tags]


def double(teacher):
    if isinstance(teacher, TopK):
        return TopK(teacher.ids, teacher.logprobs.double(), teacher.tail, teacher.temperature)
    return None if teacher is None else teacher.double()


def run(student, teacher, labels, **options):
    leaf = student.clone().requires_grad_()
    loss, parts = distillation_loss(leaf, teacher, labels, return_parts=True, **options)
    loss.backward()
    return loss.detach(), parts, leaf.grad


def test_oracle(isa):
    for case in EDGE:
        student, teacher, labels = cases.make_inputs(case)
        options = {"kind": case.kind} | case.options
        loss64, parts64, grad64 = run(student.double(), double(teacher), labels,
                                      backend="reference", **options)  # fmt: skip
        _, same_parts, same = run(student, teacher, labels, backend="reference", **options)
        loss, parts, grad = run(student, teacher, labels, backend="native", **options)
        assert loss.dtype == torch.float32 and grad.dtype == case.dtype
        # What no more accurate method could do: an exponent's last bit, at the size of the scores.
        atol = 1e-6 * (1 + student.double().abs().max().item() if student.numel() else 1)
        assert (parts - parts64).abs().max() <= 2 * (same_parts - parts64).abs().max() + atol
        assert_close_to_oracle(grad, grad64, same, factor=3, name=case.name)


def outside(student, teacher, labels, kind, temperature, beta):
    """The losses from torch's own functions, float64: (mean divergence, mean cross entropy)."""
    keep = labels != -100
    z, zt = student[keep].double(), teacher[keep].double()
    s, t = F.log_softmax(z / temperature, -1), F.log_softmax(zt / temperature, -1)
    p, q = s.exp(), t.exp()

    def kl(a, b):  # KL(a || b), b as log-probabilities
        return F.kl_div(b, a, reduction="batchmean")

    value = {
        "forward_kl": lambda: kl(q, s),
        "reverse_kl": lambda: kl(p, t),
        "jsd": lambda: (
            beta * kl(q, (beta * q + (1 - beta) * p).log())
            + (1 - beta) * kl(p, (beta * q + (1 - beta) * p).log())
        ),
        "skew_kl": lambda: kl(q, (beta * q + (1 - beta) * p).log()),
        "skew_reverse_kl": lambda: kl(p, (beta * p + (1 - beta) * q).log()),
        "tv": lambda: F.l1_loss(p, q, reduction="sum") / 2 / len(p),
    }[kind]()
    return value, F.cross_entropy(z, labels[keep])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_agrees(kind, backend):
    case = cases.Case("", rows=6, vocab=101)
    student, teacher, labels = cases.make_inputs(case)
    beta = {"jsd": 0.3, "skew_kl": 0.2, "skew_reverse_kl": 0.2}.get(kind)
    leaf = student.double().requires_grad_()
    soft, hard = outside(leaf, teacher, labels, kind, 2.0, beta)
    want = 0.75 * 4 * soft + 0.25 * hard
    (grad,) = torch.autograd.grad(want, leaf)
    loss, parts, got = run(student, teacher, labels, kind=kind, temperature=2.0, alpha=0.25,
                           beta=beta, backend=backend)  # fmt: skip
    torch.testing.assert_close(loss.double(), want.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(parts.double(), torch.stack([soft, hard]).detach(), rtol=2e-6,
                               atol=1e-6)  # fmt: skip
    torch.testing.assert_close(got.double(), grad, rtol=1e-4, atol=1e-7)


def test_the_ends_of_jsd_are_the_two_kl():
    student, teacher, _ = cases.make_inputs(cases.Case("", ignored=0))
    for beta, kind in ((0, "forward_kl"), (1, "reverse_kl")):
        a = run(student, teacher, None, kind="jsd", beta=beta)
        b = run(student, teacher, None, kind=kind)
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
    for kind, limit in (("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        a, b = (run(student, teacher, None, kind=k, **o) for k, o in
                ((kind, {"beta": 0.0}), (limit, {})))  # fmt: skip
        assert torch.equal(a[2], b[2])


@pytest.mark.parametrize("teacher", ["dense", "topk", "renorm", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, teacher):
    options = {"alpha": 0.3, "softcap": 4.0, "logit_scale": 0.8}
    case = cases.Case("", rows=3, vocab=11, k=4, kind=kind, teacher=teacher)
    student, target, labels = cases.make_inputs(case)
    target = double(target)

    def call(z):
        return distillation_loss(z, target, labels, kind=kind, **options)

    assert torch.autograd.gradcheck(call, student.double().requires_grad_())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_topk_is_dense_at_k_of_the_vocabulary(kind, backend):
    student, teacher, labels = cases.make_inputs(cases.Case("", vocab=150))
    for temperature in (1.0, 2.0):
        full = TopK.from_logits(teacher, 150, temperature=temperature)
        a, b = (run(student, t, labels, kind=kind, temperature=temperature, alpha=0.2,
                    backend=backend) for t in (teacher, full))  # fmt: skip
        torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a[2], b[2], rtol=1e-4, atol=3e-7)


def test_topk_bounds_the_dense_divergence_from_below():
    student, teacher, _ = cases.make_inputs(cases.Case("", ignored=0))
    dense = distillation_loss(student, teacher)
    values = [distillation_loss(student, TopK.from_logits(teacher, k)) for k in (1, 4, 16, 64, 202)]
    assert all(a < b for a, b in zip(values, values[1:], strict=False)) and values[-1] <= dense


def test_a_tail_of_a_hundredth_percent_keeps_its_digits(isa):
    """1 - sum would leave two digits of the student's tail."""
    z = torch.full((1, 4096), -16.0)
    z[0, :8] = torch.arange(8.0)
    teacher = TopK(torch.arange(8)[None], torch.log_softmax(torch.arange(8.0), 0)[None] - 0.01)
    exact = run(z.double(), double(teacher), None)
    loss, _, grad = run(z, teacher, None, backend="native")
    torch.testing.assert_close(grad.double(), exact[2], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=0)


def test_temperature_of_renormalised_topk_is_exact():
    """Conditioned on the k ids, a teacher at temperature T is known from its values at 1."""
    student, teacher, _ = cases.make_inputs(cases.Case("", ignored=0))
    kept = TopK.from_logits(teacher, 5, tail="renorm")
    got = distillation_loss(student, kept, temperature=3.0, t2_scale=False)
    s, t = (x.gather(1, kept.ids) / 3.0 for x in (student, teacher))
    want = F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")
    torch.testing.assert_close(got, want)


# --- tokens that do not count --------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("teacher", ["dense", "topk"])
def test_nothing_of_an_ignored_token_is_read(isa, teacher, backend):
    case = cases.Case("", rows=6, teacher=teacher, ignored=2)
    student, target, labels = cases.make_inputs(case)
    want = run(student, target, labels, alpha=0.5, backend=backend)
    student[1:3] = math.nan
    if teacher == "dense":
        target[1:3] = math.nan
    else:
        target.ids[1:3], target.logprobs[1:3] = -7, math.inf
    got = run(student, target, labels, alpha=0.5, backend=backend)
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
    assert not got[2][1:3].any() and got[2][0].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_all_tokens_ignored(backend, kind):
    student, teacher, labels = cases.make_inputs(cases.Case(""))
    loss, parts, grad = run(student, teacher, torch.full_like(labels, -100), kind=kind, alpha=0.5,
                            backend=backend)  # fmt: skip
    assert loss == 0 and not parts.any() and not grad.any()


def test_num_items_makes_accumulated_batches_one_batch():
    student, teacher, labels = cases.make_inputs(cases.Case("", rows=9, ignored=3))
    whole = run(student, teacher, labels, alpha=0.3)
    items = int((labels != -100).sum())
    parts = [
        run(student[at], teacher[at], labels[at], alpha=0.3, num_items=torch.tensor(items))
        for at in (slice(0, 5), slice(5, 9))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    torch.testing.assert_close(torch.cat([parts[0][2], parts[1][2]]), whole[2])


def test_leading_dimensions_and_another_ignore_index():
    student, teacher, labels = cases.make_inputs(cases.Case("", rows=6, ignored=0))
    labels[4] = 7
    flat = run(student, teacher, torch.where(labels == 7, -100, labels), alpha=0.4)
    got = run(student.view(2, 3, -1), teacher.view(2, 3, -1), labels.view(2, 3), alpha=0.4,
              ignore_index=7)  # fmt: skip
    assert torch.equal(got[0], flat[0]) and torch.equal(got[2].view(6, -1), flat[2])


def test_t2_scale_keeps_the_gradient_where_temperature_grows():
    student, teacher, _ = cases.make_inputs(cases.Case("", ignored=0))
    plain = run(student, teacher, None, temperature=2.0, t2_scale=False)
    scaled = run(student, teacher, None, temperature=2.0)
    torch.testing.assert_close(scaled[0], 4 * plain[0])
    torch.testing.assert_close(scaled[2], 4 * plain[2])
    assert torch.equal(scaled[1], plain[1])


# --- extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_huge_logits_and_masked_vocabulary(isa, kind):
    student, teacher, _ = cases.make_inputs(cases.Case("", ignored=0))
    student[0], teacher[0] = student[0] * 1e4, teacher[0] * 1e4
    teacher[1] = student[1]
    for z in (student, teacher):
        z[2:, 50:90] = -math.inf  # tokens that neither side can produce
    loss, _, grad = run(student, teacher, None, kind=kind, backend="native")
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    assert not grad[2:, 50:90].any() and grad[1].abs().max() < 1e-6
    keep = torch.cat([torch.arange(50), torch.arange(90, 203)])
    narrow = run(student[2:, keep], teacher[2:, keep], None, kind=kind, backend="native")
    wide = run(student[2:], teacher[2:], None, kind=kind, backend="native")
    torch.testing.assert_close(wide[2][:, keep], narrow[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("teacher", ["dense", "topk", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_shows(isa, kind, teacher):
    """A NaN anywhere in a row makes the loss NaN, and its row of the gradient."""
    case = cases.Case("", rows=2, ignored=0, teacher=teacher)
    for at in (0, 77, 202):
        student, target, labels = cases.make_inputs(case)
        student[1, at] = math.nan
        alpha = 1.0 if target is None else 0.5
        loss, _, grad = run(student, target, labels, kind=kind, alpha=alpha, backend="native")
        assert loss.isnan() and grad[1].isnan().any() and torch.isfinite(grad[0]).all()


def test_same_bits_for_any_number_of_threads(isa):
    student, teacher, labels = cases.make_inputs(cases.Case("", rows=33, vocab=3000))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(student, teacher, labels, kind="jsd", alpha=0.5))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    alone = run(student[5:6], teacher[5:6], labels[5:6], kind="jsd", alpha=0.5, num_items=32)
    assert torch.equal(alone[2][0], found[0][2][5])


# --- in place, padded vocabularies, compilation --------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("teacher", ["dense", "topk"])
def test_in_place(isa, teacher, backend):
    case = cases.Case("", teacher=teacher)
    student, target, labels = cases.make_inputs(case)
    want = run(student, target, labels, alpha=0.3, softcap=5.0, temperature=1.0, backend=backend)
    leaf = student.clone().requires_grad_()
    buffer = leaf * 1.0
    address = buffer.data_ptr()
    loss = distillation_loss(buffer, target, labels, alpha=0.3, softcap=5.0, inplace=True,
                             backend=backend)  # fmt: skip
    (grad,) = torch.autograd.grad(2 * loss, leaf)
    assert torch.equal(loss.detach(), want[0])
    torch.testing.assert_close(grad, 2 * want[2])
    assert buffer.data_ptr() == address and torch.equal(buffer.detach(), want[2])


def test_padded_vocabularies_are_sliced():
    student, teacher, labels = cases.make_inputs(cases.Case("", vocab=200, ignored=0))
    padded = torch.cat([student, torch.full((7, 8), 50.0)], 1)
    want = run(student, teacher, labels, alpha=0.3)
    got = run(padded, teacher, labels, alpha=0.3)
    assert torch.equal(got[0], want[0]) and torch.equal(got[2][:, :200], want[2])
    assert not got[2][:, 200:].any()
    wide_teacher = torch.cat([teacher, torch.full((7, 3), 50.0)], 1)
    assert torch.equal(run(student, wide_teacher, labels, alpha=0.3)[2], want[2])
    small = run(student, teacher, labels % 150, alpha=0.3, vocab_size=150)
    sliced = run(student[:, :150], teacher[:, :150], labels % 150, alpha=0.3)
    assert torch.equal(small[0], sliced[0]) and torch.equal(small[2][:, :150], sliced[2])


def test_strided_logits():
    student, teacher, labels = cases.make_inputs(cases.Case(""))
    want = run(student, teacher, labels, alpha=0.3, backend="native")
    columns = student.T.contiguous().T
    assert torch.equal(run(columns, teacher.T.contiguous().T, labels, alpha=0.3)[2], want[2])
    wide = torch.cat([student, student], 1)
    assert torch.equal(run(wide[:, :203], teacher, labels, alpha=0.3)[2], want[2])


def test_compiles_without_a_graph_break():
    student, teacher, labels = cases.make_inputs(cases.Case(""))

    def loss_of(z):
        return distillation_loss(z * 2, teacher, labels, kind="jsd", alpha=0.3)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    grads = []
    for call in (loss_of, compiled):
        leaf = student.clone().requires_grad_()
        loss = call(leaf)
        loss.backward()
        grads.append((loss.detach(), leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def test_opcheck():
    for case in (cases.Case(""), cases.Case("", teacher="topk")):
        student, teacher, labels = cases.make_inputs(case)
        dense = None if isinstance(teacher, TopK) else teacher
        kept = (teacher.ids, teacher.logprobs) if dense is None else (None, None)
        weights = (labels != -100).float() / 6
        options = ("jsd", 1.0, 0.5, 0.7, 0.3, "bin", 1.0, 1.0, 0.0, 1.0, 0.0)
        ops = torch.ops.genai_perf
        args = (student, dense, *kept, labels, weights)
        library.opcheck(ops.distill_loss.default, (*args, True, *options))
        library.opcheck(ops.distill_loss.default, (*args, False, *options))
        library.opcheck(ops.distill_loss_.default, (*args, *options))


def test_explain_names_native():
    z = torch.zeros(2, 5)
    told = gp.explain(distillation_loss, z, z)
    assert told.backend == "native" and "float64" not in str(told)
    told = gp.explain(distillation_loss, z.double(), z.double())
    assert told.backend == "reference" and "got torch.float64" in told.reasons["native"]


# --- bad input -----------------------------------------------------------------------------------


def refused(message, student=None, teacher=None, labels=None, **options):
    z, zt, y = cases.make_inputs(cases.Case("", rows=3, vocab=20, ignored=0))
    student = z if student is None else student(z)
    teacher = zt if teacher is None else teacher(zt)
    labels = y if labels is None else labels(y)
    for backend in ("native", "reference"):
        with pytest.raises(ValueError, match=message):
            distillation_loss(student, teacher, labels, backend=backend, **options)


def put(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def test_values_that_cannot_be():
    for bad in (20, -1, -99):
        refused(rf"labels\[1\] must be ignore_index or from 0 to 19, got {bad}",
                labels=lambda y, bad=bad: put(y, 1, bad), alpha=0.5)  # fmt: skip
    refused("labels", labels=lambda y: put(y, 1, 20))  # also where they only say what counts
    top = TopK.from_logits(cases.make_inputs(cases.Case("", rows=3, vocab=20))[1], 4)

    def changed(ids=None, logprobs=None):
        return lambda _: TopK(top.ids if ids is None else ids,
                              top.logprobs if logprobs is None else logprobs)  # fmt: skip

    refused("top-k ids of row 2 must be all different, got one that repeats",
            teacher=changed(put(top.ids, (2, 3), top.ids[2, 0])))  # fmt: skip
    for bad in (20, -1):
        refused(
            "top-k ids of row 1 must be from 0 to 19", teacher=changed(put(top.ids, (1, 0), bad))
        )
    refused("top-k probabilities of row 0 must be at most 1 in sum, got 2",
            teacher=changed(logprobs=put(top.logprobs, 0, math.log(0.5))))  # fmt: skip
    refused("top-k probabilities", teacher=changed(logprobs=put(top.logprobs, (0, 1), math.nan)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"temperature": -1.0}, "temperature must be positive, got -1.0"),
        ({"alpha": 1.5}, r"alpha must be from 0 \(the teacher alone\) to 1"),
        ({"kind": "kl"}, "kind must be one of 'forward_kl', .*, got 'kl'"),
        ({"kind": "jsd", "beta": 1.1}, "beta must be from 0"),
        ({"kind": "skew_kl", "beta": 1}, "beta must be at least 0 and below 1 for skew_kl"),
        ({"beta": 0.5}, "beta must be None for forward_kl"),
        ({"softcap": -1.0}, "softcap must be positive, or 0 for none"),
        ({"num_items": 0}, "num_items must be positive"),
        ({"vocab_size": 21}, "vocab_size must be from 1 to 20"),
        ({"labels": lambda y: y.int()}, "labels must be int64, got torch.int32"),
        ({"labels": lambda y: y[:2]}, r"labels must be of shape \(3,\)"),
        ({"teacher": lambda t: t[:2]}, r"teacher_logits must be \(3, 'V'\)"),
        ({"teacher": lambda t: torch.zeros(3, 5000)}, "look like different tokenizers"),
        ({"teacher": lambda t: TopK.from_logits(t, 4), "temperature": 2.0}, "tail='renorm'"),
        ({"student": lambda z: z.int()}, "student_logits must be one of"),
    ],
)  # fmt: skip
def test_bad_arguments(options, message):
    refused(message, **options)


def test_missing_teacher_or_labels():
    z = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="alpha must be 1 where there is no teacher, got 0.5"):
        distillation_loss(z, None, torch.zeros(2, dtype=torch.int64), alpha=0.5)
    with pytest.raises(ValueError, match="labels must be given where alpha is 0.5"):
        distillation_loss(z, z, alpha=0.5)
    with pytest.raises(ValueError, match="k must be from 1 to 5, got 6"):
        TopK.from_logits(z, 6)
    with pytest.raises(ValueError, match="ids must be int32 or int64"):
        TopK(z.float(), z)
    with pytest.raises(ValueError, match=r"of one shape \(\.\.\., k\)"):
        TopK(torch.zeros(2, 4, dtype=torch.int64), z)
    with pytest.raises(ValueError, match="tail must be one of 'bin', 'renorm'"):
        TopK(torch.zeros(2, 5, dtype=torch.int64), z, tail="drop")
