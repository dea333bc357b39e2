"""Gradients that the forward pass has computed; the backward pass hands them on."""

import torch
from torch.autograd.function import once_differentiable

from .op import INPLACE, LINEAR, ROWS
from .options import Options


def _times(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """grad * factor; grad itself where the factor is 1, as it is for loss.backward()."""
    if not torch.compiler.is_compiling() and factor.device.type == "cpu" and factor.item() == 1:
        return grad
    return grad * factor.to(grad.dtype)


class RowsLoss(torch.autograd.Function):
    """Loss of logits (rows, V) and its parts; only the first `vocab` columns are read."""

    @staticmethod
    def forward(ctx, logits, teacher, ids, logprobs, labels, weights, vocab, inplace, need_grad,
                options, backend):  # fmt: skip
        rest = (teacher, ids, logprobs, labels, weights)
        padded = vocab < logits.shape[1]
        if need_grad and (inplace or padded):
            grad = logits if inplace else logits.clone()
            loss = INPLACE(grad[:, :vocab], *rest, *options, backend=backend)
            grad[:, vocab:] = 0
        else:
            read = logits[:, :vocab] if padded else logits
            loss, grad = ROWS(read, *rest, need_grad, *options, backend=backend)
        o = Options(*options)
        parts = (loss * weights[:, None]).sum(0)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(parts)
        return o.soft_weight * parts[0] + o.hard_weight * parts[1], parts

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, dparts):
        (grad,) = ctx.saved_tensors
        return _times(grad, dloss), *(None,) * 10


class LinearLoss(torch.autograd.Function):
    """Loss of hidden states and a head, and its parts."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rest, vocab, chunk_bytes, needs, options, backend):
        loss, parts, *grads = LINEAR(hidden, weight, bias, *rest, vocab, chunk_bytes, *needs,
                                     *options, backend=backend)  # fmt: skip
        ctx.needs = needs
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, dparts):
        grads = (
            _times(grad, dloss) if needed else None
            for grad, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
        )
        return *grads, *(None,) * 6
