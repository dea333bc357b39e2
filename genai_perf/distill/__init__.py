"""Distillation: losses whose logits never exist as a whole, teachers kept on disk, a trainer."""

from ..ops.distill_loss import Logits, TopK, distillation_loss, fused_linear_distillation_loss

__all__ = [
    "Logits",
    "TopK",
    "distillation_loss",
    "fused_linear_distillation_loss",
]
