"""Attention in plain torch, with the whole score matrix: the oracle, on any device and in float64.

It computes in float32 for half precision, or with `upcast=False` in the dtype of q throughout: the
yardstick for the error that the dtype itself brings.
"""

import torch

from .dropout import factors
from .options import Options, present
from .packed import bounds


def why_not(*args) -> str | None:
    return None


why_not_backward = why_not


def lse_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _distance(seqlen_q: int, seqlen_k: int, device) -> torch.Tensor:
    """(seqlen_q, seqlen_k): key position minus query position, the last of both aligned."""
    i = torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q
    return torch.arange(seqlen_k, device=device)[None] - i


def visible(seqlen_q: int, seqlen_k: int, o: Options, device) -> torch.Tensor | None:
    """(seqlen_q, seqlen_k), True where the query sees the key; None if all do."""
    if o.window_left < 0 and o.window_right < 0:
        return None
    distance = _distance(seqlen_q, seqlen_k, device)
    mask = torch.ones_like(distance, dtype=torch.bool)
    if o.window_left >= 0:
        mask &= distance >= -o.window_left
    if o.window_right >= 0:
        mask &= distance <= o.window_right
    return mask


def _heads_first(x: torch.Tensor, dtype: torch.dtype, group: int = 1) -> torch.Tensor:
    x = x.to(dtype).transpose(1, 2)  # (batch, heads, seqlen, dim)
    return x.repeat_interleave(group, dim=1) if group > 1 else x


