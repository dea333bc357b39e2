"""The head fused with the loss: logits exist only for a chunk of tokens at a time.

For each chunk: both projections, the row kernel, which writes the gradient over the student's
logits, and two products that carry it on, to the hidden states and to the weight. Nothing is
computed twice, and nothing waits for the backward pass but a factor.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .options import Options, accumulation_dtype

_BLOCK_BYTES = 8 << 20  # of a weight that is converted to the dtype of the sums, at a time


def total(loss: Tensor, weights: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(scalar loss, its two parts) from the parts of each row; a row of weight 0 counts as 0."""
    parts = (loss * weights.to(loss.dtype)[:, None]).sum(0)
    return options.soft_weight * parts[0] + options.hard_weight * parts[1], parts


def chunk_rows(count: int, vocab: int, dense: bool, dtype: torch.dtype, chunk_bytes: int) -> int:
    """Tokens in a chunk: as many as fit, in chunks of nearly one size, at least 16."""
    most = max(16, chunk_bytes // (vocab * dtype.itemsize * (2 if dense else 1)))
    return -(-count // -(-count // most)) if count else 1


def _blocks(weight: Tensor, dtype: torch.dtype):
    """(slice, block of the weight in `dtype`): one block, where nothing needs converting."""
    if weight.dtype == dtype:
        yield slice(0, len(weight)), weight
        return
    step = max(1, _BLOCK_BYTES // max(1, weight.shape[1] * dtype.itemsize))
    for first in range(0, len(weight), step):
        at = slice(first, min(first + step, len(weight)))
        yield at, weight[at].to(dtype)


def _project(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out = hidden weight^T + bias, sums in the dtype of out."""
    hidden = hidden.to(out.dtype)
    for at, block in _blocks(weight, out.dtype):
        torch.mm(hidden, block.T, out=out[:, at])
    if bias is not None:
        out += bias.to(out.dtype)


def _carry_back(grad: Tensor, weight: Tensor) -> Tensor:
    """grad weight, sums in the dtype of grad."""
    out = None
    for at, block in _blocks(weight, grad.dtype):
        if out is None:
            out = grad[:, at] @ block
        else:
            out.addmm_(grad[:, at], block)
    return out


class _Rows:
    """The tokens with a weight, chunk by chunk: slices where all have one, else indices."""

    def __init__(self, weights: Tensor, size: Callable[[int], int]):
        live = weights != 0
        self.index = None if bool(live.all()) else live.nonzero().squeeze(1)
        self.count = len(weights) if self.index is None else len(self.index)
        self.size = size(self.count)

    def __iter__(self):
        for first in range(0, self.count, self.size):
            part = slice(first, min(first + self.size, self.count))
            yield part if self.index is None else self.index[part]


def _take(x: Tensor | None, rows) -> Tensor | None:
    return None if x is None else x[rows]


def in_place(forward):
    """A backend's `inplace` from its `forward`: the gradient is copied over the logits."""

    def inplace(logits, teacher, ids, logprobs, labels, weights, *options):
        loss, grad = forward(logits, teacher, ids, logprobs, labels, weights, True, *options)
        logits.copy_(grad)
        return loss

    return inplace


def run(forward, inplace, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias,
        teacher_logits, ids, logprobs, labels, weights, vocab, chunk_bytes, need_hidden,
        need_weight, need_bias, *options):  # fmt: skip
    """loss (), its parts (2), and the gradients asked for; those not asked for are empty.

    Args:
        forward, inplace: the row kernels of a backend.
        vocab: the first `vocab` rows of both weights are the vocabulary.
    """
    dtype = accumulation_dtype(hidden)
    o = Options(*options)
    w, b = weight[:vocab], _take(bias, slice(0, vocab))
    tw, tb = _take(teacher_weight, slice(0, vocab)), _take(teacher_bias, slice(0, vocab))
    given = None if teacher_logits is None else teacher_logits[:, :vocab]
    needed = need_hidden or need_weight or need_bias
    rows = _Rows(weights, lambda n: chunk_rows(n, vocab, tw is not None, dtype, chunk_bytes))
    new = hidden.new_empty
    tile = new((rows.size, vocab), dtype=dtype)
    teacher_tile = new((rows.size, vocab), dtype=dtype) if tw is not None else None
    parts = hidden.new_zeros(2, dtype=dtype)
    dh = dw = db = None
    if need_hidden:
        dh = torch.empty_like(hidden) if rows.index is None else torch.zeros_like(hidden)
    if need_weight:
        dw = new(weight.shape, dtype=dtype)
        dw[vocab if rows.count else 0 :] = 0
    if need_bias:
        db = hidden.new_zeros(bias.shape, dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for step, at in enumerate(rows):
            h = hidden[at]
            z = tile[: len(h)]
            _project(z, h, w, b)
            if tw is not None:
                zt = teacher_tile[: len(h)]
                _project(zt, teacher_hidden[at], tw, tb)
            else:
                zt = _take(given, at)
            rest = (zt, *(_take(x, at) for x in (ids, logprobs, labels, weights)))
            loss = inplace(z, *rest, *o) if needed else forward(z, *rest, False, *o)[0]
            parts += total(loss, weights[at], o)[1]
            if need_hidden:
                dh[at] = _carry_back(z, w).to(dh.dtype)
            if need_weight:
                dw[:vocab].addmm_(z.T, h.to(dtype), beta=float(step > 0))
            if need_bias:
                db[:vocab] += z.sum(0)
    empty = new(0)
    return (
        o.soft_weight * parts[0] + o.hard_weight * parts[1],
        parts,
        empty if dh is None else dh,
        new(0) if dw is None else dw.to(weight.dtype),
        new(0) if db is None else db.to(bias.dtype),
    )
