"""The NKI distillation kernels in the interpreter against the float64 oracle, on trn2 and trn3."""

import pytest
import torch
from nki_backend import interpreting
from test_distill_loss import double, run

import genai_perf as gp
from genai_perf.distill import TopK, distillation_loss
from genai_perf.ops.distill_loss import cases
from genai_perf.ops.distill_loss.nki import KINDS
from genai_perf.testing.numerics import assert_close_to_oracle


def takes(case) -> bool:
    student, teacher, _ = cases.make_inputs(case)
    caps = case.options.get("softcap", 0), case.options.get("teacher_softcap", 0)
    return case.kind in KINDS and not isinstance(teacher, TopK) and not any(caps) and (
        student.dtype != torch.float64)  # fmt: skip


CASES = [c for c in cases.CASES if {"smoke", "edge"} & set(c.tags) and takes(c)]


@pytest.mark.parametrize("generation", ("gen3", "gen4"))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_oracle(case, generation):
    student, teacher, labels = cases.make_inputs(case)
    options = {"kind": case.kind} | case.options
    loss64, parts64, grad64 = run(student.double(), double(teacher), labels, backend="reference",
                                  **options)  # fmt: skip
    _, same_parts, same = run(student, teacher, labels, backend="reference", **options)
    with interpreting(generation):
        loss, parts, grad = run(student, teacher, labels, backend="nki", **options)
    assert loss.dtype == torch.float32 and grad.dtype == case.dtype
    # What no more accurate method could do: an exponent's last bit, at the size of the scores.
    atol = 1e-6 * (1 + student.double().abs().max().item() if student.numel() else 1)
    assert (parts - parts64).abs().max() <= 2 * (same_parts - parts64).abs().max() + atol
    assert_close_to_oracle(grad, grad64, same, factor=3, name=case.name)


def test_there_are_cases():
    assert len(CASES) >= 8


def test_several_chunks_of_the_vocabulary():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 130, 5000, generator=generator) * 3
    labels = torch.randint(0, 5000, (130,), generator=generator)
    labels[::7] = -100
    student[::7] = float("nan")  # of tokens that count nowhere nothing is read
    for kind in KINDS:
        options = {"kind": kind, "alpha": 0.3, "temperature": 2.0}
        _, parts64, grad64 = run(student.double(), teacher.double(), labels, backend="reference",
                                 **options)  # fmt: skip
        _, _, same = run(student, teacher, labels, backend="reference", **options)
        with interpreting():
            _, parts, grad = run(student, teacher, labels, backend="nki", **options)
        torch.testing.assert_close(parts.double(), parts64, rtol=2e-6, atol=1e-6)
        assert_close_to_oracle(grad, grad64, same, factor=3, name=kind)


def test_what_it_does_not_take():
    x = torch.randn(3, 10)
    with interpreting(), pytest.raises(gp.BackendUnsupported, match="nki takes the kinds"):
        distillation_loss(x, x, kind="tv", backend="nki")
    with interpreting(), pytest.raises(gp.BackendUnsupported, match="nki takes no softcap"):
        distillation_loss(x, x, softcap=30.0, backend="nki")


def test_fused_with_the_head():
    generator = torch.Generator().manual_seed(1)
    hidden, other = torch.randn(2, 9, 16, generator=generator)
    weight, head = torch.randn(2, 50, 16, generator=generator)
    results = []
    for name in ("nki", "reference"):
        leaf = hidden.clone().requires_grad_()
        with interpreting():
            loss = gp.distill.fused_linear_distillation_loss(
                leaf, weight, other, head, backend=name
            )
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results)
