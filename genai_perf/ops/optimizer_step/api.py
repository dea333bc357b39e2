"""The public functions, and the two ops under them."""

import torch

from ..._dispatch import Op
from .checks import check_step

_BACKENDS = ("triton", "native", "reference")


def _no_output(*args, backend=None):
    return None


_ADAMW = Op(
    __package__,
    "adamw_step",
    "(Tensor(a!) p, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
    " Tensor(d!)? exp_avg_scale, Tensor(e!)? exp_avg_sq_scale, float lr, float beta1, float beta2,"
    " float eps, float weight_decay, int step, int block_size, *, str? backend=None) -> ()",
    fake=_no_output,
    backends=_BACKENDS,
    entry="adamw",
)
_LION = Op(
    __package__,
    "lion_step",
    "(Tensor(a!) p, Tensor grad, Tensor(b!) exp_avg, Tensor(c!)? exp_avg_scale, float lr,"
    " float beta1, float beta2, float weight_decay, int block_size, *, str? backend=None) -> ()",
    fake=_no_output,
    backends=_BACKENDS,
    entry="lion",
)


def adamw_step(p: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor,
               exp_avg_sq: torch.Tensor, exp_avg_scale: torch.Tensor | None = None,
               exp_avg_sq_scale: torch.Tensor | None = None, *, step: int, lr: float,
               betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
               weight_decay: float = 1e-2, block_size: int = 256,
               backend: str | None = None) -> None:  # fmt: skip
    """One step of AdamW, in place; `genai_perf.optim.AdamW8bit` calls it for each parameter.

    p = (1 - lr wd) p - lr m' / (sqrt(v') + eps), m' and v' the moments with their bias corrected.

    Args:
        p: the parameter, fp32, bf16 or fp16, contiguous; computed in fp32, rounded once.
        grad: of p's shape. On a CPU a gradient with NaN, infinity or an infinite square is refused
            before anything is written; on a GPU, where to ask is to wait, it spreads to its block.
        exp_avg, exp_avg_sq: the moments, of p's shape: fp32, or uint8 codes of the dynamic map.
        exp_avg_scale, exp_avg_sq_scale: with codes, fp32 (ceil(p.numel() / block_size),).
        step: 1 for the first.
        block_size: consecutive elements that share a scale.
        backend: "triton", "native" or "reference"; the first that can run it by default.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a gradient that is not finite.
        BackendUnsupported: the named backend cannot run this call.

    Source: 8-Bit Optimizers via Block-wise Quantization, arXiv:2110.02861.
    """
    check_step("adamw_step", p, grad, block_size, exp_avg=(exp_avg, exp_avg_scale),
               exp_avg_sq=(exp_avg_sq, exp_avg_sq_scale))  # fmt: skip
    _ADAMW(p, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, lr, *betas, eps,
           weight_decay, step, block_size, backend=backend)  # fmt: skip


def lion_step(p: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor,
              exp_avg_scale: torch.Tensor | None = None, *, lr: float,
              betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0,
              block_size: int = 256, backend: str | None = None) -> None:  # fmt: skip
    """One step of Lion, in place; `genai_perf.optim.Lion8bit` calls it for each parameter.

    p = (1 - lr wd) p - lr sign(beta1 m + (1 - beta1) grad), then m = beta2 m + (1 - beta2) grad.

    Args, Raises: as `adamw_step`.

    Source: Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675, algorithm 2.
    """
    check_step("lion_step", p, grad, block_size, exp_avg=(exp_avg, exp_avg_scale))
    _LION(p, grad, exp_avg, exp_avg_scale, lr, *betas, weight_decay, block_size, backend=backend)
