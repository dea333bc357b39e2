"""The arithmetic of a step in torch, fp32, wherever torch runs; the kernels give its bits on a CPU.

AdamW (arXiv:1711.05101, algorithm 2), g the gradient, t the step:
    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2
    p = (1 - lr wd) p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
Lion (arXiv:2302.06675, algorithm 2):
    p = (1 - lr wd) p - lr sign(beta1 m + (1 - beta1) g)
    m = beta2 m + (1 - beta2) g
A moment is fp32, or codes of a dynamic map (signed for m, unsigned for v) and one absmax a block.
The step uses the new moments before they are rounded. A v above 0 never gets code 0: divided by eps
alone, its element would leap.
"""

import torch

from ...formats.dynamic_map import decode_blocks, encode_blocks
from . import coefficients
from .checks import refuse_gradient


def why_not_adamw(*args) -> str | None:
    return None


why_not_lion = why_not_adamw


def adamw(p, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, lr, beta1, beta2, eps,
          weight_decay, step, block_size) -> None:  # fmt: skip
    c = coefficients.adamw(lr, beta1, beta2, eps, weight_decay, step)
    g = grad.float().reshape(-1)
    if p.device.type == "cpu" and not (g * g).isfinite().all():
        refuse_gradient("adamw", grad)
    m = read(exp_avg, exp_avg_scale, block_size, True) * c.keep1 + g * c.take1
    v = read(exp_avg_sq, exp_avg_sq_scale, block_size, False) * c.keep2 + (g * g) * c.take2
    # torch's own fp32 root, by MKL, is an ulp off in one element of seven.
    root = v.double().sqrt().float()
    change = (m * c.rate) / (root * c.unbias + c.eps)
    p.copy_((p.float().reshape(-1) * c.decay - change).view(p.shape))
    write(m, exp_avg, exp_avg_scale, block_size, True)
    write(v, exp_avg_sq, exp_avg_sq_scale, block_size, False)


def lion(p, grad, exp_avg, exp_avg_scale, lr, beta1, beta2, weight_decay, block_size) -> None:
    c = coefficients.lion(lr, beta1, beta2, weight_decay)
    g = grad.float().reshape(-1)
    if p.device.type == "cpu" and not g.isfinite().all():
        refuse_gradient("lion", grad)
    m = read(exp_avg, exp_avg_scale, block_size, True)
    change = (m * c.keep1 + g * c.take1).sign() * c.rate
    p.copy_((p.float().reshape(-1) * c.decay - change).view(p.shape))
    write(m * c.keep2 + g * c.take2, exp_avg, exp_avg_scale, block_size, True)


def read(moment: torch.Tensor, scale: torch.Tensor | None, block: int, signed: bool):
    """A moment as flat fp32."""
    flat = moment.reshape(-1)
    return flat if scale is None else decode_blocks(flat, scale, block, signed)


def write(values: torch.Tensor, moment: torch.Tensor, scale: torch.Tensor | None, block: int,
          signed: bool) -> None:  # fmt: skip
    """Flat fp32 values into a moment."""
    if scale is None:
        moment.copy_(values.view(moment.shape))
        return
    codes, absmax = encode_blocks(values, block, signed)
    if not signed:
        codes = torch.maximum(codes, (values > 0).to(torch.uint8))
    moment.copy_(codes.view(moment.shape))
    scale.copy_(absmax)
