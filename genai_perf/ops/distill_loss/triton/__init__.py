"""Distillation losses on GPUs by a Triton kernel; the op's README says what was proven and where.

The kernel is imported by the first call that runs it: a machine without Triton can still ask
`why_not`.
"""

import torch

from ...._backends import triton as toolchain
from .. import chunks
from ..options import Options
from ..values import check_values

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def why_not(logits, teacher, *rest) -> str | None:
    return _why_not(logits, teacher)


why_not_inplace = why_not


def why_not_linear(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, logits,
                   *rest) -> str | None:  # fmt: skip
    return _why_not(hidden, weight, teacher_hidden, teacher_weight, logits)


def _why_not(*tensors) -> str | None:
    if (reason := toolchain.why_not(*tensors)) is not None:
        return reason
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"triton takes float32, bfloat16 and float16, got {tensor.dtype}"
    return None


def _forward(logits, teacher, ids, logprobs, labels, weights, need_grad, *options):
    from . import launch

    # A top-k teacher's ids are marked in the row, so the row must be ours.
    work = logits.clone(memory_format=torch.contiguous_format)
    args = (teacher, ids, logprobs, labels, weights, need_grad, Options(*options))
    loss = launch.rows(work, *args)
    return loss, work if need_grad else logits.new_empty(0)


def _inplace(logits, teacher, ids, logprobs, labels, weights, *options):
    from . import launch

    if logits.stride(-1) != 1:
        loss, grad = _forward(logits, teacher, ids, logprobs, labels, weights, True, *options)
        logits.copy_(grad)
        return loss
    return launch.rows(logits, teacher, ids, logprobs, labels, weights, True, Options(*options))


def forward(logits, teacher, ids, logprobs, labels, weights, need_grad, *options):
    check_values(logits.shape[-1], ids, logprobs, labels, weights)
    return _forward(logits, teacher, ids, logprobs, labels, weights, need_grad, *options)


def inplace(logits, teacher, ids, logprobs, labels, weights, *options):
    check_values(logits.shape[-1], ids, logprobs, labels, weights)
    return _inplace(logits, teacher, ids, logprobs, labels, weights, *options)


def linear(*args):
    # Checked once: each check waits for the device.
    ids, logprobs, labels, weights, vocab = args[7:12]
    check_values(vocab, ids, logprobs, labels, weights)
    return chunks.run(_forward, _inplace, *args)
