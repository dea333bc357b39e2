"""The oracle: the divergences as they are written in papers, gradients by autograd.

Runs wherever torch runs, in float32, or in float64 for float64 logits.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from . import chunks
from .options import Options, accumulation_dtype
from .values import check_values


def why_not(*args) -> None:
    return None


why_not_inplace = why_not_linear = why_not


def scores(raw: Tensor, scale: float, softcap: float) -> Tensor:
    """The logits proper of a head's raw output."""
    z = raw * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def divergence(s: Tensor, t: Tensor, kind: str, beta: float) -> Tensor:
    """(N) from log-probabilities of student and teacher, (N, V) each."""
    p, q = s.exp(), t.exp()

    def kl(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # 0 log 0 is 0. The inner where keeps inf - inf out of the gradient.
        gone = weight == 0
        difference = torch.where(gone, 0.0, a) - torch.where(gone, 0.0, b)
        return torch.where(gone, 0.0, weight * difference).sum(-1)

    def log_mix(a: Tensor, b: Tensor, share: float) -> Tensor:
        return torch.logaddexp(a + math.log1p(-share), b + math.log(share))

    if kind == "forward_kl":
        return kl(q, t, s)
    if kind == "reverse_kl":
        return kl(p, s, t)
    if kind == "tv":
        return 0.5 * (p - q).abs().sum(-1)
    if kind == "jsd":
        m = log_mix(s, t, beta)
        return beta * kl(q, t, m) + (1 - beta) * kl(p, s, m)
    if kind == "skew_kl":
        return kl(q, t, log_mix(s, t, beta))
    return kl(p, s, log_mix(t, s, beta))


def rows(logits: Tensor, teacher: Tensor | None, ids: Tensor | None, logprobs: Tensor | None,
         labels: Tensor | None, weights: Tensor, o: Options) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(divergence, cross entropy) of each row, differentiable, 0 where the weight is 0."""
    dtype = accumulation_dtype(logits)
    live = weights != 0
    z = scores(logits.to(dtype), o.logit_scale, o.softcap)
    z = torch.where(live[:, None], z, 0.0)
    soft = z.new_zeros(len(z))
    if teacher is not None:
        zt = scores(teacher.to(dtype), o.teacher_logit_scale, o.teacher_softcap)
        zt = torch.where(live[:, None], zt, 0.0)
        s, t = (F.log_softmax(x / o.temperature, -1) for x in (z, zt))
        soft = divergence(s, t, o.kind, o.beta)
    elif ids is not None:
        k = ids.shape[-1]
        ids = torch.where(live[:, None], ids, torch.arange(k, device=ids.device)).long()
        kept = torch.where(live[:, None], logprobs, -math.log(k + 1)).to(dtype)
        soft = divergence(*bins(z / o.temperature, ids, kept, o), o.kind, o.beta)
    hard = z.new_zeros(len(z))
    if labels is not None and o.hard_weight:
        hard = F.cross_entropy(z, torch.where(live, labels, 0), reduction="none")
    return torch.where(live, soft, 0.0), torch.where(live, hard, 0.0)


def bins(u: Tensor, ids: Tensor, logprobs: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher over the k ids, with "bin" over the rest too."""
    if o.tail == "renorm":
        scale = o.topk_temperature / o.temperature
        return F.log_softmax(u.gather(-1, ids), -1), F.log_softmax(logprobs * scale, -1)
    s = F.log_softmax(u, -1)
    if ids.shape[-1] == u.shape[-1]:
        return s.gather(-1, ids), logprobs
    rest = s.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    left = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(0).log()
    # What is left of the teacher may be exactly 0: bounded as in the kernels.
    left = torch.maximum(left, rest.detach() - 80.0)
    return torch.cat([s.gather(-1, ids), rest], -1), torch.cat([logprobs, left], -1)


def forward(logits, teacher, ids, logprobs, labels, weights, need_grad, *options):
    o = Options(*options)
    check_values(logits.shape[-1], ids, logprobs, labels, weights)
    leaf = logits.detach().requires_grad_(need_grad)
    with torch.enable_grad():
        soft, hard = rows(leaf, teacher, ids, logprobs, labels, weights, o)
        total = (weights * (o.soft_weight * soft + o.hard_weight * hard)).sum()
    loss = torch.stack([soft.detach(), hard.detach()], -1)
    if not need_grad:
        return loss, logits.new_empty(0)
    if not total.requires_grad:
        return loss, torch.zeros_like(logits)
    return loss, torch.autograd.grad(total, leaf)[0]


inplace = chunks.in_place(forward)


def linear(*args):
    return chunks.run(forward, inplace, *args)
