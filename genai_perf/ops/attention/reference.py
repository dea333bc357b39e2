"""Attention in plain torch, with the whole score matrix: the oracle, on any device and in float64.

It computes in float32 for half precision, or with `upcast=False` in the dtype of q throughout: the
yardstick for the error that the dtype itself brings.
"""

import torch


def why_not(*args) -> str | None:
    return None


why_not_backward = why_not


def _compute_dtype(q: torch.Tensor, upcast: bool) -> torch.dtype:
    return torch.float32 if upcast and q.dtype in (torch.bfloat16, torch.float16) else q.dtype


def _heads_first(x: torch.Tensor, dtype: torch.dtype, group: int = 1) -> torch.Tensor:
    x = x.to(dtype).transpose(1, 2)  # (batch, heads, seqlen, dim)
    return x.repeat_interleave(group, dim=1) if group > 1 else x


def visible(seqlen_q: int, seqlen_k: int, causal: bool, device) -> torch.Tensor | None:
    """(seqlen_q, seqlen_k), True where the query sees the key; None if all do."""
    if not causal:
        return None
    i = torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q
    return torch.arange(seqlen_k, device=device)[None] <= i


def _scores(q, k, causal, softmax_scale):
    s = (q * softmax_scale) @ k.transpose(-1, -2)
    mask = visible(q.shape[2], k.shape[2], causal, q.device)
    return s if mask is None else s.masked_fill(~mask, -torch.inf)


def _probabilities(s, lse):
    # A row without a key has lse -inf; +inf makes its probabilities exp(-inf - inf) = 0.
    return torch.exp(s - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1).to(s.dtype))


def forward(q, k, v, causal, softmax_scale, upcast=True):
    dtype, group = _compute_dtype(q, upcast), q.shape[2] // k.shape[2]
    qh, kh, vh = (_heads_first(x, dtype, g) for x, g in ((q, 1), (k, group), (v, group)))
    s = _scores(qh, kh, causal, softmax_scale)
    if s.shape[-1] == 0:
        lse = s.new_full(s.shape[:-1], -torch.inf)
    else:
        lse = torch.logsumexp(s, dim=-1)
    out = _probabilities(s, lse) @ vh
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.to(lse_dtype)


def backward(dout, dlse, q, k, v, out, lse, causal, softmax_scale, upcast=True):
    """dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O) + dlse), dQ = scale dS K, dK = scale dS^T Q."""
    dtype, heads_k = _compute_dtype(q, upcast), k.shape[2]
    group = q.shape[2] // heads_k
    qh, kh, vh = (_heads_first(x, dtype, g) for x, g in ((q, 1), (k, group), (v, group)))
    do, o = _heads_first(dout, dtype), _heads_first(out, dtype)
    p = _probabilities(_scores(qh, kh, causal, softmax_scale), lse)
    delta = (do * o).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(dtype)
    ds = p * (do @ vh.transpose(-1, -2) - delta.unsqueeze(-1))
    dq = ds @ kh * softmax_scale
    dk = ds.transpose(-1, -2) @ qh * softmax_scale
    dv = p.transpose(-1, -2) @ do

    def collect(grad, like):  # (batch, heads, seqlen, dim) to the layout and heads of `like`
        grad = grad.unflatten(1, (like.shape[2], -1)).sum(2).transpose(1, 2)
        return grad.to(like.dtype).contiguous()

    return collect(dq, q), collect(dk, k), collect(dv, v)
