"""The flash-attn package. Not run here: it needs a GPU."""

from ..problem import Problem, Unsupported, Variant
from .torch_sdpa import attention_variant

MODULE = "flash_attn"
DEVICES = ("cuda",)
VARIANTS = {"flash-attn": ("attention",)}


def build(variant: str, problem: Problem) -> Variant:
    import torch
    from flash_attn import flash_attn_func

    if problem.dtype == torch.float32:
        raise Unsupported("flash-attn takes float16 and bfloat16 only")
    causal = problem.options["causal"]
    return attention_variant(problem, lambda q, k, v: flash_attn_func(q, k, v, causal=causal),
                             list(problem.inputs.values()), result=lambda x: x)  # fmt: skip
