"""Attention with every option, dense, differentiable by autograd, in the dtype it is given."""

from dataclasses import dataclass, replace

import torch


@dataclass
class Call:
    """Leaves and options of one call; window sides are None where unbounded."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None

    def leaves(self) -> dict[str, torch.Tensor]:
        found = {"q": self.q, "k": self.k, "v": self.v, "sinks": self.sinks, "bias": self.bias}
        return {n: x for n, x in found.items() if x is not None and x.is_floating_point()}


def one(call: Call, q, k, v):
    """out and lse of (batch, seqlen, nheads, headdim) tensors, computed in the dtype of q."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = (q * call.scale) @ k.transpose(-1, -2)
    if call.softcap:
        s = call.softcap * torch.tanh(s / call.softcap)
    sq, sk = s.shape[-2:]
    i = torch.arange(sq)[:, None] + sk - sq
    j = torch.arange(sk)[None]
    if call.slopes is not None:
        s = s - (call.slopes[..., None, None] * (i - j).abs()).to(s.dtype)
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if call.left is not None:
        seen &= j >= i - call.left
    if call.right is not None:
        seen &= j <= i + call.right
    if call.bias is not None:
        if call.bias.dtype == torch.bool:
            seen = seen & call.bias
        else:
            s = s + call.bias.to(s.dtype)
    s = s.masked_fill(~seen, -torch.inf)
    if call.sinks is not None:
        sink = call.sinks.to(s.dtype)[None, :, None, None].expand(*s.shape[:-1], 1)
        s = torch.cat([s, sink], -1)
    if s.shape[-1] == 0:
        return v.new_zeros(q.shape[0], sq, q.shape[1], v.shape[-1]), s.sum(-1) - torch.inf
    empty = (s == -torch.inf).all(-1)
    lse = torch.logsumexp(s.masked_fill(empty[..., None], 0.0), -1).masked_fill(empty, -torch.inf)
    p = torch.exp(s - lse.masked_fill(empty, torch.inf)[..., None])[..., :sk]
    return (p @ v).transpose(1, 2), lse


def forward(call: Call):
    """out and lse; packed sequences one by one."""
    if call.cu_seqlens_q is None:
        return one(call, call.q, call.k, call.v)
    starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    by_batch = call.slopes is not None and call.slopes.dim() == 2
    outs, lses = [], []
    for b in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        own = replace(call, slopes=call.slopes[b]) if by_batch else call
        out, lse = one(own, call.q[None, rows], call.k[None, keys], call.v[None, keys])
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, -1)


def gradients(call: Call, dout, dlse):
    """(out, lse, {name: gradient}) by autograd, every leaf in the dtype it has."""
    out, lse = forward(call)
    leaves = call.leaves()
    # Rows without a key have lse -inf, which is a constant.
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    total = (out * dout.to(out.dtype)).sum() + (finite * dlse.to(lse.dtype)).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    zeros = [
        g if g is not None else torch.zeros_like(x)
        for g, x in zip(grads, leaves.values(), strict=True)
    ]
    return out.detach(), lse.detach(), dict(zip(leaves, zeros, strict=True))


def cast(call: Call, dtype: torch.dtype) -> Call:
    """The same call with every leaf in `dtype`, requiring gradients."""
    return replace(call, **{
        name: x.detach().to(dtype).requires_grad_() for name, x in call.leaves().items()
    })  # fmt: skip
