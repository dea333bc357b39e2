"""A Llama decoder in plain PyTorch, with the parameter names of transformers' LlamaForCausalLM.

The attention is `genai_perf.attention`; everything else is torch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import genai_perf as gp


@dataclass(frozen=True)
class Config:
    vocab_size: int = 4096
    hidden: int = 256
    layers: int = 4
    nheads: int = 4
    nheads_k: int = 2
    headdim: int = 64
    intermediate: int = 768
    max_positions: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


def rope_table(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (max_positions, 1, headdim / 2)."""
    inverse = config.rope_theta ** -(torch.arange(0, config.headdim, 2) / config.headdim)
    angle = torch.outer(torch.arange(config.max_positions).float(), inverse)[:, None]
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def torch_attention(q, k, v, *, causal):
    """The same call through torch's own kernel, to compare with."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(
        1, 2
    )


class RMSNorm(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden))
        self.eps = config.norm_eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    def __init__(self, config: Config, attend):
        super().__init__()
        self.heads = (config.nheads, config.nheads_k, config.headdim)
        self.q_proj = nn.Linear(config.hidden, config.nheads * config.headdim, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.nheads_k * config.headdim, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.nheads_k * config.headdim, bias=False)
        self.o_proj = nn.Linear(config.nheads * config.headdim, config.hidden, bias=False)
        self.attend = attend

    def forward(self, x, cos, sin):
        nheads, nheads_k, headdim = self.heads
        q = rotate(self.q_proj(x).unflatten(-1, (nheads, headdim)), cos, sin)
        k = rotate(self.k_proj(x).unflatten(-1, (nheads_k, headdim)), cos, sin)
        v = self.v_proj(x).unflatten(-1, (nheads_k, headdim))
        return self.o_proj(self.attend(q, k, v, causal=True).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, attend):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, attend)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyLM(nn.Module):
    """Token ids (batch, seqlen) to logits (batch, seqlen, vocab_size); the embedding is tied."""

    def __init__(self, config: Config, attend=gp.attention):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(Block(config, attend) for _ in range(config.layers))
        self.norm = RMSNorm(config)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Linear weights of variance 1 / in_features; the outputs of a block begin at zero."""
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=0.0 if residual else module.in_features**-0.5)

    def forward(self, ids):
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def loss(self, ids):
        """Mean next-token cross entropy in nats, ids (batch, seqlen + 1)."""
        logits = self(ids[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