def _inputs(q, k, v, upcast: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads first, in the dtype to compute in, with as many key heads as query heads."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    dtype, group = torch.float32 if upcast and half else q.dtype, q.shape[2] // k.shape[2]
    return _heads_first(q, dtype), _heads_first(k, dtype, group), _heads_first(v, dtype, group)


def _scores(q, k, o: Options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(batch, heads, seqlen_q, seqlen_k) scores, and where there is a softcap its derivative."""
    s, slope = (q * o.softmax_scale) @ k.transpose(-1, -2), None
    if o.softcap:
        t = torch.tanh(s / o.softcap)
        s, slope = t * o.softcap, 1 - t * t
    if o.alibi_slopes is not None:
        slopes = o.alibi_slopes.to(s.dtype)[..., None, None]
        s = s - slopes * _distance(q.shape[2], k.shape[2], q.device).abs()
    if o.attn_bias is not None:
        if o.attn_bias.dtype == torch.bool:
            s = s.masked_fill(~o.attn_bias, -torch.inf)
        else:
            s = s + o.attn_bias.to(s.dtype)
    if o.block_mask is not None:
        s = s.masked_fill(~_whole(o, q.shape[2], k.shape[2]), -torch.inf)
    mask = visible(q.shape[2], k.shape[2], o, q.device)
    return s if mask is None else s.masked_fill(~mask, -torch.inf), slope


def _whole(o: Options, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    """block_mask as a mask of single queries and keys."""
    by_query = o.block_mask.repeat_interleave(o.block_q, 2)[:, :, :seqlen_q]
    return by_query.repeat_interleave(o.block_k, 3)[..., :seqlen_k]


def _dropout(p, o: Options, first_sequence: int) -> torch.Tensor | None:
    if not o.dropout_p:
        return None
    return factors(o.rng_state, o.dropout_p, first_sequence * p.shape[1], p.shape, p.dtype)


def _log_sum_exp(s, sinks):
    """Along the last dimension; -inf, with gradient 0, for a row that is empty or all -inf."""
    if sinks is not None:
        column = sinks.to(s.dtype)[:, None, None].expand(*s.shape[:-1], 1)
        s = torch.cat([s, column], dim=-1)
    if s.shape[-1] == 0:
        return s.sum(-1) - torch.inf
    blind = (s == -torch.inf).all(-1)
    lse = torch.logsumexp(s.masked_fill(blind.unsqueeze(-1), 0), dim=-1)
    return lse.masked_fill(blind, -torch.inf)


def _probabilities(s, lse):
    # A row without a key has lse -inf; +inf makes its probabilities exp(-inf - inf) = 0.
    return torch.exp(s - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1).to(s.dtype))


def _each_sequence(q, k, o: Options):
    """(number, slice of the query rows, slice of the key rows, options as a batch of one)."""
    cu_q = bounds(o.cu_seqlens_q, q.shape[0], o.max_seqlen_q, "q")
    cu_k = bounds(o.cu_seqlens_k, k.shape[0], o.max_seqlen_k, "k")
    by_batch = o.alibi_slopes is not None and o.alibi_slopes.dim() == 2
    for b in range(len(cu_q) - 1):
        slopes = o.alibi_slopes[b] if by_batch else o.alibi_slopes
        alone = o._replace(cu_seqlens_q=None, cu_seqlens_k=None, alibi_slopes=slopes)
        yield b, slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1]), alone


def _join(parts: list[torch.Tensor], total: int, dim: int, rest: float = 0.0) -> torch.Tensor:
    """The sequences' parts one after another along `dim`, then `rest` for rows past the last."""
    used = sum(part.shape[dim] for part in parts)
    shape = (*parts[0].shape[:dim], total - used, *parts[0].shape[dim + 1 :])
    return torch.cat([*parts, parts[0].new_full(shape, rest)], dim)


def _forward_packed(q, k, v, o: Options, upcast: bool):
    outs, lses = [q.new_empty(0, q.shape[1], v.shape[2])], [q.new_empty(q.shape[1], 0)]
    lses[0] = lses[0].to(lse_dtype(q))
    for b, rows, keys, alone in _each_sequence(q, k, o):
        out, lse = forward(
            q[None, rows], k[None, keys], v[None, keys], *alone, upcast=upcast, first_sequence=b
        )
        outs.append(out[0])
        lses.append(lse[0])
    return _join(outs, q.shape[0], 0), _join(lses, q.shape[0], 1, -torch.inf)


def _backward_packed(dout, dlse, q, k, v, out, lse, o: Options, upcast: bool):
    dqs, dks, dvs = ([x.new_empty(0, *x.shape[1:])] for x in (q, k, v))
    dsinks = None if o.sinks is None else torch.zeros_like(o.sinks)
    for b, rows, keys, alone in _each_sequence(q, k, o):
        dq, dk, dv, _, dsink = backward(
            dout[None, rows], None if dlse is None else dlse[None, :, rows],
            q[None, rows], k[None, keys], v[None, keys], out[None, rows], lse[None, :, rows],
            False, *alone, upcast=upcast, first_sequence=b,
        )  # fmt: skip
        for grads, grad in ((dqs, dq), (dks, dk), (dvs, dv)):
            grads.append(grad[0])
        dsinks = None if dsinks is None else dsinks + dsink
    joined = [_join(x, y.shape[0], 0) for x, y in ((dqs, q), (dks, k), (dvs, v))]
    return *joined, *present(None, dsinks, like=q)


def forward(q, k, v, *options, upcast=True, first_sequence=0):
    o = Options(*options)
    if o.cu_seqlens_q is not None:
        return _forward_packed(q, k, v, o, upcast)
    qh, kh, vh = _inputs(q, k, v, upcast)
    s, _ = _scores(qh, kh, o)
    lse = _log_sum_exp(s, o.sinks)
    p = _probabilities(s, lse)
    kept = _dropout(p, o, first_sequence)
    out = (p if kept is None else p * kept) @ vh
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.to(lse_dtype(q))


def backward(dout, dlse, q, k, v, out, lse, bias_grad, *options, upcast=True, first_sequence=0):
    """dS = P * (dO V^T - rowsum(dO O) + dlse), dV = P^T dO, dQ = scale dS K, dK = scale dS^T Q.

    With dropout, dO V^T and the P of dV are multiplied by its factors, 0 or 1 / (1 - dropout_p).
    """
    o = Options(*options)
    if o.cu_seqlens_q is not None:
        return _backward_packed(dout, dlse, q, k, v, out, lse, o, upcast)
    qh, kh, vh = _inputs(q, k, v, upcast)
    do, oh = _heads_first(dout, qh.dtype), _heads_first(out, qh.dtype)
    s, slope = _scores(qh, kh, o)
    p = _probabilities(s, lse)
    delta = (do * oh).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(delta.dtype)
    dp, kept = do @ vh.transpose(-1, -2), _dropout(p, o, first_sequence)
    ds = p * ((dp if kept is None else dp * kept) - delta.unsqueeze(-1))
    dbias = dsinks = None
    if bias_grad:
        dbias = ds.sum_to_size(o.attn_bias.shape).to(o.attn_bias.dtype)
    if slope is not None:
        ds = ds * slope
    dq = ds @ kh * o.softmax_scale
    dk = ds.transpose(-1, -2) @ qh * o.softmax_scale
    dv = (p if kept is None else p * kept).transpose(-1, -2) @ do
    if o.sinks is not None:  # a key with value 0, so dP = 0
        p_sink = _probabilities(o.sinks.to(s.dtype)[:, None, None], lse).squeeze(-1)
        dsinks = -(p_sink * delta).sum((0, 2)).to(o.sinks.dtype)

    def collect(grad, like):  # (batch, heads, seqlen, dim) to the layout and heads of `like`
        grad = grad.unflatten(1, (like.shape[2], -1)).sum(2).transpose(1, 2)
        return grad.to(like.dtype).contiguous()

    return collect(dq, q), collect(dk, k), collect(dv, v), *present(dbias, dsinks, like=q)
