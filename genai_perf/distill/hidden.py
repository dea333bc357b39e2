"""Losses on what is inside of the models: hidden states, and relations between tokens.

No attention map is taken from a model, so both may run flash kernels, and none exists as a whole:
relations are computed from queries, keys and values in chunks of rows, with their gradient.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._checks import check_choice, check_positive, check_tensor, fail
from ..ops.distill_loss.op import INPLACE
from ..ops.distill_loss.options import make_options

Pair = tuple[int, int]
# Which two of a layer's tensors are compared with each other: queries with keys as attention does,
# and values with values (MiniLM).
MINILM = (("q", "k"), ("v", "v"))


def layer_map(student_layers: int, teacher_layers: int, how: str = "uniform") -> tuple[Pair, ...]:
    """Which hidden state of the student learns from which of the teacher's.

    Indices are those of transformers' `hidden_states`: 0 is the embeddings, i what layer i gives.

    Args:
        student_layers, teacher_layers: numbers of layers.
        how: "uniform": each of the student's, spread over the teacher's (DistilBERT: every second);
            "last": the last one alone (MiniLM).
    """
    check_choice("layer_map", "how", how, ("uniform", "last"))
    check_positive("layer_map", student_layers=student_layers, teacher_layers=teacher_layers)
    if how == "last":
        return ((student_layers, teacher_layers),)
    step = teacher_layers / student_layers
    return tuple((i, round(i * step)) for i in range(student_layers + 1))


class HiddenProjections(nn.Module):
    """A linear map from the student's width to the teacher's for each pair of layers.

    Args:
        pairs: how many.
        student_width, teacher_width: sizes of the hidden states.
    """

    def __init__(self, pairs: int, student_width: int, teacher_width: int):
        super().__init__()
        self.maps = nn.ModuleList(
            nn.Linear(student_width, teacher_width, bias=False) for _ in range(pairs)
        )

    def forward(self, pair: int, hidden: Tensor) -> Tensor:
        return self.maps[pair](hidden)


def hidden_state_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    layers: Sequence[Pair] | None = None,
    kind: str = "cosine",
    projections: HiddenProjections | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Distance of hidden states, mean over valid tokens and over pairs of layers.

    "cosine": 1 - cos(s, t).  "mse": mean over the width of (s - t)^2.

    Args:
        student, teacher: hidden states (batch, seqlen, width), one tensor an index, as transformers
            returns them with output_hidden_states.
        layers: (student index, teacher index) pairs; None: `layer_map` of the two.
        kind: "cosine" (DistilBERT) or "mse" (TinyBERT).
        projections: needed where the widths differ.
        mask: (batch, seqlen), True or 1 for the tokens that count; None: all.

    Returns:
        (), fp32; 0 where no token counts.

    Raises:
        ValueError: shapes or indices that do not fit.

    Source: Sanh et al., arXiv:1910.01108, section 2; Jiao et al., arXiv:1909.10351, equation 8.
    """
    op = "hidden_state_loss"
    check_choice(op, "kind", kind, ("cosine", "mse"))
    pairs = layers if layers is not None else layer_map(len(student) - 1, len(teacher) - 1)
    if projections is not None and len(projections.maps) != len(pairs):
        fail(op, "projections", f"{len(pairs)}, one a pair", len(projections.maps))
    total = 0.0
    for number, (i, j) in enumerate(pairs):
        if not (0 <= i < len(student) and 0 <= j < len(teacher)):
            fail(op, f"layers[{number}]", f"below {(len(student), len(teacher))}", (i, j))
        s = student[i] if projections is None else projections(number, student[i])
        t = teacher[j].detach()
        if s.shape != t.shape:
            fail(op, f"hidden state {i} of the student", f"of the teacher's shape {tuple(t.shape)} "
                 "(projections map one width to another)", f"shape {tuple(s.shape)}")  # fmt: skip
        s, t = s.float(), t.float()
        if kind == "cosine":
            each = 1 - nn.functional.cosine_similarity(s, t, dim=-1)
        else:
            each = (s - t).square().mean(-1)
        valid = torch.ones_like(each) if mask is None else mask.to(each.dtype)
        each = torch.where(valid != 0, each, 0.0)
        total = total + each.sum() / valid.sum().clamp(min=1)
    return total / max(1, len(pairs))


def relation_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    *,
    heads: int | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    chunk_bytes: int = 64 << 20,
    backend: str | None = None,
) -> Tensor:
    """KL(R_teacher || R_student), R = softmax(a b^T / sqrt(width of a head)) over the tokens b.

    Mean over valid tokens, heads and batch. With a = queries and b = keys R is the attention map,
    with values twice MiniLM's value relation.

    Args:
        student, teacher: (a, b), each (batch, seqlen, nheads, headdim) of its own number and width
            of heads; b may have fewer heads (grouped queries).
        heads: relation heads: nheads and headdim of each tensor are regrouped into so many, for
            models whose heads differ (MiniLMv2); None: the heads as they are.
        causal: token i sees tokens up to i.
        mask: (batch, seqlen), True or 1 for the tokens that count; None: all.
        chunk_bytes: of fp32 relations at a time, both models' together.
        backend: as in `distillation_loss`.

    Returns:
        (), fp32; its gradient was computed with it. 0 where no token counts.

    Raises:
        ValueError: shapes that do not fit.

    Source: Wang et al., arXiv:2002.10957 (MiniLM) and arXiv:2012.15828 (relation heads).
    """
    op = "relation_loss"
    check_positive(op, chunk_bytes=chunk_bytes)
    sides = [_streams(op, who, pair, heads) for who, pair in
             (("student", student), ("teacher", teacher))]  # fmt: skip
    (sa, sb), (ta, tb) = sides
    if sa.shape[:3] != ta.shape[:3]:
        fail(op, "student and teacher", "of one batch, heads and seqlen (heads= regroups)",
             f"{tuple(sa.shape[:3])} and {tuple(ta.shape[:3])}")  # fmt: skip
    batch, _, seqlen, _ = sa.shape
    if mask is not None and mask.shape != (batch, seqlen):
        fail(op, "mask", f"of shape {(batch, seqlen)}", f"shape {tuple(mask.shape)}")
    mask = torch.ones(batch, seqlen, device=sa.device) if mask is None else mask
    return _Relation.apply(sa, sb, ta.detach(), tb.detach(), mask != 0, causal, chunk_bytes,
                           backend)  # fmt: skip


