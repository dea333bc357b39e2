"""gp.distill.distillation_loss and gp.distill.fused_linear_distillation_loss: checks, then ops."""

import torch
from torch import Tensor

from ..._checks import check_dtype, check_ndim, check_positive, check_same, check_tensor, fail
from .autograd import LinearLoss, RowsLoss
from .options import Options, accumulation_dtype, make_options
from .teachers import Logits, TopK

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Padded vocabularies of one tokenizer differ by what rounds them up, not by more.
_PADDING = 2048


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK | None,
    labels: Tensor | None = None,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    alpha: float = 0.0,
    beta: float | None = None,
    t2_scale: bool = True,
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    teacher_softcap: float = 0.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    inplace: bool = False,
    return_parts: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """How far a student's next-token distribution is from its teacher's, mean over tokens.

    loss = sum over valid tokens of [(1 - alpha) T^2 D(teacher, student) + alpha CE(label)] / items

    with p = softmax(student / T), q = softmax(teacher / T) and D, by `kind`:

    - "forward_kl": KL(q || p).  "reverse_kl": KL(p || q).
    - "jsd": beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; beta 0 is forward
      KL and 1 reverse KL by convention.
    - "skew_kl": KL(q || beta q + (1 - beta) p).  "skew_reverse_kl": KL(p || beta p + (1 - beta) q).
    - "tv": half of sum |p - q|.

    The cross entropy is of the logits at temperature 1. Labels stand beside the logits that predict
    them: the caller has shifted them. Sums over the vocabulary are in fp32 (float64 for float64).

    Args:
        student_logits: (..., V), fp32, bf16, fp16 or float64.
        teacher_logits: (..., V'), no gradient; or a TopK; None with alpha=1.
        labels: (...) int64; tokens of label `ignore_index` count nowhere, and nothing of them is
            read. Needed if alpha > 0; with alpha 0 they only say which tokens count.
        kind: see above.
        temperature: T > 0.
        alpha: weight of the labels, 0 (the teacher alone) to 1.
        beta: None is 0.5 for jsd and 0.1 for the skew kinds.
        t2_scale: whether D is multiplied by T^2, which keeps its gradient's size when T changes.
        num_items: what the sum is divided by; None: the number of valid tokens (at least 1). With
            gradient accumulation, the count over all of the step's batches.
        softcap, logit_scale: logits become softcap * tanh(logit_scale * x / softcap); softcap 0 is
            none. teacher_softcap and teacher_logit_scale do the same to the teacher's.
        vocab_size: tokens that the tokenizer has; logits beyond are padding and left out on both
            sides. None: the smaller of V and V'.
        inplace: write the gradient over student_logits, whose values are lost.
        return_parts: also return the means of D (without T^2) and of the cross entropy.
        backend: "triton", "native" or "reference"; None takes the first that can run the call.

    Returns:
        (), fp32 (float64 for float64); with return_parts also (2), detached. 0 with gradient 0
        where no token is valid.

    Raises:
        ValueError: a shape, dtype, label, id or number that cannot be.
        BackendUnsupported: the named backend cannot run this call.

    Source: Hinton et al., arXiv:1503.02531 (T^2); generalized JSD: Agarwal et al., arXiv:2306.13649
    (GKD); skew KL: Ko et al., arXiv:2402.03898 (DistiLLM).
    """
    op = "distillation_loss"
    check_tensor(op, student_logits=student_logits)
    check_dtype(op, FLOATS, student_logits=student_logits)
    if student_logits.dim() < 2:
        fail(op, "student_logits", "(..., V) (2 or more dimensions)",
             f"shape {tuple(student_logits.shape)}")  # fmt: skip
    teacher = teacher_logits.logits if isinstance(teacher_logits, Logits) else teacher_logits
    leading, vocab = student_logits.shape[:-1], student_logits.shape[-1]
    options = _options(op, teacher, kind, temperature, alpha, beta, t2_scale, logit_scale, softcap,
                       teacher_logit_scale, teacher_softcap)  # fmt: skip
    _need(op, teacher is not None, labels, alpha)
    dense, ids, logprobs = _teacher_rows(op, teacher, leading, student_logits)
    vocab = _vocabulary(op, vocab, None if dense is None else dense.shape[-1], vocab_size)
    labels = _labels(op, labels, leading, student_logits)
    logits = student_logits.reshape(-1, student_logits.shape[-1])
    weights = _weights(op, labels, logits, ignore_index, num_items)
    loss, parts = RowsLoss.apply(
        logits, None if dense is None else dense[:, :vocab], ids, logprobs, labels, weights, vocab,
        inplace, torch.is_grad_enabled() and logits.requires_grad, options, backend,
    )  # fmt: skip
    return (loss, parts) if return_parts else loss


