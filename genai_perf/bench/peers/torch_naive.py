"""The loss that a training script writes: logits of student and teacher whole, torch's functions.

"torch-naive" takes the logits in the dtype of the weights and widens them; "torch-naive:fp32" also
multiplies in float32.
"""

import torch
import torch.nn.functional as F

from ..problem import Problem, Unsupported, Variant
from ..suites.distill_loss import variant as loss_variant

MODULE = None
DEVICES = ("cpu", "cuda")
VARIANTS = {"torch-naive": ("distill_loss",), "torch-naive:fp32": ("distill_loss",)}


def build(variant: str, problem: Problem) -> Variant:
    given, wide = problem.inputs, variant == "torch-naive:fp32"
    if "kept" in given:
        raise Unsupported("it needs the teacher's logits, the case keeps their top k")
    if wide and problem.dtype == torch.float32:
        raise Unsupported("the case is float32 already")

    def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), weight.float()) if wide else F.linear(x, weight).float()

    def loss(h, w):
        if "labels" in given:
            return F.cross_entropy(logits(h, w), given["labels"])
        with torch.no_grad():
            teacher = logits(given["th"], given["tw"]).log_softmax(-1)
        student = logits(h, w).log_softmax(-1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")

    return loss_variant(problem, loss)