def minilm_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    *,
    relations: Sequence[tuple[str, str]] = MINILM,
    heads: int | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    chunk_bytes: int = 64 << 20,
) -> Tensor:
    """The sum of `relation_loss` over `relations` of one layer's "q", "k" and "v".

    Args:
        student, teacher: {"q", "k", "v"}, each (batch, seqlen, nheads, headdim).
        relations: pairs of names; MiniLM's are ("q", "k") and ("v", "v"), MiniLMv2's each
            with itself.
        heads, causal, mask, chunk_bytes: as in `relation_loss`.
    """
    return sum(
        relation_loss((student[a], student[b]), (teacher[a], teacher[b]), heads=heads,
                      causal=causal, mask=mask, chunk_bytes=chunk_bytes)
        for a, b in relations
    )  # fmt: skip


def _streams(op: str, who: str, pair: tuple[Tensor, Tensor], heads: int | None):
    """a and b as (batch, heads, seqlen, width), b's heads repeated to those of a."""
    a, b = pair
    check_tensor(op, **{f"{who} a": a, f"{who} b": b})
    for name, x in (("a", a), ("b", b)):
        if x.dim() != 4 or x.shape[:2] != a.shape[:2]:
            fail(op, f"{who} {name}", "(batch, seqlen, nheads, headdim)", f"shape {tuple(x.shape)}")
    if heads is None:
        if a.shape[3] != b.shape[3] or a.shape[2] % b.shape[2]:
            fail(op, f"{who} b", f"of headdim {a.shape[3]}, heads dividing {a.shape[2]}",
                 f"shape {tuple(b.shape)}")  # fmt: skip
    else:
        for x in (a, b):
            if x.shape[2:] != a.shape[2:] or (x.shape[2] * x.shape[3]) % heads:
                fail(op, f"{who} a and b", f"of one width that {heads} heads divide",
                     f"{tuple(a.shape[2:])} and {tuple(b.shape[2:])}")  # fmt: skip
        a, b = (x.reshape(*x.shape[:2], heads, -1) for x in (a, b))
    b = b.repeat_interleave(a.shape[2] // b.shape[2], 2)
    return a.transpose(1, 2), b.transpose(1, 2)


class _Relation(torch.autograd.Function):
    """Streams (batch, heads, seqlen, width); chunks of rows of all streams at once."""

    @staticmethod
    def forward(ctx, sa, sb, ta, tb, mask, causal, chunk_bytes, backend):
        batch, heads, seqlen, width = sa.shape
        streams = batch * heads
        options = make_options("relation_loss", "forward_kl", 1.0, 0.0, None, True, "bin", 1.0,
                               1.0, 0.0, 1.0, 0.0)  # fmt: skip
        a, b, ct, dt = (x.float().reshape(streams, seqlen, x.shape[-1]) for x in (sa, sb, ta, tb))
        rows = max(1, min(seqlen, chunk_bytes // max(1, streams * seqlen * 8)))
        valid = mask.repeat_interleave(heads, 0)  # (streams, seqlen)
        weights = valid.float() / (valid.sum().clamp(min=1))
        scales = width**-0.5, ta.shape[-1] ** -0.5
        da, db = torch.empty_like(a), torch.zeros_like(b)
        loss = a.new_zeros(())
        later = torch.arange(seqlen, device=a.device)
        with torch.autocast(a.device.type, enabled=False):
            for first in range(0, seqlen, rows):
                at = slice(first, min(first + rows, seqlen))
                hidden = ~valid[:, None, :]
                if causal:
                    hidden = hidden | (later[None, :] > later[at, None])[None]
                z, zt = (
                    torch.bmm(x[:, at], y.transpose(1, 2))
                    .mul_(scale)
                    .masked_fill_(hidden, -math.inf)
                    for x, y, scale in ((a, b, scales[0]), (ct, dt, scales[1]))
                )
                count = streams * (at.stop - at.start)
                flat, share = z.view(count, seqlen), weights[:, at].reshape(-1)
                each = INPLACE(flat, zt.view(count, seqlen), None, None, None, share, *options,
                               backend=backend)  # fmt: skip
                loss += (each[:, 0] * share).sum()
                z *= scales[0]
                da[:, at] = torch.bmm(z, b)
                db.baddbmm_(z.transpose(1, 2), a[:, at])
        ctx.save_for_backward(da.view(sa.shape).to(sa.dtype), db.view(sb.shape).to(sb.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        da, db = ctx.saved_tensors
        return da * dloss.to(da.dtype), db * dloss.to(db.dtype), *(None,) * 6