def fused_linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    teacher: TopK | Logits | None = None,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    alpha: float = 0.0,
    beta: float | None = None,
    t2_scale: bool = True,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    teacher_softcap: float = 0.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk_bytes: int = 128 << 20,
    return_parts: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`distillation_loss` of hidden @ weight.T + bias, whose logits never exist as a whole.

    Tokens go through in chunks whose logits take `chunk_bytes`; the gradient is computed with the
    loss, so nothing is computed twice and the backward pass only hands it on. The gradient of the
    weight is summed over chunks in fp32. Tokens whose label is ignore_index cost nothing. Logits
    and their gradient are fp32 whatever the dtypes, also under autocast.

    The teacher is one of: teacher_hidden and teacher_weight; `teacher=TopK(ids, logprobs)`, which
    needs no product of the teacher's; `teacher=Logits(logits)`; nothing, with alpha=1.

    Args:
        student_hidden: (..., H), fp32, bf16, fp16 or float64.
        student_weight: (V, H), as nn.Linear holds it; may be that of the tied embedding.
        teacher_hidden: (..., H'), no gradient.
        teacher_weight: (V', H'), no gradient.
        labels: (...) int64, beside the hidden states that predict them.
        teacher: see above; the leading dimensions are those of student_hidden.
        student_bias, teacher_bias: (V), (V').
        vocab_size: as in `distillation_loss`: the rows of both weights beyond it are padding.
        chunk_bytes: of fp32 logits at a time, student and teacher together.
        kind, temperature, alpha, beta, t2_scale, ignore_index, num_items, softcap, logit_scale,
        teacher_softcap, teacher_logit_scale, return_parts, backend: as in `distillation_loss`.

    Returns:
        (), fp32 (float64 for float64); with return_parts also (2), detached.

    Raises:
        ValueError: a shape, dtype, label, id or number that cannot be.
        BackendUnsupported: the named backend cannot run this call.
    """
    op = "fused_linear_distillation_loss"
    check_tensor(op, student_hidden=student_hidden, student_weight=student_weight)
    leading = student_hidden.shape[:-1]
    hidden, weight = _head(op, "student", student_hidden, student_weight, student_bias)
    check_positive(op, chunk_bytes=chunk_bytes)
    _one_teacher(op, teacher_hidden, teacher_weight, teacher_bias, teacher)
    options = _options(op, teacher, kind, temperature, alpha, beta, t2_scale, logit_scale, softcap,
                       teacher_logit_scale, teacher_softcap)  # fmt: skip
    _need(op, teacher is not None or teacher_hidden is not None, labels, alpha)
    teacher_rows = teacher_vocab = None
    if teacher_hidden is not None:
        if teacher_hidden.shape[:-1] != leading:
            fail(op, "teacher_hidden", f"{(*leading, 'H')} as student_hidden",
                 f"shape {tuple(teacher_hidden.shape)}")  # fmt: skip
        teacher_rows, teacher_weight = _head(op, "teacher", teacher_hidden, teacher_weight,
                                             teacher_bias)  # fmt: skip
        teacher_rows, teacher_weight = teacher_rows.detach(), teacher_weight.detach()
        teacher_bias = None if teacher_bias is None else teacher_bias.detach()
        teacher_vocab = len(teacher_weight)
        check_same(op, "device", student_hidden=hidden, teacher_hidden=teacher_rows)
    given = teacher.logits if isinstance(teacher, Logits) else teacher
    dense, ids, logprobs = _teacher_rows(op, given, leading, hidden)
    if dense is not None:
        teacher_vocab = dense.shape[-1]
    vocab = _vocabulary(op, len(weight), teacher_vocab, vocab_size)
    labels = _labels(op, labels, leading, hidden)
    weights = _weights(op, labels, hidden, ignore_index, num_items)
    enabled = torch.is_grad_enabled()
    needs = tuple(
        enabled and x is not None and x.requires_grad for x in (hidden, weight, student_bias)
    )
    rest = (teacher_rows, teacher_weight, teacher_bias, dense, ids, logprobs, labels, weights)
    loss, parts = LinearLoss.apply(hidden, weight, student_bias, rest, vocab, chunk_bytes, needs,
                                   options, backend)  # fmt: skip
    return (loss, parts) if return_parts else loss


def _options(op, teacher, kind, temperature, alpha, beta, t2_scale, logit_scale, softcap,
             teacher_logit_scale, teacher_softcap) -> Options:  # fmt: skip
    topk = isinstance(teacher, TopK)
    tail, at = (teacher.tail, teacher.temperature) if topk else ("bin", 1.0)
    options = make_options(op, kind, temperature, alpha, beta, t2_scale, tail, at, logit_scale,
                           softcap, teacher_logit_scale, teacher_softcap)  # fmt: skip
    if topk and tail == "bin" and at != temperature:
        raise ValueError(
            f"{op}: top-k log-probabilities taken at temperature {at} say nothing of the tail at "
            f"{temperature}: use TopK(..., tail='renorm') or take them at {temperature}"
        )
    return options


def _need(op: str, has_teacher: bool, labels: Tensor | None, alpha: float) -> None:
    if not has_teacher and alpha != 1:
        fail(op, "alpha", "1 where there is no teacher", alpha)
    if labels is None and alpha > 0:
        fail(op, "labels", f"given where alpha is {alpha}", None)


def _one_teacher(op, hidden, weight, bias, teacher) -> None:
    if teacher is not None and not isinstance(teacher, (TopK, Logits)):
        raise TypeError(f"{op}: teacher must be a TopK or Logits, got {type(teacher).__name__}")
    if (hidden is None) != (weight is None):
        fail(op, "teacher_hidden and teacher_weight", "given together", "one of them")
    if teacher is not None and hidden is not None:
        fail(op, "teacher", "None beside teacher_hidden", type(teacher).__name__)
    if bias is not None and hidden is None:
        fail(op, "teacher_bias", "None without teacher_hidden", "a tensor")


def _head(op: str, who: str, hidden: Tensor, weight: Tensor, bias: Tensor | None):
    """Hidden states as rows, and the weight, checked."""
    tensors = {f"{who}_hidden": hidden, f"{who}_weight": weight}
    if bias is not None:
        tensors[f"{who}_bias"] = bias
    check_tensor(op, **tensors)
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"{op}: {name} must be a plain tensor, got a DTensor: compute the loss inside of "
                "the forward of the module that is sharded, where its parameters are whole"
            )
    check_dtype(op, FLOATS, **tensors)
    check_same(op, "device", **tensors)
    check_ndim(op, 2, "(V, H)", **{f"{who}_weight": weight})
    if hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        fail(op, f"{who}_hidden", f"(..., {weight.shape[1]}) for a weight of shape "
             f"{tuple(weight.shape)}", f"shape {tuple(hidden.shape)}")  # fmt: skip
    if bias is not None and bias.shape != weight.shape[:1]:
        fail(op, f"{who}_bias", f"of shape ({len(weight)},)", f"shape {tuple(bias.shape)}")
    double = {t.dtype == torch.float64 for t in tensors.values()}
    if len(double) > 1:
        fail(op, f"{who}_hidden and {who}_weight", "both float64 or neither",
             f"{hidden.dtype} and {weight.dtype}")  # fmt: skip
    return hidden.reshape(-1, hidden.shape[-1]), weight


def _teacher_rows(op: str, teacher, leading: torch.Size, like: Tensor):
    """(logits, ids, logprobs) as rows, None what is not there."""
    if teacher is None:
        return None, None, None
    if isinstance(teacher, TopK):
        ids, logprobs = teacher.ids, teacher.logprobs.detach()
        if ids.shape[:-1] != leading:
            fail(op, "ids of the top-k teacher", f"{(*leading, 'k')} as the student",
                 f"shape {tuple(ids.shape)}")  # fmt: skip
        check_same(op, "device", student=like, ids=ids, logprobs=logprobs)
        k = ids.shape[-1]
        return None, ids.reshape(-1, k), logprobs.reshape(-1, k)
    check_tensor(op, teacher_logits=teacher)
    check_dtype(op, FLOATS, teacher_logits=teacher)
    check_same(op, "device", student=like, teacher_logits=teacher)
    if teacher.shape[:-1] != leading:
        fail(op, "teacher_logits", f"{(*leading, 'V')} as the student",
             f"shape {tuple(teacher.shape)}")  # fmt: skip
    return teacher.detach().reshape(-1, teacher.shape[-1]), None, None


def _vocabulary(op: str, student: int, teacher: int | None, vocab_size: int | None) -> int:
    """How many tokens both sides have."""
    least = student if teacher is None else min(student, teacher)
    if vocab_size is not None:
        if not 1 <= vocab_size <= least:
            fail(op, "vocab_size", f"from 1 to {least}, which both sides have", vocab_size)
        return vocab_size
    if teacher is not None and abs(student - teacher) > _PADDING:
        raise ValueError(
            f"{op}: vocabularies of {student} and {teacher} differ by more than padding: these "
            "look like different tokenizers, which cannot be compared token by token; give "
            "vocab_size if they are one tokenizer's"
        )
    return least


def _labels(op: str, labels: Tensor | None, leading: torch.Size, like: Tensor) -> Tensor | None:
    if labels is None:
        return None
    check_tensor(op, labels=labels)
    check_same(op, "device", student=like, labels=labels)
    if labels.dtype != torch.int64:
        fail(op, "labels", "int64", labels.dtype)
    if labels.shape != leading:
        fail(op, "labels", f"of shape {tuple(leading)}", f"shape {tuple(labels.shape)}")
    return labels.reshape(-1)


def _weights(op: str, labels: Tensor | None, rows: Tensor, ignore_index: int,
             num_items: float | Tensor | None) -> Tensor:  # fmt: skip
    """(rows,): 1 / items for the tokens that count, 0 for the others."""
    dtype = accumulation_dtype(rows)
    if labels is None:
        valid = torch.ones(len(rows), dtype=dtype, device=rows.device)
    else:
        valid = (labels != ignore_index).to(dtype)
    if num_items is None:
        num_items = valid.sum().clamp(min=1)
    elif not isinstance(num_items, Tensor):
        check_positive(op, num_items=num_items)
    elif num_items.numel() != 1:
        fail(op, "num_items", "one number", f"shape {tuple(num_items.shape)}")
    else:
        num_items = num_items.to(device=rows.device, dtype=dtype).reshape(())
    return valid / num_items
