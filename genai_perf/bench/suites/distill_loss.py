"""distill_loss: the head fused with the loss, loss and gradients from hidden states and weights.

Inputs h (rows, hidden), w (vocab, hidden); th and tw, the teacher's, twice as wide, or kept, its
top k; labels where a case has no teacher and is their cross entropy. Forward KL at temperature 1,
mean over tokens.
"""

import torch
import torch.nn.functional as F

from ...distill import fused_linear_distillation_loss
from ...ops.distill_loss import cases as listed
from ...ops.distill_loss.op import BACKENDS as _BACKENDS
from ...testing.numerics import max_error, rounding
from ..problem import Check, Problem, Variant, join

PHASES = ("forward+backward",)
BASELINE = "torch-naive"
BACKENDS = _BACKENDS
HEADLINE = ("bench-64", "bench-64-topk")
# Rows whose float64 logits are held at once by the oracle.
_ROWS = 256


def cases() -> dict[str, object]:
    return {case.name: case for case in listed.CASES if "bench" in case.tags}


def make(case, phase: str, device: str, seed: int) -> Problem:
    h, w, th, tw = listed.make_head(case, device, seed)
    inputs = {"h": h.requires_grad_(), "w": w.requires_grad_()}
    if case.teacher == "dense":
        inputs |= {"th": th, "tw": tw}
    elif case.teacher != "none":
        inputs["kept"] = listed.make_teacher(case, F.linear(th, tw), device)
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(0, case.vocab, (case.rows,), generator=generator).to(device)
    if case.teacher == "none":
        inputs["labels"] = labels
    flops, moved = listed.cost(case)
    return Problem("distill_loss", case.name, phase, device, case.dtype, inputs, flops, moved,
                   {"teacher": case.teacher})  # fmt: skip


def own(problem: Problem, backend: str | None) -> Variant:
    given = problem.inputs

    def loss(h, w):
        if "labels" in given:
            return fused_linear_distillation_loss(h, w, labels=given["labels"], alpha=1.0,
                                                  backend=backend)  # fmt: skip
        if "kept" in given:
            return fused_linear_distillation_loss(h, w, teacher=given["kept"], backend=backend)
        return fused_linear_distillation_loss(h, w, given["th"], given["tw"], backend=backend)

    return variant(problem, loss)


def variant(problem: Problem, loss) -> Variant:
    """A variant from a loss as a function of hidden states and head."""
    h, w = problem.inputs["h"], problem.inputs["w"]

    def call() -> tuple:
        value = loss(h, w)
        return value, *torch.autograd.grad(value, (h, w))

    return Variant(call, named)


def named(raw: tuple) -> dict[str, torch.Tensor]:
    return dict(zip(("loss", "dh", "dw"), (x.detach() for x in raw), strict=True))


def eager(h, w, given, rows: slice = slice(None)) -> torch.Tensor:
    """The loss of some rows, summed, by torch's own functions in the dtype of h."""
    logits = F.linear(h, w)
    if "labels" in given:
        return F.cross_entropy(logits, given["labels"][rows], reduction="sum")
    logp = logits.log_softmax(-1)
    if "kept" in given:
        return _bins(logp, given["kept"], rows)
    with torch.no_grad():
        teacher = F.linear(given["th"][rows].to(h.dtype), given["tw"].to(h.dtype)).log_softmax(-1)
    return F.kl_div(logp, teacher, log_target=True, reduction="sum")


def _bins(logp: torch.Tensor, kept, rows: slice) -> torch.Tensor:
    """Forward KL over the k tokens that were kept and one bin for all others."""
    teacher = kept.logprobs[rows].to(logp.dtype)
    student = logp.gather(-1, kept.ids[rows].long())
    # log(1 - sum of exp), of what the k leave.
    rest = [torch.log1p(-x.exp().sum(-1).clamp(max=1 - 1e-12)) for x in (teacher, student)]
    kl = (teacher.exp() * (teacher - student)).sum(-1)
    return (kl + rest[0].exp() * (rest[0] - rest[1])).sum()


def _gradients(problem: Problem, dtype: torch.dtype, rows: int) -> dict[str, torch.Tensor]:
    """Sum of the loss and its gradients in `dtype`, so many rows at a time."""
    given, count = problem.inputs, len(problem.inputs["h"])
    w = given["w"].detach().to(dtype).requires_grad_()
    total, parts = torch.zeros((), dtype=dtype, device=w.device), []
    with torch.enable_grad():
        for start in range(0, count, rows):
            chosen = slice(start, start + rows)
            h = given["h"].detach()[chosen].to(dtype).requires_grad_()
            loss = eager(h, w, given, chosen)
            loss.backward()
            parts.append(h.grad)
            total += loss.detach()
    return {"loss": total, "dh": torch.cat(parts), "dw": w.grad}


def check(problem: Problem, outputs, numerics=None, weight=None) -> Check:
    """The oracle goes through the rows in float64, the yardstick through all at once in the dtype
    of the case. Means are compared as sums: rounding is judged near 1, and they lie far below."""

    def both() -> tuple[dict, dict]:
        exact = _gradients(problem, torch.float64, _ROWS)
        same = _gradients(problem, problem.dtype, len(problem.inputs["h"]))
        return exact, {name: max_error(same[name], exact[name]) for name in exact}

    exact, same = problem.once("exact", both)
    found = []
    for name, mean in outputs.items():
        total = mean.double() * len(problem.inputs["h"])
        if name == "loss":  # one number, whose rounding may be nothing by chance: an ulp of it
            allowed = 2 * same[name] + exact[name].abs().item() * torch.finfo(mean.dtype).eps
        else:
            allowed = 3 * same[name] + rounding(exact[name], mean.dtype)
        found.append(Check(max_error(total, exact[name]), allowed))
    return join(found)
