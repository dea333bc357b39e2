from .api import distillation_loss, fused_linear_distillation_loss
from .teachers import Logits, TopK

__all__ = ["Logits", "TopK", "distillation_loss", "fused_linear_distillation_loss"]
