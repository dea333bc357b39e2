"""The cases that tests and benchmarks of the distillation losses share."""

from dataclasses import dataclass, field

import torch

from .options import KINDS
from .teachers import Logits, TopK


@dataclass(frozen=True)
class Case:
    """Logits (rows, vocab) of `dtype` against a teacher: "dense", "topk", "renorm", "full" (top-k
    with k = vocab) or "none"; `options` go to the call; `ignored` tokens have no label.

    With `hidden`, the logits are a product of hidden states (rows, hidden) and a head.
    """

    name: str
    rows: int = 7
    vocab: int = 203
    kind: str = "forward_kl"
    teacher: str = "dense"
    k: int = 9
    dtype: torch.dtype = torch.float32
    options: dict = field(default_factory=dict)
    ignored: int = 1
    hidden: int = 16
    tags: tuple[str, ...] = ()


def _cases() -> list[Case]:
    cases = []
    for kind in KINDS:
        for teacher in ("dense", "topk", "renorm"):
            cases.append(Case(f"{kind}-{teacher}", kind=kind, teacher=teacher,
                              options={"alpha": 0.3}, tags=("smoke", "grad")))  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for teacher in ("dense", "topk", "renorm", "full"):
                at = {} if teacher == "renorm" else {"temperature": 2.0}
                name = f"{kind}-{teacher}-{str(dtype)[6:]}"
                everything = {"alpha": 0.3, "softcap": 5.0, "logit_scale": 0.7, "temperature": 2.0}
                cases.append(Case(f"{name}-everything", kind=kind, teacher=teacher, dtype=dtype,
                                  options=everything, tags=("edge",)))  # fmt: skip
                cases.append(Case(f"{name}-warm", kind=kind, teacher=teacher, dtype=dtype,
                                  options=at, tags=("edge",)))  # fmt: skip
    for rows, vocab in ((1, 1), (3, 2), (5, 15), (5, 16), (5, 17), (2, 1024), (2, 1030), (0, 5)):
        cases.append(Case(f"{rows}x{vocab}", rows, vocab, k=1, ignored=0, tags=("edge",)))
        cases.append(Case(f"{rows}x{vocab}-jsd", rows, vocab, "jsd", ignored=0, tags=("edge",)))
    cases.append(Case("labels", teacher="none", options={"alpha": 1.0}, tags=("smoke", "grad")))
    cases.append(Case("labels-cap", teacher="none", options={"alpha": 1.0, "softcap": 3.0},
                      tags=("edge",)))  # fmt: skip
    for rows in (64, 512, 4096):
        cases.append(Case(f"bench-{rows}", rows, 32768, hidden=512, k=64, tags=("bench", "model")))
    for teacher in ("topk", "none"):
        for rows in (64, 512):
            label = "labels" if teacher == "none" else teacher
            cases.append(Case(f"bench-{rows}-{label}", rows, 32768, hidden=512, k=64,
                              teacher=teacher, tags=("bench", "model")))  # fmt: skip
    cases.append(Case("bench-512-bfloat16", 512, 32768, hidden=512, k=64, dtype=torch.bfloat16,
                      tags=("bench", "model")))  # fmt: skip
    return cases


CASES = _cases()


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0):
    """(student_logits, teacher, labels) as `distillation_loss` takes them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return 3 * torch.randn(*shape, generator=generator)

    student, logits = randn(case.rows, case.vocab), randn(case.rows, case.vocab)
    labels = torch.randint(0, case.vocab, (case.rows,), generator=generator)
    labels[1 : 1 + case.ignored] = -100
    return (student.to(case.dtype).to(device), make_teacher(case, logits.to(case.dtype), device),
            labels.to(device))  # fmt: skip


def make_head(case: Case, device: torch.device | str = "cpu", seed: int = 0):
    """(student_hidden, student_weight, teacher_hidden, teacher_weight), the teacher's twice as
    wide."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for width in (case.hidden, 2 * case.hidden):
        made.append(torch.randn(case.rows, width, generator=generator))
        made.append(3 * torch.randn(case.vocab, width, generator=generator) / width**0.5)
    return tuple(x.to(case.dtype).to(device) for x in made)


def make_teacher(case: Case, logits: torch.Tensor, device: torch.device | str = "cpu"):
    """The teacher of a case from its logits: a tensor, a TopK or None."""
    if case.teacher == "none":
        return None
    if case.teacher == "dense":
        return logits.to(device)
    k = case.vocab if case.teacher == "full" else min(case.k, case.vocab)
    renorm = case.teacher == "renorm"
    at = 1.0 if renorm else case.options.get("temperature", 1.0)
    return TopK.from_logits(logits.to(device), k, tail="renorm" if renorm else "bin",
                            temperature=at)  # fmt: skip


def as_keyword(teacher: torch.Tensor | TopK | None) -> TopK | Logits | None:
    """The teacher as `fused_linear_distillation_loss(teacher=...)` takes it."""
    return Logits(teacher) if isinstance(teacher, torch.Tensor) else teacher


def cost(case: Case) -> tuple[int, int]:
    """(flops, bytes) of a head fused with the loss: the products, and weights read and written."""
    dense = case.teacher == "dense"
    flops = 2 * case.rows * case.vocab * case.hidden * (3 + 2 * dense)
    moved = case.dtype.itemsize * case.vocab * case.hidden * (2 + 2 * dense)
    return flops, moved
