"""What a step is made of, rounded once to fp32: every backend multiplies by the same numbers."""

import math
from typing import NamedTuple


class Coefficients(NamedTuple):
    """keep1 = beta1, take1 = 1 - beta1, the same of beta2; decay = 1 - lr * weight_decay; rate =
    lr, of AdamW over the bias correction of the first moment; unbias = 1 / sqrt(the second's)."""

    keep1: float
    take1: float
    keep2: float
    take2: float
    decay: float
    rate: float
    unbias: float = 1.0
    eps: float = 0.0


def adamw(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
          step: int) -> Coefficients:  # fmt: skip
    return Coefficients(beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay,
                        lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), eps)  # fmt: skip


def lion(lr: float, beta1: float, beta2: float, weight_decay: float) -> Coefficients:
    return Coefficients(beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, lr)
