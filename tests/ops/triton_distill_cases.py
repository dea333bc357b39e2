"""The Triton distillation kernel against the float64 oracle; run by test_distill_loss_triton.py.

On a GPU if there is one, else in Triton's interpreter (TRITON_INTERPRET=1), in blocks of 64.
"""

import math

import pytest
import torch

from genai_perf.distill import TopK, distillation_loss, fused_linear_distillation_loss
from genai_perf.ops.distill_loss import cases
from genai_perf.ops.distill_loss.options import KINDS
from genai_perf.testing.numerics import assert_close_to_oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def put(x):
    if isinstance(x, TopK):
        return TopK(x.ids.to(DEVICE), x.logprobs.to(DEVICE), x.tail, x.temperature)
    return None if x is None else x.to(DEVICE)


def run(student, teacher, labels, backend, **options):
    leaf = student.clone().requires_grad_()
    loss = distillation_loss(leaf, teacher, labels, backend=backend, **options)
    loss.backward()
    return loss.detach().cpu(), leaf.grad.cpu()


def check(case, **options):
    student, teacher, labels = cases.make_inputs(case)
    options = {"kind": case.kind} | case.options | options
    double = teacher
    if isinstance(teacher, TopK):
        double = TopK(teacher.ids, teacher.logprobs.double(), teacher.tail, teacher.temperature)
    elif teacher is not None:
        double = teacher.double()
    loss64, grad64 = run(student.double(), double, labels, "reference", **options)
    loss_same, grad_same = run(student, teacher, labels, "reference", **options)
    loss, grad = run(put(student), put(teacher), put(labels), "triton", **options)
    assert abs(loss - loss64) <= 3 * abs(loss_same - loss64) + 3e-6 * (1 + abs(loss64))
    assert_close_to_oracle(grad, grad64, grad_same, factor=3, name=case.name)


@pytest.mark.parametrize("teacher", ["dense", "topk", "renorm"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_divergence(kind, teacher):
    check(cases.Case("", rows=4, vocab=150, kind=kind, teacher=teacher), alpha=0.3)


@pytest.mark.parametrize("teacher", ["dense", "topk", "none", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_everything_at_once(dtype, teacher):
    options = {"softcap": 5.0, "logit_scale": 0.7, "temperature": 2.0}
    options["alpha"] = 1.0 if teacher == "none" else 0.3
    check(cases.Case("", rows=3, vocab=70, k=6, kind="jsd", teacher=teacher, dtype=dtype,
                     options=options), teacher_softcap=4.0)  # fmt: skip


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65])
def test_vocabularies(vocab):
    check(cases.Case("", rows=2, vocab=vocab, ignored=0), alpha=0.5)


def test_ignored_rows_are_not_read():
    student, teacher, labels = cases.make_inputs(cases.Case("", rows=4, ignored=2))
    want = run(put(student), put(teacher), put(labels), "triton", alpha=0.5)
    student[1:3], teacher[1:3] = math.nan, math.nan
    got = run(put(student), put(teacher), put(labels), "triton", alpha=0.5)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_masked_vocabulary():
    student, teacher, _ = cases.make_inputs(cases.Case("", rows=2, ignored=0))
    for z in (student, teacher):
        z[:, 50:90] = -math.inf
    for kind in KINDS:
        loss, grad = run(put(student), put(teacher), None, "triton", kind=kind)
        assert torch.isfinite(loss) and torch.isfinite(grad).all() and not grad[:, 50:90].any()


def test_in_place_and_fused():
    case = cases.Case("", rows=5, vocab=90, teacher="topk")
    student, teacher, labels = (put(x) for x in cases.make_inputs(case))
    want = run(student, teacher, labels, "triton", alpha=0.2)
    buffer = student.clone().requires_grad_() * 1.0
    loss = distillation_loss(buffer, teacher, labels, alpha=0.2, inplace=True, backend="triton")
    assert torch.equal(loss.detach().cpu(), want[0])
    assert torch.equal(buffer.detach().cpu(), want[1])
    hidden, weight, _, _ = (put(x) for x in cases.make_head(case))
    grads = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = fused_linear_distillation_loss(*leaves, labels=labels, teacher=teacher, alpha=0.2,
                                              chunk_bytes=1, backend=backend)  # fmt: skip
        grads.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bad_values_are_refused():
    z = put(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"labels\[1\] must be ignore_index or from 0 to 8, got 9"):
        distillation_loss(z, z, put(torch.tensor([0, 9])), alpha=0.5, backend="triton")
    twice = TopK(put(torch.tensor([[1, 2], [3, 3]])), put(torch.full((2, 2), -2.0)))
    with pytest.raises(ValueError, match="top-k ids of row 1 must be all different"):
        distillation_loss(z, twice, backend="triton")
