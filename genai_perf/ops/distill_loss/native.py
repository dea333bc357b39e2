"""CPU kernels in C++ (csrc/cpu/distill_*): a row stays in cache from its sums to its gradient."""

import torch

from ..._backends import native
from . import chunks
from .options import KINDS, Options
from .values import refuse

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def why_not(logits, teacher, *rest) -> str | None:
    for tensor in (logits, teacher):
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"native takes float32, bfloat16 and float16, got {tensor.dtype}"
    return native.why_not(logits, teacher)


why_not_inplace = why_not


def why_not_linear(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, logits,
                   *rest) -> str | None:  # fmt: skip
    for tensor in (hidden, weight, teacher_hidden, teacher_weight, logits):
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"native takes float32, bfloat16 and float16, got {tensor.dtype}"
    return native.why_not(hidden, weight, teacher_hidden, teacher_weight, logits)


def forward(logits, teacher, ids, logprobs, labels, weights, need_grad, *options):
    logits = _rows(logits)
    grad = native.empty(logits.shape, logits.dtype) if need_grad else None
    loss = _run(logits, teacher, ids, logprobs, labels, weights, grad, Options(*options))
    return loss, logits.new_empty(0) if grad is None else grad


def inplace(logits, teacher, ids, logprobs, labels, weights, *options):
    rows = _rows(logits)
    loss = _run(rows, teacher, ids, logprobs, labels, weights, rows, Options(*options))
    if rows is not logits:
        logits.copy_(rows)
    return loss


def linear(*args):
    return chunks.run(forward, inplace, *args)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where the elements of a row are not beside each other."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _run(logits, teacher, ids, logprobs, labels, weights, grad, o: Options) -> torch.Tensor:
    count, vocab = logits.shape
    loss = torch.empty(count, 2)
    if count == 0:
        return loss
    code, address = native.DTYPE_CODES, native.pointer
    # Held until the kernel has run.
    teacher = None if teacher is None else _rows(teacher)
    k = 0 if ids is None else ids.shape[-1]
    if k:
        ids = ids.to(torch.int64).contiguous()
        logprobs = logprobs.to(torch.float32).contiguous()
    labels = None if labels is None else labels.contiguous()
    weights = weights.to(torch.float32).contiguous()
    error, row = native.lib().distill_loss(
        count, vocab, address(logits), logits.stride(0), code[logits.dtype], o.logit_scale,
        o.softcap, address(teacher), 0 if teacher is None else teacher.stride(0),
        0 if teacher is None else code[teacher.dtype], o.teacher_logit_scale, o.teacher_softcap,
        address(ids), address(logprobs), k, o.tail == "bin", o.topk_temperature / o.temperature,
        address(labels), address(weights), o.soft_weight, o.hard_weight, KINDS.index(o.kind),
        o.beta, o.temperature, address(grad), 0 if grad is None else grad.stride(0), address(loss),
        native.threads(),
    )  # fmt: skip
    if error:
        refuse(error, row, vocab, ids, logprobs, labels)
    return loss
