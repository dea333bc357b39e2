"""The operators: rows of logits, rows in place, and the head fused with them."""

from ..._dispatch import Op
from .options import SCHEMA, accumulation_dtype

BACKENDS = ("triton", "nki", "native", "reference")
_ROWS = "Tensor? teacher_logits, Tensor? ids, Tensor? logprobs, Tensor? labels, Tensor weights"


def _loss_like(logits):
    return logits.new_empty((logits.shape[0], 2), dtype=accumulation_dtype(logits))


def _fake(logits, teacher, ids, logprobs, labels, weights, need_grad, *options, backend=None):
    return _loss_like(logits), logits.new_empty(logits.shape if need_grad else 0)


def _fake_inplace(logits, *args, backend=None):
    return _loss_like(logits)


def _fake_linear(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias,
                 teacher_logits, ids, logprobs, labels, weights, vocab, chunk_bytes, need_hidden,
                 need_weight, need_bias, *options, backend=None):  # fmt: skip
    dtype = accumulation_dtype(hidden)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(2, dtype=dtype),
        hidden.new_empty(hidden.shape if need_hidden else 0),
        hidden.new_empty(weight.shape, dtype=weight.dtype) if need_weight else hidden.new_empty(0),
        hidden.new_empty(bias.shape, dtype=bias.dtype) if need_bias else hidden.new_empty(0),
    )


# The loss of each row (rows, 2), divergence and cross entropy without weights, and the gradient of
# their weighted sum for the logits.
ROWS = Op(
    __package__,
    "distill_loss",
    f"(Tensor logits, {_ROWS}, bool need_grad, {SCHEMA}, *, str? backend=None) -> (Tensor, Tensor)",
    fake=_fake,
    backends=BACKENDS,
)
# The same, the gradient written over the logits.
INPLACE = Op(
    __package__,
    "distill_loss_",
    f"(Tensor(a!) logits, {_ROWS}, {SCHEMA}, *, str? backend=None) -> Tensor",
    fake=_fake_inplace,
    backends=BACKENDS,
    entry="inplace",
)
# loss, its two parts, and the gradients of hidden states, weight and bias.
LINEAR = Op(
    __package__,
    "fused_linear_distillation",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden, Tensor? teacher_weight,"
    f" Tensor? teacher_bias, {_ROWS}, SymInt vocab, int chunk_bytes, bool need_hidden,"
    f" bool need_weight, bool need_bias, {SCHEMA}, *, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_linear,
    backends=BACKENDS,
    entry="linear",
)
