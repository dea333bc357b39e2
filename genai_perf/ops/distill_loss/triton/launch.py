"""Running the kernel: its constants and its configuration."""

from pathlib import Path

import torch

from ...._backends import triton as toolchain
from ..options import KINDS, Options
from .kernel import _distill_loss_kernel

TUNED = Path(__file__).parent.parent / "tuned"
# Not measured: enough bytes in flight for a memory-bound kernel, few enough registers to spill none
# (the ahead-of-time gate checks it).
MOST_BLOCK = 4096
WARPS = 8


def config(vocab: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Elements of a row at a time and warps: measured on this device if there is a table."""
    if device.type != "cuda":
        return {"BLOCK": 64, "num_warps": 1}  # several blocks even for the interpreter's short rows
    exact = {"kernel": "rows", "dtype": str(dtype).removeprefix("torch.")}
    measured = toolchain.measured(TUNED, device, exact, {"vocab": vocab})
    return measured or {"BLOCK": min(MOST_BLOCK, 1 << (vocab - 1).bit_length()), "num_warps": WARPS}


def rows(logits, teacher, ids, logprobs, labels, weights, need_grad, o: Options) -> torch.Tensor:
    """The loss of each row (rows, 2); logits become their gradient, or are spoilt."""
    count, vocab = logits.shape
    loss = torch.empty(count, 2, dtype=torch.float32, device=logits.device)
    if count == 0 or vocab == 0:
        return loss.zero_()
    if teacher is not None and teacher.stride(-1) != 1:
        teacher = teacher.contiguous()
    k = 0 if ids is None else ids.shape[-1]
    if k:
        ids = ids.to(torch.int32).contiguous()
        logprobs = logprobs.to(torch.float32).contiguous()
    hard = labels is not None and o.hard_weight != 0
    labels = labels.contiguous() if hard else None
    topk = 2 if o.tail == "bin" else 3
    toolchain.launch(
        _distill_loss_kernel, count, logits.device, logits, teacher, ids, logprobs, labels,
        weights.to(torch.float32).contiguous(), loss, logits.stride(0),
        0 if teacher is None else teacher.stride(0), vocab, k, o.logit_scale, o.softcap,
        o.teacher_logit_scale, o.teacher_softcap, 1 / o.temperature, o.temperature, o.beta,
        o.soft_weight, o.hard_weight, o.topk_temperature / o.temperature,
        KIND=KINDS.index(o.kind), TEACHER=1 if teacher is not None else topk if k else 0,
        HARD=hard, OWN_SUM=hard and o.temperature != 1, SOFTCAP=o.softcap > 0,
        TEACHER_SOFTCAP=o.teacher_softcap > 0, GRAD=need_grad,
        BLOCK_K=1 << (k - 1).bit_length() if k else 1, **config(vocab, logits.dtype, logits.device),
    )  # fmt: skip
    return loss
