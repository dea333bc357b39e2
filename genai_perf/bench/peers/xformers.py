"""xFormers' memory_efficient_attention. Not run here: it needs a GPU."""

from ..problem import Problem, Unsupported, Variant
from .torch_sdpa import attention_variant

MODULE = "xformers"
DEVICES = ("cuda",)
VARIANTS = {"xformers": ("attention",)}


def build(variant: str, problem: Problem) -> Variant:
    from xformers.ops import fmha

    if problem.options["group"] > 1:
        raise Unsupported("memory_efficient_attention wants as many key heads as query heads here")
    kind = fmha.attn_bias.LowerTriangularFromBottomRightMask
    bias = kind() if problem.options["causal"] else None
    return attention_variant(
        problem, lambda q, k, v: fmha.memory_efficient_attention(q, k, v, attn_bias=bias),
        list(problem.inputs.values()), result=lambda x: x)  # fmt: skip
