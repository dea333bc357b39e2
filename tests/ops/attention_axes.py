"""The features of attention as axes: all pairs of their values, and random choices of them."""

import random
from itertools import combinations

import torch

from genai_perf.ops.attention.cases import Case

AXES = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "lengths": ((1, 1), (1, 70), (33, 33), (64, 257), (150, 90), (0, 5), (5, 0), (97, 130)),
    "heads": ((1, 1), (4, 4), (4, 2), (7, 1)),
    "dims": ((8, 8), (40, 40), (59, 59), (80, 96), (111, 64), (64, 128), (192, 128)),
    "window": ("none", "causal", (20, None), (None, 9), (15, 4), "causal left"),
    "softcap": (0.0, 5.0),
    "alibi": (0, 1, 2),
    "sinks": (False, True),
    "mask": ("none", "packed", "bias bhqk", "bias hqk", "bias k", "mask bhqk", "mask bk",
             "blocks bh", "blocks ", "blocks and bias"),
    "block_size": ((128, 128), (16, 48), (50, 7)),
    "dropout_p": (0.0, 0.3),
}  # fmt: skip

Choice = dict[str, object]


def pairwise(seed: int = 0, tries: int = 40, axes: dict[str, tuple] = AXES) -> list[Choice]:
    """Choices among which every pair of values of two axes occurs; greedy, the same for a seed."""
    rng = random.Random(seed)
    names = list(axes)
    left = {
        ((a, i), (b, j))
        for a, b in combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }

    def pairs(indices):
        return {((a, indices[a]), (b, indices[b])) for a, b in combinations(names, 2)}

    chosen = []
    while left:
        wanted = dict(min(left, key=str))  # one pair that is left is in every try
        candidates = [
            {n: wanted.get(n, rng.randrange(len(axes[n]))) for n in names} for _ in range(tries)
        ]
        best = max(candidates, key=lambda indices: len(pairs(indices) & left))
        left -= pairs(best)
        chosen.append({n: axes[n][i] for n, i in best.items()})
    return chosen


def random_choice(rng: random.Random) -> Choice:
    """A random value on every axis, with lengths and head dimensions of its own."""
    choice = {name: rng.choice(values) for name, values in AXES.items()}
    choice["lengths"] = (rng.randrange(0, 330), rng.randrange(0, 330))
    choice["dims"] = (rng.randrange(1, 200), rng.randrange(1, 200))
    choice["block_size"] = (rng.randrange(1, 140), rng.randrange(1, 140))
    side = rng.randrange(0, 300)
    choice["window"] = rng.choice(["none", "causal", (side, None), (None, side), (side, 3)])
    return choice


def case_of(choice: Choice, name: str) -> Case:
    seqlen_q, seqlen_k = choice["lengths"]
    heads, heads_k = choice["heads"]
    dim, dim_v = choice["dims"]
    window, mask = choice["window"], choice["mask"]
    sides = {"none": (None, None), "causal": (None, None), "causal left": (33, None)}
    kind, _, dims = mask.partition(" ")
    packed = ((seqlen_q, seqlen_k), (3, 40), (0, 0), (seqlen_q // 2, seqlen_k // 3))
    return Case(
        name,
        seqlen_q=seqlen_q, seqlen_k=seqlen_k, nheads=heads, nheads_k=heads_k,
        headdim=dim, headdim_v=dim_v, dtype=choice["dtype"],
        causal=window in ("causal", "causal left"), window_size=sides.get(window, window),
        softcap=choice["softcap"], alibi=choice["alibi"], sinks=choice["sinks"],
        bias="hqk" if mask == "blocks and bias" else dims if kind == "bias" else None,
        mask=dims if kind == "mask" else None,
        block_mask="h" if mask == "blocks and bias" else dims if kind == "blocks" else None,
        block_size=choice["block_size"], dropout_p=choice["dropout_p"],
        lengths=packed if mask == "packed" else (),
    )  # fmt: skip
