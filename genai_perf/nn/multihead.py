"""torch.nn.MultiheadAttention by `genai_perf.attention`."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from .._checks import fail
from ..ops.attention import attention

OP = "MultiheadAttention"


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: its constructor, state_dict, masks, layouts and results.

    With need_weights=False, attention runs by `genai_perf.attention`, forward and backward, without
    a matrix of seqlen x seqlen. With need_weights=True, torch's default, the weights have to be
    formed: torch's own slow path gives them, and the output with them.

    Differences: a query that sees no key gives the projection of 0, not NaN; dropout without
    weights has a generator of its own; nested tensors are refused; is_causal needs no attn_mask.

    Source: Vaswani et al., Attention Is All You Need (arXiv 1706.03762).
    """

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                average_attn_weights=True, is_causal=False):  # fmt: skip
        """See torch.nn.MultiheadAttention.

        Args:
            query, key, value: (seqlen, batch, embed_dim), or (batch, seqlen, embed_dim) with
                batch_first, or (seqlen, embed_dim).
            key_padding_mask: (batch, seqlen_k), bool with True where a key is hidden, or float,
                added to the scores.
            need_weights: also return the weights, slowly.
            attn_mask: (seqlen_q, seqlen_k) or (batch * num_heads, seqlen_q, seqlen_k), likewise.
            average_attn_weights: average the weights over the heads.
            is_causal: attn_mask, if any, is the causal one: query i sees keys j <= i.

        Returns:
            (output, weights), weights None without need_weights.

        Raises:
            ValueError: see above; also any wrong shape or dtype.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            fail(OP, "query, key and value", "dense tensors", "a nested one")
        if need_weights:
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask,
                                   average_attn_weights, is_causal)  # fmt: skip
        own = SimpleNamespace(
            num_heads=self.num_heads,
            bias=self.in_proj_bias,
            weights=(self.q_proj_weight, self.k_proj_weight, self.v_proj_weight),
            packed=self.in_proj_weight if self._qkv_same_embed_dim else None,
            bias_k=self.bias_k,
            bias_v=self.bias_v,
            zero=self.add_zero_attn,
            out=(self.out_proj.weight, self.out_proj.bias),
            dropout=self.dropout if self.training else 0.0,
            batch_dim=0 if self.batch_first else 1,
        )
        return _forward(own, query, key, value, key_padding_mask, attn_mask, is_causal), None


def multi_head_attention_forward(
    query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
    add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training=True, key_padding_mask=None,
    need_weights=True, attn_mask=None, use_separate_proj_weight=False, q_proj_weight=None,
    k_proj_weight=None, v_proj_weight=None, static_k=None, static_v=None, average_attn_weights=True,
    is_causal=False,
):  # fmt: skip
    """torch.nn.functional.multi_head_attention_forward with the arguments it has there; torch's own
    where need_weights."""
    if need_weights:
        return F.multi_head_attention_forward(
            query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k,
            bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training,
            key_padding_mask, need_weights, attn_mask, use_separate_proj_weight, q_proj_weight,
            k_proj_weight, v_proj_weight, static_k, static_v, average_attn_weights, is_causal,
        )  # fmt: skip
    if static_k is not None or static_v is not None:
        fail(OP, "static_k and static_v", "None with need_weights=False", "a tensor")
    own = SimpleNamespace(
        num_heads=num_heads,
        bias=in_proj_bias,
        weights=(q_proj_weight, k_proj_weight, v_proj_weight),
        packed=None if use_separate_proj_weight else in_proj_weight,
        bias_k=bias_k,
        bias_v=bias_v,
        zero=add_zero_attn,
        out=(out_proj_weight, out_proj_bias),
        dropout=dropout_p if training else 0.0,
        batch_dim=1,
    )
    return _forward(own, query, key, value, key_padding_mask, attn_mask, is_causal), None


def _forward(own, query, key, value, key_padding_mask, attn_mask, is_causal: bool):
    batched = query.dim() == 3
    if not batched:
        if query.dim() != 2 or key.dim() != 2 or value.dim() != 2:
            fail(OP, "query, key and value", "of 3 dimensions, or of 2", query.dim())
        same = key is query, value is key
        query = query.unsqueeze(own.batch_dim)
        key = query if same[0] else key.unsqueeze(own.batch_dim)
        value = key if same[1] else value.unsqueeze(own.batch_dim)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    q, k, v = _project(own, query, key, value)
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    extra = (own.bias_k is not None) + own.zero
    causal = is_causal and key_padding_mask is None and not extra
    if is_causal and attn_mask is None and not causal:
        hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
        attn_mask = hidden.triu(1)
    mask = None
    if not causal:
        mask = _merged(key_padding_mask, attn_mask, batch, own.num_heads, seqlen_q, seqlen_k)
    if extra:
        k, v = _longer(own, k, v)
        if mask is not None:
            mask = F.pad(mask, (0, extra), value=mask.dtype == torch.bool)
    window = (None, None)
    if causal:  # aligned top left: over the first keys, which no query looks past
        keys = min(seqlen_q, seqlen_k)
        k, v, window = k[:, :keys], v[:, :keys], (None, seqlen_q - keys)
    out = attention(q, k, v, attn_bias=mask, window_size=window, dropout_p=own.dropout)
    out = out.flatten(2) if own.batch_dim == 0 else out.transpose(0, 1).flatten(2)
    out = F.linear(out, *own.out)
    return out if batched else out.squeeze(own.batch_dim)


def _project(own, query, key, value) -> list[torch.Tensor]:
    """q, k, v (batch, seqlen, nheads, headdim)."""
    if own.packed is not None and query is key and key is value:
        parts = F.linear(query, own.packed, own.bias).chunk(3, -1)
    else:
        weights = own.weights if own.packed is None else own.packed.chunk(3)
        biases = (None,) * 3 if own.bias is None else own.bias.chunk(3)
        inputs = (query, key, value)
        parts = [F.linear(*x) for x in zip(inputs, weights, biases, strict=True)]
    heads = [x.unflatten(-1, (own.num_heads, -1)) for x in parts]
    return heads if own.batch_dim == 0 else [x.transpose(0, 1) for x in heads]


def _longer(own, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """bias_k and bias_v as one more key, zeros as another."""
    room = (k.shape[0], 1, *k.shape[2:])
    if own.bias_k is not None:
        rows = (x.to(k.dtype).view(1, 1, *k.shape[2:]) for x in (own.bias_k, own.bias_v))
        k, v = (torch.cat((x, row.expand(room)), 1) for x, row in zip((k, v), rows, strict=True))
    if own.zero:
        k, v = (torch.cat((x, x.new_zeros(room)), 1) for x in (k, v))
    return k, v


def _merged(padding, mask, batch: int, heads: int, seqlen_q: int, seqlen_k: int):
    """torch's masks, whose True hides, as one that `attention` takes, whose True shows."""
    if padding is not None:
        if padding.shape != (batch, seqlen_k):
            fail(OP, "key_padding_mask", f"(batch, seqlen_k) {(batch, seqlen_k)}",
                 tuple(padding.shape))  # fmt: skip
        padding = _seen(padding)[:, None, None]
    if mask is not None:
        wanted = (seqlen_q, seqlen_k), (batch * heads, seqlen_q, seqlen_k)
        if tuple(mask.shape) not in wanted:
            fail(OP, "attn_mask", f"{wanted[0]} or {wanted[1]}", tuple(mask.shape))
        mask = _seen(mask)
        mask = mask.unflatten(0, (batch, heads)) if mask.dim() == 3 else mask[None, None]
    if padding is None or mask is None:
        return mask if padding is None else padding
    if padding.dtype == mask.dtype == torch.bool:
        return padding & mask
    if padding.dtype == torch.bool:
        padding, mask = mask, padding
    return torch.where(mask, padding, -torch.inf) if mask.dtype == torch.bool else padding + mask


def _seen(mask: torch.Tensor) -> torch.Tensor:
    return ~mask if mask.dtype == torch.bool else mask
