"""torch's FlexAttention, compiled."""

import torch

from ..problem import Problem, Unsupported, Variant
from .torch_sdpa import attention_variant, heads_first

MODULE = None
DEVICES = ("cpu", "cuda")
VARIANTS = {"flex-attention": ("attention",)}


def build(variant: str, problem: Problem) -> Variant:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if problem.device == "cpu" and problem.phase != "forward":
        raise Unsupported("flex_attention has no backward on the CPU")
    tensors = heads_first(problem)
    rows, columns = tensors[0].shape[2], tensors[1].shape[2]
    mask = None
    if problem.options["causal"]:
        shift = columns - rows
        mask = create_block_mask(lambda b, h, i, j: j <= i + shift, None, None, rows, columns,
                                 device=problem.device)  # fmt: skip
    compiled = torch.compile(flex_attention)

    def function(q, k, v):
        return compiled(q, k, v, block_mask=mask, enable_gqa=problem.options["group"] > 1)

    return attention_variant(problem, function, tensors)
