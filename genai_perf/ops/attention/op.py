"""The operators of attention and their autograd, first and second order."""

import torch

from ..._dispatch import Op
from . import reference
from .options import DIFFERENTIABLE, SCHEMA, TENSORS, Options, present

BACKENDS = ("triton", "nki", "native", "reference")


def _forward_fake(q, k, v, *options, backend=None):
    *rest, heads, _ = q.shape  # (batch, seqlen_q), or (total,) for packed sequences
    return (
        q.new_empty(*rest, heads, v.shape[-1]),
        q.new_empty(*rest[:-1], heads, rest[-1], dtype=reference.lse_dtype(q)),
    )


def _backward_fake(dout, dlse, q, k, v, out, lse, bias_grad, *options, backend=None):
    o = Options(*options)
    bias = o.attn_bias if bias_grad else None
    return (*(x.new_empty(x.shape) for x in (q, k, v, *present(bias, o.sinks, like=q))),)


FORWARD = Op(
    __package__,
    "attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {SCHEMA}, *, str? backend=None) -> (Tensor, Tensor)",
    fake=_forward_fake,
    backends=BACKENDS,
)
# The gradients of q, k, v, attn_bias (if bias_grad) and sinks; those not asked for are empty.
BACKWARD = Op(
    __package__,
    "attention_bwd",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" bool bias_grad, {SCHEMA}, *, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    backends=BACKENDS,
    entry="backward",
)
_INPUTS = 3 + DIFFERENTIABLE
_NO_GRADS = (None,) * (len(Options._fields) - DIFFERENTIABLE)


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.options = inputs[3 + TENSORS :]
    ctx.backend = keyword_only_inputs["backend"]
    ctx.save_for_backward(*inputs[: 3 + TENSORS], *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    *inputs, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return *(None,) * _INPUTS, *_NO_GRADS
    if dout is None:
        dout = torch.zeros_like(out)
    q, k, v, *options = inputs
    options += ctx.options
    bias_grad = ctx.needs_input_grad[3]
    grads = BACKWARD(dout, dlse, q, k, v, out, lse, bias_grad, *options, backend=ctx.backend)
    wanted = ctx.needs_input_grad[:_INPUTS]
    grads = (g if needed else None for g, needed in zip(grads, wanted, strict=True))
    return *grads, *_NO_GRADS


def _is_leaf(x: torch.Tensor | None) -> bool:
    return x is not None and x.requires_grad


def _setup_second(ctx, inputs, keyword_only_inputs, output) -> None:
    dout, dlse, q, k, v, _, _, _, *options = inputs
    ctx.options = options[TENSORS:]
    ctx.save_for_backward(dout, dlse, q, k, v, *options[:TENSORS])
    ctx.set_materialize_grads(False)


def _backward_second(ctx, *grads):
    """By autograd through the reference: out and lse are functions of the inputs there, so that the
    whole derivative arrives at the inputs and nothing at out and lse."""
    dout, dlse, *inputs = ctx.saved_tensors
    with torch.enable_grad():
        wanted = [None if x is None else x.detach() for x in (dout, dlse, *inputs[:_INPUTS])]
        for x in wanted:
            if x is not None and x.is_floating_point():  # a mask of bools is not differentiable
                x.requires_grad_()
        upstream, leaves = wanted[:2], wanted[2:]
        outputs = reference.forward(*leaves, *inputs[_INPUTS:], *ctx.options)
        pairs = [(y, g) for y, g in zip(outputs, upstream, strict=True) if g is not None]
        present = [x for x in leaves if _is_leaf(x)]
        first = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], present, [g for _, g in pairs],
                create_graph=True, materialize_grads=True,
            )
        )  # fmt: skip
        first = [next(first) if _is_leaf(x) else None for x in leaves]
        pairs = [
            (f, g) for f, g in zip(first, grads, strict=True) if g is not None and f is not None
        ]
        second = iter(
            torch.autograd.grad(
                [f for f, _ in pairs], [x for x in wanted if _is_leaf(x)], [g for _, g in pairs],
                allow_unused=True,
            )
        )  # fmt: skip
    dout, dlse, *by_input = (next(second) if _is_leaf(x) else None for x in wanted)
    q, k, v, *tensors = by_input
    return dout, dlse, q, k, v, None, None, None, *tensors, *_NO_GRADS


FORWARD.register_autograd(_backward, setup_context=_setup_context, of_reference=True)
BACKWARD.register_autograd(_backward_second, setup_context=_setup_second, of_reference=True)
