"""The operators of attention and their autograd, first and second order."""

import torch

from ..._dispatch import Op
from . import reference
from .options import SCHEMA, Options

BACKENDS = ("native", "reference")


def _forward_fake(q, k, v, *options, backend=None):
    batch, seqlen_q, heads, _ = q.shape
    return (
        q.new_empty(batch, seqlen_q, heads, v.shape[3]),
        q.new_empty(batch, heads, seqlen_q, dtype=reference.lse_dtype(q)),
    )


def _backward_fake(dout, dlse, q, k, v, out, lse, *options, backend=None):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


FORWARD = Op(
    __package__,
    "attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {SCHEMA}, *, str? backend=None) -> (Tensor, Tensor)",
    fake=_forward_fake,
    backends=BACKENDS,
)
BACKWARD = Op(
    __package__,
    "attention_bwd",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {SCHEMA}, *, str? backend=None) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    backends=BACKENDS,
    entry="backward",
)
_NO_OPTIONS = (None,) * len(Options._fields)


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    q, k, v, *ctx.options = inputs
    ctx.backend = keyword_only_inputs["backend"]
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None, *_NO_OPTIONS
    if dout is None:
        dout = torch.zeros_like(out)
    grads = BACKWARD(dout, dlse, q, k, v, out, lse, *ctx.options, backend=ctx.backend)
    return *grads, *_NO_OPTIONS


def _setup_second(ctx, inputs, keyword_only_inputs, output) -> None:
    dout, dlse, q, k, v, _, _, *ctx.options = inputs
    ctx.save_for_backward(dout, dlse, q, k, v)
    ctx.set_materialize_grads(False)


def _backward_second(ctx, *grads):
    """By autograd through the reference: out and lse are functions of q, k and v there, so that the
    whole derivative arrives at q, k and v and nothing at out and lse."""
    dout, dlse, *qkv = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in (dout, dlse, *qkv)]
        pairs = zip(reference.forward(*leaves[2:], *ctx.options), leaves[:2], strict=True)
        outputs, upstream = zip(*((y, g) for y, g in pairs if g is not None), strict=True)
        first = torch.autograd.grad(
            outputs, leaves[2:], upstream, create_graph=True, materialize_grads=True
        )
        taken = [(f, g) for f, g in zip(first, grads, strict=True) if g is not None]
        if not taken:
            return None, None, None, None, None, None, None, *_NO_OPTIONS
        second = iter(
            torch.autograd.grad(
                [f for f, _ in taken],
                [x for x in leaves if x is not None],
                [g for _, g in taken],
                allow_unused=True,
            )
        )
    by_input = [None if x is None else next(second) for x in leaves]
    return *by_input, None, None, *_NO_OPTIONS


FORWARD.register_autograd(_backward, setup_context=_setup_context)
BACKWARD.register_autograd(_backward_second, setup_context=_setup_second)
