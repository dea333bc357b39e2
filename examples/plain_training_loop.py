"""Attention as a drop-in in a plain PyTorch training loop, with packed sequences.

    python examples/plain_training_loop.py --steps 60

A byte-level language model learns Python's own standard library. Sequences of different lengths
stand end to end in one tensor; cu_seqlens says where each begins, so no token is padding. The
script runs as it is on a CPU (native kernels) and on a GPU (Triton kernels, --device cuda).
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from genai_perf.models import stdlib_text
from genai_perf.nn import GroupedQueryAttention

VOCABULARY = 256  # bytes


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        # The one line to change in a model of your own. Where the projections are already there,
        # call genai_perf.attention(q, k, v, causal=True, cu_seqlens_q=..., cu_seqlens_k=...), or
        # genai_perf.flash_attn_varlen_func, which takes the arguments of the flash-attn package.
        self.attention = GroupedQueryAttention(width, heads, heads // 2, rotary_base=10000.0)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x, cu_seqlens, max_seqlen):
        x = x + self.attention(self.norms[0](x), cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens, cu_seqlens, max_seqlen):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cu_seqlens, max_seqlen)
        return self.head(self.norm(x))


def packed_batch(texts: list[torch.Tensor], sequences: int, longest: int, device: str):
    """(tokens, targets, cu_seqlens): pieces of different lengths, end to end."""
    pieces = []
    for _ in range(sequences):
        text = texts[int(torch.randint(len(texts), ()))]
        length = int(torch.randint(longest // 4, longest + 1, ()))
        start = int(torch.randint(max(len(text) - length, 1), ()))
        pieces.append(text[start : start + length + 1])
    tokens = torch.cat([piece[:-1] for piece in pieces])
    targets = torch.cat([piece[1:] for piece in pieces])
    lengths = torch.tensor([0, *(len(piece) - 1 for piece in pieces)])
    cu_seqlens = lengths.cumsum(0).to(torch.int32)
    return tokens.to(device), targets.to(device), cu_seqlens.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sequences", type=int, default=16, help="in a batch")
    parser.add_argument("--seqlen", type=int, default=256, help="the longest")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    texts = [
        torch.tensor(list(text.encode())) for _, text in stdlib_text("calibration") if len(text) > 2
    ]
    model = Model(args.width, heads=4, layers=args.layers).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(args.steps):
        tokens, targets, cu_seqlens = packed_batch(texts, args.sequences, args.seqlen, args.device)
        loss = F.cross_entropy(model(tokens, cu_seqlens, args.seqlen), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {len(tokens)} tokens, none of padding")


if __name__ == "__main__":
    main()
