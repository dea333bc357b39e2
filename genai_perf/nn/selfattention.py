"""Grouped-query self-attention for one's own models."""

import torch
from torch import nn

from .._checks import check_positive, fail
from ..ops.attention import attention

OP = "GroupedQueryAttention"


class GroupedQueryAttention(nn.Module):
    """Self-attention with fewer heads of keys and values than of queries, rotary where asked for.

    Its layers are named as in Llama (q_proj, k_proj, v_proj, o_proj), for weights to fit.

    Args:
        embed_dim: of input and output.
        num_heads: of queries.
        num_kv_heads: of keys and values, a divisor of num_heads; num_heads by default.
        head_dim: embed_dim // num_heads by default.
        bias: give q_proj, k_proj and v_proj a bias.
        causal, window_size, softcap: see `genai_perf.attention`.
        dropout: of the probabilities, while training.
        rotary_base: rotate queries and keys by position, with this base (10000.0 in Llama); None
            does not.
        rotary_dim: how many of the first dimensions are rotated, even; head_dim by default.
        rotary_interleaved: pairs are neighbours (GPT-J); otherwise they are half of rotary_dim
            apart (Llama, GPT-NeoX).

    Source: grouped queries: Ainslie et al., arXiv 2305.13245; rotary: Su et al., arXiv 2104.09864.
    """

    def __init__(self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, *,
                 head_dim: int | None = None, bias: bool = False, causal: bool = True,
                 window_size: tuple[int | None, int | None] = (None, None), softcap: float = 0.0,
                 dropout: float = 0.0, rotary_base: float | None = None,
                 rotary_dim: int | None = None, rotary_interleaved: bool = False,
                 device=None, dtype=None):  # fmt: skip
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive(OP, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads)
        if num_heads % num_kv_heads:
            fail(OP, "num_heads", f"a multiple of num_kv_heads ({num_kv_heads})", num_heads)
        if head_dim is None and embed_dim % num_heads:
            fail(OP, "embed_dim", f"a multiple of num_heads ({num_heads}), or give head_dim",
                 embed_dim)  # fmt: skip
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.rotary_base = rotary_base
        self.rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        if rotary_base is not None:
            check_positive(OP, rotary_base=rotary_base)
            if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
                fail(OP, "rotary_dim", f"even, from 2 to head_dim ({self.head_dim})",
                     self.rotary_dim)  # fmt: skip
        self.rotary_interleaved = rotary_interleaved
        self.causal, self.window_size, self.softcap = causal, window_size, softcap
        self.dropout = dropout
        made = {"device": device, "dtype": dtype}
        inner, inner_k = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, inner, bias=bias, **made)
        self.k_proj = nn.Linear(embed_dim, inner_k, bias=bias, **made)
        self.v_proj = nn.Linear(embed_dim, inner_k, bias=bias, **made)
        self.o_proj = nn.Linear(inner, embed_dim, bias=False, **made)

    def forward(self, x, *, positions=None, cu_seqlens=None, max_seqlen=None, attn_bias=None):
        """Attention of x over itself.

        Args:
            x: (batch, seqlen, embed_dim), or packed sequences (total, embed_dim) with cu_seqlens.
            positions: int (seqlen,), (batch, seqlen) or (total,), for rotary; from 0 in every
                sequence by default.
            cu_seqlens: int32 (batch + 1,), where packed sequences begin and end.
            max_seqlen: no packed sequence is longer.
            attn_bias: see `genai_perf.attention`.

        Returns:
            Of the shape and dtype of x.

        Raises:
            ValueError: an argument has the wrong shape, dtype or device.
        """
        if x.dim() != (3 if cu_seqlens is None else 2):
            layout = "(batch, seqlen, embed_dim), or with cu_seqlens (total, embed_dim)"
            fail(OP, "x", layout, f"shape {tuple(x.shape)}")
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim))
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rotary_base is not None:
            if positions is None:
                positions = _positions(x, cu_seqlens)
            elif positions.shape not in (x.shape[:-1], x.shape[-2:-1]):
                fail(OP, "positions", f"of shape {tuple(x.shape[:-1])}", tuple(positions.shape))
            cos, sin = self._angles(positions, q.dtype)
            q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        out = attention(
            q,
            k,
            v,
            causal=self.causal,
            window_size=self.window_size,
            softcap=self.softcap,
            attn_bias=attn_bias,
            dropout_p=self.dropout if self.training else 0.0,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
        )
        return self.o_proj(out.flatten(-2))

    def _angles(self, positions, dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (..., seqlen, 1, rotary_dim / 2)."""
        exponents = torch.arange(0, self.rotary_dim, 2, device=positions.device).double()
        frequency = self.rotary_base ** (-exponents / self.rotary_dim)
        angles = (positions[..., None].double() * frequency)[..., None, :]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _rotate(self, x, cos, sin) -> torch.Tensor:
        turned, rest = x.split((self.rotary_dim, x.shape[-1] - self.rotary_dim), -1)
        if self.rotary_interleaved:
            a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def _positions(x, cu_seqlens) -> torch.Tensor:
    places = torch.arange(x.shape[-2], device=x.device)
    if cu_seqlens is None:
        return places
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), places.int(), right=True)
    return places - cu_seqlens.long()[sequence.clamp(max=len(cu_seqlens) - 1)]
