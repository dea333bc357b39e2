"""Distillation losses on Trainium by NKI kernels; see the op's README for what was proven where."""

import torch

from ...._backends import nki as toolchain
from .. import chunks
from ..options import Options
from ..values import check_values

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("forward_kl", "reverse_kl", "jsd")
MAX_VOCAB = 2**24  # positions in the vocabulary are exact in fp32 up to here


def _why_not(logits, teacher, ids, weights, options) -> str | None:
    if (reason := toolchain.why_not(logits, teacher, weights)) is not None:
        return reason
    o = Options(*options)
    if logits.dtype not in FLOATS or (teacher is not None and teacher.dtype not in FLOATS):
        return f"nki takes float32, bfloat16 and float16, got {logits.dtype}"
    if ids is not None:
        return "nki takes no top-k teacher"
    if o.kind not in KINDS:
        return f"nki takes the kinds {', '.join(KINDS)}, got {o.kind}"
    if o.softcap or o.teacher_softcap:
        return "nki takes no softcap"
    if not (o.logit_scale > 0 and o.teacher_logit_scale > 0):
        return "nki takes positive logit scales"
    if logits.shape[-1] >= MAX_VOCAB:
        return f"nki takes vocabularies below {MAX_VOCAB}, got {logits.shape[-1]}"
    return None


def why_not(logits, teacher, ids, logprobs, labels, weights, need_grad, *options) -> str | None:
    return _why_not(logits, teacher, ids, weights, options)


def why_not_inplace(logits, teacher, ids, logprobs, labels, weights, *options) -> str | None:
    return _why_not(logits, teacher, ids, weights, options)


def why_not_linear(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias,
                   teacher_logits, ids, logprobs, labels, weights, vocab, chunk_bytes, need_hidden,
                   need_weight, need_bias, *options) -> str | None:  # fmt: skip
    if (reason := toolchain.why_not(weight, teacher_weight)) is not None:
        return reason
    return _why_not(hidden, teacher_logits, ids, weights, options)


def forward(logits, teacher, ids, logprobs, labels, weights, need_grad, *options):
    o = Options(*options)
    check_values(logits.shape[-1], ids, logprobs, labels, weights)
    rows, vocab = logits.shape
    if rows == 0 or vocab == 0:
        loss = logits.new_zeros(rows, 2, dtype=torch.float32)
        return loss, torch.zeros_like(logits) if need_grad else logits.new_empty(0)
    from .kernel import distill_rows

    live = (weights != 0)[:, None]
    # Rows that count nowhere may hold anything, NaN too.
    student = torch.where(live, logits, 0)
    soft, hard = teacher is not None, labels is not None and o.hard_weight != 0
    other = torch.where(live, teacher, 0) if soft else student[:1, :1]
    label = torch.where(live, labels[:, None], 0).float() if hard else live.float()
    loss, grad = toolchain.launch(
        distill_rows, student, other, label, weights.float()[:, None].contiguous(),
        o.kind if soft else "none", hard, need_grad, o.logit_scale, o.teacher_logit_scale,
        1 / o.temperature, o.beta, o.soft_weight, o.hard_weight,
    )  # fmt: skip
    return torch.where(live, loss, 0.0), grad if need_grad else logits.new_empty(0)


inplace = chunks.in_place(forward)


def linear(*args):
    return chunks.run(forward, inplace, *args)
