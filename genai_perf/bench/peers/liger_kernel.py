"""liger-kernel's LigerFusedLinearJSDLoss at beta 0, forward KL: its chunked loss in torch."""

import torch

from ..problem import Problem, Unsupported, Variant
from ..suites.distill_loss import variant as loss_variant

MODULE = "liger_kernel"
DEVICES = ("cpu", "cuda")
VARIANTS = {"liger-kernel": ("distill_loss",)}
_CHUNK = 256


def build(variant: str, problem: Problem) -> Variant:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    given = problem.inputs
    if "th" not in given:
        raise Unsupported("its fused distillation takes the teacher's hidden states and head")
    # Compiling costs a minute on a processor and is what it is for on a GPU.
    made = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0,
                                   compiled=problem.device != "cpu", chunk_size=_CHUNK)  # fmt: skip
    labels = torch.zeros(len(given["h"]), dtype=torch.int64, device=problem.device)
    return loss_variant(problem, lambda h, w: made(h, w, given["th"], given["tw"], labels))
